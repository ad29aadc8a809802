"""Patch size, depth and batch size of a U-Net, from what a data set is like and the memory there is.

The rules are nnU-Net's (Isensee et al., Nature Methods 2021), but for the memory: nnU-Net compares the number of values
in feature maps with a figure measured for its own network; here what a step keeps is counted on the network itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_dice.library_internals.torch import storage_id

GIB = 2**30
FINEST = 256**3  # voxels of the first patch tried, in three dimensions
FINEST_2D = 2048**2
SHORTEST = 4  # voxels along an axis of the coarsest level
LEAST_BATCH = 2
COVERED = 0.05  # of all training voxels at most in one batch
HEADROOM = 1.2  # for the allocator's gaps, and the workspace of convolutions
BASE_FEATURES, MOST_FEATURES, MOST_FEATURES_2D = 32, 320, 512


@dataclass(frozen=True)
class Topology:
    """The shape of a U-Net for patches of one size.

    Attributes:
        size: of the patch, a multiple of all strides together along each axis.
        strides: of each level, along each axis; the first is 1.
        kernels: of each level's convolutions: 1 along an axis that is still coarser than the others.
    """

    size: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]

    @property
    def features(self) -> tuple[int, ...]:
        """Channels of each level: 32, doubled up to 320 (2D: 512)."""
        most = MOST_FEATURES_2D if len(self.size) == 2 else MOST_FEATURES
        return tuple(min(most, BASE_FEATURES * 2**level) for level in range(len(self.strides)))

    @property
    def divisors(self) -> tuple[int, ...]:
        """The product of all strides along each axis."""
        return tuple(math.prod(axis) for axis in zip(*self.strides, strict=True))


@dataclass(frozen=True)
class Proposal:
    """What `propose` has found.

    Attributes:
        topology: of the network.
        batch_size: patches in a batch.
        memory: that a training step needs, by the estimate, in bytes.
    """

    topology: Topology
    batch_size: int
    memory: int


def topology(spacing: Sequence[float], size: Sequence[int]) -> Topology:
    """The levels that a patch has room for; the patch is enlarged to a multiple of their strides.

    An axis is halved as long as that leaves 4 voxels, and its spacing is less than twice the smallest: a coarse axis
    waits until the others have become as coarse. Its kernels are 1 until then.

    Args:
        spacing: of voxels along each axis, in mm.
        size: of the patch.

    >>> topology((1.0, 1.0, 5.0), (32, 32, 8)).strides
    ((1, 1, 1), (2, 2, 1), (2, 2, 1), (2, 2, 2))
    """
    axes = range(len(spacing))
    now, length = list(spacing), [float(n) for n in size]
    strides: list[tuple[int, ...]] = [tuple(1 for _ in axes)]
    kernels: list[tuple[int, ...]] = []
    kernel = [1 for _ in axes]
    while True:
        long = [axis for axis in axes if length[axis] >= 2 * SHORTEST]
        fine = [axis for axis in long if now[axis] < 2 * min(now[other] for other in long)]
        if not fine or (len(fine) == 1 and length[fine[0]] < 3 * SHORTEST):
            break
        kernel = [3 if kernel[axis] == 3 or now[axis] < 2 * min(now) else 1 for axis in axes]
        kernels.append(tuple(kernel))
        strides.append(tuple(2 if axis in fine else 1 for axis in axes))
        for axis in fine:
            now[axis] *= 2
            length[axis] = math.ceil(length[axis] / 2)
    kernels.append(tuple(3 for _ in axes))
    divisors = [math.prod(axis) for axis in zip(*strides, strict=True)]
    padded = tuple(math.ceil(n / divisor) * divisor for n, divisor in zip(size, divisors, strict=True))
    return Topology(padded, tuple(strides), tuple(kernels))


def first_patch(spacing: Sequence[float], median_size: Sequence[int]) -> tuple[int, ...]:
    """A patch as long in mm along each axis, of 256^3 voxels (2D: 2048^2), clipped to the median image."""
    whole = FINEST if len(spacing) == 3 else FINEST_2D
    scale = (whole * math.prod(spacing)) ** (1 / len(spacing))
    return tuple(min(round(scale / step), n) for step, n in zip(spacing, median_size, strict=True))


def step_memory(make: Callable[[], nn.Module], channels: int, size: Sequence[int], batch_size: int) -> int:
    """Bytes that a training step with Adam needs in float32, by an estimate.

    The network runs without numbers (on the meta device), and what it keeps for the backward pass is counted. To that
    come weights, their gradients and Adam's two moments, the two largest feature maps again for gradients on their
    way, and a fifth of all for the allocator and the workspace of convolutions.

    Args:
        make: makes the network.
        channels: of an image.
        size: space axes of an image, such as the network can take.
        batch_size: images in a step.
    """
    with torch.device("meta"):
        net = make().train()
        image = torch.empty(1, channels, *size)
    own = {storage_id(parameter) for parameter in net.parameters()}
    kept: dict[int, Tensor] = {}  # The tensors too, that no storage is freed and its address used again.

    def keep(tensor: Tensor) -> Tensor:
        if storage_id(tensor) not in own:
            kept[storage_id(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net(image)
    each = sorted((tensor.untyped_storage().nbytes() for tensor in kept.values()), reverse=True)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in net.parameters())
    return int(HEADROOM * (4 * weights + batch_size * (sum(each) + sum(each[:2]))))


def propose(
    spacing: Sequence[float],
    median_size: Sequence[int],
    cases: int,
    make: Callable[[Topology], nn.Module],
    channels: int,
    budget: int,
) -> Proposal:
    """The largest patch, up to the median image, of which two fit the memory; then the largest batch.

    While the patch does not fit, its axis that is the longest against the median image becomes shorter by one step of
    the network's strides. A batch holds at most 5 % of the training voxels, and no more patches than there are cases,
    but two at least.

    Args:
        spacing: of voxels along each axis, in mm.
        median_size: of the training images at this spacing.
        cases: for training.
        make: makes a network of a topology.
        channels: of an image.
        budget: bytes for a training step.

    Raises:
        ValueError: not even the smallest patch fits.
    """

    def memory(of: Topology, batch_size: int) -> int:
        return step_memory(lambda: make(of), channels, of.size, batch_size)

    shape = topology(spacing, first_patch(spacing, median_size))
    while (need := memory(shape, LEAST_BATCH)) > budget:
        relative = [n / median for n, median in zip(shape.size, median_size, strict=True)]
        axis = relative.index(max(relative))
        # Of one step less there may be fewer levels, whose step is shorter.
        trial = list(shape.size)
        trial[axis] -= shape.divisors[axis]
        if trial[axis] < SHORTEST:
            raise ValueError(
                f"memory must be more: a batch of {LEAST_BATCH} patches of {'x'.join(map(str, shape.size))} needs "
                f"{need / GIB:.2g} GiB, got {budget / GIB:.2g}"
            )
        step = topology(spacing, trial).divisors[axis]
        shape = topology(spacing, [n - step * (index == axis) for index, n in enumerate(shape.size)])
    fixed = memory(shape, 0)
    one = (need - fixed) / LEAST_BATCH
    most = COVERED * cases * math.prod(median_size) / math.prod(shape.size)
    batch_size = max(LEAST_BATCH, min(int((budget - fixed) / one), round(most), cases))
    return Proposal(shape, batch_size, int(fixed + batch_size * one))
