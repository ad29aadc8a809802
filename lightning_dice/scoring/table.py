"""The table of cases: which columns there are, and what stands in them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_dice.io import number
from lightning_dice.scoring.case import CaseScore, ClassScore

Better = Literal["high", "low", "zero"]
Floats = NDArray[np.float64]


class Score(NamedTuple):
    """A score that cases have.

    Attributes:
        title: for people.
        better: its good end.
        unit: `"length"` or `"volume"`, in the table's unit; `"share"` of 1.
    """

    title: str
    better: Better
    unit: Literal["share", "length", "volume"] = "share"


SCORES = {
    "dice": Score("Dice", "high"),
    "jaccard": Score("Jaccard", "high"),
    "surface_dice": Score("surface Dice", "high"),
    "hd95": Score("Hausdorff 95", "low", "length"),
    "mean_surface_distance": Score("mean surface distance", "low", "length"),
    "volume_difference": Score("volume difference", "zero", "volume"),
    "volume_error": Score("relative volume error", "zero"),
    "lesion_precision": Score("lesion precision", "high"),
    "lesion_recall": Score("lesion recall", "high"),
    "lesion_f1": Score("lesion F1", "high"),
    "ece": Score("calibration error", "low"),
}
_COUNTS = ("lesions_actual", "lesions_predicted")


def columns(classes: Sequence[str], scored: Sequence[int]) -> list[str]:
    """All columns of a table, `split` and `case` first.

    Args:
        classes: names of all classes.
        scored: indices of those that are scored.
    """
    names = [classes[index] for index in scored]
    first = ["split", "case", "dice", *(f"dice/{name}" for name in names)]
    first += [f"{side}/{name}" for name in classes for side in ("actual", "predicted")]
    rest = [score for score in (*SCORES, *_COUNTS) if score != "dice"]
    return [*first, "spacing", "ece", *(f"{score}/{name}" for score in rest for name in names)]


def row(
    split: str,
    case: str,
    score: CaseScore,
    classes: Sequence[str],
    scored: Sequence[int],
    errors: Mapping[int | None, float] | None = None,
) -> dict[str, str]:
    """A line of the table.

    Args:
        split: of the data.
        case: its name.
        score: its scores.
        classes: names of all classes.
        scored: indices of those that are scored.
        errors: calibration errors by class, or by `None` for that of the most probable class.

    Returns:
        Texts by column; without a value, no entry.
    """
    texts = {"split": split, "case": case, "dice": number(score.mean)}
    for index, (name, found) in enumerate(zip(classes, score.classes, strict=True)):
        texts |= {f"actual/{name}": str(found.actual), f"predicted/{name}": str(found.predicted)}
        if index in scored:
            texts |= {f"{key}/{name}": text for key, text in _texts(found).items()}
    if score.spacing is not None:
        texts["spacing"] = " ".join(f"{step:.6g}" for step in score.spacing)
    for place, value in (errors or {}).items():
        texts["ece" if place is None else f"ece/{classes[place]}"] = number(value)
    return {key: text for key, text in texts.items() if text}


def _texts(found: ClassScore) -> dict[str, str]:
    numbers = {key: getattr(found, key) for key in SCORES if hasattr(found, key)}
    lesions = found.lesions
    numbers |= {f"lesion_{key}": getattr(lesions, key) for key in ("precision", "recall", "f1")}
    texts = {key: number(value) for key, value in numbers.items()}
    if lesions.actual or lesions.predicted:
        texts |= {"lesions_actual": str(lesions.actual), "lesions_predicted": str(lesions.predicted)}
    return texts


@dataclass(frozen=True)
class Cases:
    """A table of cases as numbers.

    Attributes:
        split: of the data.
        names: of the cases, sorted.
        classes: names of the classes that are scored.
        values: by column, one for each case; NaN where a field is empty.
        unit: of distances: `"mm"`, `"pixels"`, or `"mixed"` where some cases have a spacing and others none.
        axes: space axes of the masks; `None` where no case has a spacing.
    """

    split: str
    names: list[str]
    classes: list[str]
    values: Mapping[str, Floats]
    unit: Literal["mm", "pixels", "mixed"]
    axes: int | None = None

    def of(self, score: str) -> Floats:
        """A score, `(cases, classes)`."""
        nothing = np.full(len(self.names), math.nan)
        columns = [self.values.get(f"{score}/{name}", nothing) for name in self.classes]
        return np.stack(columns, 1) if columns else np.empty((len(nothing), 0))

    @property
    def scores(self) -> list[str]:
        """The scores that some case has of some class."""
        return [score for score in SCORES if np.isfinite(self.of(score)).any()]

    def unit_of(self, score: str) -> str:
        """The unit of a score, for people; empty for shares."""
        kind = SCORES[score].unit
        if kind == "share":
            return ""
        if kind == "length" or self.unit != "mm":
            return {"mixed": "mm or pixels"}.get(self.unit, self.unit)
        return {3: "ml", 2: "mm²"}.get(self.axes or 0, "mm")


def read(rows: Sequence[Mapping[str, str]], split: str | None = None) -> Cases:
    """The numbers of a table.

    Args:
        rows: as `lightning_dice.io.read_csv` returns them.
        split: which; by default `"test"`, or `"val"` if there are no such rows.

    Raises:
        ValueError: there are no such rows, or a field is not a number.
    """
    there = sorted({entry.get("split", "") for entry in rows})
    chosen = split or ("test" if "test" in there else "val")
    kept = sorted((entry for entry in rows if entry.get("split") == chosen), key=lambda entry: entry.get("case", ""))
    if not kept:
        raise ValueError(f"the table has no cases of the {chosen} split; there is {', '.join(there) or 'nothing'}")
    names = list(dict.fromkeys(key for entry in kept for key in entry))
    pixels = [key for key in names if key.startswith("actual/")]
    # A class without a score in any case has no field in any row; its pixels are always there.
    classes = [key.partition("/")[2] for key in pixels]
    scored = [name for name in classes if any(key.partition("/")[2] == name for key in names if _is_score(key))]
    values = {}
    for key in names:
        if key in ("split", "case", "spacing"):
            continue
        try:
            values[key] = np.asarray([float(entry.get(key, "nan")) for entry in kept])
        except ValueError as error:
            raise ValueError(f"column {key} of the table: {error}") from error
    spacings = [entry.get("spacing") for entry in kept]
    unit: Literal["mm", "pixels", "mixed"] = "mm" if all(spacings) else "mixed" if any(spacings) else "pixels"
    axes = next((len(spacing.split()) for spacing in spacings if spacing), None)
    return Cases(chosen, [entry["case"] for entry in kept], scored, values, unit, axes)


def _is_score(key: str) -> bool:
    return "/" in key and key.partition("/")[0] in SCORES
