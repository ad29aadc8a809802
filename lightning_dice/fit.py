"""Train: `python -m lightning_dice.fit model=unet`."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig

from lightning_dice.configs import (
    CONF_DIR,
    RUN_VARIABLE,
    UserError,
    explain_typos,
    help_text,
    mistakes_told,
    quoted,
    register_resolvers,
    split_arguments,
    traces_removed,
)

# Nothing heavy is imported at the top: --help and --cfg job must answer at once.


def main() -> None:
    """Entry point of `python -m lightning_dice.fit` and `dice-fit`."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_text("fit"))
        return
    register_resolvers()
    folder = os.environ.get(RUN_VARIABLE)
    own, overrides = split_arguments(sys.argv[1:], ["resume"])
    resumed = [argument.removeprefix("resume=") for argument in own if argument.startswith("resume=")]
    with mistakes_told():
        if folder and os.environ.get("LOCAL_RANK", "0") != "0":
            from lightning_dice.runs import load_config

            train(load_config(folder), Path(folder), resume=bool(resumed))
        elif resumed:
            # Not through Hydra, which would check the overrides against the default config instead of the run's.
            resume(resumed[-1], quoted(overrides))
        else:
            sys.argv[1:] = quoted(sys.argv[1:])
            try:
                from_command_line()
            except SystemExit as error:
                if error.code == 1:  # Hydra's; ours is 2.
                    explain_typos("fit", sys.argv[1:])
                raise


@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="fit")
def from_command_line(config: DictConfig) -> float | None:
    """Train as the command line says, in a new folder.

    Returns:
        The best value of what the checkpoint callback watches, for sweepers that optimize it.
    """
    hydra_config = HydraConfig.get()
    with traces_removed(), mistakes_told():
        from lightning_dice import runs

        rank, processes = launched_from_outside()
        if processes > 1 and config.folder is None:
            raise UserError("torchrun and srun start processes that must agree on a folder: give folder=<a new one>")
        trainer = config.trainer
        if processes > 1 and processes != (_processes(trainer) or processes):
            raise UserError(
                f"{processes} processes were started for trainer.devices={trainer.devices}: set trainer.devices to the "
                "processes of a node, trainer.strategy=ddp, and +trainer.num_nodes for several nodes"
            )
        if rank > 0:
            # The first process makes the folder; what all others train is the config that lies there.
            folder = Path(config.folder).expanduser().absolute()
            return train(runs.await_config(folder), folder)
        choices = hydra_config.runtime.choices
        config.name = config.name or f"{choices.get('experiment') or choices['data']}_{choices['model']}"
        if config.folder is not None:
            folder = runs.exact_folder(config.folder)
        elif hydra_config.mode is not None and hydra_config.mode.name == "MULTIRUN":
            folder = runs.new_folder(hydra_config.sweep.dir, str(hydra_config.job.num), dated=False)
        else:
            folder = runs.new_folder(config.runs, config.name)
        config.folder = str(folder)
        runs.make_absolute(config)
        try:
            runs.save_config(folder, config)
            return train(runs.load_config(folder), folder)
        finally:
            # A mistake found before training leaves nothing but its config.
            if {path.name for path in folder.iterdir()} <= {runs.CONFIG, runs.TEMPLATE}:
                shutil.rmtree(folder)


def launched_from_outside() -> tuple[int, int]:
    """This process's rank and the number of processes, where torchrun or srun has started them; else (0, 1)."""
    for rank, processes in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank in os.environ and processes in os.environ:
            return int(os.environ[rank]), int(os.environ[processes])
    return 0, 1


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
    from lightning_dice import runs

    path = Path(folder).expanduser().absolute()
    config = runs.reopen(path, overrides)
    runs.check_weights(runs.build_module(config), runs.find_checkpoint(path, "last"))
    runs.save_config(path, config)
    return train(runs.load_config(path), path, resume=True)


def train(config: DictConfig, folder: Path, *, resume: bool = False) -> float | None:
    """Train, score the best checkpoint and show what came of it: what every process of a run does.

    Args:
        config: resolved.
        folder: the run's folder; it exists.
        resume: go on from the folder's last checkpoint.
    """
    from lightning_dice.session import Session

    os.environ[RUN_VARIABLE] = str(folder)
    session = Session(config, folder)
    try:
        session.fit(resume=resume)
        if config.test:
            session.score_best()
        session.show()
        return session.best_score
    finally:
        session.close()


if __name__ == "__main__":
    main()
