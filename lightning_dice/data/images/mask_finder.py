"""Find the mask files of each split, rater and class, in folders or by a pattern."""

from __future__ import annotations

from itertools import chain, product
from pathlib import Path
from typing import NamedTuple

from lightning_dice.data.errors import DataProblem
from lightning_dice.data.file_names import MASK_SUFFIXES, strip_suffix
from lightning_dice.data.images.file_patterns import find_files, is_file_pattern
from lightning_dice.data.images.image_folders import (
    NamedFile,
    SplitNames,
    describe_contents,
    find_folders,
    image_files,
    split_of,
)
from lightning_dice.data.interfaces import Split


class MaskSet(NamedTuple):
    """The mask files of one rater and one class: one for each image.

    `exact`: they have the image's name; otherwise they may have a customary suffix.
    """

    where: str
    rater: str | None
    plane: str | None
    files: list[NamedFile]
    exact: bool


class MaskFinder:
    """Finds the masks of each split, in folders or by a pattern."""

    def __init__(
        self,
        root: Path,
        pattern: str,
        planes: tuple[str, ...],
        background: str | None,
        raters: tuple[str, ...],
        names: SplitNames,
    ) -> None:
        self.root, self.pattern, self.names = root, pattern, names
        self.planes, self.background, self.raters = planes, background, raters
        self._files: list[tuple[dict[str, str], Path]] = []
        self._folders: dict[tuple[str | None, str | None], dict[Split | None, Path]] = {}
        # The raters and classes that the pattern has placeholders for.
        self._in_pattern: list[tuple[str | None, str | None]] = list(
            product(raters if "{rater}" in pattern else (None,), planes if "{class}" in pattern else (None,))
        )
        if is_file_pattern(pattern):
            options = {"split": list(chain(*names.values())), "class": planes, "rater": raters}
            self._files = list(find_files(root, pattern, options))
            if not self._files:
                what = f"no file matches; {describe_contents(root)}"
                raise DataProblem(what, root / pattern, "Set data.masks.")
            self.splits = sorted({str(split_of(matched, names)) for matched, _ in self._files})
            return
        for rater, plane in self._in_pattern:
            place = _fill_placeholders(pattern, rater=rater, plane=plane)
            try:
                self._folders[rater, plane] = find_folders(root, place, "masks", names)
            except DataProblem:
                if plane is None or plane != background:
                    raise
        self.splits = list(dict.fromkeys(str(split) for part in self._folders.values() for split in part))

    def mask_sets(self, split: Split | None, images: Path) -> list[MaskSet]:
        """Return the masks of a split, by rater and class.

        Raises:
            DataError: the split has no masks, or only some classes or raters have a folder.
        """
        found = self._sets_from_files(split) if self._files else self._sets_from_folders(split, images)
        if found is None:
            what = f"has no folder of masks beside it; masks found for: {', '.join(self.splits)}"
            place = f"{self.pattern}/{split}"
            if "{split}" in self.pattern:
                place = self.pattern.replace("{split}", str(split))
            raise DataProblem(what, images, f"Add {place}, or remove the images.")
        return [masks for masks in found if masks.files or masks.plane is None or masks.plane != self.background]

    def _sets_from_files(self, split: Split | None) -> list[MaskSet] | None:
        own = [(matched, path) for matched, path in self._files if split_of(matched, self.names) in (split, None)]
        if not own:
            return None
        word = next((matched["split"] for matched, _ in own if "split" in matched), "")
        mask_sets = []
        for rater, plane in self._in_pattern:
            files = [
                NamedFile(matched["case"], path)
                for matched, path in own
                if matched.get("rater") == rater and matched.get("class") == plane
            ]
            where = str(self.root / _fill_placeholders(self.pattern, rater=rater, plane=plane, split=word))
            mask_sets.append(MaskSet(where, rater, plane, files, exact=True))
        return mask_sets

    def _sets_from_folders(self, split: Split | None, images: Path) -> list[MaskSet] | None:
        mask_sets = []
        for (rater, plane), folders in self._folders.items():
            base = folders.get(split, folders.get(None))
            if base is None:
                return None
            rater_folders = self._rater_folders(base) if rater is None and self.raters else [(base, rater)]
            for rater_folder, whose in rater_folders:
                class_folders = self._class_folders(rater_folder) if plane is None else []
                for folder, name in class_folders or [(rater_folder, plane)]:
                    among_images = folder.resolve() == images.resolve()
                    files = image_files(images if among_images else folder)
                    if among_images:  # The suffix distinguishes masks from images.
                        files = [file for file in files if strip_suffix(file.name, MASK_SUFFIXES) != file.name]
                    mask_sets.append(MaskSet(str(folder), whose, name, files, exact=False))
        return mask_sets

    def _rater_folders(self, base: Path) -> list[tuple[Path, str | None]]:
        missing = [name for name in self.raters if not (base / name).is_dir()]
        if missing:
            raters = f"rater{'s' * (len(missing) > 1)} {', '.join(missing)}"
            what = f"has no folder for the {raters}; {describe_contents(base)}"
            raise DataProblem(what, base, "Set data.raters to folders that exist.")
        return [(base / name, name) for name in self.raters]

    def _class_folders(self, folder: Path) -> list[tuple[Path, str | None]]:
        present = [name for name in self.planes if (folder / name).is_dir()]
        missing = [name for name in self.planes if name not in present and name != self.background]
        if present and missing:
            what = f"has folders for the classes {', '.join(present)}, but none for {', '.join(missing)}"
            raise DataProblem(what, folder, "Add them, or leave the classes out of data.classes.")
        return [(folder / name, name) for name in present]


def _fill_placeholders(pattern: str, *, rater: str | None, plane: str | None, split: str = "") -> str:
    for token, value in (("{rater}", rater), ("{class}", plane), ("{split}", split)):
        pattern = pattern.replace(token, value) if value else pattern
    return pattern
