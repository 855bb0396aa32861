"""Values that are not finite, logits at the ends of the range, scales of any sign."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from regard import Source, attend, merge
from regard import patterns as P
from regard.ops.attention.weights import attend_weights
from regard.ops.calls.source import HeadTable
from regard.ops.compiled import missing
from regard.ops.local.neighbors import neighbor_scores, neighbor_sum

from . import naive

NAN, INF = math.nan, math.inf
GRID = (4, 3)
BLOCKS = P.Blocks(torch.tensor([[[0, 1], [1, -1], [2, 3], [3, 0]]]), (2, 2))
PATTERNS = [
    P.Dense(), P.Causal(), P.Window(2), P.Neighborhood(3), P.Neighborhood(3, border="zero"), P.Halo(2, 1),
    P.Axis(0) | P.Axis(1), P.Window(2) & P.Neighborhood(3), P.Axis(0, causal=True), BLOCKS, BLOCKS | P.Window(2),
    P.Clusters(torch.tensor([[0, 1, 1, 2, 0, 1, 2, 2, 0, 1, 0, 2]])), P.PerHead({P.Window(2): 1, P.Neighborhood(3): 1}),
]  # fmt: skip
BACKENDS = "reference", "dense"


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def qkv() -> list[Tensor]:
    return [randn(1, *GRID, 2, 3, seed=i) for i in range(3)]


def check(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_only_queries_that_see_a_value_are_reached_by_it(pattern, backend):
    """The oracle goes query by query and touches visible keys alone, in the backward too.

    NaN in it marks all that may be reached; what infinities make of that is theirs (a logit of -inf hides a key).
    """
    valid = torch.tensor([[[True, True, False], [True, True, True], [False, True, True], [True, True, True]]])
    for place, exists in itertools.product(range(3), (None, valid)):  # in a query, a key, a value
        clean = qkv()
        if exists is not None:
            clean[1][~exists] = clean[2][~exists] = NAN
        leaves = [t.clone() for t in clean]
        leaves[place][0, 1, 1, 1] = NAN
        leaves = [t.requires_grad_() for t in leaves]
        out, lse = naive.attend(*leaves, pattern, valid=exists)
        reached = out.isnan().any(-1)
        expected = [out, lse, *torch.autograd.grad(out[~reached].square().sum(), leaves)]
        assert reached.any()
        for value in (NAN, INF, -INF):
            leaves = [t.clone() for t in clean]
            leaves[place][0, 1, 1, 1] = value
            leaves = [t.requires_grad_() for t in leaves]
            out, lse = attend(*leaves, pattern, valid=exists, backend=backend, return_lse=True)
            if math.isnan(value):
                assert torch.equal(out.isnan(), expected[0].isnan())
            for got, alone in ((out, False), (attend(*leaves, pattern, valid=exists, backend=backend), True)):
                found = [got, expected[1] if alone else lse, *torch.autograd.grad(got[~reached].square().sum(), leaves)]
                for a, b in zip(found, expected, strict=True):
                    torch.testing.assert_close(a[~b.isnan()], b[~b.isnan()])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [NAN, INF])
def test_entries_of_a_bias_at_hidden_pairs_do_not_matter(value, backend):
    pattern, tensors = P.Window(2), qkv()
    hidden = ~naive.mask(pattern, GRID, GRID)
    results = []
    for fill in (0.0, value):
        leaves = [t.clone().requires_grad_() for t in (*tensors, randn(1, 2, 12, 12, seed=4))]
        bias = leaves[3] + torch.zeros(1, 1, 12, 12).masked_fill(hidden, fill)
        out = attend(*leaves[:3], pattern, bias=bias, backend=backend)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    check(*results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_visible_nan_in_a_bias_reaches_its_query_alone(backend):
    leaves = [t.requires_grad_() for t in (*qkv(), randn(1, 2, 12, 12, seed=4))]
    clean = attend(*leaves[:3], bias=leaves[3], backend="reference")
    spoilt = leaves[3].detach().clone()
    spoilt[0, 1, 5, 7] = NAN
    out = attend(*leaves[:3], bias=spoilt, backend=backend)
    reached = torch.zeros(1, 12, 2, 1, dtype=torch.bool)
    reached[0, 5, 1] = True
    reached = reached.view(1, *GRID, 2, 1).expand_as(out)
    assert out[reached].isnan().all()
    torch.testing.assert_close(out[~reached], clean[~reached])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_of_minus_infinity_hides_as_a_pattern_does(backend):
    q, k, v = qkv()
    seen = naive.mask(P.Window(2), GRID, GRID)
    bias = torch.zeros(1, 1, 12, 12, dtype=torch.float64).masked_fill(~seen, -INF)
    k[0, 0, 0], v[0, 0, 0] = NAN, NAN
    expected = naive.attend(q, k, v, P.Window(2))[0]
    torch.testing.assert_close(attend(q, k, v, bias=bias, backend=backend), expected, equal_nan=True)


def test_a_row_that_sees_nothing_has_no_gradient():
    for backend in BACKENDS:
        leaves = [t.requires_grad_() for t in qkv()]
        out, lse = attend(*leaves, valid=torch.zeros(1, *GRID, dtype=torch.bool), backend=backend, return_lse=True)
        assert out.count_nonzero() == 0
        assert (lse == -INF).all()
        for grad in torch.autograd.grad(out.sum() + lse.exp().sum(), leaves):
            assert grad.count_nonzero() == 0


def test_sources_under_one_softmax_keep_hidden_values_to_themselves():
    q, k, v = qkv()
    exists = torch.ones(1, *GRID, dtype=torch.bool)
    exists[0, 2] = False
    spoilt = [t.masked_fill(~exists[..., None, None], NAN) for t in (k, v)]
    expected = attend(q, [Source(k, v, "window(2)", valid=exists), Source(k, v, valid=exists)], backend="reference")
    found = attend(q, [Source(*spoilt, "window(2)", valid=exists), Source(*spoilt, valid=exists)], backend="dense")
    torch.testing.assert_close(found, expected)


def test_weights_of_hidden_keys_are_0_whatever_the_keys_are():
    q, k, v = qkv()
    q.requires_grad_()
    spoilt = k.clone()
    spoilt[0, 0, 0] = NAN
    seen = naive.mask(P.Window(2), GRID, GRID)[0, 0]
    (weights,) = attend_weights(q, [Source(spoilt, v, "window(2)")])
    (clean,) = attend_weights(q, [Source(k, v, "window(2)")])
    weights, clean = weights.flatten(3), clean.flatten(3)
    rows = ~seen[:, 0]
    assert weights[:, :, ~rows][..., seen[:, 0]].isnan().any()
    torch.testing.assert_close(weights[:, :, rows], clean[:, :, rows])
    (grad,) = torch.autograd.grad(weights[:, :, rows].square().sum(), q)
    assert grad.isfinite().flatten(1, 2)[0, rows].all()


def test_keys_that_do_not_exist_are_safe_in_compiled_graphs():
    torch._dynamo.reset()
    q, k, v = (t.float() for t in qkv())
    exists = torch.ones(1, *GRID, dtype=torch.bool)
    exists[0, 2] = False
    compiled = torch.compile(lambda q, k, v: attend(q, k, v, valid=exists, backend="dense"), backend="eager", fullgraph=True)
    spoilt = [t.masked_fill(~exists[..., None, None], NAN) for t in (k, v)]
    torch.testing.assert_close(compiled(q, *spoilt), attend(q, k, v, valid=exists, backend="reference"))
    vmapped = torch.func.vmap(lambda q: attend(q, *spoilt, valid=exists, backend="dense"))(q[None])
    torch.testing.assert_close(vmapped[0], attend(q, k, v, valid=exists, backend="reference"))


@pytest.mark.parametrize("pattern", ["neighborhood(3)", "window(2)", "neighborhood(3, border='mask')"])
def test_sums_over_neighbours_spread_no_value_that_is_not_finite(pattern):
    q, k, v = qkv()
    weights = neighbor_scores(q, k, pattern).exp().requires_grad_()
    spoilt = v.clone()
    spoilt[0, 1, 1, 1] = NAN
    clean, found = neighbor_sum(weights, v, pattern), neighbor_sum(weights, spoilt, pattern)
    seen = naive.mask(P.parse(pattern), GRID, GRID)[0, 0, :, 4].view(1, *GRID)
    reached = torch.zeros_like(found, dtype=torch.bool)
    reached[..., 1, :] = seen[..., None]
    assert torch.equal(found.isnan(), reached)
    torch.testing.assert_close(found[~reached], clean[~reached])
    grads = [torch.autograd.grad(y.square().sum(), weights)[0] for y in (clean, found)]
    rows = reached.any(-1)
    torch.testing.assert_close(grads[1][~rows], grads[0][~rows])


@pytest.mark.parametrize("scale", [0.0, -0.7, 1e4])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_any_scale_is_right_in_every_backend(pattern, scale):
    leaves = [t.requires_grad_() for t in qkv()]
    out, lse = naive.attend(*leaves, pattern, scale=scale)
    expected = [out, lse, *torch.autograd.grad(out.square().sum() + lse[lse.isfinite()].sum(), leaves)]
    for backend in ("reference", "dense", "tiled", "auto"):
        try:
            out, lse = attend(*leaves, pattern, scale=scale, backend=backend, return_lse=True)
        except ValueError:
            assert backend == "tiled"  # which does not take every pattern
            continue
        check([out, lse, *torch.autograd.grad(out.square().sum() + lse[lse.isfinite()].sum(), leaves)], expected)
        torch.testing.assert_close(attend(*leaves, pattern, scale=scale, backend=backend), expected[0])
    if missing() is None and scale <= 0:
        single = [t.detach().float() for t in leaves]
        torch.testing.assert_close(attend(*single, pattern, scale=scale), expected[0].float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["auto", "reference", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_that_is_almost_nothing_is_the_mean_of_what_is_seen(dtype, backend):
    x = randn(1, 12, 2, 8).to(dtype)
    expected = torch.stack([x[:, : n + 1].double().mean(1) for n in range(12)], 1)
    for scale in (1e-40, 1e-320):
        torch.testing.assert_close(
            attend(x, x, x, "causal", scale=scale, backend=backend), expected.to(dtype), atol=8e-3, rtol=8e-3
        )
    with pytest.raises(ValueError, match="scale must be a finite number of at least"):
        attend(x, x, x, scale=1e39, backend=backend)
    with pytest.raises(ValueError, match="sink must be a finite number of at least"):
        attend(x, x, x, sink=1e39, backend=backend)


@pytest.mark.parametrize("backend", ["auto", "reference", "dense"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("lowest", [-1e9, torch.finfo(torch.float32).min, -1e300])
def test_a_finite_bias_beyond_the_dtype_hides_no_whole_row(dtype, backend, lowest):
    """Masks are often written as a large number: where it stands at all keys of a query, none is hidden."""
    x = randn(1, 6, 2, 8).mul(0.1).to(dtype)
    bias = torch.zeros(1, 1, 6, 6, dtype=torch.float64 if lowest == -1e300 else torch.float32)
    bias[:, :, 2], bias[:, :, 3, 1:], bias[:, :, 4, 2] = lowest, lowest, -lowest
    bias.requires_grad_()
    out = attend(x, x, x, bias=bias, backend=backend)
    torch.testing.assert_close(out[:, 2].double(), x.double().mean(1), atol=1e-2, rtol=1e-2)  # logits so small hardly differ
    torch.testing.assert_close(out[:, 3], x[:, 0])
    torch.testing.assert_close(out[:, 4], x[:, 2])
    (grad,) = torch.autograd.grad(out[:, 2].float().sum(), bias)
    values = x.double().sum(-1).transpose(1, 2)
    expected = ((values - values.mean(-1, keepdim=True)) / 6).sum(1)
    torch.testing.assert_close(grad[:, 0, 2].double(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("sink", [-INF, INF, torch.tensor([-INF, INF], dtype=torch.float64)])
@pytest.mark.parametrize("sees", [True, False])
def test_a_sink_at_the_ends_of_the_range_is_none_or_takes_everything(sink, sees):
    leaves = [t.requires_grad_() for t in qkv()]
    valid = torch.full((1, *GRID), sees)
    clean, lse = attend(*leaves, valid=valid, return_lse=True)
    takes = (torch.as_tensor(sink) == INF).expand(2)
    out, total = attend(*leaves, valid=valid, sink=sink, return_lse=True)
    torch.testing.assert_close(out, clean.masked_fill(takes[:, None], 0.0))
    torch.testing.assert_close(total, lse.masked_fill(takes, INF))
    for grad in torch.autograd.grad(out.sum() + total[total.isfinite()].sum(), leaves):
        assert grad.isfinite().all()
    q, k, v = leaves
    (weights,) = attend_weights(q, [Source(k, v, valid=valid)], sink=sink)
    torch.testing.assert_close(weights.flatten(3).sum(-1), (~takes * sees).to(weights.dtype)[None, :, None].expand(1, 2, 12))


def test_merge_takes_parts_of_every_size():
    outs = [randn(4, 3), randn(4, 3, seed=1)]
    lses = [torch.tensor([-INF, INF, 1e4, -1e30]).requires_grad_(), torch.tensor([-INF, 0.0, 1e4, -INF]).requires_grad_()]
    out, lse = merge(outs, lses)
    torch.testing.assert_close(lse.detach(), torch.tensor([-INF, INF, 1e4 + math.log(2), -1e30]))
    torch.testing.assert_close(
        out.detach(), torch.stack([0 * outs[0][0], outs[0][1], (outs[0][2] + outs[1][2]) / 2, outs[0][3]])
    )
    for grad in torch.autograd.grad(out.sum(), lses):
        assert grad.isfinite().all()


@pytest.mark.parametrize("size", [1e4, 65504.0, -1e30, 1e30])
def test_weights_sum_to_one_whatever_the_logits(size):
    q, k, v = (t.float() for t in qkv())
    bias = torch.full((1, 1, 12, 12), size)
    for backend in BACKENDS:
        torch.testing.assert_close(attend(q, k, torch.ones_like(v), bias=bias, backend=backend), torch.ones_like(v))
    table = HeadTable(torch.full((2, 3, 3), size), P.Window(2))
    for backend in ("reference", "dense", "auto"):
        out, lse = attend(q, k, torch.ones_like(v), "window(2)", bias=table, backend=backend, return_lse=True)
        torch.testing.assert_close(out, torch.ones_like(v))
        assert lse.isfinite().all()
