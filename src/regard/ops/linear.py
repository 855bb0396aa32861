"""Linear attention: a kernel of features instead of the softmax, so that keys can be summed before any query asks.

    y_t = scale sum_s w_ts v_s / norm_t,   w_ts = decay_ts f(q_t)^T f(k_s)
    norm_t = max(sum_s w_ts, floor) + eps,  the number of keys, or 1

s runs over all keys, or over those up to t in raster order; decay_ts is the product of the decays of all tokens after the
earlier one up to the later one, per head or per feature, fixed or given by the tokens.

Cost: linear in tokens. The floor is 4 N d e FLOPs per head (f(k)^T v once, f(q) times that once) and one reading of q, k
and v and one writing of y; :mod:`regard.ops.linear_chunks` says what the causal form computes beside that. Memory: a few
chunks; states are float32 (float64 for float64).

Source: Katharopoulos et al., linear transformers, arXiv:2006.16236; Qin et al., Lightning Attention, arXiv:2405.17381 and
arXiv:2401.04658; Yang et al., gated linear attention, arXiv:2312.06635; Choromanski et al., Performer, arXiv:2009.14794;
Qin et al., cosFormer, arXiv:2202.08791; Zheng, L2ViT, arXiv:2501.16182.
"""

from __future__ import annotations

import importlib.util
import operator
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import linear_chunks, native
from .call import _common_dtype
from .linear_features import FeatureMap
from .linear_spans import ACTIVATIONS
from .observe import WATCHERS, Weighing, tell
from .transforms import PLAIN_ONLY, differentiated

NORMS = ("none", "sum", "count")
BACKENDS = ("auto", "naive", "chunked", "native", "triton")
CHUNK = 64
"""Tokens of a chunk of the causal form."""

WEIGHTS = 1 << 24
"""Weights computed at once by :func:`linear_weights`."""


class LinearState(NamedTuple):
    """What past keys leave to later queries, of one size whatever their number.

    Attributes:
        memory: sum of ``f(k) v^T``, decayed: ``(batch, heads, features, value_dim)``.
        total: sum of ``f(k)``, decayed: ``(batch, heads, features)``; None but for ``norm="sum"``.
        keys: how many were seen ``(batch,)``; None but for ``norm="count"``.
    """

    memory: Tensor
    total: Tensor | None = None
    keys: Tensor | None = None


@dataclass(frozen=True)
class _Call:
    """One linear attention on flat tokens."""

    q: Tensor
    k: Tensor
    feature: str | FeatureMap
    norm: str
    floor: float | None
    eps: float
    causal: bool
    decay: Tensor | None
    scale: float | Tensor
    valid: Tensor | None
    state: LinearState | None
    start: int

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.q.dtype, torch.float32)

    @property
    def activation(self) -> str:
        """The feature map where it is applied value by value, by the operators themselves."""
        return self.feature if isinstance(self.feature, str) else "none"

    def features(self, own: bool = True) -> tuple[Tensor, Tensor]:
        """Features of queries and keys; without ``own`` but for those that the operators make themselves."""
        if not isinstance(self.feature, str):
            return self.feature(self.q, self.start, False), self.feature(self.k, self.start, True)
        value = ACTIVATIONS[self.feature if own else "none"][0]
        return value(self.q), value(self.k)

    @property
    def width(self) -> int:
        """Of the decays: 1, or that of the features."""
        return 1 if self.decay is None or self.decay.ndim in (1, 3) else self.decay.shape[-1]

    @property
    def scaled(self) -> bool:
        return isinstance(self.scale, Tensor) or self.scale != 1.0

    @property
    def per_head(self) -> Tensor:
        """The scale ``(1 or heads, 1, 1)``."""
        return torch.as_tensor(self.scale, dtype=self.wide, device=self.q.device).reshape(-1, 1, 1)

    @property
    def present(self) -> Tensor:
        """1 for each key that exists, else 0: ``(1 or batch, keys)``."""
        return self.k.new_ones(1, self.k.shape[1], dtype=self.wide) if self.valid is None else self.valid.to(self.wide)

    def counted(self) -> Tensor:
        """Keys that each query sees: ``(1 or batch, 1 or tokens, 1, 1)``, at least 1."""
        count = self.present.cumsum(1) if self.causal else self.present.sum(1, keepdim=True)
        if self.state is not None and self.state.keys is not None:
            count = count + self.state.keys[:, None]
        return count.clamp(min=1.0)[..., None, None]


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
        feature: ``"none"``, ``"relu"``, ``"elu_plus_one"``, ``"silu"``, or one of :mod:`regard.ops.linear_features`.
        norm: ``"none"``; ``"sum"`` divides by the sum of the weights, ``"count"`` by the number of keys seen (not decayed).
        floor: the least that the sum may be; None leaves it. A query whose divisor is 0 gives 0.
        eps: added to the sum, after the floor. An epsilon relative to the mean weight is ``eps`` times the number of keys.
        causal: whether a query sees the keys up to itself in raster order, or all.
        log_decay: logarithm of the decay, 0 or less, also minus infinity: one per head ``(heads,)``, per feature
            ``(heads, features)``, per token ``(batch, *grid, heads)`` or both ``(batch, *grid, heads, features)``. Without
            ``causal``, weights decay with the distance in both directions.
        scale: factor on the output, a number or one per head.
        valid: ``(batch, *k_grid)``, True where a key exists; the decay of a missing key's token still counts.
        state: what the keys of earlier calls left, in the dtype of states.
        start: position of the first token, for feature maps that depend on positions.
        return_state: also return what all keys so far leave to later queries.
        chunk: tokens of a chunk of the causal form, a power of two; the result does not depend on it.
        backend: ``"auto"``, ``"chunked"`` (torch), ``"native"`` (compiled for the CPU) and ``"triton"`` (neither with
            decays per feature), or ``"naive"``, the definition, which computes all weights.

    Returns:
        ``(batch, *grid, heads, value_dim)`` in the dtype of ``q``, and the :class:`LinearState` if asked for.

    Raises:
        ValueError: shapes or options that do not go together, with what was given and what is allowed.
    """
    q, k, v = _common_dtype(q, k, v)
    call = _pose(q, k, feature, norm, floor, eps, causal, log_decay, scale, valid, state, start)
    if v.ndim < 4 or v.shape[:-1] != k.shape[:-1] or not v.shape[-1]:
        raise ValueError(f"v must be (batch, *k_grid, heads, value_dim) beside k {tuple(k.shape)}; got {tuple(v.shape)}")
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f"chunk must be a power of two; got {chunk}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    problems = {"triton": _triton_problem, "native": _native_problem}
    if backend in problems and (why := problems[backend](call)) is not None:
        raise ValueError(f"backend {backend!r} cannot run this call: {why}")
    if backend != "naive" and differentiated(*_carriers(call, v)):
        if backend != "auto":
            raise ValueError(f"backend {backend!r} cannot run this call: {PLAIN_ONLY}")
        backend = "naive"
    if state is not None or return_state:
        _check_state(call, v.shape[-1])
    if WATCHERS:
        tell(_weighing(q, k, v, call))
    values, tokens = v.flatten(1, -3), operator.index(call.q.shape[1])
    kernel = backend if backend in problems else "native" if backend == "auto" and _native_problem(call) is None else "torch"
    way = _Way(min(chunk, 1 << (tokens - 1).bit_length()), kernel)
    if backend == "naive":
        y, final = _naive(call, values)
    elif causal:
        y, final = _causal(call, values, way)
    elif log_decay is None:
        y, final = _everything(call, values, way)
    else:
        y, final = _both_ways(call, values, way)
    y = y.to(q.dtype).unflatten(1, q.shape[1:-2])
    if not return_state:
        return y
    assert final is not None  # it was checked that there is one
    return y, final


def _carriers(call: _Call, v: Tensor) -> tuple[Tensor | None, ...]:
    """The tensors that carry derivatives."""
    own = (call.scale, *(call.state or ()), *getattr(call.feature, "__dict__", {}).values())
    weights = call.feature.parameters() if isinstance(call.feature, nn.Module) else ()
    return call.q, call.k, v, call.decay, *(t for t in own if isinstance(t, Tensor)), *weights


def _pose(
    q: Tensor, k: Tensor, feature, norm: str, floor: float | None, eps: float, causal: bool, log_decay: Tensor | None,
    scale: float | Tensor, valid: Tensor | None, state: LinearState | None, start: int,
) -> _Call:  # fmt: skip
    """Check everything but the values, and flatten the grids."""
    alike = k.ndim >= 4 and q.shape[0] == k.shape[0] and q.shape[-2:] == k.shape[-2:]
    one_grid = not (causal or log_decay is not None) or q.shape == k.shape
    if q.ndim < 4 or not alike or not one_grid or 0 in (*q.shape, *k.shape):
        raise ValueError(
            "q and k must be (batch, *grid, heads, dim), not empty, alike but for the grid, and on one grid under causal or a "
            f"decay; got q {tuple(q.shape)}, k {tuple(k.shape)}"
        )
    if not q.is_floating_point():
        raise ValueError(f"q, k and v must be floating point; got {q.dtype}")
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}; got {norm!r}")
    if not callable(feature) and feature not in ACTIVATIONS:
        raise ValueError(f"feature must be one of {', '.join(ACTIVATIONS)}, or a feature map; got {feature!r}")
    if valid is not None and (valid.dtype != torch.bool or valid.shape != k.shape[:-2]):
        raise ValueError(f"valid must be boolean {tuple(k.shape[:-2])}; got {valid.dtype} {tuple(valid.shape)}")
    if isinstance(scale, Tensor) and scale.numel() not in (1, q.shape[-2]):
        raise ValueError(f"scale must be a number or one per head, {q.shape[-2]}; got {tuple(scale.shape)}")
    decay = log_decay
    if log_decay is not None:
        found = tuple(log_decay.shape)
        width = q.shape[-1] if isinstance(feature, str) or not found else found[-1]  # a feature map may widen
        allowed = (q.shape[-2:-1], (q.shape[-2], width), q.shape[:-1], (*q.shape[:-1], width))
        if found not in [tuple(shape) for shape in allowed]:
            raise ValueError(f"log_decay must be one of {', '.join(str(tuple(shape)) for shape in allowed)}; got {found}")
        decay = log_decay if log_decay.ndim <= 2 else log_decay.flatten(1, q.ndim - 3)
    flat_valid = None if valid is None else valid.flatten(1)
    flat = q.flatten(1, -3), k.flatten(1, -3)
    return _Call(*flat, feature, norm, floor, eps, causal, decay, scale, flat_valid, state, start)


def _triton_problem(call: _Call) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if call.q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"only float32, float16 and bfloat16; got {call.q.dtype}"
    if call.decay is not None and call.decay.ndim not in (1, 3):
        return f"it takes one decay per head, or per token and head; got {tuple(call.decay.shape)}"
    if call.q.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it needs tensors on a GPU; got cpu"
    return None


def _native_problem(call: _Call) -> str | None:
    if call.q.device.type != "cpu":
        return f"compiled for CPUs; got {call.q.device.type}"
    if call.q.dtype not in (torch.float32, torch.bfloat16):
        return f"only float32 and bfloat16; got {call.q.dtype}"
    if call.decay is not None and call.decay.ndim not in (1, 3):
        return f"it takes one decay per head, or per token and head; got {tuple(call.decay.shape)}"
    if torch.compiler.is_exporting():
        return "an exported program must run elsewhere too"
    return native.missing()


def _check_state(call: _Call, value_dim: int) -> None:
    """Check that there is a state to take or to leave, and that the one given fits."""
    if not isinstance(call.feature, str) and not call.feature.streams:
        raise ValueError(f"features of {type(call.feature).__name__} depend on later tokens and leave no state")
    if call.decay is not None and not call.causal:
        raise ValueError("a decay in both directions leaves no state: later keys change earlier outputs")
    if call.state is None:
        return
    memory, total, keys = call.state
    if (call.norm == "sum" and total is None) or (call.norm == "count" and keys is None):
        raise ValueError(f"norm={call.norm!r} needs the state of an attention with the same norm")
    batch, _, heads, _ = call.q.shape
    fits = memory.ndim == 4 and (memory.shape[0], memory.shape[1], memory.shape[3]) == (batch, heads, value_dim)
    if not fits or memory.dtype != call.wide:
        raise ValueError(
            f"the memory of the state must be (batch, heads, features, value_dim) = ({batch}, {heads}, features, {value_dim}) "
            f"in {call.wide}; got {tuple(memory.shape)} in {memory.dtype}"
        )


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


def _everything(call: _Call, v: Tensor, way: _Way) -> tuple[Tensor, LinearState]:
    """Every query sees every key: one product with the sum over keys."""
    q, k = call.features(own=False)
    memory, total = way.run("memory", k, v, call.valid, call.activation)
    if call.state is not None:
        memory = memory + call.state.memory
        total = total if call.state.total is None else total + call.state.total
    seen = memory / call.counted() if call.norm == "count" else memory
    if call.scaled:
        seen = seen * call.per_head
    divisor = total if call.norm == "sum" else None
    y, _ = way.run("read", q, seen, divisor, call.floor, call.eps, call.activation)
    return y, _state(call, memory, total)


def _state(call: _Call, memory: Tensor, total: Tensor | None) -> LinearState:
    count = None
    if call.norm == "count":
        count = call.present.sum(1).expand(call.k.shape[0])
        if call.state is not None and call.state.keys is not None:
            count = count + call.state.keys
    return LinearState(memory, total if call.norm == "sum" else None, count)


def _with_ones(call: _Call, v: Tensor) -> Tensor:
    """The values; where sums are divided later, in the dtype of states, and with a column of ones to sum weights in."""
    return v if call.norm == "none" else F.pad(v.to(call.wide), (0, int(call.norm == "sum")), value=1.0)


def _causal(call: _Call, v: Tensor, way: _Way) -> tuple[Tensor, LinearState]:
    q, k = call.features(own=False)
    state = None if call.state is None else call.state.memory
    if call.state is not None and call.state.total is not None and call.norm == "sum":
        state = torch.cat([call.state.memory, call.state.total.unsqueeze(-1)], -1)
    y, final = way.run("scan", q, k, _with_ones(call, v), call.decay, state, call.valid, call.activation, way.chunk)
    memory, total = (final[..., :-1], final[..., -1]) if call.norm == "sum" else (final, None)
    return _finished(call, y), _state(call, memory, total)


def _both_ways(call: _Call, v: Tensor, way: _Way) -> tuple[Tensor, None]:
    """A pass in each direction, less each token's own key, which both have seen."""
    q, k = call.features()
    v, decay, valid = _with_ones(call, v), call.decay, call.valid
    assert decay is not None  # without one there is nothing to run in order
    forward, _ = way.run("scan", q, k, v, decay, None, valid, "none", way.chunk)
    if decay.ndim > 2:  # what decays between two tokens belongs to the later one: seen from behind, to the one before
        decay = F.pad(decay[:, 1:].flip(1), (0, 0) * (decay.ndim - 2) + (1, 0))
    turned = (t.flip(1) for t in (q, k, v))
    backward, _ = way.run("scan", *turned, decay, None, None if valid is None else valid.flip(1), "none", way.chunk)
    own = (q.to(call.wide) * k.to(call.wide)).sum(-1, keepdim=True)
    if valid is not None:
        own = own * valid[..., None, None]
    return _finished(call, forward.to(call.wide) + backward.flip(1) - own * v), None


def _finished(call: _Call, y: Tensor) -> Tensor:
    """Divided and scaled sums over weighted values ``(batch, tokens, heads, value_dim)``."""
    if call.norm == "sum":
        y = y[..., :-1] * linear_chunks.inverse(y[..., -1:], call.floor, call.eps)
    elif call.norm == "count":
        y = y / call.counted()
    return y * call.per_head.squeeze(-1) if call.scaled else y


def linear_weights(
    q: Tensor,
    k: Tensor,
    *,
    rows: Tensor | None = None,
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
        ValueError: as in :func:`linear_attend`.
    """
    q, k = _common_dtype(q, k)
    call = _pose(q, k, feature, norm, floor, eps, causal, log_decay, scale, valid, state, start)
    if rows is None:
        rows = torch.arange(call.q.shape[1], device=q.device)
    return _weights(call, rows).unflatten(-1, k.shape[1:-2])


def _weights(call: _Call, rows: Tensor) -> Tensor:
    """``(batch, heads, rows, keys)``, a few rows at a time."""
    per_row = call.q.shape[0] * call.k.shape[1:-1].numel() * (1 if call.width == 1 else call.width)
    parts = []
    for chunk in rows.split(max(1, WEIGHTS // per_row)):
        products = _products(call, chunk)
        parts.append(products * _factor(call, products.sum(-1), chunk).unsqueeze(-1))
    return torch.cat(parts, 2)


def _products(call: _Call, rows: Tensor) -> Tensor:
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


def _heads_first(call: _Call) -> tuple[Tensor, Tensor]:
    """Features of queries and keys, zeros for missing keys: ``(batch, heads, tokens, features)`` in the dtype of states."""
    q, k = (t.to(call.wide).transpose(1, 2) for t in call.features())
    return q, k * call.present[:, None, :, None]


def _sums(call: _Call) -> tuple[Tensor, Tensor]:
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


def _left_over(call: _Call, rows: Tensor) -> Tensor:
    """How much the tokens between two leave of the earlier one at the later one ``(batch, heads, rows, keys, width)``."""
    sums, infinite = _sums(call)
    between = -(sums[:, :, rows, None] - sums[:, :, None]).abs()
    return between.masked_fill(infinite[:, :, rows, None] != infinite[:, :, None], -torch.inf).exp().to(call.wide)


def _factor(call: _Call, mass: Tensor, rows: Tensor) -> Tensor:
    """What the norm and the scale multiply sums over keys with, ``(batch, heads, rows)``."""
    factor = torch.ones_like(mass)
    if call.norm == "sum":
        if call.state is not None and call.state.total is not None:
            mass = mass + torch.einsum("bhtd,bhd->bht", _entering(call)[:, :, rows], call.state.total)
        factor = linear_chunks.inverse(mass, call.floor, call.eps)
    elif call.norm == "count":
        count = call.counted().squeeze(-1).transpose(1, 2)  # (batch, 1, tokens)
        factor = factor / (count[..., rows] if call.causal else count)
    return factor * call.per_head.squeeze(-1)


def _entering(call: _Call) -> Tensor:
    """Features of queries as they meet the state ``(batch, heads, tokens, features)``."""
    return _heads_first(call)[0] * _past(call)


def _past(call: _Call) -> Tensor:
    """How much is left of the state at each token, ``(1 or batch, 1 or heads, 1 or tokens, 1 or features)``."""
    if call.decay is None:
        return call.q.new_ones(1, 1, 1, 1, dtype=call.wide)
    sums, infinite = _sums(call)
    return sums.masked_fill(infinite > 0, -torch.inf).exp().to(call.wide)


def _naive(call: _Call, v: Tensor) -> tuple[Tensor, LinearState | None]:
    """The definition, all weights at once."""
    rows, wide = torch.arange(call.q.shape[1], device=v.device), v.to(call.wide)
    products = _products(call, rows)
    y = torch.einsum("bhts,bshe->bhte", products, wide)
    if call.state is not None:
        y = y + _entering(call) @ call.state.memory
    y = (y * _factor(call, products.sum(-1), rows).unsqueeze(-1)).transpose(1, 2)
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
    """:func:`regard.ops.linear_chunks.linear_scan` by the definition."""
    before = None if state is None else LinearState(state)
    call = _Call(q, k, activation, "none", None, 0.0, True, decay, 1.0, valid, before, 0)
    y, final = _naive(call, v)
    assert final is not None  # in order there is a state
    return y.to(v.dtype), final.memory


def _weighing(q: Tensor, k: Tensor, v: Tensor, call: _Call) -> Weighing:
    """What watchers are told: the weights by the definition, and the least arithmetic and traffic."""
    grids = tuple(q.shape[1:-2]), tuple(k.shape[1:-2])

    def weights(rows: Tensor) -> Tensor:
        return _weights(call, rows).unflatten(-1, grids[1])

    features = call.features()[0].shape[-1] if not isinstance(call.feature, str) else q.shape[-1]
    products = (q.shape[:-1].numel() + k.shape[:-1].numel()) * features
    flops = 2 * products * (v.shape[-1] + (call.norm == "sum"))
    moved = q.numel() + k.numel() + v.numel() + q.shape[:-1].numel() * v.shape[-1]
    return Weighing("linear", q.shape[0], q.shape[-2], *grids, weights, q.device, flops=flops, bytes=moved * q.element_size())
