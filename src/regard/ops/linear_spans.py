"""How the tokens of linear attention are taken, a few chunks at a time, and the dtypes of what is computed from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def _silu_slope(x: Tensor) -> Tensor:
    gate = torch.sigmoid(x)
    return gate * (1 + x * (1 - gate))


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "none": (lambda x: x, torch.ones_like),
    "relu": (torch.relu, lambda x: (x > 0).to(x.dtype)),
    "elu_plus_one": (lambda x: F.elu(x).add_(1), lambda x: x.clamp(max=0).exp()),
    "silu": (F.silu, _silu_slope),
}
"""Feature maps that are applied value by value, each with its derivative."""


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
    else:  # as many matrix products per call as keep a core busy and its cache warm
        rows = (1024 if kind.itemsize > 2 else 2048) if q.device.type == "cpu" else 1 << 18
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
    valid: Tensor | None


def activated(span: Span, x: Tensor, activation: str, kind: torch.dtype, valid: Tensor | None = None):
    """Features of a span, what they were made of, and the mask that was applied."""
    raw = span.take(x, kind)
    value = raw if activation == "none" else ACTIVATIONS[activation][0](raw)
    mask = None if valid is None else span.take(valid[..., None, None], kind)
    return value if mask is None else value * mask, raw, mask


def inactivated(grad: Tensor, raw: Tensor, mask: Tensor | None, activation: str) -> Tensor:
    """The gradient of what the features were made of."""
    grad = grad if mask is None else grad * mask
    return grad if activation == "none" else grad * ACTIVATIONS[activation][1](raw)


def inputs_of(span: Span, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, activation: str, kind: torch.dtype) -> Inputs:
    queries, raw_q, _ = activated(span, q, activation, kind)
    keys, raw_k, mask = activated(span, k, activation, kind, valid)
    return Inputs(queries, keys, span.take(v, kind), raw_q, raw_k, mask)
