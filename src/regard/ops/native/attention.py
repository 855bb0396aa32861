"""Calls of the compiled attention: tensors as pointers and steps, and tiles as lists of rows.

``attend`` and ``differentiate`` do one set of tiles each; every query stands in one tile of a set, and a set covers some or all
of the queries. Cost: the pairs of the tiles, and memory for a tile per thread.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .library import library
from .scratch import lend

NEAR = 1 << 17
"""Numbers that stay in the cache next to a core but one."""
SMALL = 2e5
"""Below this many products of numbers, one thread is enough."""


@dataclass(frozen=True, eq=False)
class TileSet:
    """Tiles of one shape.

    ``queries (tiles, tq)`` and ``keys (batch or 1, heads or 1, tiles, tk)`` are token numbers; ``kinds (tiles)`` the class of
    each tile; ``bias (classes, heads or 1, tq, padded tk)`` is added to the scores, -inf where a pair is hidden (see
    :func:`padded`); ``seen (batch or 1, heads or 1, tiles, tk)`` tells which keys exist. In tiles ``apart`` every key of the
    table stands once.
    """

    queries: Tensor
    keys: Tensor
    kinds: Tensor
    bias: Tensor | None = None
    seen: Tensor | None = None
    apart: bool = False


class RowsOf(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "token", "head"))]


class _Task(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("ahead", "narrow", "narrow_out", "batch", "heads", "kv_heads", "dim", "value")),
        *((name, RowsOf) for name in ("q", "k", "v", "out", "lse")),
        *((name, ctypes.c_int64) for name in ("tiles", "tq", "tk", "cuts")),
        *((name, ctypes.c_void_p) for name in ("queries", "keys", "kinds")),
        *((name, ctypes.c_int64) for name in ("keys_batch", "keys_head")),
        ("seen", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("seen_batch", "seen_head")),
        ("bias", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("bias_kind", "bias_head")),
        ("scale", ctypes.c_double),
        ("merge", ctypes.c_int64),
        *((name, RowsOf) for name in ("grad", "grad_lse", "dq", "dk", "dv")),
        ("sums", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("sums_worker", "apart", "slices", "slice_k", "slice_v")),
        ("scratch", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("scratch_worker", "workers")),
    ]


def lanes() -> int:
    """Numbers in a vector of this machine."""
    return int(library().regard_lanes())


def padded(bias: Tensor) -> Tensor:
    """A bias ``(..., tk)`` with -inf up to a whole number of vectors."""
    return F.pad(bias.to(torch.float32), (0, -bias.shape[-1] % lanes()), value=-torch.inf).contiguous()


def attend(q: Tensor, k: Tensor, v: Tensor, tiles: TileSet, scale: float, out: Tensor, lse: Tensor | None, merge: bool) -> None:
    """Write the output, and the log-sum-exp where it is wanted, of the queries of some tiles.

    Args:
        q, k, v: ``(batch, tokens, heads or kv_heads, dim)``, all float32 or all bfloat16, the last axis contiguous.
        tiles: the tiles.
        scale: of the scores.
        out: ``(batch, tokens, heads, value_dim)``, of the type of q or float32.
        lse: ``(batch, tokens, heads)``, float32.
        merge: whether ``out`` (then float32) and ``lse`` hold what other keys gave, to be merged with these.
    """
    task = _task(q, k, v, tiles, scale, out, lse, merge)
    units = task.batch * task.tiles * task.kv_heads
    task.cuts = _cuts(task, -(-4 * torch.get_num_threads() // units))
    task.workers = _workers(task, units * task.cuts)
    _run(task, "forward")


def differentiate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: TileSet,
    scale: float,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    grad_lse: Tensor | None,
    grads: tuple[Tensor, Tensor, Tensor],
    merge: bool,
    need_scores: bool,
    written: bool,
) -> Tensor | None:
    """Write (or, to ``merge``, add) the gradient of q; write those of k and v, or add them.

    Args:
        q, k, v, out, grad: as in :func:`attend`, all of one type.
        tiles: the tiles.
        scale: of the scores.
        lse, grad_lse: ``(batch, tokens, heads)``, float32, those of the whole softmax.
        grads: float32, of the shapes of q, k and v.
        merge: whether the gradient of q holds what other keys gave.
        need_scores: whether the gradients of the biased scores are wanted.
        written: whether those of k and v are written, each tile on its own: for tiles that are ``apart``.

    Returns:
        Gradients of the biased scores, summed per class ``(classes, heads, tq, tk)``, or None.
    """
    task = _task(q, k, v, tiles, scale, out, lse, merge)
    dq, dk, dv = grads
    alone = task.batch * task.kv_heads
    task.apart = written
    if not written:
        task.slices = _slices(alone, torch.get_num_threads(), task.tiles * _cuts(task, task.tq))
        task.cuts = _cuts(task, -(-task.slices // task.tiles))
    task.workers = _workers(task, alone * (task.tiles if written else task.slices))
    task.grad = rows_of(grad)
    task.grad_lse = _lse_rows(grad_lse)
    if task.slices > 1:
        dk, dv = (t.new_zeros(task.slices, *t.shape) for t in (dk, dv))
        task.slice_k, task.slice_v = dk.stride(0), dv.stride(0)
    task.dq, task.dk, task.dv = (rows_of(t[0] if t.ndim > 4 else t) for t in (dq, dk, dv))
    sums = None
    if need_scores:
        classes = 1 if tiles.bias is None else len(tiles.bias)
        wide = task.tk + -task.tk % lanes()
        sums = q.new_zeros(task.workers, classes, task.heads, task.tq, wide, dtype=torch.float32)
        task.sums, task.sums_worker = sums.data_ptr(), sums.stride(0)
    _run(task, "backward")
    if task.slices > 1:
        grads[1].add_(dk.sum(0))
        grads[2].add_(dv.sum(0))
    return None if sums is None else sums.sum(0)[..., : task.tk]


def _task(q: Tensor, k: Tensor, v: Tensor, tiles: TileSet, scale: float, out: Tensor, lse: Tensor | None, merge: bool) -> _Task:
    task = _Task(
        ahead=_ahead(k, v, tiles), narrow=q.dtype == torch.bfloat16, narrow_out=out.dtype == torch.bfloat16,
        batch=q.shape[0], heads=q.shape[2], kv_heads=k.shape[2], dim=q.shape[3], value=v.shape[3],
        q=rows_of(q), k=rows_of(k), v=rows_of(v), out=rows_of(out), lse=_lse_rows(lse),
        tiles=len(tiles.queries), tq=tiles.queries.shape[1], tk=tiles.keys.shape[3],
        queries=tiles.queries.data_ptr(), keys=tiles.keys.data_ptr(), kinds=tiles.kinds.data_ptr(),
        scale=scale, merge=merge, cuts=1, slices=1, workers=1,
    )  # fmt: skip
    task.keys_batch, task.keys_head = _steps(tiles.keys)
    if tiles.seen is not None:
        task.seen = tiles.seen.data_ptr()
        task.seen_batch, task.seen_head = _steps(tiles.seen)
    if tiles.bias is not None:
        task.bias, task.bias_kind = tiles.bias.data_ptr(), tiles.bias.stride(0)
        task.bias_head = tiles.bias.stride(1) if tiles.bias.shape[1] > 1 else 0
    return task


def _ahead(k: Tensor, v: Tensor, tiles: TileSet) -> bool:
    """Whether the keys of an item do not stay in the caches, or are not read often: few keys read often are there already."""
    size = k[0].numel() + v[0].numel()
    return size > NEAR or tiles.keys[0, 0].numel() < 4 * k.shape[1]


def rows_of(tensor: Tensor) -> RowsOf:
    """A tensor ``(batch, tokens, heads, ...)``, as C reads it."""
    return RowsOf(tensor.data_ptr(), *tensor.stride()[:3])


def _lse_rows(lse: Tensor | None) -> RowsOf:
    return RowsOf(None, 0, 0, 0) if lse is None else rows_of(lse)


def _steps(lists: Tensor) -> tuple[int, int]:
    """Steps of the batch and of the heads, 0 where they share."""
    return tuple(lists.stride(axis) if lists.shape[axis] > 1 else 0 for axis in (0, 1))  # type: ignore[return-value]  # two


def _workers(task: _Task, units: int) -> int:
    products = task.batch * task.heads * task.tiles * task.tq * task.tk * (task.dim + task.value)
    return 1 if products < SMALL else max(1, min(torch.get_num_threads(), units))


def _cuts(task: _Task, wanted: int) -> int:
    """Into how many pieces the queries of a tile can be cut, up to a number."""
    return max(1, min(wanted, task.tq // lanes()))


def _slices(units: int, threads: int, pieces: int) -> int:
    """Into how many slices the pieces of tiles are divided so that the units of work keep (almost) all threads busy."""

    def busy(slices: int) -> float:
        return units * slices / (-(-units * slices // threads) * threads)

    return max(range(1, min(threads, pieces) + 1), key=lambda slices: (min(busy(slices), 0.9), -slices))


def _run(task: _Task, direction: str) -> None:
    each = getattr(library(), f"regard_{direction}_scratch")(ctypes.byref(task))
    memory = lend(task, each)
    getattr(library(), f"regard_{direction}")(ctypes.byref(task))
    del memory
