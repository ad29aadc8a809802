"""The table of cases (`cases.csv`): its columns, how scores become rows, and rows become arrays again."""

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
    """A kind of score.

    Attributes:
        title: name for readers.
        better: which values are good.
        unit: `"length"` or `"volume"`, in the table's unit; `"share"`: a fraction, without a unit.

    >>> SCORES["hd95"]
    Score(title='Hausdorff 95', better='low', unit='length')
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


def column_names(classes: Sequence[str], scored: Sequence[int]) -> list[str]:
    """Return all columns that a table may have, `split` and `case` first.

    Args:
        classes: names of all classes.
        scored: indices of the scored classes.

    >>> column_names(["background", "cell"], [1])[:6]
    ['split', 'case', 'dice', 'dice/cell', 'actual/background', 'predicted/background']
    """
    names = [classes[index] for index in scored]
    first = ["split", "case", "dice", *(f"dice/{name}" for name in names)]
    first += [f"{side}/{name}" for name in classes for side in ("actual", "predicted")]
    rest = [score for score in (*SCORES, *_COUNTS) if score != "dice"]
    return [*first, "spacing", "ece", *(f"{score}/{name}" for score in rest for name in names)]


def format_row(
    split: str,
    case: str,
    score: CaseScore,
    classes: Sequence[str],
    scored: Sequence[int],
    errors: Mapping[int | None, float] | None = None,
) -> dict[str, str]:
    """Format the scores of a case as a row of the table.

    Args:
        split: the split of the data.
        case: name of the case.
        score: the case's scores.
        classes: names of all classes.
        scored: indices of the scored classes.
        errors: calibration errors by class index; the most probable class's error is under `None`.

    Returns:
        Text by column; undefined values have no entry.

    >>> score = CaseScore(0.5, [ClassScore(4, 2, 0.5, 1 / 3)])
    >>> format_row("test", "a", score, ["cell"], [0])["jaccard/cell"]
    '0.333333'
    """
    texts = {"split": split, "case": case, "dice": number(score.mean)}
    for index, (name, found) in enumerate(zip(classes, score.classes, strict=True)):
        texts |= {f"actual/{name}": str(found.actual), f"predicted/{name}": str(found.predicted)}
        if index in scored:
            texts |= {f"{key}/{name}": text for key, text in _format_scores(found).items()}
    if score.spacing is not None:
        texts["spacing"] = " ".join(f"{step:.6g}" for step in score.spacing)
    for class_index, value in (errors or {}).items():
        texts["ece" if class_index is None else f"ece/{classes[class_index]}"] = number(value)
    return {key: text for key, text in texts.items() if text}


def _format_scores(found: ClassScore) -> dict[str, str]:
    numbers = {key: getattr(found, key) for key in SCORES if hasattr(found, key)}
    lesions = found.lesions
    numbers |= {f"lesion_{key}": getattr(lesions, key) for key in ("precision", "recall", "f1")}
    texts = {key: number(value) for key, value in numbers.items()}
    if lesions.actual or lesions.predicted:
        texts |= {"lesions_actual": str(lesions.actual), "lesions_predicted": str(lesions.predicted)}
    return texts


@dataclass(frozen=True)
class ScoreTable:
    """The scores of many cases, as arrays.

    Attributes:
        split: the split of the data.
        names: the cases' names, sorted.
        classes: names of the scored classes.
        values: by column, one value for each case; NaN for empty fields.
        unit: of distances: `"mm"`, `"pixels"`, or `"mixed"` if only some cases have a spacing.
        axes: number of space axes of the masks; `None` if no case has a spacing.

    >>> table = ScoreTable("test", ["a", "b"], ["cell"], {"dice/cell": np.array([0.5, 0.9])}, "mm", 3)
    >>> table.of("dice").tolist(), table.scores, table.unit_of("volume_difference")
    ([[0.5], [0.9]], ['dice'], 'ml')
    """

    split: str
    names: list[str]
    classes: list[str]
    values: Mapping[str, Floats]
    unit: Literal["mm", "pixels", "mixed"]
    axes: int | None = None

    def of(self, score: str) -> Floats:
        """Return the values of a score, `(cases, classes)`."""
        missing = np.full(len(self.names), math.nan)
        columns = [self.values.get(f"{score}/{name}", missing) for name in self.classes]
        return np.stack(columns, 1) if columns else np.empty((len(missing), 0))

    @property
    def scores(self) -> list[str]:
        """The scores that are defined for at least one case and class."""
        return [score for score in SCORES if np.isfinite(self.of(score)).any()]

    def unit_of(self, score: str) -> str:
        """Return the unit of a score, for readers; empty for fractions."""
        kind = SCORES[score].unit
        if kind == "share":
            return ""
        if kind == "length" or self.unit != "mm":
            return {"mixed": "mm or pixels"}.get(self.unit, self.unit)
        return {3: "ml", 2: "mm²"}.get(self.axes or 0, "mm")


def parse_rows(rows: Sequence[Mapping[str, str]], split: str | None = None) -> ScoreTable:
    """Parse the rows of a table.

    Args:
        rows: as `lightning_dice.io.read_csv` returns them.
        split: which one; by default `"test"`, or `"val"` if there are no test cases.

    Raises:
        ValueError: the split has no rows, or a field is not a number.

    >>> parse_rows([{"split": "test", "case": "a", "actual/cell": "9", "dice/cell": "0.5"}]).of("dice").tolist()
    [[0.5]]
    """
    splits = sorted({row.get("split", "") for row in rows})
    chosen = split or ("test" if "test" in splits else "val")
    kept = sorted((row for row in rows if row.get("split") == chosen), key=lambda row: row.get("case", ""))
    if not kept:
        content = f"it has {', '.join(splits)}" if splits else "it is empty"
        raise ValueError(f"the table has no cases of the {chosen} split; {content}")
    columns = list(dict.fromkeys(key for row in kept for key in row))
    # Every class has its pixels in the table; a class that is nowhere has no scores in it.
    classes = [key.partition("/")[2] for key in columns if key.startswith("actual/")]
    scored = [name for name in classes if any(key.partition("/")[2] == name for key in columns if _is_score(key))]
    values = {}
    for key in columns:
        if key in ("split", "case", "spacing"):
            continue
        try:
            values[key] = np.asarray([float(row.get(key, "nan")) for row in kept])
        except ValueError as error:
            raise ValueError(f"column {key} of the table: {error}") from error
    spacings = [row.get("spacing") for row in kept]
    unit: Literal["mm", "pixels", "mixed"] = "mm" if all(spacings) else "mixed" if any(spacings) else "pixels"
    axes = next((len(spacing.split()) for spacing in spacings if spacing), None)
    return ScoreTable(chosen, [row["case"] for row in kept], scored, values, unit, axes)


def _is_score(key: str) -> bool:
    return "/" in key and key.partition("/")[0] in SCORES
