import numpy as np
import pytest
import torch
from monai.metrics.utils import get_mask_edges

from lightning_dice.scoring.surface_elements import surface_elements


@pytest.mark.parametrize("spacing", [(1, 1), (0.7, 2.3), (1, 1, 1), (2.5, 0.31, 1.7)], ids=str)
@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")  # MONAI's own call
def test_equal_monai_to_the_last_bit(spacing):
    # Noise has all neighbourhoods: 16 in two dimensions, 256 in three.
    mask = np.random.default_rng(0).random((14,) * len(spacing)) < 0.5
    edges, _, areas, _ = get_mask_edges(*[torch.from_numpy(mask)] * 2, crop=False, spacing=list(spacing))
    found, own_areas = surface_elements(mask, spacing)
    assert np.array_equal(found, edges.numpy())
    assert np.array_equal(own_areas, areas.numpy()[found])


def test_surface_in_one_dimension_is_points():
    found, areas = surface_elements(np.array([0, 1, 1, 0, 0]) == 1, (3,))
    assert found.tolist() == [True, False, True, False]
    assert areas.tolist() == [1, 1]
