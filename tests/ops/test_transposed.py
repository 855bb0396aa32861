"""Transposed attention, against the explicit matrix."""

import pytest
import torch
from torch import Tensor

from regard.ops import attend_weights
from regard.ops.attention.transposed import attend_transposed
from regard.ops.calls.source import Source
from regard.ops.patterns import Axis, Blocks, Causal, Clusters, Dense, Grid, Neighborhood, PerHead, Window

GRID = (5, 6)
LABELS = torch.arange(30).remainder(4)[None]
PATTERNS = [
    Dense(),
    Causal(),
    Window(3, shift=1),
    Window(4, pad="zero"),
    Grid(2),
    Axis(1),
    Axis(0, causal=True),
    Neighborhood(3, dilation=(1, 2)),
    Neighborhood(4, causal=(True, False), stride=2),
    Neighborhood(3, border="zero"),
    Axis(0) | Axis(1),
    Clusters(LABELS),
    Blocks(torch.tensor([[[0, 1], [2, -1], [-1, -1], [3, 0]]]), (3, 3)),  # the third block of queries sees nothing
    PerHead({Window(3): 1, Axis(0): 1}),
]


def matrix(q: Tensor, k: Tensor, pattern, scale: float) -> Tensor:
    """``(batch, heads, queries, keys)``, with zero keys counted in the denominator."""
    logits = torch.einsum("bqhd,bkhd->bhqk", q.flatten(1, -3), k.flatten(1, -3)) * scale
    mask = pattern.mask(q.shape[1:-2], k.shape[1:-2])
    weights = logits.exp() * mask
    total = weights.sum(-1, keepdim=True)
    if getattr(pattern, "pad", "") == "zero" or getattr(pattern, "border", "") == "zero":
        full = 16 if isinstance(pattern, Window) else 9  # keys that every query sees, with the zero keys
        total = total + full - mask.sum(-1)[:, None]
    return weights / total.masked_fill(total == 0, 1.0)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_values_go_to_the_keys_with_the_weights_of_attention(pattern):
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 2, *GRID, 2, 4, dtype=torch.float64).unbind())
    ours = attend_transposed(q, k, v, pattern, scale=0.6)
    weights = matrix(q, k, pattern, 0.6)
    theirs = torch.einsum("bhqk,bqhd->bkhd", weights, v.flatten(1, -3)).unflatten(1, GRID)
    torch.testing.assert_close(ours, theirs)
    out = torch.randn_like(ours)
    for mine, its in zip(*(torch.autograd.grad(y, (q, k, v), out) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, its)


@pytest.mark.parametrize(
    "pattern", [Dense(), Clusters(torch.tensor([[0, 1, 2, 1]]), torch.arange(15).remainder(4)[None])], ids=str
)
def test_queries_and_keys_may_lie_on_different_grids(pattern):
    q, k = torch.randn(1, 4, 2, 3, dtype=torch.float64), torch.randn(1, 3, 5, 2, 3, dtype=torch.float64)
    v = torch.randn(1, 4, 2, 5, dtype=torch.float64)
    ours = attend_transposed(q, k, v, pattern)
    assert ours.shape == (1, 3, 5, 2, 5)
    (weights,) = attend_weights(q, [Source(k, k, pattern)])
    torch.testing.assert_close(ours, torch.einsum("bhqyx,bqhd->byxhd", weights, v))


def test_it_is_the_gradient_of_attention_in_the_values():
    from regard import attend

    q, k, sent = torch.randn(3, 2, *GRID, 2, 4, dtype=torch.float64).unbind()
    v = torch.zeros_like(k, requires_grad=True)
    pattern = Neighborhood(3)
    (gradient,) = torch.autograd.grad(attend(q, k, v, pattern), v, sent)
    torch.testing.assert_close(attend_transposed(q, k, sent, pattern), gradient)


@pytest.mark.parametrize("pattern", [Dense(), Window(3, shift=1), Neighborhood(3, border="zero")], ids=str)
def test_a_known_log_sum_exp_saves_one_attention_and_changes_nothing(pattern):
    from regard import attend
    from regard.bench import count

    q, k, v = (t.requires_grad_() for t in torch.randn(3, 2, *GRID, 2, 4, dtype=torch.float64).unbind())
    _, lse = attend(q, k, v, pattern, scale=0.6, return_lse=True)
    with count() as cost:
        ours = attend_transposed(q, k, v, pattern, scale=0.6, lse=lse)
    assert cost.calls == 1
    theirs = torch.einsum("bhqk,bqhd->bkhd", matrix(q, k, pattern, 0.6), v.flatten(1, -3)).unflatten(1, GRID)
    torch.testing.assert_close(ours, theirs)
    out = torch.randn_like(ours)
    for mine, its in zip(*(torch.autograd.grad(y, (q, k, v), out, retain_graph=True) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, its)
    with pytest.raises(ValueError, match=r"lse must be one number per query and head, \(2, 5, 6, 2\); got \(2, 5, 6\)"):
        attend_transposed(q, k, v, pattern, lse=lse[..., 0])


def test_what_every_query_sends_sums_to_one_and_weights_of_senders_are_factors():
    q, k = torch.randn(2, 1, *GRID, 2, 4, dtype=torch.float64).unbind()
    factors = torch.rand(1, *GRID, 2, 1, dtype=torch.float64)
    received = attend_transposed(q, k, factors, Window(4))
    torch.testing.assert_close(received.sum((1, 2)), factors.sum((1, 2)))


def test_dropout_drops_weights_and_scales_the_others():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 30, 2, 4, dtype=torch.float64).unbind()
    each = torch.eye(30, dtype=torch.float64)[None, :, None].expand(1, 30, 2, 30)  # what a key receives of every query
    whole, dropped = (attend_transposed(q, k, each, dropout=p) for p in (0.0, 0.25))
    kept = dropped != 0
    torch.testing.assert_close(dropped, kept * whole / 0.75)
    assert 0.7 < kept.double().mean() < 0.8  # 1800 of them, five deviations away


def test_half_precision_keeps_the_log_sum_exp():
    q, k, v = torch.randn(3, 1, 64, 2, 8).unbind()
    q = 6 * q
    exact = attend_transposed(*(t.bfloat16().double() for t in (q, k, v)))
    half = attend_transposed(*(t.bfloat16() for t in (q, k, v)))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), exact, rtol=2**-8, atol=2**-8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        auto = attend_transposed(q.bfloat16(), k.bfloat16(), v.bfloat16())
    torch.testing.assert_close(auto.double(), exact, rtol=2**-5, atol=2**-5)


@pytest.mark.parametrize("pattern", [Window(3), Neighborhood(3)], ids=str)
def test_it_compiles_without_a_break(pattern):
    q, k, v = torch.randn(3, 1, *GRID, 2, 4).unbind()
    compiled = torch.compile(attend_transposed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, pattern), attend_transposed(q, k, v, pattern))


def test_misfits_are_named():
    q, k = torch.randn(1, 4, 2, 3), torch.randn(1, 9, 2, 3)
    with pytest.raises(ValueError, match=r"v must stand on the queries.*v \(1, 9, 2, 3\)"):
        attend_transposed(q, k, k)
    with pytest.raises(ValueError, match=r"Window\(2\) sends values within one grid; got queries \(4,\), keys \(9,\)"):
        attend_transposed(q, k, q, Window(2))
