"""Attention in two halves, where the scores themselves are wanted: products with each neighbour, and sums over them.

    neighbor_scores:  s[p, t] = q[p] . k[n(p, t)]
    neighbor_sum:     y[p] = sum_t w[p, t] v[n(p, t)],   n(p, t) the key at tap t of the window of p

Between them lies whatever a model does to scores and weights: biases, softmax, dropout. Both are linear in each argument and
their gradients are made of the same products and sums, differentiable again; tiles of queries are multiplied with the keys
of their windows, and the taps picked out of (or put into) the small matrices.

Cost: the pairs of the tile plan; memory the scores, kernel volume times tokens, in both directions. Source: Hassani et al.,
NAT, arXiv:2204.07143.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ...caches import cached
from ...checks import check_grid, check_tensor, check_tensors, check_tokens
from ...counted import register_flop_formula
from ..calls.geometry import Geometry
from ..patterns import Pattern, Separable, as_pattern, parse
from ..tiles.chunks import BUFFER, Rows
from ..tiles.plan import TileGroup, TilePlan, tile_plan
from ..tiles.tables import GroupTables, Index, tables_of
from ..tracing import constant_in_graphs
from ..transforms import differentiated, is_finite, readable


def neighbor_scores(q: Tensor, k: Tensor, pattern: Pattern | str) -> Tensor:
    """The products of each query with the keys it sees, in the order of its window.

    Args:
        q: queries ``(batch, *grid, heads, dim)``, scaled by the caller.
        k: keys of the same shape.
        pattern: a separable pattern on this grid, without zero keys outside it.

    Returns:
        ``(batch, *grid, heads, taps)``, the taps in row-major order of the window from its first key on; ``-inf`` where a
        window is shorter than the longest one.

    Raises:
        ValueError: shapes that differ, or another kind of pattern.
    """
    check_tensors(q=q, k=k)
    pattern, grid = _checked(pattern, q, k, "q and k", q.shape == k.shape)
    products = _products_by_tap if differentiated(q, k) else neighbor_products
    return _unfolded(products(_folded(q), _folded(k), pattern.spec, list(grid), -torch.inf), q)


def neighbor_sum(weights: Tensor, v: Tensor, pattern: Pattern | str) -> Tensor:
    """Sum the values that each query sees, each with its own weight.

    Args:
        weights: ``(batch, *grid, heads, taps)``, ordered as :func:`neighbor_scores` returns them; those without a key do not
            count.
        v: values ``(batch, *grid, heads, dim)``.
        pattern: as for :func:`neighbor_scores`.

    Returns:
        ``(batch, *grid, heads, dim)`` in the dtype of ``v``.

    Raises:
        ValueError: weights that do not fit the values and the pattern, or another kind of pattern.
    """
    check_tensors(weights=weights, v=v)
    pattern, grid = _checked(pattern, weights, v, "weights and v", weights.shape[:-1] == v.shape[:-1])
    taps = math.prod(_taps(pattern.spec, grid))
    if weights.shape[-1] != taps:
        raise ValueError(f"{pattern!r} has {taps} taps on the grid {grid}; got weights {tuple(weights.shape)}")
    sums = _sums_by_tap if differentiated(weights, v) else neighbor_sums
    return _unfolded(sums(_folded(weights), _folded(v), pattern.spec, list(grid)), v)


def neighbor_bias(table: Tensor, pattern: Pattern | str, grid: Sequence[int]) -> Tensor:
    """A bias over relative offsets in the layout of :func:`neighbor_scores`.

    Args:
        table: ``(heads, *offsets)``, ``2 * extent + 1`` entries per axis as in :class:`regard.layers.positions.OffsetBias`.
        pattern: as for :func:`neighbor_scores`.
        grid: of the queries.

    Returns:
        ``(*grid, heads, taps)``; any value where a window has no key.

    Raises:
        ValueError: a table of other sizes, or another kind of pattern.
    """
    check_tensor("table", table, what="(heads, *offsets)")
    grid = tuple(map(operator.index, check_grid("grid", grid)))
    pattern = _separable(pattern, grid)
    sizes = tuple(2 * pattern.extent(axis, n, len(grid)) + 1 for axis, n in enumerate(grid))
    if tuple(table.shape[1:]) != sizes:
        raise ValueError(f"{pattern!r} needs a bias table (heads, {', '.join(map(str, sizes))}); got {tuple(table.shape)}")
    index = _constant_offsets(pattern.spec, grid, sizes, table.device)
    bias = table.flatten(1).index_select(1, index)
    return bias.view(len(table), *grid, math.prod(_taps(pattern.spec, grid))).movedim(0, -2)


def _checked(pattern: Pattern | str, a: Tensor, b: Tensor, names: str, agree: bool) -> tuple[Separable, tuple[int, ...]]:
    if a.ndim < 4 or not agree:
        raise ValueError(
            f"{names} must be (batch, *grid, heads, dim) on the same grid; got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if 0 in (*a.shape[1:], *b.shape[1:]):
        raise ValueError(f"no axis of {names} may be empty but the batch; got {tuple(a.shape)} and {tuple(b.shape)}")
    grid = tuple(map(operator.index, a.shape[1:-2]))
    return _separable(pattern, grid), grid


def _separable(pattern: Pattern | str, grid: tuple[int, ...]) -> Separable:
    check_tokens(grid=grid)
    pattern = as_pattern(pattern)
    product = pattern.as_product(len(grid))
    if product is None or pattern.flat:
        raise ValueError(f"expected a pattern that is a product of windows on the axes; got {pattern!r}")
    pattern.check(grid, grid)
    if any(any(pattern.zero_keys(axis, n, len(grid))) for axis, n in enumerate(grid)):
        raise ValueError(f"expected a pattern without zero keys outside the grid; got {pattern!r}")
    return product


def _folded(tensor: Tensor) -> Tensor:
    """``(batch, *grid, heads, dim)`` as ``(batch * heads, tokens, dim)``."""
    return tensor.movedim(-2, 1).flatten(2, -2).flatten(0, 1)


def _unfolded(tensor: Tensor, like: Tensor) -> Tensor:
    """``(batch * heads, tokens, dim)`` as ``(batch, *grid, heads, dim)``, in the memory of its transposed form."""
    batch, *grid, heads, _ = like.shape
    return tensor.unflatten(1, grid).unflatten(0, (batch, heads)).movedim(1, -2)


@dataclass(frozen=True, eq=False)
class Taps:
    """Where the taps of the queries of a tile stand among its keys: ``columns`` and ``absent``, ``(classes, tq, taps)``.

    ``absent`` marks the taps that have no key, None where all have; their column is one past the keys.
    """

    tables: GroupTables
    columns: Tensor
    absent: Tensor | None


def _plan(spec: str, grid: tuple[int, ...]) -> TilePlan:
    plan = tile_plan(Geometry.on(spec, grid))
    assert plan is not None  # the pattern is separable
    return plan


@cached(256)
def _windows(spec: str, grid: tuple[int, ...]) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], ...]:
    """First key, number of keys and step of each query, per axis."""
    pattern = parse(spec).as_product(len(grid))
    assert pattern is not None  # it was checked
    windows = []
    for axis, n in enumerate(grid):
        start, count, step = pattern.axis_window(axis, np.arange(n), n, len(grid))
        windows.append((np.broadcast_to(start, (n,)), np.broadcast_to(count, (n,)), np.broadcast_to(step, (n,))))
    return tuple(windows)


@constant_in_graphs
def _taps(spec: str, grid: tuple[int, ...]) -> tuple[int, ...]:
    """Taps per axis: the longest window there."""
    return tuple(int(count.max()) for _, count, _ in _windows(spec, grid))


def _keys(spec: str, grid: tuple[int, ...], queries: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coordinates ``(rank, n, taps)`` of the keys at each tap of flat ``queries``, their flat index, and which exist."""
    taps = _taps(spec, grid)
    places = np.unravel_index(queries, grid)
    steps = np.unravel_index(np.arange(math.prod(taps)), taps)
    shape = (len(queries), math.prod(taps))
    coordinates, flat, real = [], np.zeros(shape, dtype=np.int64), np.ones(shape, dtype=bool)
    for axis, (start, count, step) in enumerate(_windows(spec, grid)):
        at, tap = places[axis], steps[axis]
        coordinates.append(start[at][:, None] + tap * step[at][:, None])
        flat = flat * grid[axis] + coordinates[-1]
        real &= tap < count[at][:, None]
    return np.stack(coordinates), flat, real


@cached(64)
def _offsets(spec: str, grid: tuple[int, ...], sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Index into the flattened table of each tap of each token, ``(tokens * taps)``."""
    pattern, tokens = parse(spec), np.arange(math.prod(grid))
    keys, _, real = _keys(spec, grid, tokens)
    index = np.zeros(real.shape, dtype=np.int64)
    for axis, at in enumerate(np.unravel_index(tokens, grid)):
        steps = pattern.offset(axis, at[:, None], keys[axis], grid[axis], len(grid))
        index = index * sizes[axis] + np.where(real, steps, 0) + sizes[axis] // 2
    return torch.from_numpy(index.reshape(-1)).to(device)


@constant_in_graphs
def _constant_offsets(spec: str, grid: tuple[int, ...], sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """A graph under trace sees the index, not how it is made."""
    return _offsets(spec, grid, sizes, device)


@cached(64)
def _places(spec: str, grid: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Flat index of the key at each tap of each token ``(tokens, taps)``, and which taps have one."""
    _, flat, real = _keys(spec, grid, np.arange(math.prod(grid)))
    return np.where(real, flat, 0), real


def _gathered(x: Tensor, spec: str, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
    """``x (items, tokens, dim)`` at each tap ``(items, tokens, taps, dim)``, and which taps have no key ``(tokens, taps)``."""
    flat, real = _places(spec, tuple(map(operator.index, grid)))
    at, absent = torch.from_numpy(flat).to(x.device), torch.from_numpy(~real).to(x.device)
    found = x.index_select(1, at.flatten()).unflatten(1, at.shape)
    return found.masked_fill(absent[..., None], 0.0), absent


def _products_by_tap(q: Tensor, k: Tensor, spec: str, grid: list[int], fill: float) -> Tensor:
    """:func:`neighbor_products` in operators of torch that know all transforms; every key is moved once for each tap."""
    keys, absent = _gathered(k, spec, grid)
    return (q.unsqueeze(2) * keys).sum(-1).masked_fill(absent, fill)


def _sums_by_tap(weights: Tensor, v: Tensor, spec: str, grid: list[int]) -> Tensor:
    """:func:`neighbor_sums` likewise."""
    values, absent = _gathered(v, spec, grid)
    return (weights.masked_fill(absent, 0.0).unsqueeze(-1) * values).sum(2)


def _shares_by_tap(weights: Tensor, x: Tensor, spec: str, grid: list[int]) -> Tensor:
    """:func:`neighbor_shares` likewise, for plain gradients."""
    flat, real = _places(spec, tuple(map(operator.index, grid)))
    sent = (weights.unsqueeze(-1) * x.unsqueeze(2))[:, torch.from_numpy(real).to(x.device)]
    return torch.zeros_like(x).index_add_(1, torch.from_numpy(flat[real]).to(x.device), sent.to(x.dtype))


def _spoils(values: Tensor, weights: Tensor) -> bool:
    """Whether the zeros beside the taps of a tile would spread a value that is not finite."""
    return readable(values) and not (is_finite(values) and is_finite(weights))


@cached(64)
def _taps_of(spec: str, grid: tuple[int, ...], device: torch.device) -> tuple[Taps, ...]:
    plan = _plan(spec, grid)
    return tuple(
        _place(group, tables, spec, grid, device)
        for group, tables in zip(plan.parts[0], tables_of(plan, device)[0], strict=True)
    )


def _place(group: TileGroup, tables: GroupTables, spec: str, grid: tuple[int, ...], device: torch.device) -> Taps:
    """The taps of a tile group. Tiles of one class show the same places to each query, so one tile speaks for its class."""
    each = []
    for first in np.unique(group.kinds, return_index=True)[1]:
        queries, keys = group.queries[first], group.keys[first]
        _, flat, real = _keys(spec, grid, queries)
        order = np.argsort(keys, kind="stable")  # a key may be repeated where a tile is wider than the grid
        columns = order[np.searchsorted(keys[order], flat).clip(max=len(keys) - 1)]
        each.append(np.where(real, columns, len(keys)))
    columns = torch.from_numpy(np.stack(each))
    absent = columns == group.keys.shape[1]
    return Taps(tables, columns.to(device), absent.to(device) if bool(absent.any()) else None)


@dataclass
class Tile:
    """Tiles that run at once: rows of their ``queries`` and ``keys``, and their taps ``(n, tq, taps)``."""

    queries: Index
    keys: Index
    columns: Tensor
    absent: Tensor | None

    def pick(self, products: Tensor, fill: float) -> Tensor:
        """The taps ``(n, tq, taps)`` of products ``(n, tq, tk)``; ``fill`` where there is no key."""
        if self.absent is None:
            return products.gather(-1, self.columns)
        found = products.gather(-1, self.columns.clamp(max=products.shape[-1] - 1))
        return found.masked_fill_(self.absent, fill)

    def place(self, taps: Tensor) -> Tensor:
        """The matrices ``(n, tq, tk)`` with taps ``(n, tq, taps)`` in their places and 0 elsewhere."""
        n, tq = taps.shape[:2]
        keys = self.keys.rows.shape[1]
        matrix = taps.new_zeros(n, tq, keys + (self.absent is not None)).scatter_(-1, self.columns, taps)
        return matrix[..., :keys]


def _tiles(spec: str, grid: Sequence[int], items: int, dim: int, device: torch.device) -> Iterator[Tile]:
    """The tiles of ``items`` independent maps, as many at once as the caches hold."""
    grid = tuple(map(operator.index, grid))
    tokens = math.prod(grid)
    buffer = BUFFER * (torch.get_num_threads() if device.type == "cpu" else 64)
    for taps in _taps_of(spec, grid, device):
        group = taps.tables
        number, tk = group.keys.shape
        limit = max(1, buffer // (tk * max(dim, group.queries.shape[1])))
        whole = max(1, limit // number)
        for item, first in itertools.product(range(0, items, whole), range(0, number, limit)):
            count, last = min(whole, items - item), min(first + limit, number)
            queries, keys = group.indices(first, last, count)
            kinds = group.kinds[first:last]
            columns, absent = (None if t is None else t[kinds].repeat(count, 1, 1) for t in (taps.columns, taps.absent))
            assert columns is not None
            yield Tile(replace(queries, base=item * tokens), replace(keys, base=item * tokens), columns, absent)


def _rows(tensor: Tensor, role: str) -> Rows:
    return Rows(tensor.unsqueeze(-2), torch.float64 if tensor.dtype == torch.float64 else torch.float32, role)


def _tile(rows: Rows, index: Index) -> Tensor:
    return rows.gather(index, 1, rows.dim)[:, 0]


@torch.library.custom_op("regard::neighbor_products", mutates_args=())
def neighbor_products(q: Tensor, k: Tensor, spec: str, grid: list[int], fill: float) -> Tensor:
    """Products ``(items, tokens, taps)`` of ``q`` with ``k``, both ``(items, tokens, dim)``; ``fill`` where there is no key."""
    queries, keys = _rows(q, "q"), _rows(k, "k")
    out = queries.rows.new_empty(len(queries.rows), math.prod(_taps(spec, tuple(grid))))
    with torch.autocast(q.device.type, enabled=False):
        for tile in _tiles(spec, grid, len(q), queries.dim, q.device):
            products = torch.matmul(_tile(queries, tile.queries), _tile(keys, tile.keys).mT)
            tile.queries.put(out, tile.pick(products, fill).flatten(0, 1))
    return out.view(*q.shape[:2], out.shape[-1]).to(q.dtype)


@torch.library.custom_op("regard::neighbor_sums", mutates_args=())
def neighbor_sums(weights: Tensor, v: Tensor, spec: str, grid: list[int]) -> Tensor:
    """Sums ``(items, tokens, dim)`` of ``v (items, tokens, dim)`` with ``weights (items, tokens, taps)``."""
    if _spoils(v, weights):
        return _sums_by_tap(weights, v, spec, grid)
    taps, values = _rows(weights, "taps"), _rows(v, "v")
    out = torch.empty_like(values.rows)
    with torch.autocast(v.device.type, enabled=False):
        for tile in _tiles(spec, grid, len(v), values.dim, v.device):
            sums = torch.matmul(tile.place(_tile(taps, tile.queries)), _tile(values, tile.keys))
            tile.queries.put(out, sums.flatten(0, 1))
    return out.view(v.shape).to(v.dtype)


@torch.library.custom_op("regard::neighbor_shares", mutates_args=())
def neighbor_shares(weights: Tensor, x: Tensor, spec: str, grid: list[int]) -> Tensor:
    """What each key receives ``(items, tokens, dim)`` when queries send ``x`` with ``weights``: the transposed sum."""
    if _spoils(x, weights):
        return _shares_by_tap(weights, x, spec, grid)
    taps, sent = _rows(weights, "taps"), _rows(x, "sent")
    out = torch.zeros_like(sent.rows)
    with torch.autocast(x.device.type, enabled=False):
        for tile in _tiles(spec, grid, len(x), sent.dim, x.device):
            shares = torch.matmul(tile.place(_tile(taps, tile.queries)).mT, _tile(sent, tile.queries))
            tile.keys.add(out, shares.flatten(0, 1))
    return out.view(x.shape).to(x.dtype)


@neighbor_products.register_fake
def _(q, k, spec, grid, fill):
    return q.new_empty(*q.shape[:2], math.prod(_taps(spec, tuple(grid))))


@neighbor_sums.register_fake
def _(weights, v, spec, grid):
    return v.new_empty(v.shape)


@neighbor_shares.register_fake
def _(weights, x, spec, grid):
    return x.new_empty(x.shape)


def _keep(ctx, inputs, output):
    a, b, ctx.spec, ctx.grid, *_ = inputs
    ctx.save_for_backward(a, b)


def _products_backward(ctx, grad):
    q, k = ctx.saved_tensors
    need_q, need_k, *_ = ctx.needs_input_grad
    grad_q = neighbor_sums(grad, k, ctx.spec, ctx.grid) if need_q else None
    return grad_q, neighbor_shares(grad, q, ctx.spec, ctx.grid) if need_k else None, None, None, None


def _sums_backward(ctx, grad):
    weights, v = ctx.saved_tensors
    need_weights, need_v, *_ = ctx.needs_input_grad
    grad_weights = neighbor_products(grad, v, ctx.spec, ctx.grid, 0.0) if need_weights else None
    return grad_weights, neighbor_shares(weights, grad, ctx.spec, ctx.grid) if need_v else None, None, None


def _shares_backward(ctx, grad):
    weights, x = ctx.saved_tensors
    need_weights, need_x, *_ = ctx.needs_input_grad
    grad_weights = neighbor_products(x, grad, ctx.spec, ctx.grid, 0.0) if need_weights else None
    return grad_weights, neighbor_sums(weights, grad, ctx.spec, ctx.grid) if need_x else None, None, None


neighbor_products.register_autograd(_products_backward, setup_context=_keep)
neighbor_sums.register_autograd(_sums_backward, setup_context=_keep)
neighbor_shares.register_autograd(_shares_backward, setup_context=_keep)


@register_flop_formula([torch.ops.regard.neighbor_products, torch.ops.regard.neighbor_sums, torch.ops.regard.neighbor_shares])
def _flops(a, b, spec, grid, *_, **__) -> int:
    return 2 * b[0] * b[2] * _plan(spec, tuple(grid)).computed_pairs
