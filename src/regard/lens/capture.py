"""Capture: the exact attention weights of chosen queries, from any model built on :func:`regard.attend`.

    with regard.lens.capture(model, rows=[(12, 30)], layers="stages.2.*") as maps:
        model(images)
    maps["stages.2.blocks.0.mixer"].weights[0]      # (batch, heads, 1, *k_grid)

The attention itself runs as ever, on its own backend; the weights of the chosen rows are computed beside it.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ..ops.observe import OBSERVERS, Record
from ..ops.patterns import Pattern, as_pattern
from ..ops.trail import Trail
from ..ops.weights import weights_of

Rows = Sequence[int] | Sequence[Sequence[int]] | Sequence[Sequence[float]]


@dataclass(frozen=True, eq=False)
class Map:
    """The weights of one attention.

    Attributes:
        name: path of the module that attended.
        call: how many attentions this module had computed before.
        grid: the query grid.
        rows: row-major indices of the chosen queries on it.
        patterns: one per source.
        weights: one per source, ``(batch, heads, rows, *k_grid)``. A row sums to one over all sources, the sink and zero keys
            outside the grid.
    """

    name: str
    call: int
    grid: tuple[int, ...]
    rows: tuple[int, ...]
    patterns: tuple[Pattern, ...]
    weights: tuple[Tensor, ...]

    @property
    def pattern(self) -> Pattern:
        """The pattern of the first source."""
        return self.patterns[0]

    def __repr__(self) -> str:
        shapes = ", ".join(f"{p!r} {tuple(w.shape)}" for p, w in zip(self.patterns, self.weights, strict=True))
        return f"Map({self.name!r}, call={self.call}, grid={self.grid}, {shapes})"


class Maps(Sequence[Map]):
    """What :func:`capture` recorded, in order: ``maps[0]``, ``maps["stages.0.mixer"]``, ``maps["stages.0.mixer", 1]``."""

    def __init__(self) -> None:
        self._maps: list[Map] = []

    def append(self, found: Map) -> None:
        self._maps.append(found)

    def __len__(self) -> int:
        return len(self._maps)

    def __iter__(self) -> Iterator[Map]:
        return iter(self._maps)

    def __getitem__(self, key):
        """A map by its position, or by the name of its module and the number of the call (0 by default)."""
        if isinstance(key, (int, slice)):
            return self._maps[key]
        name, call = key if isinstance(key, tuple) else (key, 0)
        for found in self._maps:
            if (found.name, found.call) == (name, call):
                return found
        names = list(dict.fromkeys(m.name for m in self._maps))
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names
        raise KeyError(f"no attention {name!r}, call {call}, was captured; there are {', '.join(near) or 'none'}")

    def __repr__(self) -> str:
        return "\n".join(map(repr, self._maps)) or "Maps()"


@contextmanager
def capture(model: nn.Module, rows: Rows | None = None, layers: str = "*", *, limit: int = 2 << 30) -> Iterator[Maps]:
    """Record the exact attention weights of a model while the context is entered.

    Args:
        model: a module; what it attends outside of its own ``forward`` is not recorded, nor what activation checkpointing
            recomputes.
        rows: the queries to look at, all by default: row-major indices, coordinates such as ``[(12, 30)]``, or fractions of
            the grid such as ``[(0.5, 0.25)]``, which name the same place at every resolution. Attentions whose grid has
            another number of axes than the coordinates (those of extra tokens) are passed over.
        layers: shell-style pattern of module paths.
        limit: bytes of weights to keep at most.

    Yields:
        The :class:`Maps`, which fill up as the model runs.

    Raises:
        ValueError: rows outside a grid; weights beyond the limit.
    """
    with Trail() as trail:
        recorder = _Recorder(trail, {module: name for name, module in model.named_modules()}, rows, layers, limit)
        OBSERVERS.append(recorder)
        try:
            yield recorder.maps
        finally:
            OBSERVERS.remove(recorder)


class _Recorder:
    """The observer behind :func:`capture`."""

    def __init__(self, trail: Trail, names: dict[nn.Module, str], rows: Rows | None, layers: str, limit: int) -> None:
        self.trail, self.names = trail, names
        self.rows, self.layers, self.limit = rows, layers, limit
        self.maps = Maps()
        self.calls: Counter[str] = Counter()
        self.taken = 0

    def __call__(self, record: Record) -> None:
        name = self.trail.path(self.names)
        if name is None or self.trail.recomputing or not fnmatchcase(name, self.layers):
            return
        call = self.calls[name]
        self.calls[name] += 1
        grid = tuple(record.q.shape[1:-2])
        rows = _flat_rows(self.rows, grid, name)
        if not rows:
            return
        self.reserve(name, record, len(rows))
        with torch.no_grad(), torch.autocast(record.q.device.type, enabled=False):
            weights = weights_of(_of_one_dtype(record), rows)
        patterns = tuple(as_pattern(source.pattern) for source in record.sources)
        self.maps.append(Map(name, call, grid, rows, patterns, tuple(weights)))

    def reserve(self, name: str, record: Record, rows: int) -> None:
        keys = sum(source.k.shape[1:-2].numel() for source in record.sources)
        size = 8 if record.q.dtype == torch.float64 else 4
        needed = record.q.shape[0] * record.q.shape[-2] * rows * keys * size
        self.taken += needed
        if self.taken > self.limit:
            raise ValueError(
                f"the weights of {rows} queries of {name!r} take {needed / 2**20:.1f} MiB, with those before "
                f"{self.taken / 2**20:.1f} MiB, more than limit={self.limit / 2**20:.1f} MiB: "
                f"choose rows= or layers=, or raise limit="
            )


def _of_one_dtype(record: Record) -> Record:
    """The record in the dtype the attention is computed in, which autocasting may have chosen."""
    kind = record.calls[0].q.dtype
    sources = [replace(s, k=s.k.to(kind), v=s.v.to(kind), q=None if s.q is None else s.q.to(kind)) for s in record.sources]
    return replace(record, q=record.q.to(kind), sources=sources)


def _flat_rows(rows: Rows | None, grid: tuple[int, ...], name: str) -> tuple[int, ...]:
    """Row-major indices of the chosen queries; none where the coordinates belong to another rank."""
    count = torch.Size(grid).numel()
    if rows is None:
        return tuple(range(count))
    chosen = []
    for row in rows:
        if isinstance(row, Sequence):
            if len(row) != len(grid):
                continue
            if not all(0 <= x < (1 if isinstance(x, float) else n) for x, n in zip(row, grid, strict=True)):
                raise ValueError(
                    f"rows must be coordinates inside the grid {grid} of {name!r}, or fractions in [0, 1) of it; got {row}"
                )
            index = 0
            for x, n in zip(row, grid, strict=True):
                index = index * n + int(x * n if isinstance(x, float) else x)
            chosen.append(index)
        elif 0 <= row < count:
            chosen.append(int(row))
        else:
            raise ValueError(f"rows must be indices in 0..{count - 1} on the grid {grid} of {name!r}; got {row}")
    return tuple(chosen)
