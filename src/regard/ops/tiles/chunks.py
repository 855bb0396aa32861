"""Rows gathered into tiles, and the chunks of tiles that run at once.

A tensor ``(batch, tokens, heads, dim)`` is a table of rows ``(batch * tokens, heads * dim)``; a tile is a set of its rows.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..calls.heads import repeat_heads
from .products import CACHED_SCORES, multiplies, triangle
from .tables import GroupTables, Index, block_tokens, ranges

BUFFER = 1 << 19
"""Elements of the keys gathered at once, per thread: small enough for the caches, large enough to amortise the calls."""


@dataclass
class Chunk:
    """Tiles that run at once: rows of their ``queries (n, tq)`` and ``keys (n, tk)``.

    ``mask`` is additive and broadcasts to ``(n, heads, tq, tk)``; ``blind (n, tq)`` marks queries that see nothing;
    ``offsets (classes, tq, tk)`` index the flattened bias table, ``kinds (n)`` say of which class each tile is; ``causal``
    tiles show their lower triangle.
    """

    queries: Index
    keys: Index
    mask: Tensor | None
    blind: Tensor | None
    offsets: Tensor | None = None
    kinds: Tensor | None = None
    causal: bool = False


class Rows:
    """Rows ``(batch * tokens, heads * dim)`` of a ``(batch, tokens, heads, dim)`` tensor, gathered into tiles.

    Tiles of rows of the same ``role`` take the same memory, one after another.
    """

    def __init__(self, tensor: Tensor, dtype: torch.dtype, role: str) -> None:
        tensor = tensor.flatten(1, -3).to(dtype)
        self.batch, self.tokens, self.heads, self.dim = tensor.shape
        try:
            self.rows = tensor.view(self.batch * self.tokens, self.heads * self.dim)
        except RuntimeError:
            self.rows = tensor.reshape(self.batch * self.tokens, self.heads * self.dim)
        if self.rows.stride(1) != 1:  # an expanded gradient
            self.rows = self.rows.contiguous()
        self.role = role

    def gather(self, index: Index, heads: int, width: int) -> Tensor:
        """``(n, heads, t, width)`` for rows ``(n, t)``: heads repeated to ``heads``, dim padded with zeros to ``width``."""
        n, t = index.rows.shape
        if index.steps is not None:
            first, across, along = index.steps
            tile = self.rows[index.base + first :].as_strided(
                (n, self.heads, t, self.dim),
                (across * self.rows.stride(0), self.dim, along * self.rows.stride(0), 1),
            )
        else:
            rows, tile = _scratch(self.role, n, t, self.heads, self.dim, self.rows)
            torch.index_select(index.of(self.rows), 0, index.flat, out=rows)
        tile = repeat_heads(tile, heads, 1)
        if width != self.dim:
            tile = F.pad(tile, (0, width - self.dim))
        return tile


class _Kept(threading.local):
    """What a thread keeps: for each role and type the memory, and the shapes it has been seen in."""

    def __init__(self) -> None:
        self.memory: dict[tuple[str, torch.dtype], Tensor] = {}
        self.seen: dict[tuple[str, torch.dtype], dict[tuple[int, ...], tuple[Tensor, Tensor]]] = {}


_KEPT = _Kept()


def _scratch(role: str, n: int, t: int, heads: int, dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised rows ``(n * t, heads * dim)`` and the same memory as tiles ``(n, heads, t, dim)``.

    On a CPU it is this thread's own, kept between calls: new pages cost as much as what is written to them, and a view costs
    as much as a small operator.
    """
    size = n * t * heads * dim
    if like.device.type != "cpu" or size > 2 * BUFFER:
        return _as_tiles(like.new_empty(size), n, t, heads, dim)
    key, shape = (role, like.dtype), (n, t, heads, dim)
    seen = _KEPT.seen.setdefault(key, {})
    if shape not in seen:
        memory = _KEPT.memory.get(key)
        if memory is None or len(memory) < size or len(seen) > 64:
            seen.clear()
            with torch.inference_mode(False):
                memory = _KEPT.memory[key] = torch.empty(max(size, BUFFER), dtype=like.dtype)
        seen[shape] = _as_tiles(memory[:size], *shape)
    return seen[shape]


def _as_tiles(memory: Tensor, n: int, t: int, heads: int, dim: int) -> tuple[Tensor, Tensor]:
    return memory.view(n * t, heads * dim), memory.view(n, t, heads, dim).transpose(1, 2)


def to_rows(tile: Tensor, heads: int, width: int) -> Tensor:
    """``(n, heads, t, width)`` back to rows ``(n * t, heads * width)``, summing repeated heads, dropping padding."""
    tile = tile.transpose(1, 2)
    if tile.shape[3] != width:
        tile = tile[..., :width]
    if tile.shape[2] != heads:
        tile = tile.unflatten(2, (heads, -1)).sum(3)
    return tile.reshape(-1, heads * width)


@dataclass
class Problem:
    """The operands of one call as rows, and what its tiles need to know.

    Where routed ``blocks`` differ per head, the heads are folded into the batch (``folded`` of them per batch item, else 1), so
    that here ``blocks`` is always ``(batch or 1, query_blocks, listed)``. ``parallel`` chunks are for several threads at once;
    ``stored`` tells that the scores of a chunk will be, ``multiplied`` that those of small tiles may be, see
    :func:`regard.ops.tiles.products.multiplies`, ``need_lse`` whether the log-sum-exp is of use, and ``exact`` that a number is
    not finite, see :func:`regard.ops.tiles.products.shown_products`.
    """

    q: Rows
    k: Rows
    v: Rows
    scale: float
    table: Tensor | None
    valid: Tensor | None
    blocks: Tensor | None
    folded: int
    parallel: bool = False
    stored: bool = False
    multiplied: bool = False
    need_lse: bool = True
    exact: bool = False

    @property
    def heads(self) -> int:
        return self.q.heads

    @property
    def statistics(self) -> torch.dtype:
        """The type of scores, masks and biases."""
        return torch.float64 if self.q.rows.dtype == torch.float64 else torch.float32

    @property
    def width(self) -> int:
        """The one head width of the fused operator."""
        return max(self.q.dim, self.v.dim)

    def tiles_at_once(self, tq: int, tk: int) -> int:
        """How many tiles of ``tq`` queries and ``tk`` keys make a chunk."""
        limit, scores, device = BUFFER // (tk * self.k.heads * self.k.dim), self.heads * tq * tk, self.q.rows.device
        if self.stored or (self.multiplied and multiplies(device, scores, tk)):
            limit = min(limit, CACHED_SCORES // scores)
        return max(1, limit if device.type == "cpu" else limit * 64)

    def fold(self, tensor: Tensor) -> Tensor:
        """``(batch, *grid, heads, dim)`` as ``(batch * heads, *grid, 1, dim)`` where heads are folded."""
        return fold_heads(tensor, self.folded)

    def unfold(self, rows: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Rows back to ``shape (batch, *grid, heads, dim)``, summing repeated heads."""
        if self.folded > 1:
            batch, heads, dim = shape[0], shape[-2], shape[-1]
            rows = rows.view(batch, heads, self.folded // heads, -1, dim).sum(2).transpose(1, 2)
        return rows.reshape(shape).to(dtype).contiguous()


def fold_heads(tensor: Tensor, heads: int) -> Tensor:
    """``(batch, *grid, heads, dim)`` to ``(batch * heads, *grid, 1, dim)``, repeating up to ``heads``; 1 folds nothing."""
    if heads == 1:
        return tensor
    tensor = repeat_heads(tensor, heads)
    return tensor.movedim(-2, 1).flatten(0, 1).unsqueeze(-2)


def pose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    valid: Tensor | None,
    blocks: Tensor | None,
    scale: float,
    narrow: bool = False,
    parallel: bool = False,
    stored: bool = False,
    multiplied: bool = False,
    exact: bool = False,
) -> Problem:
    """The problem of ``q``, ``k``, ``v`` ``(batch, *grid, heads, dim)``, in float32 (float64 for float64).

    ``narrow`` leaves the rows as they are; biases, masks and the softmax are in float32 all the same. Rows of keys that do not
    exist are zero here: whatever they hold reaches nobody.
    """
    statistics = torch.float64 if q.dtype == torch.float64 else torch.float32
    kind = q.dtype if narrow else statistics
    folded = q.shape[-2] if blocks is not None and blocks.shape[1] > 1 else 1
    if blocks is not None:
        blocks = blocks.expand(q.shape[0], -1, -1, -1).flatten(0, 1) if folded > 1 else blocks[:, 0]
    if valid is not None:
        k, v = (t.masked_fill(~valid[..., None, None], 0.0) for t in (k, v))
        valid = valid.expand(q.shape[0], *valid.shape[1:]).repeat_interleave(folded, 0)
    q_rows, k_rows, v_rows = (Rows(fold_heads(t, folded), kind, role) for t, role in zip((q, k, v), "qkv", strict=True))
    table = None if table is None else table.to(statistics)
    return Problem(q_rows, k_rows, v_rows, scale, table, valid, blocks, folded, parallel, stored, multiplied, exact=exact)


def static_chunks(problem: Problem, tables: tuple[GroupTables, ...]) -> Iterator[Chunk]:
    """Chunks of one part of a static pattern."""
    for group in tables:
        tiles = len(group.keys)
        limit = problem.tiles_at_once(group.queries.shape[1], group.keys.shape[1])
        bias = _Bias(problem.table, group) if problem.table is not None and group.offsets is not None else None
        if problem.valid is None and not problem.stored and group.views(problem.q.batch):
            limit = tiles * problem.q.batch
        whole = max(1, limit // tiles)  # batch items at once
        for item in range(0, problem.q.batch, whole):
            items = min(whole, problem.q.batch - item)
            for first, last in ranges(tiles, group.row, limit):
                yield _static_chunk(problem, group, bias, item, items, first, last)


class _Bias:
    """The bias of the tiles of a group, in one call; rows of tiles of the same classes share one tensor."""

    def __init__(self, table: Tensor, group: GroupTables) -> None:
        assert group.offsets is not None
        flat = table.flatten(1).index_select(1, group.offsets.reshape(-1))
        self.classes = flat.unflatten(1, group.offsets.shape).transpose(0, 1)  # (classes, heads, tq, tk)
        if group.visible is not None:
            self.classes = self.classes.masked_fill(~group.visible[:, None], -torch.inf)
        self._seen: dict[tuple[bytes, int], Tensor] = {}

    def of(self, group: GroupTables, first: int, last: int, items: int) -> Tensor:
        """``(items * (last - first), heads, tq, tk)`` of a range of tiles."""
        key = (group.kind_names[first:last].tobytes(), items)
        if key not in self._seen:
            if len(self._seen) >= 4:
                self._seen.clear()
            self._seen[key] = _per_tile(self.classes, group, first, last, items)
        return self._seen[key]


def _per_tile(values: Tensor, group: GroupTables, first: int, last: int, items: int) -> Tensor:
    """What is known per class, for each of a range of tiles in ``items`` batch items."""
    if len(values) == 1:
        return values.expand(items * (last - first), *values.shape[1:])
    of_one = values[group.kinds[first:last]]
    return of_one if items == 1 else of_one.repeat(items, *[1] * (values.ndim - 1))


def _static_chunk(
    problem: Problem, group: GroupTables, bias: _Bias | None, item: int, items: int, first: int, last: int
) -> Chunk:
    queries, keys = group.indices(first, last, items)
    queries = replace(queries, base=item * problem.q.tokens)
    keys = replace(keys, base=item * problem.k.tokens)
    tiles = (group, first, last, items)
    mask = group.mask(first, last, items, problem.statistics) if bias is None else bias.of(*tiles)
    blind = None if group.blind is None else _per_tile(group.blind, *tiles)
    kinds = None if group.offsets is None else group.kinds[first:last].repeat(items)
    causal = group.causal and problem.valid is None
    if problem.valid is not None:
        if group.causal:
            mask = triangle(problem.q.tokens, problem.k.tokens, problem.statistics, problem.q.rows.device)
        mask, blind = _with_valid(mask, problem.valid.reshape(-1)[keys.base :][keys.rows], problem.statistics)
    return Chunk(queries, keys, mask, blind, group.offsets, kinds, causal)


def _with_valid(mask: Tensor | None, valid: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Restrict a mask to valid keys ``(n, tk)``; also tells which queries are left with none."""
    hidden = torch.zeros(valid.shape, dtype=dtype, device=valid.device).masked_fill_(~valid, -torch.inf)[:, None, None]
    mask = hidden if mask is None else mask.masked_fill(~valid[:, None, None], -torch.inf)
    return mask, (mask == -torch.inf).all(-1).all(1)


def routed_chunks(problem: Problem, block: Sequence[int], q_grid: Sequence[int], k_grid: Sequence[int]) -> Iterator[Chunk]:
    """Chunks of routed blocks."""
    blocks = problem.blocks
    assert blocks is not None
    q_tokens, q_real = block_tokens(tuple(q_grid), tuple(block), blocks.device)
    k_tokens, k_real = block_tokens(tuple(k_grid), tuple(block), blocks.device)
    batch, number, listed = blocks.shape
    check_listed(blocks, len(q_tokens), len(k_tokens))
    ordered = listed_once(blocks.long())
    tq, tk = q_tokens.shape[1], listed * k_tokens.shape[1]
    limit = problem.tiles_at_once(tq, tk)
    uneven = not bool(q_real.all())
    for item in range(problem.q.batch):
        table = ordered[item % batch if batch > 1 else 0]
        for first in range(0, number, limit):
            some = table[first : first + limit]
            keys = k_tokens[some.clamp(min=0)].flatten(1)  # (n, tk)
            seen = (k_real[some.clamp(min=0)] & (some >= 0)[..., None]).flatten(1)
            if problem.valid is not None:
                seen = seen & problem.valid.reshape(problem.q.batch, -1)[item][keys]
            queries = q_tokens[first : first + limit]
            if uneven:
                yield from _uneven(queries, q_real[first : first + limit], keys, seen, item, problem)
            else:
                yield _routed_chunk(queries, keys, seen, item, problem, tq)


def check_listed(blocks: Tensor, query_blocks: int, key_blocks: int) -> None:
    """Check a table ``(..., query_blocks, listed)`` of numbers of key blocks, -1 for none: what it names is gathered.

    Raises:
        ValueError: another number of query blocks, or a key block that is not there.
    """
    if blocks.shape[-2] != query_blocks:
        raise ValueError(f"the table lists {blocks.shape[-2]} query blocks; there are {query_blocks}")
    least, most = (int(end) for end in blocks.aminmax())
    if least < -1 or most >= key_blocks:
        raise ValueError(f"the table lists key blocks from {least} to {most}; allowed are -1 (none) to {key_blocks - 1}")


def listed_once(blocks: Tensor) -> Tensor:
    """Block lists ``(..., listed)`` in order, -1 for what is not there: a block listed twice counts once."""
    ordered = blocks.sort(-1).values
    ordered[..., 1:].masked_fill_(ordered[..., 1:] == ordered[..., :-1], -1)
    return ordered


def _uneven(queries: Tensor, real: Tensor, keys: Tensor, seen: Tensor, item: int, problem: Problem) -> Iterator[Chunk]:
    """Partial blocks at the end of the grid, by their number of queries."""
    sizes = real.sum(1)
    for size in sizes.unique().tolist():
        of = sizes == size
        chosen = queries[of][real[of]].view(-1, size)
        yield _routed_chunk(chosen, keys[of], seen[of], item, problem, size)


def _routed_chunk(queries: Tensor, keys: Tensor, seen: Tensor, item: int, problem: Problem, tq: int) -> Chunk:
    mask = blind = None
    if not bool(seen.all()):
        mask, _ = _with_valid(None, seen, problem.statistics)
        blind = ~seen.any(1, keepdim=True).expand(-1, tq)
        mask = mask.expand(-1, 1, tq, -1)
    return Chunk(Index(queries, item * problem.q.tokens), Index(keys, item * problem.k.tokens), mask, blind)
