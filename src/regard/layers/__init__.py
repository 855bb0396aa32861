"""Modules: mixers, positions, stems, MLPs, blocks."""

from .blocks import DropPath, LayerScale, Residual, TokenBatchNorm
from .mixers import AttentionMixer, PatternMixer, create_mixer, list_mixers, register_mixer
from .mlps import GLU, MLP, ConvMLP
from .positions import ConvPosition, OffsetBias, ValueConv
from .stems import ConvDownsample, ConvStem, ConvTokenizer, PatchEmbed, PatchMerging

__all__ = [
    "GLU",
    "MLP",
    "AttentionMixer",
    "ConvDownsample",
    "ConvMLP",
    "ConvPosition",
    "ConvStem",
    "ConvTokenizer",
    "DropPath",
    "LayerScale",
    "OffsetBias",
    "PatchEmbed",
    "PatchMerging",
    "PatternMixer",
    "Residual",
    "TokenBatchNorm",
    "ValueConv",
    "create_mixer",
    "list_mixers",
    "register_mixer",
]
