"""What torchvision's transforms lack: a normalization by each image's own statistics, and intensities of any image."""

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

    over the pixels of the channel, `std` being the uncorrected one. It needs no statistics of a data set, so that
    an image seen later is treated as those in training were, whose crops have the statistics of the whole image. A
    constant channel becomes zeros.

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
        return self.of(image)(image)

    def of(self, image: Tensor) -> Callable[[Tensor], Tensor]:
        """What standardizes an image, for its parts: a crop comes out as it lies in the whole.

        Args:
            image: floating point, `(channels, *space)`.

        Raises:
            ValueError: for an image of integers or without space axes.

        >>> image = torch.tensor([[[1.0, 3.0], [3.0, 1.0]]])
        >>> Standardize().of(image)(image[..., :1])
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
        # The mean of equal numbers may differ from them in the last digit, which must not be blown up to ±1.
        flat = std <= 4 * torch.finfo(image.dtype).eps * mean.abs()
        return _shift_and_scale(mean, std.masked_fill(flat, torch.inf))

    def over(self, blocks: Iterable[Tensor]) -> Callable[[Tensor], Tensor]:
        """As `of`, of an image that comes in blocks `(channels, *space)`: one pass, in float64.

        Blocks are merged by their means and sums of squared deviations, which do not cancel as sums of squares do.
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
    """Of images `(channels, *space)`, by numbers `(channels, 1)`."""
    return lambda part: ((part.flatten(1) - mean) / width).view(part.shape)


def normalization_of(normalize: Callable[[Tensor], Tensor], image: Tensor) -> Callable[[Tensor], Tensor]:
    """What `normalize` does to an image, as a function that may be given a part of it, or a changed one.

    A normalization by an image's own statistics has a method `of(image)` that returns such a function, as `Standardize`
    does; others treat every pixel alike, and are returned as they are.
    """
    if isinstance(normalize, v2.Compose):
        parts = []
        for part in normalize.transforms:
            parts.append(normalization_of(part, image))
            image = parts[-1](image)
        whole: Callable[[Tensor], Tensor] = v2.Compose(parts)
        return whole
    of: Callable[[Tensor], Callable[[Tensor], Tensor]] | None = getattr(normalize, "of", None)
    return normalize if of is None else of(image)


def normalization_over(
    normalize: Callable[[Tensor], Tensor], blocks: Callable[[], Iterable[Tensor]]
) -> Callable[[Tensor], Tensor]:
    """As `normalization_of`, of an image that comes in blocks, for which there is a method `over(blocks)`.

    Args:
        normalize: of an image.
        blocks: gives the blocks `(channels, *space)` from the first one on; called where statistics are needed.
    """
    if isinstance(normalize, v2.Compose):
        parts: list[Callable[[Tensor], Tensor]] = []
        for part in normalize.transforms:
            parts.append(normalization_over(part, partial(_through, list(parts), blocks)))
        whole: Callable[[Tensor], Tensor] = v2.Compose(parts)
        return whole
    over: Callable[[Iterable[Tensor]], Callable[[Tensor], Tensor]] | None = getattr(normalize, "over", None)
    return normalize if over is None else over(blocks())


def _through(
    functions: Sequence[Callable[[Tensor], Tensor]], blocks: Callable[[], Iterable[Tensor]]
) -> Iterator[Tensor]:
    for block in blocks():
        yield reduce(lambda part, function: function(part), functions, block)


class RandomIntensity(nn.Module):
    r"""Change brightness, contrast and gamma of an image at random.

    torchvision's `ColorJitter` does this for one or three channels only; this one takes any number, and any number
    of space axes. All channels change alike; the mask stays as it is.

    .. math:: y = c\,(x^{\gamma} - m) + m + b

    with :math:`m` the mean of :math:`x^{\gamma}`, clipped to [0, 1].

    Args:
        brightness: `b` is drawn uniformly from -brightness to brightness, where black is 0 and white 1.
        contrast: `c` is drawn uniformly from 1 - contrast to 1 + contrast.
        gamma: `γ` is drawn from 1 / (1 + gamma) to 1 + gamma, its logarithm uniformly.

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
        """Change the images among the inputs, in [0, 1], and hand on all else, as torchvision's transforms do."""
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
        """The settings."""
        return f"brightness={self.brightness}, contrast={self.contrast}, gamma={self.gamma}"
