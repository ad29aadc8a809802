"""Weighted sums of losses, in one pass over the pixels where they share it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import indent
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from lightning_dice.argument_checks import check_number
from lightning_dice.functional import DeferredReduction
from lightning_dice.kernels import RequiredSums, overlap_sums
from lightning_dice.kernels.sums import valid_pixels
from lightning_dice.losses import compat
from lightning_dice.losses.base import SegmentationLoss, SumsLoss, TargetMap, call_torch_loss
from lightning_dice.losses.cross_entropy import CrossEntropyLoss, FocalLoss
from lightning_dice.losses.dice import DiceLoss
from lightning_dice.losses.overlap import OverlapLoss, OverlapSettings

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class CompoundLoss(SegmentationLoss):
    """A weighted sum of losses.

    Terms of this library that are formulas on sums over pixels share one pass. Any other module of logits and target
    can be a term; one that wants probabilities goes into `OnProbabilities`.

    Args:
        terms: losses by name, or a list of them, which are then named by their classes.
        weights: of the terms, by the same names or in the same order; those not named weigh 1. A term of weight 0 is
            not computed.

    Attributes:
        values: of each term in the last call, without its weight and without a gradient, by name.

    Raises:
        ValueError: no terms; a weight that names none, or is below 0; terms that disagree on the activation or the
            ignored label.

    >>> loss = CompoundLoss({"dice": DiceLoss(), "focal": FocalLoss()}, {"focal": 0.5})
    >>> loss(torch.zeros(1, 1, 2), torch.tensor([[[1, 0]]]))
    tensor(0.4200)
    >>> {name: round(float(value), 4) for name, value in loss.values.items()}
    {'dice': 0.3333, 'focal': 0.1733}
    """

    def __init__(
        self,
        terms: Mapping[str, nn.Module] | Sequence[nn.Module],
        weights: Mapping[str, float] | Sequence[float] | None = None,
    ) -> None:
        if isinstance(terms, nn.ModuleDict):
            terms = dict(terms.items())
        if not isinstance(terms, (Mapping, Sequence)) or isinstance(terms, str):
            raise ValueError(f"terms must be losses by name, or a list of them, got {type(terms).__name__}")
        named = {str(name): term for name, term in terms.items()} if isinstance(terms, Mapping) else _named(terms)
        if not named:
            raise ValueError("terms must hold at least one loss, got none")
        for name, term in named.items():
            if not isinstance(term, nn.Module):
                raise ValueError(f"terms must be modules of logits and target, got {type(term).__name__} for {name!r}")
            if isinstance(term, OverlapLoss) and term.reduction == "none":
                raise ValueError(f'term {name!r} must have one value: reduction="none" does not add up')
        super().__init__(
            activation=_agreed(named, "activation"),  # type: ignore[arg-type]
            ignore_index=_agreed(named, "ignore_index"),  # type: ignore[arg-type]
        )
        try:
            self.terms = nn.ModuleDict(named)
        except KeyError as error:
            raise ValueError(f"terms have names without dots that no module has: {error.args[0]}") from error
        self.weights = _weights(list(named), weights)
        self.values: dict[str, Tensor] = {}
        self._checked: set[str] = set()

    @property
    def maps(self) -> Mapping[str, TargetMap]:  # type: ignore[override]
        """What the terms need of a target, together; where two call different maps by one name, `<term>.<name>`."""
        found: dict[str, TargetMap] = {}
        for name, term in self.terms.items():
            for key, make in getattr(term, "maps", {}).items():
                found[self._map_name(name, key)] = make
        return found

    def _map_name(self, name: str, key: str) -> str:
        """By which the map `key` of a term goes: its own, unless that is another term's for something else."""
        make = cast("Mapping[str, TargetMap]", self.terms[name].maps)[key]
        others = [getattr(term, "maps", {}) for term in self.terms.values()]
        return key if all(maps.get(key, make) == make for maps in others) else f"{name}.{key}"

    def _maps_of(self, name: str, term: SegmentationLoss, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What was given of the maps of a term, by its own names."""
        own: dict[str, Tensor] = {}
        for key in term.maps:
            public = self._map_name(name, key)
            if public in maps:
                own[key] = maps[public]
        return own

    def deferred(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        *,
        annotated: Tensor | None = None,
        maps: Mapping[str, Tensor] | None = None,
    ) -> DeferredReduction:
        """The weighted sum up to what the ranks sum, of all terms together; see `SegmentationLoss.forward`.

        A module that is not of this library sends what it sends by itself.
        """
        found: dict[str, DeferredReduction] = {}
        active = {name: term for name, term in self.terms.items() if self.weights[name] != 0}

        def of_logits(value: Tensor) -> Tensor:
            return value.to(torch.promote_types(logits.dtype, torch.float32))

        for wanted, group in _passes(active):
            first = next(iter(group.values()))
            sums = overlap_sums(
                logits,
                target,
                activation=first.activation,
                ignore_index=first.ignore_index,
                weight=weight,
                annotated=annotated,
                wanted=wanted,
            )
            found |= {name: term.deferred_from_sums(sums).apply(of_logits) for name, term in group.items()}
        for name, term in active.items():
            if name in found:
                continue
            if isinstance(term, SegmentationLoss):
                own = self._maps_of(name, term, maps or {})
                found[name] = term.deferred_call(logits, target, weight, annotated=annotated, maps=own)
            elif weight is not None or annotated is not None:
                raise ValueError(f"term {name!r}, a {type(term).__name__}, takes neither weight nor annotated")
            else:
                self._check_ignored(name, term, target)
                found[name] = DeferredReduction.ready(call_torch_loss(term, logits, target))

        def weighted_sum(*values: Tensor) -> Tensor:
            for name, value in zip(found, values, strict=True):
                if value.ndim:
                    raise ValueError(f"term {name!r} must return a scalar, got the shape {tuple(value.shape)}")
            self.values = {name: value.detach() for name, value in zip(found, values, strict=True)}
            if not values:
                # Of no pixel, as a sum of all may be infinite, and 0 times that NaN.
                return logits[:0].float().sum()
            return torch.stack([self.weights[name] * value for name, value in zip(found, values, strict=True)]).sum()

        return DeferredReduction.combine(list(found.values()), weighted_sum)

    def _check_ignored(self, name: str, term: nn.Module, target: Tensor) -> None:
        """Refuse ignored labels for a module that would take them for labels; on a GPU in the first call only."""
        if self.ignore_index is None or getattr(term, "ignore_index", None) == self.ignore_index:
            return
        if torch.compiler.is_compiling() or (target.device.type != "cpu" and name in self._checked):
            return
        self._checked.add(name)
        valid = valid_pixels(target, self.ignore_index)
        if valid is not None and not bool(valid.all()):
            raise ValueError(
                f"term {name!r}, a {type(term).__name__}, would take the ignored label {self.ignore_index} for one of "
                f"a class: give it ignore_index={self.ignore_index} if it has that setting, take one of "
                f"lightning_dice.losses, or wrap it: OnProbabilities(..., ignore_index={self.ignore_index})"
            )

    def __repr__(self) -> str:
        terms = [f"{self.weights[name]:g} x {name}: {term!r}" for name, term in self.terms.items()]
        return f"{type(self).__name__}(\n{indent(chr(10).join(terms), '  ')}\n)"


class DiceCELoss(CompoundLoss):
    """Dice and cross-entropy, in one pass: nnU-Net's kind of loss.

    Args:
        dice_weight: of the Dice loss.
        ce_weight: of the cross-entropy.
        label_smoothing: of the cross-entropy, in [0, 1).
        **settings: those of `OverlapLoss`, for the Dice loss. The cross-entropy shares `activation`, `ignore_index`,
            `class_weights` and `across_ranks`; it takes all classes, as a softmax must learn the background too, and
            all pixels of the batch.

    >>> DiceCELoss()(torch.zeros(1, 1, 2), torch.tensor([[[1, 0]]]))
    tensor(1.0265)
    """

    def __init__(
        self,
        *,
        dice_weight: float = 1.0,
        ce_weight: float = 1.0,
        label_smoothing: float = 0.0,
        **settings: Unpack[OverlapSettings],
    ) -> None:
        ce = CrossEntropyLoss(label_smoothing=label_smoothing, **_by_pixel(settings))  # type: ignore[arg-type]
        super().__init__({"dice": DiceLoss(**settings), "ce": ce}, {"dice": dice_weight, "ce": ce_weight})

    @classmethod
    def like_monai(
        cls,
        *,
        lambda_dice: float = 1.0,
        lambda_ce: float = 1.0,
        label_smoothing: float = 0.0,
        **arguments: Unpack[compat.MonaiOverlap],
    ) -> Self:
        """Reproduce MONAI's `DiceCELoss`; see `DiceLoss.like_monai`.

        With a softmax, or one channel with a sigmoid. With `sigmoid=True` and several channels MONAI takes the
        cross-entropy of a softmax; here it is the binary one of each plane. `weight` needs ids (`to_onehot_y=True`).

        >>> DiceCELoss.like_monai(softmax=True, to_onehot_y=True, lambda_ce=0.5).weights
        {'dice': 1.0, 'ce': 0.5}
        """
        settings = compat.monai_dice_ce(label_smoothing, **arguments)
        return cls(dice_weight=lambda_dice, ce_weight=lambda_ce, label_smoothing=label_smoothing, **settings)

    @classmethod
    def like_nnunet(
        cls, *, weight_ce: float = 1.0, weight_dice: float = 1.0, **arguments: Unpack[compat.NnunetDice]
    ) -> Self:
        """Reproduce nnU-Net's `DC_and_CE_loss`, or `DC_and_BCE_loss` with `regions=True`; see `DiceLoss.like_nnunet`.

        >>> loss = DiceCELoss.like_nnunet(ignore_label=255)
        >>> loss.terms["dice"].pool, loss.terms["dice"].exclude_classes, loss.ignore_index
        ('image', (0,), 255)
        """
        return cls(dice_weight=weight_dice, ce_weight=weight_ce, **compat.nnunet_dice(**arguments))


class DiceFocalLoss(CompoundLoss):
    """Dice and focal loss, in one pass.

    Args:
        dice_weight: of the Dice loss.
        focal_weight: of the focal loss.
        gamma: of the focal loss, see `FocalLoss`.
        alpha: of the focal loss, see `FocalLoss`.
        **settings: those of `OverlapLoss`, for the Dice loss. The focal loss shares `activation`, `ignore_index`,
            `class_weights` and `across_ranks`, and takes all classes and all pixels of the batch.

    >>> DiceFocalLoss()(torch.zeros(1, 1, 2), torch.tensor([[[1, 0]]]))
    tensor(0.5066)
    """

    def __init__(
        self,
        *,
        dice_weight: float = 1.0,
        focal_weight: float = 1.0,
        gamma: float = 2.0,
        alpha: float | None = None,
        **settings: Unpack[OverlapSettings],
    ) -> None:
        focal = FocalLoss(gamma=gamma, alpha=alpha, **_by_pixel(settings))  # type: ignore[arg-type]
        super().__init__({"dice": DiceLoss(**settings), "focal": focal}, {"dice": dice_weight, "focal": focal_weight})

    @classmethod
    def like_monai(
        cls,
        *,
        lambda_dice: float = 1.0,
        lambda_focal: float = 1.0,
        gamma: float = 2.0,
        alpha: float | None = None,
        **arguments: Unpack[compat.MonaiOverlap],
    ) -> Self:
        """Reproduce MONAI's `DiceFocalLoss` with `sigmoid=True`; see `DiceLoss.like_monai`.

        A softmax is refused, as MONAI's focal term has none. `include_background=False` also leaves the background out
        of the focal term, and needs a `weight`, which gives the number of classes.

        >>> DiceFocalLoss.like_monai(sigmoid=True, lambda_focal=0.5, alpha=0.25).weights
        {'dice': 1.0, 'focal': 0.5}
        """
        settings = compat.monai_dice_focal(**arguments)
        return cls(dice_weight=lambda_dice, focal_weight=lambda_focal, gamma=gamma, alpha=alpha, **settings)


def _named(terms: Sequence[nn.Module]) -> dict[str, nn.Module]:
    names = [type(term).__name__ for term in terms]
    if len(set(names)) < len(names):
        raise ValueError(f"terms of one class need names: give a mapping of names to losses, got {names}")
    return dict(zip(names, terms, strict=True))


def _agreed(terms: Mapping[str, nn.Module], setting: str) -> object:
    """The setting that all terms share which have one."""
    given = {name: getattr(term, setting) for name, term in terms.items() if isinstance(term, SegmentationLoss)}
    if len(set(given.values())) > 1:
        raise ValueError(f"terms must have one {setting}, got {given}")
    return next(iter(given.values()), "sigmoid" if setting == "activation" else None)


def _weights(names: list[str], weights: Mapping[str, float] | Sequence[float] | None) -> dict[str, float]:
    if weights is None:
        weights = {}
    if not isinstance(weights, Mapping):
        if not isinstance(weights, Sequence) or isinstance(weights, str):
            raise ValueError(f"weights must be numbers by the names of terms, or a list of them, got {weights!r}")
        if len(weights) != len(names):
            raise ValueError(f"weights must have one for each of the {len(names)} terms, got {len(weights)}")
        weights = dict(zip(names, weights, strict=True))
    if unknown := set(weights) - set(names):
        unknown_names = ", ".join(sorted(map(str, unknown)))
        raise ValueError(
            f"weights must name terms, {', '.join(names)}; got {unknown_names}: a term that is taken away takes its "
            "weight along, '~loss.weights.<term>'"
        )
    return {name: check_number(f"the weight of {name}", weights.get(name, 1.0)) for name in names}


def _by_pixel(settings: OverlapSettings) -> dict[str, object]:
    shared = "activation", "ignore_index", "class_weights", "across_ranks"
    return {name: settings[name] for name in shared if name in settings}  # type: ignore[literal-required]


def _passes(terms: Mapping[str, nn.Module]) -> list[tuple[RequiredSums, dict[str, SumsLoss]]]:
    """Terms that one pass over the pixels can serve, and what it must sum."""
    passes: list[tuple[RequiredSums, dict[str, SumsLoss]]] = []
    for name, term in terms.items():
        if not isinstance(term, SumsLoss) or type(term).forward is not SegmentationLoss.forward:
            continue
        for index, (wanted, group) in enumerate(passes):
            if wanted.agrees(term.required_sums):
                passes[index] = (wanted | term.required_sums, {**group, name: term})
                break
        else:
            passes.append((term.required_sums, {name: term}))
    return passes
