"""Position encodings against their formulas, entry by entry."""

import cmath
import itertools
import math

import pytest
import torch
from naive_mixers import depthwise

from regard import attend
from regard import patterns as P
from regard.layers.conv import convolve_tokens
from regard.layers.conv import depthwise as depthwise_conv
from regard.layers.positions import ConvPosition, OffsetBias, RotaryPositions, ValueConv, resize_offset_table, sincos
from regard.ops.tokens.rope import rope


@pytest.mark.parametrize(("grid", "width"), [((5,), 8), ((3, 4), 12), ((2, 3, 2), 6)])
def test_rope_rotates_each_pair_by_its_position(grid, width):
    x = torch.randn(2, *grid, 3, width, dtype=torch.float64)
    y = rope(x, base=100.0)
    pairs = width // (2 * len(grid))
    for at in itertools.product(*map(range, grid)):
        for pair in range(width // 2):
            axis, i = divmod(pair, pairs)
            turn = cmath.exp(1j * at[axis] * 100.0 ** (-i / pairs))
            for batch, head in itertools.product(range(2), range(3)):
                before = complex(*x[(batch, *at, head)][2 * pair : 2 * pair + 2].tolist())
                after = complex(*y[(batch, *at, head)][2 * pair : 2 * pair + 2].tolist())
                assert abs(after - before * turn) < 1e-12


def test_rope_takes_real_positions_per_batch_item():
    x = torch.randn(2, 3, 4, 1, 8, dtype=torch.float64)
    where = torch.rand(2, 3, 4, 2, dtype=torch.float64)
    together = RotaryPositions()(x, where)
    for item in range(2):
        torch.testing.assert_close(together[item], RotaryPositions()(x[item : item + 1], where[item])[0])
    torch.testing.assert_close(together.norm(dim=-1), x.norm(dim=-1))


def test_rope_keeps_bfloat16_and_computes_angles_in_float32():
    x = torch.randn(1, 300, 2, 8)
    assert rope(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(rope(x.bfloat16()), rope(x.bfloat16().float()).bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("x", "where", "told"),
    [
        (torch.randn(1, 3, 4, 2, 6), None, "multiple of 4 to rotate 2 axes; got 6"),
        (torch.randn(1, 3, 4, 2, 8), torch.zeros(4, 3, 2), r"grid \(3, 4\); got \(4, 3, 2\)"),
    ],
)
def test_rope_refuses_what_does_not_fit(x, where, told):
    with pytest.raises(ValueError, match=told):
        rope(x, where)


@pytest.mark.parametrize("grid", [(6,), (3, 5), (2, 3, 4)])
def test_sincos_table_equals_formula(grid):
    rank, count = len(grid), 3
    table = sincos(grid, 2 * rank * count, base=50.0, dtype=torch.float64)
    for at in itertools.product(*map(range, grid)):
        expected = []
        for position in at:
            angles = [position * 50.0 ** (-i / count) for i in range(count)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        assert table[at].tolist() == pytest.approx(expected, abs=1e-14)


def test_sincos_needs_an_even_share_per_axis():
    with pytest.raises(ValueError, match="multiple of 4 on a grid of 2 axes; got 6"):
        sincos((3, 3), 6)


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("grid", [(4, 5), (1, 3)])
def test_conv_position_adds_the_depthwise_convolution(kernel_size, grid):
    module, values = ConvPosition(6, kernel_size).double(), ValueConv(6, kernel_size).double()
    values.load_state_dict(module.state_dict())
    x = torch.randn(*grid, 6, dtype=torch.float64)
    expected = depthwise(x, module.conv)
    torch.testing.assert_close(values(x[None])[0], expected)
    torch.testing.assert_close(module(x[None])[0], x + expected)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_even_kernels_reach_one_step_further_after_than_before(rank):
    conv = depthwise_conv(1, 4, rank, bias=False)
    torch.nn.init.ones_(conv.weight)
    x = torch.zeros(1, *[9] * rank, 1)
    x[(0, *[4] * rank, 0)] = 1.0
    reached = convolve_tokens(conv, x)[0, ..., 0].nonzero()
    assert reached.min(0).values.tolist() == [2] * rank
    assert reached.max(0).values.tolist() == [5] * rank


def test_convolution_of_a_grid_copies_nothing():
    x = torch.randn(2, 5, 6, 8)
    seen = []
    convolve_tokens(lambda t: seen.append(t) or t, x)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert seen[0].data_ptr() == x.data_ptr()


def test_convolutions_have_one_to_three_axes():
    with pytest.raises(ValueError, match="rank=4"):
        depthwise_conv(2, 3, 4)


def test_offset_bias_reads_the_middle_of_a_larger_table():
    small, large = OffsetBias(2, P.Dense(), grid=(3, 4)).double(), OffsetBias(2, P.Dense(), grid=(5, 6)).double()
    with torch.no_grad():
        large.table.normal_()
        small.table.copy_(large.table[:, 2:-2, 2:-2])
    q, k, v = (torch.randn(1, 3, 4, 2, 8, dtype=torch.float64) for _ in range(3))
    torch.testing.assert_close(attend(q, k, v, bias=large), attend(q, k, v, bias=small))


def test_offset_bias_without_bound_needs_the_grid():
    with pytest.raises(ValueError, match="needs the grid"):
        OffsetBias(2, P.Dense())


def cubic(t: float) -> float:
    """The cubic convolution kernel with slope -0.75."""
    t, a = abs(t), -0.75
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def test_resized_table_is_the_bicubic_interpolation():
    table = torch.randn(2, 5, 5, dtype=torch.float64)
    assert resize_offset_table(table, (5, 5)) is table
    matrix = torch.zeros(9, 5, dtype=torch.float64)
    for i in range(9):
        at = (i + 0.5) * 5 / 9 - 0.5
        for j in range(-3, 9):
            matrix[i, min(max(j, 0), 4)] += cubic(at - j)
    torch.testing.assert_close(resize_offset_table(table, (9, 9)), matrix @ table @ matrix.T, rtol=0, atol=1e-12)
    assert resize_offset_table(table.bfloat16(), (9, 9)).dtype == torch.bfloat16
