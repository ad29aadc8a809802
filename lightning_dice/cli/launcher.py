"""Launch `fit`: decide in the first process which runs to train, and train them on every process."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig

from lightning_dice.cli import rendezvous, setting_rules, sweep, trial_process
from lightning_dice.cli.command import hydra_escape, refuse_renamed, split_arguments
from lightning_dice.cli.config import (
    CONF_DIR,
    RUN_VARIABLE,
    explain_typos,
    force_known,
    register_resolvers,
    restore_environment,
)
from lightning_dice.cli.errors import UserError, report_user_errors
from lightning_dice.cli.rendezvous import Rendezvous, RunSpec
from lightning_dice.cli.required_extras import check_extras
from lightning_dice.cli.slurm import RequeuedJob

if TYPE_CHECKING:
    # Called with the run, and with what to call once the other processes may start it too; returns the best score.
    Train = Callable[[RunSpec, Callable[[RunSpec], None]], "float | None"]


class Launcher:
    """Run a `fit` command line in this process.

    The first process composes the config, makes the folder and finds the checkpoint; every other one, on this machine
    or another, gets all of it from the first.

    Args:
        train: trains one run; the same on every process.
        arguments: the command line.
    """

    def __init__(self, train: Train, arguments: list[str]) -> None:
        self._train, self.arguments = train, arguments
        self.rendezvous = Rendezvous(rendezvous.process_info())
        self.job = RequeuedJob(arguments)

    def launch(self) -> None:
        """Train the run, or every run of the sweep.

        Raises:
            SystemExit: 2 after a user error, 1 if a trial failed, 128 + the signal's number if interrupted.
        """
        register_resolvers()
        with report_user_errors():
            try:
                if (run := rendezvous.inherited_run_spec()) is not None:
                    self.run(run)
                elif self.rendezvous.process.rank > 0:
                    for run in self.rendezvous.runs():
                        with restore_environment():
                            self.run(run)
                else:
                    with rendezvous.announce_exit(self.rendezvous):
                        self.launch_first()
            finally:
                rendezvous.leave_process_group()
                sweep.release()

    def launch_first(self) -> None:
        """Decide in the first process which runs to train, and train them."""
        refuse_renamed(self.arguments)
        own, overrides = split_arguments(self.arguments, ["resume", "retry_failed"])
        resumed = [argument.removeprefix("resume=") for argument in own if argument.startswith("resume=")]
        requeued = self.job.earlier()
        if requeued is not None:
            # SLURM repeats the command line that started the run, so its overrides are in the run's config already.
            print(f"SLURM restarted the job (SLURM_RESTART_COUNT={self.job.restarts}): resuming {requeued}", flush=True)
            resumed, overrides, own = [str(requeued)], [], []
        if not resumed:
            # Hydra's argparse refuses overrides behind a flag that stands between them.
            self.compose(hydra_escape(sorted(self.arguments, key=lambda text: text not in ("-m", "--multirun"))))
        elif sweep.is_sweep(resumed[-1]):
            given = [] if requeued else [text for text in self.arguments if not text.startswith("resume=")]
            self.resume_sweep(resumed[-1], given)
        else:
            # Not through Hydra, which would check the overrides against the default config instead of the run's.
            overrides = [text for text in own if not text.startswith("resume=")] + overrides
            self.resume(Path(resumed[-1]).expanduser().absolute(), hydra_escape(overrides))

    def compose(self, arguments: list[str]) -> None:
        """Let Hydra compose a new run, or the trials of a sweep, and train them."""
        sys.argv[1:] = arguments
        sweep.check_plugins(arguments)

        @hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="fit")
        def fit(config: DictConfig) -> float | None:
            with restore_environment(), report_user_errors():
                return self.start(config)

        with sweep.report_trials():
            try:
                fit()
            except SystemExit as error:
                if error.code == 1 and not sweep.sweep_started():  # Hydra's status; ours is 2.
                    explain_typos("fit", sys.argv[1:])
                raise

    def start(self, config: DictConfig) -> float | None:
        """Train a composed config in a new folder.

        Returns:
            The best value of the checkpoint callback's monitor, for sweepers that optimize it.
        """
        from lightning_dice.cli import run_folder

        hydra_config = HydraConfig.get()
        choices = hydra_config.runtime.choices
        config.name = config.name or f"{choices.get('experiment') or choices['data']}_{choices['model']}"
        if hydra_config.mode is not None and hydra_config.mode.name == "MULTIRUN":
            parent = Path(hydra_config.sweep.dir).expanduser().absolute()
            self.job.record(parent)
            folder = parent / str(hydra_config.job.num)
            return sweep.run_trial(
                folder,
                list(hydra_config.overrides.task),
                lambda: self.train_trial(config, folder),
                shared=lambda: self.rendezvous.announced == str(folder),
            )
        check_extras(config)
        self.check_processes(config.trainer)
        if config.folder is None:
            folder = run_folder.new_folder(config.runs, config.name)
        else:
            folder = run_folder.exact_folder(config.folder)
        try:
            _fill_in(config, folder)
            resolved = run_folder.save_config(folder, config)
            self.job.record(folder)
            return self.run(RunSpec(folder, resolved))
        finally:
            # A mistake found before training leaves nothing but its config.
            run_folder.remove_unused(folder)

    def resume(self, folder: Path, overrides: list[str]) -> float | None:
        """Resume a run from its last checkpoint.

        Args:
            folder: the run's folder.
            overrides: in Hydra's syntax; they are kept in the run's config.

        Raises:
            UserError: this is not the folder of a run, or an override does not fit, or cannot change. The folder stays
                as it was.
        """
        from lightning_dice.cli import run_folder

        sweep.check_trial(folder, overrides)
        setting_rules.check_overrides(overrides)
        config = run_folder.reopen(folder, overrides)
        check_extras(config)
        self.check_processes(config.trainer)
        checkpoint = run_folder.newest_checkpoint(folder)
        resolved = run_folder.resolve(config)
        if checkpoint is None:
            print(f"{folder} has no checkpoint yet: training starts from the beginning", flush=True)
        else:
            run_folder.check_resume(checkpoint, resolved)
        self.job.record(folder)
        with restore_environment():
            return self.run(RunSpec(folder, resolved, checkpoint, config))

    def resume_sweep(self, folder: str, arguments: list[str]) -> None:
        """Resume a sweep where it stopped.

        Args:
            folder: the sweep's folder.
            arguments: `retry_failed=true`, another launcher, more trials.

        Raises:
            UserError: an argument would change the trials.
            SystemExit: 1, as a trial failed.
        """
        retry = [argument for argument in arguments if argument.startswith("retry_failed=")]
        if retry and retry[-1] not in ("retry_failed=true", "retry_failed=false"):
            raise UserError(f"retry_failed must be true or false, got {retry[-1].removeprefix('retry_failed=')}")
        others = [argument for argument in arguments if argument not in retry]
        folder_before, path_before = os.getcwd(), list(sys.path)
        try:
            # Goes to the folder where the sweep was started.
            replayed = sweep.replay_arguments(folder, others, retry_failed=retry[-1:] == ["retry_failed=true"])
            if replayed is not None:
                self.compose(list(map(force_known, replayed)))
                return
            with sweep.report_trials():
                pass  # All trials have ended: only print the table.
        finally:
            os.chdir(folder_before)
            sys.path[:] = path_before

    def train_trial(self, config: DictConfig, folder: Path) -> None:
        """Train one trial of a sweep, or resume it where it was interrupted.

        Args:
            config: as the sweeper composed it.
            folder: the trial's folder; it may hold a config and checkpoints.

        Raises:
            UserError: what is wrong with the trial.
            SystemExit: it was interrupted.
        """
        from lightning_dice.cli import run_folder

        check_extras(config)
        self.check_processes(config.trainer)
        if self.rendezvous.alone and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
            raise UserError(
                f"a trial is one task, which starts a process for each device, but SLURM started "
                f"{os.environ['SLURM_NTASKS']}: give hydra.launcher.tasks_per_node=1 and trainer.devices=<devices>"
            )
        if (folder / run_folder.CONFIG).is_file():
            config = run_folder.reopen(folder)
        else:
            _fill_in(config, folder)
        resolved = run_folder.save_config(folder, config)
        if self.rendezvous.alone and _requested_processes(config.trainer) != 1:
            trial_process.run_in_own_process(folder, sweep.lock_descriptors())
            return
        self.run(RunSpec(folder, resolved, run_folder.newest_checkpoint(folder)))

    def run(self, spec: RunSpec) -> float | None:
        """Train one run on this process; those that Lightning starts find it in the environment."""
        os.environ[RUN_VARIABLE] = spec.to_json()
        try:
            return self._train(spec, self.rendezvous.announce)
        finally:
            if self.rendezvous.alone:
                # The next run of a sweep makes its own connection; one made by torchrun or srun serves all runs.
                rendezvous.leave_process_group()

    def check_processes(self, trainer: DictConfig) -> None:
        """Check that the Trainer's flags ask for the processes that torchrun or srun started.

        Raises:
            UserError: they ask for others.
        """
        started, requested = self.rendezvous.process.processes, _requested_processes(trainer)
        if started is not None and started > 1 and started != (requested or started):
            raise UserError(
                f"{started} processes were started for trainer.devices={trainer.devices} trainer.num_nodes="
                f"{trainer.get('num_nodes', 1)}: set trainer.devices to the processes of a node, trainer.num_nodes to "
                "the nodes, and trainer.strategy=ddp"
            )


def _fill_in(config: DictConfig, folder: Path) -> None:
    """Fill in the settings that a new run's config leaves open: folder, values read from the data, seed."""
    from lightning_dice.cli import run_folder

    config.folder = str(folder)
    run_folder.resolve_data(config)
    if config.seed is None:
        config.seed = secrets.randbelow(2**32)  # Drawn here, so that it is known and the run can be resumed.


def _requested_processes(trainer: DictConfig) -> int | None:
    """How many processes these flags ask for; `None` if that depends on the machine (`-1`, `auto`)."""
    devices = trainer.devices
    count = len(devices) if isinstance(devices, ListConfig) else int(devices) if str(devices).isdigit() else None
    return None if count is None else count * int(trainer.get("num_nodes", 1))
