"""Transforms that torchvision lacks: per-image standardization, and random intensities for any number of channels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial, reduce

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2


class Standardize(nn.Module):
    r"""Give each channel of an image zero mean and unit standard deviation.

    .. math:: y = \frac{x - \operatorname{mean}(x)}{\operatorname{std}(x)}

    over the pixels of the channel, with the uncorrected `std`. It needs no statistics of a data set. In training,
    crops are standardized by the statistics of their whole image, as images are in prediction. A constant channel
    becomes zeros.

    >>> Standardize()(torch.tensor([[[1.0, 3.0], [3.0, 1.0]], [[7.0, 7.0], [7.0, 7.0]]]))
    tensor([[[-1.,  1.],
             [ 1., -1.]],
    <BLANKLINE>
            [[ 0.,  0.],
             [ 0.,  0.]]])
    """

    def forward(self, image: Tensor) -> Tensor:
        """Standardize an image.

        Args:
            image: floating point, `(channels, *space)`.

        Raises:
            ValueError: for an image of integers or without space axes.
        """
        return self.fit(image)(image)

    def fit(self, image: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the function that standardizes this image, to be applied to crops of it.

        Args:
            image: floating point, `(channels, *space)`.

        Raises:
            ValueError: for an image of integers or without space axes.

        >>> image = torch.tensor([[[1.0, 3.0], [3.0, 1.0]]])
        >>> Standardize().fit(image)(image[..., :1])
        tensor([[[-1.],
                 [ 1.]]])
        """
        if not image.is_floating_point():
            raise ValueError(f"image must be of floating point, got {image.dtype}")
        if image.ndim < 2:
            raise ValueError(f"image must be (channels, *space), got {tuple(image.shape)}")
        pixels = image.flatten(1)
        mean = pixels.mean(1, keepdim=True)
        std = (pixels - mean).square().mean(1, keepdim=True).sqrt()
        # The mean of equal numbers may differ from them in the last digit, which must not be scaled up to ±1.
        flat = std <= 4 * torch.finfo(image.dtype).eps * mean.abs()
        return _shift_and_scale(mean, std.masked_fill(flat, torch.inf))

    def fit_blocks(self, blocks: Iterable[Tensor]) -> Callable[[Tensor], Tensor]:
        """Do as `fit` for an image that comes in blocks `(channels, *space)`, in one pass in float64.

        Blocks are merged by their means and sums of squared deviations, which do not cancel as sums of squares do.

        >>> image = torch.tensor([[[1.0, 3.0], [3.0, 1.0]]])
        >>> Standardize().fit_blocks(image.split(1, dim=1))(image[..., :1])
        tensor([[[-1.],
                 [ 1.]]])
        """
        count, mean, squares = 0, torch.zeros(()).double(), torch.zeros(()).double()
        for block in blocks:
            pixels = block.flatten(1).double()
            center = pixels.mean(1, keepdim=True)
            number, shift = pixels.shape[1], center - mean
            total = count + number
            squares = (
                squares + (pixels - center).square().sum(1, keepdim=True) + shift.square() * (count * number / total)
            )
            mean, count = mean + shift * (number / total), total
        std = (squares / count).sqrt()
        flat = std <= 4 * torch.finfo(torch.float32).eps * mean.abs()
        return _shift_and_scale(mean.float(), std.masked_fill(flat, torch.inf).float())


def _shift_and_scale(mean: Tensor, width: Tensor) -> Callable[[Tensor], Tensor]:
    """Return `(image - mean) / width` for images `(channels, *space)`; both numbers are `(channels, 1)`."""
    return lambda part: ((part.flatten(1) - mean) / width).view(part.shape)


def fit_normalization(normalize: Callable[[Tensor], Tensor], image: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the function that `normalize` applies to this image, for crops and augmented versions of it.

    A normalization by an image's own statistics has a method `fit(image)` that returns such a function, as
    `Standardize` does. Others treat all pixels alike and are returned unchanged.

    >>> image = torch.tensor([[[1.0, 3.0], [3.0, 1.0]]])
    >>> both = v2.Compose([Standardize(), v2.Normalize([1.0], [2.0])])
    >>> fit_normalization(both, image)(image[..., :1])
    tensor([[[-1.],
             [ 0.]]])
    """
    if isinstance(normalize, v2.Compose):
        parts = []
        for part in normalize.transforms:
            parts.append(fit_normalization(part, image))
            image = parts[-1](image)
        composed: Callable[[Tensor], Tensor] = v2.Compose(parts)
        return composed
    fit: Callable[[Tensor], Callable[[Tensor], Tensor]] | None = getattr(normalize, "fit", None)
    return normalize if fit is None else fit(image)


def fit_normalization_to_blocks(
    normalize: Callable[[Tensor], Tensor], blocks: Callable[[], Iterable[Tensor]]
) -> Callable[[Tensor], Tensor]:
    """Do as `fit_normalization` for an image that comes in blocks, by the method `fit_blocks` of `normalize`.

    Args:
        normalize: takes an image and returns it normalized.
        blocks: returns the blocks `(channels, *space)` from the first one on; called once for each normalization that
            takes statistics.

    >>> image = torch.tensor([[[1.0, 3.0], [3.0, 1.0]]])
    >>> fit_normalization_to_blocks(Standardize(), lambda: image.split(1, dim=1))(image[..., :1])
    tensor([[[-1.],
             [ 1.]]])
    """
    if isinstance(normalize, v2.Compose):
        parts: list[Callable[[Tensor], Tensor]] = []
        for part in normalize.transforms:
            parts.append(fit_normalization_to_blocks(part, partial(_apply_to_blocks, list(parts), blocks)))
        composed: Callable[[Tensor], Tensor] = v2.Compose(parts)
        return composed
    fit: Callable[[Iterable[Tensor]], Callable[[Tensor], Tensor]] | None = getattr(normalize, "fit_blocks", None)
    return normalize if fit is None else fit(blocks())


def _apply_to_blocks(
    functions: Sequence[Callable[[Tensor], Tensor]], blocks: Callable[[], Iterable[Tensor]]
) -> Iterator[Tensor]:
    for block in blocks():
        yield reduce(lambda part, function: function(part), functions, block)


class RandomIntensity(nn.Module):
    r"""Change brightness, contrast and gamma of an image at random.

    Unlike torchvision's `ColorJitter`, which takes one or three channels, it takes any number of channels and space
    axes. All channels change alike; masks are not changed.

    .. math:: y = c\,(x^{\gamma} - m) + m + b

    with :math:`m` the mean of :math:`x^{\gamma}`, clipped to [0, 1].

    Args:
        brightness: `b` is uniform in [-brightness, brightness], where black is 0 and white 1.
        contrast: `c` is uniform in [1 - contrast, 1 + contrast].
        gamma: `γ` is log-uniform in [1 / (1 + gamma), 1 + gamma].

    Raises:
        ValueError: for a negative setting, or a `contrast` above 1.

    >>> augment = RandomIntensity(brightness=0.1, contrast=0.2)
    >>> image = tv_tensors.Image(torch.rand(5, 8, 8))
    >>> mask = tv_tensors.Mask(torch.ones(8, 8, dtype=torch.uint8))
    >>> changed, same = augment(image, mask)
    >>> changed.shape, torch.equal(changed, image), torch.equal(same, mask)
    (torch.Size([5, 8, 8]), False, True)
    """

    def __init__(self, *, brightness: float = 0.0, contrast: float = 0.0, gamma: float = 0.0) -> None:
        super().__init__()
        for name, value in (("brightness", brightness), ("contrast", contrast), ("gamma", gamma)):
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value!r}")
        if contrast > 1:
            raise ValueError(
                f"contrast must be at most 1, beyond which an image turns into its negative, got {contrast!r}"
            )
        self.brightness = brightness
        self.contrast = contrast
        self.gamma = gamma

    def forward(self, *inputs: Tensor) -> Tensor | Sequence[Tensor]:
        """Change the images among the inputs, in [0, 1], and return all else unchanged, as torchvision does."""
        b, c, g = (torch.rand(3) * 2 - 1).tolist()
        outputs = [self._change(x, b, c, g) if isinstance(x, tv_tensors.Image) else x for x in inputs]
        return outputs[0] if len(outputs) == 1 else outputs

    def _change(self, image: Tensor, b: float, c: float, g: float) -> Tensor:
        pixels = image.as_subclass(Tensor).pow((1 + self.gamma) ** g)
        mean = pixels.mean()
        pixels = (1 + self.contrast * c) * (pixels - mean) + mean + self.brightness * b
        changed: Tensor = tv_tensors.wrap(pixels.clamp(0, 1), like=image)
        return changed

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"brightness={self.brightness}, contrast={self.contrast}, gamma={self.gamma}"
