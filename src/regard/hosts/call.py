"""One attention of a host, and what the functions that are attached to it answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_number, check_tensor, shown
from .windows import Windows

After = Callable[[Tensor, Callable[[Tensor], Tensor]], None]
"""Called with the output and a function that turns a gradient of it into one of ``(batch, queries, heads, value_dim)``."""
EDITED = ("q", "k", "v", "bias", "scale", "weights", "output")
"""What an answer may change."""


@dataclass(frozen=True, eq=False)
class HostCall:
    """An attention that a host is about to compute, ``softmax(scale q k^T + bias) v``.

    Attributes:
        module: the attention module.
        path: its name in the model that was attached to.
        host: ``"torch"``, ``"timm"``, ``"transformers"`` or ``"diffusers"``.
        q: queries ``(batch, heads, queries, head_dim)``; None where the host computes the weights itself and they are seen
            first after its softmax.
        k, v: keys and values ``(batch, kv_heads, keys, dim)``; ``kv_heads`` divides ``heads``. ``k`` may be None where
            ``q`` is.
        bias: added to the scaled logits, broadcasts to ``(batch, heads, queries, keys)``; masks and position biases are in it.
        scale: factor on the logits.
        weights: ``(batch, heads, queries, keys)``, where the host computed them itself: ``q``, ``k``, ``bias`` and ``scale``
            have had their effect then.
        windows: the grid of the running block and which of its cells each token of each window is, ``(windows, tokens)``, -1
            where it only pads; None where the host cut no windows.
        output: ``(batch, heads, queries, value_dim)``, in an answer: what the host goes on with instead of computing it.
        after: functions that are called once the output is there, see :meth:`then`.
    """

    module: nn.Module
    path: str
    host: str
    q: Tensor | None
    k: Tensor | None
    v: Tensor
    bias: Tensor | None
    scale: float
    weights: Tensor | None = None
    windows: tuple[tuple[int, ...], Tensor] | None = None
    output: Tensor | None = None
    after: tuple[After, ...] = ()

    @property
    def queries(self) -> int:
        """The number of queries."""
        seen = self.q if self.weights is None else self.weights
        assert seen is not None  # one of them is known
        return seen.shape[2]

    @property
    def keys(self) -> int:
        """The number of keys."""
        return self.v.shape[2]

    def then(self, after: After) -> HostCall:
        """The same call, with a function that is called once its output is there.

        Args:
            after: takes the output of the attention, or of its module where the host computes both at once, and a function from
                a gradient of that to one of ``(batch, queries, heads, value_dim)``.
        """
        return replace(self, after=(*self.after, after))

    def computed(self, dropout: float = 0.0) -> Tensor:
        """The output ``(batch, heads, queries, value_dim)``, by torch's fused attention."""
        if self.output is not None:
            return self.output
        if self.weights is not None:
            return self.weights @ self.v
        assert self.q is not None  # it is known where the weights are not
        assert self.k is not None
        bias = None if self.bias is None else self.bias.to(self.q.dtype)
        grouped = self.q.shape[1] != self.k.shape[1]
        return F.scaled_dot_product_attention(
            self.q, self.k, self.v, attn_mask=bias, dropout_p=dropout, scale=self.scale, enable_gqa=grouped
        )


AtAttention = Callable[[HostCall], HostCall | None]


@dataclass(frozen=True, eq=False)
class Attachment:
    """A function that is attached to a model.

    Attributes:
        at_attention: the function.
        names: the names of the model's modules.
        windows: the window layouts of the blocks that are running.
    """

    at_attention: AtAttention
    names: dict[nn.Module, str]
    windows: Windows


def asked(attachments: Iterable[Attachment], call: HostCall) -> tuple[HostCall, bool]:
    """The call as the attached functions leave it, one after another, and whether any of them changed it.

    Raises:
        TypeError: an answer that is neither None nor a call.
        ValueError: a change that comes too late, or has another shape.
    """
    first = call
    batch = call.v.shape[0]
    for each in attachments:
        call = replace(call, path=each.names[call.module], windows=each.windows.of(batch, call.queries, call.keys))
        answer = each.at_attention(call)
        if answer is None:
            continue
        if not isinstance(answer, HostCall):
            raise TypeError(f"at_attention must return None or a HostCall; got {shown(answer)}")
        _check(call, answer)
        call = answer
    return call, any(getattr(call, name) is not getattr(first, name) for name in EDITED)


def _check(call: HostCall, answer: HostCall) -> None:
    if call.weights is not None:
        late = [name for name in ("q", "k", "bias", "scale") if getattr(call, name) is not getattr(answer, name)]
        if late:
            raise ValueError(f"{call.path!r} computes its weights itself: change weights, v or output, not {', '.join(late)}")
    batch, heads = (call.q if call.weights is None else call.weights).shape[:2]  # type: ignore[union-attr]  # one is known
    shapes = {
        "q": (batch, heads, call.queries, -1),
        "k": (batch, -1, answer.keys, -1),
        "v": (batch, -1, -1, call.v.shape[-1]),
        "weights": (batch, heads, call.queries, answer.keys),
        "output": (batch, heads, call.queries, call.v.shape[-1]),
    }
    for name, shape in shapes.items():
        tensor = getattr(answer, name)
        if tensor is None and getattr(call, name) is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} of an answer must be a tensor; got {shown(tensor)}")
        if tensor.ndim != 4 or any(n not in (-1, m) for n, m in zip(shape, tensor.shape, strict=True)):
            raise ValueError(f"{name} of an answer for {call.path!r} must be {shape} (-1: any); got {shown(tensor)}")
        if tensor is not getattr(call, name):
            check_tensor(f"{name} of an answer for {call.path!r}", tensor, (call.v.dtype,), device=call.v.device)
    if answer.k is not None and answer.q is not None:
        _check_pair(call.path, answer.q, answer.k, answer.v)
    if answer.scale is not call.scale:
        check_number(f"scale of an answer for {call.path!r}", answer.scale)
    if answer.bias is not None:
        check_tensor(f"bias of an answer for {call.path!r}", answer.bias, device=call.v.device)
        full = (batch, heads, call.queries, answer.keys)
        try:
            fits = torch.broadcast_shapes(answer.bias.shape, full) == full
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(f"bias of an answer for {call.path!r} must broadcast to {full}; got {shown(answer.bias)}")


def _check_pair(path: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.shape[-1] != k.shape[-1] or k.shape[1] != v.shape[1] or not k.shape[1] or q.shape[1] % k.shape[1]:
        told = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(
            f"q and k of an answer for {path!r} need one head_dim, k and v heads that divide those of q; got {told}"
        )


def bias_of(mask: Tensor | None, q: Tensor, k: Tensor, is_causal: bool = False) -> Tensor | None:
    """A mask as ``scaled_dot_product_attention`` takes it (True is visible, numbers are added) as a bias."""
    bias = mask
    if mask is not None and mask.dtype == torch.bool:
        bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    if is_causal:
        later = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
        causal = torch.zeros_like(later, dtype=q.dtype).masked_fill(later, -torch.inf)
        bias = causal if bias is None else bias + causal
    return bias


def swapped(gradient: Tensor) -> Tensor:
    """A gradient ``(batch, heads, queries, dim)`` as ``(batch, queries, heads, dim)``."""
    return gradient.transpose(1, 2)


def unchanged(gradient: Tensor) -> Tensor:
    """A gradient that is ``(batch, queries, heads, dim)`` already."""
    return gradient
