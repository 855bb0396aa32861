"""NATTEN's interface, computed by regard: on CPU and any other device, forward and backward.

The names here are those of NATTEN 0.21; :mod:`.functional` also has the halves that versions up to 0.17 had (``na2d_qk``,
``na2d_av``, ``natten2dqkrpb``, ...). :func:`install` lets ``import natten`` find them, or those of an older version.

Source: Hassani et al., NAT arXiv:2204.07143, DiNAT arXiv:2209.15001, FNA arXiv:2403.04690, GNA arXiv:2504.16922.
"""

from typing import Any

from . import context, functional, modules
from .context import (
    CONFIGS,
    allow_flex_compile,
    allow_flex_compile_backprop,
    are_deterministic_algorithms_enabled,
    disable_flex_compile,
    disable_flex_compile_backprop,
    get_memory_usage_preference,
    is_flex_compile_allowed,
    is_flex_compile_backprop_allowed,
    is_kv_parallelism_in_fused_na_enabled,
    is_memory_usage_default,
    is_memory_usage_strict,
    is_memory_usage_unrestricted,
    no_configs,
    set_memory_usage_preference,
    use_deterministic_algorithms,
    use_kv_parallelism_in_fused_na,
)
from .functional import attention, merge_attentions, na1d, na2d, na3d
from .installing import VERSIONS, install, uninstall
from .modules import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D

__version__ = VERSIONS["0.21"]

HAS_LIBNATTEN = False

__all__ = [
    "HAS_LIBNATTEN",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "__version__",
    "allow_flex_compile",
    "allow_flex_compile_backprop",
    "are_deterministic_algorithms_enabled",
    "attention",
    "context",
    "disable_flex_compile",
    "disable_flex_compile_backprop",
    "functional",
    "get_memory_usage_preference",
    "install",
    "is_flex_compile_allowed",
    "is_flex_compile_backprop_allowed",
    "is_kv_parallelism_in_fused_na_enabled",
    "is_memory_usage_default",
    "is_memory_usage_strict",
    "is_memory_usage_unrestricted",
    "merge_attentions",
    "modules",
    "na1d",
    "na2d",
    "na3d",
    "set_memory_usage_preference",
    "uninstall",
    "use_deterministic_algorithms",
    "use_kv_parallelism_in_fused_na",
]


def __getattr__(name: str) -> Any:
    if name in CONFIGS:
        return no_configs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
