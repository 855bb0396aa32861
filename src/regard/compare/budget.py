"""How long training takes here, measured on a few steps: threads and epochs for a given time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..train.fitting import loaders
from .study import Study


def fastest_threads(study: Study) -> int:
    """Choose 1 thread or torch's default, whichever trains the first mixer faster here.

    On a machine that is busy with other work, many small parallel regions wait for each other.
    """
    usual = torch.get_num_threads()
    if study.device != "cpu" or usual == 1:
        return usual
    batch = next(iter(loaders(study.data, study.recipe)[0]))
    model = study.build(study.mixers[0])
    times = {}
    try:
        for threads in (usual, 1):
            torch.set_num_threads(threads)
            _training_step(model, batch)
            start = time.perf_counter()
            for _ in range(4):
                _training_step(model, batch)
            times[threads] = time.perf_counter() - start
    finally:
        torch.set_num_threads(usual)
    return min(times, key=lambda threads: times[threads])


def epochs_that_fit(study: Study, seconds: float) -> int:
    """The recipe's epochs, or fewer if training all mixers that long would take more than ``seconds`` here.

    Times a few steps of each mixer; at least one epoch.
    """
    total = 0.0
    for contender in study.mixers:
        model = study.build(contender).to(study.device)
        train, val = loaders(study.data, study.recipe)
        steps = []
        for index, batch in enumerate(train):
            start = time.perf_counter()
            _training_step(model, [part.to(study.device) for part in batch])
            if index > 0:  # the first one plans and allocates
                steps.append(time.perf_counter() - start)
            if len(steps) == 5:
                break
        per_step = statistics.median(steps) if steps else 0.0
        total += per_step * (len(train) + 0.8 * len(val))  # validation: twice the samples, no backward pass
    overhead = 1.15  # the optimiser, the samples, checkpoints
    return max(1, min(study.recipe.epochs, int(seconds / max(overhead * total, 1e-9))))


def _training_step(model: nn.Module, batch: Sequence[Tensor]) -> None:
    images, labels = batch
    torch.nn.functional.cross_entropy(model(images), labels).backward()
