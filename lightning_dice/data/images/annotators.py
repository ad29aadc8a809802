"""Masks that several people have made of one image, as one mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_dice.data.images.mask_format import MaskFormat

WAYS = ("mean", "majority", "random")


@dataclass(frozen=True)
class Raters:
    """Who made masks, and what is made of them.

    Args:
        names: of those whose masks there are.
        fusion: what training sees. `"mean"`: soft labels, the share of raters that see each class in each pixel;
            `"majority"`: a vote; `"random"`: the mask of one, drawn anew each time; or a name, whose masks alone count.
        reference: what evaluation sees: `"majority"`, or a name; it need not be among `names`, as a gold standard is.

    Raises:
        ValueError: fewer than two raters, two of one name, or a way that there is not.

    A vote goes to the class that most raters see, among equals to that of the lowest id; where classes may overlap, a
    class is where more than half of the raters see it. Hence of two raters a vote is the intersection of a class, and
    mostly not what is wanted. Pixels that a rater ignores do not count as his; what all ignore is ignored.

    >>> Raters(["one", "two"], fusion="mean", reference="gold").files
    ('one', 'two', 'gold')
    """

    names: Sequence[str]
    fusion: str = "mean"
    reference: str = "majority"

    def __post_init__(self) -> None:
        if isinstance(self.names, str) or not isinstance(self.names, Sequence) or len(self.names) < 2:
            raise ValueError(f"raters must be a list of at least two names, got {self.names!r}; one is data.masks")
        names = tuple(str(name) for name in self.names)
        if len(set(names)) != len(names) or set(names) & set(WAYS):
            raise ValueError(f"raters must differ from each other and from {', '.join(WAYS)}, got {list(names)}")
        if self.fusion not in (*WAYS, *names):
            raise ValueError(
                f"fusion must be {', '.join(WAYS)} or one of the raters {list(names)}, got {self.fusion!r}"
            )
        if self.reference in ("mean", "random"):
            raise ValueError(
                f"reference must be majority or a rater's name, got {self.reference!r}: a score needs one hard mask"
            )
        object.__setattr__(self, "names", names)

    @property
    def files(self) -> tuple[str, ...]:
        """All whose masks are needed, in the order of a pair's masks."""
        extra = () if self.reference in (*WAYS, *self.names) else (self.reference,)
        return (*self.names, *extra)

    def chosen(self, way: str) -> list[int]:
        """The indices in `files` of the masks that `fusion` or `reference` needs; of `"random"`, one that is drawn."""
        if way == "random":
            return [int(torch.randint(len(self.names), ()))]
        return [self.files.index(way)] if way in self.files else list(range(len(self.names)))


def fuse(masks: Sequence[Tensor], way: Literal["mean", "majority"], mask_format: MaskFormat) -> Tensor:
    """One mask of several, as `Raters` says.

    Args:
        masks: of each rater, class ids `(*space)` or planes `(classes, *space)`.
        way: `"mean"` or `"majority"`.
        mask_format: what the masks' values mean.

    Returns:
        For `"majority"` what one mask is; for `"mean"` float32 `(classes, *space)`, in [0, 1], where pixels to be
        ignored hold the ignored label in every class (of a softmax) or in one (of a sigmoid).

    >>> raters = [torch.tensor([[0, 1, 1, 255]]), torch.tensor([[0, 0, 1, 255]])]
    >>> fuse(raters, "mean", MaskFormat(["background", "cell"]))
    tensor([[[  1.0000,   0.5000,   0.0000, 255.0000]],
    <BLANKLINE>
            [[  0.0000,   0.5000,   1.0000, 255.0000]]])
    >>> fuse(raters, "majority", MaskFormat(["background", "cell"]))
    tensor([[  0,   0,   1, 255]])
    """
    softmax, ignore_index = mask_format.activation == "softmax", mask_format.ignore_index
    first = masks[0]
    shape = (len(mask_format.classes), *first.shape) if softmax else tuple(first.shape)
    votes = torch.zeros(shape, dtype=torch.int32)
    voters = torch.zeros(first.shape, dtype=torch.int32)
    for mask in masks:
        voters += 1 if ignore_index is None else (mask != ignore_index).to(torch.int32)
        if softmax:
            for label in range(shape[0]):
                votes[label] += mask == label
        else:
            votes += mask == 1
    nobody = voters == 0
    if way == "mean":
        share = votes / voters.clamp(min=1)
        return share if ignore_index is None else share.masked_fill(nobody, ignore_index)
    fused = (votes.argmax(0) if softmax else 2 * votes > voters).to(first.dtype)
    return fused if ignore_index is None else fused.masked_fill(nobody, ignore_index)
