import numpy as np
import pytest
from skimage.draw import polygon

from lightning_dice.data.images.polygon import fill_polygon


def expected(x, y, shape):
    mask = np.zeros(shape, bool)
    mask[polygon(y, x, shape)] = True
    return mask


# Vertices on pixels, on their corners, on tenths whose rounding decides, or anywhere; some outside the image.
@pytest.mark.parametrize("step", [1.0, 0.5, 0.1, 1e-9], ids=str)
def test_equals_scikit_image(step):
    random = np.random.default_rng(0)
    for _ in range(300):
        height, width = (int(size) for size in random.integers(1, 30, 2))
        vertices = random.integers(1, 12)
        x, y = (np.rint(random.uniform(-5, size + 5, vertices) / step) * step - 0.5 for size in (width, height))
        assert np.array_equal(fill_polygon(x, y, (height, width)), expected(x, y, (height, width)))


def test_a_polygon_beside_the_image_is_empty():
    x, y = np.array([-9.0, -7.0, -7.0]), np.array([1.0, 1.0, 3.0])
    assert not fill_polygon(x, y, (4, 5)).any()
    assert not fill_polygon(y, x, (4, 5)).any()
