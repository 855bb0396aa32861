"""Neighborhood attention by NATTEN's kernels, where that library is installed.

On CUDA its fused kernels, forward and backward; on CPU its FlexAttention path, forward only, which computes all pairs: an
independent implementation to compare with, not a fast one.

Source: Hassani et al., arXiv:2403.04690, arXiv:2504.16922.
"""

from __future__ import annotations

import importlib.util
import math
import sys

import torch
from torch import Tensor

from .. import transforms
from ..calls import definition, fused
from ..calls.call import Call
from . import costs
from .base import Backend, Cost, cost_of

INSTALLED = importlib.util.find_spec("natten") is not None
PACKED = (torch.float32, torch.float16, torch.bfloat16)


class NattenBackend(Backend[Call]):
    """NATTEN's kernels."""

    name = "natten"
    passed_over = "on CPU it computes all pairs"

    def available(self) -> str | None:
        return None if INSTALLED else "natten is not installed"

    def supports(self, call: Call) -> str | None:
        return _problem(call)

    def automatic(self, call: Call) -> bool:
        return call.device.type == "cuda"

    def time(self, call: Call) -> float:
        return costs.FUSED * call.queries * math.prod(_per_axis(call)[0])

    def cost(self, call: Call) -> Cost:
        return cost_of(call, call.queries * call.keys)

    def run(self, call: Call) -> tuple[Tensor, Tensor | None]:
        return _run(call)

    def reason(self, call: Call) -> str:
        return "fused neighborhood kernel"


def _problem(call: Call) -> str | None:
    pattern = call.pattern.as_neighborhood()
    if pattern is None or pattern.border != "shift":
        return f"only Neighborhood with border='shift'; got {call.pattern!r}"
    if not INSTALLED:
        return "natten is not installed"
    if getattr(sys.modules.get("natten"), "computed_by", None) == "regard":
        return "natten is regard itself, see regard.compat.natten"
    if torch.compiler.is_compiling():
        return "not inside a compiled graph"
    if call.is_differentiated:
        return transforms.PLAIN_ONLY
    if transforms.active():
        return "not under torch.vmap"
    if call.bias is not None or call.table is not None:
        return "no bias"
    if call.valid is not None or call.dropout:
        return "no valid mask and no dropout"
    if call.rank > 3 or call.q_grid != call.k_grid:
        return f"only equal grids with 1 to 3 axes; got queries {call.q_grid}, keys {call.k_grid}"
    for length, kernel, dilation in zip(call.k_grid, *_per_axis(call)[:2], strict=True):
        if kernel < 2 or kernel * dilation > length:
            return f"each axis needs kernel_size >= 2 and kernel_size * dilation <= length; got {pattern!r} on {call.k_grid}"
    if call.scale == 0:
        return "scale must not be 0"
    if call.need_lse and call.needs_grad:
        return "its lse carries no gradient"
    return _device_problem(call)


def _device_problem(call: Call) -> str | None:
    head_dim, value_dim = call.q.shape[-1], call.v.shape[-1]
    if call.q.dtype not in PACKED:
        return f"only float32, float16 and bfloat16; got {call.q.dtype}"
    if call.device.type == "cuda":
        from natten import HAS_LIBNATTEN

        if not HAS_LIBNATTEN:
            return "natten was installed without its CUDA kernels (libnatten)"
        if head_dim % 8 or value_dim % 8:
            return f"head and value dims must be multiples of 8; got {head_dim} and {value_dim}"
        return None
    if call.device.type != "cpu":
        return f"only CUDA and CPU; got {call.device.type}"
    if call.needs_grad:
        return "no backward on CPU"
    if head_dim != value_dim or head_dim < 8 or head_dim > 512 or head_dim & (head_dim - 1):
        return f"on CPU head_dim = value_dim must be a power of two in 8..512; got {head_dim} and {value_dim}"
    kernels, _, _, causal = _per_axis(call)
    if call.rank == 1 and causal[0] and kernels[0] == call.k_grid[0]:
        return "no causal attention over the whole axis on CPU"
    return None


def _run(call: Call) -> tuple[Tensor, Tensor | None]:
    call, careful = definition.guarded(call)
    if careful:
        return definition.run_pairs(call)
    from natten import na1d, na2d, na3d

    tensors = (call.q, call.k, call.v) if call.needs_grad else (call.q.detach(), call.k.detach(), call.v.detach())
    kernel_size, dilation, stride, causal = _per_axis(call)
    out, lse = (na1d, na2d, na3d)[call.rank - 1](
        *tensors, kernel_size, stride=stride, dilation=dilation, is_causal=causal, scale=call.scale, return_lse=True
    )
    return fused.differentiable(call, out), lse.float() if call.need_lse else None


def _per_axis(call: Call) -> tuple[tuple, tuple, tuple, tuple]:
    """Kernel sizes, dilations, strides and causality, one entry per axis."""
    pattern = call.pattern.as_neighborhood()
    assert pattern is not None  # it was checked
    values = (pattern.kernel_size, pattern.dilation, pattern.stride, pattern.causal)
    return tuple(v if isinstance(v, tuple) else (v,) * call.rank for v in values)  # type: ignore[return-value]
