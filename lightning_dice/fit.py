"""Train: `python -m lightning_dice.fit model=unet`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning_dice.cli.command import asks_for_help, command_line, help_text
from lightning_dice.cli.launcher import Launcher
from lightning_dice.cli.rendezvous import RunSpec

# Nothing heavy is imported at the top: --help and --cfg job must answer at once.


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m lightning_dice.fit` or `dice-fit`.

    Args:
        arguments: the command line, such as `["model=unet", "seed=1"]`; `None`: this process's.

    Raises:
        SystemExit: the command failed; its exit status.
    """
    with command_line(arguments) as given:
        if asks_for_help(given):
            print(help_text("fit"))
        else:
            Launcher(train, given).launch()


def train(run: RunSpec, announce: Callable[[RunSpec], None]) -> float | None:
    """Train a run, score its best checkpoint and print the results; every process of the run calls this.

    Args:
        run: folder, config and checkpoint.
        announce: lets the other processes start the run; called when this one has found no mistake in it.

    Returns:
        The best value of the checkpoint callback's monitor.

    Raises:
        UserError: a setting or the data are wrong; raised before training.
    """
    from lightning_dice.cli.experiment import Experiment

    experiment = Experiment(run.config, run.folder, trained=run.checkpoint is not None, template=run.template)
    # The data last: reading them may take long.
    module, trainer = experiment.module, experiment.trainer
    experiment.check_settings()
    data = experiment.data
    experiment.check_validation()
    experiment.check_limits()
    experiment.open_loggers()
    announce(run)
    experiment.print_start(run.checkpoint)
    with experiment.training():
        trainer.fit(module, data, ckpt_path=run.checkpoint, weights_only=True)
    if run.config.test and not experiment.pruned:
        experiment.score_best()
    experiment.print_summary()
    experiment.record_outcome()
    return experiment.best_score


if __name__ == "__main__":
    main()
