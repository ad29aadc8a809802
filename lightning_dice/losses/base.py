"""Base classes of the losses: settings, and one call with logits and target."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar, NoReturn, cast

import torch
from torch import Tensor, nn

from lightning_dice.argument_checks import check_choice, check_class_weights, check_flag, check_label
from lightning_dice.functional import (
    AbsentPolicy,
    DeferredReduction,
    Pool,
    finish_reductions,
    pool_and_reduce,
    weighted_mean,
)
from lightning_dice.functional.target_reader import TargetReader
from lightning_dice.kernels import Activation, OverlapSums, RequiredSums, overlap_sums
from lightning_dice.losses.each_image import apply_to_each_image

TargetMap = Callable[[Tensor], Tensor]

# Settings that most losses have: `print(loss)` shows them only where they differ from their default.
_COMMON_SETTINGS = (
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
    """Base of the losses: a module that is called with logits and target.

    A subclass defines `deferred`: the loss up to its sums over the ranks of a distributed training, so that the terms
    of a `CompoundLoss` can share one message. A subclass that needs nothing from other ranks may define `forward`
    instead.

    Args:
        activation: `"sigmoid"`, `"softmax"`, or `None` where the input is probabilities.
        ignore_index: label of the pixels to ignore.

    Attributes:
        maps: functions that compute, from the target of one image (ids `(*space)` or planes `(classes, *space)`), what
            the loss needs beyond labels, such as distances; by name. A data module runs them in its workers; the loss
            computes the maps that a call does not pass.

    Raises:
        ValueError: an invalid setting.

    >>> class L1Loss(SegmentationLoss):
    ...     def forward(self, logits, target, weight=None, *, annotated=None, maps=None):
    ...         return (logits.sigmoid() - target).abs().mean()
    >>> L1Loss()(torch.zeros(1, 1, 2), torch.tensor([[[1, 0]]]))
    tensor(0.5000)
    """

    maps: Mapping[str, TargetMap] = {}

    def __init__(self, *, activation: Activation = "sigmoid", ignore_index: int | None = None) -> None:
        super().__init__()
        self.activation: Activation = check_choice("activation", activation, ("sigmoid", "softmax", None))
        self.ignore_index = check_label("ignore_index", ignore_index)

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        *,
        annotated: Tensor | None = None,
        maps: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Compute the loss.

        Args:
            logits: `(batch, classes, *space)`; probabilities with `activation=None`.
            target: `"sigmoid"`: planes of the shape of logits; `"softmax"`: class ids `(batch, *space)`, or soft labels
                of the shape of logits.
            weight: weight of each pixel, `(batch, *space)`, or of each pixel and class, of the shape of logits.
            annotated: bool, `(batch, classes)`; False leaves out a class that was not annotated in an image.
            maps: results of `maps` for each target, stacked, by name; missing ones are computed.

        Returns:
            A scalar, or a table with `reduction="none"` where the loss has it; float32 (float64 for float64 logits). It
            is 0, with a gradient of 0, if there are no images or no pixels, or all are ignored.
        """
        (loss,) = finish_reductions([self.deferred(logits, target, weight, annotated=annotated, maps=maps)])
        return loss

    def deferred(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        *,
        annotated: Tensor | None = None,
        maps: Mapping[str, Tensor] | None = None,
    ) -> DeferredReduction:
        """Compute the loss up to the sums over the ranks; arguments as in `forward`."""
        raise NotImplementedError(f"{type(self).__name__} must define deferred, or forward")

    def deferred_call(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        *,
        annotated: Tensor | None = None,
        maps: Mapping[str, Tensor] | None = None,
    ) -> DeferredReduction:
        """Call the loss as a part of another one: `deferred`, or `forward` if a subclass overrides that."""
        if type(self).forward is SegmentationLoss.forward:
            return self.deferred(logits, target, weight, annotated=annotated, maps=maps)
        return DeferredReduction.ready(self(logits, target, weight, annotated=annotated, maps=maps))

    def register_setting(self, name: str, value: Tensor | None) -> None:
        """Register a tensor that is a setting: it moves with the module, and is no part of its state.

        A state that holds it, as states of version 0.2 do, is loaded without it.

        >>> loss = SegmentationLoss()
        >>> loss.register_setting("threshold", torch.tensor(0.5))
        >>> list(loss.state_dict()), loss.load_state_dict({"threshold": torch.tensor(0.9)}), loss.threshold
        ([], <All keys matched successfully>, tensor(0.5000))
        """
        self.register_buffer(name, value, persistent=False)
        self.register_load_state_dict_pre_hook(partial(_leave_out, name))  # type: ignore[no-untyped-call]

    def get_map(self, name: str, target: Tensor, maps: Mapping[str, Tensor] | None) -> Tensor:
        """Return the map `name` of every target of a batch: the one in `maps`, or else computed now."""
        if maps is not None and name in maps:
            return maps[name]
        return apply_to_each_image(self.maps[name], target)

    def get_checked_map(
        self,
        name: str,
        logits: Tensor,
        target: Tensor,
        maps: Mapping[str, Tensor] | None,
        *,
        by_pixel: bool = False,
    ) -> Tensor:
        """Return `get_map` of a map that is a `TargetReader`, checked against the logits.

        Args:
            name: key of the map.
            logits: `(batch, classes, *space)`.
            target: ids `(batch, *space)` or planes `(batch, classes, *space)`.
            maps: as in `forward`.
            by_pixel: whether the map of ids has one plane for all classes.

        Returns:
            `(batch, classes, *space)`, or `(batch, *space)` for ids with `by_pixel`.

        Raises:
            ValueError: `classes` is missing, or differs from the logits; a map of another shape.
        """
        reader = cast(TargetReader, self.maps[name])
        classes, planes = logits.shape[1], target.shape == logits.shape
        if reader.classes is not None and reader.classes != classes:
            raise ValueError(f"classes must be the number of channels of logits, {classes}, got {reader.classes}")
        if reader.classes is None and not planes and not (by_pixel and reader.activation == "softmax"):
            raise ValueError(f"classes is needed with class ids: classes={classes}")
        shape = tuple(target.shape if by_pixel else logits.shape)
        if planes and reader.holds_ids(target):
            # One image of integer one-hot planes looks like ids, so a map computed in a worker is wrong.
            target, maps = target.float(), None
        values = self.get_map(name, target, maps)
        if tuple(values.shape) != shape:
            raise ValueError(f"maps[{name!r}] must have the shape {shape}, got {tuple(values.shape)}")
        return values

    def repr_settings(self) -> dict[str, object]:
        """Return the settings that `print(loss)` shows: this class's own, and common ones that are not the default."""
        own: dict[str, object] = {}
        common: dict[str, object] = {"activation": self.activation}
        for kind in type(self).__mro__:
            if kind is nn.Module:
                break
            for name, parameter in _constructor_settings(kind).items():
                value = getattr(self, name, inspect.Parameter.empty)
                if name in own or name in common or value is inspect.Parameter.empty or isinstance(value, nn.Module):
                    continue
                if name not in _COMMON_SETTINGS:
                    own[name] = _as_passed(value)
                elif _as_passed(value) != _as_passed(parameter.default):
                    common[name] = _as_passed(value)
        return {**own, **common}

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse `torch.jit.script`, which calls this first and knows too little of Python for a loss."""
        raise TypeError(
            f"torch.jit.script cannot compile {type(self).__name__}: use torch.compile(loss), or script the network "
            "without its loss"
        )

    def extra_repr(self) -> str:
        """Format the settings for `print(loss)`."""
        return ", ".join(f"{name}={value!r}" for name, value in self.repr_settings().items())

    def _refuse_unknown(self, settings: Mapping[str, object]) -> None:
        """Raise `TypeError` for settings that this loss does not have, and suggest the closest ones."""
        if not settings:
            return
        names = {name for kind in type(self).__mro__ for name in _constructor_settings(kind)}
        unknown = []
        for name in settings:
            close = difflib.get_close_matches(name, names, 1)
            unknown.append(f"{name!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
        raise TypeError(
            f"{type(self).__name__} has no setting {', '.join(unknown)}; it has {', '.join(sorted(names))}. For the "
            "arguments of another library see its like_monai, like_smp and like_nnunet"
        )


def call_torch_loss(loss: nn.Module, logits: Tensor, target: Tensor) -> Tensor:
    """Call a module that is not a `SegmentationLoss`, with the target in the dtype that torch's losses expect.

    Masks are stored in the smallest dtype that holds them: class ids become int64, planes the dtype of the logits.

    Raises:
        ValueError: the module failed; with its message, the shapes and the remedies.

    >>> call_torch_loss(nn.CrossEntropyLoss(), torch.zeros(1, 2, 3), torch.tensor([[0, 1, 1]], dtype=torch.uint8))
    tensor(0.6931)
    """
    if not target.is_floating_point():
        target = target.to(logits.dtype) if target.shape == logits.shape else target.long()
    try:
        result: Tensor = loss(logits, target)
    except (RuntimeError, IndexError, ValueError) as error:
        raise ValueError(
            f"{type(loss).__name__} failed on logits {tuple(logits.shape)} and target {tuple(target.shape)}: {error}. "
            "It gets the logits and the mask unchanged: wrap a loss of probabilities in OnProbabilities, and give a "
            "loss of masks with ignored pixels its own ignore_index"
        ) from error
    return result


class SumsLoss(SegmentationLoss):
    """Base of the losses that are a formula on `OverlapSums`; in a `CompoundLoss` they share one pass over the pixels.

    A subclass defines `deferred_from_sums`, and `required_sums` if its formula needs more than the four sums that are
    always computed.

    >>> class VolumeLoss(SumsLoss):
    ...     def deferred_from_sums(self, sums):
    ...         return DeferredReduction.ready((sums.predicted - sums.actual).abs().mean())
    >>> VolumeLoss()(torch.zeros(1, 1, 2), torch.tensor([[[1, 1]]]))
    tensor(1.)
    """

    @property
    def required_sums(self) -> RequiredSums:
        """The sums to compute beyond the four that are always computed."""
        return RequiredSums()

    def deferred_from_sums(self, sums: OverlapSums) -> DeferredReduction:
        """Compute the loss from sums `(images, classes)`, up to the sums over the ranks."""
        raise NotImplementedError(f"{type(self).__name__} must define deferred_from_sums")

    def from_sums(self, sums: OverlapSums) -> Tensor:
        """Compute the loss from sums `(images, classes)`, which may be those of several micro-batches.

        >>> from lightning_dice.kernels import OverlapSums, overlap_sums
        >>> from lightning_dice.losses import DiceLoss
        >>> first, second = (overlap_sums(torch.zeros(1, 1, 2), torch.tensor([[[1, label]]])) for label in (0, 1))
        >>> DiceLoss().from_sums(OverlapSums.cat([first, second])).float()
        tensor(0.3333)
        """
        (loss,) = finish_reductions([self.deferred_from_sums(sums)])
        return loss

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
        sums = overlap_sums(
            logits,
            target,
            activation=self.activation,
            ignore_index=self.ignore_index,
            weight=weight,
            annotated=annotated,
            required=self.required_sums,
        )
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return self.deferred_from_sums(sums).apply(lambda loss: loss.to(dtype))


class PixelMeanLoss(SumsLoss):
    """Base of the losses that are a mean over pixels: a subclass defines the sum that is divided by their number.

    Args:
        activation: `"sigmoid"`, `"softmax"`, or `None` where the input is probabilities.
        pool: `"batch"`: the mean over all pixels of the batch, on all ranks; `"image"`: the mean over the pixels of
            each image, averaged over images.
        class_weights: one for each class; only their ratios matter. Where classes are exclusive, a pixel has the weight
            of its class, and the sum is divided by the weights, as in `torch.nn.CrossEntropyLoss`.
        ignore_index: label of the pixels to ignore.
        across_ranks: in distributed training, compute the loss of all ranks together, as one process with the whole
            batch would; with False each rank takes the mean of its own batch and sends nothing, see `OverlapLoss`.

    Raises:
        ValueError: an invalid setting; in a call, a shape that would broadcast.
        TypeError: a setting that does not exist.

    >>> class MeanProbability(PixelMeanLoss):
    ...     def per_class(self, sums):
    ...         return sums.predicted
    >>> MeanProbability()(torch.zeros(1, 1, 2), torch.tensor([[[1, 0]]]))
    tensor(0.5000)
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
        self._refuse_unknown(unknown)
        self.pool: Pool = check_choice("pool", pool, self.pools)
        self.across_ranks = check_flag("across_ranks", across_ranks)
        self.register_setting("class_weights", check_class_weights(class_weights))

    def per_class(self, sums: OverlapSums) -> Tensor:
        """Return the sum that is divided by the number of pixels, `(images, classes)`."""
        raise NotImplementedError

    def deferred_from_sums(self, sums: OverlapSums) -> DeferredReduction:
        """Compute the mean over the pixels, up to the sums over the ranks."""
        return pool_and_reduce([sums], self.pool, self._mean, across_ranks=self.across_ranks)

    def _mean(self, pooled: OverlapSums) -> DeferredReduction:
        classes = pooled.overlap.shape[1]
        weights = class_weights_of(self.class_weights, classes, pooled.overlap)
        # A pixel counts once, for its own class, where classes are exclusive; otherwise in each plane.
        pixels = pooled.actual if pooled.exclusive else pooled.count
        above, below = (self.per_class(pooled) * weights).sum(1), (pixels * weights).sum(1)
        kept = below > 0
        mean = above / below.where(kept, 1.0)
        return weighted_mean(mean.unsqueeze(1), kept.unsqueeze(1))


def _leave_out(name: str, module: nn.Module, state: dict[str, object], prefix: str, *_: object) -> None:
    """Remove an entry from a state that is about to be loaded into a module."""
    state.pop(prefix + name, None)


def _constructor_settings(kind: type) -> dict[str, inspect.Parameter]:
    """Return the named parameters of the constructor that a class itself defines."""
    if "__init__" not in kind.__dict__ or kind in (nn.Module, object):
        return {}
    parameters = inspect.signature(kind.__dict__["__init__"]).parameters
    return {name: one for name, one in parameters.items() if name != "self" and one.kind != one.VAR_KEYWORD}


def _as_passed(value: object) -> object:
    """Return a setting in the form in which users pass it."""
    if isinstance(value, AbsentPolicy):
        return value.rule
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, (tuple, list)):
        pair = len(value) == 2 and all(isinstance(one, float) for one in value)
        return value[0] if pair and value[0] == value[1] else list(value)
    return value


def class_weights_of(weights: Tensor | None, classes: int, like: Tensor) -> Tensor:
    """Return the weight of each class, `(classes,)`, in the dtype of `like`; 1 if there are none.

    Raises:
        ValueError: the number of weights is not the number of classes.
    """
    if weights is None:
        return like.new_ones(classes)
    if weights.numel() != classes:
        raise ValueError(f"class_weights must have one for each of the {classes} classes, got {weights.numel()}")
    return weights.to(like.dtype)
