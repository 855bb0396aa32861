"""The affine map of tokens, ``act(x W^T + b)``, and its fast form on CPUs.

torch multiplies float32 matrices with MKL, which keeps to 256-bit vectors on processors that are not Intel's; oneDNN, which
torch also carries, uses the 512 bits they have, adds the bias and applies GELU while the result is in registers. On a Zen 5
core that is 200 GFLOP/s against 100. Elsewhere, for other types, and under compile, export, autocast or function transforms,
this is ``torch.nn.functional.linear``.

Cost: 2 rows in out FLOPs; the backward the double of it.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..caches import cached
from ..checks import check_fit, shown
from ..counted import register_flop_formula

_ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
FEWEST_ROWS = 16
"""Below this many rows the packing of the weights is not worth it."""


def affine(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """``x W^T + b``, or its exact GELU.

    Args:
        x: ``(..., in)``.
        weight: ``(out, in)``.
        bias: ``(out)``.
        gelu: whether to apply GELU.

    Returns:
        ``(..., out)``, differentiable any number of times.

    Raises:
        ValueError: another dtype or device than that of the weight, or another width, with nothing to cast for it.
    """
    if is_fast(x, weight, bias):
        return fast_affine(x, weight, bias, gelu=gelu)
    if x.dtype != weight.dtype or x.device != weight.device or x.shape[-1] != weight.shape[-1]:
        check_fit(x, weight)
        if x.shape[-1] != weight.shape[-1]:
            raise ValueError(f"tokens must have {weight.shape[-1]} channels; got {shown(x)}")
    y = F.linear(x, weight, bias)
    return F.gelu(y) if gelu else y


def fast_affine(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """:func:`affine` of tensors that are :func:`is_fast`."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
        y = _Affine.apply(x, weight, bias)
        return F.gelu(y) if gelu else y
    return _ONEDNN(x, weight, bias, "gelu" if gelu else "none", [], "none" if gelu else "")


def fast_here() -> bool:
    """Whether this machine and this build of torch have the fast form."""
    return _ONEDNN is not None and torch.backends.mkldnn.is_available() and _wide_but_not_intel()


def is_fast(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the fast form knows these tensors, here and now."""
    return (
        not torch.compiler.is_compiling()
        and x.dtype == weight.dtype == torch.float32
        and (bias is None or (bias.dtype == torch.float32 and type(bias) in _PLAIN))
        and x.device.type == weight.device.type == "cpu"
        and type(x) in _PLAIN
        and type(weight) in _PLAIN  # not quantised, distributed or fake
        and x.numel() >= FEWEST_ROWS * x.shape[-1]
        and x.shape[-1] == weight.shape[-1]
        and fast_here()
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


_PLAIN = (Tensor, nn.Parameter)


@cached(1)
def _wide_but_not_intel() -> bool:
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    info = Path("/proc/cpuinfo")
    names = info.read_text() if info.exists() else platform.processor()
    return "GenuineIntel" not in names


class _Affine(torch.autograd.Function):
    """The fast form with its gradient. Not a custom operator: it is called only in eager mode, dozens of times a model."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _ONEDNN(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            affine(grad, weight.t()) if need_x else None,
            _outer(rows, x.reshape(-1, x.shape[-1])) if need_weight else None,
            rows.sum(0) if need_bias else None,
        )


def _outer(grad: Tensor, x: Tensor) -> Tensor:
    """``grad^T x``, with the narrower one as the rows: the wider one is then packed in long runs."""
    if grad.shape[1] <= x.shape[1]:
        return affine(grad.t(), x.t())
    return affine(x.t(), grad.t()).t()


if _ONEDNN is not None:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x, weight, bias, attr, scalars, algorithm, *, out_shape=None, **_) -> int:
        rows = 1
        for n in x[:-1]:
            rows *= n
        return 2 * rows * weight[0] * weight[1]
