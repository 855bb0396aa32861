"""Memory that the threads of a compiled kernel work in, kept between the calls of a Python thread."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

KEPT = 1 << 24
"""Numbers that are kept; a call that needs more gives them back."""


class _Kept(threading.local):
    memory: Tensor | None = None


_KEPT = _Kept()


def lend(task: Any, each: int) -> Tensor:
    """Give each of a task's workers room for so many numbers; the memory must live as long as the task."""
    task.scratch_worker = -(-each // 1024) * 1024 + 16  # not the same place of a page for all
    size = task.scratch_worker * task.workers + 16
    memory = _KEPT.memory
    if memory is None or len(memory) < size:
        with torch.inference_mode(False):
            memory = torch.empty(size, dtype=torch.float32)
        if size <= KEPT:
            _KEPT.memory = memory
    address = memory.data_ptr()
    task.scratch = address + -address % 64  # a line of the cache
    return memory
