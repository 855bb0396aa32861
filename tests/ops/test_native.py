"""The compiled attention equals the definition in float64, in every size that its blocks and lanes make special."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regard import Source, attend
from regard.ops import patterns as P
from regard.ops.backends.native import attention
from regard.ops.backends.native import tables as tiles
from regard.ops.calls.source import HeadTable
from regard.ops.compiled import library, missing

from .cases import Case, assert_equal, results

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"no compiled kernels: {missing()}")


def equals_definition(
    case: Case, dtype: torch.dtype = torch.float32, tolerance: float = 1e-5, lse_gradient: bool = True
) -> None:
    expected = results(case, "reference", dtype, lse_gradient, exact=True)
    assert_equal(results(case, "native", dtype, lse_gradient), expected, tolerance)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 3), st.integers(1, 2))
@settings(max_examples=60)
def test_any_number_of_tokens_and_width(tokens, dim, value_dim, kv_heads, group):
    """Whole vectors, parts of one, single rows, and every remainder of the register blocks."""
    equals_definition(
        Case((tokens,), P.Neighborhood(min(tokens, 5)), kv_heads * group, kv_heads, dim=dim, value_dim=value_dim, table=True)
    )


@pytest.mark.parametrize("pattern", [P.Dense(), P.Window(470), P.Neighborhood(301)])
@pytest.mark.parametrize("heads", [(1, 1), (4, 2)])
def test_queries_beyond_what_a_cache_holds_are_done_in_pieces(pattern, heads):
    equals_definition(Case((1100,), pattern, *heads, dim=9, value_dim=20, batch=1, table=isinstance(pattern, P.Window)))


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("valid", [False, True])
def test_routed_blocks_of_groups_of_heads(per_head, valid):
    table = torch.randint(-1, 12, (2, 4 if per_head else 1, 12, 3))
    equals_definition(Case((23, 15), P.Blocks(table, (8, 4)), 4, 2, dim=16, value_dim=8, valid=valid))


@pytest.mark.parametrize("pattern", [P.Axis(0) | P.Axis(1), P.Window(3) | P.Grid(4) | P.Neighborhood(3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parts_of_a_union_merge(pattern, dtype):
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    equals_definition(Case((11, 13), pattern, 4, 2, dim=8, value_dim=17, valid=True), dtype, tolerance)


@pytest.mark.parametrize("threads", [2, 3, 16])
@pytest.mark.parametrize(
    "case",
    [
        Case(
            (20, 21), P.Neighborhood(5, 2), 3, 1, dim=8, batch=1, table=True
        ),  # tiles share keys: slices with sums of their own
        Case((16, 16), P.Window(4, shift=1), 3, 3, dim=8, batch=2, table=True),
        Case((16, 16), P.Grid(4), 2, 1, dim=8, batch=1),
        Case((130,), P.Dense(), 2, 1, dim=8, batch=1),  # one tile, whose queries are cut
        Case((9, 12), P.Dense(), 1, 1, dim=8, batch=1, valid=True),
    ],
    ids=lambda case: case.pattern.spec,
)
def test_any_number_of_threads(case, threads, monkeypatch):
    monkeypatch.setattr(attention, "SMALL", 0)
    torch.set_num_threads(threads)
    try:
        equals_definition(case)
        first, again = (results(case, "native", torch.float32, True) for _ in range(2))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(first[name], again[name]) for name in first)  # bitwise: the same operators on the same shapes


def test_python_threads_at_once_keep_to_their_own_memory(monkeypatch):
    monkeypatch.setattr(attention, "SMALL", 0)
    inputs = [[torch.randn(2, 24, 24, 2, 16) for _ in range(3)] for _ in range(4)]
    alone = [attend(*three, "neighborhood(7)", backend="native") for three in inputs]
    found: list[Tensor | None] = [None] * 4

    def work(i: int) -> None:
        for _ in range(20):
            found[i] = attend(*inputs[i], "neighborhood(7)", backend="native")

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))  # bitwise: the same operators on the same shapes


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 1e3, 1e18])
def test_scores_of_any_size(size):
    """From weights that are all alike to a single one; the exponential is exact to float32 over the whole range."""
    q, k, v = (torch.randn(1, 40, 1, 16) for _ in range(3))
    out, lse = attend(q * size, k, v, "window(20)", return_lse=True, backend="native")
    expected, expected_lse = attend(
        *((q * size).double(), k.double(), v.double()), "window(20)", return_lse=True, backend="reference"
    )
    rounding = 1e-6 + 4e-7 * size * q.norm(dim=-1).max().item() * k.norm(dim=-1).max().item() / 4
    assert (out - expected).abs().max() <= min(rounding, 2 * v.abs().max())
    assert ((lse - expected_lse).abs() / (1 + expected_lse.abs())).max() < 1e-6


def test_the_exponential_is_that_of_float32():
    """Two keys, the difference of whose scores runs from 0 to -100: the weight of the second, and 0 where it is not normal."""
    steps = torch.linspace(0, 100, 4001)
    q = steps.view(-1, 1, 1, 1)
    k = torch.tensor([0.0, -1.0]).view(1, 2, 1, 1).expand(4001, -1, -1, -1)
    v = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).expand(4001, -1, -1, -1)
    out = attend(torch.cat([q, q], 1), k, v, "dense", scale=1.0, backend="native")[:, 0, 0, 0].double()
    expected = (1 / (1 + steps.double().exp())).where(steps <= 87, 0.0)
    assert ((out - expected).abs() <= 3e-7 * expected).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_what_is_not_finite_reaches_those_who_see_it_and_nobody_else(value, where):
    tensors = {name: torch.randn(1, 12, 2, 8) for name in "qkv"}
    tensors[where][0, 5, 1, 3] = value
    found = attend(**tensors, pattern="window(4)", backend="native")
    seen = {name: t[:, 4:8] for name, t in tensors.items()}
    torch.testing.assert_close(found[:, 4:8], attend(**seen, pattern="dense", backend="reference"), equal_nan=True)
    assert not found[0, 4:8, 1].isfinite().all()
    assert found[0, :, 0].isfinite().all()
    assert found[0, :4].isfinite().all()
    assert found[0, 8:].isfinite().all()


def test_rows_are_read_where_they_lie():
    """Slices of one projection, turned axes, shared keys, and a last axis that is not contiguous."""
    qkv = torch.randn(2, 9, 8, 3, 2, 24)
    turned = qkv.transpose(1, 2)
    strided = torch.randn(2, 9, 8, 2, 48)[..., ::2]
    shared = torch.randn(1, 9, 8, 2, 24).expand(2, -1, -1, -1, -1)
    for q, k, v in (qkv.unbind(3), (t.transpose(1, 2) for t in turned.unbind(3)), (strided, shared, strided), [shared] * 3):
        found = attend(q, k, v, "neighborhood(5)", backend="native")
        torch.testing.assert_close(found, attend(q, k, v, "neighborhood(5)", backend="reference"))


def test_bfloat16_is_rounded_to_even():
    """The mean of two neighbours among the numbers of bfloat16 lies half way between them; a NaN of any payload stays one."""
    low = torch.arange(0x3F80, 0x4080, dtype=torch.int16)
    pairs = torch.stack([low, low + 1]).view(torch.bfloat16)  # (keys, numbers)
    v = pairs.view(1, 2, 1, -1)
    q = torch.zeros(1, 2, 1, 4, dtype=torch.bfloat16)
    out = attend(q, q, v, "dense", backend="native")[0, 0, 0]
    assert torch.equal(out, pairs.float().mean(0).bfloat16())
    odd = torch.full((1, 2, 1, 4), 0x7FFF, dtype=torch.int16).view(torch.bfloat16)
    assert attend(q, q, odd, "dense", backend="native").isnan().all()


def test_keys_that_nobody_sees_get_no_gradient():
    """The windows of some rows of queries: keys of the other rows stand in no tile."""
    q, k, v = torch.randn(1, 4, 8, 2, 8), torch.randn(1, 8, 8, 2, 8), torch.randn(1, 8, 8, 2, 8)
    found = []
    for name in ("native", "reference"):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        torch.full((1 << 16,), torch.nan)  # what fresh memory may hold
        out = attend(*leaves, "window(4)", q_start=4, backend=name)
        found.append(torch.autograd.grad(out.square().sum(), leaves))
    torch.testing.assert_close(*found)
    assert not found[0][1][:, :4].any()


def test_gradients_that_are_expanded():
    q, k, v = (torch.randn(2, 9, 8, 2, 8, requires_grad=True) for _ in range(3))
    found = torch.autograd.grad(attend(q, k, v, "window(3)", backend="native").sum(), (q, k, v))
    expected = torch.autograd.grad(attend(q, k, v, "window(3)", backend="reference").sum(), (q, k, v))
    torch.testing.assert_close(found, expected)


def test_a_bias_shared_by_heads_gets_the_sum_of_their_gradients():
    pattern = P.Window(3)
    q, k, v = (torch.randn(2, 7, 9, 3, 8) for _ in range(3))
    found = []
    for name in ("native", "reference"):
        table = torch.linspace(-1, 1, 25).view(1, 5, 5).requires_grad_()
        out = attend(q, k, v, pattern, bias=HeadTable(table, pattern), backend=name)
        found.append(torch.autograd.grad(out.square().sum(), table)[0])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_sources_with_their_own_heads_and_queries():
    q, k, v, other = (torch.randn(2, 8, 9, 4, 8) for _ in range(4))
    some = Source(k[..., :2, :], v[..., :2, :], "window(4)", q=other, heads=(1, 3))
    sources = [Source(k, v, "neighborhood(3)"), some]
    torch.testing.assert_close(attend(q, sources, backend="native"), attend(q, sources, backend="reference"))


@pytest.mark.parametrize("flags", [("-march=x86-64-v3",), ("-march=x86-64",)], ids=["8 lanes", "4 lanes"])
def test_narrower_processors(flags, tmp_path, monkeypatch):
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("these flags are for x86-64")
    path = tmp_path / "narrow.so"
    command = [*library._compiler(), *library.FLAGS, *flags, *map(str, library.SOURCES), "-o", str(path), "-lm"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("the compiler does not know these flags")
    narrow = library.opened(path)
    assert narrow.regard_lanes() == (8 if "v3" in flags[0] else 4)
    monkeypatch.setattr(attention, "library", lambda: narrow)
    tiles._bare_parts.cache_clear()
    try:
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
            equals_definition(Case((13, 11), P.Neighborhood(5), 4, 2, dim=13, value_dim=20, table=True), dtype, tolerance)
            equals_definition(Case((13, 11), P.Axis(0) | P.Axis(1), 2, 1, dim=32, value_dim=5, valid=True), dtype, tolerance)
    finally:
        tiles._bare_parts.cache_clear()


def test_the_task_is_laid_out_as_in_c():
    assert library.library().regard_task_size() == ctypes.sizeof(attention.Task)


def test_it_is_for_cpus_and_types_that_are_compiled():
    q = torch.randn(1, 8, 8, 2, 8)
    for tensor, options, reason in (
        (q.double(), {}, "only float32, bfloat16 and float16; got torch.float64"),
        (q, {"dropout": 0.1}, "no attention dropout"),
        (q, {"bias": torch.zeros(64, 64)}, "a dense bias belongs to dense attention"),
        (q.to("meta"), {}, "compiled for CPUs; got meta"),
    ):
        with pytest.raises(ValueError, match=reason):
            attend(tensor, tensor, tensor, "window(4)", backend="native", **options)
