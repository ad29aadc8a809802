"""What every loss of this library is: settings, and one call of logits and target."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_dice.argument_checks import class_weights_tensor, flag, label, one_of
from lightning_dice.functional import AbsentPolicy, DeferredReduction, Pool, finish_reductions, of_pooled, weighted_mean
from lightning_dice.kernels import Activation, OverlapSums, RequiredSums, overlap_sums

TargetMap = Callable[[Tensor], Tensor]

# Settings that most losses have: shown where they are not what they are by default.
_SHARED = (
    "activation",
    "smooth",
    "pool",
    "squared",
    "overlap",
    "exclude_classes",
    "class_weights",
    "ignore_index",
    "absent",
    "reduction",
    "across_ranks",
)


class SegmentationLoss(nn.Module):
    """Base of the losses: a module called with logits and target.

    A subclass defines `partial`, the loss up to what the ranks of a distributed training sum: as a term of another loss
    it then sends nothing by itself. One that needs nothing of other ranks, or calls a loss that does, may define
    `forward` instead.

    Attributes:
        activation: `"sigmoid"`, `"softmax"`, or `None` where the input is probabilities.
        ignore_index: the label of pixels that count as nothing.
        maps: what the loss needs of a target beyond its values, such as distances, by name: functions of the target of
            one image, ids `(*space)` or planes `(classes, *space)`. A data module computes them in its workers; what is
            not given in a call is computed there.
    """

    maps: Mapping[str, TargetMap] = {}

    def __init__(self, *, activation: Activation = "sigmoid", ignore_index: int | None = None) -> None:
        super().__init__()
        self.activation: Activation = one_of("activation", activation, ("sigmoid", "softmax", None))
        self.ignore_index = label("ignore_index", ignore_index)

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        *,
        annotated: Tensor | None = None,
        maps: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The loss.

        Args:
            logits: `(batch, classes, *space)`; probabilities with `activation=None`.
            target: `"sigmoid"`: the shape of logits; `"softmax"`: class ids `(batch, *space)` or soft labels of the
                shape of logits.
            weight: of each pixel, `(batch, *space)`, or of each pixel and class, of the shape of logits.
            annotated: bool, `(batch, classes)`: False leaves a class out of an image that says nothing about it.
            maps: what `maps` computes of the targets, stacked; missing ones are computed.

        Returns:
            A scalar, but with `reduction="none"` where the loss has that; float32 (float64 for float64 logits).
        """
        (loss,) = finish_reductions([self.partial(logits, target, weight, annotated=annotated, maps=maps)])
        return loss

    def partial(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        *,
        annotated: Tensor | None = None,
        maps: Mapping[str, Tensor] | None = None,
    ) -> DeferredReduction:
        """The loss up to what is summed over the ranks of a distributed training; arguments as in `forward`."""
        raise NotImplementedError(f"{type(self).__name__} must define partial, or forward")

    def as_term(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        *,
        annotated: Tensor | None = None,
        maps: Mapping[str, Tensor] | None = None,
    ) -> DeferredReduction:
        """What a loss that is made of others takes of this one; arguments as in `forward`."""
        if type(self).forward is SegmentationLoss.forward:
            return self.partial(logits, target, weight, annotated=annotated, maps=maps)
        # A subclass has its own word on what a call returns.
        return DeferredReduction.of(self(logits, target, weight, annotated=annotated, maps=maps))

    def map(self, name: str, target: Tensor, maps: Mapping[str, Tensor] | None) -> Tensor:
        """The map `name` of every target of a batch: the given one, or computed now."""
        if maps is not None and name in maps:
            return maps[name]
        make = self.maps[name]
        if not len(target):
            return make(target.new_zeros(target.shape[1:]).cpu())[None][:0].to(target.device)
        return torch.stack([make(one.cpu()) for one in target]).to(target.device)

    def settings(self) -> dict[str, object]:
        """What `print(loss)` shows: the settings of this kind of loss, and of those that all have, what was set."""
        own: dict[str, object] = {}
        shared: dict[str, object] = {"activation": self.activation}
        for kind in type(self).__mro__:
            if kind is nn.Module:
                break
            for name, parameter in _parameters(kind).items():
                value = getattr(self, name, inspect.Parameter.empty)
                if name in own or name in shared or value is inspect.Parameter.empty or isinstance(value, nn.Module):
                    continue
                if name not in _SHARED:
                    own[name] = _shown(value)
                elif _shown(value) != _shown(parameter.default):
                    shared[name] = _shown(value)
        return {**own, **shared}

    def extra_repr(self) -> str:
        """The settings, as `print(loss)` shows them."""
        return ", ".join(f"{name}={value!r}" for name, value in self.settings().items())

    def _refuse(self, unknown: Mapping[str, object]) -> None:
        """Raise for settings that this loss does not have, with those that may have been meant."""
        if not unknown:
            return
        names = {name for kind in type(self).__mro__ for name in _parameters(kind)}
        told = []
        for name in unknown:
            close = difflib.get_close_matches(name, names, 1)
            told.append(f"{name!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
        raise TypeError(
            f"{type(self).__name__} has no setting {', '.join(told)}; it has {', '.join(sorted(names))}. For the words "
            "of another library see its like_monai, like_smp and like_nnunet"
        )


def call_plain(loss: nn.Module, logits: Tensor, target: Tensor) -> Tensor:
    """A module that is no `SegmentationLoss`, with the target as torch's own losses take it.

    Masks are stored in the smallest dtype that holds them: class ids become int64, planes what the logits are.

    Raises:
        ValueError: what the module itself raises, with the shapes and the remedies.
    """
    if not target.is_floating_point():
        target = target.to(logits.dtype) if target.shape == logits.shape else target.long()
    try:
        result: Tensor = loss(logits, target)
    except (RuntimeError, IndexError, ValueError) as error:
        raise ValueError(
            f"{type(loss).__name__} failed on logits {tuple(logits.shape)} and target {tuple(target.shape)}: {error}. "
            "It must take the logits and the mask as they are: one that takes probabilities goes into OnProbabilities, "
            "and one with ignored pixels needs its own ignore_index"
        ) from error
    return result


class SumsLoss(SegmentationLoss):
    """Base of the losses that are a formula on `OverlapSums`: those that share a pass over the pixels in a compound."""

    @property
    def wanted(self) -> RequiredSums:
        """Sums it needs beyond the four that are always there."""
        return RequiredSums()

    def partial_of_sums(self, sums: OverlapSums) -> DeferredReduction:
        """The loss of sums `(images, classes)`, up to what the ranks sum. What a subclass defines."""
        raise NotImplementedError(f"{type(self).__name__} must define partial_of_sums")

    def from_sums(self, sums: OverlapSums) -> Tensor:
        """The loss of sums `(images, classes)` that have been added up elsewhere, over micro-batches for example."""
        (loss,) = finish_reductions([self.partial_of_sums(sums)])
        return loss

    def partial(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        *,
        annotated: Tensor | None = None,
        maps: Mapping[str, Tensor] | None = None,
    ) -> DeferredReduction:
        """The loss up to what the ranks sum; see `SegmentationLoss.forward`."""
        sums = overlap_sums(
            logits,
            target,
            activation=self.activation,
            ignore_index=self.ignore_index,
            weight=weight,
            annotated=annotated,
            wanted=self.wanted,
        )
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return self.partial_of_sums(sums).then(lambda loss: loss.to(dtype))


class PixelMeanLoss(SumsLoss):
    """Base of the losses that are a mean over pixels: a subclass says which sum is divided by their number.

    Args:
        activation: `"sigmoid"`, `"softmax"`, or `None` where the input is probabilities.
        pool: `"batch"`: the mean over all pixels of the batch, on all ranks; `"image"`: the mean over images of the
            mean over the pixels of each.
        class_weights: one for each class; only their ratios matter. Where classes exclude each other a pixel weighs
            what its class does, and the sum is divided by the weights, as in `torch.nn.CrossEntropyLoss`.
        ignore_index: pixels whose target holds this value count as nothing.
        across_ranks: in a distributed training, give what one process with the whole batch would give; False: send
            nothing, so that each process has the mean of its own batch, see `OverlapLoss`.

    Raises:
        ValueError: a setting outside its range; in a call, a shape that would broadcast.
    """

    class_weights: Tensor | None
    pools: ClassVar[tuple[str, ...]] = ("image", "batch")

    def __init__(
        self,
        *,
        activation: Activation = "sigmoid",
        pool: Pool = "batch",
        class_weights: object = None,
        ignore_index: int | None = None,
        across_ranks: bool = True,
        **unknown: object,
    ) -> None:
        super().__init__(activation=activation, ignore_index=ignore_index)
        self._refuse(unknown)
        self.pool: Pool = one_of("pool", pool, self.pools)
        self.across_ranks = flag("across_ranks", across_ranks)
        self.register_buffer("class_weights", class_weights_tensor(class_weights))

    def per_class(self, sums: OverlapSums) -> Tensor:
        """What is divided by the number of pixels, `(images, classes)`."""
        raise NotImplementedError

    def partial_of_sums(self, sums: OverlapSums) -> DeferredReduction:
        """The mean over the pixels of the sums."""
        return of_pooled([sums], self.pool, self._mean, across_ranks=self.across_ranks)

    def _mean(self, pooled: OverlapSums) -> DeferredReduction:
        classes = pooled.overlap.shape[1]
        weights = class_weights_of(self.class_weights, classes, pooled.overlap)
        # Where classes exclude each other a pixel counts once, for its own class; otherwise in each plane.
        pixels = pooled.actual if pooled.exclusive else pooled.count
        above, below = (self.per_class(pooled) * weights).sum(1), (pixels * weights).sum(1)
        kept = below > 0
        mean = above / below.where(kept, 1.0)
        return weighted_mean(mean.unsqueeze(1), kept.unsqueeze(1))


def _parameters(kind: type) -> dict[str, inspect.Parameter]:
    """The keyword settings in the constructor that a class itself defines."""
    if "__init__" not in kind.__dict__ or kind in (nn.Module, object):
        return {}
    parameters = inspect.signature(kind.__dict__["__init__"]).parameters
    return {name: one for name, one in parameters.items() if name != "self" and one.kind != one.VAR_KEYWORD}


def _shown(value: object) -> object:
    """A setting in the form in which it is usually given."""
    if isinstance(value, AbsentPolicy):
        return value.rule
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, (tuple, list)):
        numbers = len(value) == 2 and all(isinstance(one, float) for one in value)
        return value[0] if numbers and value[0] == value[1] else list(value)
    return value


def class_weights_of(weights: Tensor | None, classes: int, like: Tensor) -> Tensor:
    """`(classes,)`, 1 each where none were given.

    Raises:
        ValueError: another number of weights than of classes.
    """
    if weights is None:
        return like.new_ones(classes)
    if weights.numel() != classes:
        raise ValueError(f"class_weights must have one for each of the {classes} classes, got {weights.numel()}")
    return weights.to(like.dtype)
