"""Losses per pixel: cross-entropy, focal loss and top-k cross-entropy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal, TypedDict

import torch
from torch import Tensor

from lightning_dice.argument_checks import check_class_weights, check_flag, check_number
from lightning_dice.functional import DeferredReduction, weighted_mean
from lightning_dice.kernels import Activation, Focal, OverlapSums, Pixels, RequiredSums, checked_pixels, wide_dtype
from lightning_dice.losses import compat
from lightning_dice.losses.base import PixelMeanLoss, SegmentationLoss, class_weights_of

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class PixelMeanSettings(TypedDict, total=False):
    """Settings of `PixelMeanLoss`, to type the signatures of its subclasses."""

    activation: Activation
    pool: Literal["image", "batch"]
    class_weights: Iterable[float] | Tensor | None
    ignore_index: int | None
    across_ranks: bool


class CrossEntropyLoss(PixelMeanLoss):
    r"""Cross-entropy: categorical with a softmax, binary in each plane with a sigmoid.

    .. math:: L = \frac{\sum_i w_{c(i)}\,(-\log p_{i, c(i)})}{\sum_i w_{c(i)}} \qquad
        L = \frac{\sum_{i, c} w_c\,[-t \log p - (1 - t) \log(1 - p)]_{i, c}}{\sum_{i, c} w_c}

    Equals `torch.nn.CrossEntropyLoss` for ids and `torch.nn.BCEWithLogitsLoss` for planes, except for soft labels with
    class weights, which are normalized here too. All ranks share the normalizer.

    Args:
        label_smoothing: fraction of each label that is spread evenly over all classes that are annotated in the image,
            in [0, 1).
        **settings: settings of `PixelMeanLoss`.

    Raises:
        ValueError: an invalid setting; in a call, a shape that would broadcast or, on the CPU, an invalid value.

    >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 0.0]]])
    >>> CrossEntropyLoss(activation="softmax")(logits, torch.tensor([[0, 1]]))
    tensor(0.4100)
    """

    def __init__(self, *, label_smoothing: float = 0.0, **settings: Unpack[PixelMeanSettings]) -> None:
        super().__init__(**settings)
        self.label_smoothing = check_number("label_smoothing", label_smoothing, 0, 1)
        if label_smoothing == 1:
            raise ValueError("label_smoothing must be less than 1, or nothing is left of the labels")

    @property
    def required_sums(self) -> RequiredSums:
        """The sum of -log p; with smoothing, also that of every class."""
        smoothed = self.label_smoothing > 0
        return RequiredSums(nll=True, all_nll=smoothed, absent_nll=smoothed and self.activation != "softmax")

    def per_class(self, sums: OverlapSums) -> Tensor:
        """Return the sum of -log p of the (smoothed) label."""
        if sums.nll is None:
            raise ValueError("the sums lack nll")
        share = self.label_smoothing
        if not share or sums.all_nll is None:
            return sums.nll
        others = sums.all_nll if sums.exclusive or sums.absent_nll is None else sums.all_nll + sums.absent_nll
        return (1 - share) * sums.nll + share * others / (sums.nll.shape[1] if sums.exclusive else 2)


class FocalLoss(PixelMeanLoss):
    r"""Focal loss: cross-entropy in which well classified pixels count less (Lin et al., ICCV 2017).

    .. math:: L = \mathrm{mean}\left[\alpha\,(1 - p)^\gamma\,(-\log p)\right]\ \text{of the true class}

    With soft labels it is the mean over hard labels drawn with those probabilities.

    Args:
        gamma: exponent, >= 0; 0 is cross-entropy.
        alpha: weight of the foreground of each plane, in [0, 1]; the background has 1 - alpha. Not with a softmax,
            which takes `class_weights`.
        **settings: settings of `PixelMeanLoss`.

    Raises:
        ValueError: as `CrossEntropyLoss`, or alpha with a softmax.

    >>> FocalLoss(gamma=2)(torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[1, 1]]]))
    tensor(0.0875)
    """

    def __init__(
        self, *, gamma: float = 2.0, alpha: float | None = None, **settings: Unpack[PixelMeanSettings]
    ) -> None:
        super().__init__(**settings)
        self.gamma = check_number("gamma", gamma)
        self.alpha = None if alpha is None else check_number("alpha", alpha, 0, 1)
        if alpha is not None and self.activation == "softmax":
            raise ValueError("alpha weighs foreground against background; with a softmax give class_weights")

    @property
    def required_sums(self) -> RequiredSums:
        """The focal sum, with this gamma and alpha."""
        return RequiredSums(focal=Focal(self.gamma, self.alpha))

    def per_class(self, sums: OverlapSums) -> Tensor:
        """Return the focal sum."""
        if sums.focal is None:
            raise ValueError("the sums lack focal")
        return sums.focal

    @classmethod
    def like_monai(cls, *, gamma: float = 2.0, **arguments: Unpack[compat.MonaiFocal]) -> Self:
        """Reproduce MONAI's `FocalLoss`, with a sigmoid, on planes; see `DiceLoss.like_monai`.

        `include_background=False` needs a `weight`, which gives the number of classes.

        >>> FocalLoss.like_monai(include_background=False, weight=[1, 1]).class_weights
        tensor([0., 1., 1.])
        """
        return cls(gamma=gamma, **compat.monai_focal(**arguments))

    @classmethod
    def like_smp(
        cls, mode: str, *, alpha: float | None = None, gamma: float = 2.0, **arguments: Unpack[compat.SmpFocal]
    ) -> Self:
        """Reproduce smp's `FocalLoss`, on planes; see `DiceLoss.like_smp`.

        In `"multiclass"` mode smp takes a sigmoid for each class, one against the rest: the target is one-hot here, and
        an ignored pixel holds `ignore_index` in all planes. `FocalLoss(activation="softmax")` takes ids instead.

        >>> FocalLoss.like_smp("multiclass", gamma=3.0).activation
        'sigmoid'
        """
        return cls(gamma=gamma, alpha=alpha, **compat.smp_focal(mode, **arguments))


class TopKCrossEntropyLoss(SegmentationLoss):
    r"""Top-k cross-entropy: the mean over the hardest pixels of each image.

    .. math:: L = \frac{\sum_{i \in K} w_{c(i)}\,(-\log p_{i, c(i)})}{\sum_{i \in K} w_{c(i)}}

    with K the pixels of an image whose weighted cross-entropy is greatest, then the mean over images. nnU-Net's top-k
    loss takes the hardest pixels of a process's whole batch; here they are those of each image, so that the loss of an
    image depends neither on the other images nor on the number of processes. Ignored pixels are not counted.

    Args:
        k: fraction of the pixels of an image (softmax), or of all its planes (sigmoid), in (0, 1]; at least one pixel.
        class_weights: one for each class. Pixels are weighted before they are compared, and the sum is divided by the
            weights, so that `k=1` is the `CrossEntropyLoss` of each image.
        activation: `"sigmoid"`, `"softmax"`, or `None` where the input is probabilities.
        ignore_index: label of the pixels to ignore.
        across_ranks: in distributed training, compute the loss of all ranks together; see `OverlapLoss`.

    Raises:
        ValueError: as `CrossEntropyLoss`, or k outside its range.

    >>> logits = torch.tensor([[[4.0, 4.0, 4.0, 0.0]]])
    >>> TopKCrossEntropyLoss(k=0.25)(logits, torch.tensor([[[1, 1, 1, 1]]]))
    tensor(0.6931)
    """

    class_weights: Tensor | None

    def __init__(
        self,
        *,
        k: float = 0.1,
        activation: Activation = "sigmoid",
        class_weights: Iterable[float] | Tensor | None = None,
        ignore_index: int | None = None,
        across_ranks: bool = True,
    ) -> None:
        super().__init__(activation=activation, ignore_index=ignore_index)
        if not (isinstance(k, (int, float)) and not isinstance(k, bool) and 0 < k <= 1):
            raise ValueError(f"k must be a fraction of pixels in (0, 1], got {k!r}; 10 % is 0.1")
        self.k = float(k)
        self.across_ranks = check_flag("across_ranks", across_ranks)
        self.register_setting("class_weights", check_class_weights(class_weights))

    def deferred(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        *,
        annotated: Tensor | None = None,
        maps: Mapping[str, Tensor] | None = None,
    ) -> DeferredReduction:
        """Compute the loss up to the sums over the ranks; see `SegmentationLoss.forward`."""
        pixels = checked_pixels(
            logits,
            target,
            activation=self.activation,
            ignore_index=self.ignore_index,
            weight=weight,
            annotated=annotated,
        )
        cost, weights = self._weighted(pixels, logits.shape[1])
        dtype = torch.promote_types(logits.dtype, torch.float32)
        mean = self._mean_of_hardest(cost, weights).apply(lambda loss: loss.to(dtype))
        return mean if self.across_ranks else mean.finish_locally()

    def _weighted(self, pixels: Pixels, classes: int) -> tuple[Tensor, Tensor]:
        """Return the weighted cost and the weight of each pixel (of each plane), both `(images, entries)`."""
        nll = pixels.nll()
        weights = class_weights_of(self.class_weights, classes, pixels.logits).view(1, -1, 1)
        if pixels.weight is not None:
            weights = weights * pixels.weight
        if pixels.annotated is not None:
            weights = weights * pixels.annotated.unsqueeze(2)
        weights = weights.expand(pixels.logits.shape)
        if not pixels.planes:
            weights = weights.gather(1, pixels.target.long())
        cost = nll * weights
        if pixels.planes and pixels.activation == "softmax":
            # A pixel with soft labels counts once: with the cost summed over classes, and the weight of its labels.
            cost, weights = cost.sum(1, keepdim=True), (weights * pixels.target).sum(1, keepdim=True)
        return cost.flatten(1), weights.flatten(1)

    def _mean_of_hardest(self, cost: Tensor, weights: Tensor) -> DeferredReduction:
        counted = weights > 0
        kept = counted.any(1)
        # In float64 and rounded up by a billionth, so that 0.53 of 100 pixels are 53, not 52.
        number = (counted.sum(1).to(wide_dtype(cost)) * self.k + 1e-9).floor().clamp(min=1).long()
        ordered, order = cost.where(counted, -torch.inf).sort(1, descending=True)
        hardest = torch.arange(cost.shape[1], device=cost.device) < number.unsqueeze(1)
        hardest = hardest & kept.unsqueeze(1)
        above = ordered.where(hardest, 0.0).sum(1, dtype=wide_dtype(cost))
        below = weights.gather(1, order).where(hardest, 0.0).sum(1, dtype=wide_dtype(cost))
        mean = above / below.where(kept, 1.0)
        return weighted_mean(mean.unsqueeze(1), kept.unsqueeze(1))
