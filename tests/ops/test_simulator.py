"""The tile walk: equal to a count by hand, to what backends visit, and to what permuted tokens need."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import regard
from regard.ops import patterns as P
from regard.ops.backends import flex
from regard.ops.calls.geometry import Geometry
from regard.ops.calls.lower import break_up
from regard.ops.calls.source import Source
from regard.ops.tiles.plan import tile_plan
from regard.ops.tiles.simulator import walk_tiles
from regard.ops.tokens.permute import from_tiles, to_tiles

from . import naive
from .cases import neighborhoods, sizes


@st.composite
def walks(draw):
    rank = draw(st.integers(1, 3))
    grid = draw(sizes(rank))
    pattern = draw(st.one_of(
        neighborhoods(rank).filter(lambda p: p.border != "zero"), st.builds(P.Window, st.integers(1, 5), st.integers(0, 4)),
        st.builds(P.Halo, st.integers(1, 4), st.integers(0, 2), st.sampled_from(("mask", "shift"))),
        st.builds(P.Grid, st.integers(1, 4)), st.builds(P.Axis, st.integers(0, rank - 1), st.booleans()),
    ))  # fmt: skip
    tile = st.tuples(*[st.integers(1, 5)] * rank)
    return pattern, grid, draw(tile), draw(tile)


def places(grid):
    return list(itertools.product(*map(range, grid)))


def of_tile(place, tile, dilation):
    """Dilation group and tile of a token, from its coordinates."""
    group = tuple(p % d for p, d in zip(place, dilation, strict=True))
    return group, tuple(p // d // t for p, d, t in zip(place, dilation, tile, strict=True))


def dilation_of(pattern, grid):
    if isinstance(pattern, P.Grid):
        return tuple(math.ceil(n / pattern.size) for n in grid)
    return tuple(naive.of_axis(getattr(pattern, "dilation", 1), a) for a in range(len(grid)))


def boxes(seen, q_tiles, k_tiles):
    """Key tiles each query tile visits: all in the smallest box that holds those with a visible pair; and their pairs."""
    needed: dict = {}
    for (i, q_name), (j, k_name) in itertools.product(enumerate(q_tiles), enumerate(k_tiles)):
        if seen[i, j]:
            needed.setdefault(q_name, set()).add(k_name)
    visited = {}
    for (group, tile), keys in needed.items():
        assert all(g == group for g, _ in keys)
        spans = [range(min(axis), max(axis) + 1) for axis in zip(*(k for _, k in keys), strict=True)]
        visited[group, tile] = {(group, k) for k in itertools.product(*spans)}
    return visited


@given(walks())
@settings(max_examples=60, deadline=None)
def test_the_walk_equals_a_count_over_all_pairs(drawn):
    pattern, grid, q_tile, k_tile = drawn
    walk = walk_tiles(pattern, grid, q_tile, k_tile)
    seen, dilation = naive.mask(pattern, grid, grid)[0, 0], dilation_of(pattern, grid)
    q_names, k_names = ([of_tile(p, t, dilation) for p in places(grid)] for t in (q_tile, k_tile))
    visited = boxes(seen, q_names, k_names)
    assert walk.visited == sum(map(len, visited.values()))
    assert walk.most == max(map(len, visited.values()))
    assert walk.computed_pairs == walk.visited * math.prod(q_tile) * math.prod(k_tile)
    assert walk.attended_pairs == int(seen.sum())
    assert walk.q_tiles * walk.k_tiles == math.prod(
        math.ceil(n / a) * math.ceil(n / b) for n, a, b in zip(grid, q_tile, k_tile, strict=True)
    )
    masked = any(not seen[i, j] for i, q in enumerate(q_names) for j, k in enumerate(k_names) if k in visited[q])
    assert walk.mask_free == (not masked)


@given(walks(), st.integers(1, 20), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_row_major_tiles_visit_the_tiles_that_hold_a_visible_pair(drawn, q_tile, k_tile):
    pattern, grid, _, _ = drawn
    if len(grid) == 1:
        grid, pattern = (*grid, 1), P.Neighborhood((3, 1), dilation=(2, 1))
    walk = walk_tiles(pattern, grid, q_tile, k_tile)
    seen = naive.mask(pattern, grid, grid)[0, 0]
    per_tile = [[bool(block.any()) for block in rows.split(k_tile, 1)] for rows in seen.split(q_tile)]
    assert walk.visited == sum(map(sum, per_tile))
    assert walk.most == max(map(sum, per_tile))
    whole = all(block.all() for rows in seen.split(q_tile) for block in rows.split(k_tile, 1) if block.any())
    assert walk.mask_free == whole


@pytest.mark.parametrize(("pattern", "grid"), [
    ("neighborhood(7)", (23, 31)), ("neighborhood((5, 7), stride=(2, 4))", (23, 31)), ("neighborhood(5, dilation=3)", (23, 31)),
    ("neighborhood(3, causal=(True, False, False))", (6, 9, 11)), ("halo(4, 1)", (23, 31)), ("window(5, shift=2)", (23, 31)),
    ("neighborhood(33, stride=16)", (600,)),
])  # fmt: skip
def test_row_major_tiles_are_the_blocks_flex_visits(pattern, grid):
    x = torch.zeros(1, *grid, 1, 16)
    ((_, call),) = break_up(x, [Source(x, x, pattern)], scale=None, q_start=0, dropout=0.0, need_lse=False)[0]
    blocks = flex._block_mask(call)
    visited = blocks.kv_num_blocks + blocks.full_kv_num_blocks
    walk = walk_tiles(pattern, grid, flex.BLOCK, flex.BLOCK)
    assert (walk.visited, walk.most) == (int(visited.sum()), int(visited.max()))
    assert walk.computed_pairs == regard.plan(pattern, grid, backend="flex").computed_pairs


@pytest.mark.parametrize(("spec", "grid", "tile"), [
    ("Neighborhood(7)", (56, 56), (8, 8)), ("Neighborhood(7)", (56, 56), (14, 4)),
    ("Neighborhood(5, stride=2)", (24, 32), (8, 8)),
    ("Neighborhood((3, 5, 5))", (8, 16, 16), (4, 4, 8)), ("Neighborhood(5, dilation=2)", (32, 48), (8, 8)),
    ("Window(7)", (56, 56), (7, 7)), ("Neighborhood(8, stride=8)", (32, 64), (8, 8)), ("Grid(7)", (56, 56), (7, 7)),
])  # fmt: skip
def test_the_tiled_backend_computes_what_the_slowest_query_tile_needs(spec, grid, tile):
    """It gathers single keys, and pads the tiles of one shape to the widest of them: key tiles of one token, worst bound."""
    made = tile_plan(Geometry.on(spec, grid), tile)
    walk = walk_tiles(spec, grid, tile, (1,) * len(grid))
    visits = {len(keys) for part in made.parts for group in part for keys in group.keys}
    assert visits == {walk.most}
    assert made.tiles == walk.q_tiles
    assert made.computed_pairs == walk.q_tiles * math.prod(tile) * walk.most
    assert math.prod(grid) ** 2 / made.computed_pairs == walk.worst_bound


@pytest.mark.parametrize(("grid", "kernel", "q_tile", "k_tile"), [
    ((256, 256), 80, (16, 16), (16, 8)), ((30, 48, 80), (18, 24, 24), (4, 8, 8), (2, 8, 8)),
])  # fmt: skip
def test_row_major_tiles_waste_what_tiles_of_the_grid_save(grid, kernel, q_tile, k_tile):
    """The curse of many axes: runs of row-major tokens reach over whole rows, so at equal tile sizes they visit far more."""
    pattern = P.Neighborhood(kernel)
    tiled = walk_tiles(pattern, grid, q_tile, k_tile)
    raster = walk_tiles(pattern, grid, math.prod(q_tile), math.prod(k_tile))
    assert raster.visited > 1.5 * tiled.visited
    assert raster.wasted > tiled.wasted + 0.15
    line = walk_tiles("neighborhood(6400)", (65536,), (256,), (128,))
    assert line.tile_bound > 0.96 * line.bound  # on one axis there is no such curse


@given(walks())
@settings(max_examples=60, deadline=None)
def test_permuted_tokens_lie_in_their_tiles_and_come_back(drawn):
    pattern, grid, tile, _ = drawn
    dilation = dilation_of(pattern, grid)
    x = torch.arange(1, 1 + 2 * math.prod(grid)).reshape(2, *grid)
    tiles = to_tiles(x, tile, dilation)
    assert torch.equal(from_tiles(tiles, grid, tile, dilation), x)
    assert int((tiles > 0).sum()) == x.numel()
    named: dict = {}
    for place in places(grid):
        named.setdefault(of_tile(place, tile, dilation), []).append(int(x[(0, *place)]))
    found = [[n for n in run if n] for run in tiles[0].flatten(0, 1).tolist()]
    assert [run for run in found if run] == [named[name] for name in sorted(named)]


@pytest.mark.parametrize(("make", "quotes"), [
    (lambda: walk_tiles("axis(0) | axis(1)", (8, 8), 4, 4), "Axis(0) | Axis(1)"),
    (lambda: walk_tiles("window(4)", (8, 8), (4, 4, 4), 4), "one per axis of 2; got (4, 4, 4)"),
    (lambda: walk_tiles("window(4)", (8, 8), (4, 4), 4), "got (4, 4) and (4,)"),
    (lambda: walk_tiles("window(4)", (8, 8), (4, 0), (4, 4)), "q_tile[1] must be at least 1; got int 0"),
    (lambda: to_tiles(torch.zeros(2, 8), (4, 4)), "2 axes in the grid; got (2, 8)"),
    (lambda: to_tiles(torch.zeros(2, 8, 8), (4, 4), (1,)), "got (4, 4) and (1,)"),
    (lambda: from_tiles(torch.zeros(1, 1, 3, 16), (8, 8), (4, 4)), "expected x (batch, 1, 4, 16, ...); got (1, 1, 3, 16)"),
])  # fmt: skip
def test_errors_quote_what_was_given(make, quotes):
    with pytest.raises(ValueError, match=r".") as error:
        make()
    assert quotes in str(error.value)
