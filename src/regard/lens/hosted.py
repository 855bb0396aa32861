"""Attention of other libraries as the lens keeps it, from what :mod:`regard.hosts` shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from ..hosts import HostCall
from ..ops import Source
from ..ops.calls.observe import Record
from ..ops.patterns import Dense
from .kept import Kept, KeptAttention, KeptWeights, KeptWindows


@dataclass(frozen=True, eq=False)
class Found:
    """An attention of another library.

    Attributes:
        module: that attended.
        kept: its weights.
        queries, keys: numbers of tokens.
        output: of the attention or of its module, whatever carries a gradient.
        to_tokens: makes of a gradient of that one of the attention's output, ``(batch, tokens, heads, value_dim)``.
        grid: of the tokens, where windows of it were attended to.
    """

    module: nn.Module
    kept: Kept
    queries: int
    keys: int
    output: Tensor
    to_tokens: Callable[[Tensor], Tensor]
    grid: tuple[int, ...] | None = None


def reporting(report: Callable[[Found], None]) -> Callable[[HostCall], HostCall]:
    """Make a function for :func:`regard.hosts.attach` that reports every attention once it has its output."""

    def at_attention(call: HostCall) -> HostCall:
        kept, queries, keys, grid = _kept(call), call.queries, call.keys, None
        if call.windows is not None:
            grid, index = call.windows
            queries = keys = grid[0] * grid[1]
            kept = KeptWindows(kept, index, queries)
        return call.then(lambda output, to_tokens: report(Found(call.module, kept, queries, keys, output, to_tokens, grid)))

    return at_attention


def _kept(call: HostCall) -> Kept:
    v = call.v.detach().transpose(1, 2)
    k = None if call.k is None else call.k.detach().transpose(1, 2)
    if call.weights is not None:
        return KeptWeights(call.weights.detach(), v, k)
    assert call.q is not None  # it is known where the weights are not
    assert k is not None
    q = call.q.detach().transpose(1, 2)
    if q.shape[2] != k.shape[2]:
        k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
    source = Source(k, v, Dense(), bias=None if call.bias is None else call.bias.detach())
    return KeptAttention(Record(q, [source], (), call.scale, None, (0,)))
