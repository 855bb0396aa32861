"""FNA (43): gathered windows, masked softmax and tiles agree, and tiles need little memory however large the kernel."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard import Source, attend, merge, plan
from regard.compare.measure import peak_memory
from regard.ops import patterns as P


def keys_of(position, length, kernel, dilation, causal):
    """The keys of one query on one axis; its window is counted inside its dilation group."""
    group = range(position % dilation, length, dilation)
    inner = position // dilation
    if causal:
        return list(group[max(inner - kernel + 1, 0) : inner + 1])
    start = min(max(inner - kernel // 2, 0), len(group) - kernel)
    return list(group[start : start + kernel])


def gathered_attention(q, k, v, kernel, dilation, causal):
    """One query at a time: gather its keys, softmax over them. Also the log-sum-exp."""
    grid = tuple(q.shape[1:-2])
    k, v = (x.repeat_interleave(q.shape[-2] // k.shape[-2], -2) for x in (k, v))
    outs, lses = [], []
    for place in itertools.product(*map(range, grid)):
        axes = [keys_of(*axis) for axis in zip(place, grid, kernel, dilation, causal, strict=True)]
        index = [list(axis) for axis in zip(*itertools.product(*axes), strict=True)]
        logits = torch.einsum("bhd,bnhd->bhn", q[(slice(None), *place)], k[(slice(None), *index)]) / q.shape[-1] ** 0.5
        outs.append(torch.einsum("bhn,bnhd->bhd", logits.softmax(-1), v[(slice(None), *index)]))
        lses.append(logits.logsumexp(-1))
    return torch.stack(outs, 1).unflatten(1, grid), torch.stack(lses, 1).unflatten(1, grid)


@st.composite
def settings_of(draw):
    """Grid, kernel, dilation and causality per axis; dilations need not divide, every group holds its kernel."""
    rank = draw(st.integers(1, 3))
    longest = {1: 30, 2: 11, 3: 6}[rank]
    rows = []
    for _ in range(rank):
        dilation = draw(st.integers(1, 3))
        kernel = draw(st.integers(1, min(6, longest // dilation)))
        rows.append((draw(st.integers(kernel * dilation, longest)), kernel, dilation, draw(st.booleans())))
    return tuple(zip(*rows, strict=True))


def tensors(grid, heads=4, kv_heads=2, dim=4, value_dim=3, dtype=torch.float64):
    return [
        torch.randn(2, *grid, n, d, dtype=dtype, requires_grad=True)
        for n, d in ((heads, dim), (kv_heads, dim), (kv_heads, value_dim))
    ]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
@given(settings_of())
def test_gathered_windows_equal_every_backend_forward_and_backward(dtype, tolerance, drawn):
    grid, kernel, dilation, causal = drawn
    q, k, v = tensors(grid, dtype=dtype)

    def gradients(out, lse):
        return torch.autograd.grad(out.square().mean() + lse.mean(), (q, k, v))

    expected, expected_lse = gathered_attention(q, k, v, kernel, dilation, causal)
    right = gradients(expected, expected_lse)
    for backend in ("reference", "dense", "tiled"):
        pattern = P.Neighborhood(kernel, dilation, causal=causal)
        out, lse = attend(q, k, v, pattern, return_lse=True, backend=backend)
        for found, wanted in zip((out, lse, *gradients(out, lse)), (expected, expected_lse, *right), strict=True):
            torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def test_additional_keys_join_the_softmax_through_the_log_sum_exp():
    """Context tokens are seen by every query, also on causal axes: one softmax over neighbours and context."""
    q, k, v = tensors((7, 9))
    context_k, context_v = (torch.randn(2, 5, 2, n, dtype=torch.float64, requires_grad=True) for n in (4, 3))
    pattern = P.Neighborhood(3, dilation=2, causal=(True, False))
    every = (q, k, v, context_k, context_v)
    seen = torch.cat((pattern.mask((7, 9)), torch.ones(63, 5, dtype=torch.bool)), 1)
    keys, values = (torch.cat((x.flatten(1, 2), y), 1).repeat_interleave(2, 2) for x, y in ((k, context_k), (v, context_v)))
    logits = torch.einsum("bqhd,bkhd->bhqk", q.flatten(1, 2), keys) / 2
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    expected = torch.einsum("bhqk,bkhd->bqhd", weights, values).unflatten(1, (7, 9))
    right = torch.autograd.grad(expected.square().sum(), every)
    for backend in ("reference", "dense", "tiled"):
        near = attend(q, k, v, pattern, return_lse=True, backend=backend)
        far = attend(q, context_k, context_v, return_lse=True, backend=backend)
        merged, _ = merge(*zip(near, far, strict=True))
        joint = attend(q, [Source(k, v, pattern), Source(context_k, context_v)], backend=backend)
        for out in (merged, joint):
            torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
            for found, wanted in zip(torch.autograd.grad(out.square().sum(), every), right, strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@given(settings_of())
def test_queries_see_as_many_keys_as_the_kernel_and_the_past_allow(drawn):
    grid, kernel, dilation, causal = drawn
    degree = P.Neighborhood(kernel, dilation, causal=causal).degree(grid)
    for place in itertools.product(*map(range, grid)):
        counts = (min(p // d + 1, n) if c else n for p, n, d, c in zip(place, kernel, dilation, causal, strict=True))
        assert degree[place] == math.prod(counts)


def test_causal_as_one_value_means_every_axis():
    assert P.Neighborhood(3, causal=True).mask((5, 6)).equal(P.Neighborhood(3, causal=(True, True)).mask((5, 6)))
    assert P.Neighborhood(8, causal=True).mask((8,)).equal(P.Causal().mask((8,)))
    assert P.Neighborhood((5, 6)).mask((5, 6)).all()


def test_shared_key_heads_equal_repeated_ones():
    q, k, v = tensors((9, 8), heads=6, kv_heads=2)
    repeated = (x.repeat_interleave(3, -2) for x in (k, v))
    out = attend(q, k, v, P.Neighborhood(3), backend="tiled")
    expected = attend(q, *repeated, P.Neighborhood(3), backend="tiled")
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_memory_does_not_grow_with_the_kernel():
    """Logits of all 25 x 25 neighbours would take 69 times those of 3 x 3; tiles are attended a few at a time."""
    q, k, v = (torch.randn(1, 96, 96, 2, 16) for _ in range(3))

    def peak(kernel):
        def work():
            with torch.no_grad():
                attend(q, k, v, P.Neighborhood(kernel), backend="tiled")

        work()  # the plan is cached
        return peak_memory(work, q.device)

    small, large = peak(3), peak(25)
    assert large < 1.2 * small
    assert large < 0.3 * 96 * 96 * 25 * 25 * 2 * 4  # bytes of the packed attention matrix


def test_cost_is_linear_in_tokens_at_a_fixed_kernel():
    costs = [plan("neighborhood(7, dilation=2)", (28 * n, 28), backend="tiled").computed_pairs for n in (2, 4, 8)]
    assert costs[1] == 2 * costs[0]
    assert costs[2] == 4 * costs[0]
