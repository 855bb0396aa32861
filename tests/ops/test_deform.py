"""Sampling at fractional positions, against sums over all tokens of the grid."""

import pytest
import torch

from regard.ops.local.deform import deform_sample, sample_points


def naive_sample(v, points):
    """Every token weighs in by the hat function of its distance; one point at a time."""
    batch, rows, columns, heads, dim = v.shape
    out = v.new_zeros(*points.shape[:-1], dim)
    flat, result = points.reshape(batch, -1, *points.shape[-3:]), out.reshape(batch, -1, *out.shape[-3:])
    parts = []
    for b in range(batch):
        for place in range(flat.shape[1]):
            for head in range(heads):
                for point in range(flat.shape[3]):
                    y, x = flat[b, place, head, point]
                    near_rows = (1 - (torch.arange(rows) - y).abs()).clamp(min=0)
                    near_columns = (1 - (torch.arange(columns) - x).abs()).clamp(min=0)
                    parts.append(torch.einsum("r,c,rcd->d", near_rows, near_columns, v[b, :, :, head]))
    return torch.stack(parts).reshape(result.shape).reshape(out.shape)


@pytest.mark.parametrize("grid", [(4, 5), (1, 6), (3, 1)])
@pytest.mark.parametrize("out", [(3,), (2, 3)])
def test_samples_and_all_gradients_equal_sums_of_hats(grid, out):
    v = torch.randn(2, *grid, 2, 3, dtype=torch.float64, requires_grad=True)
    span = torch.tensor(grid, dtype=torch.float64)
    points = torch.rand(2, *out, 2, 4, 2, dtype=torch.float64) * (span + 3) - 2  # some outside by more than a token
    points.requires_grad_()
    ours, theirs = sample_points(v, points), naive_sample(v, points)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    towards = torch.randn_like(ours)
    for mine, its in zip(*(torch.autograd.grad(y, (v, points), towards) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-10, atol=1e-10)


def test_whole_positions_read_tokens_and_those_outside_read_zero():
    v = torch.randn(1, 3, 4, 1, 2, dtype=torch.float64)
    points = torch.tensor([[0.0, 0.0], [2.0, 3.0], [1.0, 2.0], [-1.0, 0.0], [0.0, 4.0], [50.0, -50.0]], dtype=torch.float64)
    got = sample_points(v, points[None, None, None])[0, 0, 0]
    expected = torch.stack([v[0, 0, 0, 0], v[0, 2, 3, 0], v[0, 1, 2, 0], *torch.zeros(3, 2, dtype=torch.float64)])
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_one_head_of_points_serves_all_heads():
    v, points = torch.randn(2, 4, 5, 3, 2, dtype=torch.float64), 4 * torch.rand(2, 6, 1, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(sample_points(v, points), sample_points(v, points.expand(2, 6, 3, 3, 2)))


def test_weighted_samples_are_sums_over_points():
    v, points = torch.randn(2, 4, 5, 3, 2, dtype=torch.float64), 4 * torch.rand(2, 6, 3, 7, 2, dtype=torch.float64)
    weights = torch.randn(2, 6, 3, 7, dtype=torch.float64)
    expected = sum(weights[..., i, None] * sample_points(v, points)[..., i, :] for i in range(7))
    torch.testing.assert_close(deform_sample(v, points, weights), expected)


def test_coordinates_of_narrow_values_keep_their_precision():
    v = (torch.arange(1000) % 2).bfloat16().reshape(1, 1, 1000, 1, 1)  # bfloat16 cannot tell 999 from 998
    points = torch.stack([torch.zeros(1000), torch.arange(1000.0)], -1)[None, None, None]
    got = sample_points(v, points)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.flatten(), v.flatten(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("points", [(2, 6, 2, 3, 2), (2, 6, 3, 3, 3), (1, 6, 3, 3, 2)])
def test_shapes_that_do_not_fit_are_told(points):
    with pytest.raises(ValueError, match=r"got .*\(\d, 6"):
        sample_points(torch.randn(2, 4, 5, 3, 2), torch.rand(points))
    with pytest.raises(ValueError, match=r"got \(2, 6, 3, 4\)"):
        deform_sample(torch.randn(2, 4, 5, 3, 2), torch.rand(2, 6, 3, 7, 2), torch.rand(2, 6, 3, 4))
