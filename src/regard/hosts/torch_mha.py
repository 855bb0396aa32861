"""torch's own attention: :class:`torch.nn.MultiheadAttention`, and the encoder layers that run it as one fused operator.

Neither shows its queries, so the projections are computed a second time for those who listen. Where nothing is changed the
module runs as ever.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .call import Attachment, HostCall, asked
from .replacing import Forward


@dataclass
class _Answer:
    """What a layer was answered for its attention module, and whether that came to run."""

    call: HostCall
    edited: bool
    ran: bool = False


@dataclass
class _Answers(threading.local):
    given: dict[nn.Module, _Answer] = field(default_factory=dict)


_ANSWERS = _Answers()


def multi_head(module: nn.MultiheadAttention):
    """What the ``forward`` of an attention module is wrapped in."""

    def wrap(forward: Forward, attachments: list[Attachment]) -> Forward:
        def run(query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None, **options):
            masks = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
            if options.get("is_causal") and attn_mask is None:  # a hint without a mask: torch says what is wrong
                return forward(query, key, value, need_weights=need_weights, **masks, **options)
            answer = _ANSWERS.given.get(module)
            if answer is None:
                answer = _Answer(*asked(attachments, _call(module, query, key, value, key_padding_mask, attn_mask)))
            answer.ran = True
            if answer.edited:
                output = _computed(module, answer.call, query.ndim, need_weights, **options)
            else:
                output = forward(query, key, value, need_weights=need_weights, **masks, **options)
            _done(module, answer.call, output[0], query.ndim)
            return output

        return run

    return wrap


def encoder_layer(layer: nn.TransformerEncoderLayer):
    """What the ``forward`` of an encoder layer is wrapped in: where it runs as one operator, its attention is not called."""

    def wrap(forward: Forward, attachments: list[Attachment]) -> Forward:
        def run(src, src_mask=None, src_key_padding_mask=None, is_causal=False):
            module = layer.self_attn
            x = layer.norm1(src) if layer.norm_first and not src.is_nested else src
            answer = _Answer(*asked(attachments, _call(module, x, x, x, src_key_padding_mask, src_mask)))
            _ANSWERS.given[module] = answer
            apart = module.register_forward_hook(lambda *_: None) if answer.edited else None  # no layer with hooks is fused
            try:
                output = forward(src, src_mask=src_mask, src_key_padding_mask=src_key_padding_mask, is_causal=is_causal)
            finally:
                del _ANSWERS.given[module]
                if apart is not None:
                    apart.remove()
            if not answer.ran:
                _done(module, answer.call, output, src.ndim)
            return output

        return run

    return wrap


def _call(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, padding, attn_mask) -> HostCall:
    if query.is_nested:
        raise ValueError("nested tensors have no map: make the encoder with enable_nested_tensor=False")
    tensors = [t if t.ndim == 3 else t.unsqueeze(0 if module.batch_first else 1) for t in (query, key, value)]
    if not module.batch_first:
        tensors = [t.transpose(0, 1) for t in tensors]
    q, k, v = _projected(module, *tensors)
    return HostCall(module, "", "torch", q, k, v, _bias(module, q, attn_mask, padding, k.shape[2]), q.shape[-1] ** -0.5)


def _projected(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``(batch, heads, tokens, head_dim)`` of ``(batch, tokens, dim)``."""
    if module.in_proj_weight is not None:
        weights = module.in_proj_weight.chunk(3)
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    q, k, v = (F.linear(t, w, b) for t, w, b in zip((query, key, value), weights, biases, strict=True))
    if module.bias_k is not None and module.bias_v is not None:
        k, v = (torch.cat([t, b.expand(len(t), -1, -1)], 1) for t, b in ((k, module.bias_k), (v, module.bias_v)))
    if module.add_zero_attn:
        k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
    q, k, v = (t.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    return q, k, v


def _bias(module, q: Tensor, attn_mask: Tensor | None, padding: Tensor | None, keys: int) -> Tensor | None:
    """The masks as one bias: here True hides a key, and keys that the module adds are seen by all."""

    def added(mask: Tensor) -> Tensor:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -torch.inf)
        return F.pad(mask.to(q.dtype), (0, keys - mask.shape[-1]))

    total = None
    if attn_mask is not None:
        total = added(attn_mask)
        total = total.unflatten(0, (-1, module.num_heads)) if total.ndim == 3 else total[None, None]
    if padding is not None:
        hidden = added(padding if padding.ndim == 2 else padding[None])[:, None, None]
        total = hidden if total is None else total + hidden
    return total


def _computed(
    module: nn.MultiheadAttention, call: HostCall, rank: int, need_weights: bool, average_attn_weights: bool = True, **_
) -> tuple[Tensor, Tensor | None]:
    """What the module returns for a call that was changed."""
    weights = None
    if need_weights and call.output is None:
        assert call.q is not None  # nothing of this host computes weights itself
        assert call.k is not None
        scores = call.q @ call.k.mT * call.scale
        weights = torch.softmax(scores if call.bias is None else scores + call.bias, -1)
        weights = weights.mean(1) if average_attn_weights else weights
    y = call.computed(module.dropout if module.training else 0.0)
    y = module.out_proj(y.transpose(1, 2).flatten(2))
    y = y if module.batch_first else y.transpose(0, 1)
    if rank == 2:
        y = y.squeeze(0 if module.batch_first else 1)
        weights = None if weights is None else weights.squeeze(0)
    return y, weights


def _done(module: nn.MultiheadAttention, call: HostCall, output: Tensor, rank: int) -> None:
    weight, heads, batch_first = module.out_proj.weight.detach(), module.num_heads, module.batch_first

    def to_tokens(gradient: Tensor) -> Tensor:  # of the module's output: back through the projection
        gradient = gradient if rank == 3 else gradient.unsqueeze(0 if batch_first else 1)
        gradient = gradient if batch_first else gradient.transpose(0, 1)
        return (gradient @ weight).unflatten(-1, (heads, -1))

    for after in call.after:
        after(output, to_tokens)
