"""Token mixers: one file a mechanism, all ``(batch, *grid, dim) -> (batch, *grid, dim)``."""

from .axial import AxialAttention
from .base import AttentionMixer, PatternMixer
from .bi_level_routing import BiLevelRoutingAttention
from .criss_cross import CrissCrossAttention
from .grid import GridAttention
from .halo import HaloAttention
from .identity import IdentityMixer
from .locally_enhanced import LocallyEnhancedAttention
from .multi_head import MultiHeadAttention
from .neighborhood import NeighborhoodAttention
from .registry import create_mixer, list_mixers, mixer_class, register_mixer
from .window import WindowAttention

__all__ = [
    "AttentionMixer",
    "AxialAttention",
    "BiLevelRoutingAttention",
    "CrissCrossAttention",
    "GridAttention",
    "HaloAttention",
    "IdentityMixer",
    "LocallyEnhancedAttention",
    "MultiHeadAttention",
    "NeighborhoodAttention",
    "PatternMixer",
    "WindowAttention",
    "create_mixer",
    "list_mixers",
    "mixer_class",
    "register_mixer",
]
