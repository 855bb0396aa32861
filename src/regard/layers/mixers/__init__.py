"""Token mixers: one file a mechanism, all ``(batch, *grid, dim) -> (batch, *grid, dim)``."""

from .base import AttentionMixer
from .registry import create_mixer, list_mixers, mixer_class, register_mixer
from .window import WindowAttention

__all__ = ["AttentionMixer", "WindowAttention", "create_mixer", "list_mixers", "mixer_class", "register_mixer"]
