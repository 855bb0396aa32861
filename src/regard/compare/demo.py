"""Compare mixers on embedded photographs within some minutes, and write a report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ..bench.harness import threads
from ..data import photo_crops, photograph, to_grey
from ..files import read_kept, write_json
from ..train.fitting import Recipe
from ..train.telling import Tell
from .budget import epochs_that_fit, fastest_threads
from .contenders import DEMO, parse_mixer
from .running import Looked, check_folders, resized, run_and_report
from .study import Study, silent

DEMO_RECIPE = Recipe(epochs=16, learning_rate=3e-3)
DEMO_PHOTOGRAPH = "chelsea"
DEMO_QUERIES = ((0.44, 0.33), (0.82, 0.70))


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
    tell: Tell = silent,
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
        device, progress, tell: see :class:`Study`.

    Returns:
        The path of the report.
    """
    check_folders(out, runs)
    data = photo_crops(size, repeats=repeats, seed=seed)
    recipe = replace(DEMO_RECIPE, seed=seed, epochs=DEMO_RECIPE.epochs if epochs is None else epochs)
    study = Study(data, [parse_mixer(name) for name in DEMO], recipe, device=device)
    first = study.folder(runs, study.mixers[0])

    def choose_threads() -> int:
        tell("timing a few steps of training, to choose how many threads and epochs")
        return fastest_threads(study)

    chosen = _kept_choice(first.with_suffix(".threads.json"), choose_threads, fresh, tell)
    with threads(min(chosen, torch.get_num_threads())):
        remark = ""
        if epochs is None:
            kept = first.with_suffix(f".{minutes:g}-minutes.json")
            fitting = _kept_choice(kept, lambda: epochs_that_fit(study, 60.0 * minutes), fresh, tell)
            if fitting < recipe.epochs:
                remark = f"{recipe.epochs} epochs would not fit in {minutes:g} minutes here, so each was trained for {fitting}."
                tell(remark)
                study = replace(study, recipe=replace(recipe, epochs=fitting))
        looked = _photograph(2 * size)  # finer maps than those of the training size: all of these mixers take any grid
        return run_and_report(
            study, runs, out, looked, title="Which attention?", remark=remark, fresh=fresh, progress=progress, tell=tell
        )  # fmt: skip


def _photograph(size: int) -> Looked:
    """The middle of the photograph, which the models see in grey at that size."""
    picture = photograph(DEMO_PHOTOGRAPH)
    side = min(picture.shape[1:])
    top, left = (picture.shape[1] - side) // 2, (picture.shape[2] - side) // 2
    picture = picture[:, top : top + side, left : left + side]
    return Looked(picture, resized(to_grey(picture.float()).expand(3, -1, -1), size), DEMO_QUERIES)


def _kept_choice(kept: Path, choose: Callable[[], int], fresh: bool, tell: Tell) -> int:
    """A number that is chosen once and kept, so that a stopped demo goes on with the same one."""
    number = int((None if fresh else read_kept(kept, _is_count, tell)) or choose())
    write_json(kept, number)
    return number


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
