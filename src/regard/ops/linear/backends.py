"""Ways to compute linear attention: the definition, and chunks of tokens in three languages.

Every query sees every key: one product with the sum over keys. In order: chunk by chunk. With a decay in both directions: a
pass in each. The arithmetic of a chunk is that of :mod:`regard.ops.linear.chunks`, in torch, in C or in Triton.
"""

from __future__ import annotations

import importlib.util
import operator
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import compiled
from ..backends import costs
from ..backends.base import Backend, Cost
from ..transforms import PLAIN_ONLY
from . import chunks, memory
from .call import LinearCall, LinearState
from .naive import attend_all, state_after
from .norms import divided
from .spans import existing, readable

LAUNCHES = 65535
"""Chunks of tokens that a launch on a GPU may have."""

Result = tuple[Tensor, LinearState | None]
"""Output ``(batch, tokens, heads, value_dim)``, and what all keys so far leave to later queries."""


def by_definition(call: LinearCall) -> Result:
    """The output by the definition, which also knows a batch of none."""
    values = call.values
    return _in_order(attend_all, call, values) if call.causal else attend_all(call, values)


class NaiveBackend(Backend[LinearCall]):
    """All weights at once."""

    name = "naive"
    passed_over = "computes all weights"

    def time(self, call: LinearCall) -> float:
        return costs.LINEAR_NAIVE

    def cost(self, call: LinearCall) -> Cost:
        batch, queries, heads, dim = call.q.shape
        pairs, state = batch * heads * queries * call.k.shape[1], 0 if call.decay is not None and not call.causal else 1
        flops = 2 * pairs * (dim + call.values.shape[-1]) + state * 2 * call.k.numel() * call.values.shape[-1]
        return Cost(pairs, flops, call.operand_bytes + 4 * 4 * pairs)

    def run(self, call: LinearCall) -> Result:
        return by_definition(call)

    def reason(self, call: LinearCall) -> str:
        return "torch differentiates the definition in every way"


class KernelBackend(Backend[LinearCall]):
    """Chunks of tokens by kernels of one language."""

    kernel: ClassVar[str]
    expected: ClassVar[float]

    def problem(self, call: LinearCall) -> str | None:
        """Why its kernels cannot run a call, None where they can."""
        return None

    def supports(self, call: LinearCall) -> str | None:
        return self.problem(call) or (PLAIN_ONLY if call.is_differentiated else None)

    def time(self, call: LinearCall) -> float:
        return self.expected

    def cost(self, call: LinearCall) -> Cost:
        (batch, queries, heads, dim), value = call.q.shape, call.values.shape[-1]
        if not call.causal and call.decay is None:
            return Cost(0, 2 * (call.q.numel() + call.k.numel()) * value, call.operand_bytes)
        passes, width, chunk = 1 if call.causal else 2, value + (call.norm == "sum"), _chunk(call)
        rows = batch * heads * -(-queries // chunk) * chunk
        flops = passes * 2 * rows * (chunk * (dim + width) + 2 * dim * width)
        return Cost(passes * rows * chunk, flops, passes * call.operand_bytes)

    def run(self, call: LinearCall) -> Result:
        way, values = _Way(_chunk(call), self.kernel), call.values
        if call.causal:
            return _in_order(_causal, call, values, way)
        return (_everything if call.decay is None else _both_ways)(call, values, way)


class ChunkedBackend(KernelBackend):
    """Chunks on torch's operators."""

    name, kernel, expected = "chunked", "torch", costs.LINEAR_TORCH
    passed_over = "the same chunks on torch's operators"

    def reason(self, call: LinearCall) -> str:
        return "linear in tokens, on any device"


class NativeBackend(KernelBackend):
    """Chunks in C, compiled for the CPU at hand."""

    name, kernel, expected = "native", "native", costs.LINEAR_NATIVE
    passed_over = "runs where asked for"

    def available(self) -> str | None:
        return compiled.missing()

    def problem(self, call: LinearCall) -> str | None:
        if call.device.type != "cpu":
            return f"compiled for CPUs; got {call.device.type}"
        if call.q.dtype not in (torch.float32, torch.bfloat16):
            return f"only float32 and bfloat16; got {call.q.dtype}"
        if (why := _decay_problem(call)) is not None:
            return why
        if torch.compiler.is_exporting():
            return "an exported program must run elsewhere too"
        return compiled.missing()

    def reason(self, call: LinearCall) -> str:
        return "compiled for this CPU"


class TritonBackend(KernelBackend):
    """Chunks by Triton's kernels."""

    name, kernel = "triton", "triton"
    passed_over = "not measured on a GPU yet; runs where asked for"

    def available(self) -> str | None:
        return None if importlib.util.find_spec("triton") else "triton is not installed"

    def automatic(self, call: LinearCall) -> bool:
        return False

    def problem(self, call: LinearCall) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if call.q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"only float32, float16 and bfloat16; got {call.q.dtype}"
        if max(call.q.shape[1], call.k.shape[1]) > LAUNCHES * min(64, max(16, call.chunk)):
            return f"at most {LAUNCHES} chunks of 16 to 64 tokens; got {max(call.q.shape[1], call.k.shape[1])} tokens"
        if (why := _decay_problem(call)) is not None:
            return why
        if call.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "it needs tensors on a GPU; got cpu"
        return None


def _decay_problem(call: LinearCall) -> str | None:
    if call.decay is not None and call.decay.ndim not in (1, 3):
        return f"it takes one decay per head, or per token and head; got {tuple(call.decay.shape)}"
    return None


KINDS = (NaiveBackend, ChunkedBackend, NativeBackend, TritonBackend)
"""In the order in which they are listed; of those that would take the same time the last is chosen."""

BACKENDS: dict[str, Backend[LinearCall]] = {kind.name: kind() for kind in KINDS}


def _chunk(call: LinearCall) -> int:
    """Tokens of a chunk: no more than there are."""
    return min(call.chunk, 1 << (operator.index(call.q.shape[1]) - 1).bit_length())


_OPERATORS = {"scan": chunks.linear_scan, "memory": memory.linear_memory, "read": memory.linear_read}
_PLAIN: dict[str, Callable[..., Any]] = {"scan": chunks.scan, "memory": memory.memory, "read": memory.read}


@dataclass(frozen=True)
class _Way:
    """How to compute: tokens of a chunk, and the language of the kernels."""

    chunk: int
    kernel: str

    def run(self, name: str, *arguments) -> Any:
        """The operator, or what it is made of in a program that others shall read."""
        if torch.compiler.is_exporting() and self.kernel == "torch":
            return _PLAIN[name](*arguments)
        return _OPERATORS[name](*arguments, self.kernel)


def _everything(call: LinearCall, v: Tensor, way: _Way) -> tuple[Tensor, LinearState]:
    """Every query sees every key: one product with the sum over keys."""
    memory, total = way.run("memory", call.k, v, call.valid, call.activation)
    if call.state is not None:
        memory = memory + call.state.memory
        total = total if call.state.total is None else total + call.state.total
    seen = memory / call.counted() if call.norm == "count" else memory
    if call.scaled:
        seen = seen * call.per_head
    divisor = total if call.norm == "sum" else None
    y, _ = way.run("read", call.q, seen, divisor, call.floor, call.eps, call.activation)
    return y, state_after(call, memory, total)


def _with_ones(call: LinearCall, v: Tensor) -> Tensor:
    """The values; where sums are divided later, in the dtype of states, and with a column of ones to sum weights in."""
    return v if call.norm == "none" else F.pad(v.to(call.wide), (0, int(call.norm == "sum")), value=1.0)


def _causal(call: LinearCall, v: Tensor, way: _Way) -> tuple[Tensor, LinearState]:
    state = None if call.state is None else call.state.memory
    if call.state is not None and call.state.total is not None and call.norm == "sum":
        state = torch.cat([call.state.memory, call.state.total.unsqueeze(-1)], -1)
    y, final = way.run("scan", call.q, call.k, _with_ones(call, v), call.decay, state, call.valid, call.activation, way.chunk)
    memory, total = (final[..., :-1], final[..., -1]) if call.norm == "sum" else (final, None)
    return _finished(call, y), state_after(call, memory, total)


def _both_ways(call: LinearCall, v: Tensor, way: _Way) -> tuple[Tensor, None]:
    """A pass in each direction, less each token's own key, which both have seen."""
    q, k = call.features()
    v, decay = _with_ones(call, existing(v, call.valid)), call.decay
    assert decay is not None  # without one there is nothing to run in order
    forward, _ = way.run("scan", q, k, v, decay, None, None, "none", way.chunk)
    if decay.ndim > 2:  # what decays between two tokens belongs to the later one: seen from behind, to the one before
        decay = F.pad(decay[:, 1:].flip(1), (0, 0) * (decay.ndim - 2) + (1, 0))
    backward, _ = way.run("scan", *(t.flip(1) for t in (q, k, v)), decay, None, None, "none", way.chunk)
    own = (q.to(call.wide) * k.to(call.wide)).sum(-1, keepdim=True)
    return _finished(call, forward.to(call.wide) + backward.flip(1) - own * v), None


def _in_order(run: Callable[..., tuple[Tensor, Any]], call: LinearCall, v: Tensor, *options) -> tuple[Tensor, Any]:
    """A causal attention in which numbers that are not finite reach the queries from their own token on, and no others.

    Inside a chunk later tokens count times 0, which NaN and infinity survive. Where any come out, the attention is run without
    them, and what sees them is NaN. On a GPU nobody looks: there they reach the rest of their chunk.
    """
    y, state = run(call, v, *options)
    if not readable(y) or bool(y.detach().sum(dtype=call.wide).isfinite()):
        return y, state
    q, k = (t.detach() for t in call.features())
    v = existing(v, call.valid)
    bad_q, bad_k, bad_v = (~t.isfinite() for t in (q, k, v.detach()))
    if not any(bool(bad.any()) for bad in (bad_q, bad_k, bad_v)):
        return y, state  # it overflowed, or came with the state
    plain = replace(call, q=call.q.masked_fill(bad_q, 0.0), k=existing(call.k, call.valid).masked_fill(bad_k, 0.0))
    y, state = run(plain, v.masked_fill(bad_v, 0.0), *options)
    seen = (bad_k.any(-1, keepdim=True) | bad_v).cumsum(1) > 0
    y = y + _nan_where(seen | bad_q.any(-1, keepdim=True), y)
    if state is None:
        return y, None
    bad_k, bad_v = bad_k.any(1), bad_v.any(1)
    memory = state.memory + _nan_where(bad_k[..., None] | bad_v[..., None, :], state.memory)
    return y, state._replace(memory=memory, total=None if state.total is None else state.total + _nan_where(bad_k, state.total))


def _nan_where(mask: Tensor, like: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(mask, torch.nan)


def _finished(call: LinearCall, y: Tensor) -> Tensor:
    """Divided and scaled sums over weighted values ``(batch, tokens, heads, value_dim)``."""
    if call.norm == "sum":
        y = divided(y[..., :-1], y[..., -1:], call.floor, call.eps)
    elif call.norm == "count":
        y = y / call.counted()
    return y * call.per_head.squeeze(-1) if call.scaled else y
