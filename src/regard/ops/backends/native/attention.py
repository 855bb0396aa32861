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

from ....checks import shown
from ...compiled.library import library
from ...compiled.pointers import NOTHING, ROWS, SINGLE, RowsOf, block, rows
from ...compiled.scratch import lend

NEAR = 1 << 17
"""Numbers that stay in the cache next to a core but one."""
SMALL = 2e5
"""Below this many products of numbers, one thread is enough."""


@dataclass(frozen=True, eq=False)
class TileSet:
    """Tiles of one shape, checked when they are made: C reads them as they are.

    ``queries (tiles, tq)`` and ``keys (batch or 1, heads or 1, tiles, tk)`` are token numbers; ``kinds (tiles)`` the class of
    each tile; ``bias (classes, heads or 1, tq, padded tk)`` is added to the scores, -inf where a pair is hidden (see
    :func:`padded`); ``seen (batch or 1, heads or 1, tiles, tk)`` tells which keys exist. In tiles ``apart`` every key of the
    table stands once. ``ends`` is one more than the largest query, key and class that the lists name, found out where it is
    not given.

    Raises:
        ValueError: lists, biases or existence that do not go together.
    """

    queries: Tensor
    keys: Tensor
    kinds: Tensor
    bias: Tensor | None = None
    seen: Tensor | None = None
    apart: bool = False
    ends: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self) -> None:
        if self.queries.ndim != 2 or self.keys.ndim != 4:
            raise ValueError(f"tiles are queries (tiles, tq) and keys (batch, heads, tiles, tk); got {self._described()}")
        tiles, tq, tk = *self.queries.shape, self.keys.shape[3]
        if self.ends == (0, 0, 0):
            object.__setattr__(self, "ends", tuple(_end(lists) for lists in (self.queries, self.keys, self.kinds)))
        _check_lists("queries", self.queries, (tiles, tq))
        _check_lists("keys", self.keys, (*self.keys.shape[:2], tiles, tk))
        _check_lists("kinds", self.kinds, (tiles,))
        if self.seen is not None:
            shape = (len(self.seen), self.seen.shape[1], tiles, tk)
            block("the keys that exist", self.seen, shape, (torch.bool,))
            if self.seen.shape[1] not in (1, self.keys.shape[1]):
                raise ValueError(f"keys exist per head where they are listed per head; got {self._described()}")
        if self.bias is not None:
            shape = (len(self.bias), self.bias.shape[1], tq, tk + -tk % lanes())
            block("the bias", self.bias, shape, SINGLE)
            if len(self.bias) < self.ends[2]:
                raise ValueError(f"there are {self.ends[2]} classes of tiles; got {self._described()}")

    def _described(self) -> str:
        names = ("queries", "keys", "kinds", "bias", "seen")
        return ", ".join(f"{name} {shown(value)}" for name in names if (value := getattr(self, name)) is not None)

    def check(self, batch: int, heads: int, queries: int, keys: int) -> None:
        """Check that the tiles lie within tensors of so many batch items, heads, queries and keys.

        Raises:
            ValueError: a token, or a number of items or heads, that is not there.
        """
        lists = [lists for lists in (self.keys, self.seen) if lists is not None]
        broadcast = all(len(t) in (1, batch) and t.shape[1] in (1, heads) for t in lists)
        if not broadcast or (self.bias is not None and self.bias.shape[1] not in (1, heads)):
            raise ValueError(f"tiles do not broadcast to a batch of {batch} with {heads} heads: {self._described()}")
        if self.ends[0] > queries or self.ends[1] > keys:
            raise ValueError(
                f"tiles name queries up to {self.ends[0] - 1} and keys up to {self.ends[1] - 1}; "
                f"there are {queries} queries and {keys} keys"
            )


def _end(lists: Tensor) -> int:
    """One more than the largest number of a list.

    Raises:
        ValueError: it is empty, or has a negative number.
    """
    if lists.numel() == 0:
        raise ValueError(f"lists of tiles must not be empty; got {shown(lists)}")
    least, most = (int(end) for end in lists.aminmax())
    if least < 0:
        raise ValueError(f"tiles are lists of token numbers from 0 on; got {least}")
    return most + 1


def _check_lists(name: str, lists: Tensor, shape: tuple[int, ...]) -> None:
    block(f"the list of {name}", lists, shape, (torch.int64,))


class Task(ctypes.Structure):
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
    if merge and (lse is None or out.dtype != torch.float32):
        raise ValueError(f"outputs are merged in float32 and with their log-sum-exp; got {shown(out)} and {shown(lse)}")
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
    if out.dtype != q.dtype:
        raise ValueError(f"out must be of the type of q, {q.dtype}; got {shown(out)}")
    task.grad = rows("the gradient of out", grad, out.shape, (q.dtype,))
    task.grad_lse = _lse_rows(grad_lse, q)
    if task.slices > 1:
        dk, dv = (t.new_zeros(task.slices, *t.shape) for t in (dk, dv))
        task.slice_k, task.slice_v = dk.stride(0), dv.stride(0)
    task.dq = rows("the gradient of q", dq, q.shape, SINGLE)
    task.dk = rows("the gradient of k", dk[0] if dk.ndim > 4 else dk, k.shape, SINGLE)
    task.dv = rows("the gradient of v", dv[0] if dv.ndim > 4 else dv, v.shape, SINGLE)
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


def _task(q: Tensor, k: Tensor, v: Tensor, tiles: TileSet, scale: float, out: Tensor, lse: Tensor | None, merge: bool) -> Task:
    """The task of a set of tiles, all of it checked.

    Raises:
        ValueError: tensors and tiles that do not go together.
    """
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or q.dtype not in ROWS:
        raise ValueError(f"q, k and v must be float32 or bfloat16 with 4 axes; got {shown(q)}, {shown(k)} and {shown(v)}")
    (batch, queries, heads, dim), (keys, kv_heads), value = q.shape, k.shape[1:3], v.shape[3]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"the heads of q must be a multiple of those of k; got {shown(q)} and {shown(k)}")
    tiles.check(batch, heads, queries, keys)
    task = Task(
        ahead=_ahead(k, v, tiles), narrow=q.dtype == torch.bfloat16, narrow_out=out.dtype == torch.bfloat16,
        batch=batch, heads=heads, kv_heads=kv_heads, dim=dim, value=value,
        q=rows("q", q, (batch, queries, heads, dim), (q.dtype,)),
        k=rows("k", k, (batch, keys, kv_heads, dim), (q.dtype,)),
        v=rows("v", v, (batch, keys, kv_heads, value), (q.dtype,)),
        out=rows("out", out, (batch, queries, heads, value), ROWS), lse=_lse_rows(lse, q),
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


def _lse_rows(lse: Tensor | None, q: Tensor) -> RowsOf:
    return NOTHING if lse is None else rows("the log-sum-exp", lse, q.shape[:3], SINGLE)


def _steps(lists: Tensor) -> tuple[int, int]:
    """Steps of the batch and of the heads, 0 where they share."""
    return tuple(lists.stride(axis) if lists.shape[axis] > 1 else 0 for axis in (0, 1))  # type: ignore[return-value]  # two


def _workers(task: Task, units: int) -> int:
    products = task.batch * task.heads * task.tiles * task.tq * task.tk * (task.dim + task.value)
    return 1 if products < SMALL else max(1, min(torch.get_num_threads(), units))


def _cuts(task: Task, wanted: int) -> int:
    """Into how many pieces the queries of a tile can be cut, up to a number."""
    return max(1, min(wanted, task.tq // lanes()))


def _slices(units: int, threads: int, pieces: int) -> int:
    """Into how many slices the pieces of tiles are divided so that the units of work keep (almost) all threads busy."""

    def busy(slices: int) -> float:
        return units * slices / (-(-units * slices // threads) * threads)

    return max(range(1, min(threads, pieces) + 1), key=lambda slices: (min(busy(slices), 0.9), -slices))


def _run(task: Task, direction: str) -> None:
    each = getattr(library(), f"regard_{direction}_scratch")(ctypes.byref(task))
    memory = lend(task, each)
    getattr(library(), f"regard_{direction}")(ctypes.byref(task))
    del memory
