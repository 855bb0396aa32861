"""Tiles of queries against the keys they need: gather, fused attention, scatter.

    for a few tiles at a time: gather the rows of q, k and v by index table; attend; put the rows of the output back

Cost: the pairs of the tile plan (about twice those of the pattern for small kernels) and O(tokens) memory, in both
directions. The backward gathers again, recomputes with the saved log-sum-exp and adds the gradients of k and v back by row.
On CPU the tiles run on torch's fused CPU attention, elsewhere (and where a bias or the lse needs a gradient) on matrix
products. The same plan serves windows, neighborhoods, halos, grids, axes, their unions, and routed blocks.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..call import Call
from ..merging import merge
from ..patterns import Blocks, Ints
from ..tiling import TileGroup, TilePlan, tile_plan
from . import dense, reference

BUFFER = 1 << 19
"""Elements of the keys gathered at once, per thread: small enough for the caches, large enough to amortise the calls."""


def supports(call: Call) -> str | None:
    if call.bias is not None:
        return "a dense bias belongs to dense attention"
    if call.dropout:
        return "no attention dropout"
    if isinstance(call.pattern, Blocks):
        return "no relative bias over routed blocks" if call.table is not None else None
    if not call.pattern.static:
        return f"{call.pattern!r} is routed but not in blocks"
    if _plan_pairs(*_plan_key(call)) is None:
        return f"{call.pattern!r} is not a union or intersection of patterns separable by axis"
    return None


def prefers(call: Call) -> bool:
    """Whether the tiles are expected to beat dense attention."""
    return computed_pairs(call) * 2.5 <= call.queries * call.keys


def computed_pairs(call: Call) -> int:
    """Pairs of query and key computed per batch item and head."""
    if isinstance(call.pattern, Blocks):
        size = math.prod(_block_sizes(call.pattern.block, call.k_grid))
        return math.prod(call.pattern.block_grid(call.q_grid)) * size * size * call.pattern.table.shape[-1]
    pairs = _plan_pairs(*_plan_key(call))
    return call.queries * call.keys if pairs is None else pairs


def plan_of(call: Call) -> TilePlan | None:
    return tile_plan(*_plan_key(call))


def _plan_key(call: Call) -> tuple:
    table = None if call.table is None else (call.table.pattern.spec, _ints(call.table.table.shape[1:]))
    return call.pattern.spec, _ints(call.q_grid), _ints(call.k_grid), _ints(call.q_start), tuple(map(_ints, call.zeros)), table


def _ints(sizes: Sequence[int]) -> tuple[int, ...]:
    """Sizes as plain numbers: a compiled graph is specialised to its grid."""
    return tuple(operator.index(n) for n in sizes)


@torch.compiler.assume_constant_result
def _plan_pairs(spec: str, q_grid, k_grid, q_start, zeros, table) -> int | None:
    """Pairs a plan computes, None where there is no plan. A graph under trace sees the number, not the planning."""
    plan = tile_plan(spec, q_grid, k_grid, q_start, zeros, table)
    return None if plan is None else plan.computed_pairs


def run(call: Call) -> tuple[Tensor, Tensor | None]:
    if torch.compiler.is_exporting():
        return _run_plain(call)
    routed = isinstance(call.pattern, Blocks)
    out, lse = tiled_attention(
        call.q, call.k, call.v,
        call.table.table if call.table else None,
        call.valid,
        call.pattern.table4() if routed else None,
        list(_block_sizes(call.pattern.block, call.k_grid)) if routed else [],
        "" if routed else call.pattern.spec,
        call.table.pattern.spec if call.table else "",
        list(call.q_start),
        [n for pair in call.zeros for n in pair],
        call.scale,
    )  # fmt: skip
    return out, lse if call.need_lse else None


def _block_sizes(block: Ints, grid: tuple[int, ...]) -> tuple[int, ...]:
    return block if isinstance(block, tuple) else (block,) * len(grid)


# --------------------------------------------------------------------------------------------------------------------
# tiles of a few queries and keys


@dataclass
class Index:
    """Rows of tiles ``(n, t)``, relative to row ``base``.

    Where together they are a contiguous range of rows, each once, ``span`` is that range and ``inverse`` the tile row that
    belongs to each of its rows: putting tiles back is then a gather too, which is faster than a scatter. Where row ``(i, j)``
    is ``first + i * across + j * along``, ``steps`` is ``(first, across, along)`` and the tiles are a view.
    """

    rows: Tensor
    base: int
    span: tuple[int, int] | None = None
    inverse: Tensor | None = None
    steps: tuple[int, int, int] | None = None

    def put(self, target: Tensor, tiles: Tensor) -> None:
        """Write tile rows ``(n * t, width)`` to the rows of ``target`` they came from."""
        if self.inverse is None or self.span is None:
            target[self.base :].index_copy_(0, self.rows.reshape(-1), tiles)
        else:
            first, last = self.span
            torch.index_select(tiles, 0, self.inverse, out=target[self.base + first : self.base + last])

    def add(self, target: Tensor, tiles: Tensor) -> None:
        """Add tile rows ``(n * t, width)`` to the rows of ``target`` they came from; a row may stand in several tiles."""
        target[self.base :].index_add_(0, self.rows.reshape(-1), tiles)


@dataclass
class Chunk:
    """Tiles that run at once: rows of their ``queries (n, tq)`` and ``keys (n, tk)``.

    ``mask`` is additive and broadcasts to ``(n, heads, tq, tk)``; ``blind (n, tq)`` marks queries that see nothing;
    ``offsets (n, tq, tk)`` index the flattened bias table; ``causal`` tiles show their lower triangle.
    """

    queries: Index
    keys: Index
    mask: Tensor | None
    blind: Tensor | None
    offsets: Tensor | None
    causal: bool = False


class GroupTables:
    """The index tables of a tile group on a device, and what is derived from them, made once."""

    def __init__(self, group: TileGroup, plan: TilePlan, device: torch.device) -> None:
        self.queries = torch.from_numpy(group.queries).to(device)
        self.keys = torch.from_numpy(group.keys).to(device)
        self.kinds = torch.from_numpy(group.kinds).to(device)
        self.kind_names = group.kinds.astype(np.int32)
        self.offsets = None if group.offsets is None else torch.from_numpy(group.offsets).to(device)
        self.visible = None if group.mask is None else torch.from_numpy(group.mask).to(device)
        self.blind = None if group.blind is None else torch.from_numpy(group.blind).to(device)
        self.row = group.row
        self.tokens = (plan.queries, plan.keys)
        self.causal = plan.causal
        self._masks: dict[tuple, Tensor] = {}
        self._indices: dict[tuple, tuple[Index, Index]] = {}

    def mask(self, first: int, last: int, items: int, dtype: torch.dtype) -> Tensor | None:
        """Additive mask ``(items * (last - first), 1, tq, tk)`` of a range of tiles; equal ranges share one tensor."""
        if self.visible is None:
            return None
        key = (self.kind_names[first:last].tobytes(), items, dtype)
        if key not in self._masks:
            if len(self._masks) >= 64:
                self._masks.clear()
            visible = self.visible[self.kinds[first:last]][:, None]
            mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
            self._masks[key] = mask.repeat(items, 1, 1, 1)
        return self._masks[key]

    def indices(self, first: int, last: int, items: int) -> tuple[Index, Index]:
        """Rows of the queries and keys of a range of tiles in the first ``items`` batch items."""
        key = (first, last, items)
        if key not in self._indices:
            self._indices[key] = tuple(
                _analysed(_over_items(table[first:last], items, tokens))
                for table, tokens in zip((self.queries, self.keys), self.tokens, strict=True)
            )  # type: ignore[assignment]  # two of them
        return self._indices[key]


def _over_items(table: Tensor, items: int, tokens: int) -> Tensor:
    if items == 1:
        return table
    return (torch.arange(items, device=table.device)[:, None, None] * tokens + table).flatten(0, 1)


def _analysed(rows: Tensor) -> Index:
    steps = _steps(rows)
    flat = rows.reshape(-1)
    first, last = int(flat.min()), int(flat.max()) + 1
    if last - first == len(flat):
        inverse = torch.full((last - first,), -1, dtype=torch.long, device=flat.device)
        inverse[flat - first] = torch.arange(len(flat), device=flat.device)
        if bool((inverse >= 0).all()):
            return Index(rows, 0, (first, last), inverse, steps)
    return Index(rows, 0, steps=steps)


def _steps(rows: Tensor) -> tuple[int, int, int] | None:
    n, t = rows.shape
    first = int(rows[0, 0])
    across = int(rows[1, 0]) - first if n > 1 else 0
    along = int(rows[0, 1]) - first if t > 1 else 0
    line = torch.arange(n, device=rows.device)[:, None] * across + torch.arange(t, device=rows.device) * along
    return (first, across, along) if torch.equal(rows, line + first) else None


@lru_cache(maxsize=256)
def _tables(plan: TilePlan, device: torch.device) -> tuple[tuple[GroupTables, ...], ...]:
    return tuple(tuple(GroupTables(group, plan, device) for group in part) for part in plan.parts)


def _ranges(tiles: int, row: int, limit: int) -> Iterator[tuple[int, int]]:
    """Ranges of about ``limit`` tiles that are whole rows, or whole fractions of one, so that masks repeat."""
    if limit >= row:
        step = min(limit // row * row, tiles)
    else:
        step = math.ceil(row / math.ceil(row / limit))
        for start in range(0, tiles, row):
            for first in range(start, start + row, step):
                yield first, min(first + step, start + row)
        return
    for first in range(0, tiles, step):
        yield first, min(first + step, tiles)


class Rows:
    """Rows ``(batch * tokens, heads * dim)`` of a ``(batch, tokens, heads, dim)`` tensor, gathered into tiles."""

    def __init__(self, tensor: Tensor, dtype: torch.dtype) -> None:
        tensor = tensor.flatten(1, -3).to(dtype)
        self.batch, self.tokens, self.heads, self.dim = tensor.shape
        try:
            self.rows = tensor.view(self.batch * self.tokens, self.heads * self.dim)
        except RuntimeError:
            self.rows = tensor.reshape(self.batch * self.tokens, self.heads * self.dim)
        self._buffer: Tensor | None = None

    def gather(self, index: Index, heads: int, width: int) -> Tensor:
        """``(n, heads, t, width)`` for rows ``(n, t)``: heads repeated to ``heads``, dim padded with zeros to ``width``."""
        n, t = index.rows.shape
        if index.steps is not None:
            first, across, along = index.steps
            tile = self.rows[index.base + first :].as_strided(
                (n, t, self.heads, self.dim),
                (across * self.rows.stride(0), along * self.rows.stride(0), self.dim, 1),
            )
        else:
            tile = self._gathered(index.rows, index.base)
        if heads != self.heads:
            tile = tile.repeat_interleave(heads // self.heads, 2)
        if width != self.dim:
            tile = F.pad(tile, (0, width - self.dim))
        return tile.transpose(1, 2)

    def _gathered(self, rows: Tensor, base: int) -> Tensor:
        n, t = rows.shape
        if self._buffer is None or len(self._buffer) < n * t:
            self._buffer = self.rows.new_empty(n * t, self.heads * self.dim)
        buffer = self._buffer[: n * t]
        torch.index_select(self.rows[base:], 0, rows.reshape(-1), out=buffer)
        return buffer.view(n, t, self.heads, self.dim)


def _flat(tile: Tensor, heads: int, width: int) -> Tensor:
    """``(n, heads, t, width)`` back to rows ``(n * t, heads * width)``, summing repeated heads, dropping padding."""
    tile = tile.transpose(1, 2)[..., :width]
    if tile.shape[2] != heads:
        tile = tile.unflatten(2, (heads, -1)).sum(3)
    return tile.reshape(-1, heads * width)


@dataclass
class Problem:
    """The operands of the operator, as rows, and how to walk its tiles."""

    q: Rows
    k: Rows
    v: Rows
    heads: int
    scale: float
    table: Tensor | None
    valid: Tensor | None
    parts: list[list[Chunk]] | None = None

    @property
    def width(self) -> int:
        return max(self.q.dim, self.v.dim)

    @property
    def limit(self) -> int:
        return BUFFER * torch.get_num_threads() if self.q.rows.device.type == "cpu" else BUFFER * 64


def _static_chunks(problem: Problem, tables: tuple[GroupTables, ...]) -> Iterator[Chunk]:
    for group in tables:
        tiles, tk = group.keys.shape
        limit = max(1, problem.limit // (tk * problem.k.heads * problem.k.dim))
        bias = None
        if problem.table is not None:
            flat = problem.table.flatten(1)
            bias = flat[:, group.offsets].transpose(0, 1)  # (classes, heads, tq, tk)
            if group.visible is not None:
                bias = bias.masked_fill(~group.visible[:, None], -torch.inf)
        whole = max(1, limit // tiles)  # batch items at once
        for item in range(0, problem.q.batch, whole):
            items = min(whole, problem.q.batch - item)
            for first, last in _ranges(tiles, group.row, limit):
                yield _static_chunk(problem, group, bias, item, items, first, last)


def _static_chunk(
    problem: Problem, group: GroupTables, bias: Tensor | None, item: int, items: int, first: int, last: int
) -> Chunk:
    def each(values: Tensor) -> Tensor:
        """Per class to per tile."""
        if len(values) == 1:
            return values.expand(items * (last - first), *values.shape[1:])
        return values[group.kinds[first:last]].repeat(items, *[1] * (values.ndim - 1))

    queries, keys = group.indices(first, last, items)
    queries = replace(queries, base=item * problem.q.tokens)
    keys = replace(keys, base=item * problem.k.tokens)
    mask = group.mask(first, last, items, problem.q.rows.dtype) if bias is None else each(bias)
    blind = None if group.blind is None else each(group.blind)
    offsets = None if group.offsets is None else each(group.offsets)
    causal = group.causal and problem.valid is None
    if problem.valid is not None:
        if group.causal:
            mask = _triangle(problem.q.tokens, problem.k.tokens, problem.q.rows)
        mask, blind = _with_valid(mask, problem.valid.reshape(-1)[keys.base :][keys.rows], problem.q.rows.dtype)
    return Chunk(queries, keys, mask, blind, offsets, causal)


def _with_valid(mask: Tensor | None, valid: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Restrict a mask to valid keys ``(n, tk)``; also tells which queries are left with none."""
    hidden = torch.zeros(valid.shape, dtype=dtype, device=valid.device).masked_fill_(~valid, -torch.inf)[:, None, None]
    mask = hidden if mask is None else mask + hidden
    return mask, (mask == -torch.inf).all(-1).all(1)


def _routed_chunks(problem: Problem, blocks: Tensor, block: list[int], q_grid, k_grid) -> Iterator[Chunk]:
    """Chunks of routed blocks; ``blocks`` is ``(batch, query_blocks, listed)``, heads with tables of their own folded in."""
    q_tokens, q_real = _block_tokens(tuple(q_grid), tuple(block), blocks.device)
    k_tokens, k_real = _block_tokens(tuple(k_grid), tuple(block), blocks.device)
    batch, number, listed = blocks.shape
    ordered = blocks.sort(-1).values
    ordered[..., 1:].masked_fill_(ordered[..., 1:] == ordered[..., :-1], -1)  # a block listed twice counts once
    tq, tk = q_tokens.shape[1], listed * k_tokens.shape[1]
    limit = max(1, problem.limit // (tk * problem.k.heads * problem.k.dim))
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
        mask, _ = _with_valid(None, seen, problem.q.rows.dtype)
        blind = ~seen.any(1, keepdim=True).expand(-1, tq)
        mask = mask.expand(-1, 1, tq, -1)
    return Chunk(Index(queries, item * problem.q.tokens), Index(keys, item * problem.k.tokens), mask, blind, None)


@lru_cache(maxsize=64)
def _block_tokens(grid: tuple[int, ...], block: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Flat tokens ``(blocks, block_tokens)`` of each block, and which of them lie in the grid (the others repeat one)."""
    tokens, real = np.zeros((1, 1), dtype=np.int64), np.ones((1, 1), dtype=bool)
    for length, size in zip(grid, block, strict=True):
        position = np.arange(-(-length // size) * size).reshape(-1, size)
        inside = position < length
        position = np.minimum(position, length - 1)
        tokens = (tokens[:, None, :, None] * length + position[None, :, None, :]).reshape(len(tokens) * len(position), -1)
        real = (real[:, None, :, None] & inside[None, :, None, :]).reshape(len(tokens), -1)
    return torch.from_numpy(tokens).to(device), torch.from_numpy(real).to(device)


# --------------------------------------------------------------------------------------------------------------------
# attention inside the tiles of a chunk

_FUSED = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_FUSED_BACKWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


def _fused(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and _FUSED is not None and _FUSED_BACKWARD is not None


def _full_mask(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    return None if mask is None else mask.expand(-1, -1, q.shape[2], k.shape[2])


def _triangle(queries: int, keys: int, like: Tensor) -> Tensor:
    """The mask of causal tiles, for where the fused operator cannot make it."""
    return torch.full((1, 1, queries, keys), -torch.inf, dtype=like.dtype, device=like.device).triu_(1)


def _attend_tiles(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Output ``(n, heads, tq, width)`` and lse ``(n, heads, tq)`` (any value where a query sees nothing)."""
    if causal and not _fused(q):
        mask = _triangle(q.shape[2], k.shape[2], q)
    if _fused(q):
        return _FUSED(q, k, v, 0.0, causal, attn_mask=_full_mask(mask, q, k), scale=scale)
    scores = torch.matmul(q, k.transpose(-2, -1)) * scale
    if mask is not None:
        scores = scores + mask
    lse = torch.logsumexp(scores, -1)
    lse = lse.masked_fill(lse == -torch.inf, 0.0)
    return torch.matmul(torch.exp(scores - lse.unsqueeze(-1)), v), lse


def _attend_tiles_backward(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None,
    causal: bool, scale: float, need_scores: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v and, where needed, of the biased scores.

    ``out`` and ``lse`` are those of the whole softmax, of which these keys may be one part.
    """
    fused = _fused(q) and grad_lse is None and not need_scores
    if causal and not fused:
        mask = _triangle(q.shape[2], k.shape[2], q)
    if fused:
        grads = _FUSED_BACKWARD(grad, q, k, v, out, lse, 0.0, causal, attn_mask=_full_mask(mask, q, k), scale=scale)
        return (*grads, None)
    scores = torch.matmul(q, k.transpose(-2, -1)).mul_(scale)
    if mask is not None:
        scores += mask
    weights = scores.sub_(lse.unsqueeze(-1)).exp_()
    delta = (grad * out).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse.unsqueeze(-1)
    grad_scores = torch.matmul(grad, v.transpose(-2, -1)).sub_(delta).mul_(weights)
    grad_v = torch.matmul(weights.transpose(-2, -1), grad)
    grad_q = torch.matmul(grad_scores, k).mul_(scale)
    grad_k = torch.matmul(grad_scores.transpose(-2, -1), q).mul_(scale)
    return grad_q, grad_k, grad_v, grad_scores if need_scores else None


# --------------------------------------------------------------------------------------------------------------------
# the operator


def _problem(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, valid: Tensor | None, scale: float) -> Problem:
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    table = None if table is None else table.to(kind)
    if valid is not None:
        valid = valid.expand(q.shape[0], *valid.shape[1:])
    return Problem(Rows(q, kind), Rows(k, kind), Rows(v, kind), q.shape[-2], scale, table, valid)


def _chunks_of(problem: Problem, q, k, blocks: Tensor | None, block, spec, bias_spec, q_start, zeros) -> list[Iterator[Chunk]]:
    q_grid, padded = tuple(q.shape[1:-2]), tuple(k.shape[1:-2])
    if blocks is not None:
        return [_routed_chunks(problem, blocks, block, q_grid, padded)]
    pairs = tuple(zip(zeros[::2], zeros[1::2], strict=True))
    k_grid = tuple(n - before - after for n, (before, after) in zip(padded, pairs, strict=True))
    table = None if problem.table is None else (bias_spec, tuple(problem.table.shape[1:]))
    plan = tile_plan(spec, q_grid, k_grid, tuple(q_start), pairs, table)
    if plan is None:
        raise ValueError(f"no tile plan for {spec!r}")
    return [_static_chunks(problem, tables) for tables in _tables(plan, q.device)]


def _fold_heads(tensor: Tensor, heads: int) -> Tensor:
    """``(batch, *grid, heads, dim)`` to ``(batch * heads, *grid, 1, dim)``, kv heads repeated."""
    if tensor.shape[-2] != heads:
        tensor = tensor.repeat_interleave(heads // tensor.shape[-2], -2)
    return tensor.movedim(-2, 1).flatten(0, 1).unsqueeze(-2)


def _per_head_blocks(blocks: Tensor | None) -> bool:
    return blocks is not None and blocks.shape[1] > 1


def _shared_blocks(blocks: Tensor | None, batch: int, per_head: bool) -> Tensor | None:
    """The table as ``(batch or 1, query_blocks, listed)``, heads folded into the batch where they differ."""
    if blocks is None:
        return None
    return blocks.expand(batch, -1, -1, -1).flatten(0, 1) if per_head else blocks[:, 0]


@torch.library.custom_op("regard::tiled_attention", mutates_args=())
def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    valid: Tensor | None,
    blocks: Tensor | None,
    block: list[int],
    spec: str,
    bias_spec: str,
    q_start: list[int],
    zeros: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output ``(batch, *q_grid, heads, value_dim)`` and lse ``(batch, *q_grid, heads)`` of one call."""
    heads, out_shape, lse_shape = q.shape[-2], (*q.shape[:-1], v.shape[-1]), q.shape[:-1]
    per_head = _per_head_blocks(blocks)
    if per_head:
        q_, k_, v_ = (_fold_heads(t, heads) for t in (q, k, v))
        valid = None if valid is None else valid.expand(q.shape[0], *valid.shape[1:]).repeat_interleave(heads, 0)
    else:
        q_, k_, v_ = q, k, v
    problem = _problem(q_, k_, v_, table, valid, scale)
    tables = _shared_blocks(blocks, q.shape[0], per_head)
    out, lse = None, None
    for chunks in _chunks_of(problem, q_, k_, tables, block, spec, bias_spec, q_start, zeros):
        part_out, part_lse = _forward(problem, chunks)
        out, lse = (part_out, part_lse) if out is None else _merge_rows(problem, out, lse, part_out, part_lse)
    if out is None or lse is None:  # a pattern that shows nothing
        return q.new_zeros(out_shape), q.new_full(lse_shape, -torch.inf, dtype=problem.q.rows.dtype)
    if per_head:
        out = out.view(q.shape[0], heads, -1, v.shape[-1]).transpose(1, 2)
        lse = lse.view(q.shape[0], heads, -1).transpose(1, 2)
    return out.reshape(out_shape).to(q.dtype).contiguous(), lse.reshape(lse_shape).contiguous()


def _forward(problem: Problem, chunks: Iterator[Chunk]) -> tuple[Tensor, Tensor]:
    rows, heads, width, value = problem.q.rows, problem.heads, problem.width, problem.v.dim
    out = rows.new_empty(len(rows), heads * value)
    lse = rows.new_empty(len(rows), heads)
    for chunk in chunks:
        q = problem.q.gather(chunk.queries, heads, width)
        k = problem.k.gather(chunk.keys, heads, width)
        v = problem.v.gather(chunk.keys, heads, width)
        tile_out, tile_lse = _attend_tiles(q, k, v, chunk.mask, chunk.causal, problem.scale)
        if chunk.blind is not None:
            tile_out = tile_out.masked_fill(chunk.blind[:, None, :, None], 0.0)
            tile_lse = tile_lse.masked_fill(chunk.blind[:, None], -torch.inf)
        chunk.queries.put(out, _flat(tile_out, heads, value))
        chunk.queries.put(lse, tile_lse.transpose(1, 2).reshape(-1, heads))
    return out, lse


def _merge_rows(problem: Problem, out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Add a disjoint part to rows of output and lse, in place."""
    total = torch.logaddexp(lse, other_lse)
    base = total.masked_fill(total == -torch.inf, 0.0)
    shape = (len(out), problem.heads, problem.v.dim)
    out.view(shape).mul_(torch.exp(lse - base).unsqueeze(-1))
    out.view(shape).addcmul_(other.view(shape), torch.exp(other_lse - base).unsqueeze(-1))
    return out, total


@tiled_attention.register_fake
def _(q, k, v, table, valid, blocks, block, spec, bias_spec, q_start, zeros, scale):
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=kind)


@torch.library.custom_op("regard::tiled_attention_backward", mutates_args=())
def tiled_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    valid: Tensor | None,
    blocks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    block: list[int],
    spec: str,
    bias_spec: str,
    q_start: list[int],
    zeros: list[int],
    scale: float,
    need_table: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the bias table (empty where not needed)."""
    heads, kv_heads, batch = q.shape[-2], k.shape[-2], q.shape[0]
    per_head = _per_head_blocks(blocks)
    tensors = [grad_out, out, q, k, v]
    lses = [grad_lse, lse]
    if per_head:
        tensors = [_fold_heads(t, heads) for t in tensors]
        lses = [None if t is None else t.flatten(1, -2).transpose(1, 2).flatten(0, 1).unsqueeze(-1) for t in lses]
        valid = None if valid is None else valid.expand(batch, *valid.shape[1:]).repeat_interleave(heads, 0)
    grad_, out_, q_, k_, v_ = tensors
    problem = _problem(q_, k_, v_, table, valid, scale)
    tables = _shared_blocks(blocks, batch, per_head)
    kind = problem.q.rows.dtype
    lse_rows = lses[1].reshape(-1, problem.heads if not per_head else 1).to(kind)
    lse_rows = lse_rows.masked_fill(lse_rows == -torch.inf, 0.0)
    grad_lse_rows = None if lses[0] is None else lses[0].reshape(lse_rows.shape).to(kind)
    if per_head:
        problem.heads = 1
    grads = [torch.zeros_like(t.rows) for t in (problem.q, problem.k, problem.v)]
    grad_table = torch.zeros_like(problem.table.flatten(1)) if need_table else None
    saved = (Rows(grad_, kind), Rows(out_, kind), lse_rows, grad_lse_rows)
    parts = _chunks_of(problem, q_, k_, tables, block, spec, bias_spec, q_start, zeros)
    for chunks in parts:
        _backward(problem, chunks, saved, grads, grad_table, len(parts) == 1)
    shapes = [q_, k_, v_]
    results = [g.view(t.shape) for g, t in zip(grads, shapes, strict=True)]
    if per_head:
        for i, count in enumerate((heads, kv_heads, kv_heads)):
            unfolded = results[i].squeeze(-2).unflatten(0, (batch, heads)).movedim(1, -2)
            results[i] = unfolded.unflatten(-2, (count, -1)).sum(-2)
    final = [r.to(t.dtype).contiguous() for r, t in zip(results, (q, k, v), strict=True)]
    table_grad = q.new_empty(0) if grad_table is None else grad_table.view(table.shape).to(table.dtype)
    return final[0], final[1], final[2], table_grad


def _backward(
    problem: Problem, chunks: Iterator[Chunk], saved, grads: list[Tensor], grad_table: Tensor | None, alone: bool
) -> None:
    """Add the gradients of one part; ``alone`` when no other part shows keys to the same queries."""
    grad_rows, out_rows, lse_rows, grad_lse_rows = saved
    heads, width = problem.heads, problem.width
    grad_q, grad_k, grad_v = grads
    for chunk in chunks:
        q = problem.q.gather(chunk.queries, heads, width)
        k = problem.k.gather(chunk.keys, heads, width)
        v = problem.v.gather(chunk.keys, heads, width)
        grad = grad_rows.gather(chunk.queries, heads, width)
        out = out_rows.gather(chunk.queries, heads, width)
        lse = lse_rows[chunk.queries.base :][chunk.queries.rows].transpose(1, 2)
        grad_lse = None if grad_lse_rows is None else grad_lse_rows[chunk.queries.base :][chunk.queries.rows].transpose(1, 2)
        dq, dk, dv, scores = _attend_tiles_backward(
            grad, grad_lse, q, k, v, out, lse, chunk.mask, chunk.causal, problem.scale, grad_table is not None
        )
        if chunk.blind is not None:
            dq = dq.masked_fill(chunk.blind[:, None, :, None], 0.0)
        dq, dk, dv = (_flat(d, rows.heads, rows.dim) for d, rows in ((dq, problem.q), (dk, problem.k), (dv, problem.v)))
        if alone:
            chunk.queries.put(grad_q, dq)
        else:
            chunk.queries.add(grad_q, dq)
        chunk.keys.add(grad_k, dk)
        chunk.keys.add(grad_v, dv)
        if grad_table is not None:
            _add_to_table(grad_table, scores, chunk.offsets)


def _add_to_table(grad_table: Tensor, scores: Tensor, offsets: Tensor) -> None:
    """Sum the gradient of the scores ``(n, heads, tq, tk)`` per offset."""
    if offsets.stride(0) == 0:  # all tiles of one class
        scores, offsets = scores.sum(0, keepdim=True), offsets[:1]
    flat = scores.transpose(0, 1).reshape(scores.shape[1], -1)
    if len(grad_table) == 1:
        flat = flat.sum(0, keepdim=True)
    grad_table.index_add_(1, offsets.reshape(-1), flat)


@tiled_attention_backward.register_fake
def _(grad_out, grad_lse, q, k, v, table, valid, blocks, out, lse, block, spec, bias_spec, q_start, zeros, scale, need_table):
    table_grad = torch.empty_like(table) if need_table else q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), table_grad


def _setup_context(ctx, inputs, output):
    q, k, v, table, valid, blocks, *static = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, table, valid, blocks, *output)
    ctx.static = static


def _autograd(ctx, grad_out, grad_lse):
    q, k, v, table, valid, blocks, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    need_table = table is not None and ctx.needs_input_grad[3]
    dq, dk, dv, dtable = tiled_attention_backward(
        grad_out, grad_lse, q, k, v, table, valid, blocks, out, lse, *ctx.static, need_table
    )
    return dq, dk, dv, dtable if need_table else None, *[None] * 8


tiled_attention.register_autograd(_autograd, setup_context=_setup_context)


def _pairs(q_shape, k_shape, block, blocks_shape, spec, q_start, zeros) -> int:
    q_grid, padded = tuple(q_shape[1:-2]), tuple(k_shape[1:-2])
    if block:
        size = math.prod(block)
        return blocks_shape[2] * blocks_shape[3] * size * size
    pairs = tuple(zip(zeros[::2], zeros[1::2], strict=True))
    k_grid = tuple(n - before - after for n, (before, after) in zip(padded, pairs, strict=True))
    return tile_plan(spec, q_grid, k_grid, tuple(q_start), pairs).computed_pairs


@register_flop_formula(torch.ops.regard.tiled_attention)
def _flops(q, k, v, table, valid, blocks, block, spec, bias_spec, q_start, zeros, scale, *, out_shape=None, **_) -> int:
    pairs = _pairs(q, k, block, blocks, spec, q_start, zeros)
    return 2 * q[0] * q[-2] * pairs * (q[-1] + v[-1])


@register_flop_formula(torch.ops.regard.tiled_attention_backward)
def _flops_backward(grad, grad_lse, q, k, v, table, valid, blocks, out, lse, block, spec, bias_spec, q_start, zeros, scale,
                    need_table, *, out_shape=None, **_) -> int:  # fmt: skip
    pairs = _pairs(q, k, block, blocks, spec, q_start, zeros)
    return 2 * q[0] * q[-2] * pairs * (3 * q[-1] + 2 * v[-1])


# --------------------------------------------------------------------------------------------------------------------
# plain tensor operations, for export


def _run_plain(call: Call) -> tuple[Tensor, Tensor | None]:
    """The same tiles in public operators that every exporter knows; the grid is a constant of the exported program."""
    if isinstance(call.pattern, Blocks):
        return dense.run(call)
    plan = plan_of(call)
    if plan is None or plan.causal or not plan.parts:
        return dense.run(call)
    q, k, v = (t.flatten(1, -3) for t in (call.q, call.k, call.v))
    valid = None if call.valid is None else call.valid.flatten(1)
    parts = [[_plain_group(call, group, q, k, v, valid, len(plan.parts) > 1) for group in part] for part in plan.parts]
    outs, lses = [], []
    for groups, part in zip(parts, plan.parts, strict=True):
        order = np.argsort(np.concatenate([group.queries.reshape(-1) for group in part]))
        place = torch.tensor(order.tolist(), device=q.device)
        outs.append(torch.cat([out for out, _ in groups], 1)[:, place])
        lses.append(torch.cat([lse for _, lse in groups], 1)[:, place])
    out, lse = (outs[0], lses[0]) if len(outs) == 1 else merge(outs, lses)
    return out.unflatten(1, call.q_grid), lse.unflatten(1, call.q_grid) if call.need_lse else None


def _plain_group(
    call: Call, group: TileGroup, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, need_lse: bool
) -> tuple[Tensor, Tensor]:
    """Output ``(batch, tiles * tq, heads, value_dim)`` and lse of one tile group, queries in the order of the tiles."""
    constant = {"device": q.device}
    queries, keys = (torch.tensor(i.tolist(), **constant) for i in (group.queries, group.keys))
    kinds = torch.tensor(group.kinds.tolist(), **constant)
    q = q[:, queries].transpose(2, 3)  # (batch, tiles, heads, tq, dim)
    k, v = (t[:, keys].repeat_interleave(call.heads // t.shape[2], 3).transpose(2, 3) for t in (k, v))
    bias = q.new_zeros(1, 1, 1, 1, 1)
    if call.table is not None and group.offsets is not None:
        offsets = torch.tensor(group.offsets.tolist(), **constant)
        bias = call.table.table.flatten(1)[:, offsets].transpose(0, 1)[kinds][None].to(q.dtype)
    if group.mask is not None:
        visible = torch.tensor(group.mask.tolist(), **constant)[kinds][None, :, None]
        bias = bias.masked_fill(~visible, -torch.inf)
    if valid is not None:
        bias = bias.masked_fill(~valid[:, keys][:, :, None, None], -torch.inf)
    if need_lse or call.need_lse or valid is not None or group.blind is not None:
        scores = torch.matmul(q, k.transpose(-2, -1)).to(torch.promote_types(q.dtype, torch.float32)) * call.scale
        weights, lse = reference.normalise(scores + bias)
        out = torch.matmul(weights.to(v.dtype), v)
    else:
        full = bias.expand(*bias.shape[:-2], q.shape[-2], k.shape[-2]) if bias.numel() > 1 else None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=full, scale=call.scale)
        lse = out[..., 0]
    return out.transpose(2, 3).flatten(1, 2), lse.transpose(2, 3).flatten(1, 2)
