"""Attention that a module computes by torch's functions, seen while it runs.

    scaled_dot_product_attention(q, k, v, ...)            before it is computed
    softmax(q k^T ...) and the product with v after it    once the weights are there

The modules of timm, and the attention of diffusers whatever its processor, are seen so: no processor is replaced, so that none
loses an argument.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .call import Attachment, HostCall, asked, bias_of, swapped
from .replacing import Forward

_SOFTMAX = (torch.softmax, Tensor.softmax, F.softmax)
_PRODUCT = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)


class Listening(TorchFunctionMode):
    """Shows the attention of one running module to the functions that are attached to it.

    Args:
        module: that runs.
        host: what the call says of it.
        attachments: the functions.
    """

    def __init__(self, module: nn.Module, host: str, attachments: list[Attachment]) -> None:
        super().__init__()
        self.module, self.host, self.attachments = module, host, attachments
        self.seen = 0
        self._weights: Tensor | None = None
        self._k: Tensor | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._fused(func, *args, **kwargs)
        if func in _PRODUCT and self._weights is not None and args[0].shape == self._weights.shape:
            return self._weighed(func, *args, **kwargs)
        output = func(*args, **kwargs)
        if func in _SOFTMAX and output.ndim in (3, 4):
            self._weights = output
        elif func in _PRODUCT and output.ndim == args[1].ndim and output.ndim in (3, 4):
            self._k = args[1].mT  # of the last product before a softmax
        return output

    def _fused(self, func, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        def usual() -> Tensor:
            options = {"scale": scale, "enable_gqa": enable_gqa}
            return func(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, **options)

        if query.ndim != 4:
            return usual()
        bias = bias_of(attn_mask, query, key, is_causal)
        scale_of = query.shape[-1] ** -0.5 if scale is None else float(scale)
        call, edited = asked(self.attachments, self._call(query, key, value, bias, scale_of))
        output = call.computed(dropout_p) if edited else usual()
        return self._done(call, output, output)

    def _weighed(self, func, left, right, **kwargs):
        weights, self._weights = self._weights, None
        assert weights is not None  # it was asked for
        flat = weights.ndim == 3  # heads are in the batch
        heads = int(getattr(self.module, "heads", getattr(self.module, "num_heads", 1)))
        if flat and len(weights) % heads:
            return func(left, right, **kwargs)

        def apart(tensor: Tensor | None) -> Tensor | None:
            return tensor.unflatten(0, (-1, heads)) if flat and tensor is not None else tensor

        w, v, k = apart(weights), apart(right), apart(self._k)
        assert w is not None
        assert v is not None
        if v.ndim != 4 or v.shape[:3] != (*w.shape[:2], w.shape[3]):
            return func(left, right, **kwargs)
        if k is not None and k.shape[:3] != v.shape[:3]:
            k = None
        call, edited = asked(self.attachments, replace(self._call(None, k, v, None, 1.0), weights=w))
        if not edited:
            output = func(left, right, **kwargs)
            return self._done(call, output, apart(output))
        if call.weights is w and call.output is None:  # dropped weights stay dropped
            output = apart(left) @ call.v  # type: ignore[operator]  # it is there
        else:
            output = call.computed()
        return self._done(call, output.flatten(0, 1) if flat else output, output)

    def _call(self, q: Tensor | None, k: Tensor | None, v: Tensor, bias: Tensor | None, scale: float) -> HostCall:
        self.seen += 1
        return HostCall(self.module, "", self.host, q, k, v, bias, scale)

    def _done(self, call: HostCall, output: Tensor, apart: Any) -> Tensor:
        for after in call.after:
            after(output if output is apart else apart, swapped)
        return output


def listening(module: nn.Module, host: str, strict: bool):
    """What a module's ``forward`` is wrapped in.

    Args:
        module: an attention module.
        host: what its calls say.
        strict: whether to refuse a run in which no attention was seen.
    """

    def wrap(forward: Forward, attachments: list[Attachment]) -> Forward:
        def run(*args, **kwargs):
            with Listening(module, host, attachments) as mode:
                output = forward(*args, **kwargs)
            if strict and not mode.seen:
                raise ValueError(
                    f"{attachments[0].names[module]!r} ({type(module).__name__}) attended in a way that cannot be seen: "
                    "neither scaled_dot_product_attention nor a softmax and a product; for diffusers choose the "
                    "backend 'native'"
                )
            return output

        return run

    return wrap
