"""Linear layers in the fast form of the affine map, where there is one.

The layers are :class:`torch.nn.Linear` itself, which adapters, quantisation and pruning know. What uses one calls
:func:`linear`, or :func:`linear_part` for some of its outputs, and never reads its weights: a layer that somebody wrapped,
replaced or listens to is called like any module.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..checks import check_fit
from ..ops.affine import affine, fast_affine, is_fast


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``; ``ValueError`` where a plain layer and ``x`` differ in dtype."""
    if is_plain(layer):
        if is_fast(x, layer.weight, layer.bias):  # type: ignore[arg-type]  # a plain layer has tensors
            return fast_affine(x, layer.weight, layer.bias)  # type: ignore[arg-type]
        check_fit(x, layer.weight)  # type: ignore[arg-type]
    return layer(x)


def linear_part(layer: nn.Module, x: Tensor, first: int, last: int) -> Tensor:
    """``layer(x)[..., first:last]``; of a plain layer the other outputs are not computed."""
    if not is_plain(layer):
        return layer(x)[..., first:last]
    bias = None if layer.bias is None else layer.bias[first:last]  # type: ignore[index]
    return affine(x, layer.weight[first:last], bias)  # type: ignore[index]


def project_qkv(layer: nn.Module, x: Tensor, context: Tensor, widths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of ``x``, keys and values of ``context``, from one layer with as many outputs as the three ``widths`` together.

    Of an ``x`` that is the ``context`` all three come from one product.
    """
    if context is x:
        q, k, v = linear(layer, x).split(tuple(widths), -1)
        return q, k, v
    q = linear_part(layer, x, 0, widths[0])
    k, v = linear_part(layer, context, widths[0], sum(widths)).split(tuple(widths[1:]), -1)
    return q, k, v


class Chain(nn.Sequential):
    """:class:`torch.nn.Sequential` whose linear layers take the fast form."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = linear(layer, x)
        return x


def taken_by(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a module wants its input, and in which type: like its parameters, of which a quantised one has none."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.float32


def is_plain(module: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether a module is of exactly this kind, and nobody listens to it or has changed what it does.

    Its weights may then be used directly.
    """
    return type(module) is kind and is_unheard(module)


def is_unheard(module: nn.Module) -> bool:
    """Whether no hook hears of a call of the module, and it has no ``forward`` of its own in place of its class's."""
    heard = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not heard and "forward" not in module.__dict__ and not _has_any_global_hook()
