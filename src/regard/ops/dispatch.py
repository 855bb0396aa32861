"""Which backend runs a call: a pure function of the call and the device, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from .backends import dense, flex, natten, reference, tiled
from .call import Call

BACKENDS: dict[str, ModuleType] = {m.__name__.rpartition(".")[2]: m for m in (reference, dense, tiled, flex, natten)}


@dataclass(frozen=True)
class Choice:
    """The backend that was chosen, why, and for the others why not."""

    backend: str
    reason: str
    refused: dict[str, str]


def choose(call: Call, backend: str = "auto") -> Choice:
    """Choose the backend of a call.

    Raises:
        ValueError: an unknown backend, or a named one that cannot run this call.
    """
    if backend != "auto":
        if backend not in BACKENDS:
            raise ValueError(f"unknown backend {backend!r}; there are auto, {', '.join(BACKENDS)}")
        if (why := BACKENDS[backend].supports(call)) is not None:
            raise ValueError(f"backend {backend!r} cannot run this call: {why}")
        return Choice(backend, "asked for", {})
    refused = {name: why for name, module in BACKENDS.items() if (why := module.supports(call)) is not None}
    if "natten" not in refused and call.device.type == "cuda":
        return Choice("natten", "fused neighborhood kernel", refused)
    if "tiled" not in refused:
        if tiled.prefers(call):
            return Choice("tiled", "computes far fewer pairs than dense attention", refused)
        if call.need_lse and call.device.type == "cpu":
            return Choice("tiled", "returns lse without storing the weights", refused)
    if "dense" not in refused:
        return Choice("dense", "most keys are visible" if "tiled" not in refused else "the general case", refused)
    return Choice("reference", "nothing faster applies", refused)


def run(call: Call, backend: str = "auto") -> tuple[Tensor, Tensor | None]:
    """Compute a call: the output ``(batch, *q_grid, heads, value_dim)`` and, if asked for, the lse."""
    return BACKENDS[choose(call, backend).backend].run(call)
