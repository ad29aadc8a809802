"""`predictions.json`, the record of the networks and settings behind a folder of masks; and which are finished."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_dice.cli.errors import UserError
from lightning_dice.io import write_atomically

MANIFEST = "predictions.json"
SHOWN = 8  # differences listed in one message


@dataclass
class Manifest:
    """The networks and settings that made a folder's masks, kept beside them as `predictions.json`.

    All masks of a folder come from the same networks and settings. Their images may come from several folders.

    Attributes:
        settings: everything that influences a mask, as plain values; a later command must have the same.
        made_by: further information, such as paths and versions, which may differ.
        inputs: absolute folders of the images.
    """

    settings: dict[str, Any]
    made_by: dict[str, Any] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """Read the manifest of a folder; `None` if it has none.

        Raises:
            UserError: it cannot be read.
        """
        path = folder / MANIFEST
        if not path.exists():
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} cannot be read ({error}): choose another output, or set overwrite=true") from error

    def write(self, folder: Path) -> None:
        """Write the manifest, whole or not at all.

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
    """Prepare a folder for masks, so that all masks in it have the same settings.

    Args:
        folder: where the masks go.
        manifest: this command's manifest, with one input.
        files: for each case, the mask files that it may have; to overwrite, all files that it may have.
        overwrite: delete any of these files that exist, whatever made them.

    Raises:
        UserError: the folder holds masks from other settings or images, or of unknown origin, or cannot be written to.
    """
    existing = [path for group in files.values() for path in group if path.exists()]
    if overwrite:
        # All at once: after an interruption nobody could tell the old from the new ones.
        try:
            for path in existing:
                path.unlink()
        except OSError as error:
            raise UserError(f"cannot remove {path}: {error.strerror}") from error
        manifest.write(folder)
        return
    old = Manifest.read(folder)
    if old is None:
        if existing:
            raise UserError(
                f"{len(existing)} masks exist, such as {existing[0]}; choose another output, or set overwrite=true"
            )
        manifest.write(folder)
        return
    changed = differences(old.settings, manifest.settings)
    if changed and not any(path.is_file() and path.name != MANIFEST for path in folder.rglob("*")):
        manifest.write(folder)  # No masks that could be mixed.
        return
    if changed:
        shown = "\n  ".join([*changed[:SHOWN], *([f"and {len(changed) - SHOWN} more"] if len(changed) > SHOWN else [])])
        raise UserError(
            f"the masks in {folder} were made with other settings; choose another output, or set overwrite=true:\n"
            f"  {shown}"
        )
    if manifest.inputs[0] in old.inputs:
        return
    if existing:
        raise UserError(
            f"{len(existing)} masks exist, such as {existing[0]}, of the images in {', '.join(old.inputs)} and not in "
            f"{manifest.inputs[0]}; choose another output, or set overwrite=true"
        )
    manifest.inputs = [*old.inputs, *manifest.inputs]
    manifest.write(folder)


def is_finished(masks: Iterable[Sequence[Path]], images: Iterable[Path]) -> bool:
    """Return whether an image has all its mask files, none older than the image.

    Args:
        masks: the files, for each format that they may have.
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
            return True  # The image was deleted, but not its mask.
    return False


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """List the settings in which two plain mappings differ, with both values.

    >>> differences({"module": {"threshold": 0.5}, "format": None}, {"module": {"threshold": 0.3}, "format": None})
    ['module.threshold: 0.5 there, 0.3 now']
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = list(dict.fromkeys([*old, *new]))
        found = (differences(old.get(key), new.get(key), f"{name}.{key}".lstrip(".")) for key in keys)
        return [line for part in found for line in part]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for i, pair in enumerate(zip(old, new, strict=True)) for line in differences(*pair, f"{name}.{i}")]
    same = old == new or (old != old and new != new)  # NaN, a possible nodata value
    return [] if same else [f"{name}: {_short(old)} there, {_short(new)} now"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
