"""A folder of predictions: what it was made by, and what of it is done."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_dice.cli.errors import UserError
from lightning_dice.io import write_atomically

MANIFEST = "predictions.json"
SHOWN = 8  # differences in one message


@dataclass
class Manifest:
    """What the masks of a folder were made by, kept beside them as `predictions.json`.

    All of them were made by the same networks and settings, or the folder would mix two methods. Their images may come
    from several places.

    Attributes:
        settings: plain values, everything that a mask hangs on; those of two commands are compared.
        made_by: what else is worth knowing, such as paths and versions; not compared.
        inputs: where the images were, absolute.
    """

    settings: dict[str, Any]
    made_by: dict[str, Any] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """That of a folder, or `None` where there is none.

        Raises:
            UserError: it cannot be read.
        """
        path = folder / MANIFEST
        if not path.exists():
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} cannot be read ({error}): choose another output, or overwrite=true") from error

    def write(self, folder: Path) -> None:
        """Write it, whole or not at all.

        Raises:
            UserError: the folder cannot be written to.
        """
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"
        try:
            write_atomically(folder / MANIFEST, lambda part: part.write_text(text, encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot write to the output folder {folder}: {error.strerror}") from error


def prepare_folder(
    folder: Path, manifest: Manifest, files: Mapping[str, Sequence[Path]], *, overwrite: bool = False
) -> None:
    """Make the folder ready for the masks of some images; those that it then holds are of these settings and images.

    Args:
        folder: for the masks.
        manifest: of this command, with one input.
        files: for each case, the masks that it may have; to overwrite, all that may have been made of it.
        overwrite: remove those of these files that are there, whatever they were made by.

    Raises:
        UserError: there are masks of other settings or images, or of an unknown origin; or the folder cannot be made.
    """
    there = [path for group in files.values() for path in group if path.exists()]
    if overwrite:
        # Not one by one as new ones are made: after an interruption old and new ones could not be told apart.
        try:
            for path in there:
                path.unlink()
        except OSError as error:
            raise UserError(f"cannot remove {path}: {error.strerror}") from error
        manifest.write(folder)
        return
    old = Manifest.read(folder)
    if old is None:
        if there:
            raise UserError(f"{len(there)} masks exist, such as {there[0]}; choose another output, or overwrite=true")
        manifest.write(folder)
        return
    changed = differences(old.settings, manifest.settings)
    if changed and not any(path.is_file() and path.name != MANIFEST for path in folder.rglob("*")):
        manifest.write(folder)  # There is nothing that could mix.
        return
    if changed:
        told = "\n  ".join([*changed[:SHOWN], *([f"and {len(changed) - SHOWN} more"] if len(changed) > SHOWN else [])])
        raise UserError(
            f"the masks in {folder} were made by something else; choose another output, or overwrite=true:\n  {told}"
        )
    if manifest.inputs[0] in old.inputs:
        return
    if there:
        raise UserError(
            f"{len(there)} masks exist, such as {there[0]}, of the images in {', '.join(old.inputs)} and not in "
            f"{manifest.inputs[0]}; choose another output, or overwrite=true"
        )
    manifest.inputs = [*old.inputs, *manifest.inputs]
    manifest.write(folder)


def is_finished(masks: Iterable[Sequence[Path]], images: Iterable[Path]) -> bool:
    """Whether an image has its masks, none of them older than itself.

    Args:
        masks: for each format that they may have, the files.
        images: the files of the image.
    """
    for group in masks:
        try:
            made = min(path.stat().st_mtime for path in group)
        except OSError:
            continue
        try:
            return made >= max(path.stat().st_mtime for path in images)
        except OSError:
            return True  # The image has gone; its mask has not.
    return False


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """The settings in which two plain mappings differ, with both values.

    >>> differences({"module": {"threshold": 0.5}, "format": None}, {"module": {"threshold": 0.3}, "format": None})
    ['module.threshold: 0.5 there, 0.3 now']
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = list(dict.fromkeys([*old, *new]))
        found = (differences(old.get(key), new.get(key), f"{name}.{key}".lstrip(".")) for key in keys)
        return [line for part in found for line in part]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for i, pair in enumerate(zip(old, new, strict=True)) for line in differences(*pair, f"{name}.{i}")]
    same = old == new or (old != old and new != new)  # NaN, which an image's nodata may be
    return [] if same else [f"{name}: {_short(old)} there, {_short(new)} now"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
