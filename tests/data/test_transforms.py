"""Our transforms, and torchvision's as the datamodule calls them."""

import re

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torchvision import tv_tensors
from torchvision.transforms import v2

from lightning_dice.data.batching import apply_augment
from lightning_dice.data.transforms import RandomIntensity, Standardize, fit_normalization

FLIPS = """
_target_: torchvision.transforms.v2.Compose
transforms:
  - _target_: torchvision.transforms.v2.RandomHorizontalFlip
  - _target_: torchvision.transforms.v2.RandomVerticalFlip
  - {_target_: torchvision.transforms.v2.RandomCrop, size: [24, 24], pad_if_needed: true}
"""
FULL = """
_target_: torchvision.transforms.v2.Compose
transforms:
  - _target_: torchvision.transforms.v2.RandomHorizontalFlip
  - _target_: torchvision.transforms.v2.RandomVerticalFlip
  - _target_: torchvision.transforms.v2.RandomApply
    p: 0.5
    transforms:
      - _target_: torchvision.transforms.v2.RandomAffine
        degrees: 30
        scale: [0.7, 1.4]
        interpolation: 2
  - {_target_: torchvision.transforms.v2.RandomCrop, size: [24, 24], pad_if_needed: true}
  - _target_: lightning_dice.data.transforms.RandomIntensity
    brightness: 0.1
    contrast: 0.25
    gamma: 0.25
  - _target_: torchvision.transforms.v2.RandomApply
    p: 0.3
    transforms:
      - {_target_: torchvision.transforms.v2.GaussianNoise, sigma: 0.05}
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 9), (3, 5, 7), (2, 4, 5, 6)])
def test_standardize(shape, dtype):
    torch.manual_seed(0)
    image = torch.rand(shape, dtype=dtype) * 50 + 1000
    result = Standardize()(image)
    for before, after in zip(image, result, strict=True):
        x = before.flatten().double().tolist()
        mean = sum(x) / len(x)
        std = (sum((v - mean) ** 2 for v in x) / len(x)) ** 0.5
        # 1000 in float32 has an absolute error of 6e-5, of a spread of about 15.
        assert after.flatten().double().tolist() == pytest.approx([(v - mean) / std for v in x], abs=1e-4)
    assert result.dtype == dtype
    assert result.shape == shape


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1.0, -7.3, 1e6])
def test_a_constant_channel_becomes_zeros(value):
    assert torch.equal(Standardize()(torch.full((2, 37, 41), value)), torch.zeros(2, 37, 41))


def test_a_faint_channel_is_not_constant():
    image = torch.full((1, 8, 8), 0.5)
    image[0, 0, 0] += 1 / 65535
    assert Standardize()(image).std(correction=0).item() == pytest.approx(1, abs=0.05)


def test_standardize_refuses():
    with pytest.raises(ValueError, match=re.escape("image must be of floating point, got torch.uint8")):
        Standardize()(torch.zeros(1, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=re.escape("image must be (channels, *space), got (4,)")):
        Standardize()(torch.zeros(4))


def test_a_part_is_standardized_as_in_the_whole():
    image = torch.linspace(0, 1, 2 * 6 * 8).view(2, 6, 8) ** 2
    image[1] = 0.3
    assert torch.equal(Standardize().fit(image)(image[:, 2:5, 1:4]), Standardize()(image)[:, 2:5, 1:4])
    both = v2.Compose([v2.Normalize([0.5], [0.1]), Standardize(), v2.Normalize([1.0], [2.0])])
    assert torch.equal(fit_normalization(both, image)(image[:, 2:5, 1:4]), both(image)[:, 2:5, 1:4])
    fixed = v2.Normalize([0.5], [0.1])
    assert fit_normalization(fixed, image) is fixed


@pytest.mark.parametrize("shape", [(1, 8, 8), (5, 8, 8), (2, 4, 8, 8)])
def test_intensity_changes_images_only(shape):
    torch.manual_seed(0)
    image = tv_tensors.Image(torch.rand(shape))
    mask = tv_tensors.Mask(torch.randint(0, 9, shape[1:]))
    changed, same = RandomIntensity(brightness=0.2, contrast=0.5, gamma=0.5)(image, mask)
    assert isinstance(changed, tv_tensors.Image)
    assert changed.shape == image.shape
    assert not torch.equal(changed, image)
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert same is mask


def test_intensity_without_settings_changes_nothing():
    torch.manual_seed(0)
    image = tv_tensors.Image(torch.rand(1, 8, 8))
    torch.testing.assert_close(RandomIntensity()(image), image)


def test_intensity_by_hand():
    image = tv_tensors.Image(torch.tensor([[[0.2, 0.4]]]))
    for _ in range(20):
        low, high = RandomIntensity(brightness=0.1)(image).flatten().tolist()
        assert high - low == pytest.approx(0.2)
        assert abs(low - 0.2) <= 0.1 + 1e-6
        low, high = RandomIntensity(contrast=0.5)(image).flatten().tolist()
        assert (low + high) / 2 == pytest.approx(0.3)
        assert 0.1 - 1e-6 <= high - low <= 0.3 + 1e-6
        low, high = RandomIntensity(gamma=1.0)(image).flatten().tolist()
        assert 0.2**2 - 1e-6 <= low <= 0.2**0.5 + 1e-6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"brightness": -1}, "brightness must be at least 0, got -1"),
        ({"gamma": float("nan")}, "gamma must be at least 0, got nan"),
        ({"contrast": 1.5}, "contrast must be at most 1, beyond which an image turns into its negative, got 1.5"),
    ],
)
def test_intensity_refuses(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        RandomIntensity(**settings)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("planes", [None, 1, 3], ids=["ids", "plane", "planes"])
@pytest.mark.parametrize("size", [(24, 24), (40, 31), (16, 50), (10, 10)], ids=str)
@pytest.mark.parametrize("text", [FLIPS, FULL], ids=["mirror_axes", "full"])
def test_lists_from_yaml(text, size, planes, channels):
    """The mask follows the image: it has an object exactly where the image shows it."""
    torch.manual_seed(0)
    augment = instantiate(OmegaConf.create(text))
    mask = torch.zeros(size, dtype=torch.uint8)
    mask[2:8, 3:7] = 1
    image = 0.25 + 0.5 * mask.float().expand(channels, *size)
    if planes is not None:
        mask = mask.expand(planes, *size)
    for _ in range(10):
        new, labels = apply_augment(augment, image, mask, 255)
        assert new.shape == (channels, 24, 24)
        assert new.dtype == torch.float32
        assert type(new) is type(labels) is torch.Tensor
        assert labels.shape == (24, 24) if planes is None else (planes, 24, 24)
        assert labels.dtype == torch.uint8
        assert set(labels.unique().tolist()) <= {0, 1, 255}
        labels = labels if planes is None else labels[0]
        if text == FLIPS:
            assert torch.equal(labels == 1, new[0] == 0.75)
            assert torch.equal(labels == 0, new[0] == 0.25)
            assert torch.equal(labels == 255, new[0] == 0)
        elif (labels == 1).any() and (labels == 0).any():
            assert new[0][labels == 1].mean() > new[0][labels == 0].mean()
