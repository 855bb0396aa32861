"""What is asked of linear attention: its arguments, checked at the door, on flat tokens; and the states it takes and leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...checks import check_choice, check_flag, check_integer, check_number, check_tensor, check_tokens, shown
from ..transforms import differentiated
from .features import FeatureMap
from .spans import ACTIVATIONS, existing, readable

NORMS = ("none", "sum", "count")
CHUNK = 64
"""Tokens of a chunk of the causal form."""


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
class LinearCall:
    """One linear attention on flat tokens.

    ``q`` and ``k`` are ``(batch, tokens, heads, dim)``: as they were given, with ``activation`` still to come, or the features
    of a feature map, with ``"none"``.
    """

    q: Tensor
    k: Tensor
    activation: str
    norm: str
    floor: float | None
    eps: float
    causal: bool
    decay: Tensor | None
    scale: float | Tensor
    valid: Tensor | None
    state: LinearState | None
    v: Tensor | None = None
    chunk: int = CHUNK
    place: torch.device | None = None

    @property
    def values(self) -> Tensor:
        """The values ``(batch, tokens, heads, value_dim)``."""
        assert self.v is not None  # only who asks for weights gives none
        return self.v

    @property
    def device(self) -> torch.device:
        """Where it would run; the tensors may be meta tensors when planning."""
        return self.q.device if self.place is None else self.place

    @property
    def is_differentiated(self) -> bool:
        """Whether derivatives are being taken that kernels do not have. Features have been taken already."""
        scale = self.scale if isinstance(self.scale, Tensor) else None
        return differentiated(self.q, self.k, self.v, self.decay, scale, *(self.state or ()))

    @property
    def operand_bytes(self) -> int:
        """Bytes of q, k, v and the output."""
        numbers = self.q.numel() + self.k.numel() + self.values.numel() + self.q.shape[:-1].numel() * self.values.shape[-1]
        return numbers * self.q.element_size()

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.q.dtype, torch.float32)

    def features(self) -> tuple[Tensor, Tensor]:
        """Features of queries, and of keys, which are 0 for missing ones."""
        value = ACTIVATIONS[self.activation][0]
        return value(self.q), existing(value(existing(self.k, self.valid)), self.valid)

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


def pose(
    q: Tensor, k: Tensor, v: Tensor | None, feature: str | FeatureMap, norm: str, floor: float | None, eps: float, causal: bool,
    log_decay: Tensor | None, scale: float | Tensor, valid: Tensor | None, state: LinearState | None, start: int,
    return_state: bool = False, chunk: int = CHUNK,
) -> LinearCall:  # fmt: skip
    """Check everything, apply a feature map, and flatten the grids.

    Raises:
        TypeError: another kind of thing than an argument may be.
        ValueError: shapes, devices or values that do not go together.
    """
    check_choice("norm", norm, NORMS)
    check_flag("causal", causal)
    check_flag("return_state", return_state)
    check_integer("start", start)
    _check_shapes(q, k, v, causal, log_decay is not None)
    most = torch.finfo(torch.promote_types(q.dtype, torch.float32)).max
    floor = None if floor is None else check_number("floor", floor, -most, most)
    eps = check_number("eps", eps, -most, most)
    heads = q.shape[-2]
    if valid is not None:
        check_tensor("valid", valid, (torch.bool,), device=q.device, what=f"{tuple(k.shape[:-2])}")
        if valid.shape != k.shape[:-2]:
            raise ValueError(f"valid must be {tuple(k.shape[:-2])}, (batch, *k_grid); got {shown(valid)}")
        valid = valid.flatten(1)
    if not isinstance(scale, Tensor):
        scale = check_number("scale", scale, -most, most)
    elif check_tensor("scale", scale, device=q.device).shape not in ((), (1,), (heads,)):
        raise ValueError(f"scale must be a number or one per head, ({heads},); got {shown(scale)}")
    streams = _streams(feature)
    if state is not None or return_state:
        asked = "return_state=True" if state is None else "a state"
        if not streams:
            raise ValueError(f"features of {type(feature).__name__} depend on later tokens and leave no state; got {asked}")
        if log_decay is not None and not causal:
            raise ValueError(f"a decay in both directions leaves no state: later keys change earlier outputs; got {asked}")
    grid = tuple(q.shape[1:-2])
    q, k = q.flatten(1, -3), k.flatten(1, -3)
    activation = "none"
    if isinstance(feature, str):
        activation = feature
    else:
        q, k = _mapped(feature, q, start, False), _mapped(feature, _standing_in(k, valid), start, True)
        if q.shape[-1] != k.shape[-1]:
            name, widths = type(feature).__name__, f"{q.shape[-1]} and {k.shape[-1]}"
            raise ValueError(f"{name} must make features of one width of queries and of keys; got {widths}")
    decay = None if log_decay is None else _flat_decay(log_decay, q, grid)
    if state is not None:
        state = _checked_state(state, q, norm, None if v is None else v.shape[-1])
    check_integer("chunk", chunk, 1)
    if chunk & (chunk - 1):
        raise ValueError(f"chunk must be a power of two; got {chunk}")
    values = None if v is None else v.flatten(1, -3)
    return LinearCall(q, k, activation, norm, floor, eps, causal, decay, scale, valid, state, values, chunk)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor | None, causal: bool, decays: bool) -> None:
    alike = q.ndim >= 4 and k.ndim >= 4 and q.shape[0] == k.shape[0] and q.shape[-2:] == k.shape[-2:]
    one_grid = not (causal or decays) or q.shape == k.shape
    if not alike or not one_grid or 0 in (*q.shape[1:], *k.shape[1:]):
        raise ValueError(
            "q and k must be (batch, *grid, heads, dim), not empty but for the batch, alike but for the grid, and on one grid "
            f"under causal or a decay; got q {tuple(q.shape)}, k {tuple(k.shape)}"
        )
    check_tokens(q=q.shape[1:-2], k=k.shape[1:-2])
    if v is not None and (v.ndim != k.ndim or v.shape[:-1] != k.shape[:-1] or not v.shape[-1]):
        raise ValueError(f"v must be (batch, *k_grid, heads, value_dim) beside k {tuple(k.shape)}; got {tuple(v.shape)}")


def _streams(feature: Any) -> bool:
    """Whether features are the same whatever comes later; checks that the feature map is one."""
    allowed = f"feature must be one of {', '.join(ACTIVATIONS)}, or a feature map"
    if isinstance(feature, str):
        if feature not in ACTIVATIONS:
            raise ValueError(f"{allowed}; got {feature!r}")
        return True
    streams = getattr(feature, "streams", None)
    if isinstance(feature, type) or not callable(feature) or not isinstance(streams, bool):
        raise TypeError(f"{allowed} that says whether it streams; got {shown(feature)}")
    return streams


def _standing_in(k: Tensor, valid: Tensor | None) -> Tensor:
    """The keys, with one that exists in the place of each missing one: a map that looks at all keys sees no others."""
    if valid is None:
        return k
    known = existing(k, valid)
    first = valid.to(torch.uint8).argmax(1)[:, None, None, None].expand(-1, 1, *k.shape[2:])
    return known.where(valid[..., None, None], known.gather(1, first))


def _mapped(feature: FeatureMap, x: Tensor, start: int, keys: bool) -> Tensor:
    name = type(feature).__name__
    found = check_tensor(f"what {name} makes", feature(x, start, keys), (x.dtype,), device=x.device)
    if found.ndim != 4 or found.shape[:3] != x.shape[:3] or not found.shape[3]:
        expected = ", ".join(str(n) for n in x.shape[:3])
        raise ValueError(f"{name} must make (batch, tokens, heads, features) = ({expected}, features); got {shown(found)}")
    return found


def _flat_decay(log_decay: Tensor, q: Tensor, grid: tuple[int, ...]) -> Tensor:
    """The decays on flat tokens, of the features ``q``."""
    check_tensor("log_decay", log_decay, device=q.device)
    batch, _, heads, width = q.shape
    allowed = ((heads,), (heads, width), (batch, *grid, heads), (batch, *grid, heads, width))
    if tuple(log_decay.shape) not in allowed:
        raise ValueError(f"log_decay must be one of {', '.join(map(str, allowed))}; got {tuple(log_decay.shape)}")
    if readable(log_decay) and not bool((log_decay <= 0).all()):
        raise ValueError(f"log_decay must be 0 or less everywhere; got {float(log_decay.max())} in {shown(log_decay)}")
    return log_decay if log_decay.ndim <= 2 else log_decay.flatten(1, len(grid))


def _checked_state(state: Any, q: Tensor, norm: str, value_dim: int | None) -> LinearState:
    """A state that fits the features ``q`` of its queries and the values in every axis: nothing broadcasts."""
    if not isinstance(state, tuple) or len(state) != 3:
        raise TypeError(f"state must be a LinearState (memory, total, keys), as return_state=True gives it; got {shown(state)}")
    memory, total, keys = state
    if (norm == "sum" and total is None) or (norm == "count" and keys is None):
        raise ValueError(f"norm={norm!r} needs the state of an attention with the same norm; got {shown(state)}")
    batch, _, heads, width = q.shape
    kinds = (torch.promote_types(q.dtype, torch.float32),)
    shapes = {
        "memory": (memory, "(batch, heads, features, value_dim)", (batch, heads, width, value_dim)),
        "total": (total, "(batch, heads, features)", (batch, heads, width)),
        "keys": (keys, "(batch,)", (batch,)),
    }
    for name, (tensor, words, shape) in shapes.items():
        if tensor is None and name != "memory":
            continue
        check_tensor(f"the {name} of the state", tensor, kinds, device=q.device, what=words)
        if value_dim is None and name == "memory":  # any values: weights alone are asked for
            shape = (*shape[:3], tensor.shape[-1] if tensor.ndim == 4 else 1)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"the {name} of the state must be {words} = {shape}; got {shown(tensor)}")
    if keys is not None and readable(keys) and not bool((keys >= 0).all()):
        raise ValueError(f"the keys of the state must be 0 or more everywhere; got {float(keys.min())} in {shown(keys)}")
    return LinearState(memory, total, keys)


def check_inputs(**tensors: Any) -> None:
    """Check that queries, keys and values are floating point tensors on one device."""
    device = None
    for name, tensor in tensors.items():
        device = check_tensor(name, tensor, device=device).device
