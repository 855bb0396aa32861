"""What patterns have to do with each other and with the formulas of their papers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regard import Source, attend, merge
from regard.ops import patterns as P
from regard.ops.calls.source import HeadTable

from . import naive
from .cases import sizes, static

BACKENDS = ("reference", "tiled")


def qkv(*grid: int, batch: int = 2, heads: int = 2, dim: int = 4) -> list[Tensor]:
    return [torch.randn(batch, *grid, heads, dim, dtype=torch.float64) for _ in range(3)]


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """``(..., tokens, heads, dim)`` attention in one formula; ``mask`` broadcasts to ``(..., heads, queries, keys)``."""
    logits = torch.einsum("...qhd,...khd->...hqk", q, k) * q.shape[-1] ** -0.5
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    return torch.einsum("...hqk,...khd->...qhd", logits.softmax(-1), v)


def close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-11)


# generalised neighborhood attention: the identities of arXiv:2504.16922


def test_neighborhood_with_stride_of_kernel_is_window_attention():
    for kernel, windows in itertools.product(range(1, 7), range(1, 5)):
        grid = (kernel * windows,)
        assert P.Neighborhood(kernel, stride=kernel).mask(grid).equal(P.Window(kernel).mask(grid))


def test_neighborhood_with_stride_of_block_is_halo_attention_in_the_interior():
    for block, halo, blocks in itertools.product(range(1, 5), range(3), range(3, 6)):
        grid = (block * blocks,)
        strided = P.Neighborhood(block + 2 * halo, stride=block).mask(grid)
        assert strided.equal(P.Halo(block, halo, border="shift").mask(grid))
        first, last = math.ceil(halo / block) * block, (block * blocks - halo) // block * block
        interior = slice(first, last)
        assert strided[interior].equal(P.Halo(block, halo, border="zero").mask(grid)[interior])


def test_dilated_neighborhood_is_neighborhood_within_each_residue_class():
    q, k, v = qkv(13, 11)
    for backend in BACKENDS:
        out = attend(q, k, v, P.Neighborhood(3, dilation=(3, 2)), backend=backend)
        for i, j in itertools.product(range(3), range(2)):
            part = (slice(None), slice(i, None, 3), slice(j, None, 2))
            close(out[part], attend(q[part], k[part], v[part], P.Neighborhood(3), backend="reference"))


def test_neighborhood_shows_a_full_window_that_holds_the_query():
    for length, kernel, dilation, stride in itertools.product(range(1, 14), range(1, 6), range(1, 4), range(1, 4)):
        if kernel * dilation > length or stride > kernel:
            continue
        mask = P.Neighborhood(kernel, dilation, stride).mask((length,))
        assert mask.sum(-1).eq(kernel).all()
        assert mask.diagonal().all()


def test_neighborhood_of_the_whole_grid_is_dense_attention_with_a_full_bias_table():
    q, k, v = qkv(5, 4)
    table = torch.randn(2, 9, 7, dtype=torch.float64)
    pattern = P.Neighborhood((5, 4))
    y, x = torch.meshgrid(torch.arange(5), torch.arange(4), indexing="ij")
    y, x = y.flatten(), x.flatten()
    bias = table[:, (y[None] - y[:, None]) + 4, (x[None] - x[:, None]) + 3]
    logits = torch.einsum("bqhd,bkhd->bhqk", q.flatten(1, 2), k.flatten(1, 2)) / 2 + bias
    expected = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v.flatten(1, 2)).view_as(v)
    for backend in BACKENDS:
        close(attend(q, k, v, pattern, bias=HeadTable(table, pattern), backend=backend), expected)


def test_odd_neighborhood_is_unfold_with_replicated_borders():
    q, k, v = qkv(9, 8)
    kernel = 5

    def windows(x: Tensor) -> Tensor:  # unfold where the window fits, then repeat the outermost windows
        unfolded = x.unfold(1, kernel, 1).unfold(2, kernel, 1).flatten(-2)  # (batch, rows, columns, heads, dim, window)
        index = [(torch.arange(n) - kernel // 2).clamp(0, n - kernel) for n in (9, 8)]
        return unfolded[:, index[0]][:, :, index[1]]

    logits = torch.einsum("byxhd,byxhdn->byxhn", q, windows(k)) / 2
    expected = torch.einsum("byxhn,byxhdn->byxhd", logits.softmax(-1), windows(v))
    for backend in BACKENDS:
        close(attend(q, k, v, P.Neighborhood(kernel), backend=backend), expected)


def test_neighborhood_is_translation_equivariant_in_the_interior_only():
    q, k, v = qkv(16)
    for backend in BACKENDS:
        out = attend(q, k, v, P.Neighborhood(5), backend=backend)
        moved = attend(*(t.roll(3, 1) for t in (q, k, v)), P.Neighborhood(5), backend=backend)
        close(moved[:, 5:14], out[:, 2:11])
        assert not torch.allclose(moved[:, 3], out[:, 0])


# windows, grids and halos of their papers


@pytest.mark.parametrize(("size", "shift"), [(4, 2), (4, 0), (3, 1), (6, 3)])
def test_shifted_window_is_roll_with_region_mask(size, shift):
    height, width = 2 * size, 3 * size
    q, k, v = qkv(height, width)
    region = torch.zeros(height, width, dtype=torch.long)
    parts = (slice(0, -size), slice(-size, -shift or None), slice(-shift, None)) if shift else (slice(None),)
    for number, (rows, columns) in enumerate(itertools.product(parts, parts)):
        region[rows, columns] = number

    def windows(x: Tensor) -> Tensor:  # (batch, windows, tokens, ...)
        x = x.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3)
        return x.flatten(3, 4).flatten(1, 2)

    q_, k_, v_ = (windows(t.roll((-shift, -shift), (1, 2))) for t in (q, k, v))
    label = windows(region[None])
    out = dense(q_, k_, v_, (label[..., :, None] == label[..., None, :])[:, :, None])
    out = out.unflatten(2, (size, size)).unflatten(1, (2, 3)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    expected = out.roll((shift, shift), (1, 2))
    for backend in BACKENDS:
        close(attend(q, k, v, P.Window(size, shift), backend=backend), expected)


def test_grid_is_the_partition_of_maxvit():
    size, spacing = 3, (4, 2)
    q, k, v = qkv(size * spacing[0], size * spacing[1])

    def groups(x: Tensor) -> Tensor:  # the inner factor counts groups, the outer one their tokens
        x = x.unflatten(2, (size, spacing[1])).unflatten(1, (size, spacing[0]))
        return x.permute(0, 2, 4, 1, 3, 5, 6).flatten(3, 4)

    out = dense(*map(groups, (q, k, v))).unflatten(3, (size, size)).permute(0, 3, 1, 4, 2, 5, 6)
    expected = out.flatten(3, 4).flatten(1, 2)
    for backend in BACKENDS:
        close(attend(q, k, v, P.Grid(size), backend=backend), expected)


def test_halo_is_attention_per_block_on_the_zero_padded_map():
    block, halo = 3, 2
    q, k, v = qkv(9, 6)
    padded = [F.pad(t, (0, 0, 0, 0, halo, halo, halo, halo)) for t in (k, v)]
    expected = torch.empty_like(v)
    for y, x in itertools.product(range(0, 9, block), range(0, 6, block)):
        window = (slice(None), slice(y, y + block + 2 * halo), slice(x, x + block + 2 * halo))
        own = (slice(None), slice(y, y + block), slice(x, x + block))
        out = dense(q[own].flatten(1, 2), *(t[window].flatten(1, 2) for t in padded))
        expected[own] = out.unflatten(1, (block, block))
    for backend in BACKENDS:
        close(attend(q, k, v, P.Halo(block, halo), backend=backend), expected)
    assert P.Halo(block, 0).mask((9, 6)).equal(P.Window(block).mask((9, 6)))


@pytest.mark.parametrize("border", ["zero", "mask", "shift"])
@pytest.mark.parametrize("grid", [(12, 8), (7, 9), (3, 2)])
def test_strided_halo_gives_the_rows_of_the_queries_that_are_left(border, grid):
    q, k, v = qkv(*grid)
    strided, whole = P.Halo(4, 3, border, stride=2), P.Halo(4, 3, border)
    table = torch.randn(2, 13, 13, dtype=torch.float64)
    few = q[:, ::2, ::2].contiguous()
    assert strided.mask(few.shape[1:3], grid).equal(whole.mask(grid).unflatten(0, grid)[::2, ::2].flatten(0, 1))
    assert strided.degree(few.shape[1:3], grid).equal(whole.degree(grid)[::2, ::2])
    assert P.parse(strided.spec) == strided
    for backend in (*BACKENDS, "dense"):
        close(attend(few, k, v, strided, backend=backend), attend(q, k, v, whole, backend=backend)[:, ::2, ::2])
        if border != "shift":  # there offsets reach further
            biased = attend(few, k, v, strided, bias=HeadTable(table, strided), backend=backend)
            close(biased, attend(few, k, v, strided, bias=HeadTable(table, strided), backend="reference"))


def test_criss_cross_counts_the_centre_once():
    q, k, v = qkv(5, 7)
    expected = torch.empty_like(v)
    for y, x in itertools.product(range(5), range(7)):
        others = [i for i in range(5) if i != y]
        row, column = (torch.cat([t[:, y], t[:, others, x]], 1) for t in (k, v))
        expected[:, y, x] = dense(q[:, y, x][:, None], row, column)[:, 0]
    for backend in BACKENDS:
        close(attend(q, k, v, P.Axis(0) | P.Axis(1), backend=backend), expected)


def test_per_head_equals_each_pattern_on_its_heads():
    q, k, v = qkv(6, 7, heads=4)
    pattern = P.PerHead({P.Window(3, shift=1): 1, P.Dense(): 2, P.Neighborhood(3): 1})
    out = attend(q, k, v, pattern)
    for heads, member in ((slice(0, 1), P.Window(3, shift=1)), (slice(1, 3), P.Dense()), (slice(3, 4), P.Neighborhood(3))):
        close(out[..., heads, :], attend(*(t[..., heads, :] for t in (q, k, v)), member, backend="reference"))


# equivariance


def test_dense_attention_is_permutation_equivariant():
    q, k, v = qkv(11)
    order = torch.randperm(11)
    out = attend(q, k, v)
    close(attend(q[:, order], k, v), out[:, order])
    close(attend(q, k[:, order], v[:, order]), out)


def test_clusters_do_not_depend_on_names_or_order():
    q, k, v = qkv(12)
    labels = torch.randint(0, 4, (2, 12))
    out = attend(q, k, v, P.Clusters(labels))
    close(attend(q, k, v, P.Clusters(torch.tensor([7, -2, 0, 5])[labels])), out)
    order = torch.randperm(12)
    close(attend(q[:, order], k[:, order], v[:, order], P.Clusters(labels[:, order])), out[:, order])
    close(attend(q, k[:, order], v[:, order], P.Clusters(labels, labels[:, order])), out)


def test_clusters_of_more_queries_than_keys():
    q, k, v = qkv(12)
    labels, keys = torch.randint(0, 3, (2, 12)), torch.randint(0, 3, (2, 5))
    pattern = P.Clusters(labels, keys)
    expected, lse = naive.attend(q, k[:, :5], v[:, :5], pattern)
    found = attend(q, k[:, :5], v[:, :5], pattern, return_lse=True)
    close(found[0], expected)
    close(found[1], lse)


def test_order_and_repetition_of_listed_blocks_are_irrelevant():
    q, k, v = qkv(10, 9)  # 5 x 3 blocks
    table = torch.stack([torch.randperm(15)[:5] for _ in range(30)]).view(2, 15, 5)
    again = torch.cat([table.flip(-1), table[..., :2], torch.full((2, 15, 1), -1)], -1)
    for backend in BACKENDS:
        out = attend(q, k, v, P.Blocks(table, (2, 3)), backend=backend)
        close(attend(q, k, v, P.Blocks(again, (2, 3)), backend=backend), out)


def test_listed_tokens_are_the_rows_of_a_mask_on_grids_of_different_rank():
    q, *_ = qkv(3, 5)
    k, v = (torch.randn(2, 20, *q.shape[-2:], dtype=q.dtype) for _ in range(2))
    table = torch.stack([torch.randperm(20)[:4] for _ in range(2 * q.shape[-2] * 15)]).view(2, q.shape[-2], 15, 4)
    mask = torch.zeros(2, q.shape[-2], 15, 20, dtype=torch.bool).scatter(-1, table, True)
    assert torch.equal(P.Tokens(table).mask((15,), (20,)), mask)
    bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    for backend in BACKENDS:
        close(attend(q, k, v, P.Tokens(table), backend=backend), attend(q, k, v, bias=bias))


def test_blocks_that_list_everything_are_dense():
    q, k, v = qkv(7, 5)
    for backend in BACKENDS:
        close(attend(q, k, v, P.Blocks(torch.arange(6).expand(1, 6, 6), 3), backend=backend), attend(q, k, v))


def test_blocks_that_list_themselves_are_windows():
    q, k, v = qkv(7, 5)
    for backend in BACKENDS:
        out = attend(q, k, v, P.Blocks(torch.arange(6).view(1, 6, 1), 3), backend=backend)
        close(out, attend(q, k, v, P.Window(3)))


# merge


@given(st.integers(1, 3).flatmap(lambda rank: st.tuples(sizes(rank), static(rank), static(rank))))
@settings(max_examples=60)
def test_union_equals_merge_of_disjoint_parts(drawn):
    grid, first, second = drawn
    if any(p.zero_keys(a, n, len(grid)) != (0, 0) for p in (first, second) for a, n in enumerate(grid)):
        return
    q, k, v = (torch.randn(1, *grid, 1, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = first.mask(grid)
    rest = second.mask(grid) & ~mask
    parts = [attend(q, k, v, first, return_lse=True), _with_mask(q, k, v, rest)]
    out, lse = merge([o for o, _ in parts], [s for _, s in parts])
    expected, expected_lse = attend(q, k, v, first | second, return_lse=True)
    close(out, expected)
    close(lse, expected_lse)
    finite = lse.isfinite()
    grads = torch.autograd.grad(out.sin().sum() + lse[finite].sum(), (q, k, v))
    for left, right in zip(
        grads, torch.autograd.grad(expected.sin().sum() + expected_lse[finite].sum(), (q, k, v)), strict=True
    ):
        close(left, right)


def _with_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Attention under an explicit mask; rows that see nothing give 0 and -inf, with zero gradients."""
    logits = torch.einsum("bqhd,bkhd->bqhk", q.flatten(1, -3), k.flatten(1, -3)) * q.shape[-1] ** -0.5
    mask = mask[None, :, None]
    blind = ~mask.any(-1, keepdim=True)
    lse = torch.logsumexp(logits.masked_fill(~(mask | blind), -torch.inf), -1)
    weights = torch.exp(logits - lse[..., None]) * mask
    out = torch.einsum("bqhk,bkhd->bqhd", weights, v.flatten(1, -3)).view(*q.shape[:-1], -1)
    return out, lse.masked_fill(blind.squeeze(-1), -torch.inf).view(q.shape[:-1])


def test_merge_ignores_empty_parts_and_their_values():
    out, lse = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    empty = torch.full((3,), -torch.inf, dtype=torch.float64)
    merged, total = merge([torch.zeros(3, 4, dtype=torch.float64), out], [empty, lse])
    close(merged, out)
    close(total, lse)
    nothing, none = merge([torch.zeros(3, 4)] * 2, [empty] * 2)
    assert nothing.eq(0).all()
    assert none.eq(-torch.inf).all()


def test_merge_is_associative_and_symmetric():
    outs = [torch.randn(5, 3, dtype=torch.float64) for _ in range(3)]
    lses = [torch.randn(5, dtype=torch.float64) * 30 for _ in range(3)]
    together = merge(outs, lses)
    left = merge(outs[:2], lses[:2])
    chained = merge([left[0], outs[2]], [left[1], lses[2]])
    turned = merge(outs[::-1], lses[::-1])
    for a, b, c in zip(together, chained, turned, strict=True):
        close(a, b)
        close(a, c)


def test_merge_passes_gradients_to_the_log_sum_exps():
    outs = [torch.randn(4, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *x: merge(x[:3], x[3:]), (*outs, *lses))


def test_merge_stays_finite_where_one_part_is_empty():
    lses = [torch.tensor([-torch.inf, 1.0], requires_grad=True), torch.tensor([0.5, -torch.inf], requires_grad=True)]
    outs = [torch.randn(2, 3, requires_grad=True) for _ in range(2)]
    out, lse = merge(outs, lses)
    grads = torch.autograd.grad(out.sum() + lse.sum(), (*outs, *lses))
    assert all(g.isfinite().all() for g in grads)


def test_sink_is_one_more_key_of_value_zero():
    q, k, v = (t.requires_grad_() for t in qkv(9))
    sink = torch.tensor([0.3, -1.2], dtype=torch.float64, requires_grad=True)
    for backend in BACKENDS:
        out, lse = attend(q, k, v, "neighborhood(3)", sink=sink, return_lse=True, backend=backend)
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / 2
        logits = logits.masked_fill(~P.Neighborhood(3).mask((9,)), -torch.inf)
        logits = torch.cat([logits, sink.view(1, 2, 1, 1).expand(2, 2, 9, 1)], -1)
        expected = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1)[..., :-1], v)
        close(out, expected)
        close(lse, logits.logsumexp(-1).transpose(1, 2))
        inputs = (q, k, v, sink)
        found = torch.autograd.grad(out.sin().sum() + lse.cos().sum(), inputs)
        for left, right in zip(
            found, torch.autograd.grad(expected.sin().sum() + logits.logsumexp(-1).cos().sum(), inputs), strict=True
        ):
            close(left, right)


def test_union_and_intersection_are_set_operations():
    grid = (5, 6)
    a, b, c = P.Neighborhood(3), P.Axis(0), P.Window(2, shift=1)
    assert (a | b | c).mask(grid).equal(a.mask(grid) | b.mask(grid) | c.mask(grid))
    assert (a & b & c).mask(grid).equal(a.mask(grid) & b.mask(grid) & c.mask(grid))
    assert (a & (b | c)).mask(grid).equal((a & b | a & c).mask(grid))
    assert (a | b) == P.Union((a, b))
    assert len({a | b, P.Union((a, b))}) == 1


@pytest.mark.parametrize("third", ["dense", "neighborhood(3)"])
def test_dense_sources_are_one_source_of_all_their_valid_keys(third):
    q, k, v = (torch.randn(2, 5, 7, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    extra_k, extra_v = (torch.randn(2, 6, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    valid = torch.tensor([[True, False, True, True, False, True], [False, True, False, False, True, True]])
    found = attend(q, [Source(k, v), Source(extra_k, extra_v, valid=valid), Source(k, v, third)], return_lse=True)
    mask = P.parse(third).mask((5, 7))
    logits = [torch.einsum("bqhd,bkhd->bhqk", q.flatten(1, 2), t) / 8**0.5 for t in (k.flatten(1, 2), extra_k)]
    logits[1] = logits[1].masked_fill(~valid[:, None, None], -torch.inf)
    logits = torch.cat([*logits, logits[0].masked_fill(~mask, -torch.inf)], -1)
    values = torch.cat([v.flatten(1, 2), extra_v, v.flatten(1, 2)], 1)
    expected = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), values).unflatten(1, (5, 7))
    torch.testing.assert_close(found[0], expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found[1], logits.logsumexp(-1).movedim(1, 2).unflatten(1, (5, 7)), rtol=1e-11, atol=1e-11)
    leaves = (q, k, v, extra_k, extra_v)
    for a, b in zip(
        torch.autograd.grad(found[0].square().sum(), leaves), torch.autograd.grad(expected.square().sum(), leaves), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
