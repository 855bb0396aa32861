"""Which backend runs a call: a pure function of the call and the device, the same on every rank of alike machines."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import shown
from ..calls.call import Call
from ..patterns import leaves, tensors_of
from .base import Backend, choose
from .dense import DenseBackend
from .flex import FlexBackend
from .native.backend import NativeBackend
from .natten import NattenBackend
from .reference import ReferenceBackend
from .tiled import TiledBackend
from .triton.backend import TritonBackend

KINDS = (ReferenceBackend, DenseBackend, TiledBackend, NativeBackend, TritonBackend, FlexBackend, NattenBackend)
"""In the order in which they are listed; of those that would take the same time the last is chosen."""

BACKENDS: dict[str, Backend[Call]] = {kind.name: kind() for kind in KINDS}


def run(call: Call, backend: str = "auto") -> tuple[Tensor, Tensor | None]:
    """Compute a call: the output ``(batch, *q_grid, heads, value_dim)`` and, if asked for, the lse."""
    chosen = choose(BACKENDS, call, backend)
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
