"""Train backbones that differ only in their mixer under one budget, measure them, and keep everything in files."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import lens
from ..bench.harness import processor
from ..data import VisionData
from ..files import read_kept, set_aside, write_json
from ..models.backbone import count_parameters
from ..models.checkpoints import load_checkpoint, save_checkpoint
from ..models.registry import create_model
from ..train.fitting import Recipe, fit
from ..train.telling import Tell, Telling, counted
from .contenders import Contender
from .measure import flops, latencies, memory

LATENCY_BATCH = 8
LARGE_SIZE = 224


def silent(line: str) -> None:
    """Say nothing."""


@dataclass
class Study:
    """An experiment: backbones that differ only in their mixer, trained one way on one task, :meth:`run` in a folder.

    Args:
        data: the task.
        mixers: what is compared.
        recipe: how each is trained.
        model: a registered backbone.
        table: changes to its table.
        device: what to train and measure on.
        workers: processes that load images.
    """

    data: VisionData
    mixers: Sequence[Contender]
    recipe: Recipe
    model: str = "compact_nano"
    table: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    workers: int = 0

    def run(self, runs: Path, *, progress: bool = True, tell: Tell = silent) -> list[Outcome]:
        """Train, or load, the model of every mixer and measure all of them side by side.

        Args:
            runs: where runs are kept; finished ones are not repeated.
            progress: whether to show progress bars.
            tell: is given a line when a model is finished.

        Raises:
            ValueError: a mixer that the backbone cannot be built with, or that cannot take images of this size.
        """
        probe = torch.zeros(2, 3, self.data.size, self.data.size)
        for mixer in self.mixers:  # an impossible one must not cost the time of those before it
            try:
                model = self.build(mixer).eval()
                with torch.inference_mode():
                    model(probe)
            except (ValueError, TypeError, RuntimeError, IndexError, OverflowError) as error:
                why = str(error).strip().splitlines() or [type(error).__name__]
                raise ValueError(f"mixer {mixer.text} in {self.model}: {why[0]}") from error
        outcomes = [train_one(self, mixer, runs, progress=progress, tell=tell) for mixer in self.mixers]
        kept = self.measured(runs)
        if not _was_measured(outcomes, kept, tell):
            tell("measuring latency, memory and FLOPs side by side")
            measure(outcomes, self)
            write_json(kept, {outcome.name: outcome.numbers for outcome in outcomes})
        return outcomes

    def build(self, contender: Contender) -> nn.Module:
        """The backbone with this mixer. All start from the same weights outside their mixers."""

        def create(mixer: Any) -> nn.Module:
            torch.manual_seed(self.recipe.seed)
            return create_model(self.model, num_classes=len(self.data.classes), mixer=mixer, **self.table)

        with torch.random.fork_rng(devices=[]):
            model = create(contender.choice)
            model.load_state_dict(model.state_dict() | create("identity").state_dict())
        return model

    def folder(self, runs: Path, contender: Contender) -> Path:
        """Where the run of a mixer is kept: another folder for other settings, the same again for the same."""
        stated = {
            "data": self.data.fingerprint(),
            "model": self.model,
            "table": dict(self.table),
            "mixer": repr(contender.choice),
            "recipe": asdict(self.recipe),
        }
        digest = hashlib.sha256(json.dumps(stated, sort_keys=True, default=str).encode()).hexdigest()[:10]
        return runs / f"{self.data.name}-{self.model}" / f"{contender.folder}-{digest}"

    def measured(self, runs: Path) -> Path:
        """File of the costs of all these models, measured together on this machine with these versions."""
        stated = {"runs": [self.folder(runs, each).name for each in self.mixers], "device": self.device} | environment()
        digest = hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()[:10]
        return runs / f"{self.data.name}-{self.model}" / f"measured-{digest}.json"


@dataclass
class Outcome:
    """One trained mixer: its numbers, its learning curve, and the model."""

    name: str
    label: str
    accuracy: float
    history: list[dict[str, float]]
    train_seconds: float
    numbers: dict[str, float]
    model: nn.Module


def _was_measured(outcomes: Sequence[Outcome], kept: Path, tell: Tell) -> bool:
    """Take over earlier measurements of the same models on this machine; whether all are there."""
    found = read_kept(kept, lambda value: isinstance(value, dict), tell) or {}
    if not all(isinstance(found.get(outcome.name), dict) for outcome in outcomes):
        return False
    for outcome in outcomes:
        outcome.numbers |= found[outcome.name]
    return True


def train_one(study: Study, contender: Contender, runs: Path, *, progress: bool = True, tell: Tell = silent) -> Outcome:
    """Train one mixer, go on with a run that was stopped, or load one that is finished; ``tell`` is given a line about it.

    Damaged files of the run are set aside, ``tell`` is given a sentence for each, and what they held is computed again.
    """
    folder = study.folder(runs, contender)
    model = study.build(contender)
    result, weights = folder / "result.json", folder / "model.safetensors"
    found = read_kept(result, _is_result, tell)
    if found is not None:
        try:
            load_checkpoint(model, weights)
        except (ValueError, FileNotFoundError) as error:
            aside = f"; it was set aside as {set_aside(weights).name}" if weights.exists() else ""
            tell(f"{error}{aside}; the run is done again from its last checkpoint")
            found = None
    kept = found is not None
    if found is None:
        torch.manual_seed(study.recipe.seed)
        clock = _Clock(folder / "seconds.json", tell)
        telling = Telling(contender.label, study.recipe.epochs, tell)
        try:
            if not progress:
                tell(f"{contender.label}: training for {counted(study.recipe.epochs, 'epoch')}")
            with clock:
                module = fit(
                    model, study.data, study.recipe, folder, name=contender.label, progress=progress,
                    workers=study.workers, accelerator=study.device, callbacks=[telling], tell=tell,
                )  # fmt: skip
        except KeyboardInterrupt:
            tell(telling.stopped())
            raise
        save_checkpoint(model.cpu(), weights)
        found = {"mixer": contender.text, "history": module.history, "train_seconds": clock.total}
        write_json(result, found)
    history, seconds = found["history"], found["train_seconds"]
    accuracy = history[-1]["val_accuracy"]
    trained = f"accuracy {accuracy:.1%} after {counted(len(history), 'epoch')}, {seconds:.0f} s"
    tell(f"{contender.label}: {'kept from an earlier run: ' if kept else ''}{trained}")
    return Outcome(contender.name, contender.label, accuracy, history, seconds, {}, model.eval())


class _Clock:
    """Wall time, added up over the runs that a training was stopped and resumed in."""

    def __init__(self, path: Path, tell: Tell) -> None:
        self.path = path
        self.total: float = read_kept(path, _is_positive, tell) or 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.total += time.perf_counter() - self._start
        write_json(self.path, self.total)


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def _is_result(found: Any) -> bool:
    """Whether a json file holds what :func:`train_one` writes when a run is finished."""
    history = found.get("history") if isinstance(found, dict) else None
    return (
        isinstance(history, list)
        and bool(history)
        and all(isinstance(each, dict) and _is_positive(each.get("val_accuracy")) for each in history)
        and _is_positive(found.get("train_seconds"))
    )


def measure(outcomes: Sequence[Outcome], study: Study) -> None:
    """Measure the cost of each model, at the size it was trained at and at 224 x 224, all measured in turns."""
    size = study.data.size
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(LATENCY_BATCH, 3, size, size, generator=generator)
    large = torch.randn(1, 3, LARGE_SIZE, LARGE_SIZE, generator=generator)
    images, large = images.to(study.device), large.to(study.device)
    models = {outcome.name: outcome.model.to(study.device) for outcome in outcomes}
    small_times, large_times = latencies(models, images), latencies(models, large)
    for outcome in outcomes:
        outcome.numbers |= {"parameters": count_parameters(outcome.model), **flops(outcome.model, images)}
        outcome.numbers |= small_times[outcome.name] | memory(outcome.model, images)
        at_large = flops(outcome.model, large) | large_times[outcome.name] | memory(outcome.model, large)
        outcome.numbers |= {f"large_{key}": value for key, value in at_large.items()}
    for model in models.values():
        model.cpu()


@dataclass(frozen=True)
class Look:
    """What one mixer attends to: for each stage and query, the weights averaged over heads and calls, ``(rows, columns)``."""

    label: str
    layers: list[str]
    weights: list[list[Tensor]]


def look(outcomes: Sequence[Outcome], image: Tensor, queries: Sequence[tuple[float, float]]) -> list[Look]:
    """Capture the attention of the last block of each stage.

    Args:
        outcomes: trained mixers.
        image: ``(3, height, width)``, normalised as in training.
        queries: places as fractions of height and width.
    """
    looks = []
    for outcome in outcomes:
        with torch.inference_mode(), lens.capture(outcome.model, rows=list(queries)) as maps:
            outcome.model(image[None])
        stages: dict[str, dict[str, list[lens.Map]]] = {}
        for found in maps:
            stage, _, path = found.name.partition(".blocks.")
            if len(found.grid) == 2 and any(where is not None and len(where.grid) == 2 for where in found.places):
                stages.setdefault(stage, {}).setdefault(path.partition(".")[0], []).append(found)
        weights = [list(_seen(blocks[max(blocks, key=int)])) for blocks in stages.values()]
        looks.append(Look(outcome.label, [f"stage {index + 1}" for index in range(len(stages))], weights))
    return looks


def _seen(parts: Sequence[lens.Map]) -> Tensor:
    """What the heads of all attentions of a block see on average, as ``(queries, rows, columns)`` of its grid."""
    pixels = torch.cat([lens.image_map(found, heads=None).map[0] for found in parts]).mean(0)
    grid = (parts[0].grid[0], parts[0].grid[1])
    per_token = pixels.shape[1] * pixels.shape[2] / (grid[0] * grid[1])
    return torch.nn.functional.adaptive_avg_pool2d(pixels, grid) * per_token


def environment() -> dict[str, str]:
    """Versions and machine, for results.json."""
    from .. import __version__

    return {
        "regard": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": processor(),
        "threads": str(torch.get_num_threads()),
    }


def results(study: Study, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Everything that was found, ready for json. All but times, memory and ``environment`` depends on the seed only."""
    return {
        "environment": environment(),
        "data": {
            "name": study.data.name,
            "description": study.data.description,
            "fingerprint": study.data.fingerprint(),
            "classes": list(study.data.classes),
            "train": len(study.data.train),
            "val": len(study.data.val),
            "held_out_images": len(study.data.val.images),
            "size": study.data.size,
            "chance": study.data.chance,
        },
        "model": study.model,
        "table": dict(study.table),
        "recipe": asdict(study.recipe),
        "latency_batch": LATENCY_BATCH,
        "large_size": LARGE_SIZE,
        "mixers": [
            {
                "name": outcome.name,
                "label": outcome.label,
                "mixer": repr(contender.choice),
                "accuracy": outcome.accuracy,
                "train_seconds": outcome.train_seconds,
                **outcome.numbers,
                "history": outcome.history,
            }
            for contender, outcome in zip(study.mixers, outcomes, strict=True)
        ],
    }
