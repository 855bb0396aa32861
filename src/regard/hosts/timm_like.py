"""Attention modules like timm's: ``qkv`` or ``q``, with ``num_heads``, ``attn_drop`` and ``proj``."""

from __future__ import annotations

from torch import nn


def is_timm_like(module: nn.Module) -> bool:
    """Whether a module is attention with the attributes that timm's have."""
    if type(module).__module__.startswith("regard."):
        return False
    names = ("num_heads", "attn_drop", "proj")
    return all(hasattr(module, name) for name in names) and (hasattr(module, "qkv") or hasattr(module, "q"))
