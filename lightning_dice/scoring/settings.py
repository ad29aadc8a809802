"""What is scored of a case, and how."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_dice.argument_checks import class_indices, count, flag, number, one_of

Activation = Literal["sigmoid", "softmax"]


@dataclass(frozen=True)
class Scoring:
    """The settings of `score_case`.

    Args:
        classes: names of the logits' channels.
        activation: `"softmax"`: masks are class ids; `"sigmoid"`: a plane for each class.
        ignore_index: the label of pixels that count as nothing.
        exclude_classes: indices of classes that are not scored, such as the background.
        surfaces: surface Dice, Hausdorff 95 and mean surface distance, which cost the most time.
        tolerance: of surface Dice, in mm, or in pixels where the spacing is not known; one for all classes, or one for
            each of `classes`.
        lesions: precision, recall and F1 of connected components.
        lesion_iou: what two lesions must have more of to match, in [0, 1); with 0 any overlap will do, see
            `lesion_scores`.
        connectivity: along how many axes at once a lesion's pixels may lie apart; `None`: all of them.

    Raises:
        ValueError: a setting out of its range.
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
        one_of("activation", self.activation, Activation)
        excluded = class_indices("exclude_classes", self.exclude_classes)
        if any(index >= len(names) for index in excluded):
            raise ValueError(f"exclude_classes must be indices of {len(names)} classes, got {list(excluded)}")
        flag("surfaces", self.surfaces)
        flag("lesions", self.lesions)
        given = self.tolerance
        tolerances = [given] * len(names) if isinstance(given, (int, float)) else list(given)
        if len(tolerances) != len(names):
            raise ValueError(f"tolerance must be one number, or one for each of {len(names)} classes, got {tolerances}")
        if not 0 <= number("lesion_iou", self.lesion_iou) < 1:
            raise ValueError(f"lesion_iou must be in [0, 1), got {self.lesion_iou!r}")
        if self.connectivity is not None:
            count("connectivity", self.connectivity, optional=True)
        # A config's lists are of a type of their own.
        object.__setattr__(self, "classes", tuple(names))
        object.__setattr__(self, "exclude_classes", frozenset(excluded))
        object.__setattr__(self, "tolerance", tuple(number("tolerance", value) for value in tolerances))

    @property
    def scored(self) -> list[int]:
        """The indices of the classes that are scored."""
        return [index for index in range(len(self.classes)) if index not in self.exclude_classes]

    def tolerance_of(self, index: int) -> float:
        """That of a class."""
        given = self.tolerance
        return float(given if isinstance(given, (int, float)) else given[index])
