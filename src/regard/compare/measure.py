"""Measure models side by side: parameters, FLOPs, latency, memory."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..bench.usage import flops, peak_memory
from ..models.backbone import count_parameters

__all__ = ["flops", "latencies", "memory", "parameters", "peak_memory", "si"]


def latencies(models: Mapping[str, nn.Module], images: Tensor, *, seconds: float = 2.0) -> dict[str, dict[str, float]]:
    """Time of a forward pass of each model, in milliseconds per batch.

    The models take turns, so that a machine that slows down slows all of them down.

    Returns:
        ``latency_ms`` (median), ``latency_low_ms`` and ``latency_high_ms`` (quartiles), ``repeats``, of each.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for model in models.values():
            model(images)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
            for name, model in models.items():
                _wait(images)
                start = time.perf_counter()
                model(images)
                _wait(images)
                times[name].append(1e3 * (time.perf_counter() - start))
    results = {}
    for name, measured in times.items():
        low, middle, high = statistics.quantiles(measured, n=4)
        results[name] = {
            "latency_ms": middle,
            "latency_low_ms": low,
            "latency_high_ms": high,
            "repeats": len(measured),
        }
    return results


def _wait(images: Tensor) -> None:
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)


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


def parameters(model: nn.Module) -> int:
    return count_parameters(model)


def si(value: float, unit: str = "") -> str:
    """A number with three digits and a prefix: ``12345 -> 12.3 k``."""
    power = min(int(math.log10(value)) // 3, 4) if value >= 1000 else 0
    return f"{value / 1000**power:.3g} {' kMGT'[power].strip()}{unit}".strip()
