"""Linear attention: a kernel of features instead of the softmax, so that keys can be summed before any query asks.

    y_t = scale sum_s w_ts v_s / norm_t,   w_ts = decay_ts f(q_t)^T f(k_s)
    norm_t = max(sum_s w_ts, floor) + eps,  the number of keys, or 1

s runs over all keys, or over those up to t in raster order; decay_ts is the product of the decays of all tokens after the
earlier one up to the later one, per head or per feature, fixed or given by the tokens.

Cost: linear in tokens. The floor is 4 N d e FLOPs per head (f(k)^T v once, f(q) times that once) and one reading of q, k
and v and one writing of y; :mod:`regard.ops.linear.chunks` says what the causal form computes beside that. Memory: a few
chunks; states are float32 (float64 for float64).

Source: Katharopoulos et al., linear transformers, arXiv:2006.16236; Qin et al., Lightning Attention, arXiv:2405.17381 and
arXiv:2401.04658; Yang et al., gated linear attention, arXiv:2312.06635; Choromanski et al., Performer, arXiv:2009.14794;
Qin et al., cosFormer, arXiv:2202.08791; Zheng, L2ViT, arXiv:2501.16182.
"""

from __future__ import annotations

import importlib.util
import operator
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import INTEGERS, check_choice, check_integer, check_tensor, shown
from .. import compiled
from ..calls.lower import _common_dtype
from ..calls.observe import WATCHERS, Weighing, tell
from ..transforms import PLAIN_ONLY, differentiated
from . import chunks as linear_chunks
from .call import Call, LinearState, check_inputs, pose
from .features import FeatureMap
from .norms import divided
from .spans import existing, readable

BACKENDS = ("auto", "naive", "chunked", "native", "triton")
CHUNK = 64
"""Tokens of a chunk of the causal form."""

LAUNCHES = 65535
"""Chunks of tokens that a launch on a GPU may have."""

WEIGHTS = 1 << 24
"""Weights computed at once by :func:`linear_weights`."""


def linear_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature: str | FeatureMap = "none",
    norm: str = "none",
    floor: float | None = None,
    eps: float = 0.0,
    causal: bool = False,
    log_decay: Tensor | None = None,
    scale: float | Tensor = 1.0,
    valid: Tensor | None = None,
    state: LinearState | None = None,
    start: int = 0,
    return_state: bool = False,
    chunk: int = CHUNK,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, LinearState]:
    """Attention whose weights are products of features; linear in tokens.

    Args:
        q: queries ``(batch, *grid, heads, dim)``.
        k: keys ``(batch, *k_grid, heads, dim)``; with ``causal`` or a decay on the grid of ``q``.
        v: values ``(batch, *k_grid, heads, value_dim)``.
        feature: ``"none"``, ``"relu"``, ``"elu_plus_one"``, ``"silu"``, or one of :mod:`regard.ops.linear.features`.
        norm: ``"none"``; ``"sum"`` divides by the sum of the weights, ``"count"`` by the number of keys seen (not decayed).
        floor: the least that the sum may be; None leaves it. A query whose divisor is 0 gives 0; one below the smallest normal
            number of the dtype of states counts as 0, see :mod:`regard.ops.linear.norms`.
        eps: added to the sum, after the floor. An epsilon relative to the mean weight is ``eps`` times the number of keys.
        causal: whether a query sees the keys up to itself in raster order, or all.
        log_decay: logarithm of the decay, 0 or less, also minus infinity: one per head ``(heads,)``, per feature
            ``(heads, features)``, per token ``(batch, *grid, heads)`` or both ``(batch, *grid, heads, features)``. Without
            ``causal``, weights decay with the distance in both directions. Values above 0 and NaN are refused where they can be
            looked at for nothing: on a CPU, outside of compiled graphs and transforms; elsewhere they are not looked for.
        scale: factor on the output, a number or one per head.
        valid: ``(batch, *k_grid)``, True where a key exists; the decay of a missing key's token still counts. What stands in k
            and v for a missing key reaches nothing, NaN and infinity included; its gradients are 0.
        state: what the keys of earlier calls left, in the dtype of states; every axis must fit.
        start: position of the first token, for feature maps that depend on positions.
        return_state: also return what all keys so far leave to later queries.
        chunk: tokens of a chunk of the causal form, a power of two; the result does not depend on it.
        backend: ``"auto"``, ``"chunked"`` (torch), ``"native"`` (compiled for the CPU) and ``"triton"`` (neither with
            decays per feature), or ``"naive"``, the definition, which computes all weights.

    Returns:
        ``(batch, *grid, heads, value_dim)`` in the dtype of ``q``, and the :class:`LinearState` if asked for. A number that is
        not finite reaches the outputs of its own head that see it, and no others; but on a GPU, with ``causal``, also those of
        the tokens before it in its chunk.

    Raises:
        TypeError: another kind of thing than an argument may be, or a tensor of another dtype.
        ValueError: shapes, devices or options that do not go together, with what was given and what is allowed.
    """
    check_inputs(q=q, k=k, v=v)
    q, k, v = _common_dtype(q, k, v)
    call = pose(q, k, v, feature, norm, floor, eps, causal, log_decay, scale, valid, state, start, return_state)
    check_integer("chunk", chunk, 1)
    if chunk & (chunk - 1):
        raise ValueError(f"chunk must be a power of two; got {chunk}")
    check_choice("backend", backend, BACKENDS)
    problems: dict[str, Callable[[Call], str | None]]
    problems = {"triton": partial(_triton_problem, chunk=chunk), "native": _native_problem}
    if backend in problems and (why := problems[backend](call)) is not None:
        raise ValueError(f"backend {backend!r} cannot run this call: {why}")
    if backend != "naive" and differentiated(*_carriers(call, v)):
        if backend != "auto":
            raise ValueError(f"backend {backend!r} cannot run this call: {PLAIN_ONLY}")
        backend = "naive"
    if WATCHERS:
        tell(_weighing(q, k, v, call))
    values, tokens = v.flatten(1, -3), operator.index(call.q.shape[1])
    kernel = backend if backend in problems else "native" if backend == "auto" and _native_problem(call) is None else "torch"
    way = _Way(min(chunk, 1 << (tokens - 1).bit_length()), kernel)
    if backend == "naive" or not q.shape[0]:
        y, final = _in_order(_naive, call, values) if causal else _naive(call, values)
    elif causal:
        y, final = _in_order(_causal, call, values, way)
    elif log_decay is None:
        y, final = _everything(call, values, way)
    else:
        y, final = _both_ways(call, values, way)
    y = y.to(q.dtype).unflatten(1, q.shape[1:-2])
    if not return_state:
        return y
    assert final is not None  # it was checked that there is one
    return y, final


def _carriers(call: Call, v: Tensor) -> tuple[Tensor | None, ...]:
    """The tensors that carry derivatives; features have been taken already."""
    scale = call.scale if isinstance(call.scale, Tensor) else None
    return call.q, call.k, v, call.decay, scale, *(call.state or ())


def _triton_problem(call: Call, chunk: int) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if call.q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"only float32, float16 and bfloat16; got {call.q.dtype}"
    if max(call.q.shape[1], call.k.shape[1]) > LAUNCHES * min(64, max(16, chunk)):
        return f"at most {LAUNCHES} chunks of 16 to 64 tokens; got {max(call.q.shape[1], call.k.shape[1])} tokens"
    if call.decay is not None and call.decay.ndim not in (1, 3):
        return f"it takes one decay per head, or per token and head; got {tuple(call.decay.shape)}"
    if call.q.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it needs tensors on a GPU; got cpu"
    return None


def _native_problem(call: Call) -> str | None:
    if call.q.device.type != "cpu":
        return f"compiled for CPUs; got {call.q.device.type}"
    if call.q.dtype not in (torch.float32, torch.bfloat16):
        return f"only float32 and bfloat16; got {call.q.dtype}"
    if call.decay is not None and call.decay.ndim not in (1, 3):
        return f"it takes one decay per head, or per token and head; got {tuple(call.decay.shape)}"
    if torch.compiler.is_exporting():
        return "an exported program must run elsewhere too"
    return compiled.missing()


@dataclass(frozen=True)
class _Way:
    """How to compute: tokens of a chunk, and the language of the kernels."""

    chunk: int
    kernel: str

    def run(self, name: str, *arguments) -> Any:
        """The operator, or what it is made of in a program that others shall read."""
        if torch.compiler.is_exporting() and self.kernel == "torch":
            return getattr(linear_chunks, name)(*arguments)
        return getattr(linear_chunks, f"linear_{name}")(*arguments, self.kernel)


def _everything(call: Call, v: Tensor, way: _Way) -> tuple[Tensor, LinearState]:
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
    return y, _state(call, memory, total)


def _state(call: Call, memory: Tensor, total: Tensor | None) -> LinearState:
    count = None
    if call.norm == "count":
        count = call.present.sum(1).expand(call.k.shape[0])
        if call.state is not None and call.state.keys is not None:
            count = count + call.state.keys
    return LinearState(memory, total if call.norm == "sum" else None, count)


def _with_ones(call: Call, v: Tensor) -> Tensor:
    """The values; where sums are divided later, in the dtype of states, and with a column of ones to sum weights in."""
    return v if call.norm == "none" else F.pad(v.to(call.wide), (0, int(call.norm == "sum")), value=1.0)


def _causal(call: Call, v: Tensor, way: _Way) -> tuple[Tensor, LinearState]:
    state = None if call.state is None else call.state.memory
    if call.state is not None and call.state.total is not None and call.norm == "sum":
        state = torch.cat([call.state.memory, call.state.total.unsqueeze(-1)], -1)
    y, final = way.run("scan", call.q, call.k, _with_ones(call, v), call.decay, state, call.valid, call.activation, way.chunk)
    memory, total = (final[..., :-1], final[..., -1]) if call.norm == "sum" else (final, None)
    return _finished(call, y), _state(call, memory, total)


def _both_ways(call: Call, v: Tensor, way: _Way) -> tuple[Tensor, None]:
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


def _in_order(run: Callable[..., tuple[Tensor, Any]], call: Call, v: Tensor, *options) -> tuple[Tensor, Any]:
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


def _finished(call: Call, y: Tensor) -> Tensor:
    """Divided and scaled sums over weighted values ``(batch, tokens, heads, value_dim)``."""
    if call.norm == "sum":
        y = divided(y[..., :-1], y[..., -1:], call.floor, call.eps)
    elif call.norm == "count":
        y = y / call.counted()
    return y * call.per_head.squeeze(-1) if call.scaled else y


def linear_weights(
    q: Tensor,
    k: Tensor,
    *,
    rows: Tensor | Sequence[int] | None = None,
    feature: str | FeatureMap = "none",
    norm: str = "none",
    floor: float | None = None,
    eps: float = 0.0,
    causal: bool = False,
    log_decay: Tensor | None = None,
    scale: float | Tensor = 1.0,
    valid: Tensor | None = None,
    state: LinearState | None = None,
    start: int = 0,
) -> Tensor:
    """What :func:`linear_attend` multiplies the values with, by the definition; differentiable.

    Args:
        q, k, feature, norm, floor, eps, causal, log_decay, scale, valid, state, start: as in :func:`linear_attend`; a state
            takes part in the sum of the weights, its own keys are not shown.
        rows: row-major indices of the queries to look at; all by default.

    Returns:
        ``(batch, heads, rows, *k_grid)`` in float32 (float64 for float64). They may be negative and need not sum to 1.

    Raises:
        TypeError, ValueError: as in :func:`linear_attend`; rows that are no indices of queries.
    """
    check_inputs(q=q, k=k)
    q, k = _common_dtype(q, k)
    call = pose(q, k, None, feature, norm, floor, eps, causal, log_decay, scale, valid, state, start)
    return _weights(call, _chosen(rows, call)).unflatten(-1, k.shape[1:-2])


def _chosen(rows: Tensor | Sequence[int] | None, call: Call) -> Tensor:
    queries = call.q.shape[1]
    if rows is None:
        return torch.arange(queries, device=call.q.device)
    if isinstance(rows, Tensor):
        check_tensor("rows", rows, INTEGERS, device=call.q.device)
    elif not isinstance(rows, Sequence) or isinstance(rows, str):
        raise TypeError(f"rows must be indices of queries; got {shown(rows)}")
    else:
        rows = torch.tensor([check_integer("rows", row) for row in rows], dtype=torch.long, device=call.q.device)
    if rows.ndim != 1 or not len(rows):
        raise ValueError(f"rows must be indices of queries, one axis and at least one; got {shown(rows)}")
    if readable(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < queries:
        raise ValueError(f"rows must be indices of queries in 0..{queries - 1}; got {int(rows.min())}..{int(rows.max())}")
    return rows.long()


def _weights(call: Call, rows: Tensor) -> Tensor:
    """``(batch, heads, rows, keys)``, a few rows at a time."""
    per_row = call.q.shape[0] * call.k.shape[1:-1].numel() * (1 if call.width == 1 else call.width)
    parts = []
    for chunk in rows.split(max(1, WEIGHTS // max(1, per_row))):
        products = _products(call, chunk)
        parts.append(_weighed(call, products, products.sum(-1), chunk))
    return torch.cat(parts, 2)


def _products(call: Call, rows: Tensor) -> Tensor:
    """Weights before the division, ``(batch, heads, rows, keys)``."""
    q, k = _heads_first(call)
    q = q[:, :, rows]
    if call.decay is None:
        products = q @ k.transpose(-2, -1)
    elif call.width == 1:
        products = (q @ k.transpose(-2, -1)) * _left_over(call, rows).squeeze(-1)
    else:
        products = torch.einsum("bhtd,bhsd,bhtsd->bhts", q, k, _left_over(call, rows).expand(len(q), -1, -1, -1, -1))
    if not call.causal:
        return products
    keys = torch.arange(k.shape[2], device=rows.device)
    return products.masked_fill(keys > rows[:, None], 0.0)


def _heads_first(call: Call) -> tuple[Tensor, Tensor]:
    """Features of queries and keys, zeros for missing keys: ``(batch, heads, tokens, features)`` in the dtype of states."""
    q, k = (t.to(call.wide).transpose(1, 2) for t in call.features())
    return q, k


def _sums(call: Call) -> tuple[Tensor, Tensor]:
    """Logarithms of decays up to each token ``(batch, heads, tokens, width)``, and how many of them are infinite."""
    assert call.decay is not None  # the caller looked
    logs = call.decay.double()
    if logs.ndim <= 2:
        logs = logs.reshape(1, 1, logs.shape[0], -1).expand(-1, call.q.shape[1], -1, -1)
    elif logs.ndim == 3:
        logs = logs.unsqueeze(-1)
    logs = logs.transpose(1, 2)
    infinite = logs == -torch.inf
    return logs.masked_fill(infinite, 0.0).cumsum(2), infinite.cumsum(2)


def _left_over(call: Call, rows: Tensor) -> Tensor:
    """How much the tokens between two leave of the earlier one at the later one ``(batch, heads, rows, keys, width)``."""
    sums, infinite = _sums(call)
    between = sums[:, :, rows, None] - sums[:, :, None]
    keys = torch.arange(sums.shape[2], device=rows.device)
    between = between.where((keys <= rows[:, None])[..., None], -between)
    return between.masked_fill(infinite[:, :, rows, None] != infinite[:, :, None], -torch.inf).exp().to(call.wide)


def _weighed(call: Call, sums: Tensor, mass: Tensor, rows: Tensor) -> Tensor:
    """Sums over weights ``(batch, heads, rows, width)`` of some rows, divided (by ``mass``, their sum) and scaled."""
    if call.norm == "sum":
        if call.state is not None and call.state.total is not None:
            mass = mass + torch.einsum("bhtd,bhd->bht", _entering(call)[:, :, rows], call.state.total)
        sums = divided(sums, mass.unsqueeze(-1), call.floor, call.eps)
    elif call.norm == "count":
        count = call.counted().transpose(1, 2)  # (batch, 1, tokens, 1)
        sums = sums / (count[:, :, rows] if call.causal else count)
    return sums * call.per_head


def _entering(call: Call) -> Tensor:
    """Features of queries as they meet the state ``(batch, heads, tokens, features)``."""
    return _heads_first(call)[0] * _past(call)


def _past(call: Call) -> Tensor:
    """How much is left of the state at each token, ``(1 or batch, 1 or heads, 1 or tokens, 1 or features)``."""
    if call.decay is None:
        return call.q.new_ones(1, 1, 1, 1, dtype=call.wide)
    sums, infinite = _sums(call)
    return sums.masked_fill(infinite > 0, -torch.inf).exp().to(call.wide)


def _naive(call: Call, v: Tensor) -> tuple[Tensor, LinearState | None]:
    """The definition, all weights at once."""
    rows, wide = torch.arange(call.q.shape[1], device=v.device), existing(v, call.valid).to(call.wide)
    products = _products(call, rows)
    y = torch.einsum("bhts,bshe->bhte", products, wide)
    if call.state is not None:
        y = y + _entering(call) @ call.state.memory
    y = _weighed(call, y, products.sum(-1), rows).transpose(1, 2)
    if call.decay is not None and not call.causal:
        return y, None
    k, past = _heads_first(call)[1], _past(call)[:, :, -1]
    if call.decay is not None:
        k = k * _left_over(call, rows[-1:]).squeeze(2)
    memory, total = torch.einsum("bhsd,bshe->bhde", k, wide), k.sum(2)
    if call.state is not None:
        memory = memory + call.state.memory * past[..., None]
        total = total if call.state.total is None else total + call.state.total * past
    return y, _state(call, memory, total)


def scan_definition(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None, valid: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """:func:`regard.ops.linear.chunks.linear_scan` by the definition."""
    before = None if state is None else LinearState(state)
    call = Call(q, k, activation, "none", None, 0.0, True, decay, 1.0, valid, before)
    y, final = _naive(call, v)
    assert final is not None  # in order there is a state
    return y.to(v.dtype), final.memory


def _weighing(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Weighing:
    """What watchers are told: the weights by the definition, and the least arithmetic and traffic."""
    grids = tuple(q.shape[1:-2]), tuple(k.shape[1:-2])

    def weights(rows: Tensor) -> Tensor:
        return _weights(call, rows).unflatten(-1, grids[1])

    products = (q.shape[:-1].numel() + k.shape[:-1].numel()) * call.q.shape[-1]
    flops = 2 * products * (v.shape[-1] + (call.norm == "sum"))
    moved = q.numel() + k.numel() + v.numel() + q.shape[:-1].numel() * v.shape[-1]
    return Weighing("linear", q.shape[0], q.shape[-2], *grids, weights, q.device, flops=flops, bytes=moved * q.element_size())
