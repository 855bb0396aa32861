"""Connected parts, against scipy's."""

import pytest
import torch
from scipy import ndimage

from regard.studies.tokencut.components import connected_components, fill_holes, largest_component


def random_mask(grid, share, seed):
    return torch.rand(grid, generator=torch.Generator().manual_seed(seed)) < share


@pytest.mark.parametrize("grid", [(1, 1), (17,), (9, 14), (4, 5, 6)])
@pytest.mark.parametrize("share", [0.0, 0.4, 0.6, 1.0])
def test_parts_are_those_of_scipy(grid, share):
    for seed in range(5):
        mask = random_mask(grid, share, seed)
        labels = connected_components(mask)
        expected, count = ndimage.label(mask.numpy())
        assert torch.equal(labels >= 0, mask)
        pairs = {(a, b) for a, b in zip(labels[mask].tolist(), expected[mask.numpy()].tolist(), strict=True)}
        assert len(pairs) == count == len({a for a, _ in pairs})


def test_a_winding_part_is_one():
    mask = torch.ones(15, 15, dtype=torch.bool)
    for row in range(1, 15, 2):
        mask[row, :] = False
        mask[row, 0 if row % 4 == 1 else -1] = True
    assert len(connected_components(mask)[mask].unique()) == 1


@pytest.mark.parametrize("share", [0.3, 0.6, 0.8])
def test_holes_are_those_of_scipy(share):
    for seed in range(5):
        mask = random_mask((13, 11), share, seed)
        assert torch.equal(fill_holes(mask), torch.from_numpy(ndimage.binary_fill_holes(mask.numpy())))


def test_the_largest_part_is_kept_alone():
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 1], [1, 0, 1, 1]], dtype=torch.bool)
    assert largest_component(mask).nonzero().tolist() == [[0, 3], [1, 3], [2, 2], [2, 3]]
    assert not largest_component(torch.zeros(3, 3, dtype=torch.bool)).any()
