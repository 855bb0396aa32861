"""Patterns as values: text form, equality, and errors that quote what was given."""

from __future__ import annotations

import pickle
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from regard import Source, attend, merge
from regard.ops import attend_weights
from regard.ops import patterns as P
from regard.ops.calls.source import HeadTable

from .cases import sizes, static


@given(st.integers(1, 3).flatmap(static))
@settings(max_examples=150)
def test_text_form_reads_back(pattern):
    assert P.parse(repr(pattern)) == pattern
    assert P.parse(repr(pattern).lower().replace(" ", "").replace("true", "True").replace("false", "False")) == pattern
    assert hash(P.parse(repr(pattern))) == hash(pattern)
    assert pickle.loads(pickle.dumps(pattern)) == pattern


def test_text_form_of_heads_reads_back():
    pattern = P.PerHead({P.Window(7, shift=3): 2, P.Neighborhood((3, 5)) | P.Axis(0): 1})
    assert P.parse(repr(pattern)) == pattern
    assert pattern.heads == 3


def test_text_form_binds_and_before_or():
    assert P.parse("axis(0) | axis(1) & window(2)") == P.Axis(0) | (P.Axis(1) & P.Window(2))
    assert P.parse("(axis(0) | axis(1)) & window(2)") == (P.Axis(0) | P.Axis(1)) & P.Window(2)


def test_every_pattern_names_its_source():
    for kind in (P.Dense, P.Causal, P.Window, P.Neighborhood, P.Halo, P.Grid, P.Axis, P.Blocks, P.Tokens, P.Clusters):
        assert re.fullmatch(r"arXiv:\d{4}\.\d{4,5}", kind.source)


def test_patterns_are_frozen():
    with pytest.raises(AttributeError):
        P.Window(7).size = 5


def test_routed_patterns_are_pytree_nodes():
    table = torch.zeros(1, 4, 2, dtype=torch.long)
    (leaf,), spec = pytree.tree_flatten(P.Blocks(table, (2, 3)))
    assert leaf is table
    again = pytree.tree_unflatten([table + 1], spec)
    assert isinstance(again, P.Blocks)
    assert again.block == (2, 3)
    assert again.table.eq(1).all()
    (leaf,), spec = pytree.tree_flatten(P.Tokens(table))
    assert isinstance(pytree.tree_unflatten([leaf], spec), P.Tokens)
    labels = P.Clusters(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 6, dtype=torch.long))
    assert len(pytree.tree_leaves(labels)) == 2


@given(st.integers(1, 3).flatmap(lambda rank: st.tuples(sizes(rank), static(rank))))
@settings(max_examples=60)
def test_a_bias_table_of_the_extent_holds_every_visible_offset(drawn):
    grid, pattern = drawn
    if isinstance(pattern, (P.Union, P.Intersection, P.Causal)):
        return
    pos = P.grid_positions(grid)
    seen = pattern.mask(grid)
    for axis, n in enumerate(grid):
        steps = pattern.offset(axis, pos[:, None, axis], pos[None, :, axis], n, len(grid))[seen]
        assert steps.abs().max() <= pattern.extent(axis, n, len(grid))


@pytest.mark.parametrize("border", ["shift", "mask", "zero"])
@pytest.mark.parametrize("kernel", [1, 2, 3, 6, 7])
def test_the_table_of_a_neighborhood_has_no_more_than_occurs(kernel, border):
    """Without borders that shift it inward, a window reaches half as far."""
    for stride in range(1, 2 if border == "zero" else kernel + 1):
        pattern = P.Neighborhood(kernel, 2, stride, border=border)
        at = torch.arange(60)
        steps = pattern.offset(0, at[:, None], at, 60, 1)[pattern.mask((60,))]
        assert steps.abs().max() == pattern.extent(0, None, 1)
        assert border == "shift" or stride > 1 or pattern.extent(0, None, 1) == kernel // 2


@pytest.mark.parametrize(("make", "quotes"), [
    (lambda: P.Window(0), ["size", "at least 1", "got int 0"]),
    (lambda: P.Window(7.5), ["size", "whole number", "float 7.5"]),
    (lambda: P.Window((7, True)), ["size[1]", "whole number", "True"]),
    (lambda: P.Window(7, pad="wrap"), ["mask, zero", "'wrap'"]),
    (lambda: P.Window(7, shift=-1), ["shift", "at least 0", "-1"]),
    (lambda: P.Neighborhood(3, border="wrap"), ["shift, mask, zero", "'wrap'"]),
    (lambda: P.Neighborhood(3, stride=4), ["stride 4", "kernel_size 3"]),
    (lambda: P.Neighborhood(3, causal=1), ["causal", "True or False", "1"]),
    (lambda: P.Neighborhood(3, causal=True, border="zero"), ["border='zero'", "causal=True"]),
    (lambda: P.Neighborhood((3, 3), dilation=(1, 1, 1)).mask((4, 4)), ["different lengths", "(1, 1, 1)"]),
    (lambda: P.Halo(4, 1, border="wrap"), ["shift, mask, zero", "'wrap'"]),
    (lambda: P.Halo(4, 1, stride=3), ["stride must divide block", "stride=3", "block=4"]),
    (lambda: P.Axis(True), ["axis must be a whole number", "True"]),
    (lambda: P.Axis(0, causal=1), ["causal must be True or False", "1"]),
    (lambda: P.PerHead({P.Window(7): 0}), ["PerHead", "Window(7)", "0"]),
    (lambda: P.PerHead({"window(7)": 1}), ["PerHead", "'window(7)'"]),
    (lambda: P.Blocks(torch.zeros(3, 2), 4), ["table must be int64", "float32", "(3, 2)"]),
    (lambda: P.Clusters(torch.zeros(3)), ["labels must be int64", "float32", "(3,)"]),
    (lambda: P.Window((7, 7)).mask((4, 4, 4)), ["Window((7, 7))", "2 axes", "(4, 4, 4)"]),
    (lambda: P.Axis(2).mask((4, 4)), ["Axis(2)", "2 axes", "(4, 4)"]),
    (lambda: P.Dense().extent(0, None, 1), ["Dense()", "needs the grid"]),
    (lambda: P.Causal().axis_window(0, torch.arange(3), 3, 2), ["raster order", "flattened"]),
    (lambda: P.Blocks(torch.zeros(1, 3, 2, dtype=torch.long), 4).mask((8,)), ["3 query blocks", "(8,)", "4", "has 2"]),
    (lambda: P.Blocks(torch.zeros(1, 2, 2, dtype=torch.long), 4).mask((8,), (4, 4)), ["one rank", "(8,)", "(4, 4)"]),
    (lambda: P.Tokens(torch.zeros(1, 3, 2, dtype=torch.long)).mask((4, 2)), ["keys for 3 queries", "(4, 2)", "has 8"]),
    (lambda: P.Clusters(torch.zeros(1, 3, dtype=torch.long)).mask((8,)), ["3 query labels", "(8,)", "8 tokens"]),
    (lambda: (P.Clusters(torch.zeros(1, 8, dtype=torch.long)) | P.Halo(2, 1)).mask((8,)), ["zero keys", "Halo(2, 1)"]),
    (lambda: P.parse("windw(7)"), ["'windw(7)'", "unknown pattern 'windw'", "neighborhood", "window"]),
    (lambda: P.Neighborhood(7, dilatation=2), ["Neighborhood has no option dilatation", "did you mean dilation?"]),
    (lambda: P.Window(), ["Window needs size"]),
    (lambda: P.Window(7, size=3), ["Window got size twice"]),
    (lambda: P.Axis(0, True, 2), ["Axis takes axis, causal; got 3 values"]),
    (lambda: P.parse("window(7"), ["cannot read pattern 'window(7'"]),
    (lambda: P.parse("window(sise=7)"), ["cannot read pattern", "sise"]),
    (lambda: P.parse("window(7) + axis(0)"), ["joined by | and &"]),
    (lambda: P.parse("perhead(3)"), ["dict from patterns to numbers of heads"]),
    (lambda: P.as_pattern(7), ["pattern or its text form", "int 7"]),
])  # fmt: skip
def test_errors_of_patterns_quote_what_was_given(make, quotes):
    with pytest.raises((TypeError, ValueError)) as error:
        make()
    for quote in quotes:
        assert quote in str(error.value)


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


Q = tensor(2, 5, 6, 4, 8)
LABELS = torch.zeros(3, 30, dtype=torch.long)


@pytest.mark.parametrize(("call", "quotes"), [
    (lambda: attend(tensor(5, 6, 8), tensor(5, 6, 8), tensor(5, 6, 8)), ["(batch, *grid, heads, head_dim)", "(5, 6, 8)"]),
    (lambda: attend(Q, Q), ["v is missing"]),
    (lambda: attend(Q, []), ["at least one source"]),
    (lambda: attend(Q, [Q]), ["list of sources", "float32 tensor"]),
    (lambda: attend(Q, [Source(Q, Q)], Q), ["belong to the sources"]),
    (lambda: attend(Q, [Source(Q, Q)], pattern="window(3)"), ["belong to the sources"]),
    (lambda: attend(Q, Q, Q, dropout=1.0), ["dropout", "below 1.0", "got float 1.0"]),
    (lambda: attend(Q, [Source(Q, Q, q=Q[:, :4])]), ["own q", "(2, 5, 6, 4, 8)", "(2, 4, 6, 4, 8)"]),
    (lambda: attend(Q, [Source(Q, Q, heads=(1, 1))]), ["distinct indices below 4", "(1, 1)"]),
    (lambda: attend(Q, [Source(Q, Q, heads=(4,))]), ["distinct indices below 4", "(4,)"]),
    (lambda: attend(Q, [Source(Q, Q, heads=())]), ["distinct indices below 4", "()"]),
    (lambda: attend(Q, Q, Q.double()), ["share a dtype", "torch.float64"]),
    (lambda: attend(Q.int(), Q.int(), Q.int()), ["q must be float16", "int32 tensor"]),
    (lambda: attend(Q, Q, Q[:, :4]), ["agree but in dim", "k (2, 5, 6, 4, 8)", "v (2, 4, 6, 4, 8)"]),
    (lambda: attend(Q, Q[:1], Q[:1]), ["same batch size", "(1, 5, 6, 4, 8)"]),
    (lambda: attend(Q, Q[..., :4], Q), ["same head_dim", "(2, 5, 6, 4, 4)"]),
    (lambda: attend(Q, Q[..., :3, :], Q[..., :3, :]), ["multiple of the heads of k", "(2, 5, 6, 3, 8)"]),
    (lambda: attend(Q[:, :0], Q, Q), ["empty", "(2, 0, 6, 4, 8)"]),
    (lambda: attend(Q, Q, Q, bias=tensor(30, 29)), ["(2, 4, 30, 30)", "(30, 29)"]),
    (lambda: attend(Q, Q, Q, bias=3), ["a table and a pattern", "int"]),
    (lambda: attend(Q, Q, Q, valid=tensor(2, 5, 6)), ["bool of shape (2, 5, 6)", "float32"]),
    (lambda: attend(Q, Q, Q, valid=tensor(2, 30, dtype=torch.bool)), ["bool of shape (2, 5, 6)", "(2, 30)"]),
    (lambda: attend(Q, Q, Q, "perhead({window(3): 3})"), ["is for 3 heads", "q has 4"]),
    (lambda: attend(Q, tensor(2, 7, 4, 8), tensor(2, 7, 4, 8), "window(3)"), ["one rank", "(5, 6)", "(7,)"]),
    (lambda: attend(Q, Q, Q, "window(3)", q_start=(1, 2, 3)), ["one entry per grid axis", "(1, 2, 3)"]),
    (lambda: attend(Q, Q, Q, "window(3)", q_start=(1, 0)), ["q_start (1, 0)", "(5, 6)"]),
    (lambda: attend(Q, Q[:, :4], Q[:, :4], "neighborhood(3)"), ["places queries on the key grid", "(5, 6)", "(4, 6)"]),
    (lambda: attend(Q, Q, Q, "window(3)", bias=HeadTable(tensor(4, 5, 3), P.Window(3))), ["(5, 5)", "(5, 3)", "resize"]),
    (lambda: attend(Q, Q, Q, "window(3)", bias=HeadTable(tensor(3, 5, 5), P.Window(3))), ["heads=4", "(3, 5, 5)"]),
    (lambda: attend(Q, Q, Q, P.Clusters(LABELS)), ["Clusters(labels(3, 30))", "batch of 2", "4 heads"]),
    (lambda: attend(Q, Q, Q, P.Clusters(LABELS[:1]), q_start=(1, 0)), ["q_start must be 0"]),
    (lambda: attend(Q, Q, Q, backend="fast"), ["'fast'", "auto, reference, dense, tiled"]),
    (lambda: attend(Q, Q, Q, bias=tensor(30, 30), backend="tiled"), ["'tiled' cannot run this call", "dense bias"]),
    (lambda: attend(Q, Q, Q, "window(7)", dropout=0.1, backend="tiled"), ["'tiled' cannot run this call", "dropout"]),
    (lambda: merge([Q], []), ["1 outs, 0 lses"]),
    (lambda: merge([], []), ["0 outs, 0 lses"]),
    (lambda: attend_weights(Q, [Source(Q, Q)], rows=[30]), ["0..29", "[30]"]),
    (lambda: attend_weights(Q, [Source(Q, Q)], rows=[]), ["at least one", "[]"]),
    (lambda: attend_weights(Q, [Source(Q, Q)], reduce="max"), ["heads, rows", "'max'"]),
])  # fmt: skip
def test_errors_of_attention_quote_what_was_given(call, quotes):
    with pytest.raises((TypeError, ValueError)) as error:
        call()
    for quote in quotes:
        assert quote in str(error.value)
