"""Combine the masks that several raters made of one image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_dice.data.images.mask_format import MaskFormat

FUSIONS = ("mean", "majority", "random")


@dataclass(frozen=True)
class Raters:
    """Several people who made masks of the same images, and how their masks are combined.

    A vote goes to the class that most raters see, and in a tie to the one of lowest id; where classes may overlap, a
    class is where more than half of the raters see it. A vote of two raters is thus their intersection, which is
    seldom what you want. A pixel that a rater ignores does not count as that rater's vote; one that all ignore is
    ignored.

    Args:
        names: the raters' names; `None`: each image has one mask.
        fusion: what training sees. `"mean"`: soft labels, the share of raters that see each class in each pixel;
            `"majority"`: a vote; `"random"`: the mask of a rater drawn for each sample; or the name of the only
            rater to use.
        reference: what evaluation sees: `"majority"`, or a name, which need not be among `names`: a gold standard.

    Raises:
        ValueError: fewer than two raters, two of the same name, or an unknown `fusion` or `reference`.

    >>> Raters(["one", "two"], fusion="mean", reference="gold").files
    ('one', 'two', 'gold')
    """

    names: Sequence[str] | None = None
    fusion: str = "mean"
    reference: str = "majority"

    def __post_init__(self) -> None:
        if self.names is None:
            object.__setattr__(self, "names", ())
            return
        if isinstance(self.names, str) or not isinstance(self.names, Sequence) or len(self.names) < 2:
            raise ValueError(f"raters must be a list of at least two names, got {self.names!r}; one is data.masks")
        names = tuple(str(name) for name in self.names)
        if len(set(names)) != len(names) or set(names) & set(FUSIONS):
            raise ValueError(f"raters must differ from each other and from {', '.join(FUSIONS)}, got {list(names)}")
        if self.fusion not in (*FUSIONS, *names):
            raise ValueError(
                f"fusion must be {', '.join(FUSIONS)} or one of the raters {list(names)}, got {self.fusion!r}"
            )
        if self.reference in ("mean", "random"):
            raise ValueError(
                f"reference must be majority or a rater's name, got {self.reference!r}: a score needs one hard mask"
            )
        object.__setattr__(self, "names", names)

    @property
    def files(self) -> tuple[str, ...]:
        """All raters whose masks are needed, in the order of a pair's masks."""
        names = tuple(self.names or ())
        return names if self.reference in (*FUSIONS, *names) else (*names, self.reference)

    def mask_indices(self, fusion: str) -> list[int]:
        """Return the positions in `files` of the masks that a fusion or reference needs; `"random"` draws one.

        >>> Raters(["one", "two"], reference="gold").mask_indices("gold")
        [2]
        """
        raters = len(self.names or ())
        if fusion == "random":
            return [int(torch.randint(raters, ()))]
        return [self.files.index(fusion)] if fusion in self.files else list(range(raters))


def fuse(masks: Sequence[Tensor], fusion: Literal["mean", "majority"], mask_format: MaskFormat) -> Tensor:
    """Combine the masks of several raters into one, as `Raters` describes.

    Args:
        masks: one for each rater: class ids `(*space)` or planes `(classes, *space)`.
        fusion: `"mean"` or `"majority"`.
        mask_format: the classes and the ignored label.

    Returns:
        For `"majority"` a mask like each of `masks`. For `"mean"` float32 `(classes, *space)`, in [0, 1]; ignored
        pixels hold the ignored label, in every class (softmax) or in the class that all raters ignore there (sigmoid).

    >>> masks = [torch.tensor([[0, 1, 1, 255]]), torch.tensor([[0, 0, 1, 255]])]
    >>> fuse(masks, "mean", MaskFormat(["background", "cell"]))
    tensor([[[  1.0000,   0.5000,   0.0000, 255.0000]],
    <BLANKLINE>
            [[  0.0000,   0.5000,   1.0000, 255.0000]]])
    >>> fuse(masks, "majority", MaskFormat(["background", "cell"]))
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
    if fusion == "mean":
        share = votes / voters.clamp(min=1)
        return share if ignore_index is None else share.masked_fill(nobody, ignore_index)
    fused = (votes.argmax(0) if softmax else 2 * votes > voters).to(first.dtype)
    return fused if ignore_index is None else fused.masked_fill(nobody, ignore_index)
