"""Scores and sums over the neighbours of each query: the definition, their gradients, memory and tracing."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from regard import attend
from regard.ops import patterns as P
from regard.ops.calls.source import HeadTable
from regard.ops.local.neighbors import neighbor_bias, neighbor_scores, neighbor_sum

CASES = [
    ((11,), P.Neighborhood(4, dilation=2)),
    ((9, 11), P.Neighborhood((3, 5), dilation=(2, 1))),
    ((9, 10), P.Neighborhood((3, 4), causal=(True, False))),
    ((12, 13), P.Neighborhood(5, stride=(2, 3))),
    ((8, 9), P.Neighborhood(5, border="mask")),
    ((9, 8), P.Window(5, shift=2)),
    ((4, 6, 5), P.Neighborhood((3, 2, 5), dilation=(1, 3, 1), causal=(False, True, True))),
    ((5, 3), P.Neighborhood(7)),  # larger than the grid
]


def naive_keys(pattern: P.Pattern, grid: tuple[int, ...]) -> tuple[list[list[tuple[int, ...] | None]], int]:
    """For each token, the key at each tap (None where there is none), from what the pattern shows on each axis."""
    rank = len(grid)
    lines = []
    for axis, length in enumerate(grid):
        position = torch.arange(length)
        seen = pattern.axis_visible(axis, position[:, None], position[None], length, rank)
        lines.append([position[row].tolist() for row in seen])
    taps = [max(map(len, line)) for line in lines]
    keys = []
    for token in itertools.product(*map(range, grid)):
        found: list[tuple[int, ...] | None] = []
        for tap in itertools.product(*map(range, taps)):
            on_axes = [lines[a][token[a]] for a in range(rank)]
            inside = all(tap[a] < len(on_axes[a]) for a in range(rank))
            found.append(tuple(on_axes[a][tap[a]] for a in range(rank)) if inside else None)
        keys.append(found)
    return keys, math.prod(taps)


def naive(q, k, v, weights, pattern):
    """Scores, and sums under given weights, ``(batch, tokens, heads, ...)``."""
    grid = tuple(q.shape[1:-2])
    keys, taps = naive_keys(pattern, grid)
    scores = q.new_full((q.shape[0], len(keys), q.shape[-2], taps), -torch.inf)
    sums = torch.zeros_like(v.flatten(1, -3))
    for token, (place, found) in enumerate(zip(itertools.product(*map(range, grid)), keys, strict=True)):
        for tap, key in enumerate(found):
            if key is not None:
                scores[:, token, :, tap] = (q[(slice(None), *place)] * k[(slice(None), *key)]).sum(-1)
                sums[:, token] += weights.flatten(1, -3)[:, token, :, tap, None] * v[(slice(None), *key)]
    return scores.unflatten(1, grid), sums.unflatten(1, grid)


@pytest.mark.parametrize(("grid", "pattern"), CASES, ids=repr)
def test_scores_and_sums_equal_loops_over_the_keys(grid, pattern):
    q, k, v = (torch.randn(2, *grid, 3, 4, dtype=torch.float64) for _ in range(3))
    scores = neighbor_scores(q, k, pattern)
    weights = torch.randn_like(scores)
    expected_scores, expected_sums = naive(q, k, v, weights, pattern)
    torch.testing.assert_close(scores, expected_scores)
    torch.testing.assert_close(neighbor_sum(weights, v, pattern), expected_sums)


@pytest.mark.parametrize(("grid", "pattern"), CASES, ids=repr)
def test_softmax_between_the_halves_is_attention_with_all_its_gradients(grid, pattern):
    q, k, v = (torch.randn(2, *grid, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    sizes = [2 * pattern.extent(axis, n, len(grid)) + 1 for axis, n in enumerate(grid)]
    table = torch.randn(2, *sizes, dtype=torch.float64, requires_grad=True)
    scores = neighbor_scores(q * 0.5, k, pattern) + neighbor_bias(table, pattern, grid)
    found = neighbor_sum(scores.softmax(-1), v, pattern)
    expected = attend(q, k, v, pattern, bias=HeadTable(table, pattern), scale=0.5, backend="reference")
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(found)
    torch.testing.assert_close(
        torch.autograd.grad(found, (q, k, v, table), grad), torch.autograd.grad(expected, (q, k, v, table), grad)
    )


def test_gradients_have_gradients():
    pattern = P.Neighborhood((3, 2), dilation=(1, 2), causal=(False, True))
    q, k, v = (torch.randn(1, 4, 5, 1, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def halves(q, k, v):
        return neighbor_sum(neighbor_scores(q, k, pattern).softmax(-1), v, pattern)

    assert torch.autograd.gradcheck(halves, (q, k, v))
    assert torch.autograd.gradgradcheck(halves, (q, k, v))


def test_the_graph_keeps_scores_and_operands_only():
    q, k, v = (torch.randn(2, 12, 12, 2, 16, requires_grad=True) for _ in range(3))
    kept: dict[int, int] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        scores = neighbor_scores(q, k, "neighborhood(5)")
        out = neighbor_sum(scores, v, "neighborhood(5)")
    del out
    operands = 3 * q.numel() * q.element_size()
    assert sum(kept.values()) <= scores.numel() * scores.element_size() + operands + 2 * operands  # with folded copies


def test_half_precision_rounds_results_and_not_sums():
    pattern = P.Neighborhood(5, dilation=2)
    q, k, v = (torch.randn(1, 12, 14, 2, 32).bfloat16().requires_grad_() for _ in range(3))
    scores = neighbor_scores(q, k, pattern)
    weights = scores.softmax(-1).detach().requires_grad_()
    sums = neighbor_sum(weights, v, pattern)
    grads = torch.autograd.grad((scores, sums), (q, k, weights, v), (weights, q))
    wide = [t.detach().float().requires_grad_() for t in (q, k, v, weights)]
    wide_scores, wide_sums = neighbor_scores(wide[0], wide[1], pattern), neighbor_sum(wide[3], wide[2], pattern)
    expected = torch.autograd.grad((wide_scores, wide_sums), (*wide[:2], wide[3], wide[2]), (wide[3], wide[0]))
    for found, exact in zip((scores, sums, *grads), (wide_scores, wide_sums, *expected), strict=True):
        assert found.equal(exact.bfloat16())  # bitwise: the same operators on the same shapes


def test_compiled_and_exported_without_breaks_before_any_eager_call():
    pattern = P.Neighborhood((3, 5), dilation=(2, 1), causal=(True, False))  # a pattern that nothing else uses

    class Halves(torch.nn.Module):
        def forward(self, q, k, table):
            scores = neighbor_scores(q, k, pattern) + neighbor_bias(table, pattern, q.shape[1:-2])
            return neighbor_sum(scores.softmax(-1), k, pattern)

    given = [torch.randn(2, 7, 6, 2, 4, requires_grad=True) for _ in range(2)]
    given.append(torch.randn(2, 5, 9, requires_grad=True))
    found = torch.compile(Halves(), fullgraph=True, backend="aot_eager")(*given)
    grads = torch.autograd.grad(found.square().sum(), given)
    expected = Halves()(*given)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(grads, torch.autograd.grad(expected.square().sum(), given))
    torch.testing.assert_close(torch.export.export(Halves(), tuple(given)).module()(*given), expected)


def test_flops_count_the_pairs_that_are_computed():
    q, k, v = (torch.randn(2, 16, 16, 3, 8) for _ in range(3))
    with FlopCounterMode(display=False) as scores, torch.no_grad():
        weights = neighbor_scores(q, k, "neighborhood(5)")
    with FlopCounterMode(display=False) as sums, torch.no_grad():
        neighbor_sum(weights, v, "neighborhood(5)")
    least = 2 * 2 * 3 * 8 * 256 * 25
    assert least < scores.get_total_flops() == sums.get_total_flops() < 4 * least


def test_errors_say_what_was_given():
    q = torch.randn(1, 6, 6, 2, 4)
    with pytest.raises(ValueError, match=r"product of windows on the axes; got Dense\(\)"):
        neighbor_scores(q, q, "dense")
    with pytest.raises(ValueError, match="without zero keys"):
        neighbor_scores(q, q, "neighborhood(3, border='zero')")
    with pytest.raises(ValueError, match=r"same grid; got \(1, 6, 6, 2, 4\) and \(1, 6, 5, 2, 4\)"):
        neighbor_scores(q, q[:, :, :5], "neighborhood(3)")
    with pytest.raises(ValueError, match=r"has 9 taps on the grid \(6, 6\); got weights \(1, 6, 6, 2, 25\)"):
        neighbor_sum(torch.randn(1, 6, 6, 2, 25), q, "neighborhood(3)")
    with pytest.raises(ValueError, match=r"share a dtype and a device; got a float32 tensor .*, a float64 tensor"):
        neighbor_scores(q, q.double(), "neighborhood(3)")
    with pytest.raises(ValueError, match=r"needs a bias table \(heads, 5, 5\); got \(2, 3, 5\)"):
        neighbor_bias(torch.randn(2, 3, 5), "neighborhood(3)", (6, 6))


@pytest.mark.parametrize(("pattern", "taps"), [("neighborhood(3)", 3), ("neighborhood(3, border='mask')", 3), ("window(2)", 2)])
def test_a_batch_of_none_gives_none_and_no_heads_no_bias(pattern, taps):
    q, k = (torch.randn(0, 5, 1, 2, 4, requires_grad=True) for _ in range(2))
    scores = neighbor_scores(q, k, pattern)
    out = neighbor_sum(scores.softmax(-1), k, pattern)
    assert scores.shape == (0, 5, 1, 2, taps)
    assert out.shape == q.shape
    first = torch.autograd.grad(out.sum(), (q, k), create_graph=True)
    assert [g.shape for g in torch.autograd.grad(first[0].sum() + first[1].sum(), (q, k))] == [q.shape, k.shape]
    extents = [P.as_pattern(pattern).extent(axis, n, 2) for axis, n in enumerate((5, 1))]
    assert neighbor_bias(torch.ones(0, *(2 * e + 1 for e in extents)), pattern, (5, 1)).shape == (5, 1, 0, taps)


def test_more_tokens_than_can_be_numbered_are_refused():
    many = torch.ones(1, 1, 1, 1).expand(1, 2**33, 1, 1)
    with pytest.raises(ValueError, match="at most 2147483647 tokens; got grid"):
        neighbor_scores(many, many, "window(2)")
    with pytest.raises(ValueError, match="at most 2147483647 tokens; got grid"):
        neighbor_bias(torch.ones(1, 3, 3), "window(2)", (2**20, 2**20))
    one = torch.ones(1, 4, 1, 1)
    for q, k in ((one, many), (many, one), (many, many)):
        with pytest.raises(ValueError, match="at most 2147483647 tokens; got q"):
            attend(q, k, k, "dense")
