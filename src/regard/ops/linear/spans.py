"""How the tokens of linear attention are taken, a few chunks at a time, and the dtypes of what is computed from them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..affine import affine, fast_here

BLOCK = 1 << 19
"""Numbers of a tensor that each thread of a CPU takes at once where no order matters."""

TALL = 512
"""Rows from which on a product with a small matrix is worth a call of its own."""


def _elu_plus_one(x: Tensor, room: Tensor | None = None) -> Tensor:
    return (F.elu(x) if room is None else torch.ops.aten.elu.out(x, out=room[: x.numel()].view(x.shape))).add_(1)


def _elu_slope(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.elu_backward(grad, 1.0, 1.0, 1.0, False, x)


ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "none": (lambda x, room=None: x, lambda grad, x: grad),
    "relu": (lambda x, room=None: torch.relu(x), lambda grad, x: torch.ops.aten.threshold_backward(grad, x, 0)),
    "elu_plus_one": (_elu_plus_one, _elu_slope),
    "silu": (lambda x, room=None: F.silu(x), lambda grad, x: torch.ops.aten.silu_backward(grad, x)),
}
"""Feature maps that are applied value by value, each with the gradient of x from that of its value.

They may be given room to write to, a flat tensor: fresh memory of the system can cost more than the arithmetic.
"""


@dataclass(frozen=True)
class Span:
    """Some batch items and ``chunks`` consecutive chunks of ``size`` rows from ``start``, of which ``rows`` exist."""

    items: slice
    start: int
    chunks: int
    size: int
    rows: int

    def take(self, x: Tensor, kind: torch.dtype) -> Tensor:
        """``(batch, tokens, heads, width)`` as contiguous ``(chunks, items, heads, size, width)``, zeros after the end."""
        part = x[self.items, self.start : self.start + self.rows]
        if self.rows < self.chunks * self.size:
            part = F.pad(part, (0, 0, 0, 0, 0, self.chunks * self.size - self.rows))
        part = part.unflatten(1, (self.chunks, self.size)).permute(1, 0, 3, 2, 4)
        return torch.empty(part.shape, dtype=kind, device=x.device).copy_(part)

    def put(self, x: Tensor, part: Tensor) -> None:
        """Write chunks back to where :meth:`take` found them."""
        x[self.items, self.start : self.start + self.rows] = part.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, : self.rows]


def spans_over(q: Tensor, size: int, kind: torch.dtype) -> Iterator[list[Span]]:
    """For some batch items at a time, the spans that cover all tokens in order; an incomplete chunk is a span of its own."""
    batch, tokens, heads = q.shape[:3]
    whole, rest = divmod(tokens, size)
    if torch.compiler.is_exporting():
        matrices = batch * heads * (whole + 1)
    else:  # as many matrix products per call as keep the cores busy and their caches warm
        rows = (2048 if kind.itemsize > 2 else 4096) * _threads() if q.device.type == "cpu" else 1 << 18
        matrices = max(1, rows // size)
    items = max(1, min(batch, matrices // (heads * (whole + 1))))
    step = max(1, matrices // (heads * items))
    for first in range(0, batch, items):
        taken = slice(first, min(first + items, batch))
        spans = []
        for chunk in range(0, whole, step):
            chunks = min(step, whole - chunk)
            spans.append(Span(taken, chunk * size, chunks, size, chunks * size))
        if rest:
            spans.append(Span(taken, whole * size, 1, size, rest))
        yield spans


def blocks_over(x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Some batch items and tokens at a time, which cover ``(batch, tokens, heads, width)`` where no order matters."""
    if torch.compiler.is_exporting():
        yield slice(None), slice(None)
        return
    batch, tokens = x.shape[:2]
    rows = max(1, _numbers(x) // x.shape[2:].numel())
    items, rows = max(1, rows // tokens), -(-tokens // -(-tokens // rows))  # of one size
    for item in range(0, batch, items):
        for row in range(0, tokens, rows):
            yield slice(item, min(item + items, batch)), slice(row, min(row + rows, tokens))


def _numbers(x: Tensor) -> int:
    """Of a tensor, how many are taken at once where no order matters."""
    return BLOCK * _threads() if x.device.type == "cpu" else 1 << 24


def _threads() -> int:
    """Threads to divide work among; the memory that is used at once grows with them, up to a limit."""
    return min(torch.get_num_threads(), 8)


def room_for(x: Tensor, activation: str) -> Tensor | None:
    """Room for the features of each of :func:`blocks_over`, used again and again."""
    if activation != "elu_plus_one" or torch.compiler.is_exporting():
        return None  # the others, or a program to be read, take none
    return torch.empty(min(x.numel(), max(_numbers(x), x.shape[2:].numel())), dtype=wide_dtype(x), device=x.device)


def heads_first(x: Tensor, kind: torch.dtype) -> Tensor:
    """``(items, rows, heads, width)`` as a stack of matrices ``(items * heads, rows, width)``, copied only if it must be."""
    return x.transpose(1, 2).to(kind, memory_format=torch.contiguous_format).flatten(0, 1)


def rows_times(x: Tensor, small: Tensor, out: Tensor, factor: Tensor | None = None) -> Tensor:
    """Fill ``out`` with rows times the matrix of their item and head, in the dtype of that, and then times a factor.

    Args:
        x: ``(items, rows, heads, n)``.
        small: ``(items, heads, n, m)``.
        out: ``(items, rows, heads, m)``.
        factor: ``(items, rows, heads, 1)``.

    Returns:
        ``out``; it may be where the rows are.
    """
    if _calls_each(x, small):
        for item in range(len(x)):
            factors = itertools.repeat(None) if factor is None else factor[item].unbind(1)
            heads = zip(x[item].unbind(1), small[item].transpose(-2, -1), out[item].unbind(1), factors, strict=False)
            for rows, matrix, part, by in heads:
                y = affine(rows, matrix)
                part.copy_(y) if by is None else torch.mul(y, by, out=part)
        return out
    y = torch.bmm(heads_first(x, small.dtype), small.flatten(0, 1)).unflatten(0, small.shape[:2]).transpose(1, 2)
    return out.copy_(y if factor is None else y * factor)


def _calls_each(x: Tensor, small: Tensor) -> bool:
    """Whether each item and head is a fast product of its own."""
    plain = x.dtype == small.dtype == torch.float32 and x.device.type == "cpu" and not torch.compiler.is_exporting()
    return plain and x.shape[1] >= TALL and fast_here()


def rows_dot(x: Tensor, vectors: Tensor) -> Tensor:
    """Rows ``(items, rows, heads, n)`` times the vector ``(items, heads, n)`` of their item and head."""
    return (x * vectors.unsqueeze(1)).sum(-1)


def existing(x: Tensor, valid: Tensor | None) -> Tensor:
    """``(batch, tokens, heads, width)`` with 0 for the tokens that do not exist, whatever stands there."""
    return x if valid is None else x.masked_fill(~valid[..., None, None], 0.0)


def readable(x: Tensor) -> bool:
    """Whether numbers can be looked at without waiting for a device, and without a trace or a transform that forbids it."""
    plain = x.device.type == "cpu" and type(x) in (Tensor, torch.nn.Parameter)
    return plain and not torch.compiler.is_compiling() and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of states and of decays."""
    return torch.promote_types(x.dtype, torch.float32)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products; sums of float16 may leave its range."""
    return torch.bfloat16 if x.dtype == torch.bfloat16 else wide_dtype(x)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Products of contiguous (or transposed) stacks of matrices ``(chunks, items, heads, ., .)``."""
    return torch.bmm(a.flatten(0, 2), b.flatten(0, 2)).unflatten(0, a.shape[:3])


def matmul_added(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.baddbmm(y.flatten(0, 2), a.flatten(0, 2), b.flatten(0, 2)).unflatten(0, a.shape[:3])


@dataclass(frozen=True)
class Inputs:
    """The inputs of a span, activated and masked."""

    q: Tensor
    k: Tensor
    v: Tensor
    raw_q: Tensor
    raw_k: Tensor
    missing: Tensor | None


def activated(span: Span, x: Tensor, activation: str, kind: torch.dtype, valid: Tensor | None = None):
    """Features of a span, what they were made of, and which tokens are missing; those are 0 whatever stands there."""
    raw = span.take(x, kind)
    missing = None if valid is None else span.take(~valid[..., None, None], torch.bool)
    if missing is None:
        return raw if activation == "none" else ACTIVATIONS[activation][0](raw), raw, None
    raw.masked_fill_(missing, 0.0)
    return raw if activation == "none" else ACTIVATIONS[activation][0](raw).masked_fill(missing, 0.0), raw, missing


def inactivated(grad: Tensor, raw: Tensor, missing: Tensor | None, activation: str) -> Tensor:
    """The gradient of what the features were made of."""
    return ACTIVATIONS[activation][1](grad if missing is None else grad.masked_fill(missing, 0.0), raw)


def inputs_of(span: Span, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, activation: str, kind: torch.dtype) -> Inputs:
    queries, raw_q, _ = activated(span, q, activation, kind)
    keys, raw_k, missing = activated(span, k, activation, kind, valid)
    return Inputs(queries, keys, values_of(span, v, missing, kind), raw_q, raw_k, missing)


def values_of(span: Span, v: Tensor, missing: Tensor | None, kind: torch.dtype) -> Tensor:
    """Values of a span; those of missing tokens are 0."""
    values = span.take(v, kind)
    return values if missing is None else values.masked_fill_(missing, 0.0)
