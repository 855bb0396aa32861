"""Which transforms of torch are at work, and gradients that are differentiated again.

The fused operators of regard have one formula each, for plain gradients. Forward-mode derivatives and the gradients of
``torch.func`` take the definition in their place, and so does a gradient that is itself differentiated: the definition is made
of torch's own operators, which know all of this. ``torch.vmap`` alone needs nothing: torch runs an operator once for each item.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .tracing import constant_in_graphs

PLAIN_ONLY = "no forward-mode derivatives and no gradients by torch.func; backend='auto' has them"


_KINDS: Any = torch._C._functorch.TransformType


def active() -> bool:
    """Whether any transform of ``torch.func`` is at work, ``vmap`` too: values of tensors can then not be looked at."""
    return torch._C._are_functorch_transforms_active()


def differentiated(*tensors: Tensor | None) -> bool:
    """Whether the gradients or forward-mode derivatives of ``torch.func`` are being taken, or a tensor carries a tangent."""
    if _in_gradient():
        return True
    if forward_ad._current_level < 0 or torch.compiler.is_compiling():
        return False
    if _in_vmap():  # torch cannot look for tangents there
        return True
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


@constant_in_graphs
def _in_gradient() -> bool:
    return active() and any(level.key() in (_KINDS.Grad, _KINDS.Jvp) for level in _levels())


def _in_vmap() -> bool:
    return active() and any(level.key() == _KINDS.Vmap for level in _levels())


def _levels():
    return torch._C._functorch.get_interpreter_stack() or ()


def readable(tensor: Tensor) -> bool:
    """Whether the values of a tensor can be looked at, and at once: a plain one on a CPU, neither traced nor batched."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or tensor.device.type != "cpu":
        return False
    return type(tensor) in (Tensor, nn.Parameter) and not _in_vmap()


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite; a sum that overflows float32 counts as one that is not."""
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return math.isfinite(float(tensor.detach().sum(dtype=wide)))


def gradients(
    definition: Callable[..., Sequence[Tensor | None]],
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of a function, as a function of its arguments and of the gradients that come in: differentiable.

    Args:
        definition: from the tensors to the outputs.
        tensors: the arguments.
        needed: which of them want a gradient.
        grads: of the outputs, None where there is none.

    Returns:
        One entry for each argument, None where it is not needed or nothing depends on it.
    """
    with torch.enable_grad():
        # aliases, so that an argument that is made of another one does not take its part as well
        own = [t.view_as(t) if t is not None and need else t for t, need in zip(tensors, needed, strict=True)]
        outs = definition(*own)
        ends = [(o, g) for o, g in zip(outs, grads, strict=True) if o is not None and g is not None and o.requires_grad]
        wanted = [t for t, need in zip(own, needed, strict=True) if t is not None and need]
        found = iter(
            torch.autograd.grad([o for o, _ in ends], wanted, [g for _, g in ends], create_graph=True, allow_unused=True)
            if ends
            else [None] * len(wanted)
        )
    return [next(found) if t is not None and need else None for t, need in zip(own, needed, strict=True)]


def fixed() -> bool:
    """Whether gradients stay as they are recorded: in graphs under trace, and under the transforms of ``torch.func``."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or active()


def again(out: Tensor, definition: Callable[..., Sequence[Tensor | None]], *tensors: Tensor | None) -> Tensor:
    """The output of an operator whose gradient cannot be differentiated, made to be differentiable any number of times.

    A plain gradient takes the operator's own way. One that is to be differentiated goes round it, through the definition.

    Args:
        out: what the operator gave.
        definition: from the tensors to ``(out,)``, in operators that can be differentiated twice; it must not hold the tensors,
            which are freed when the gradient has been taken.
        tensors: what the operator was given.
    """
    return _Again.apply(definition, out, *tensors)  # type: ignore[no-any-return]


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx, definition, out: Tensor, *tensors: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.definition = definition
        ctx.save_for_backward(*tensors)
        return out.detach()

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        if not torch.is_grad_enabled():
            return None, grad, *[None] * len(ctx.saved_tensors)
        return None, None, *gradients(ctx.definition, ctx.saved_tensors, ctx.needs_input_grad[2:], (grad,))
