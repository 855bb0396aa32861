"""Count: the exact arithmetic and traffic of every attention, per layer.

    FLOPs = 2 (d_k + d_v) pairs,   pairs = visible (query, key) of all heads and batch items

    with regard.bench.count() as cost:
        model(images)
    print(cost)

Pairs are those the pattern shows, whatever a backend computes beside them; zero keys outside the grid are not counted. On meta
tensors, where a table of routed blocks has no content, it is taken to list all blocks equally often.
Linear attention compares no pairs: its FLOPs are those of the two products with the sum over keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..hosts.running import Trail
from ..ops.calls.call import Call
from ..ops.calls.observe import OBSERVERS, WATCHERS, Record, Weighing, listening
from ..ops.calls.source import Source
from ..ops.patterns import as_pattern, tensors_of

CHUNK = 1 << 24
"""Entries of a mask that are counted at once."""


def visible_pairs(call: Call) -> int:
    """Visible pairs of a query and a true key in a call, over all heads and batch items."""
    if call.valid is not None:
        return _counted_pairs(call)
    if (pairs := call.pattern.pairs_by_size(call.q_grid, call.k_grid)) is not None:
        return call.batch * call.heads * pairs
    degree = call.pattern.degree(call.q_grid, call.k_grid, call.q_start)
    lead = degree.shape[: degree.ndim - call.rank]
    return int(degree.sum()) * (call.batch * call.heads // math.prod(lead))


def _counted_pairs(call: Call) -> int:
    """Pairs of any call, by evaluating its mask a few rows at a time."""
    inside = tuple(slice(before, before + n) for (before, _), n in zip(call.zeros, call.k_grid, strict=True))
    full = (call.batch, call.heads)
    total = 0
    for rows in torch.arange(call.queries, device=call.q.device).split(max(1, CHUNK // (call.keys * math.prod(full)))):
        mask = call.mask(rows)
        if mask is None:
            return math.prod(full) * call.queries * math.prod(call.k_grid)
        mask = mask.expand(*mask.shape[:2], len(rows), call.keys).unflatten(-1, call.padded_grid)[(..., *inside)]
        total += int(mask.sum()) * math.prod(n // m for n, m in zip(full, mask.shape[:2], strict=True))
    return total


@dataclass
class LayerCost:
    """What the attentions of one module cost: their number, visible pairs, FLOPs and bytes, and the patterns seen."""

    calls: int = 0
    pairs: int = 0
    flops: int = 0
    bytes: int = 0
    patterns: list[str] = field(default_factory=list)

    def add(self, record: Record) -> None:
        self.calls += 1
        for call in record.calls:
            pairs = visible_pairs(call)
            self.pairs += pairs
            self.flops += 2 * pairs * (call.q.shape[-1] + call.v.shape[-1])
        self.bytes += _traffic(record)
        for source in record.sources:
            if (shown := repr(as_pattern(source.pattern))) not in self.patterns:
                self.patterns.append(shown)

    def add_weighing(self, weighing: Weighing) -> None:
        self.calls += 1
        self.flops += weighing.flops
        self.bytes += weighing.bytes
        if weighing.kind not in self.patterns:
            self.patterns.append(weighing.kind)


def _traffic(record: Record) -> int:
    """Bytes of everything read and written once: queries, keys, values, biases, routing, output."""
    value_dim = record.sources[0].v.shape[-1]
    out = record.q.shape[:-1].numel() * value_dim * record.q.element_size()
    return out + _size(record.q) + sum(_source_traffic(source) for source in record.sources)


def _source_traffic(source: Source) -> int:
    bias = source.bias if source.bias is None or isinstance(source.bias, Tensor) else source.bias.table
    tensors = [source.k, source.v, source.q, source.valid, bias, *tensors_of(as_pattern(source.pattern))]
    return sum(_size(t) for t in tensors if t is not None)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class Cost:
    """Costs per layer: ``layers`` maps the path of a module to its :class:`LayerCost`; the totals are sums over them."""

    def __init__(self) -> None:
        self.layers: dict[str, LayerCost] = {}

    @property
    def calls(self) -> int:
        return sum(layer.calls for layer in self.layers.values())

    @property
    def pairs(self) -> int:
        return sum(layer.pairs for layer in self.layers.values())

    @property
    def flops(self) -> int:
        return sum(layer.flops for layer in self.layers.values())

    @property
    def bytes(self) -> int:
        return sum(layer.bytes for layer in self.layers.values())

    def __repr__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "calls", "pairs", "FLOPs", "bytes", "pattern")]
        for name, layer in self.layers.items():
            rows.append(_row(name or "(root)", layer, ", ".join(layer.patterns)))
        rows.append(_row("total", self, ""))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        return "\n".join(
            f"{row[0]:<{widths[0]}}  " + "  ".join(f"{row[i]:>{widths[i]}}" for i in range(1, 5)) + f"  {row[5]}".rstrip()
            for row in rows
        )


def _row(name: str, cost: LayerCost | Cost, patterns: str) -> tuple[str, ...]:
    return (name, str(cost.calls), *(_short(n) for n in (cost.pairs, cost.flops, cost.bytes)), patterns)


def _short(number: float) -> str:
    power = min(int(math.log10(number)) // 3, 4) if number >= 1000 else 0
    return f"{number / 1000**power:.3g} {'kMGT'[power - 1]}" if power else str(number)


@contextmanager
def count() -> Iterator[Cost]:
    """Count the cost of every attention while the context is entered, by the path of the module that attends.

    Paths start at the outermost module that is called; attention outside of modules is named ``attend``. What activation
    checkpointing recomputes is not counted, nor are projections and backward passes, nor what other threads compute: each
    thread counts its own.
    """
    cost = Cost()
    with Trail() as trail:

        def observe(record: Record) -> None:
            if not trail.recomputing:
                path = trail.path()
                cost.layers.setdefault("attend" if path is None else path, LayerCost()).add(record)

        def watch(weighing: Weighing) -> None:
            if weighing.flops and not trail.recomputing:
                path = trail.path()
                cost.layers.setdefault("attend" if path is None else path, LayerCost()).add_weighing(weighing)

        with listening(OBSERVERS, observe), listening(WATCHERS, watch):
            yield cost
