"""Tiles of queries against the keys they need: gather, fused attention, scatter.

    for a few tiles at a time: gather the rows of q, k and v by index table; attend; put the rows of the output back

For other devices than CPUs, for float64, and where no C compiler is to be had for :mod:`regard.ops.backends.native.backend`.

Cost: the pairs of the tile plan (about twice those of the pattern for small kernels) and O(tokens) memory, in both
directions. The backward gathers again, recomputes with the saved log-sum-exp and adds the gradients of k and v back by row.
On CPU the tiles run on torch's fused CPU attention, elsewhere (and where a bias or the lse needs a gradient) on matrix
products. The same plan serves windows, neighborhoods, halos, grids, axes, their unions, and routed blocks.

A key that a query does not see does not reach it, even where it is not finite. Keys that do not exist are gathered as zeros; a
result that is not finite is computed again over the visible pairs alone (on CPU: elsewhere to look at it would wait for the
device).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..calls import definition, fused
from ..calls.call import Call
from ..calls.definition import lse_like
from ..calls.heads import repeat_heads
from ..calls.lower import saturated
from ..calls.merging import merge
from ..tiles import calls as tile_calls
from ..tiles.calls import plan_of, planned
from ..tiles.chunks import Chunk, Problem, Rows, pose, routed_chunks, static_chunks, to_rows
from ..tiles.plan import TileGroup
from ..tiles.products import attend_narrow_tiles, attend_tiles, attend_tiles_backward, narrow_products
from ..tiles.tables import Index, tables_of
from ..tiles.threads import run_all
from . import costs
from .base import Backend, Cost, cost_of
from .operators import Inputs, define, run, tile_flops, tile_flops_backward

NARROW_KEYS = 384
"""Up to so many keys per tile, products in bfloat16 around a stored softmax beat the fused operator in float32."""
SHARED_FLOPS = 1e9
"""From so much work on, the chunks of a forward are shared out over threads. Below, and in the backward, torch's own threads
split each operator: inside a model they still spin when a pool begins."""


class TiledBackend(Backend[Call]):
    """Tiles on torch's operators."""

    name = "tiled"
    passed_over = "no gain: most keys are visible"

    def supports(self, call: Call) -> str | None:
        return tile_calls.supports(call)

    def time(self, call: Call) -> float:
        return self._per_pair(call) * tile_calls.computed_pairs(call)

    def _per_pair(self, call: Call) -> float:
        if tile_calls.gathers_single(call):
            return costs.SINGLE
        return costs.TILED_CPU if call.device.type == "cpu" else costs.TILED

    def cost(self, call: Call) -> Cost:
        return cost_of(call, tile_calls.computed_pairs(call), tile_calls.gathered_bytes(call), *tile_calls.tiles_of(call))

    def run(self, call: Call) -> tuple[Tensor, Tensor | None]:
        if torch.compiler.is_exporting():
            return _run_plain(call)
        return run(tiled_attention, call)

    def reason(self, call: Call) -> str:
        few = self.time(call) <= costs.DENSE * call.queries * call.keys
        return "computes far fewer pairs than dense attention" if few else "returns lse without storing the weights"

    def why_not(self, call: Call, chosen: Cost) -> str:
        return "the same tiles on torch's operators" if chosen.tile == tile_calls.tiles_of(call)[0] else self.passed_over


def _parts(problem: Problem, x: Inputs) -> list[Iterator[Chunk]]:
    """The chunks of each disjoint part of the pattern."""
    if problem.blocks is not None:
        return [routed_chunks(problem, x.block, tuple(x.q.shape[1:-2]), tuple(x.k.shape[1:-2]))]
    return [static_chunks(problem, tables) for tables in tables_of(planned(x.geometry), x.q.device)]


def _forward_of(x: Inputs, need_lse: bool) -> tuple[Tensor, Tensor]:
    parallel = x.q.device.type == "cpu" and tile_flops(x.shapes()) >= SHARED_FLOPS

    def attempt(exact: bool, narrow: bool = False) -> tuple[Tensor, Tensor]:
        problem = pose(
            x.q, x.k, x.v, x.table, x.valid, x.blocks, x.scale,
            narrow=narrow, parallel=parallel, multiplied=not parallel, exact=exact,
        )  # fmt: skip
        parts = _parts(problem, x)
        if narrow and len(parts) == 1:
            return _attend_narrow(problem, parts[0], x.q, x.v), x.q.new_empty(0, dtype=torch.float32)
        if narrow:
            return attempt(exact)
        problem.need_lse = need_lse or len(parts) > 1
        out, lse = _attend(problem, parts, x.q, x.v)
        return out, lse if need_lse else lse.new_empty(0)

    with torch.autocast(x.q.device.type, enabled=False):
        found = attempt(False, narrow=not need_lse and narrow_products(x.q))
        if _in_doubt(found[:1]):
            found = attempt(True)
        return found


def _in_doubt(found: Sequence[Tensor]) -> bool:
    """Whether what was found may hold what a query does not see: something of it is not finite."""
    return any(t.device.type == "cpu" and not bool(t.sum(dtype=_summed(t)).isfinite()) for t in found)


def _summed(tensor: Tensor) -> torch.dtype:
    """A type in which a sum of finite numbers hardly overflows."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _attend(problem: Problem, parts: list[Iterator[Chunk]], q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp (any, where it is not needed)."""
    rows: tuple[Tensor, Tensor] | None = None
    for chunks in parts:
        rows = _forward(problem, chunks, rows)
    shape = (*q.shape[:-1], v.shape[-1])
    if rows is None:  # a pattern that shows nothing
        return q.new_zeros(shape), lse_like(q).fill_(-torch.inf)
    out = problem.unfold(rows[0], shape, q.dtype)
    if not problem.need_lse:
        return out, rows[1]
    return out, problem.unfold(rows[1], (*q.shape[:-1], 1), problem.q.rows.dtype).squeeze(-1)


def _attend_narrow(problem: Problem, chunks: Iterator[Chunk], q: Tensor, v: Tensor) -> Tensor:
    """The output of a pattern of one part, in the type of the inputs."""
    heads, value = problem.heads, problem.v.dim
    out = problem.q.rows.new_empty(len(problem.q.rows), heads * value)

    def attend_one(chunk: Chunk) -> None:
        q, k, v = (t.gather(i, heads, t.dim) for t, i in zip(*_operands(problem, chunk), strict=True))
        if k.shape[2] <= NARROW_KEYS:
            tile_out = attend_narrow_tiles(q, k, v, chunk.mask, chunk.causal, problem.scale)
        else:
            width = problem.width
            wide_q, wide_k, wide_v = (F.pad(t.float(), (0, width - t.shape[-1])) for t in (q, k, v))
            tile_out = attend_tiles(wide_q, wide_k, wide_v, chunk.mask, chunk.causal, problem.scale)[0].to(q.dtype)
        if chunk.blind is not None:
            tile_out = tile_out.masked_fill(chunk.blind[:, None, :, None], 0.0)
        chunk.queries.put(out, to_rows(tile_out, heads, value))

    run_all(attend_one, chunks, problem.parallel)
    return problem.unfold(out, (*q.shape[:-1], v.shape[-1]), q.dtype)


def _forward(problem: Problem, chunks: Iterator[Chunk], others: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Rows of output and log-sum-exp of one part of a pattern, merged into those of the ``others``."""
    rows, heads, value = problem.q.rows, problem.heads, problem.v.dim
    first = next(chunks)
    if others is None and first.queries.covers(len(rows)):
        return _attend_chunk(problem, first)
    out, lse = others or (rows.new_empty(len(rows), heads * value), rows.new_empty(len(rows), heads))

    def attend_one(chunk: Chunk) -> None:
        done = _attend_chunk(problem, chunk)
        if others is not None:
            chunk.queries.merge(out, lse, *done)
        else:
            chunk.queries.put(out, done[0])
            if problem.need_lse:
                chunk.queries.put(lse, done[1])

    run_all(attend_one, chain([first], chunks), problem.parallel)
    return out, lse


def _attend_chunk(problem: Problem, chunk: Chunk) -> tuple[Tensor, Tensor]:
    """Rows of output ``(n * tq, heads * value_dim)`` and log-sum-exp of the queries of a chunk."""
    q, k, v = (t.gather(i, problem.heads, problem.width) for t, i in zip(*_operands(problem, chunk), strict=True))
    out, lse = attend_tiles(q, k, v, chunk.mask, chunk.causal, problem.scale, problem.need_lse, problem.exact)
    if chunk.blind is not None:
        out = out.masked_fill(chunk.blind[:, None, :, None], 0.0)
    rows = to_rows(out, problem.heads, problem.v.dim)
    if not problem.need_lse:
        return rows, lse
    if chunk.blind is not None:
        lse = lse.masked_fill(chunk.blind[:, None], -torch.inf)
    return rows, lse.transpose(1, 2).reshape(-1, problem.heads)


def _backward_of(
    x: Inputs, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, need_table: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    def attempt(exact: bool) -> tuple[Problem, list[Tensor], Tensor | None]:
        stored = grad_lse is not None or need_table
        problem = pose(x.q, x.k, x.v, x.table, x.valid, x.blocks, x.scale, stored=stored, exact=exact)
        return problem, *_gradients(problem, _parts(problem, x), grad_out, grad_lse, out, lse, need_table)

    with torch.autocast(x.q.device.type, enabled=False):
        problem, (dq, dk, dv), grad_table = attempt(False)
        if _in_doubt((dq, dk, dv)):
            problem, (dq, dk, dv), grad_table = attempt(True)
    dq, dk, dv = (problem.unfold(g, t.shape, t.dtype) for g, t in zip((dq, dk, dv), (x.q, x.k, x.v), strict=True))
    return dq, dk, dv, None if grad_table is None else grad_table.view(x.table.shape).to(x.table.dtype)


def _gradients(
    problem: Problem,
    parts: list[Iterator[Chunk]],
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    need_table: bool,
) -> tuple[list[Tensor], Tensor | None]:
    """The gradients of the rows of q, k and v, and of the flattened bias table."""
    kind = problem.q.rows.dtype
    flat_lse = problem.fold(lse.unsqueeze(-1)).reshape(-1, problem.heads)
    saved = Saved(
        Rows(problem.fold(grad_out), kind, "grad"),
        Rows(problem.fold(out), kind, "out"),
        flat_lse.masked_fill(flat_lse == -torch.inf, 0.0),
        None if grad_lse is None else problem.fold(grad_lse.unsqueeze(-1)).reshape(flat_lse.shape),
    )
    alone = len(parts) == 1 and problem.blocks is None
    grads = [(torch.empty_like if alone else torch.zeros_like)(problem.q.rows)]
    grads += [torch.zeros_like(t.rows) for t in (problem.k, problem.v)]
    grad_table = _TableGradient(problem.table) if need_table and problem.table is not None else None
    for chunks in parts:
        _backward(problem, chunks, saved, grads, grad_table, len(parts) == 1)
    return grads, None if grad_table is None else grad_table.finish()


@dataclass
class Saved:
    """What the forward leaves for the backward, as rows."""

    grad: Rows
    out: Rows
    lse: Tensor
    grad_lse: Tensor | None


def _backward(
    problem: Problem, chunks: Iterator[Chunk], saved: Saved, grads: list[Tensor], grad_table: _TableGradient | None, alone: bool
) -> None:
    """Add the gradients of one part; ``alone`` when no other part shows keys to the same queries."""
    heads, width = problem.heads, problem.width
    grad_q, grad_k, grad_v = grads
    for chunk in chunks:
        q, k, v = (t.gather(i, heads, width) for t, i in zip(*_operands(problem, chunk), strict=True))
        grad, out = (t.gather(chunk.queries, heads, width) for t in (saved.grad, saved.out))
        lse = chunk.queries.take(saved.lse).transpose(1, 2)
        grad_lse = None if saved.grad_lse is None else chunk.queries.take(saved.grad_lse).transpose(1, 2)
        dq, dk, dv, scores = attend_tiles_backward(
            grad, grad_lse, q, k, v, out, lse, chunk.mask, chunk.causal, problem.scale, grad_table is not None, problem.exact
        )
        if chunk.blind is not None:
            dq = dq.masked_fill(chunk.blind[:, None, :, None], 0.0)
        dq, dk, dv = (to_rows(d, t.heads, t.dim) for d, t in zip((dq, dk, dv), _operands(problem, chunk)[0], strict=True))
        if alone:
            chunk.queries.put(grad_q, dq)
        else:
            chunk.queries.add(grad_q, dq)
        chunk.keys.add(grad_k, dk)
        chunk.keys.add(grad_v, dv)
        if grad_table is not None and scores is not None:
            grad_table.add(chunk, scores)


def _operands(problem: Problem, chunk: Chunk) -> tuple[tuple[Rows, Rows, Rows], tuple[Index, Index, Index]]:
    """The rows of q, k and v, and which of them the chunk needs."""
    return (problem.q, problem.k, problem.v), (chunk.queries, chunk.keys, chunk.keys)


class _TableGradient:
    """The gradient of a bias table, summed per class of tiles before it is summed per offset."""

    def __init__(self, table: Tensor) -> None:
        self.table = torch.zeros_like(table.flatten(1))
        self._offsets: Tensor | None = None
        self._sums: Tensor | None = None

    def add(self, chunk: Chunk, scores: Tensor) -> None:
        """Add the gradient of the scores ``(n, heads, tq, tk)`` of a chunk."""
        assert chunk.offsets is not None
        assert chunk.kinds is not None
        if chunk.offsets is not self._offsets:
            self.finish()
            self._offsets, self._sums = chunk.offsets, scores.new_zeros(len(chunk.offsets), *scores.shape[1:])
        assert self._sums is not None
        if len(self._sums) == 1:
            self._sums += scores.sum(0)
        else:
            self._sums.index_add_(0, chunk.kinds, scores)

    def finish(self) -> Tensor:
        """The gradient ``(heads or 1, offsets)``."""
        if self._offsets is not None and self._sums is not None:
            sums = self._sums.transpose(0, 1).flatten(1)
            if len(self.table) == 1:
                sums = sums.sum(0, keepdim=True)
            self.table.index_add_(1, self._offsets.reshape(-1), sums)
            self._offsets = self._sums = None
        return self.table


tiled_attention, tiled_attention_backward = define(
    "tiled_attention", _forward_of, _backward_of, tile_flops, tile_flops_backward
)


def _run_plain(call: Call) -> tuple[Tensor, Tensor | None]:
    """The same tiles in public operators that every exporter knows; the grid is a constant of the exported program."""
    if call.pattern.as_blocks(call.rank) is not None:
        return fused.run(call)
    plan = plan_of(call)
    if plan is None or plan.causal or not plan.parts:
        return fused.run(call)
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

    def constant(array: np.ndarray) -> Tensor:
        return torch.tensor(array.tolist(), device=q.device)

    queries, keys, kinds = constant(group.queries), constant(group.keys), constant(group.kinds)
    q = q[:, queries].transpose(2, 3)  # (batch, tiles, heads, tq, dim)
    if valid is not None:
        k, v = (t.masked_fill(~valid[..., None, None], 0.0) for t in (k, v))
    k, v = (repeat_heads(t[:, keys], call.heads, 3).transpose(2, 3) for t in (k, v))
    bias = q.new_zeros(1, 1, 1, 1, 1)
    if call.table is not None and group.offsets is not None:
        offsets = constant(group.offsets)
        bias = call.table.table.flatten(1)[:, offsets].transpose(0, 1)[kinds][None]
        bias = saturated(bias, q.dtype)
    if group.mask is not None:
        visible = constant(group.mask)[kinds][None, :, None]
        bias = bias.masked_fill(~visible, -torch.inf)
    if valid is not None:
        bias = bias.masked_fill(~valid[:, keys][:, :, None, None], -torch.inf)
    if need_lse or call.need_lse or valid is not None or group.blind is not None:
        scores = torch.matmul(q, k.transpose(-2, -1)).to(torch.promote_types(q.dtype, torch.float32)) * call.scale
        weights, lse = definition.normalise(scores + bias)
        out = torch.matmul(weights.to(v.dtype), v)
    else:
        shape = (1, *q.shape[1:-1], k.shape[-2])
        full = bias.expand(shape).flatten(1, 2) if bias.numel() > 1 else None
        # exporters know the operator with one axis of heads, for which the tiles may stand too
        flat = fused.fused_attention(*(t.flatten(1, 2) for t in (q, k, v)), attn_mask=full, scale=call.scale)
        out = flat.unflatten(1, q.shape[1:3])
        lse = out[..., 0]
    return out.transpose(2, 3).flatten(1, 2), lse.transpose(2, 3).flatten(1, 2)
