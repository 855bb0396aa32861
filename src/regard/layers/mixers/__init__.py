"""Token mixers: one file a mechanism, all ``(batch, *grid, dim) -> (batch, *grid, dim)``."""

from .aggregated import AggregatedAttention, CosineAttention
from .axial import AxialAttention
from .base import AttentionMixer, PatternMixer, SplitMixer, TokenMixer
from .bi_level_routing import BiLevelRoutingAttention
from .cascaded_group import CascadedGroupAttention
from .channel_group import ChannelGroupAttention
from .criss_cross import CrissCrossAttention
from .dual_token import DualTokenAttention
from .gated_positional import GatedPositionalAttention
from .grid import GridAttention
from .halo import HaloAttention
from .hilo import HiLoAttention
from .identity import IdentityMixer
from .locally_enhanced import LocallyEnhancedAttention
from .mixture_of_heads import (
    HeadMixture,
    MixtureOfAggregatedHeads,
    MixtureOfCosineHeads,
    MixtureOfHeadsAttention,
    collect_balance,
)
from .msa_conv import MSAConv
from .multi_head import MultiHeadAttention
from .neighborhood import NeighborhoodAttention
from .outlook import OutlookAttention
from .partial_channel import PartialChannelAttention
from .registry import MixerCard, calls_of, create_mixer, list_mixers, mixer_card, mixer_class, register_mixer
from .reversed import ReversedAttention
from .sparsifiner import SparsifinerAttention, distillation_loss, reconstruction_loss
from .strip import StripAttention
from .window import WindowAttention

__all__ = [
    "AggregatedAttention",
    "AttentionMixer",
    "AxialAttention",
    "BiLevelRoutingAttention",
    "CascadedGroupAttention",
    "ChannelGroupAttention",
    "CosineAttention",
    "CrissCrossAttention",
    "DualTokenAttention",
    "GatedPositionalAttention",
    "GridAttention",
    "HaloAttention",
    "HeadMixture",
    "HiLoAttention",
    "IdentityMixer",
    "LocallyEnhancedAttention",
    "MSAConv",
    "MixerCard",
    "MixtureOfAggregatedHeads",
    "MixtureOfCosineHeads",
    "MixtureOfHeadsAttention",
    "MultiHeadAttention",
    "NeighborhoodAttention",
    "OutlookAttention",
    "PartialChannelAttention",
    "PatternMixer",
    "ReversedAttention",
    "SparsifinerAttention",
    "SplitMixer",
    "StripAttention",
    "TokenMixer",
    "WindowAttention",
    "calls_of",
    "collect_balance",
    "create_mixer",
    "distillation_loss",
    "list_mixers",
    "mixer_card",
    "mixer_class",
    "reconstruction_loss",
    "register_mixer",
]
