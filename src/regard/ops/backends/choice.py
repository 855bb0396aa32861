"""Which backend runs a call: a pure function of the call and the device, the same on every rank of alike machines."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ...checks import check_choice, shown
from ..calls.call import Call
from ..patterns import leaves, tensors_of
from ..tiles import calls as tile_calls
from . import dense, flex, natten, reference, tiled
from .native import backend as native
from .triton import backend as triton

BACKENDS: dict[str, ModuleType] = {
    "reference": reference,
    "dense": dense,
    "tiled": tiled,
    "native": native,
    "triton": triton,
    "flex": flex,
    "natten": natten,
}


@dataclass(frozen=True)
class Choice:
    """The backend that was chosen and why."""

    backend: str
    reason: str


def choose(call: Call, backend: str = "auto") -> Choice:
    """Choose the backend of a call.

    Raises:
        ValueError: an unknown backend, or a named one that cannot run this call.
    """
    if backend != "auto":
        check_choice("backend", backend, ("auto", *BACKENDS))
        if (why := BACKENDS[backend].supports(call)) is not None:
            raise ValueError(f"backend {backend!r} cannot run this call: {why}")
        return Choice(backend, "asked for")
    if call.device.type == "cuda" and natten.supports(call) is None:
        return Choice("natten", "fused neighborhood kernel")
    if native.supports(call) is None and native.prefers(call):
        return Choice("native", "compiled for this CPU")
    if tile_calls.supports(call) is None:
        if tiled.prefers(call):
            return Choice("tiled", "computes far fewer pairs than dense attention")
        if call.need_lse:
            return Choice("tiled", "returns lse without storing the weights")
        return Choice("dense", "most keys are visible")
    return Choice("dense", "the general case")


def others(call: Call, chosen: str) -> dict[str, str]:
    """Why each of the other backends was not chosen."""
    reasons = {
        "reference": "the definition, for tests",
        "dense": "computes all pairs",
        "tiled": "the same tiles on torch's operators" if chosen == "native" else "no gain: most keys are visible",
        "native": "no gain: too little to do",
        "triton": "not measured on a GPU yet; runs where asked for",
        "flex": "compiles for seconds; runs where asked for",
        "natten": "on CPU it computes all pairs",
    }
    return {name: module.supports(call) or reasons[name] for name, module in BACKENDS.items() if name != chosen}


def run(call: Call, backend: str = "auto") -> tuple[Tensor, Tensor | None]:
    """Compute a call: the output ``(batch, *q_grid, heads, value_dim)`` and, if asked for, the lse."""
    chosen = BACKENDS[choose(call, backend).backend]
    for member in () if call.pattern.static else leaves(call.pattern):
        for tensor in tensors_of(member):
            if tensor.device != call.q.device:
                raise ValueError(f"{member!r} must be on {call.q.device}, where the queries are; got {shown(tensor)}")
    return _nothing(call) if call.batch == 0 else chosen.run(call)


def _nothing(call: Call) -> tuple[Tensor, Tensor | None]:
    """The result of a batch of none, which depends on all that it would be made of; no backend need know of it."""
    table = None if call.table is None else call.table.table
    tensors = [t for t in (call.q, call.k, call.v, call.bias, table) if t is not None]
    link = sum(t.flatten()[:0].sum() for t in tensors)
    out = call.q.new_zeros(*call.q.shape[:-1], call.v.shape[-1]) + link
    kind = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    return out.to(call.q.dtype), out.sum(-1).to(kind) if call.need_lse else None
