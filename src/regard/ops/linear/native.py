"""Calls of the compiled linear attention, in the places of the functions of :mod:`regard.ops.linear.chunks`."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from ...checks import shown
from ..compiled.library import library
from ..compiled.pointers import ROWS, SINGLE, RowsOf, block, rows
from ..compiled.scratch import lend

ACTIVATIONS = ("none", "relu", "elu_plus_one", "silu")
"""In the order of their numbers in C."""
LONGEST = 128
"""Tokens of a chunk at most: its scores stay in the cache."""


def serves(name: str, x: Tensor) -> bool:
    """Whether a function is compiled, and the heads of ``(batch, tokens, heads, dim)`` keep the threads busy enough.

    In order, each head is done by one; over all keys the tokens are shared out too. An empty tensor is nothing to C.
    """
    if x.numel() == 0:
        return False
    return name in ("memory", "read") or (name in ("scan", "scan_backward") and 3 * _heads(x) >= torch.get_num_threads())


def _heads(x: Tensor) -> int:
    return x.shape[0] * x.shape[2]


class Scan(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("narrow", "narrow_values", "batch", "heads", "tokens", "dim", "value")),
        *((name, ctypes.c_int64) for name in ("chunk", "activation")),
        *((name, RowsOf) for name in ("q", "k", "v", "out", "decay")),
        ("valid", ctypes.c_void_p),
        ("valid_batch", ctypes.c_int64),
        ("state", ctypes.c_void_p),
        *((name, RowsOf) for name in ("grad", "dq", "dk", "dv", "ddecay")),
        ("grad_state", ctypes.c_void_p),
        ("slices", ctypes.c_int64),
        ("total", ctypes.c_void_p),
        ("factors", RowsOf),
        *((name, ctypes.c_double) for name in ("floor", "eps")),
        ("scratch", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("scratch_worker", "workers")),
    ]


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    state: Tensor | None,
    valid: Tensor | None,
    activation: str,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """:func:`regard.ops.linear.chunks.linear_scan`; decays are one per head, or per token and head."""
    q, k, v = (_contiguous_rows(t) for t in (q, k, v))
    logs, exist, final = _logs(decay), _exist(valid), _initial(q, v, state)
    out = v.new_empty(*q.shape[:-1], v.shape[-1])
    task = _task(q, k, v, logs, exist, final, activation, chunk)
    task.out = rows("the output", out, v.shape, (v.dtype,))
    _run(task, "scan")
    return out, final


def scan_backward(
    grad: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    state: Tensor | None,
    valid: Tensor | None,
    activation: str,
    chunk: int,
    need_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`regard.ops.linear.chunks.linear_scan_backward`."""
    grad, q, k, v = (_contiguous_rows(t) for t in (grad.to(v.dtype), q, k, v))
    logs, exist, before, grad_state = _logs(decay), _exist(valid), _initial(q, v, state), _initial(q, v, grad_final)
    grads = tuple(t.new_empty(t.shape) for t in (q, k, v))
    task = _task(q, k, v, logs, exist, before, activation, chunk)
    task.grad = rows("the gradient of the output", grad, v.shape, (v.dtype,))
    task.grad_state = block("the gradient of the state", grad_state, before.shape, SINGLE)
    task.dq, task.dk, task.dv = (rows("a gradient", of, t.shape, (t.dtype,)) for of, t in zip(grads, (q, k, v), strict=True))
    changes = q.new_empty(q.shape[:3], dtype=torch.float32) if need_decay and decay is not None else None
    if changes is not None:
        task.ddecay = rows("the gradient of the decays", changes, q.shape[:3], SINGLE)
    _run(task, "scan_backward")
    if changes is None or decay is None:
        return *grads, q.new_empty(0), grad_state  # type: ignore[return-value]  # three of them
    return *grads, (changes.sum((0, 1)) if decay.ndim == 1 else changes).to(decay.dtype), grad_state  # type: ignore[return-value]


def memory(k: Tensor, v: Tensor, valid: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    """:func:`regard.ops.linear.memory.linear_memory`."""
    k, v = _contiguous_rows(k), _contiguous_rows(v)
    exist, slices = _exist(valid), _slices(k)
    products = k.new_empty(slices, k.shape[0], k.shape[2], k.shape[3], v.shape[3], dtype=torch.float32)
    total = k.new_empty(products.shape[:-1], dtype=torch.float32)
    task = _task(k, k, v, None, exist, products, activation, LONGEST, slices)
    task.total = block("the sums of the keys", total, products.shape[:-1], SINGLE)
    _run(task, "memory")
    return products.sum(0), total.sum(0)


def read(
    q: Tensor, memory: Tensor, total: Tensor | None, floor: float | None, eps: float, activation: str
) -> tuple[Tensor, Tensor]:
    """:func:`regard.ops.linear.memory.linear_read`."""
    q, memory = _contiguous_rows(q), memory.contiguous()
    out = q.new_empty(*q.shape[:-1], memory.shape[-1])
    factors = q.new_empty(q.shape[:-1] if total is not None else (0,), dtype=torch.float32)
    task = _task(q, q, out, None, None, memory, activation, LONGEST, _slices(q))
    task.out = rows("the output", out, out.shape, (q.dtype,))
    if total is not None:
        total = total.contiguous()
        task.total = block("the sum of the keys", total, memory.shape[:-1], SINGLE)
        task.factors = rows("the factors", factors, q.shape[:3], SINGLE)
        task.floor, task.eps = -math.inf if floor is None else floor, eps
    _run(task, "read")
    return out, factors


def _slices(x: Tensor) -> int:
    """Into how many slices the chunks of a head are cut: four units of work for each thread, if there are so many chunks."""
    return max(1, min(-(-4 * torch.get_num_threads() // _heads(x)), -(-x.shape[1] // LONGEST)))


def _contiguous_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _logs(decay: Tensor | None) -> Tensor | None:
    """``(batch, tokens, heads, 1)`` in float32, with steps of 0 where it is the same."""
    if decay is None:
        return None
    decay = decay.to(torch.float32)
    return decay[..., None] if decay.ndim == 3 else decay[None, None, :, None].expand(1, 1, -1, 1)


def _exist(valid: Tensor | None) -> Tensor | None:
    return None if valid is None else valid.contiguous()


def _initial(q: Tensor, v: Tensor, state: Tensor | None) -> Tensor:
    if state is not None:
        return state.clone(memory_format=torch.contiguous_format)
    return q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)


def _task(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logs: Tensor | None,
    exist: Tensor | None,
    states: Tensor,
    activation: str,
    chunk: int,
    slices: int = 0,
) -> Scan:
    """A task, all of it checked.

    Args:
        q, k, v: ``(batch, tokens, heads, width)``, the last axis contiguous.
        logs: logarithms of decays ``(batch or 1, tokens or 1, heads, 1)``.
        exist: ``(batch or 1, tokens)``.
        states: ``(batch, heads, dim, value)``; a sum of keys in several ``slices`` has one of them in front.
        activation: by name.
        chunk: tokens at once.
        slices: of the chunks over all keys; 0 for a scan in order.

    Raises:
        ValueError: tensors that do not go together.
    """
    if q.ndim != 4 or v.ndim != 4:
        raise ValueError(f"compiled linear attention is of 4 axes; got {shown(q)} and {shown(v)}")
    (batch, tokens, heads, dim), value = q.shape, v.shape[3]
    ahead = (slices,) if states.ndim == 5 else ()
    task = Scan(
        narrow=q.dtype == torch.bfloat16, narrow_values=v.dtype == torch.bfloat16, batch=batch, heads=heads, tokens=tokens,
        dim=dim, value=value, chunk=max(1, min(chunk, LONGEST)), activation=ACTIVATIONS.index(activation),
        q=rows("q", q, (batch, tokens, heads, dim), ROWS), k=rows("k", k, (batch, tokens, heads, dim), (q.dtype,)),
        v=rows("v", v, (batch, tokens, heads, value), ROWS),
        state=block("the state", states, (*ahead, batch, heads, dim, value), SINGLE),
        slices=slices, workers=max(1, min(torch.get_num_threads(), max(1, slices) * batch * heads)),
    )  # fmt: skip
    if logs is not None:
        steps = tuple(n if of == n else 1 for n, of in zip((batch, tokens, heads), logs.shape, strict=False))
        where = rows("the logarithms of the decays", logs, (*steps, 1), SINGLE)
        task.decay = RowsOf(where.at, *(step if n > 1 else 0 for step, n in zip(logs.stride()[:3], steps, strict=True)))
    if exist is not None:
        task.valid = block("the keys that exist", exist, (len(exist) if len(exist) == 1 else batch, tokens), (torch.bool,))
        task.valid_batch = exist.stride(0) if len(exist) > 1 else 0
    return task


def _run(task: Scan, name: str) -> None:
    memory = lend(task, getattr(library(), f"regard_{name}_scratch")(ctypes.byref(task)))
    getattr(library(), f"regard_{name}")(ctypes.byref(task))
    del memory
