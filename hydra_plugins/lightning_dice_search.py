"""The sweeper behind `hydra/sweeper=search`.

Hydra 1.3 accepts plugins from the package `hydra_plugins` only, and imports all of them in every program that uses
Hydra. So this module is small, and leaves the work to `lightning_dice.cli.search`.
"""

from __future__ import annotations

from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class SearchSweeper(Sweeper):
    """Let Optuna choose the parameters of each trial.

    Args:
        settings: arguments of `lightning_dice.cli.search.Search`.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Create the launcher."""
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run the trials.

        Args:
            arguments: the overrides of the command line.
        """
        from lightning_dice.cli.search import run_search

        run_search(self, arguments)
