"""Settings of `score_case`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_dice.argument_checks import (
    check_choice,
    check_class_indices,
    check_count,
    check_flag,
    check_label,
    check_number,
)

Activation = Literal["sigmoid", "softmax"]


@dataclass(frozen=True)
class Scoring:
    """The settings of `score_case`.

    Args:
        classes: names of the logits' channels.
        activation: `"softmax"`: masks are class ids; `"sigmoid"`: a plane for each class.
        ignore_index: label of pixels that are not scored.
        exclude_classes: indices of classes that are not scored, such as the background.
        surfaces: compute surface Dice, Hausdorff 95 and mean surface distance, which take the most time.
        tolerance: of surface Dice, in mm, or in pixels if the spacing is unknown; one for all classes, or one for each
            of `classes`.
        lesions: compute precision, recall and F1 of connected components.
        lesion_iou: two lesions match if their intersection over union exceeds this, in [0, 1); with 0 any overlap is
            a match, see `lesion_scores`.
        connectivity: along how many axes at once two neighbouring pixels of a lesion may differ; `None`: all of them.

    Raises:
        ValueError: a setting is out of its range.

    >>> scoring = Scoring(["background", "liver", "tumor"], "softmax", exclude_classes=[0], tolerance=[2, 2, 1])
    >>> scoring.scored, scoring.tolerance_of(2)
    ([1, 2], 1.0)
    """

    classes: Sequence[str]
    activation: Activation
    ignore_index: int | None = None
    exclude_classes: Collection[int] = ()
    surfaces: bool = True
    tolerance: float | Sequence[float] = 2.0
    lesions: bool = True
    lesion_iou: float = 0.0
    connectivity: int | None = None

    def __post_init__(self) -> None:
        names = [str(name) for name in self.classes]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"classes must be distinct names, at least one, got {names}")
        check_choice("activation", self.activation, Activation)
        check_label("ignore_index", self.ignore_index)
        excluded = check_class_indices("exclude_classes", self.exclude_classes)
        if any(index >= len(names) for index in excluded):
            raise ValueError(f"exclude_classes must be indices of {len(names)} classes, got {list(excluded)}")
        check_flag("surfaces", self.surfaces)
        check_flag("lesions", self.lesions)
        tolerances = [self.tolerance] * len(names) if isinstance(self.tolerance, (int, float)) else list(self.tolerance)
        if len(tolerances) != len(names):
            raise ValueError(f"tolerance must be one number, or one for each of {len(names)} classes, got {tolerances}")
        if not 0 <= check_number("lesion_iou", self.lesion_iou) < 1:
            raise ValueError(f"lesion_iou must be in [0, 1), got {self.lesion_iou!r}")
        if self.connectivity is not None:
            check_count("connectivity", self.connectivity, optional=True)
        # Plain tuples and sets in place of OmegaConf's lists.
        object.__setattr__(self, "classes", tuple(names))
        object.__setattr__(self, "exclude_classes", frozenset(excluded))
        object.__setattr__(self, "tolerance", tuple(check_number("tolerance", value) for value in tolerances))

    @property
    def scored(self) -> list[int]:
        """Indices of the classes that are scored."""
        return [index for index in range(len(self.classes)) if index not in self.exclude_classes]

    def tolerance_of(self, index: int) -> float:
        """Return the surface Dice tolerance of a class."""
        return float(self.tolerance if isinstance(self.tolerance, (int, float)) else self.tolerance[index])
