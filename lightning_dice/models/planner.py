"""Patch size, depth and batch size of a U-Net, from the properties of a data set and the memory available.

The rules are nnU-Net's (Isensee et al., Nature Methods 2021), except for the memory: nnU-Net compares the number of
values in feature maps with a figure measured for its own network; here the memory of a step is counted on the network
itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_dice.library_internals.torch import storage_id

GIB = 2**30
FIRST_PATCH = 256**3  # voxels of the first patch tried
FIRST_PATCH_2D = 2048**2
MIN_LENGTH = 4  # voxels along an axis of the coarsest level
MIN_BATCH = 2
MAX_COVERAGE = 0.05  # of all training voxels in one batch
HEADROOM = 1.2  # for gaps in the allocator's memory, and the workspace of convolutions
BASE_FEATURES, MAX_FEATURES, MAX_FEATURES_2D = 32, 320, 512


@dataclass(frozen=True)
class Topology:
    """The shape of a U-Net for patches of one size.

    Attributes:
        size: the patch size; along each axis a multiple of the product of all strides.
        strides: each level's strides, along each axis; 1 at the first level.
        kernels: the kernel sizes of each level's convolutions; 1 along an axis that is still coarser than the others.

    >>> shape = Topology((32, 32), ((1, 1), (2, 2), (2, 2)), ((3, 3), (3, 3), (3, 3)))
    >>> shape.features, shape.divisors
    ((32, 64, 128), (4, 4))
    """

    size: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]

    @property
    def features(self) -> tuple[int, ...]:
        """Channels of each level: 32, doubled at each level up to 320 (2D: 512)."""
        most = MAX_FEATURES_2D if len(self.size) == 2 else MAX_FEATURES
        return tuple(min(most, BASE_FEATURES * 2**level) for level in range(len(self.strides)))

    @property
    def divisors(self) -> tuple[int, ...]:
        """The product of all strides along each axis."""
        return tuple(math.prod(axis) for axis in zip(*self.strides, strict=True))


@dataclass(frozen=True)
class Proposal:
    """The result of `propose`.

    Attributes:
        topology: the network's topology.
        batch_size: patches in a batch.
        memory: estimate for a training step, in bytes.
    """

    topology: Topology
    batch_size: int
    memory: int


def plan_topology(spacing: Sequence[float], size: Sequence[int]) -> Topology:
    """Return the levels that a patch has room for; the patch is enlarged to a multiple of their strides.

    An axis is halved as long as that leaves 4 voxels and its spacing is less than twice the smallest: a coarse axis
    waits until the others are as coarse. Until then its kernels are 1.

    Args:
        spacing: voxel spacing along each axis, in mm.
        size: the patch size.

    >>> plan_topology((1.0, 1.0, 5.0), (32, 32, 8)).strides
    ((1, 1, 1), (2, 2, 1), (2, 2, 1), (2, 2, 2))
    """
    axes = range(len(spacing))
    step, length = list(spacing), [float(n) for n in size]
    strides: list[tuple[int, ...]] = [tuple(1 for _ in axes)]
    kernels: list[tuple[int, ...]] = []
    kernel = [1 for _ in axes]
    while True:
        long = [axis for axis in axes if length[axis] >= 2 * MIN_LENGTH]
        fine = [axis for axis in long if step[axis] < 2 * min(step[other] for other in long)]
        if not fine or (len(fine) == 1 and length[fine[0]] < 3 * MIN_LENGTH):
            break
        kernel = [3 if kernel[axis] == 3 or step[axis] < 2 * min(step) else 1 for axis in axes]
        kernels.append(tuple(kernel))
        strides.append(tuple(2 if axis in fine else 1 for axis in axes))
        for axis in fine:
            step[axis] *= 2
            length[axis] = math.ceil(length[axis] / 2)
    kernels.append(tuple(3 for _ in axes))
    divisors = [math.prod(axis) for axis in zip(*strides, strict=True)]
    padded = tuple(math.ceil(n / divisor) * divisor for n, divisor in zip(size, divisors, strict=True))
    return Topology(padded, tuple(strides), tuple(kernels))


def first_patch(spacing: Sequence[float], median_size: Sequence[int]) -> tuple[int, ...]:
    """Return a patch of equal length in mm along each axis, of 256^3 voxels (2D: 2048^2), clipped to the median image.

    >>> first_patch((1.0, 1.0, 4.0), (512, 512, 64))
    (406, 406, 64)
    """
    voxels = FIRST_PATCH if len(spacing) == 3 else FIRST_PATCH_2D
    scale = (voxels * math.prod(spacing)) ** (1 / len(spacing))
    return tuple(min(round(scale / step), n) for step, n in zip(spacing, median_size, strict=True))


def step_memory(make: Callable[[], nn.Module], channels: int, size: Sequence[int], batch_size: int) -> int:
    """Estimate the memory of a training step with Adam in float32, in bytes.

    The network runs on the meta device, without data, and the tensors saved for the backward pass are counted. Added to
    these are the weights, their gradients and Adam's two moments; the two largest feature maps once more, for the
    gradients in flight; and a fifth of everything for the allocator and the workspace of convolutions.

    Args:
        make: builds the network.
        channels: an image's channels.
        size: space axes of an image, such that the network accepts it.
        batch_size: images in a step.

    >>> step_memory(lambda: nn.Conv2d(1, 8, 3, padding=1), 1, (64, 64), 2)
    80179
    """
    with torch.device("meta"):
        net = make().train()
        image = torch.empty(1, channels, *size)
    parameters = {storage_id(parameter) for parameter in net.parameters()}
    saved: dict[int, Tensor] = {}  # With the tensors, so that no storage is freed and its address reused.

    def save(tensor: Tensor) -> Tensor:
        if storage_id(tensor) not in parameters:
            saved[storage_id(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        net(image)
    sizes = sorted((tensor.untyped_storage().nbytes() for tensor in saved.values()), reverse=True)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in net.parameters())
    return int(HEADROOM * (4 * weights + batch_size * (sum(sizes) + sum(sizes[:2]))))


def propose(
    spacing: Sequence[float],
    median_size: Sequence[int],
    cases: int,
    make: Callable[[Topology], nn.Module],
    channels: int,
    budget: int,
) -> Proposal:
    """Propose the largest patch, up to the median image, of which two fit in memory; then the largest batch.

    While the patch does not fit, the axis that is longest relative to the median image is shortened by one step of the
    network's strides. A batch has at most 5 % of the training voxels, and at most as many patches as there are cases,
    but at least two.

    Args:
        spacing: voxel spacing along each axis, in mm.
        median_size: the median size of the training images at this spacing.
        cases: number of training cases.
        make: builds the network of a topology.
        channels: an image's channels.
        budget: bytes for a training step.

    Raises:
        ValueError: not even the smallest patch fits.

    >>> proposal = propose((1.0, 1.0), (64, 64), 100, lambda shape: nn.Conv2d(1, 8, 3, padding=1), 1, GIB)
    >>> proposal.topology.size, proposal.batch_size
    ((64, 64), 5)
    """

    def memory(shape: Topology, batch_size: int) -> int:
        return step_memory(lambda: make(shape), channels, shape.size, batch_size)

    shape = plan_topology(spacing, first_patch(spacing, median_size))
    while (need := memory(shape, MIN_BATCH)) > budget:
        relative = [n / median for n, median in zip(shape.size, median_size, strict=True)]
        axis = relative.index(max(relative))
        # A patch that is one step shorter may have fewer levels, and so a shorter step.
        trial = list(shape.size)
        trial[axis] -= shape.divisors[axis]
        if trial[axis] < MIN_LENGTH:
            raise ValueError(
                f"memory must be more: a batch of {MIN_BATCH} patches of {'x'.join(map(str, shape.size))} needs "
                f"{need / GIB:.2g} GiB, got {budget / GIB:.2g}"
            )
        step = plan_topology(spacing, trial).divisors[axis]
        shape = plan_topology(spacing, [n - step * (index == axis) for index, n in enumerate(shape.size)])
    fixed = memory(shape, 0)
    per_patch = (need - fixed) / MIN_BATCH
    most = MAX_COVERAGE * cases * math.prod(median_size) / math.prod(shape.size)
    batch_size = max(MIN_BATCH, min(int((budget - fixed) / per_patch), round(most), cases))
    return Proposal(shape, batch_size, int(fixed + batch_size * per_patch))
