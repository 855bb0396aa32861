"""Footprints say which cells a pooled key was made of: their shares are the pooling itself, where that is a mean."""

import pytest
import torch

from regard.layers.pools import PoolKV
from regard.ops.calls.footprint import Footprint


@pytest.mark.parametrize(
    ("kind", "options"),
    [("mean", {"ratio": 2}), ("mean", {"ratio": 4}), ("adaptive", {"ratio": 3}), ("adaptive", {"size": (3, 4)}),
     ("resize", {"ratio": 2}), ("resize", {"size": (5, 9)})],
)  # fmt: skip
@pytest.mark.parametrize("grid", [(9, 7), (8, 12), (5, 10)])
def test_shares_of_pooled_keys_are_what_the_pooling_did(kind, options, grid):
    pool = PoolKV(kind, **options)
    x = torch.randn(1, *grid, 1, dtype=torch.float64)
    pooled = pool(x)[0, ..., 0]
    found = pool.footprint(grid)
    rows, columns = (found.axis_shares(axis, n) for axis, n in enumerate(pooled.shape))
    torch.testing.assert_close(rows @ x[0, ..., 0] @ columns.T, pooled, rtol=0, atol=1e-12)
    torch.testing.assert_close(rows.sum(-1), torch.ones(pooled.shape[0], dtype=torch.float64))


def test_convolved_keys_stand_for_the_cells_of_their_window_alone():
    pool = PoolKV("conv", 4, dim=2).double()
    x = torch.randn(1, 6, 9, 2, dtype=torch.float64, requires_grad=True)
    y = pool(x)
    shares = [pool.footprint((6, 9)).axis_shares(axis, n) for axis, n in enumerate(y.shape[1:3])]
    for i in range(2):
        for j in range(3):
            (gradient,) = torch.autograd.grad(y[0, i, j].sum(), x, retain_graph=True)
            made_of = torch.einsum("a,b->ab", shares[0][i], shares[1][j]) > 0
            assert torch.equal(gradient[0].abs().sum(-1) > 0, made_of)


def test_spreading_divides_the_mass_of_each_key():
    weights = torch.rand(2, 3, 4, 2, 3, dtype=torch.float64)
    spread = Footprint((5, 9), "windows", (3, 4)).spread(weights)
    for i in range(5):
        for j in range(9):
            height, width = (3, 2)[i // 3], (4, 4, 1)[j // 4]
            torch.testing.assert_close(spread[..., i, j], weights[..., i // 3, j // 4] / (height * width))


def test_equal_parts_may_cut_a_cell():
    shares = Footprint((3,)).axis_shares(0, 2)
    expected = torch.tensor([[2 / 3, 1 / 3, 0.0], [0.0, 1 / 3, 2 / 3]], dtype=torch.float64)
    torch.testing.assert_close(shares, expected)


def test_padded_keys_and_those_before_a_list_have_no_cell():
    weights = torch.rand(1, 1, 2, 7, 6)
    spread = Footprint((3, 4), "cells", start=(2, 1)).spread(weights)
    assert torch.equal(spread, weights[..., 2:5, 1:5])
    flat = torch.rand(1, 1, 2, 14)
    assert torch.equal(Footprint((3, 4), "list", prefix=2).spread(flat), flat[..., 2:].unflatten(-1, (3, 4)))


def test_errors_quote_what_was_given():
    with pytest.raises(ValueError, match=r"kind must be one of.*got 'blocks'"):
        Footprint((3, 3), "blocks")
    with pytest.raises(ValueError, match="need a ratio; got kind='windows', ratio=None"):
        Footprint((3, 3), "windows")
    with pytest.raises(ValueError, match=r"for 1 \+ 9 keys; got the key grid \(9,\)"):
        Footprint((3, 3), "list", prefix=1).spread(torch.rand(1, 1, 1, 9))
    with pytest.raises(ValueError, match=r"has 2 axes but the key grid is \(9,\)"):
        Footprint((3, 3)).spread(torch.rand(1, 1, 1, 9))


def test_a_footprint_of_no_numbers_is_refused():
    for wrong in (None, "44", 4, (), (4, 0), (4.0, 4), ("a", 2), [[4], [4]]):
        with pytest.raises((TypeError, ValueError), match="grid"):
            Footprint(wrong)
    for wrong in ("2", 2.0, True, (2,), (2, 0), [1, 2, 3]):
        with pytest.raises((TypeError, ValueError), match="ratio"):
            Footprint((4, 4), "windows", wrong)
    for wrong in (1, "11", (1,), (1, 2.0)):
        with pytest.raises((TypeError, ValueError), match="start"):
            Footprint((4, 4), "cells", start=wrong)
    for wrong in (None, -1, 1.0, "1"):
        with pytest.raises((TypeError, ValueError), match="prefix"):
            Footprint((4, 4), "list", prefix=wrong)
    for wrong in (None, [1.0], torch.ones(1, 1, 1, 4, 4, dtype=torch.bool), torch.ones(1, 1, 1, 4, 4).to_sparse()):
        with pytest.raises(TypeError, match="weights must be"):
            Footprint((4, 4)).spread(wrong)
