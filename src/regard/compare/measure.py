"""Measure models side by side: parameters, FLOPs, latency, memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from ..bench.harness import interleave
from ..bench.usage import flops, peak_memory

__all__ = ["flops", "latencies", "memory", "peak_memory", "si"]

ROUNDS = 31
"""The most runs of each model that are timed: enough for quartiles."""


def latencies(models: Mapping[str, nn.Module], images: Tensor, *, seconds: float = 2.0) -> dict[str, dict[str, float]]:
    """Time of a forward pass of each model, in milliseconds per batch.

    The models take turns, so that a machine that slows down slows all of them down.

    Args:
        models: by name.
        images: what each is given.
        seconds: for all of them together; each has five runs at least.

    Returns:
        ``latency_ms`` (median), ``latency_low_ms`` and ``latency_high_ms`` (quartiles), ``repeats``, of each.
    """

    def forward(model: nn.Module) -> None:
        model(images)
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)

    runs = {name: partial(forward, model) for name, model in models.items()}
    with torch.inference_mode():
        found = interleave(runs, ROUNDS, seconds / len(runs), least=5)
    names = {"latency_ms": "ms", "latency_low_ms": "q1", "latency_high_ms": "q3", "repeats": "repeats"}
    return {name: {key: each[short] for key, short in names.items()} for name, each in found.items()}


def memory(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Peak extra memory of a forward pass without gradients and of a training step, in bytes per batch."""

    def infer() -> None:
        with torch.inference_mode():
            model(images)

    def step() -> None:
        model(images).square().mean().backward()
        model.zero_grad(set_to_none=True)

    for work in (infer, step):  # caches of plans are filled before measuring
        work()
    return {"inference_bytes": peak_memory(infer, images.device), "training_bytes": peak_memory(step, images.device)}


def si(value: float, unit: str = "") -> str:
    """A number with three digits and a prefix: ``12345 -> 12.3 k``."""
    power = min(int(math.log10(value)) // 3, 4) if value >= 1000 else 0
    return f"{value / 1000**power:.3g} {' kMGT'[power].strip()}{unit}".strip()
