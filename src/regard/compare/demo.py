"""The two main jobs: compare mixers on embedded photographs, or on the user's data, and write a report."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import load_data, photo_crops, photograph, to_grey
from ..files import alone_in, check_folder, read_kept, write_json
from ..train.fitting import Recipe
from .contenders import DEMO, parse_mixer, parse_mixers
from .report import write_report
from .study import Settings, compare, epochs_that_fit, fastest_threads, look

MODEL = "compact_nano"
DEMO_RECIPE = Recipe(epochs=16, learning_rate=3e-3)
DEMO_PHOTOGRAPH = "chelsea"
DEMO_QUERIES = ((0.44, 0.33), (0.82, 0.70))
COMPARE_QUERIES = ((0.5, 0.5), (0.25, 0.25))
SHOWN_SIZE = 256

Tell = Callable[[str], None]


def demo(
    out: Path = Path("regard-report"),
    *,
    epochs: int | None = None,
    minutes: float = 3.5,
    size: int = 64,
    repeats: int = 8,
    seed: int = 0,
    runs: Path = Path("regard-runs"),
    fresh: bool = False,
    device: str = "cpu",
    progress: bool = True,
    tell: Tell = lambda line: None,
) -> Path:
    """Train four small backbones that differ only in their mixer on embedded photographs, and write a report.

    Args:
        out: folder of the report.
        epochs: of each; by default 16, or as many as fit.
        minutes: training may take this long altogether; ignored if ``epochs`` is given.
        size, repeats: see :func:`regard.data.photo_crops`.
        seed: of everything random.
        runs: where runs are kept; what was stopped goes on, what is finished is not repeated.
        fresh: forget earlier runs with these settings.
        device, progress, tell: see :class:`Settings` and :func:`compare`.

    Returns:
        The path of the report.
    """
    _check_folders(out, runs)
    data = photo_crops(size, repeats=repeats, seed=seed)
    recipe = replace(DEMO_RECIPE, seed=seed, epochs=DEMO_RECIPE.epochs if epochs is None else epochs)
    settings = Settings(data, [parse_mixer(name) for name in DEMO], recipe, runs=runs, device=device)
    # kept, so that a demo that was stopped goes on with what it began
    first = settings.folder(settings.contenders[0])
    kept = first.with_suffix(".threads.json")
    found = None if fresh else read_kept(kept, _is_count, tell)
    if found is None:
        tell("timing a few steps of training, to choose how many threads and epochs")
    threads = int(found or fastest_threads(settings))
    write_json(kept, threads)
    torch.set_num_threads(min(threads, torch.get_num_threads()))
    remark = ""
    if epochs is None:
        kept = first.with_suffix(f".{minutes:g}-minutes.json")
        found = None if fresh else read_kept(kept, _is_count, tell)
        fitting = int(found or epochs_that_fit(settings, 60.0 * minutes))
        write_json(kept, fitting)
        if fitting < recipe.epochs:
            remark = f"{recipe.epochs} epochs would not fit in {minutes:g} minutes here, so each was trained for {fitting}."
            tell(remark)
            settings = replace(settings, recipe=replace(recipe, epochs=fitting))
    picture, queries = photograph(DEMO_PHOTOGRAPH), DEMO_QUERIES
    side = min(picture.shape[1:])
    top, left = (picture.shape[1] - side) // 2, (picture.shape[2] - side) // 2
    picture = picture[:, top : top + side, left : left + side]
    # twice the training size, so that the maps are finer: all of these mixers take any grid
    seen = _resized(to_grey(picture.float()).expand(3, -1, -1), 2 * size)
    return _run(settings, out, "Which attention?", remark, picture, seen, queries, fresh, progress, tell)


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
    tell: Tell = lambda line: None,
) -> Path:
    """The same on the user's data.

    Args:
        source, size, limit, bad: see :func:`regard.data.load_data`.
        mixers: see :func:`parse_mixers`.
        model: a registered backbone.
        epochs, batch_size, learning_rate: of each.
        seed, out, runs, fresh, device, workers, progress, tell: see :func:`demo` and :class:`Settings`.

    Returns:
        The path of the report.
    """
    contenders = parse_mixers(mixers)
    _check_folders(out, runs)
    recipe = Recipe(epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, seed=seed)
    data = load_data(source, size=size, limit=limit, seed=seed, bad=bad)
    # tokens of 2 x 2 pixels keep a grid worth attending to in small images
    table = {"patch_size": 2} if model.startswith("compact") and data.size < 48 else {}
    settings = Settings(data, contenders, recipe, model=model, table=table, runs=runs, device=device, workers=workers)
    picture = data.val.images.image(0)
    seen = _resized(picture.float(), data.size)
    return _run(
        settings, out, f"Which attention for {data.name}?", "", picture, seen, COMPARE_QUERIES, fresh, progress, tell
    )  # fmt: skip


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _run(
    settings: Settings,
    out: Path,
    title: str,
    remark: str,
    picture: Tensor,
    seen: Tensor,
    queries: tuple[tuple[float, float], ...],
    fresh: bool,
    progress: bool,
    tell: Tell,
) -> Path:
    if fresh:
        settings.measured.unlink(missing_ok=True)
        for contender in settings.contenders:
            with alone_in(settings.folder(contender)):
                shutil.rmtree(settings.folder(contender), ignore_errors=True)
    tell(settings.data.description)
    outcomes = compare(settings, progress=progress, tell=tell)
    looks = look(outcomes, settings.data.val.normalised(seen), queries)
    shown = _resized(picture.float(), SHOWN_SIZE).round().clamp(0, 255).to(torch.uint8)
    return write_report(out, settings, outcomes, looks, shown, queries, title=title, remark=remark)


def _check_folders(out: Path, runs: Path) -> None:
    """What is written after hours must be writable now."""
    check_folder("--out", Path(out))
    check_folder("--runs", Path(runs))


def _resized(picture: Tensor, size: int) -> Tensor:
    return F.interpolate(picture[None], (size, size), mode="bicubic", antialias=True)[0]
