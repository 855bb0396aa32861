"""Linear layers that take the fast form of the affine map where there is one."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..ops.affine import affine


class Linear(nn.Linear):
    """``x W^T + b``: :class:`torch.nn.Linear`, through :func:`regard.ops.affine.affine`."""

    def forward(self, x: Tensor) -> Tensor:
        return affine(x, self.weight, self.bias)


def bare(module: nn.Module) -> bool:
    """Whether a module is a :class:`Linear` that nobody listens to or has wrapped, so that its weights may be used directly."""
    listened = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module) is Linear and not listened and not _has_any_global_hook()
