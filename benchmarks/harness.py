"""Timing in one process: variants interleaved, medians and quartiles, results written atomically as json."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def interleave(variants: dict[str, Callable[[], object]], repeats: int = 15, seconds: float = 20.0) -> dict[str, dict]:
    """Time the variants in turn, ``repeats`` rounds; one that has used up its ``seconds`` sits the later rounds out."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        run()
    for _ in range(repeats):
        for name, run in variants.items():
            if len(times[name]) >= 3 and sum(times[name]) > seconds:
                continue
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: summary(values) for name, values in times.items()}


def summary(values: list[float]) -> dict[str, float | int]:
    """Median and quartiles in milliseconds."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"ms": round(median * 1e3, 3), "q1": round(low * 1e3, 3), "q3": round(high * 1e3, 3), "repeats": len(values)}


def machine() -> dict[str, object]:
    """What the numbers were measured on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vector": torch.backends.cpu.get_cpu_capability(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine()


def folder() -> Path:
    """Results of this kind of machine."""
    name = re.sub(r"[^a-z0-9]+", "-", f"{_processor()} {os.cpu_count()} cores".lower()).strip("-")
    return RESULTS / name


def write(name: str, cases: list[dict]) -> Path:
    """Write ``name.json`` in one step, so that a killed run leaves the old file whole."""
    target = folder() / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_suffix(".tmp")
    draft.write_text(json.dumps({"machine": machine(), "cases": cases}, indent=1) + "\n")
    os.replace(draft, target)
    return target


def error(result: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return float((result.detach().double() - truth).norm() / truth.norm())
