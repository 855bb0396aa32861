"""FlexAttention and NATTEN: they equal the reference where they claim a call, and say exactly why where they do not."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard import Source, attend
from regard.ops import patterns as P
from regard.ops.backends import flex, natten
from regard.ops.backends.base import choose
from regard.ops.backends.choice import BACKENDS
from regard.ops.calls.call import Call
from regard.ops.calls.lower import break_up
from regard.ops.calls.source import HeadTable

from .cases import Case, cases, per_axis

NATTEN = pytest.mark.skipif(not natten.INSTALLED, reason="natten is not installed")
COMPILES = pytest.mark.skipif(flex.COMPILER is None, reason="no C++ compiler")


def calls_of(case: Case) -> list[Call]:
    tensors = case.tensors(torch.float32)
    table = HeadTable(tensors["table"], case.pattern) if case.table else None
    source = Source(tensors["k"], tensors["v"], case.pattern, bias=table, valid=case.mask())
    (group,) = break_up(tensors["q"], [source], scale=None, q_start=0, dropout=0.0, need_lse=False)
    return [call for _, call in group]


def indices(call: Call) -> tuple[torch.Tensor, ...]:
    sizes = (call.batch, call.heads, call.queries, call.keys)
    return torch.meshgrid(*(torch.arange(n) for n in sizes), indexing="ij")


@given(cases())
@settings(max_examples=120)
def test_flex_mask_and_score_functions_equal_mask_and_bias(case):
    for call in calls_of(case):
        where = indices(call)
        expected = call.mask()
        seen = flex._make(call, call.pattern)(*where)
        if call.valid is not None:
            seen = seen & call.valid.flatten(1)[where[0], where[3]]
        if expected is not None:
            assert seen.equal(expected.expand(seen.shape))
        bias = call.dense_bias()
        if bias is not None:
            score = flex._score(call)(torch.zeros(seen.shape), *where)
            assert score[seen].equal(bias.expand(seen.shape)[seen])


@given(cases())
@settings(max_examples=40)
def test_flex_visits_exactly_the_blocks_that_hold_a_visible_pair(case):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "BLOCK", 8)  # many blocks on a small grid
        for call in calls_of(case):
            flex._BLOCK_MASKS.clear()
            found = flex._block_mask(call)
            mask = call.mask()
            if found is None:
                assert mask is None
                continue
            shape = [math.ceil(n / 8) * 8 for n in (call.queries, call.keys)]
            whole = torch.zeros(*mask.shape[:2], *shape, dtype=torch.bool)
            whole[..., : call.queries, : call.keys] = mask
            blocks = whole.unflatten(3, (-1, 8)).unflatten(2, (-1, 8))
            assert found.to_dense().bool().equal(blocks.amax((3, 5)))
            full = blocks.amin((3, 5)).sum(-1, dtype=torch.int32)
            assert found.full_kv_num_blocks.equal(full)  # those skip the mask function
            assert flex.computed_pairs(call) == int(blocks.amax((3, 5)).sum()) * 64 // math.prod(mask.shape[:2])
    flex._BLOCK_MASKS.clear()


@COMPILES
@pytest.mark.slow
@pytest.mark.parametrize(("grid", "pattern", "options"), [
    ((17, 11), "neighborhood((3, 4), dilation=(2, 1), causal=(True, False))", {"table": True, "kv": 2, "value": 24}),
    ((5, 6, 7), "halo(3, 1)", {}),
    ((14, 14), "axis(0) | window(5, shift=2)", {"kv": 1}),
    ((14, 15), "causal", {"valid": True}),
    ((12, 12), "blocks", {}),
    ((12, 12), "clusters", {}),
    ((9, 9), "dense", {"bias": True}),
])  # fmt: skip
def test_flex_equals_reference_on_cpu(grid, pattern, options):
    tokens = math.prod(grid)
    named = {
        "blocks": P.Blocks(torch.randint(-1, 9, (2, 9, 2)), 4),
        "clusters": P.Clusters(torch.randint(0, 5, (2, 4, tokens))),
    }
    pattern = named[pattern] if pattern in named else P.parse(pattern)
    q = torch.randn(2, *grid, 4, 16)
    k = torch.randn(2, *grid, options.get("kv", 4), 16)
    v = torch.randn(2, *grid, options.get("kv", 4), options.get("value", 16))
    bias = torch.randn(4, tokens, tokens) if "bias" in options else None
    if "table" in options:
        bias = HeadTable(torch.randn(4, *[2 * pattern.extent(a, n, len(grid)) + 1 for a, n in enumerate(grid)]), pattern)
    valid = torch.rand(2, *grid) > 0.6 if "valid" in options else None
    found, expected = (attend(q, k, v, pattern, bias=bias, valid=valid, backend=b) for b in ("flex", "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@st.composite
def claimed(draw) -> tuple[tuple[int, ...], P.Neighborhood]:
    rank = draw(st.integers(1, 3))
    kernel = draw(st.tuples(*[st.integers(2, 4)] * rank))
    dilation = draw(st.tuples(*[st.integers(1, 2)] * rank))
    grid = tuple(k * d + draw(st.integers(0, 4)) for k, d in zip(kernel, dilation, strict=True))
    stride = tuple(draw(st.integers(1, k)) for k in kernel)
    return grid, P.Neighborhood(kernel, dilation, stride, draw(per_axis(st.booleans(), rank)))


@NATTEN
@pytest.mark.peer
@given(claimed())
@settings(max_examples=8)
def test_natten_equals_reference(drawn):
    grid, pattern = drawn
    q, k, v = (torch.randn(2, *grid, heads, 8) for heads in (4, 2, 2))
    try:
        found, lse = attend(q, k, v, pattern, return_lse=True, backend="natten")
    except ValueError as error:
        if "no causal attention over the whole axis" not in str(error):
            raise
        return
    expected, expected_lse = attend(q, k, v, pattern, return_lse=True, backend="reference")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


def call_for(pattern: str, grid=(8, 8), dtype=torch.float32, device="cpu", dim: int = 16, grad: bool = False, **source) -> Call:
    """A call on tensors without data, as planned for a device."""
    q = torch.empty(1, *grid, 2, dim, dtype=dtype, device="meta", requires_grad=grad)
    (((_, call),),) = break_up(q, [Source(q, q, pattern, **source)], scale=None, q_start=0, dropout=0.0, need_lse=False)
    return replace(call, device=torch.device(device))


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (call_for("window(3)"), "only Neighborhood with border='shift'; got Window(3)"),
        (call_for("neighborhood(3, border='mask')"), "only Neighborhood with border='shift'"),
    ],
)
def test_natten_names_the_patterns_it_cannot_run(call, reason):
    assert reason in BACKENDS["natten"].supports(call)


@NATTEN
@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (call_for("neighborhood(3)", bias=torch.zeros(64, 64, device="meta")), "no bias"),
        (call_for("neighborhood(3)", valid=torch.ones(1, 8, 8, dtype=torch.bool, device="meta")), "no valid mask"),
        (
            call_for("neighborhood(3, dilation=3)"),
            "kernel_size * dilation <= length; got Neighborhood(3, dilation=3) on (8, 8)",
        ),
        (call_for("neighborhood(1)"), "kernel_size >= 2"),
        (call_for("neighborhood(2)", grid=(3, 3, 3, 3)), "1 to 3 axes; got queries (3, 3, 3, 3)"),
        (call_for("neighborhood(3)", dtype=torch.float64), "only float32, float16 and bfloat16; got torch.float64"),
        (call_for("neighborhood(3)", grad=True), "no backward on CPU"),
        (call_for("neighborhood(3)", dim=12), "power of two in 8..512; got 12 and 12"),
        (call_for("neighborhood(8, causal=True)", grid=(8,)), "no causal attention over the whole axis on CPU"),
        (call_for("neighborhood(3)", device="mps"), "only CUDA and CPU; got mps"),
        (call_for("neighborhood(3)"), None),
    ],
)
def test_natten_says_why_not(call, reason):
    found = BACKENDS["natten"].supports(call)
    assert found is None if reason is None else reason in found


@COMPILES
@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (call_for("window(3)", grad=True), "no backward on CPU"),
        (call_for("window(3)", dtype=torch.float64), "on CPU only float32, float16 and bfloat16; got torch.float64"),
        (call_for("window(3)", dtype=torch.float64, device="cuda"), "no float64 on CUDA"),
        (call_for("window(3)", device="cuda", dim=8), "head and value dims from 16; got 8 and 8"),
        (call_for("window(3)", device="mps"), "only CUDA and CPU; got mps"),
        (call_for("window(3)", device="cuda", grad=True), None),
        (call_for("window(3)"), None),
    ],
)
def test_flex_says_why_not(call, reason):
    found = BACKENDS["flex"].supports(call)
    assert found is None if reason is None else reason in found


def test_neither_is_chosen_on_cpu():
    for pattern in ("neighborhood(3)", "dense", "causal", "window(3)"):
        assert choose(BACKENDS, call_for(pattern)).name in ("native", "tiled", "dense")
