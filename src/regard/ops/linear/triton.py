"""Linear attention in Triton: the causal form by chunks in parallel, and the two products of the form over all keys.

    causal:  added_c = (leave f(K_c))^T V_c  for all chunks at once;  states by one pass over chunks;
             Y_c = (f(Q_c) f(K_c)^T * D) V_c + enter f(Q_c) S_c  for all chunks at once
    else:    M = f(K)^T V and z = sum f(K) in parts;  Y = f(Q) M / (f(Q) z)

Programs own tiles of at most 64 tokens, 64 features and 64 values. Decays inside a chunk are sums of logarithms between two
tokens, masked before the exponential; nothing is subtracted, so any decay is safe. States, sums and products are float32;
operands are in the dtype of the inputs, but for float16, whose range the states leave: those are multiplied as tf32.

Cost: as :mod:`regard.ops.linear.chunks`, and one writing and two readings of the states at the borders of chunks, tokens /
chunk matrices of dim x value_dim float32. Source: Qin et al., Lightning Attention-2, arXiv:2401.04658 (its parallel form).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from .norms import inverse

P = ParamSpec("P")
R = TypeVar("R")

TILE = 64
"""The most tokens, features and values of a tile."""

SMALLEST = tl.constexpr(torch.finfo(torch.float32).tiny)
"""A smaller divisor counts as 0."""

WARPS = {"num_warps": 8, "num_stages": 1}
"""With these no kernel spills registers on sm_90 up to widths of 128; unmeasured on a GPU."""


def crowded(kind: tl.dtype) -> dict[str, int]:
    """The most features and values of a tile in the kernel of the gradients of q and k, where six tiles live at once."""
    return {"BD": TILE if kind == tl.bfloat16 else TILE // 2, "BE": TILE // 2}


def stepped(dim: int) -> dict[str, int]:
    """Features that kernels take at once where they hold a product of queries and keys beside their output: in several steps
    registers for half as many."""
    return {"BD": TILE // 2 if dim > TILE else _block(dim)}


PARTS = 64
"""Parts that the tokens are cut into for sums over all of them."""


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    x = x.to(tl.float32)
    if ACTIVATION == "relu":
        x = tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "elu_plus_one":
        x = tl.where(x > 0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
    elif ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    return x


@triton.jit
def _slope(x, ACTIVATION: tl.constexpr):
    x = x.to(tl.float32)
    slope = tl.full(x.shape, 1.0, tl.float32)
    if ACTIVATION == "relu":
        slope = tl.where(x > 0, 1.0, 0.0)
    elif ACTIVATION == "elu_plus_one":
        slope = tl.exp(tl.minimum(x, 0.0))
    elif ACTIVATION == "silu":
        gate = 1.0 / (1.0 + tl.exp(-x))
        slope = gate * (1.0 + x * (1.0 - gate))
    return slope


@triton.jit
def _tile(base, item, head, token, first, tokens, heads, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers and mask of some tokens and channels of ``(batch, tokens, heads, width)``."""
    channel = first + tl.arange(0, BLOCK)
    pointer = base + ((item * tokens + token.to(tl.int64)) * heads + head)[:, None] * WIDTH + channel[None, :]
    return pointer, (token < tokens)[:, None] & (channel < WIDTH)[None, :]


@triton.jit
def _matrix(base, row, first, second, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """Pointers and mask of a part of the ``row``-th matrix ``(rows, columns)``."""
    i, j = first + tl.arange(0, BR), second + tl.arange(0, BC)
    pointer = base + row.to(tl.int64) * (ROWS * COLUMNS) + i[:, None] * COLUMNS + j[None, :]
    return pointer, (i < ROWS)[:, None] & (j < COLUMNS)[None, :]


@triton.jit
def _read(pair):
    return tl.load(pair[0], mask=pair[1], other=0.0)


@triton.jit
def _features(pair, ACTIVATION: tl.constexpr):
    """Activated channels; those beyond the width stay 0."""
    return tl.where(pair[1], _activate(_read(pair), ACTIVATION), 0.0)


@triton.jit
def _present(pair, live):
    """Only of tokens that are live: nothing is read of the others, whatever stands there."""
    return pair[0], pair[1] & live[:, None]


@triton.jit
def _write(pair, value):
    tl.store(pair[0], value.to(pair[0].dtype.element_ty), mask=pair[1])


@triton.jit
def _live(base, item, token, tokens, PRESENT: tl.constexpr):
    """Whether tokens exist, and are valid where that is told."""
    live = token < tokens
    if PRESENT:
        live = live & (tl.load(base + item * tokens + token, mask=live, other=0) != 0)
    return live


@triton.jit
def _logs(decay, item, head, token, tokens, by_item, by_token, by_head):
    pointer = decay + item * by_item + token.to(tl.int64) * by_token + head * by_head
    return tl.load(pointer, mask=token < tokens, other=0.0).to(tl.float32)


@triton.jit
def _entering(decay, item, head, token, tokens, by_item, by_token, by_head):
    """What each token of a chunk sees of the state before."""
    return tl.exp(tl.cumsum(_logs(decay, item, head, token, tokens, by_item, by_token, by_head), 0))


@triton.jit
def _leaving(decay, item, head, token, last, tokens, by_item, by_token, by_head):
    """What is left of each token of a chunk in the state after."""
    logs = _logs(decay, item, head, token + 1, tokens, by_item, by_token, by_head)
    return tl.exp(tl.cumsum(tl.where(token < last, logs, 0.0), 0, reverse=True))


@triton.jit
def _between(decay, item, head, token, tokens, by_item, by_token, by_head, DECAY: tl.constexpr):
    """What is left of each token of a chunk at each later one, 0 at earlier ones."""
    later = token[:, None] >= token[None, :]
    if DECAY:
        logs = _logs(decay, item, head, token, tokens, by_item, by_token, by_head)
        sums = tl.cumsum(tl.where(token[:, None] > token[None, :], logs[:, None], 0.0), 0)
        return tl.where(later, tl.exp(tl.where(later, sums, 0.0)), 0.0)
    return tl.where(later, 1.0, 0.0)


@triton.jit
def _added_kernel(
    x, y, valid, decay, out, tokens, heads, chunks, by_item, by_token, by_head,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr, ACTIVATION: tl.constexpr,
    VALID: tl.constexpr, DECAY: tl.constexpr, ENTER: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What every chunk adds to the state: ``(leave f(x))^T y``; backward, to its gradient: ``(enter f(x))^T y``."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    first, second = tl.program_id(2) // tl.cdiv(E, BE) * BD, tl.program_id(2) % tl.cdiv(E, BE) * BE
    item, head = (row // heads).to(tl.int64), row % heads
    token = chunk * BT + tl.arange(0, BT)
    live = _live(valid, item, token, tokens, VALID)
    left = _features(_present(_tile(x, item, head, token, first, tokens, heads, D, BD), live), ACTIVATION)
    right = _read(_present(_tile(y, item, head, token, second, tokens, heads, E, BE), live))
    if DECAY:
        if ENTER:
            left *= _entering(decay, item, head, token, tokens, by_item, by_token, by_head)[:, None]
        else:
            last = chunk * BT + BT - 1
            left *= _leaving(decay, item, head, token, last, tokens, by_item, by_token, by_head)[:, None]
    added = tl.dot(tl.trans(left).to(KIND), right.to(KIND), input_precision=PRECISION)
    _write(_matrix(out, row * chunks + chunk, first, second, D, E, BD, BE), added)


@triton.jit
def _states_kernel(
    states, decay, state, tokens, heads, chunks, by_item, by_token, by_head,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, BT: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Replace what chunks add by the state before them (after them in reverse); ``state`` moves to the other end."""
    row = tl.program_id(0)
    item, head = (row // heads).to(tl.int64), row % heads
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < SIZE
    running = tl.load(state + row.to(tl.int64) * SIZE + entry, mask=inside, other=0.0)
    for i in range(chunks):
        chunk = chunks - 1 - i if REVERSE else i
        pointer = states + (row.to(tl.int64) * chunks + chunk) * SIZE + entry
        added = tl.load(pointer, mask=inside, other=0.0)
        tl.store(pointer, running, mask=inside)
        if DECAY:
            token = chunk * BT + tl.arange(0, BT)
            running = running * tl.exp(tl.sum(_logs(decay, item, head, token, tokens, by_item, by_token, by_head), 0))
        running += added
    tl.store(state + row.to(tl.int64) * SIZE + entry, running, mask=inside)


@triton.jit
def _output_kernel(
    q, k, v, valid, decay, states, out, tokens, heads, chunks, by_item, by_token, by_head,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr, ACTIVATION: tl.constexpr,
    VALID: tl.constexpr, DECAY: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``(f(q) f(k)^T * D) v + enter f(q) S``."""
    row, chunk, second = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BE
    item, head = (row // heads).to(tl.int64), row % heads
    token = chunk * BT + tl.arange(0, BT)
    live = _live(valid, item, token, tokens, VALID)
    scores, y = tl.zeros((BT, BT), tl.float32), tl.zeros((BT, BE), tl.float32)
    for first in range(0, D, BD):
        queries = _features(_tile(q, item, head, token, first, tokens, heads, D, BD), ACTIVATION).to(KIND)
        keys = _features(_present(_tile(k, item, head, token, first, tokens, heads, D, BD), live), ACTIVATION).to(KIND)
        before = _read(_matrix(states, row * chunks + chunk, first, second, D, E, BD, BE)).to(KIND)
        scores += tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        y += tl.dot(queries, before, input_precision=PRECISION)
    if DECAY:
        y *= _entering(decay, item, head, token, tokens, by_item, by_token, by_head)[:, None]
    scores *= _between(decay, item, head, token, tokens, by_item, by_token, by_head, DECAY)
    values = _read(_present(_tile(v, item, head, token, second, tokens, heads, E, BE), live)).to(KIND)
    y += tl.dot(scores.to(KIND), values, input_precision=PRECISION)
    _write(_tile(out, item, head, token, second, tokens, heads, E, BE), y)


@triton.jit
def _keys_kernel(
    q, k, v, grad, valid, decay, before, after, grad_q, grad_k, grad_decay, tokens, heads, chunks, by_item, by_token, by_head,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr, ACTIVATION: tl.constexpr,
    VALID: tl.constexpr, DECAY: tl.constexpr, LEARNED: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of q and k, and what some features add to that of the decay ``(parts, batch, heads, tokens)``."""
    row, chunk, first = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BD
    item, head = (row // heads).to(tl.int64), row % heads
    token = chunk * BT + tl.arange(0, BT)
    live = _live(valid, item, token, tokens, VALID)
    scores = tl.zeros((BT, BT), tl.float32)
    read, written = tl.zeros((BT, BD), tl.float32), tl.zeros((BT, BD), tl.float32)
    carried = 0.0
    for second in range(0, E, BE):
        y = _read(_tile(grad, item, head, token, second, tokens, heads, E, BE)).to(KIND)
        values = _read(_present(_tile(v, item, head, token, second, tokens, heads, E, BE), live)).to(KIND)
        old = _read(_matrix(before, row * chunks + chunk, first, second, D, E, BD, BE))
        new = _read(_matrix(after, row * chunks + chunk, first, second, D, E, BD, BE))
        scores += tl.dot(y, tl.trans(values), input_precision=PRECISION)
        read += tl.dot(y, tl.trans(old).to(KIND), input_precision=PRECISION)
        written += tl.dot(values, tl.trans(new).to(KIND), input_precision=PRECISION)
        if LEARNED:
            carried += tl.sum(old * new)
    scores = (scores * _between(decay, item, head, token, tokens, by_item, by_token, by_head, DECAY)).to(KIND)
    raw_q = _read(_tile(q, item, head, token, first, tokens, heads, D, BD))
    raw_k = _read(_present(_tile(k, item, head, token, first, tokens, heads, D, BD), live))
    inside = (first + tl.arange(0, BD) < D)[None, :]
    queries = tl.where(inside, _activate(raw_q, ACTIVATION), 0.0)
    keys = tl.where(inside & live[:, None], _activate(raw_k, ACTIVATION), 0.0)
    of_q = tl.dot(scores, keys.to(KIND), input_precision=PRECISION)
    of_k = tl.dot(tl.trans(scores), queries.to(KIND), input_precision=PRECISION)
    if DECAY:
        logs = _logs(decay, item, head, token, tokens, by_item, by_token, by_head)
        last = chunk * BT + BT - 1
        read *= _entering(decay, item, head, token, tokens, by_item, by_token, by_head)[:, None]
        written *= _leaving(decay, item, head, token, last, tokens, by_item, by_token, by_head)[:, None]
        if LEARNED:
            local = tl.sum(queries * (of_q + read) - keys * of_k, 1)
            left = tl.sum(keys * written, 1)
            total = tl.cumsum(local, 0, reverse=True) + tl.cumsum(left, 0) - left + carried * tl.exp(tl.sum(logs, 0))
            part = tl.program_id(2) * tl.num_programs(0) + row
            tl.store(grad_decay + part.to(tl.int64) * tokens + token, total, mask=token < tokens)
    of_q = (of_q + read) * _slope(raw_q, ACTIVATION)
    of_k = tl.where(live[:, None], (of_k + written) * _slope(raw_k, ACTIVATION), 0.0)
    _write(_tile(grad_q, item, head, token, first, tokens, heads, D, BD), of_q)
    _write(_tile(grad_k, item, head, token, first, tokens, heads, D, BD), of_k)


@triton.jit
def _values_kernel(
    q, k, grad, valid, decay, after, grad_v, tokens, heads, chunks, by_item, by_token, by_head,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr, ACTIVATION: tl.constexpr,
    VALID: tl.constexpr, DECAY: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of v: ``(f(q) f(k)^T * D)^T grad + leave f(k) dS``."""
    row, chunk, second = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BE
    item, head = (row // heads).to(tl.int64), row % heads
    token = chunk * BT + tl.arange(0, BT)
    live = _live(valid, item, token, tokens, VALID)
    scores, of_v = tl.zeros((BT, BT), tl.float32), tl.zeros((BT, BE), tl.float32)
    for first in range(0, D, BD):
        queries = _features(_tile(q, item, head, token, first, tokens, heads, D, BD), ACTIVATION).to(KIND)
        keys = _features(_present(_tile(k, item, head, token, first, tokens, heads, D, BD), live), ACTIVATION).to(KIND)
        new = _read(_matrix(after, row * chunks + chunk, first, second, D, E, BD, BE)).to(KIND)
        scores += tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        of_v += tl.dot(keys, new, input_precision=PRECISION)
    if DECAY:
        last = chunk * BT + BT - 1
        of_v *= _leaving(decay, item, head, token, last, tokens, by_item, by_token, by_head)[:, None]
    scores *= _between(decay, item, head, token, tokens, by_item, by_token, by_head, DECAY)
    y = _read(_tile(grad, item, head, token, second, tokens, heads, E, BE)).to(KIND)
    of_v += tl.dot(tl.trans(scores).to(KIND), y, input_precision=PRECISION)
    _write(_tile(grad_v, item, head, token, second, tokens, heads, E, BE), of_v)


@triton.jit
def _memory_kernel(
    x, y, of_product, of_sum, products, sums, tokens, heads, length,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr, ACTIVATION: tl.constexpr,
    KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of one part of the tokens the sums of ``a f(x) y^T`` and of ``b f(x)``; a and b are numbers per token and head.

    A token whose a is 0 counts nothing, whatever stands there.
    """
    row, part = tl.program_id(0), tl.program_id(1)
    first, second = tl.program_id(2) // tl.cdiv(E, BE) * BD, tl.program_id(2) % tl.cdiv(E, BE) * BE
    item, head = (row // heads).to(tl.int64), row % heads
    product, total = tl.zeros((BD, BE), tl.float32), tl.zeros((BD,), tl.float32)
    end = tl.minimum(part * length + length, tokens)
    for start in range(part * length, end, BT):
        token = start + tl.arange(0, BT)
        place = (item * tokens + token) * heads + head
        a = tl.load(of_product + place, mask=token < end, other=0.0)
        b = tl.load(of_sum + place, mask=token < end, other=0.0)
        left = _features(_present(_tile(x, item, head, token, first, tokens, heads, D, BD), a != 0.0), ACTIVATION)
        right = _read(_present(_tile(y, item, head, token, second, tokens, heads, E, BE), a != 0.0))
        product += tl.dot(tl.trans(left * a[:, None]).to(KIND), right.to(KIND), input_precision=PRECISION)
        total += tl.sum(left * b[:, None], 0)
    _write(_matrix(products, part * tl.num_programs(0) + row, first, second, D, E, BD, BE), product)
    if second == 0:
        channel = first + tl.arange(0, BD)
        target = sums + (part * tl.num_programs(0) + row).to(tl.int64) * D + channel
        tl.store(target, total, mask=channel < D)


@triton.jit
def _read_kernel(
    x, memory, total, of_token, floor, eps, out, mass, tokens, heads,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr, ACTIVATION: tl.constexpr,
    DIVIDE: tl.constexpr, WEIGH: tl.constexpr, FLOOR: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``f(x) M``, divided by ``max(f(x) z, floor) + eps`` or times a number per token and head."""
    row, second = tl.program_id(0), tl.program_id(2) * BE
    item, head = (row // heads).to(tl.int64), row % heads
    token = tl.program_id(1) * BT + tl.arange(0, BT)
    place = (item * tokens + token) * heads + head
    y, sums = tl.zeros((BT, BE), tl.float32), tl.zeros((BT,), tl.float32)
    for first in range(0, D, BD):
        queries = _features(_tile(x, item, head, token, first, tokens, heads, D, BD), ACTIVATION)
        seen = _read(_matrix(memory, row, first, second, D, E, BD, BE)).to(KIND)
        y += tl.dot(queries.to(KIND), seen, input_precision=PRECISION)
        if DIVIDE:
            channel = first + tl.arange(0, BD)
            z = tl.load(total + row.to(tl.int64) * D + channel, mask=channel < D, other=0.0)
            sums += tl.sum(queries * z[None, :], 1)
    if DIVIDE:
        divisor = sums
        if FLOOR:
            divisor = tl.maximum(divisor, floor)
        divisor += eps
        gone = tl.abs(divisor) < SMALLEST
        y *= tl.where(gone, 0.0, 1.0 / tl.where(gone, 1.0, divisor))[:, None]
        if second == 0:
            tl.store(mass + place, sums, mask=token < tokens)
    if WEIGH:
        weight = tl.load(of_token + place, mask=token < tokens, other=0.0)[:, None]
        y = tl.where(weight == 0.0, 0.0, y * weight)
    _write(_tile(out, item, head, token, second, tokens, heads, E, BE), y)


@triton.jit
def _turned_kernel(
    y, x, memory, total, of_product, of_sum, out, tokens, heads,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr, ACTIVATION: tl.constexpr,
    SUM: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of x: ``(a y M^T + b z) f'(x)``; a and b are numbers per token and head, and 0 where a is."""
    row, first = tl.program_id(0), tl.program_id(2) * BD
    item, head = (row // heads).to(tl.int64), row % heads
    token = tl.program_id(1) * BT + tl.arange(0, BT)
    place = (item * tokens + token) * heads + head
    found = tl.zeros((BT, BD), tl.float32)
    for second in range(0, E, BE):
        values = _read(_tile(y, item, head, token, second, tokens, heads, E, BE)).to(KIND)
        seen = _read(_matrix(memory, row, first, second, D, E, BD, BE)).to(KIND)
        found += tl.dot(values, tl.trans(seen), input_precision=PRECISION)
    found *= tl.load(of_product + place, mask=token < tokens, other=0.0)[:, None]
    if SUM:
        channel = first + tl.arange(0, BD)
        z = tl.load(total + row.to(tl.int64) * D + channel, mask=channel < D, other=0.0)
        found += tl.load(of_sum + place, mask=token < tokens, other=0.0)[:, None] * z[None, :]
    found *= _slope(_read(_tile(x, item, head, token, first, tokens, heads, D, BD)), ACTIVATION)
    counts = tl.load(of_product + place, mask=token < tokens, other=0.0) != 0.0
    found = tl.where(counts[:, None], found, 0.0)
    _write(_tile(out, item, head, token, first, tokens, heads, D, BD), found)


# --------------------------------------------------------------------------------------------------------------------
# launches


def _there(function: Callable[P, R]) -> Callable[P, R]:
    """Kernels start on the current device: make it that of the first operand."""

    @functools.wraps(function)
    def run(*arguments: P.args, **options: P.kwargs) -> R:
        device = arguments[0].device  # type: ignore[attr-defined]  # a tensor
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return function(*arguments, **options)

    return run


def _block(width: int) -> int:
    return min(TILE, max(16, triton.next_power_of_2(width)))


def _options(x: Tensor, dim: int, value: int, activation: str) -> dict:
    """Compile-time arguments that all kernels but that of the states share."""
    kind = tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float32
    precision = "tf32" if x.dtype == torch.float16 else "ieee"
    return {
        "D": dim, "E": value, "BD": _block(dim), "BE": _block(value), "ACTIVATION": activation, "KIND": kind,
        "PRECISION": precision, **WARPS,
    }  # fmt: skip


class _Scan:
    """What the launches of one causal attention share."""

    def __init__(self, q: Tensor, v: Tensor, decay: Tensor | None, valid: Tensor | None, activation: str, chunk: int) -> None:
        self.batch, self.tokens, self.heads, dim = q.shape
        self.tile = min(TILE, max(16, chunk))
        self.chunks = triton.cdiv(self.tokens, self.tile)
        self.rows = self.batch * self.heads
        self.options = _options(q, dim, v.shape[-1], activation) | {"BT": self.tile, "DECAY": decay is not None}
        self.decay = q if decay is None else decay
        self.strides: tuple[int, ...] = (0, 0, 0)
        if decay is not None:
            self.strides = (0, 0, decay.stride(0)) if decay.ndim == 1 else decay.stride()
        self.valid = q if valid is None else valid.contiguous()
        self.masked = valid is not None

    def grid(self, *widths: str) -> tuple[int, int, int]:
        """Programs: rows first, of which there may be more than the 65535 that the other axes hold."""
        return self.rows, self.chunks, math.prod(triton.cdiv(self.options[w], self.options[f"B{w}"]) for w in widths)

    def sizes(self) -> tuple:
        return (self.tokens, self.heads, self.chunks, *self.strides)

    def states(self, x: Tensor, y: Tensor, state: Tensor, reverse: bool = False) -> Tensor:
        """States at all chunks ``(batch * heads, chunks, dim, value_dim)``; ``state`` moves to the other end."""
        dim, value = self.options["D"], self.options["E"]
        added = torch.empty(self.rows, self.chunks, dim, value, dtype=torch.float32, device=x.device)
        masked = self.masked and not reverse  # queries are all there
        _added_kernel[self.grid("D", "E")](
            x, y, self.valid, self.decay, added, *self.sizes(), **self.options, VALID=masked, ENTER=reverse
        )
        block = min(1024, triton.next_power_of_2(dim * value))
        _states_kernel[(self.rows, triton.cdiv(dim * value, block))](
            added, self.decay, state, *self.sizes(), SIZE=dim * value, BLOCK=block, BT=self.tile,
            DECAY=self.options["DECAY"], REVERSE=reverse,
        )  # fmt: skip
        return added


def _initial(q: Tensor, v: Tensor, state: Tensor | None) -> Tensor:
    if state is not None:
        return state.clone(memory_format=torch.contiguous_format)
    return torch.zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[-1], dtype=torch.float32, device=q.device)


@_there
def scan(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None, valid: Tensor | None, activation: str,
         chunk: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`regard.ops.linear.chunks.linear_scan`; decays per head, or per token and head."""
    q, k, v = (t.contiguous() for t in (q, k, v))
    of = _Scan(q, v, decay, valid, activation, chunk)
    out, final = torch.empty_like(v), _initial(q, v, state)
    before = of.states(k, v, final)
    options = of.options | stepped(q.shape[-1])
    _output_kernel[of.grid("E")](q, k, v, of.valid, of.decay, before, out, *of.sizes(), **options, VALID=of.masked)
    return out, final


@_there
def scan_backward(grad: Tensor, grad_final: Tensor | None, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None,
                  state: Tensor | None, valid: Tensor | None, activation: str, chunk: int,
                  need_decay: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """:func:`regard.ops.linear.chunks.linear_scan_backward`."""
    grad, q, k, v = (t.contiguous() for t in (grad, q, k, v))
    of = _Scan(q, v, decay, valid, activation, chunk)
    before, grad_state = of.states(k, v, _initial(q, v, state)), _initial(q, v, grad_final)
    after = of.states(q, grad, grad_state, reverse=True)
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    options = of.options | {name: min(of.options[name], most) for name, most in crowded(of.options["KIND"]).items()}
    tiles = triton.cdiv(options["D"], options["BD"])
    parts = torch.empty(tiles if need_decay else 0, of.batch, of.heads, of.tokens, dtype=torch.float32, device=q.device)
    _keys_kernel[(of.rows, of.chunks, tiles)](
        q, k, v, grad, of.valid, of.decay, before, after, grad_q, grad_k, parts, *of.sizes(), **options, VALID=of.masked,
        LEARNED=need_decay,
    )  # fmt: skip
    options = of.options | stepped(q.shape[-1])
    _values_kernel[of.grid("E")](q, k, grad, of.valid, of.decay, after, grad_v, *of.sizes(), **options, VALID=of.masked)
    if not need_decay or decay is None:
        return grad_q, grad_k, grad_v, q.new_empty(0), grad_state
    per_token = parts.sum(0)  # (batch, heads, tokens)
    grad_decay = per_token.sum((0, 2)) if decay.ndim == 1 else per_token.transpose(1, 2).contiguous()
    return grad_q, grad_k, grad_v, grad_decay.to(decay.dtype), grad_state


def _numbers(x: Tensor, valid: Tensor | None) -> Tensor:
    """One per token and head, 0 for missing tokens."""
    if valid is None:
        return torch.ones(x.shape[:-1], dtype=torch.float32, device=x.device)
    return valid[..., None].expand(x.shape[:-1]).to(torch.float32).contiguous()


def _sums(x: Tensor, y: Tensor, of_product: Tensor, of_sum: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Sums over tokens of ``a f(x) y^T`` and ``b f(x)``."""
    batch, tokens, heads, dim = x.shape
    value = y.shape[-1]
    tile = min(TILE, max(16, triton.next_power_of_2(tokens)))
    length = triton.cdiv(triton.cdiv(tokens, tile), PARTS) * tile
    parts = triton.cdiv(tokens, length)
    products = torch.empty(parts, batch, heads, dim, value, dtype=torch.float32, device=x.device)
    sums = torch.empty(parts, batch, heads, dim, dtype=torch.float32, device=x.device)
    options = _options(x, dim, value, activation)
    tiles = triton.cdiv(dim, options["BD"]) * triton.cdiv(value, options["BE"])
    _memory_kernel[(batch * heads, parts, tiles)](
        x, y, of_product, of_sum, products, sums, tokens, heads, length, **options, BT=tile
    )
    return products.sum(0), sums.sum(0)


def _launch(x: Tensor, dim: int, value: int, activation: str, over: str) -> tuple[tuple[int, int, int], dict]:
    """Grid and compile-time arguments of a kernel that owns tokens and the channels ``over``."""
    options = _options(x, dim, value, activation)
    tile = min(TILE, max(16, triton.next_power_of_2(x.shape[1])))
    channels = triton.cdiv(options[over], options[f"B{over}"])
    return (x.shape[0] * x.shape[2], triton.cdiv(x.shape[1], tile), channels), options | {"BT": tile}


@_there
def memory(k: Tensor, v: Tensor, valid: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    """:func:`regard.ops.linear.memory.linear_memory`."""
    live = _numbers(k, valid)
    return _sums(k.contiguous(), v.contiguous(), live, live, activation)


@_there
def memory_backward(
    grad: Tensor, grad_total: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """:func:`regard.ops.linear.memory.linear_memory_backward`."""
    k, v, grad, grad_total, live = (t.contiguous() for t in (k, v, grad, grad_total, _numbers(k, valid)))
    grad_k, grad_v = torch.empty_like(k), torch.empty_like(v)
    grid, options = _launch(k, k.shape[-1], v.shape[-1], activation, "D")
    _turned_kernel[grid](v, k, grad, grad_total, live, live, grad_k, k.shape[1], k.shape[2], **options, SUM=True)
    _weighed(k, grad, live, grad_v, activation)
    return grad_k, grad_v


def _weighed(x: Tensor, memory: Tensor, of_token: Tensor, out: Tensor, activation: str) -> None:
    grid, options = _launch(x, x.shape[-1], memory.shape[-1], activation, "E")
    _read_kernel[grid](
        x,
        memory,
        memory,
        of_token,
        0.0,
        0.0,
        out,
        memory,
        x.shape[1],
        x.shape[2],
        **options,
        DIVIDE=False,
        WEIGH=True,
        FLOOR=False,
    )


@_there
def read(
    q: Tensor, memory: Tensor, total: Tensor | None, floor: float | None, eps: float, activation: str
) -> tuple[Tensor, Tensor]:
    """:func:`regard.ops.linear.memory.linear_read`."""
    out, mass = _divided(q.contiguous(), memory.contiguous(), total, floor, eps, activation)
    return out, mass if total is None else inverse(mass, floor, eps)


def _divided(
    q: Tensor, memory: Tensor, total: Tensor | None, floor: float | None, eps: float, activation: str
) -> tuple[Tensor, Tensor]:
    """The output and the sums of weights."""
    out = q.new_empty(*q.shape[:-1], memory.shape[-1])
    mass = torch.empty(q.shape[:-1] if total is not None else (0,), dtype=torch.float32, device=q.device)
    grid, options = _launch(q, q.shape[-1], memory.shape[-1], activation, "E")
    _read_kernel[grid](
        q, memory, memory if total is None else total.contiguous(), memory, 0.0 if floor is None else floor, eps, out, mass,
        q.shape[1], q.shape[2], **options, DIVIDE=total is not None, WEIGH=False, FLOOR=floor is not None,
    )  # fmt: skip
    return out, mass


@_there
def read_backward(
    grad: Tensor, q: Tensor, memory: Tensor, total: Tensor | None, inverse: Tensor, floor: float | None, eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """:func:`regard.ops.linear.memory.linear_read_backward`."""
    grad, q, memory = (t.contiguous() for t in (grad, q, memory))
    grad_q = torch.empty_like(q)
    grid, options = _launch(q, q.shape[-1], memory.shape[-1], activation, "D")
    if total is None:
        live = _numbers(q, None)
        _turned_kernel[grid](grad, q, memory, memory, live, live, grad_q, q.shape[1], q.shape[2], **options, SUM=False)
        return grad_q, _sums(q, grad, live, live, activation)[0], q.new_empty(0)
    total = total.contiguous()
    out, mass = _divided(q, memory, total, floor, eps, activation)
    grad_mass = -(grad.float() * out).sum(-1) * inverse
    if floor is not None:
        grad_mass = grad_mass.where(mass >= floor, 0.0)
    _turned_kernel[grid](grad, q, memory, total, inverse, grad_mass, grad_q, q.shape[1], q.shape[2], **options, SUM=True)
    return grad_q, *_sums(q, grad, inverse, grad_mass, activation)
