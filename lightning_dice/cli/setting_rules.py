"""What a setting does when it is changed for a run that exists: it is applied, or refused by name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from lightning_dice.cli.errors import UserError
from lightning_dice.library_internals.hydra import parse_override


@dataclass(frozen=True)
class Rule:
    """What changing some settings does.

    Attributes:
        settings: patterns of their keys, in which `*` is any text, dots included.
        effect: a sentence for the documentation; of refused ones the reason, for the message too.
        refused: whether a new value is always refused.
    """

    settings: tuple[str, ...]
    effect: str
    refused: bool = False

    def matches(self, key: str) -> bool:
        """Return whether this rule is about a setting."""
        return any(fnmatchcase(key, pattern) for pattern in self.settings)


BEST = ("callbacks.checkpoint.monitor", "callbacks.checkpoint.mode", "callbacks.checkpoint.dirpath")
# Of the position in the training data, and in the window of accumulated batches.
BATCHES = (
    *("trainer.accumulate_grad_batches", "data.batch_size", "data.datamodule.batch_size"),
    *("trainer.devices", "trainer.num_nodes"),
)

# What `fit resume=<run>` does with a new value. The first rule that matches a setting counts.
RESUME = (
    Rule(("folder",), "a run keeps its folder; move the folder, then resume it there", refused=True),
    Rule(("runs", "name"), "they name the folder of a new run", refused=True),
    Rule(("retry_failed", "hydra.*"), "they belong to a sweep, and this is a single run", refused=True),
    Rule(
        (
            *("data.classes", "data.activation", "data.channels", "data.labels*", "data.regions_class_order"),
            *("module.class_names", "module.activation", "data.datamodule.*.classes", "data.datamodule.*.activation"),
            "data.datamodule.*.channels",
        ),
        "the weights were trained for these classes and channels; train a new run",
        refused=True,
    ),
    Rule(
        (
            *("data.seed", "data.fractions", "data.fold"),
            *("data.datamodule.source.*seed", "data.datamodule.source.*fractions", "data.datamodule.source.fold"),
        ),
        "the cases would be divided otherwise, and some of the training would be scored as validation or test",
        refused=True,
    ),
    Rule(
        ("*.encoder_weights", "*.weights_backbone", "*.pretrained"),
        "they initialize a network, and this one is trained already",
        refused=True,
    ),
    Rule(("trainer.fast_dev_run",), "it tries a new run, and saves no checkpoint", refused=True),
    Rule(BEST, "applied while there is no best checkpoint; then refused, as `best.ckpt` was chosen by the old ones"),
    Rule(
        ("model.*", "module._target_"),
        "applied if the weights of the checkpoint fit the new network, such as a rate of dropout; otherwise refused",
    ),
    Rule(("seed",), "applied: to dropout at once, to the order and the augmentation from the next epoch on"),
    Rule(
        ("trainer.max_epochs", "trainer.max_steps"),
        "applied, and the schedule gets the new length; refused below what is trained already",
    ),
    Rule(
        BATCHES,
        "applied; an interrupted epoch continues with the cases that it has not seen. Refused between two optimizer "
        "steps, where a checkpoint holds gradients of the old batches",
    ),
    Rule(
        ("optimizer.*",),
        "applied; the optimizer keeps its state (momentum). Another class, or a setting for which the state lacks "
        "something (`amsgrad`), starts with an empty state, and `fit` prints so",
    ),
    Rule(
        ("scheduler.*", "scheduler", "module.interval", "module.lr_scaling"),
        "applied, as if it had been so from the start. `plateau` keeps its counters and the rate that it has reached, "
        "unless `optimizer.lr` changes too; another `mode` starts its counters again",
    ),
    Rule(("module.monitor",), "applied; the counters of `plateau` start again"),
    Rule(("loss.*",), "applied from the next step on, and in the next evaluations; so are weights of classes"),
    Rule(("metrics.*",), "applied; in an interrupted epoch, `train/` metrics are of the rest of the epoch"),
    Rule(
        ("callbacks.early_stopping.*",),
        "applied; its counter stays, or starts again with another `monitor` or `mode`",
    ),
    Rule(
        ("callbacks.ema.*", "callbacks.ema"),
        "applied. A new average starts with the present weights; with `null` the training continues with its own "
        "weights, not with their average",
    ),
    Rule(
        ("callbacks.median_pruner.*",),
        "applied; whether the trial is pruned is decided again, and with another `monitor` or `mode` by later scores",
    ),
    Rule(
        ("callbacks.*",),
        "applied; a new one (`+callbacks.early_stopping={_target_: ...}`) starts without a state, and `null` "
        "removes one",
    ),
    Rule(
        ("data.*", "augment.*", "augment", "normalize.*", "normalize"),
        "applied from the next batch on; `metrics.csv` keeps the scores of the old data",
    ),
    Rule(("inference.*", "module.*"), "applied, in the training and in all later evaluations"),
    Rule(("trainer.*",), "applied"),
    Rule(("logger.*", "logger", "test"), "applied"),
)

# Commands that use a run without training it -> what they do not read.
_TRAINING = (
    *("optimizer", "optimizer.*", "scheduler", "scheduler.*", "augment", "augment.*", "logger", "logger.*"),
    *("runs", "name", "folder", "test", "seed", "resume", "retry_failed", "hydra.*"),
    *("module.optimizer*", "module.scheduler*", "module.interval", "module.monitor", "module.lr_scaling"),
    *(f"trainer.{name}" for name in ("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time")),
    *(f"trainer.{name}" for name in ("gradient_clip_val", "gradient_clip_algorithm", "accumulate_grad_batches")),
    *(f"trainer.{name}" for name in ("check_val_every_n_epoch", "val_check_interval", "num_sanity_val_steps")),
    *(f"trainer.{name}" for name in ("limit_train_batches", "log_every_n_steps", "default_root_dir")),
    *(f"trainer.{name}" for name in ("overfit_batches", "fast_dev_run", "detect_anomaly")),
    *(
        f"callbacks.{name}{rest}"
        for name in (
            *("exact_resume", "gradient_guard", "collapse_guard", "checkpoint", "last_checkpoint", "interrupt"),
            *("frequent_checkpoint", "early_stopping", "ema", "freeze", "loss_schedule", "median_pruner", "history"),
            *("learning_rate", "input_check"),
        )
        for rest in ("", ".*")
    ),
    *("data.patches_per_image", "data.oversample_foreground"),
    *("*.encoder_weights", "*.weights_backbone", "*.pretrained"),
)
_PROCESSES = tuple(f"trainer.{name}" for name in ("devices", "num_nodes", "strategy", "accelerator"))
_SCORING = ("loss", "loss.*", "callbacks", "callbacks.*", "test")
UNUSED = {
    "evaluate": _TRAINING + _PROCESSES,
    "calibrate": (*_TRAINING, *_PROCESSES, *_SCORING),
    "predict": (*_TRAINING, *_SCORING, "metrics", "metrics.*"),
    "export": (*_TRAINING, *_SCORING, "metrics", "metrics.*", "trainer", "trainer.*"),
}


def check_used(overrides: Iterable[str], command: str) -> None:
    """Refuse overrides of a run's config that a command would ignore.

    Args:
        overrides: in Hydra's syntax.
        command: one without a row in `UNUSED` uses all settings.

    Raises:
        UserError: names the setting.

    >>> check_used(["module.threshold=0.3"], "evaluate")
    >>> check_used(["optimizer.lr=1"], "evaluate")
    Traceback (most recent call last):
    lightning_dice.cli.errors.UserError: optimizer.lr is a setting of training, which evaluate does not use: leave it \
out
    """
    for text in overrides if command in UNUSED else ():
        key = parse_override(text).key_or_group
        if any(fnmatchcase(key, pattern) for pattern in UNUSED[command]):
            if key in _PROCESSES and command != "export":
                raise UserError(f"{command} runs on one device: only device=cpu or device=gpu can be chosen")
            what = "training" if any(fnmatchcase(key, pattern) for pattern in _TRAINING) else "fit and evaluate"
            raise UserError(f"{key} is a setting of {what}, which {command} does not use: leave it out")


def check_overrides(overrides: Iterable[str]) -> None:
    """Refuse overrides that a resumed run would ignore, whatever its checkpoint holds.

    Raises:
        UserError: names the setting.

    >>> check_overrides(["runs=elsewhere"])
    Traceback (most recent call last):
    lightning_dice.cli.errors.UserError: runs=elsewhere is refused when a run is resumed: they name the folder of a \
new run
    """
    for text in overrides:
        if text.startswith("-"):
            raise UserError(f"{text}: resume= continues one run, and takes no flags")
        rule = rule_of(parse_override(text).key_or_group, RESUME[:3])
        if rule is not None:
            raise UserError(f"{text} is refused when a run is resumed: {rule.effect}")


def rule_of(key: str, rules: Iterable[Rule] = RESUME) -> Rule | None:
    """Return the first rule about a setting.

    >>> rule_of("folder").refused, rule_of("optimizer.lr").refused
    (True, False)
    """
    return next((rule for rule in rules if rule.matches(key)), None)


def table(rules: Iterable[Rule] = RESUME) -> str:
    """Return the rules as a table in Markdown, for the documentation."""
    lines = ["| setting | a new value is |", "|---|---|"]
    for rule in rules:
        keys = ", ".join(f"`{setting}`" for setting in rule.settings if not setting.startswith("data.datamodule."))
        lines.append(f"| {keys} | {'refused: ' if rule.refused else ''}{rule.effect} |")
    return "\n".join(lines)


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ between two configs of plain values: key -> old and new value.

    The parts of `module` have the names of their groups: `loss.smooth`, not `module.loss.smooth`. A setting that only
    one config has is `None` in the other.

    >>> changed_settings({"a": 1, "module": {"loss": {"smooth": 1}}}, {"a": 1.0, "module": {"loss": {"smooth": 2}}})
    {'loss.smooth': (1, 2)}
    """
    before, after = _leaves(old), _leaves(new)
    return {
        key: (before.get(key), after.get(key))
        for key in (*after, *(key for key in before if key not in after))
        if key not in before or key not in after or not _equal(before[key], after[key])
    }


_PARTS = {"net": "model", **{name: name for name in ("loss", "metrics", "optimizer", "scheduler", "inference")}}


def _leaves(config: Any, path: str = "") -> dict[str, Any]:
    if isinstance(config, Mapping) and config:
        pairs = [(str(name), value) for name, value in config.items()]
    elif isinstance(config, (list, tuple)) and any(isinstance(entry, Mapping) for entry in config):
        pairs = [(str(index), value) for index, value in enumerate(config)]
    else:
        group, _, rest = path.partition(".")
        part, _, below = rest.partition(".")
        if group == "module" and part in _PARTS:
            path = f"{_PARTS[part]}.{below}" if below else _PARTS[part]
        return {path: config}
    found: dict[str, Any] = {}
    for name, value in pairs:
        found |= _leaves(value, f"{path}.{name}" if path else name)
    return found


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other):
        return True
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)
