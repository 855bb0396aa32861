"""Attention modules of transformers, through its attention interface.

While a function is attached, they ask for an attention function that shows queries, keys, values, mask and position bias, and
then calls the one they had. Only the attention modules ask for it: the model makes its masks for the function that it has, so
that these stay as they are.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

from torch import Tensor, nn

from .call import Attachment, HostCall, asked, bias_of, unchanged
from .replacing import Change, change_of

INTERFACE = "regard_hosts"
"""The name of the attention function that the modules ask for meanwhile."""
KNOWN = ("eager", "sdpa")
"""Attention functions whose mask is all that hides a key."""
UNSEEN = {"softcap": "bounds its logits", "s_aux": "has sinks"}
"""Keywords that change what is computed beyond queries, keys, values and bias, and how."""


def asks_interface(module: nn.Module) -> bool:
    """Whether a module is attention that looks its function up."""
    return (
        "Attention" in type(module).__name__
        and hasattr(getattr(module, "config", None), "_attn_implementation_internal")
        and hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS")
    )


def register() -> None:
    """Make the function known to transformers, and masks for whoever names it; it stays, as another thread may ask for it."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS[INTERFACE] = _attention
    ALL_MASK_ATTENTION_FUNCTIONS[INTERFACE] = sdpa_mask  # one that nobody registered makes no mask at all


def asking(change: Change) -> Any:
    """A configuration that names our attention function."""
    config = copy.copy(change.usual)
    config._attn_implementation_internal = INTERFACE
    return config


def _attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options):
    """The attention that a module would have asked for, as the attached functions of this thread leave it."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    change = change_of(module, "config")  # none where another thread asked while the last one was removed
    name = (module.config if change is None else change.usual)._attn_implementation
    usual = ALL_ATTENTION_FUNCTIONS.get(name) if name != "eager" else None
    usual = usual or sys.modules[type(module).__module__].eager_attention_forward
    attachments: list[Attachment] = change.here() if change else []
    if not attachments:
        return usual(module, query, key, value, attention_mask, **options)
    call, edited = asked(attachments, _call(module, name, attachments, query, key, value, attention_mask, options))
    if edited:
        output = call.computed(options.get("dropout") or 0.0).transpose(1, 2).contiguous(), None
    else:
        output = usual(module, query, key, value, attention_mask, **options)
    for after in call.after:
        after(output[0], unchanged)
    return output


def _call(
    module,
    name: str | None,
    attachments: list[Attachment],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    options: dict[str, Any],
) -> HostCall:
    if name is not None and name not in KNOWN:
        raise ValueError(
            f"{attachments[0].names[module]!r} ({type(module).__name__}) attends by {name!r}, whose masks are its own: choose "
            f"one of {KNOWN} by set_attn_implementation"
        )
    for keyword, how in UNSEEN.items():
        if options.get(keyword) is not None:
            raise ValueError(f"{attachments[0].names[module]!r} ({type(module).__name__}) {how} ({keyword}): no bias says that")
    if mask is not None and not isinstance(mask, Tensor):
        raise ValueError(
            f"{attachments[0].names[module]!r} was given a {type(mask).__name__} as its mask: choose the attention 'sdpa' or "
            "'eager'"
        )
    asked_for = options.get("is_causal")
    causal = getattr(module, "is_causal", False) if asked_for is None else asked_for
    bias = bias_of(mask, query, key, bool(causal and mask is None and query.shape[2] > 1))
    position = options.get("position_bias")
    if position is not None:
        bias = position if bias is None else bias + position
    scale = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    return HostCall(module, "", "transformers", query, key, value, bias, scale)
