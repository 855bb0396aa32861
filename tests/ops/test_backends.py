"""Every backend equals the reference: output, log-sum-exp and all gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from regard import attend, clear_caches
from regard.ops import patterns as P
from regard.ops.backends import tiled
from regard.ops.calls import fused
from regard.ops.calls.source import HeadTable
from regard.ops.tiles import chunks as tiles
from regard.ops.tiles import products as tile_attention

from .cases import FASTEST, Case, assert_equal, cases, results

EXACT = ("dense", "tiled")
CPU = (*EXACT, "native")


def claims(case: Case, backend: str) -> bool:
    """Whether the backend claims the case; it must then run it."""
    try:
        with torch.no_grad():
            case.run(case.tensors(torch.float32), backend, return_lse=False)
    except ValueError as error:
        if "cannot run this call" not in str(error):
            raise
        return False
    return True


@given(cases(), st.booleans())
@settings(max_examples=300)
def test_backends_equal_reference_in_float64(case, lse_gradient):
    expected = results(case, "reference", torch.float64, lse_gradient)
    for backend in (*EXACT, "auto"):
        if claims(case, backend):
            assert_equal(results(case, backend, torch.float64, lse_gradient), expected, 1e-11)


@given(cases(), st.booleans())
@settings(max_examples=60)
def test_tiles_do_without_the_private_operators(case, lse_gradient):
    expected = results(case, "reference", torch.float64, lse_gradient)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_attention, "_FUSED", None)  # as on other devices, or where torch drops it
        if claims(case, "tiled"):
            assert_equal(results(case, "tiled", torch.float64, lse_gradient), expected, 1e-11)


def test_what_a_static_pattern_shows_is_found_out_once_and_serves_inference_and_training(monkeypatch):
    asked = []
    visible = P.Neighborhood.visible
    monkeypatch.setattr(P.Neighborhood, "visible", lambda self, *args: asked.append(self) or visible(self, *args))
    clear_caches()
    q = torch.randn(1, 6, 7, 2, 4, dtype=torch.float64, requires_grad=True)
    with torch.inference_mode():
        first = attend(q, q, q, P.Neighborhood(5), backend="dense")
    again = attend(q, q, q, P.Neighborhood(5), backend="dense")
    again.sum().backward()
    assert len(asked) == 1
    torch.testing.assert_close(again.detach(), first.clone(), rtol=0, atol=0)  # bitwise: the same operators on the same shapes
    for pattern, grid in ((P.Neighborhood(3), (6, 7)), (P.Neighborhood(5), (7, 6)), (P.Neighborhood(5, dilation=2), (6, 7))):
        other = torch.randn(1, *grid, 2, 4, dtype=torch.float64)
        mine = attend(other, other, other, pattern, backend="dense")
        torch.testing.assert_close(mine, attend(other, other, other, pattern, backend="tiled"))
    assert len(asked) == 4
    k = torch.randn(1, 6, 7, 2, 4, dtype=torch.float64)
    for pattern in (P.Neighborhood(3), P.Neighborhood(3, border="zero")):  # queries of other rows, keys around the grid
        whole = attend(k, k, k, pattern, backend="reference")
        for start in (0, 3):
            some = attend(k[:, start : start + 3], k, k, pattern, q_start=start, backend="dense")
            torch.testing.assert_close(some, whole[:, start : start + 3])


def test_causal_tiles_do_without_the_private_operators():
    q, k, v = (torch.randn(2, 11, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def run(backend):
        out, lse = attend(q, k, v, "causal", return_lse=True, backend=backend)
        return (out, lse, *torch.autograd.grad(out.square().sum(), (q, k, v)))

    expected = run("reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_attention, "_FUSED", None)
        for a, b in zip(run("tiled"), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@given(cases(), st.booleans(), st.sampled_from([1, 300]))
@settings(max_examples=60)
def test_scores_are_held_for_some_queries_at_a_time(case, lse_gradient, scores):
    """With room for few scores every tile is walked in slices of queries, and where the lse is needed dense attention too."""
    expected = results(case, "reference", torch.float64, lse_gradient)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_attention, "_FUSED", None)
        patch.setattr(tile_attention, "SCORES", scores)
        patch.setattr(fused, "SCORES", scores)
        for backend in EXACT:
            if claims(case, backend):
                assert_equal(results(case, backend, torch.float64, lse_gradient), expected, 1e-11)


@pytest.mark.parametrize(("backend", "pattern"), [("tiled", "dense"), ("tiled", "causal"), ("dense", "neighborhood(5)")])
def test_no_tensor_of_all_pairs_exists_where_the_lse_is_needed(backend, pattern, monkeypatch):
    """The largest tensor that any operator makes, forward and backward, is one of the scores that are held at once."""
    limit, tokens = 2 * 64 * 256, 256
    monkeypatch.setattr(tile_attention, "_FUSED", None)
    monkeypatch.setattr(tile_attention, "SCORES", limit)
    monkeypatch.setattr(fused, "SCORES", limit)
    q, k, v = (torch.randn(1, tokens, 2, 8, requires_grad=True) for _ in range(3))
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            largest = max(largest, *(t.numel() for t in tree_leaves(made) if isinstance(t, torch.Tensor)), 0)
            return made

    with Watch():
        out, lse = attend(q, k, v, pattern, return_lse=True, backend=backend)
        torch.autograd.grad(out.square().sum() + lse.sin().sum(), (q, k, v))
    assert tokens * 8 * 2 <= largest <= limit


@given(cases(), st.booleans())
@settings(max_examples=120)
def test_backends_equal_reference_in_float32(case, lse_gradient):
    expected = results(case, "reference", torch.float32, lse_gradient, exact=True)
    for backend in CPU:
        if claims(case, backend):
            assert_equal(results(case, backend, torch.float32, lse_gradient), expected, 1e-5)


@given(cases(), st.booleans())
@settings(max_examples=60)
def test_backends_equal_reference_in_bfloat16(case, lse_gradient):
    expected = results(case, "reference", torch.bfloat16, lse_gradient, exact=True)
    for backend in CPU:
        if claims(case, backend):
            assert_equal(results(case, backend, torch.bfloat16, lse_gradient), expected, 2e-2)


@given(cases(), st.sampled_from([4, 384]))
@settings(max_examples=60)
def test_products_in_bfloat16_are_as_good_as_the_inputs(case, narrow_keys):
    """Without gradients and log-sum-exp, tiles of up to ``narrow_keys`` keys are multiplied in bfloat16."""
    if not claims(case, "tiled"):
        return
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(tiled, "NARROW_KEYS", narrow_keys)
        patch.setattr(tile_attention, "_bfloat16_units", lambda: True)
        low = case.tensors(torch.bfloat16)
        got = case.run(low, "tiled", return_lse=False)
        expected = case.run({name: tensor.double() for name, tensor in low.items()}, "reference", return_lse=False)
        assert got.dtype == torch.bfloat16
        assert (got.double() - expected).norm() <= 1e-2 * expected.norm()


@given(cases(routed=False))
def test_tiled_claims_every_static_pattern_but_raster_order(case):
    members = case.pattern.groups if isinstance(case.pattern, P.PerHead) else ((case.pattern, 1),)
    if len(case.grid) > 1 and any("Causal" in repr(m) for m, _ in members):
        return
    assert claims(case, "tiled")


@given(cases())
def test_dense_bias_gets_its_gradient(case):
    q, k, v = (case.tensors(torch.float64)[name] for name in "qkv")
    tokens = math.prod(case.grid)
    for shape in ((tokens, tokens), (case.heads, tokens, tokens), (case.batch, 1, 1, tokens)):
        found = []
        for backend in ("reference", "dense"):
            bias = torch.linspace(-1, 1, math.prod(shape), dtype=torch.float64).view(shape).requires_grad_()
            out = attend(q, k, v, case.pattern, bias=bias, valid=case.mask(), backend=backend)
            found.append((out, *torch.autograd.grad(out.sin().sum(), (q, k, v, bias))))
        for left, right in zip(*found, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pattern", [
    "neighborhood(3)", "neighborhood(3, dilation=2, stride=2)", "window(3, shift=1)", "halo(2, 1)", "grid(2)",
    "axis(0) | axis(1)", "neighborhood(3, border='zero')",
])  # fmt: skip
def test_tiled_gradcheck(pattern):
    pattern = P.parse(pattern)
    q, k, v = (torch.randn(1, 5, 4, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    if isinstance(pattern, P.Union):
        table = None
    else:
        sizes = [2 * pattern.extent(axis, n, 2) + 1 for axis, n in enumerate((5, 4))]
        table = torch.randn(2, *sizes, dtype=torch.float64, requires_grad=True)

    def both(q, k, v, table):
        bias = None if table is None else HeadTable(table, pattern)
        return attend(q, k, v, pattern, bias=bias, return_lse=True, backend="tiled")

    assert torch.autograd.gradcheck(both, (q, k, v, table))


@pytest.mark.parametrize("grid", [(40, 40), (31, 37)])
def test_tiled_equals_reference_where_tiles_come_in_many_chunks(grid, monkeypatch):
    """Chunks of the real buffer size hold all of a test's grid; a small buffer walks every boundary between chunks."""
    monkeypatch.setattr(tiles, "BUFFER", 1 << 14)
    case = Case(grid, P.Neighborhood(5, dilation=2), heads=2, kv_heads=1, batch=2, table=True)
    expected = results(case, "reference", torch.float32, False, exact=True)
    assert_equal(results(case, "tiled", torch.float32, False), expected, 1e-5)


def test_a_row_that_sees_nothing_gives_zero_and_finite_gradients():
    table = torch.tensor([[[-1, -1], [0, -1], [-1, 2]]])
    valid = torch.tensor([[True, False, True, True, True, False]])
    kinds = list(itertools.product(("reference", *EXACT), (torch.float32, torch.float64)))
    kinds += [("native", torch.float32)] if FASTEST == "native" else []
    for pattern, mask, blind in (
        (P.Blocks(table, 2), None, [0, 1]),
        (P.Blocks(table, 2), valid, [0, 1]),
        (P.Axis(0) & P.Dense(), torch.zeros(1, 6, dtype=torch.bool), list(range(6))),
        (P.Window(2), torch.tensor([[True, True, False, False, True, True]]), [2, 3]),
    ):
        for backend, dtype in kinds:
            q, k, v = (torch.randn(1, 6, 2, 4, dtype=dtype, requires_grad=True) for _ in range(3))
            out, lse = attend(q, k, v, pattern, valid=mask, return_lse=True, backend=backend)
            assert out[0, blind].eq(0).all()
            assert lse[0, blind].eq(-torch.inf).all()
            seen = [i for i in range(6) if i not in blind]
            assert lse[0, seen].isfinite().all()
            grads = torch.autograd.grad(out.square().sum() + lse[0, seen].sum(), (q, k, v), retain_graph=True)
            assert all(g.isfinite().all() for g in grads)
            assert grads[0][0, blind].eq(0).all()
            alone = attend(q, k, v, pattern, valid=mask, backend=backend)
            assert alone[0, blind].eq(0).all()
            assert all(g.isfinite().all() for g in torch.autograd.grad(alone.sum(), (q, k, v)))


def test_one_tensor_as_query_key_and_value():
    x = torch.randn(2, 9, 8, 2, 4, dtype=torch.float64, requires_grad=True)
    for pattern in ("neighborhood(3)", "dense", "window(4)"):
        grads = []
        for backend in ("reference", "auto"):
            (grad,) = torch.autograd.grad(attend(x, x, x, pattern, backend=backend).sin().sum(), x)
            grads.append(grad)
        torch.testing.assert_close(grads[0], grads[1])


def test_non_contiguous_operands():
    qkv = torch.randn(2, 9, 8, 3, 2, 4, dtype=torch.float64)
    q, k, v = qkv.unbind(3)
    expected = attend(q.contiguous(), k.contiguous(), v.contiguous(), "neighborhood(3)", backend="reference")
    torch.testing.assert_close(attend(q, k, v, "neighborhood(3)", backend="tiled"), expected)
    turned = [t.transpose(1, 2) for t in (q, k, v)]
    torch.testing.assert_close(
        attend(*turned, "neighborhood((5, 3))", backend="tiled"), attend(*turned, "neighborhood((5, 3))", backend="reference")
    )


def test_dropout_keeps_the_expected_output():
    q, k, v = (torch.randn(1, 6, 1, 4, dtype=torch.float64) for _ in range(3))
    expected = attend(q, k, v, "window(3)")
    for backend in ("reference", "dense"):
        draws = attend(*(t.expand(4000, -1, -1, -1) for t in (q, k, v)), "window(3)", dropout=0.3, backend=backend)
        assert not draws[0].equal(draws[1])
        torch.testing.assert_close(draws.mean(0, keepdim=True), expected, rtol=0, atol=0.06)


@pytest.mark.parametrize("pattern", ["dense", "neighborhood(5)", "window(4, shift=2)", "axis(0) | axis(1)"])
def test_autocast_computes_in_bfloat16(pattern):
    q, k, v = (torch.randn(2, 8, 8, 2, 16) for _ in range(3))
    expected = attend(q, k, v, pattern, backend="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight = torch.eye(16)
        halves = [t @ weight for t in (q, k, v)]  # as a projection under autocast makes them
        out = attend(halves[0], k, halves[2], pattern)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)


def test_autocasting_does_not_reach_inside_the_tiled_operator():
    pattern = P.Neighborhood(3)
    q, k, v = (torch.randn(2, 7, 9, 2, 8, requires_grad=True) for _ in range(3))
    table = torch.randn(2, 5, 5, requires_grad=True)
    leaves = (q, k, v, table)

    def gradients():
        out, lse = attend(q, k, v, pattern, bias=HeadTable(table, pattern), return_lse=True, backend="tiled")
        return (out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), leaves))

    expected = gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "dense", "auto"])
def test_a_bias_of_one_column_is_that_of_all_keys_and_leaves_zero_keys_alone(backend):
    q, k, v = (torch.randn(2, 3, 4, 2, 8) for _ in range(3))
    column = torch.randn(1, 2, 12, 1)
    found = attend(q, k, v, "halo(2, 1)", bias=column, backend=backend, return_lse=True)
    expected = attend(q, k, v, "halo(2, 1)", bias=column.expand(1, 2, 12, 12), backend="reference", return_lse=True)
    torch.testing.assert_close(found, expected)
