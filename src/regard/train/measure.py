"""Measure models side by side: parameters, FLOPs, latency, memory."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from ..bench import count
from ..models.builder import count_parameters

OUTSIDE_ATTENTION = (
    torch.ops.aten.mm,
    torch.ops.aten.addmm,
    torch.ops.aten.bmm,
    torch.ops.aten.baddbmm,
    torch.ops.aten.convolution,
)
"""Operators counted besides attention: projections, MLPs, convolutions, routing scores."""


def flops(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Floating-point operations of one forward pass for each image, a multiply-add as two.

    Returns:
        ``flops`` of everything and ``attention_flops``, those of the pairs that the patterns show (what a backend computes
        beside them is not counted).
    """
    with torch.no_grad(), count() as attention, FlopCounterMode(display=False) as counter:
        model(images)
    counted = counter.get_flop_counts().get("Global", {})
    outside = sum(n for operator, n in counted.items() if operator in OUTSIDE_ATTENTION)
    return {
        "flops": (outside + attention.flops) / images.shape[0],
        "attention_flops": attention.flops / images.shape[0],
    }


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


def peak_memory(work: Callable[[], Any], device: torch.device) -> int:
    """Bytes that were allocated at once by tensors while ``work`` ran, beyond those that existed before.

    On CUDA the allocator's own peak; on a CPU every allocation and release that the profiler sees, added up in order.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler prints that it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    found = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(found, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


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
