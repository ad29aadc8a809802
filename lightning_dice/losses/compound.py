"""Weighted sums of losses, computed in one pass over the pixels where possible."""

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
    r"""Weighted sum of losses.

    .. math:: L = \sum_k w_k\,L_k

    Terms that are formulas on sums over pixels (every `SumsLoss`) share one pass over the pixels. A term may also be
    any other module of logits and target; wrap a loss of probabilities in `OnProbabilities`.

    Args:
        terms: losses by name, or a list of losses, which are then named by their classes.
        weights: weights of the terms, by name or in the same order, >= 0; 1 by default. A term of weight 0 is not
            computed.

    Attributes:
        values: the value of each term in the last call, by name, unweighted and without a gradient.

    Raises:
        ValueError: no terms; a weight below 0, or of no term; terms with different activations or ignored labels.

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
            raise ValueError(f"terms must be losses by name, or a list of losses, got {type(terms).__name__}")
        named = {str(name): term for name, term in terms.items()} if isinstance(terms, Mapping) else _by_class(terms)
        if not named:
            raise ValueError("terms must hold at least one loss, got none")
        for name, term in named.items():
            if not isinstance(term, nn.Module):
                raise ValueError(f"terms must be modules of logits and target, got {type(term).__name__} for {name!r}")
            if isinstance(term, OverlapLoss) and term.reduction == "none":
                raise ValueError(f'term {name!r} must have one value, got reduction="none"')
        super().__init__(
            activation=_shared_setting(named, "activation"),  # type: ignore[arg-type]
            ignore_index=_shared_setting(named, "ignore_index"),  # type: ignore[arg-type]
        )
        try:
            self.terms = nn.ModuleDict(named)
        except KeyError as error:
            raise ValueError(
                f"names of terms must have no dots and not be attributes of a module: {error.args[0]}"
            ) from error
        self.weights = _read_weights(list(named), weights)
        self.values: dict[str, Tensor] = {}
        self._checked: set[str] = set()

    @property
    def maps(self) -> Mapping[str, TargetMap]:  # type: ignore[override]
        """The maps of all terms; named `<term>.<name>` where two terms use one name for different maps."""
        return {
            self._map_name(name, key): compute
            for name, term in self.terms.items()
            for key, compute in getattr(term, "maps", {}).items()
        }

    def _map_name(self, name: str, key: str) -> str:
        """Return the public name of a term's map `key`."""
        own = cast("Mapping[str, TargetMap]", self.terms[name].maps)[key]
        all_maps = [getattr(term, "maps", {}) for term in self.terms.values()]
        return key if all(maps.get(key, own) == own for maps in all_maps) else f"{name}.{key}"

    def _maps_of_term(self, name: str, term: SegmentationLoss, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pick a term's maps, under the names that the term itself uses."""
        public = {key: self._map_name(name, key) for key in term.maps}
        return {key: maps[public[key]] for key in term.maps if public[key] in maps}

    def deferred(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        *,
        annotated: Tensor | None = None,
        maps: Mapping[str, Tensor] | None = None,
    ) -> DeferredReduction:
        """Compute the weighted sum up to the sums over the ranks, which are sent for all terms at once.

        Arguments as in `SegmentationLoss.forward`. Modules from elsewhere communicate on their own.
        """
        found: dict[str, DeferredReduction] = {}
        active = {name: term for name, term in self.terms.items() if self.weights[name] != 0}

        def as_logits(value: Tensor) -> Tensor:
            return value.to(torch.promote_types(logits.dtype, torch.float32))

        for required, group in _group_by_pass(active):
            first = next(iter(group.values()))
            sums = overlap_sums(
                logits,
                target,
                activation=first.activation,
                ignore_index=first.ignore_index,
                weight=weight,
                annotated=annotated,
                required=required,
            )
            found |= {name: term.deferred_from_sums(sums).apply(as_logits) for name, term in group.items()}
        for name, term in active.items():
            if name in found:
                continue
            if isinstance(term, SegmentationLoss):
                term_maps = self._maps_of_term(name, term, maps or {})
                found[name] = term.deferred_call(logits, target, weight, annotated=annotated, maps=term_maps)
            elif weight is not None or annotated is not None:
                raise ValueError(f"term {name!r}, a {type(term).__name__}, takes neither weight nor annotated")
            else:
                self._check_ignored_label(name, term, target)
                found[name] = DeferredReduction.ready(call_torch_loss(term, logits, target))

        def weighted_sum(*values: Tensor) -> Tensor:
            for name, value in zip(found, values, strict=True):
                if value.ndim:
                    raise ValueError(f"term {name!r} must return a scalar, got the shape {tuple(value.shape)}")
            self.values = {name: value.detach() for name, value in zip(found, values, strict=True)}
            if not values:
                # A zero with a gradient from no pixel: the sum of all pixels may be infinite, and 0 times that is NaN.
                return logits[:0].float().sum()
            return torch.stack([self.weights[name] * value for name, value in zip(found, values, strict=True)]).sum()

        return DeferredReduction.combine(list(found.values()), weighted_sum)

    def _check_ignored_label(self, name: str, term: nn.Module, target: Tensor) -> None:
        """Refuse ignored labels that a term would take for a class; on a GPU in its first call only."""
        if self.ignore_index is None or getattr(term, "ignore_index", None) == self.ignore_index:
            return
        if torch.compiler.is_compiling() or (target.device.type != "cpu" and name in self._checked):
            return
        self._checked.add(name)
        valid = valid_pixels(target, self.ignore_index)
        if valid is not None and not bool(valid.all()):
            raise ValueError(
                f"term {name!r}, a {type(term).__name__}, takes the ignored label {self.ignore_index} for a class: "
                f"set its ignore_index={self.ignore_index} if it has one, use a loss of lightning_dice.losses, or wrap "
                f"it: OnProbabilities(..., ignore_index={self.ignore_index})"
            )

    def __repr__(self) -> str:
        terms = [f"{self.weights[name]:g} x {name}: {term!r}" for name, term in self.terms.items()]
        return f"{type(self).__name__}(\n{indent(chr(10).join(terms), '  ')}\n)"


class DiceCELoss(CompoundLoss):
    r"""Dice loss plus cross-entropy, in one pass over the pixels: the kind of loss that nnU-Net uses.

    .. math:: L = w_\text{dice}\,L_\text{dice} + w_\text{ce}\,L_\text{ce}

    Args:
        dice_weight: weight of the `DiceLoss`, >= 0.
        ce_weight: weight of the `CrossEntropyLoss`, >= 0.
        label_smoothing: for the cross-entropy, in [0, 1).
        **settings: settings of `OverlapLoss`, for the Dice loss. The cross-entropy shares `activation`, `ignore_index`,
            `class_weights` and `across_ranks`; it includes all classes, as a softmax must learn the background too, and
            averages over all pixels of the batch.

    Raises:
        ValueError: as `DiceLoss` and `CrossEntropyLoss`.

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
        ce = CrossEntropyLoss(label_smoothing=label_smoothing, **_pixel_settings(settings))  # type: ignore[arg-type]
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
    r"""Dice loss plus focal loss, in one pass over the pixels.

    .. math:: L = w_\text{dice}\,L_\text{dice} + w_\text{focal}\,L_\text{focal}

    Args:
        dice_weight: weight of the `DiceLoss`, >= 0.
        focal_weight: weight of the `FocalLoss`, >= 0.
        gamma: for the focal loss, see `FocalLoss`.
        alpha: for the focal loss, see `FocalLoss`.
        **settings: settings of `OverlapLoss`, for the Dice loss. The focal loss shares `activation`, `ignore_index`,
            `class_weights` and `across_ranks`; it includes all classes and averages over all pixels of the batch.

    Raises:
        ValueError: as `DiceLoss` and `FocalLoss`.

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
        focal = FocalLoss(gamma=gamma, alpha=alpha, **_pixel_settings(settings))  # type: ignore[arg-type]
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


def _by_class(terms: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """Name each term by its class."""
    names = [type(term).__name__ for term in terms]
    if len(set(names)) < len(names):
        raise ValueError(f"several terms of one class need names: pass a mapping of names to losses, got {names}")
    return dict(zip(names, terms, strict=True))


def _shared_setting(terms: Mapping[str, nn.Module], setting: str) -> object:
    """Return the setting that all losses of this library among the terms share."""
    found = {name: getattr(term, setting) for name, term in terms.items() if isinstance(term, SegmentationLoss)}
    if len(set(found.values())) > 1:
        raise ValueError(f"terms must have the same {setting}, got {found}")
    return next(iter(found.values()), "sigmoid" if setting == "activation" else None)


def _read_weights(names: list[str], weights: Mapping[str, float] | Sequence[float] | None) -> dict[str, float]:
    if weights is None:
        weights = {}
    if not isinstance(weights, Mapping):
        if not isinstance(weights, Sequence) or isinstance(weights, str):
            raise ValueError(
                f"weights must be numbers by the names of the terms, or a list of numbers, got {weights!r}"
            )
        if len(weights) != len(names):
            raise ValueError(f"weights must have one for each of the {len(names)} terms, got {len(weights)}")
        weights = dict(zip(names, weights, strict=True))
    if unknown := set(weights) - set(names):
        unknown_names = ", ".join(sorted(map(str, unknown)))
        raise ValueError(
            f"weights must name terms, {', '.join(names)}; got {unknown_names}: to remove a term on the command line, "
            "remove its weight too, '~loss.weights.<term>'"
        )
    return {name: check_number(f"the weight of {name}", weights.get(name, 1.0)) for name in names}


def _pixel_settings(settings: OverlapSettings) -> dict[str, object]:
    """Return the settings that a `PixelMeanLoss` shares with the Dice loss beside it."""
    shared = "activation", "ignore_index", "class_weights", "across_ranks"
    return {name: settings[name] for name in shared if name in settings}  # type: ignore[literal-required]


def _group_by_pass(terms: Mapping[str, nn.Module]) -> list[tuple[RequiredSums, dict[str, SumsLoss]]]:
    """Group the terms that can share a pass over the pixels, each group with the sums that it requires."""
    passes: list[tuple[RequiredSums, dict[str, SumsLoss]]] = []
    for name, term in terms.items():
        if not isinstance(term, SumsLoss) or type(term).forward is not SegmentationLoss.forward:
            continue
        for index, (required, group) in enumerate(passes):
            if required.agrees(term.required_sums):
                passes[index] = (required | term.required_sums, {**group, name: term})
                break
        else:
            passes.append((term.required_sums, {name: term}))
    return passes
