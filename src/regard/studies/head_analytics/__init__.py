"""What the heads of a vision transformer do: how much they matter, how far they look, which patterns they form.

    head_importance(model, images)   probability of the true class lost when a head gives nothing
    hop_profile(map)                 attention by the distance in patches
    attention_patterns(maps)         pictures of attention, coded by an autoencoder and sorted

Source: Li et al., "How Does Attention Work in Vision Transformers? A Visual Analytics Attempt", arXiv:2303.13731.
"""

from .hops import HopProfile, hop_profile
from .importance import HeadImportance, head_importance, without_heads
from .patterns import Patterns, attention_patterns

__all__ = [
    "HeadImportance",
    "HopProfile",
    "Patterns",
    "attention_patterns",
    "head_importance",
    "hop_profile",
    "without_heads",
]
