"""What a model computes and holds: floating-point operations, and the memory of its tensors."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from ..ops.calls.observe import OBSERVERS, Record, listening
from .cost import count

OUTSIDE_ATTENTION = (
    torch.ops.aten.mm,
    torch.ops.aten.addmm,
    torch.ops.aten.bmm,
    torch.ops.aten.baddbmm,
    torch.ops.aten.convolution,
    getattr(torch.ops.mkldnn, "_linear_pointwise", None),  # see regard.ops.affine
)
"""Operators counted besides attention: projections, MLPs, convolutions, routing scores."""

_PROFILING = threading.Lock()
"""The profiler is the process's: one thread at a time."""


def flops(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Floating-point operations of one forward pass for each image, a multiply-add as two.

    Returns:
        ``flops`` of everything and ``attention_flops``, those of the pairs that the patterns show (what a backend computes
        beside them is not counted).
    """
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _Everywhere()  # type: ignore[assignment]  # the usual one follows the modules of all threads
    with torch.no_grad(), count() as attention, counter, _inside(counter) as inside:
        model(images)
    return {
        "flops": (_products(counter) - inside.products + attention.flops) / images.shape[0],
        "attention_flops": attention.flops / images.shape[0],
    }


class _Everywhere(AbstractContextManager):
    """The module path for torch's counter: everything goes to the total."""

    parents = frozenset({"Global"})

    def __exit__(self, *_) -> None:
        pass


def _products(counter: FlopCounterMode) -> int:
    """What has been counted so far of the operators that may stand outside of attention."""
    counted = counter.get_flop_counts().get("Global", {})
    return sum(n for operator, n in counted.items() if operator in OUTSIDE_ATTENTION)


@dataclass
class _Inside:
    """The part of the products that attention is made of, where its backend multiplies matrices in the open."""

    products: int = 0


@contextmanager
def _inside(counter: FlopCounterMode) -> Iterator[_Inside]:
    """Tell the products inside of attention apart: the pairs that the patterns show are counted already."""
    inside = _Inside()

    def observe(_: Record) -> Callable[[Tensor], None]:
        before = _products(counter)

        def computed(_: Tensor) -> None:
            inside.products += _products(counter) - before

        return computed

    with listening(OBSERVERS, observe):
        yield inside


def peak_memory(work: Callable[[], Any], device: torch.device) -> int:
    """Bytes that were allocated at once by tensors while ``work`` ran, beyond those that existed before.

    On CUDA the allocator's own peak, which counts what other threads allocate meanwhile; on a CPU every allocation and release
    that the profiler sees, added up in order.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler prints that it starts and stops
    with _PROFILING, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None
    found = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(found, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
