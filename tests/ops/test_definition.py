"""The reference backend and the masks equal the definitions, written out query by query."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard import Source, attend
from regard.ops import patterns as P
from regard.ops.calls.source import HeadTable

from . import naive
from .cases import blocks, cases, clusters, sizes, static


@st.composite
def routed(draw):
    grid = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    return grid, draw(st.one_of(blocks(grid, 2, 3), clusters(grid, 2, 3)))


@given(st.integers(1, 3).flatmap(lambda rank: st.tuples(sizes(rank), static(rank))))
@settings(max_examples=150)
def test_mask_equals_definition(drawn):
    grid, pattern = drawn
    assert pattern.mask(grid).equal(naive.mask(pattern, grid, grid)[0, 0])


@given(routed())
def test_routed_mask_equals_definition(drawn):
    grid, pattern = drawn
    assert pattern.mask(grid).expand(2, 3, -1, -1).equal(naive.mask(pattern, grid, grid, 2, 3))


@given(cases())
@settings(max_examples=40)
def test_reference_equals_loops(case):
    if math.prod(case.grid) > 60:
        return
    tensors = case.tensors(torch.float64)
    expected = naive.attend(
        tensors["q"], tensors["k"], tensors["v"], case.pattern, scale=case.scale, table=tensors.get("table"), valid=case.mask()
    )
    out, lse = expected
    if case.sink is not None:  # one more key with value zero
        out = out * (1 / (1 + torch.exp(case.sink - lse)))[..., None]
        lse = torch.logaddexp(lse, torch.tensor(case.sink, dtype=lse.dtype))
    found, found_lse = case.run(tensors, "reference")
    torch.testing.assert_close(found, out, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found_lse, lse, rtol=1e-11, atol=1e-11)


def test_gradients_of_reference_equal_loops():
    pattern = P.Neighborhood((3, 4), dilation=(2, 1), border="zero")
    q, k, v = (torch.randn(1, 5, 4, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    table = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    inputs = (q, k, v, table)
    out, lse = naive.attend(q, k, v, pattern, table=table)
    expected = torch.autograd.grad((out.sin().sum() + lse.cos().sum()), inputs)
    out, lse = attend(q, k, v, pattern, bias=HeadTable(table, pattern), return_lse=True, backend="reference")
    found = torch.autograd.grad((out.sin().sum() + lse.cos().sum()), inputs)
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


@given(st.integers(1, 3).flatmap(lambda rank: st.tuples(sizes(rank), static(rank))), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_queries_placed_by_q_start_equal_rows_of_the_whole(drawn, random):
    grid, pattern = drawn
    q, k, v = (torch.randn(1, *grid, 2, 4, dtype=torch.float64) for _ in range(3))
    start = tuple(random.randrange(n) for n in grid)
    stop = tuple(random.randrange(s, n) + 1 for s, n in zip(start, grid, strict=True))
    if isinstance(pattern, P.Causal) and len(grid) > 1:  # raster order: whole rows only
        start, stop = (start[0], *[0] * (len(grid) - 1)), (stop[0], *grid[1:])
    part = (slice(None), *map(slice, start, stop))
    whole, whole_lse = attend(q, k, v, pattern, return_lse=True, backend="reference")
    for backend in ("reference", "auto"):
        out, lse = attend(q[part], k, v, pattern, q_start=start, return_lse=True, backend=backend)
        torch.testing.assert_close(out, whole[part], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(lse, whole_lse[part], rtol=1e-11, atol=1e-11)


@given(st.integers(1, 3).flatmap(lambda rank: st.tuples(sizes(rank), static(rank))))
@settings(max_examples=100)
def test_degree_and_reach_follow_from_the_mask(drawn):
    grid, pattern = drawn
    mask = pattern.mask(grid)
    assert pattern.degree(grid).equal(mask.sum(-1).view(grid))
    seen = mask.view(*grid, *grid)
    for axis, n in enumerate(grid):
        others = [a for a in range(2 * len(grid)) if a not in (axis, axis + len(grid))]
        on_axis = seen.amax(others) if others else seen  # (queries, keys) of this axis
        for first, last in itertools.combinations(range(n + 1), 2):
            needed = on_axis[first:last].any(0).nonzero().flatten().tolist()
            low, high = pattern.reach(axis, (first, last), grid)
            assert set(needed) <= set(range(low, high)) <= set(range(n))


@given(routed())
def test_routed_degree_follows_from_the_mask(drawn):
    grid, pattern = drawn
    mask = pattern.mask(grid)
    assert pattern.degree(grid).equal(mask.sum(-1).view(*mask.shape[:2], *grid))


@pytest.mark.parametrize(("length", "kernel", "dilation", "stride", "q", "keys"), [
    (10, 3, 1, 1, 0, [0, 1, 2]),
    (10, 3, 1, 1, 9, [7, 8, 9]),
    (10, 4, 1, 1, 5, [3, 4, 5, 6]),  # even: more to the left
    (10, 3, 2, 1, 1, [1, 3, 5]),
    (9, 3, 2, 1, 8, [4, 6, 8]),
    (8, 4, 1, 4, 1, [0, 1, 2, 3]),  # stride = kernel: windows
    (10, 4, 1, 4, 9, [6, 7, 8, 9]),  # a last partial window moves inward
    (4, 7, 1, 1, 2, [0, 1, 2, 3]),
])  # fmt: skip
def test_neighborhood_by_hand(length, kernel, dilation, stride, q, keys):
    assert P.Neighborhood(kernel, dilation, stride).mask((length,))[q].nonzero().flatten().tolist() == keys


def test_causal_neighborhood_key_counts():
    for length, kernel, stride in itertools.product(range(1, 12), range(1, 6), range(1, 6)):
        if stride > kernel:
            continue
        counts = P.Neighborhood(kernel, stride=stride, causal=True).degree((length,)).tolist()
        for u, count in enumerate(counts):
            leader = min(u // stride * stride + stride - 1, length - 1)
            assert count == min(u + 1, kernel - (leader - u))


def test_several_sources_are_one_softmax_over_a_multiset():
    q, k, v = (torch.randn(2, 3, 4, 2, 5, dtype=torch.float64) for _ in range(3))
    pooled_k, pooled_v = (torch.randn(2, 6, 2, 5, dtype=torch.float64) for _ in range(2))
    pattern = P.Neighborhood(3)
    for backend in ("reference", "auto"):
        sources = [Source(k, v, pattern), Source(pooled_k, pooled_v), Source(k, v, pattern)]
        out, lse = attend(q, sources, return_lse=True, backend=backend)
        keys = torch.cat([k.flatten(1, 2), pooled_k, k.flatten(1, 2)], 1)
        values = torch.cat([v.flatten(1, 2), pooled_v, v.flatten(1, 2)], 1)
        mask = pattern.mask((3, 4))
        mask = torch.cat([mask, torch.ones(12, 6, dtype=torch.bool), mask], 1)
        logits = torch.einsum("bqhd,bkhd->bhqk", q.flatten(1, 2), keys) * 5**-0.5
        logits = logits.masked_fill(~mask, -torch.inf)
        expected = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), values)
        torch.testing.assert_close(out.flatten(1, 2), expected)
        torch.testing.assert_close(lse.flatten(1, 2), logits.logsumexp(-1).transpose(1, 2))


def test_source_heads_see_only_their_source():
    q = torch.randn(1, 7, 4, 5, dtype=torch.float64)
    k, v = (torch.randn(1, 7, 2, 5, dtype=torch.float64) for _ in range(2))
    k2, v2 = (torch.randn(1, 9, 1, 5, dtype=torch.float64) for _ in range(2))
    out, lse = attend(q, [Source(k, v, heads=(3, 0)), Source(k2, v2, heads=(1, 0))], return_lse=True)
    torch.testing.assert_close(out[:, :, 3:], attend(q[:, :, 3:], k[:, :, :1], v[:, :, :1]))
    torch.testing.assert_close(out[:, :, 1:2], attend(q[:, :, 1:2], k2, v2))
    both = [torch.cat([a[:, :, 1:], b], 1) for a, b in ((k, k2), (v, v2))]
    torch.testing.assert_close(out[:, :, :1], attend(q[:, :, :1], *both))
    assert out[:, :, 2].eq(0).all()
    assert lse[:, :, 2].eq(-torch.inf).all()


def test_source_with_its_own_queries():
    q, own, k, v = (torch.randn(1, 7, 2, 5, dtype=torch.float64) for _ in range(4))
    k2, v2 = (torch.randn(1, 9, 2, 5, dtype=torch.float64) for _ in range(2))
    out = attend(q, [Source(k, v), Source(k2, v2, q=own)])
    logits = torch.cat([torch.einsum("bqhd,bkhd->bhqk", a, b) for a, b in ((q, k), (own, k2))], -1) * 5**-0.5
    torch.testing.assert_close(out, torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), torch.cat([v, v2], 1)))
