"""The Dice loss."""

from __future__ import annotations

from torch import Tensor

from lightning_dice.functional import dice_score
from lightning_dice.kernels import OverlapSums
from lightning_dice.losses.overlap import OverlapLoss


class DiceLoss(OverlapLoss):
    r"""Soft Dice loss: 1 minus the Dice score of probabilities and target.

    .. math:: L = 1 - \frac{2\sum p t + s}{\sum p + \sum t + s}

    As it stands, `DiceLoss()` takes the sigmoid of the logits, sums over the whole batch and smooths with `s = 1`:
    for one channel it is the loss that most tutorials write in four lines. With several channels each class has its
    own ratio and the loss is their mean; tutorials that flatten everything into one ratio are `pool="all"`.

    In [0, 1] where `smooth` is one number and `absent` is not `"penalize"`; 0 for a perfect match.

    Two weaknesses are known, and have settings. Very small targets give large and unsteady losses: `pool="batch"` (the
    default), a small `smooth` so that one pixel still matters, `exclude_classes=[0]` so that the background does not
    drown them, and `absent="penalize"` so that an image without any target pushes false positives down. Pixels know
    nothing of each other: `weight` lets pixels near a boundary count more.

    Args:
        activation: `"sigmoid"`, `"softmax"`, or `None` where the input is probabilities.
        smooth: `s` above, in pixels; a pair sets numerator and denominator apart.
        pool: what shares one ratio: `"image"`, `"batch"` or `"all"`.
        squared: sums of squares in the denominator, as in V-Net (Milletari et al., 3DV 2016).
        exclude_classes: indices of classes that do not count.
        class_weights: one for each class, normalized.
        ignore_index: pixels whose target holds this value count as nothing.
        absent: what a class counts that the target does not have: `"smooth"`, `"skip"` or `"penalize"`.
        reduction: `"mean"`, `"sum"` or `"none"`.
        across_ranks: in a distributed training, give what one process with the whole batch would give.

    Raises:
        ValueError: a setting outside its range; in a call, a shape that would broadcast or, on the CPU, a value that
            has no meaning, such as a mask of 0 and 255.

    >>> import torch
    >>> logits = torch.tensor([[[[4.0, -4.0], [4.0, -4.0]]]])
    >>> mask = torch.tensor([[[[1, 0], [0, 0]]]])
    >>> DiceLoss()(logits, mask)
    tensor(0.2590)
    >>> ids = torch.tensor([[[0, 1], [0, 255]]])
    >>> DiceLoss(activation="softmax", smooth=1e-5, pool="image", ignore_index=255)(logits.expand(1, 2, 2, 2), ids)
    tensor(0.5143)
    """

    def score(self, sums: OverlapSums) -> Tensor:
        """The Dice score of each class, `(images, classes)`."""
        return dice_score(sums, self.smooth)
