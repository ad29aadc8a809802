"""Logits at which probabilities underflow, in each backend at another one, for the tests of all backends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from losses.family import CASES
from torch import Tensor, nn

from lightning_dice.kernels import OverlapSums, RequiredSums, forced, overlap_sums
from lightning_dice.losses import OverlapLoss, TverskyLoss

# Around 2^-100 and the least normal and denormal float32, beyond those of float64, and what networks use as minus
# infinity: one for each class after the first two.
LOW = (-60.0, -70.0, -88.0, -95.0, -104.0, -120.0, -1e3, -65504.0, -math.inf)
CLASSES = 2 + len(LOW)
KINDS = (("sigmoid", "hard"), ("sigmoid", "soft"), ("softmax", "ids"), ("softmax", "soft"))
FORMULAS = [case for case in CASES if isinstance(case.loss(activation=case.activations[0]), OverlapLoss)]


def saturated_inputs() -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """Yield a name, the activation, float32 logits and the target; the second image has none of the low classes."""
    ids = torch.arange(2 * CLASSES) % CLASSES
    ids = torch.stack([ids, ids % 2])
    planes = nn.functional.one_hot(ids, CLASSES).movedim(-1, 1)
    start = torch.randn(2, CLASSES, 2 * CLASSES, generator=torch.Generator().manual_seed(0))
    for activation, kind in KINDS:
        target = ids if kind == "ids" else planes if kind == "hard" else planes * 0.75
        if kind == "soft" and activation == "softmax":
            target[:, 0] += 0.25
        for images in ([1], [0, 1]):
            logits = start.clone()
            logits[images, 2:] = torch.tensor(LOW).unsqueeze(1)
            yield f"{activation} {kind}, low in images {images}", activation, logits, target


def saturated_losses(activation: str) -> Iterator[tuple[str, OverlapLoss]]:
    """Yield every formula with every pool and policy that it has, without smoothing."""
    for case in FORMULAS:
        for pool in case.row.pools:
            for absent in ("smooth", "skip", "penalize"):
                loss = case.loss(activation, pool=pool, absent=absent, smooth=0)
                yield f"{case.id}-{pool}-{absent}", loss  # type: ignore[misc]
    for alpha, beta in ((0.0, 1.0), (1.0, 0.0)):
        for pool in ("image", "batch", "all"):
            loss = TverskyLoss(activation=activation, alpha=alpha, beta=beta, smooth=0, pool=pool)  # type: ignore[arg-type]
            yield f"tversky-{alpha:g}-{beta:g}-{pool}", loss


def values_and_gradients(
    logits: Tensor, target: Tensor, losses: Iterable[OverlapLoss]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the value of each class and image, and the gradient of some means, from as few passes as possible."""
    leaf = logits.clone().requires_grad_()
    passes: dict[RequiredSums, OverlapSums] = {}
    for loss in losses:
        required = loss.required_sums
        if required not in passes:
            passes[required] = overlap_sums(leaf, target, activation=loss.activation, required=required)
        gradient = torch.zeros_like(leaf)
        if loss.pool == "image":  # Pooling adds up what the kernels compute.
            (gradient,) = torch.autograd.grad(loss.from_sums(passes[required]), leaf, retain_graph=True)
        loss.reduction = "none"
        table = loss.from_sums(passes[required]).detach()
        loss.reduction = "mean"
        yield table, gradient


def assert_agrees_where_probabilities_underflow(backend: str, device: str = "cpu") -> None:
    """Assert that a backend's losses and gradients are those of the reference in float64."""
    for name, activation, logits, target in saturated_inputs():
        names, losses = zip(*saturated_losses(activation), strict=True)
        with forced("reference"):
            expected = list(values_and_gradients(logits.double(), target, losses))
        with forced(backend):
            results = values_and_gradients(logits.to(device), target.to(device), losses)
            for setting, (table, gradient), (exact, slope) in zip(names, results, expected, strict=True):
                close = torch.isclose(table.cpu(), exact, rtol=1e-5, atol=1e-6, equal_nan=True)
                assert close.all(), f"{setting}, {name}: {table} is not {exact}"
                close = torch.isclose(gradient.cpu(), slope.float(), rtol=1e-3, atol=1e-5)
                assert close.all(), f"{setting}, {name}: the gradient {gradient} is not {slope}"
