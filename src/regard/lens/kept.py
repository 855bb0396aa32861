"""What is kept of an attention to compute weights, or their gradients, of any of its queries later.

Each kind of attention has a class with the same five things: ``batch`` and ``heads``; ``size``, the bytes it holds on to; for
each source ``keys()``, ``(batch, keys, heads, head_dim)``, and ``weights(rows)``, ``(batch, heads, rows, keys)``; and
``gradients(rows, of_output)``, the derivatives by these weights of whatever has the derivative ``of_output`` by the attention's
output:

    dL / dA[q, k] = (dL / dy[q]) . v[k]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..ops.attention.weights import weights_of
from ..ops.calls.heads import repeat_heads
from ..ops.calls.observe import Record, Weighing
from ..ops.calls.source import HeadTable, Source


class Kept(Protocol):
    """See the module."""

    @property
    def batch(self) -> int: ...

    @property
    def heads(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def size(self) -> int: ...

    def keys(self) -> list[Tensor]: ...

    def weights(self, rows: Tensor) -> list[Tensor]: ...

    def gradients(self, rows: Tensor, of_output: Tensor) -> list[Tensor]: ...


def full_precision(dtype: torch.dtype) -> torch.dtype:
    """The dtype of weights."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def detached(record: Record) -> Record:
    """The record without graphs, in the dtype the attention is computed in, which autocasting may have chosen."""
    kind = record.calls[0].q.dtype

    def cast(tensor: Tensor) -> Tensor:
        return tensor.detach().to(kind)

    sources = []
    for source in record.sources:
        bias = source.bias
        if bias is not None:
            bias = bias.detach() if isinstance(bias, Tensor) else HeadTable(bias.table.detach(), bias.pattern)
        own_q = None if source.q is None else cast(source.q)
        sources.append(replace(source, k=cast(source.k), v=cast(source.v), q=own_q, bias=bias))
    sink = None if record.sink is None else record.sink.detach()
    return replace(record, q=cast(record.q), sources=sources, sink=sink, calls=())


@dataclass(frozen=True, eq=False)
class KeptAttention:
    """An ``attend``: a :func:`detached` record."""

    record: Record

    @property
    def batch(self) -> int:
        return self.record.q.shape[0]

    @property
    def heads(self) -> int:
        return self.record.q.shape[-2]

    @property
    def device(self) -> torch.device:
        return self.record.q.device

    @property
    def dtype(self) -> torch.dtype:
        return full_precision(self.record.q.dtype)

    @property
    def size(self) -> int:
        tensors = [self.record.q]
        for source in self.record.sources:
            bias = source.bias if source.bias is None or isinstance(source.bias, Tensor) else source.bias.table
            tensors += [t for t in (source.k, source.v, source.q, bias, source.valid) if t is not None]
        return sum({(t.data_ptr(), t.numel()): t.numel() * t.element_size() for t in tensors}.values())

    def keys(self) -> list[Tensor]:
        return [source.k.flatten(1, -3) for source in self.record.sources]

    def weights(self, rows: Tensor) -> list[Tensor]:
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return [w.flatten(3) for w in weights_of(self.record, rows)]

    def gradients(self, rows: Tensor, of_output: Tensor) -> list[Tensor]:
        arrived = of_output.flatten(1, -3)[:, rows].to(self.dtype)  # (batch, rows, heads, value_dim)
        found = []
        for source in self.record.sources:
            heads = list(range(self.heads) if source.heads is None else source.heads)
            v = repeat_heads(source.v.flatten(1, -3).to(self.dtype), len(heads), 2)
            full = arrived.new_zeros(self.batch, self.heads, len(rows), v.shape[1])
            full[:, heads] = torch.einsum("brhd,bkhd->bhrk", arrived[:, :, heads], v)
            found.append(full)
        return found


@dataclass(frozen=True, eq=False)
class KeptWeights:
    """An attention whose weights themselves are at hand, ``(batch, heads, queries, keys)``, and its values, of that batch.

    Attributes:
        v: ``(batch, keys, heads, value_dim)``.
        k: ``(batch, keys, heads, head_dim)``, where they were seen.
    """

    matrix: Tensor
    v: Tensor | None = None
    k: Tensor | None = None

    @property
    def batch(self) -> int:
        return self.matrix.shape[0]

    @property
    def heads(self) -> int:
        return self.matrix.shape[1]

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    @property
    def dtype(self) -> torch.dtype:
        return full_precision(self.matrix.dtype)

    @property
    def size(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.matrix, self.v, self.k) if t is not None)

    def keys(self) -> list[Tensor]:
        if self.k is None:
            raise ValueError("the keys of this attention were not seen, only its weights")
        return [self.k]

    def weights(self, rows: Tensor) -> list[Tensor]:
        return [self.matrix[:, :, rows].to(self.dtype)]

    def gradients(self, rows: Tensor, of_output: Tensor) -> list[Tensor]:
        assert self.v is not None  # an attention has values
        arrived = of_output.flatten(1, -3)[:, rows].to(self.dtype)
        return [torch.einsum("brhd,bkhd->bhrk", arrived, self.v.to(self.dtype))]


@dataclass(frozen=True, eq=False)
class KeptWeighing:
    """Another operator, see :class:`regard.ops.calls.observe.Weighing`; derivatives by its weights are not known."""

    weighing: Weighing

    @property
    def batch(self) -> int:
        return self.weighing.batch

    @property
    def heads(self) -> int:
        return self.weighing.heads

    @property
    def device(self) -> torch.device:
        return self.weighing.device

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def size(self) -> int:
        return 0  # it shares what the operator has anyway

    def keys(self) -> list[Tensor]:
        raise ValueError(f"attention has keys; got {self.weighing.kind!r}")

    def weights(self, rows: Tensor) -> list[Tensor]:
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            found = self.weighing.weights(rows).detach()
            return [found.to(full_precision(found.dtype)).flatten(3)]

    def gradients(self, rows: Tensor, of_output: Tensor) -> list[Tensor]:
        raise ValueError(f"gradients of weights are known for attention; got {self.weighing.kind!r}")


@dataclass(frozen=True, eq=False)
class _Seen:
    """An attention seen in another way; what is not said anew is that of ``inner``."""

    inner: Kept

    @property
    def batch(self) -> int:
        return self.inner.batch

    @property
    def heads(self) -> int:
        return self.inner.heads

    @property
    def device(self) -> torch.device:
        return self.inner.device

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    @property
    def size(self) -> int:
        return self.inner.size


@dataclass(frozen=True, eq=False)
class KeptWindows(_Seen):
    """Attention inside windows that were cut out of a grid and put into the batch, seen on the grid again.

    Attributes:
        inner: the attention of ``batch * windows`` items.
        index: ``(windows, tokens)``, the cell of each of their tokens, -1 for those that only pad.
        cells: number of cells.
    """

    index: Tensor
    cells: int

    @property
    def batch(self) -> int:
        return self.inner.batch // len(self.index)

    def keys(self) -> list[Tensor]:
        (inside,) = self.inner.keys()
        inside = inside.unflatten(0, (self.batch, -1)).flatten(1, 2)  # (batch, windows * tokens, heads, head_dim)
        known = self.index.flatten() >= 0
        on_grid = inside.new_zeros(self.batch, self.cells, *inside.shape[2:])
        return [on_grid.index_copy(1, self.index.flatten()[known], inside[:, known])]

    def weights(self, rows: Tensor) -> list[Tensor]:
        return [self._on_grid(rows, self.inner.weights)]

    def gradients(self, rows: Tensor, of_output: Tensor) -> list[Tensor]:
        return [self._on_grid(rows, lambda tokens: self.inner.gradients(tokens, of_output))]

    def _on_grid(self, rows: Tensor, compute) -> Tensor:
        """For tokens of a place in their windows at once: all windows, of which those of the rows are taken."""
        windows, tokens = self.index.shape
        window_of, token_of = (torch.full((self.cells,), -1, device=rows.device) for _ in range(2))
        flat, known = self.index.flatten(), self.index.flatten() >= 0
        at = torch.arange(windows * tokens, device=rows.device)[known]
        window_of[flat[known]], token_of[flat[known]] = at // tokens, at % tokens
        window, token = window_of[rows], token_of[rows]
        result = torch.zeros(self.batch, self.heads, len(rows), self.cells + 1, dtype=self.dtype, device=rows.device)
        needed, position = torch.unique(token, return_inverse=True)
        (inside,) = compute(needed)  # (batch * windows, heads, needed, tokens)
        inside = inside.unflatten(0, (self.batch, windows))[:, window, :, position]  # (rows, batch, heads, tokens)
        target = self.index[window].masked_fill(self.index[window] < 0, self.cells)  # what pads goes to a cell that is cut off
        result.scatter_add_(-1, target.expand(self.batch, self.heads, -1, -1), inside.movedim(0, 2))
        return result[..., : self.cells]


@dataclass(frozen=True, eq=False)
class KeptPart(_Seen):
    """Some queries of an attention, and its keys parted into sources of their own.

    Attributes:
        inner: the attention.
        first: its query that is query 0 here.
        columns: for each source here, a source there and the range of its keys.
    """

    first: int
    columns: tuple[tuple[int, int, int], ...]

    def keys(self) -> list[Tensor]:
        found = self.inner.keys()
        return [found[source][:, start:stop] for source, start, stop in self.columns]

    def weights(self, rows: Tensor) -> list[Tensor]:
        return self._cut(self.inner.weights(rows + self.first))

    def gradients(self, rows: Tensor, of_output: Tensor) -> list[Tensor]:
        return self._cut(self.inner.gradients(rows + self.first, of_output))

    def _cut(self, found: Sequence[Tensor]) -> list[Tensor]:
        return [found[source][..., start:stop] for source, start, stop in self.columns]


def token_count(source: Source) -> int:
    """Keys of a source."""
    return math.prod(source.k.shape[1:-2])
