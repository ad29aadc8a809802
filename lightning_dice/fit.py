"""Train: `python -m lightning_dice.fit model=unet`."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig

from lightning_dice.cli import rendezvous, slurm, sweep
from lightning_dice.cli.command import help_text, hydra_escape, refuse_renamed, split_arguments
from lightning_dice.cli.config import CONF_DIR, RUN_VARIABLE, explain_typos, register_resolvers, restore_environment
from lightning_dice.cli.errors import UserError, report_user_errors
from lightning_dice.cli.rendezvous import RunSpec
from lightning_dice.trials import Status, record_outcome

# Nothing heavy is imported at the top: --help and --cfg job must answer at once.

CHANNEL = rendezvous.Rendezvous(rendezvous.process_info())
JOB = slurm.RequeuedJob(sys.argv[1:])


def main() -> None:
    """Entry point of `python -m lightning_dice.fit` and `dice-fit`."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_text("fit"))
        return
    register_resolvers()
    with report_user_errors():
        try:
            if (start := rendezvous.inherited_run_spec()) is not None:
                train(start)
            elif CHANNEL.process.rank > 0:
                for start in CHANNEL.starts():
                    with restore_environment():
                        train(start)
            else:
                with rendezvous.announce_exit(CHANNEL):
                    lead(sys.argv[1:])
        finally:
            rendezvous.leave_process_group()


def lead(arguments: list[str]) -> None:
    """What the first process does: decide what is trained, and train it."""
    refuse_renamed(arguments)
    own, overrides = split_arguments(arguments, ["resume", "retry_failed"])
    resumed = [argument.removeprefix("resume=") for argument in own if argument.startswith("resume=")]
    earlier = JOB.earlier()
    if earlier is not None:
        # The command line is the one that began the run: it goes on as it was.
        print(f"the job was started again (SLURM_RESTART_COUNT={JOB.restarts}): going on in {earlier}", flush=True)
        if sweep.is_sweep(earlier):
            resume_sweep(str(earlier), [])
        else:
            resume(str(earlier), [])
    elif resumed and sweep.is_sweep(resumed[-1]):
        resume_sweep(resumed[-1], [argument for argument in arguments if not argument.startswith("resume=")])
    elif resumed:
        # Not through Hydra, which would check the overrides against the default config instead of the run's.
        resume(resumed[-1], hydra_escape(overrides))
    else:
        # Between overrides, argparse would refuse those behind it.
        begin(hydra_escape(sorted(arguments, key=lambda argument: argument not in ("-m", "--multirun"))))


def begin(arguments: list[str]) -> None:
    """Train a run or a sweep, as the command line says."""
    sys.argv[1:] = arguments
    if (hint := sweep.missing_plugin(arguments)) is not None:
        raise UserError(hint)
    with sweep.report_trials():
        try:
            from_command_line()
        except SystemExit as error:
            if error.code == 1 and not sweep.sweep_started():  # Hydra's; ours is 2.
                explain_typos("fit", sys.argv[1:])
            raise


def resume_sweep(folder: str, arguments: list[str]) -> None:
    """Go on with a sweep where it stopped.

    Args:
        folder: of the sweep.
        arguments: `retry_failed=true`, another launcher, more trials.

    Raises:
        UserError: an argument would change the trials.
        SystemExit: 1, as a trial failed.
    """
    retry = [argument for argument in arguments if argument.startswith("retry_failed=")]
    if retry and retry[-1] not in ("retry_failed=true", "retry_failed=false"):
        raise UserError(f"retry_failed must be true or false, got {retry[-1].removeprefix('retry_failed=')}")
    others = [argument for argument in arguments if argument not in retry]
    replayed = sweep.replay_arguments(folder, others, retry_failed=retry[-1:] == ["retry_failed=true"])
    if replayed is not None:
        begin(replayed)
        return
    with sweep.report_trials():
        pass  # It is done: its table is shown.


@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="fit")
def from_command_line(config: DictConfig) -> float | None:
    """Train as the command line says, in a new folder.

    Returns:
        The best value of what the checkpoint callback watches, for sweepers that optimize it.
    """
    hydra_config = HydraConfig.get()
    with restore_environment(), report_user_errors():
        from lightning_dice.cli import run_folder

        choices = hydra_config.runtime.choices
        config.name = config.name or f"{choices.get('experiment') or choices['data']}_{choices['model']}"
        if hydra_config.mode is not None and hydra_config.mode.name == "MULTIRUN":
            sweep_folder = Path(hydra_config.sweep.dir).expanduser().absolute()
            JOB.began(sweep_folder)
            folder = sweep_folder / str(hydra_config.job.num)
            overrides = list(hydra_config.overrides.task)
            return sweep.run_trial(
                folder, overrides, lambda: train_trial(config, folder), shared=lambda: CHANNEL.told == str(folder)
            )
        check_processes(config.trainer)
        folder = (
            run_folder.new_folder(config.runs, config.name)
            if config.folder is None
            else run_folder.exact_folder(config.folder)
        )
        try:
            complete(config, folder)
            run_folder.save_config(folder, config)
            JOB.began(folder)
            return train(start_of(folder))
        finally:
            # A mistake found before training leaves nothing but its config.
            if {path.name for path in folder.iterdir()} <= {
                run_folder.CONFIG,
                run_folder.TEMPLATE,
                run_folder.FINGERPRINT,
            }:
                shutil.rmtree(folder)


def complete(config: DictConfig, folder: Path) -> None:
    """Fill in what a config of a new run leaves open."""
    from lightning_dice.cli import run_folder

    config.folder = str(folder)
    run_folder.resolve_data(config)
    if config.seed is None:
        config.seed = secrets.randbelow(2**32)  # So that the run can be resumed, and told of.


def train_trial(config: DictConfig, folder: Path) -> None:
    """Train one trial of a sweep, or go on with it where it was broken off.

    Args:
        config: as the sweeper has composed it.
        folder: of the trial; there may be a config in it, and checkpoints.

    Raises:
        UserError: what is wrong with the trial.
        SystemExit: it was interrupted.
    """
    from lightning_dice.cli import run_folder

    check_processes(config.trainer)
    if CHANNEL.alone and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        raise UserError(
            f"a trial is one task, which starts a process for each device, but SLURM started "
            f"{os.environ['SLURM_NTASKS']}: give hydra.launcher.tasks_per_node=1 and trainer.devices=<devices>"
        )
    if (folder / run_folder.CONFIG).is_file():
        config = run_folder.reopen(folder)
    else:
        complete(config, folder)
    run_folder.save_config(folder, config)
    if CHANNEL.alone and _processes(config.trainer) != 1:
        sweep.run_in_own_process(folder)
        return
    train(start_of(folder, run_folder.newest_checkpoint(folder)))


def check_processes(trainer: DictConfig) -> None:
    """See that the Trainer's flags ask for the processes that were started from outside.

    Raises:
        UserError: they ask for others.
    """
    there, flags = CHANNEL.process, _processes(trainer)
    if there.processes is not None and there.processes > 1 and there.processes != (flags or there.processes):
        raise UserError(
            f"{there.processes} processes were started for trainer.devices={trainer.devices} trainer.num_nodes="
            f"{trainer.get('num_nodes', 1)}: set trainer.devices to the processes of a node, trainer.num_nodes to the "
            "nodes, and trainer.strategy=ddp"
        )


def _processes(trainer: DictConfig) -> int | None:
    """How many processes these flags ask for; `None` if that depends on the machine (`-1`, `auto`)."""
    devices = trainer.devices
    count = len(devices) if isinstance(devices, ListConfig) else int(devices) if str(devices).isdigit() else None
    return None if count is None else count * int(trainer.get("num_nodes", 1))


def resume(folder: str, overrides: list[str]) -> float | None:
    """Go on with a run from its last checkpoint.

    Args:
        folder: of the run.
        overrides: of values of its config, in Hydra's syntax; they are kept there.

    Raises:
        UserError: this is not the folder of a run, an override does not fit, or the checkpoint's weights do not.
    """
    from lightning_dice.cli import run_folder

    path = Path(folder).expanduser().absolute()
    config = run_folder.reopen(path, overrides)
    check_processes(config.trainer)
    checkpoint = run_folder.newest_checkpoint(path)
    if checkpoint is None:
        print(f"{path} has no checkpoint yet: training begins anew", flush=True)
    else:
        run_folder.check_weights(run_folder.build_module(config, trained=True), checkpoint)
    run_folder.save_config(path, config)
    JOB.began(path)
    return train(start_of(path, checkpoint))


def start_of(folder: Path, checkpoint: Path | None = None) -> RunSpec:
    """What all processes of a run start from: the config that lies in its folder."""
    from lightning_dice.cli import run_folder

    text = (folder / run_folder.CONFIG).read_text(encoding="utf-8")
    return RunSpec(str(folder), text, None if checkpoint is None else str(checkpoint))


def train(start: RunSpec) -> float | None:
    """Train, score the best checkpoint and show what came of it: what every process of a run does."""
    from lightning_dice.cli.experiment import Experiment

    os.environ[RUN_VARIABLE] = start.text()  # For the processes that Lightning starts.
    session = Experiment.of(start)
    try:
        session.check()
        CHANNEL.tell(start)
        session.fit(start.checkpoint)
        if session.config.test and not session.pruned:
            session.score_best()
        session.show()
        if session.trainer.is_global_zero:
            ended: Status = "pruned" if session.pruned else "finished"
            record_outcome(session.folder, ended, value=session.best_score, epochs=session.epochs, **session.watched)
        return session.best_score
    finally:
        if CHANNEL.alone:
            # The next run of a sweep makes a connection of its own. One made from outside serves all runs.
            rendezvous.leave_process_group()


if __name__ == "__main__":
    main()
