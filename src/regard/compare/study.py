"""Train backbones that differ only in their mixer under one budget, measure them, and keep everything in files."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import lens
from ..bench.harness import processor
from ..data import VisionData
from ..files import read_kept, set_aside, write_json
from ..models.checkpoints import load_checkpoint, save_checkpoint
from ..models.registry import create_model
from ..train.fitting import Recipe, fit, loaders
from ..train.telling import Telling, counted
from .contenders import Contender
from .measure import flops, latencies, memory, parameters

LATENCY_BATCH = 8
LARGE_SIZE = 224


@dataclass
class Settings:
    """What is compared, and on what.

    Args:
        data: the task.
        contenders: the mixers.
        model: a registered backbone.
        table: changes to its table.
        recipe: how each is trained.
        runs: where runs are kept; finished ones are not repeated.
        device: what to train and measure on.
        workers: processes that load images.
    """

    data: VisionData
    contenders: Sequence[Contender]
    recipe: Recipe
    model: str = "compact_nano"
    table: Mapping[str, Any] = field(default_factory=dict)
    runs: Path = Path("regard-runs")
    device: str = "cpu"
    workers: int = 0

    def build(self, contender: Contender) -> nn.Module:
        """The backbone with this mixer. All contenders start from the same weights outside their mixers."""

        def create(mixer: Any) -> nn.Module:
            torch.manual_seed(self.recipe.seed)
            return create_model(self.model, num_classes=len(self.data.classes), mixer=mixer, **self.table)

        with torch.random.fork_rng(devices=[]):
            model = create(contender.choice)
            model.load_state_dict(model.state_dict() | create("identity").state_dict())
        return model

    def folder(self, contender: Contender) -> Path:
        """Where the run of a mixer is kept: another folder for other settings, the same again for the same."""
        stated = {
            "data": self.data.fingerprint(),
            "model": self.model,
            "table": dict(self.table),
            "mixer": repr(contender.choice),
            "recipe": asdict(self.recipe),
        }
        digest = hashlib.sha256(json.dumps(stated, sort_keys=True, default=str).encode()).hexdigest()[:10]
        return self.runs / f"{self.data.name}-{self.model}" / f"{contender.folder}-{digest}"

    @property
    def measured(self) -> Path:
        """Where it is kept what all of these cost side by side, here and with these versions."""
        stated = {"runs": [self.folder(each).name for each in self.contenders], "device": self.device} | environment()
        digest = hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()[:10]
        return self.runs / f"{self.data.name}-{self.model}" / f"measured-{digest}.json"


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


def compare(settings: Settings, *, progress: bool = True, tell: Callable[[str], None] = lambda line: None) -> list[Outcome]:
    """Train, or load, every contender and measure all of them side by side.

    Args:
        settings: what to compare.
        progress: whether to show progress bars.
        tell: is given a line when a contender is finished.

    Raises:
        ValueError: a contender that the backbone cannot be built with, or that cannot take images of this size.
    """
    probe = torch.zeros(2, 3, settings.data.size, settings.data.size)
    for contender in settings.contenders:  # an impossible one must not cost the time of those before it
        try:
            model = settings.build(contender).eval()
            with torch.inference_mode():
                model(probe)
        except (ValueError, TypeError, RuntimeError, IndexError, OverflowError) as error:
            why = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(f"mixer {contender.text} in {settings.model}: {why[0]}") from error
    outcomes = [train_one(settings, contender, progress=progress, tell=tell) for contender in settings.contenders]
    if not _measured(outcomes, settings, tell):
        tell("measuring latency, memory and FLOPs side by side")
        measure(outcomes, settings)
        write_json(settings.measured, {outcome.name: outcome.numbers for outcome in outcomes})
    return outcomes


def _measured(outcomes: Sequence[Outcome], settings: Settings, tell: Callable[[str], None]) -> bool:
    """Take over what was measured of the same models on this machine; whether all of it is there."""
    found = read_kept(settings.measured, lambda value: isinstance(value, dict), tell) or {}
    if not all(isinstance(found.get(outcome.name), dict) for outcome in outcomes):
        return False
    for outcome in outcomes:
        outcome.numbers |= found[outcome.name]
    return True


def train_one(
    settings: Settings, contender: Contender, *, progress: bool = True, tell: Callable[[str], None] = lambda line: None
) -> Outcome:
    """Train one contender, go on with a run that was stopped, or load one that is finished; ``tell`` is told which.

    Damaged files of the run are set aside, ``tell`` is given a sentence for each, and what they held is computed again.
    """
    folder = settings.folder(contender)
    model = settings.build(contender)
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
        torch.manual_seed(settings.recipe.seed)
        clock = _Clock(folder / "seconds.json", tell)
        telling = Telling(contender.label, settings.recipe.epochs, tell)
        try:
            if not progress:
                tell(f"{contender.label}: training for {counted(settings.recipe.epochs, 'epoch')}")
            with clock:
                module = fit(
                    model, settings.data, settings.recipe, folder, name=contender.label, progress=progress,
                    workers=settings.workers, accelerator=settings.device, callbacks=[telling], tell=tell,
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

    def __init__(self, path: Path, tell: Callable[[str], None]) -> None:
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


def measure(outcomes: Sequence[Outcome], settings: Settings) -> None:
    """Fill in what each model costs, at the size it was trained at and at 224 x 224, all measured in turns."""
    size = settings.data.size
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(LATENCY_BATCH, 3, size, size, generator=generator)
    large = torch.randn(1, 3, LARGE_SIZE, LARGE_SIZE, generator=generator)
    images, large = images.to(settings.device), large.to(settings.device)
    models = {outcome.name: outcome.model.to(settings.device) for outcome in outcomes}
    small_times, large_times = latencies(models, images), latencies(models, large)
    for outcome in outcomes:
        outcome.numbers |= {"parameters": parameters(outcome.model), **flops(outcome.model, images)}
        outcome.numbers |= small_times[outcome.name] | memory(outcome.model, images)
        at_large = flops(outcome.model, large) | large_times[outcome.name] | memory(outcome.model, large)
        outcome.numbers |= {f"large_{key}": value for key, value in at_large.items()}
    for model in models.values():
        model.cpu()


def fastest_threads(settings: Settings) -> int:
    """One thread, or as many as torch would use: what a training step of the first contender is faster with here.

    On a machine that is busy with other work, many small parallel regions wait for each other.
    """
    usual = torch.get_num_threads()
    if settings.device != "cpu" or usual == 1:
        return usual
    batch = next(iter(loaders(settings.data, settings.recipe)[0]))
    model = settings.build(settings.contenders[0])
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


def epochs_that_fit(settings: Settings, seconds: float) -> int:
    """The recipe's epochs, or fewer if training all contenders that long would take more than ``seconds`` here.

    Times a few steps of each contender; at least one epoch.
    """
    total = 0.0
    for contender in settings.contenders:
        model = settings.build(contender).to(settings.device)
        train, val = loaders(settings.data, settings.recipe)
        steps = []
        for index, batch in enumerate(train):
            start = time.perf_counter()
            _training_step(model, [part.to(settings.device) for part in batch])
            if index > 0:  # the first one plans and allocates
                steps.append(time.perf_counter() - start)
            if len(steps) == 5:
                break
        per_step = statistics.median(steps) if steps else 0.0
        total += per_step * (len(train) + 0.8 * len(val))  # validation: twice the samples, no backward pass
    overhead = 1.15  # the optimiser, the samples, checkpoints
    return max(1, min(settings.recipe.epochs, int(seconds / max(overhead * total, 1e-9))))


def _training_step(model: nn.Module, batch: Sequence[Tensor]) -> None:
    images, labels = batch
    torch.nn.functional.cross_entropy(model(images), labels).backward()


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


def results(settings: Settings, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Everything that was found, ready for json. All but times, memory and ``environment`` depends on the seed only."""
    return {
        "environment": environment(),
        "data": {
            "name": settings.data.name,
            "description": settings.data.description,
            "fingerprint": settings.data.fingerprint(),
            "classes": list(settings.data.classes),
            "train": len(settings.data.train),
            "val": len(settings.data.val),
            "held_out_images": len(settings.data.val.images),
            "size": settings.data.size,
            "chance": settings.data.chance,
        },
        "model": settings.model,
        "table": dict(settings.table),
        "recipe": asdict(settings.recipe),
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
            for contender, outcome in zip(settings.contenders, outcomes, strict=True)
        ],
    }
