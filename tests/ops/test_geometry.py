"""The geometry of a static pattern on its grids: its classes of keys are the pattern's own mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard import Source
from regard.ops import patterns as P
from regard.ops.calls.geometry import Geometry
from regard.ops.calls.lower import break_up
from regard.ops.calls.source import HeadTable

SPECS = ("neighborhood(3)", "neighborhood(5, dilation=2)", "neighborhood(4, border='zero')", "window(4, shift=1)",
         "window(3, pad='zero')", "halo(4, 2)", "grid(3)", "axis(0)", "neighborhood(3, stride=2, border='mask')")  # fmt: skip


@given(st.sampled_from(SPECS), st.tuples(st.integers(1, 12), st.integers(1, 12)))
@settings(max_examples=80)
def test_classes_of_all_axes_make_the_mask(spec, grid):
    pattern = P.parse(spec)
    geometry = Geometry.on(pattern.spec, grid)
    q_pos, first = P.grid_positions(grid), [-before for before, _ in geometry.zeros]
    expected = pattern.visible(q_pos[:, None], P.grid_positions(geometry.padded, first)[None], grid, grid)
    seen = [geometry.axis(axis, pattern.as_product(2)).visible(n) for axis, n in enumerate(geometry.padded)]
    assert torch.from_numpy(np.kron(*seen)).equal(expected)


def test_classes_of_a_dilated_neighborhood():
    classes = Geometry.on("Neighborhood(3, dilation=2)", (7,)).axis(0, P.Neighborhood(3, 2))
    assert classes.step == 2
    assert classes.residue.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert classes.low.tolist() == [0, 0, 0, 0, 1, 0, 1]
    assert (classes.high - classes.low).tolist() == [3] * 7
    assert [(residue, members.tolist()) for residue, members in classes.members()] == [(0, [0, 2, 4, 6]), (1, [1, 3, 5])]
    assert classes.even


def test_keys_are_counted_from_the_first_zero_key_or_the_first_true_one():
    geometry = Geometry.on("Neighborhood(3, border='zero')", (4,))
    pattern = geometry.pattern.as_product(1)
    assert geometry.zeros == ((1, 1),)
    assert geometry.padded == (6,)
    assert geometry.axis(0, pattern).low.tolist() == [0, 1, 2, 3]
    assert geometry.axis(0, pattern, padded=False).low.tolist() == [-1, 0, 1, 2]


def test_a_call_has_one_geometry():
    q = torch.zeros(2, 3, 5, 4, 8)
    k = torch.zeros(2, 6, 5, 4, 8)
    pattern = P.Neighborhood(3, border="zero")
    table = HeadTable(torch.zeros(4, 5, 5), pattern)
    (group,) = break_up(q, [Source(k, k, pattern, bias=table)], scale=None, q_start=(2, 0), dropout=0.0, need_lse=False)
    call = group[0][1]
    assert call.geometry == Geometry(pattern.spec, (3, 5), (6, 5), (2, 0), ((1, 1), (1, 1)), (pattern.spec, (5, 5)))
    assert call.geometry is call.geometry
    assert call.geometry.positions(0).tolist() == [2, 3, 4]
    assert call.geometry.bias == (pattern, (5, 5))


@pytest.mark.parametrize(("pattern", "rank", "product"), [
    (P.Dense(), 2, True), (P.Window(2), 2, True), (P.Causal(), 1, True), (P.Causal(), 2, False),
    (P.Axis(0) | P.Axis(1), 2, False), (P.Blocks(torch.zeros(1, 4, 1, dtype=torch.long), 2), 2, False),
])  # fmt: skip
def test_patterns_say_whether_they_are_a_product_of_windows(pattern, rank, product):
    assert pattern.as_product(rank) is (pattern if product else None)


def test_patterns_answer_what_backends_ask():
    table, labels = torch.zeros(2, 3, 4, 1, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    blocks, tokens, clusters = P.Blocks(table, (2, 3)), P.Tokens(table), P.Clusters(labels, labels[:1])
    found = blocks.as_blocks(2)
    assert found.table is blocks.table
    assert (found.sizes, found.tokens, found.single) == ((2, 3), 6, False)
    assert (tokens.as_blocks(3).sizes, tokens.as_blocks(3).single) == ((1, 1, 1), True)
    assert P.Window(2).as_blocks(2) is None
    assert (blocks.batch_shapes(), clusters.batch_shapes(), P.Window(2).batch_shapes()) == ([(2, 3)], [(2,), (1,)], [])
    assert [tuple(t.shape) for t in clusters.as_labels()] == [(2, 1, 9), (1, 1, 9)]
    assert [p.places_queries for p in (P.Dense(), blocks, tokens, clusters, P.Causal(), P.Window(2))] == [False] * 4 + [
        True
    ] * 2
    assert [p.sees_all for p in (P.Dense(), P.Window(2), P.Dense() | P.Window(2))] == [True, False, False]
    assert [p.ordered for p in (P.Causal(), P.Dense(), P.Axis(0, causal=True))] == [True, False, False]
    assert P.Neighborhood(3).as_neighborhood() == P.Neighborhood(3)
    assert P.Window(3).as_neighborhood() is None
    members, operation = (P.Axis(0) | P.Axis(1)).as_joined()
    assert members == (P.Axis(0), P.Axis(1))
    assert operation is torch.logical_or
    assert (P.Axis(0) & P.Axis(1)).as_joined()[1] is torch.logical_and
    assert P.PerHead({P.Window(2): 1, P.Dense(): 3}).head_groups() == ((P.Window(2), 1), (P.Dense(), 3))
    assert P.Window(2).head_groups() is None


@pytest.mark.parametrize("pattern", [P.Dense(), P.Window(3, 1), P.Grid(2), P.Axis(1), P.Axis(0, causal=True), P.Neighborhood(3),
                                     P.Halo(2, 1, "mask"), P.Causal()])  # fmt: skip
def test_the_transposed_pattern_shows_each_key_its_queries(pattern):
    assert pattern.transposed().mask((4, 5)).equal(pattern.mask((4, 5)).T)
    clusters = P.Clusters(torch.tensor([[0, 1, 1]]), torch.tensor([[1, 0]]))
    assert clusters.transposed().mask((2,), (3,)).equal(clusters.mask((3,), (2,)).transpose(-2, -1))


def test_pairs_of_tables_without_content_follow_from_their_size():
    blocks = P.Blocks(torch.zeros(1, 4, 2, dtype=torch.long), 2)
    assert blocks.pairs_by_size((4, 4), (4, 4)) is None
    assert P.Blocks(blocks.table.to("meta"), 2).pairs_by_size((4, 4), (4, 4)) == 16 * 2 * 4
