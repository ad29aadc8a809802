"""Score a run again: `python -m lightning_dice.evaluate run=<folder>`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from lightning_dice.configs import (
    CONF_DIR,
    UserError,
    help_text,
    mistakes_told,
    quoted,
    register_resolvers,
    split_arguments,
)

if TYPE_CHECKING:
    from lightning_dice.data import Split

SETTINGS = ("run", "checkpoint", "split", "output", "device")


def main() -> None:
    """Entry point of `python -m lightning_dice.evaluate` and `dice-evaluate`."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_text("evaluate"))
        return
    register_resolvers()
    sys.argv[1:], overrides = split_arguments(quoted(sys.argv[1:]), SETTINGS)

    @hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="evaluate")
    def from_command_line(config: DictConfig) -> None:
        with mistakes_told():
            evaluate(config, overrides)

    from_command_line()


def evaluate(config: DictConfig, overrides: list[str]) -> dict[str, float]:
    """Score a run's checkpoint; write the case table and the pictures to a new folder and show the scores.

    Args:
        config: as of `conf/evaluate.yaml`.
        overrides: of the run's config, in Hydra's syntax: `data.root=elsewhere`, `module.threshold=0.3`.

    Returns:
        The metrics.

    Raises:
        UserError: the run, its checkpoint, the data or a setting is not as it should be.
    """
    from lightning_dice import runs
    from lightning_dice.session import Session, say

    if config.split not in (None, "val", "test"):
        raise UserError(f"split must be val or test, got {config.split}")
    run = runs.reopen(config.run, overrides)
    if any(override.partition("=")[0] in ("trainer.devices", "trainer.strategy") for override in overrides):
        raise UserError("evaluate runs on one device: only device=cpu or device=gpu can be chosen")
    # One device: the results then need no agreement on a folder.
    run.trainer.update(accelerator=config.trainer.accelerator, devices=1, num_nodes=1, strategy="auto")
    run.logger = {}
    checkpoint = runs.find_checkpoint(config.run, config.checkpoint)
    # The data and the weights are read, and a mistake in them told, before a folder is made.
    session = Session(run, Path(run.folder), trained=True)
    runs.check_weights(session.module, checkpoint)
    split: Split = config.split or session.last_split
    if session.data.source.split(split) is None:
        raise UserError(f"the data have no {split} split")
    if config.output is not None:
        session.folder = runs.exact_folder(config.output)
    else:
        session.folder = runs.new_folder(config.run, f"evaluate_{split}", dated=False)
    run.folder = str(session.folder)
    runs.save_config(session.folder, run)
    say(f"{checkpoint} on {split}")
    scores = session.evaluate(split, checkpoint)
    session.show()
    return scores


if __name__ == "__main__":
    main()
