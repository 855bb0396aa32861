"""NATTEN's switches and questions about the machine.

Switches remember what they were set to; only :func:`use_fused_na` changes anything (no dropout of attention weights, as in
NATTEN). The questions are answered for regard: what runs on every device is there.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

import torch

from .arguments import named


class MemoryUsagePreference(Enum):
    Default = 0
    Strict = 1
    Unrestricted = 2


class _State:
    memory = MemoryUsagePreference.Default
    switches: dict[str, bool] = {}


def set_memory_usage_preference(pref: str = "default") -> None:
    """Remember ``"default"``, ``"strict"`` or ``"unrestricted"``.

    Raises:
        ValueError: anything else.
    """
    known = {preference.name.lower(): preference for preference in MemoryUsagePreference}
    if pref not in known:
        raise ValueError(f"the memory usage preference is one of {', '.join(known)}; got {pref!r}")
    _State.memory = known[pref]


def get_memory_usage_preference() -> MemoryUsagePreference:
    return _State.memory


def is_memory_usage_default() -> bool:
    return _State.memory is MemoryUsagePreference.Default


def is_memory_usage_strict() -> bool:
    return _State.memory is MemoryUsagePreference.Strict


def is_memory_usage_unrestricted() -> bool:
    return _State.memory is MemoryUsagePreference.Unrestricted


def _switch(use: str, enabled: str, on: bool) -> tuple[Callable[..., None], Callable[[], bool]]:
    """A function that sets a switch and one that asks for it."""
    _State.switches[enabled] = on

    def set_to(mode: bool = True, *args: Any, **options: Any) -> None:
        _State.switches[enabled] = bool(mode)

    def ask() -> bool:
        return _State.switches[enabled]

    return named(use, set_to), named(enabled, ask)


def _answer(name: str, found: Callable[[], bool]) -> Callable[..., bool]:
    def ask(device_index: Any = None) -> bool:
        return found()

    return named(name, ask)


use_deterministic_algorithms, are_deterministic_algorithms_enabled = _switch(
    "use_deterministic_algorithms", "are_deterministic_algorithms_enabled", False
)
use_kv_parallelism_in_fused_na, is_kv_parallelism_in_fused_na_enabled = _switch(
    "use_kv_parallelism_in_fused_na", "is_kv_parallelism_in_fused_na_enabled", True
)
use_fused_na, is_fused_na_enabled = _switch("use_fused_na", "is_fused_na_enabled", False)
use_tf32_in_gemm_na, is_tf32_in_gemm_na_enabled = _switch("use_tf32_in_gemm_na", "is_tf32_in_gemm_na_enabled", False)
use_tiled_na, is_tiled_na_enabled = _switch("use_tiled_na", "is_tiled_na_enabled", True)
use_gemm_na, is_gemm_na_enabled = _switch("use_gemm_na", "is_gemm_na_enabled", True)
allow_flex_compile, is_flex_compile_allowed = _switch("allow_flex_compile", "is_flex_compile_allowed", False)
allow_flex_compile_backprop, is_flex_compile_backprop_allowed = _switch(
    "allow_flex_compile_backprop", "is_flex_compile_backprop_allowed", False
)
use_fna, is_fna_enabled = use_fused_na, is_fused_na_enabled


def use_flex_attention() -> None:
    use_fused_na()


def force_flex_attention() -> None:
    use_fused_na()


def enable_tf32() -> bool:
    use_tf32_in_gemm_na(True)
    return is_tf32_in_gemm_na_enabled()


def disable_tf32() -> bool:
    use_tf32_in_gemm_na(False)
    return is_tf32_in_gemm_na_enabled()


def enable_tiled_na() -> bool:
    use_tiled_na(True)
    return is_tiled_na_enabled()


def disable_tiled_na() -> bool:
    use_tiled_na(False)
    return is_tiled_na_enabled()


def enable_gemm_na() -> bool:
    use_gemm_na(True)
    return is_gemm_na_enabled()


def disable_gemm_na() -> bool:
    use_gemm_na(False)
    return is_gemm_na_enabled()


def disable_flex_compile() -> None:
    allow_flex_compile(False)


def disable_flex_compile_backprop() -> None:
    allow_flex_compile_backprop(False)


def use_autotuner(*args: Any, **options: Any) -> None:
    """Changes nothing: there is nothing to tune."""


def disable_autotuner() -> None:
    """Changes nothing."""


def is_autotuner_enabled() -> bool:
    return False


is_autotuner_enabled_for_forward = is_autotuner_enabled_for_backward = is_autotuner_enabled
is_autotuner_thorough_for_forward = is_autotuner_thorough_for_backward = is_autotuner_enabled

has_cuda = _answer("has_cuda", torch.cuda.is_available)
has_half = _answer("has_half", lambda: True)
has_bfloat = _answer("has_bfloat", lambda: True)
has_fused_na = has_fna = _answer("has_fused_na", lambda: True)
has_gemm = _answer("has_gemm", lambda: False)
has_tf32_gemm = _answer("has_tf32_gemm", lambda: False)
has_fp32_gemm = _answer("has_fp32_gemm", lambda: False)
has_fp64_gemm = _answer("has_fp64_gemm", lambda: False)


def no_configs(*args: Any, **options: Any) -> list[Any]:
    """There are no tiles to choose."""
    return []


CONFIGS = tuple(
    f"get_{direction}configs_for_{kind}_{what}"
    for kind in ("cutlass", "cutlass_hopper", "cutlass_blackwell", "flex")
    for what in ("fmha", "fna")
    for direction in ("", "bwd_")
    if kind != "flex" or not direction
)
"""The functions of version 0.21 that list tile shapes."""
