"""What is chosen beside the default callbacks: one file, or several, in any order."""

from functools import cache

import pytest
from hydra import compose, initialize_config_dir

from lightning_dice.cli.config import CONF_DIR, register_resolvers

# The files that bring the default ones with them.
EXTRAS = sorted(
    path.stem for path in (CONF_DIR / "callbacks").glob("*.yaml")
    if "- default\n" in path.read_text() and path.stem != "default"
)  # fmt: skip


@cache
def chosen(*overrides):
    register_resolvers()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("fit", overrides=list(overrides)).callbacks


def test_the_extras():
    assert {"early_stopping", "ema", "freeze", "learning_rate", "loss_schedule", "throughput"} <= set(EXTRAS)


# Each of them first, and each last.
@pytest.mark.parametrize("pair", [(one, EXTRAS[index - 1]) for index, one in enumerate(EXTRAS)], ids="-".join)
def test_two_are_the_default_ones_and_both(pair):
    default = chosen()
    alone = [set(chosen(f"callbacks={name}")) - set(default) for name in pair]
    assert all(alone)
    together = chosen(f"callbacks=[{','.join(pair)}]")
    # Each object once, the default ones as they are.
    assert list(together)[: len(default)] == list(default)
    assert set(together) == set(default) | alone[0] | alone[1]
    assert all(together[name] == default[name] for name in default)


def test_settings_of_several():
    together = chosen(
        "callbacks=[early_stopping,ema]", "callbacks.early_stopping.patience=3", "callbacks.ema.decay=0.9"
    )
    assert (together.early_stopping.patience, together.ema.decay) == (3, 0.9)
    assert not together.early_stopping.check_finite  # The score of a class that no case has is NaN.
    assert together.gradient_guard.action == "stop"


def test_freezing_takes_paths_with_dots():
    parts = chosen("callbacks=freeze", "callbacks.freeze.parts={encoder: 5, encoder.layer1: [0, null]}").freeze.parts
    assert dict(parts) == {"encoder": 5, "encoder.layer1": [0, None]}


def test_guards_are_default_ones_and_can_be_left_out():
    assert {"gradient_guard", "collapse_guard"} <= set(chosen())
    assert "gradient_guard" not in chosen("~callbacks.gradient_guard")
