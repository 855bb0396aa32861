"""Run a study and write its report, as ``regard compare`` does on the user's data."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import load_data
from ..files import alone_in, check_folder
from ..train.fitting import Recipe
from ..train.telling import Tell
from .contenders import parse_mixers
from .report import write_report
from .study import Study, look, silent

MODEL = "compact_nano"
QUERIES = ((0.5, 0.5), (0.25, 0.25))
SHOWN_SIZE = 256


def compare_on(
    source: str | Path,
    mixers: str,
    *,
    model: str = MODEL,
    epochs: int = 10,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    size: int | None = None,
    limit: int | None = None,
    bad: str = "error",
    seed: int = 0,
    out: Path = Path("regard-report"),
    runs: Path = Path("regard-runs"),
    fresh: bool = False,
    device: str = "cpu",
    workers: int = 0,
    progress: bool = True,
    tell: Tell = silent,
) -> Path:
    """Train and compare mixers on the user's data, and write a report.

    Args:
        source, size, limit, bad: see :func:`regard.data.load_data`.
        mixers: see :func:`parse_mixers`.
        model: a registered backbone.
        epochs, batch_size, learning_rate: of each.
        seed: of everything random.
        out: folder of the report.
        runs, progress, tell: see :meth:`Study.run`.
        fresh: forget earlier runs with these settings.
        device, workers: see :class:`Study`.

    Returns:
        The path of the report.
    """
    chosen = parse_mixers(mixers)
    check_folders(out, runs)
    recipe = Recipe(epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, seed=seed)
    data = load_data(source, size=size, limit=limit, seed=seed, bad=bad)
    # tokens of 2 x 2 pixels keep a grid worth attending to in small images
    table = {"patch_size": 2} if model.startswith("compact") and data.size < 48 else {}
    study = Study(data, chosen, recipe, model=model, table=table, device=device, workers=workers)
    picture = data.val.images.image(0)
    looked = Looked(picture, resized(picture.float(), data.size), QUERIES)
    title = f"Which attention for {data.name}?"
    return run_and_report(study, runs, out, looked, title=title, fresh=fresh, progress=progress, tell=tell)


class Looked(NamedTuple):
    """The image whose attention maps a report shows.

    Attributes:
        picture: ``(3, height, width)``, as it is shown.
        seen: as the models see it, before it is normalised.
        queries: places as fractions of height and width.
    """

    picture: Tensor
    seen: Tensor
    queries: tuple[tuple[float, float], ...]


def run_and_report(
    study: Study,
    runs: Path,
    out: Path,
    looked: Looked,
    *,
    title: str,
    remark: str = "",
    fresh: bool = False,
    progress: bool = True,
    tell: Tell = silent,
) -> Path:
    """Run a study in ``runs`` and write its report into ``out``; returns the path of the report."""
    if fresh:
        study.measured(runs).unlink(missing_ok=True)
        for mixer in study.mixers:
            with alone_in(study.folder(runs, mixer)):
                shutil.rmtree(study.folder(runs, mixer), ignore_errors=True)
    tell(study.data.description)
    outcomes = study.run(runs, progress=progress, tell=tell)
    looks = look(outcomes, study.data.val.normalised(looked.seen), looked.queries)
    shown = resized(looked.picture.float(), SHOWN_SIZE).round().clamp(0, 255).to(torch.uint8)
    return write_report(out, study, outcomes, looks, shown, looked.queries, title=title, remark=remark)


def check_folders(out: Path, runs: Path) -> None:
    """What is written after hours must be writable now."""
    check_folder("--out", Path(out))
    check_folder("--runs", Path(runs))


def resized(picture: Tensor, size: int) -> Tensor:
    """A picture ``(3, height, width)`` as a square of that size."""
    return F.interpolate(picture[None], (size, size), mode="bicubic", antialias=True)[0]
