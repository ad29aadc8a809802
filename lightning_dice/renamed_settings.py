"""Settings that were renamed in version 0.2: an old name raises an error that gives the new one."""

from __future__ import annotations

from collections.abc import Mapping

RENAMED = {
    "module.divisor": "module.size_divisor",
    "inference.flips": "inference.mirror_axes",
    "inference.weighting": "inference.importance_map",
    "inference.decision": "inference.postprocessing",
    "inference.decision.smallest": "inference.postprocessing.min_size",
    "inference.decision.largest_only": "inference.postprocessing.keep_largest",
    "data.values": "data.label_map",
    "data.white": "data.max_value",
    "data.size": "data.patch_size",
    "data.window": "data.read_size",
    "data.windows": "data.patches_per_image",
    "data.patches_per_case": "data.patches_per_image",
    "data.foreground": "data.oversample_foreground (of data=synthetic: data.foreground_fraction)",
    "data.stacked": "data.multichannel_masks",
    "data.lists": "data.split_files",
}
RENAMED_IN_COMMANDS = {
    "export": {"graph": "output_type"},
    "predict": {"follow_links": "follow_symlinks"},
    "compare": {"resamples": "n_resamples"},
}


def new_name(key: str, command: str | None = None) -> str | None:
    """Return the new name of a renamed setting, or `None` if it was not renamed.

    Args:
        key: the setting, such as `data.values`, or one below it.
        command: a command whose own settings are looked up too.

    >>> new_name("data.values"), new_name("inference.decision.thresholds"), new_name("data.root")
    ('data.label_map', 'inference.postprocessing.thresholds', None)
    >>> new_name("graph", "export")
    'output_type'
    """
    names = RENAMED | RENAMED_IN_COMMANDS.get(command or "", {})
    for old in sorted(names, key=len, reverse=True):
        if key == old or key.startswith(f"{old}."):
            return names[old] + key.removeprefix(old)
    return None


def refuse_old_config(config: Mapping[str, object], origin: object) -> None:
    """Refuse a config that version 0.1 wrote.

    Args:
        config: plain values, with the keys `data`, `module` ... of a run's config.
        origin: the folder or file it comes from, for the message.

    Raises:
        ValueError: names a setting that has another name now, and what to do.
    """
    # Not by `data`: a data config of the user may have settings of these names. `inference` is in `module` too.
    for old, new in RENAMED.items():
        for path in () if old.startswith("data.") else (old, f"module.{old}"):
            value: object = config
            for part in path.split("."):
                value = value.get(part, ...) if isinstance(value, Mapping) else ...
            if value is not ...:
                raise ValueError(
                    f"{origin} was written by lightning-dice 0.1, where {new} was called {old}: train it again, or use "
                    "it with version 0.1"
                )
