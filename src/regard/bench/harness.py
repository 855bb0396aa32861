"""Timing in one process: interleaved variants, medians, quartiles and errors; results are written after each case."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import write_atomically

Run = Callable[[], Any]
FOUND = ("rows", "left_out", "time_exponent", "memory_exponent", "versions", "measured")
"""What a case holds besides its name and sizes."""


@dataclass(frozen=True)
class Variant:
    """One way to compute something.

    Args:
        run: computes it.
        error: of what ``run`` returns, against the same in float64; None for what computes something else.
        peer: whether it is one that regard should beat.
        against: the variant that its time is divided by, where it is not the first one.
        notes: further numbers of its row.
    """

    run: Run
    error: Callable[[Any], float] | None = None
    peer: bool = True
    against: str | None = None
    notes: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Contest:
    """Variants of one computation, regard's first.

    Args:
        case: its name.
        about: its sizes.
        variants: by name.
        training: whether gradients are taken.
    """

    case: str
    about: Mapping[str, object]
    variants: Mapping[str, Variant]
    training: bool = False


REST = 0.02
"""Seconds before each run on several threads: those of the run before it wait for more work, spinning, for a while."""
QUICK = 0.1
"""Seconds up to which a run is preceded by one that is not timed: caches and threads are then its own, as in any loop."""


@dataclass(frozen=True)
class Effort:
    """How long to measure: rounds, and the seconds of each variant after which it sits the later rounds out."""

    repeats: int = 11
    seconds: float = 5.0


def measure(contest: Contest, effort: Effort) -> dict[str, Any]:
    """Time the variants of a contest in turn.

    Returns:
        The case: name, sizes, threads, and a row per variant with its median and quartiles in milliseconds, the time of its
        first run (plans and compilation included), the ratio to regard's median, and its error. A variant that fails has
        the reason instead, and the others go on.
    """
    rows: dict[str, dict[str, Any]] = {}
    alive: dict[str, Run] = {}
    with torch.set_grad_enabled(contest.training):
        for name, variant in contest.variants.items():
            rows[name] = row = {"variant": name, "peer": variant.peer, **variant.notes}
            try:
                start = time.perf_counter()
                result = variant.run()
                row["first_ms"] = _ms(time.perf_counter() - start)
                row["error"] = None if variant.error is None else variant.error(result)
                del result
                alive[name] = variant.run
            except Exception as problem:  # the others still count
                row["failed"] = short(problem)
        times = interleave(alive, effort.repeats, effort.seconds, warm=True)
    ours = next(iter(contest.variants))
    for name, row in rows.items():
        row |= times.get(name, {})
        base = rows[contest.variants[name].against or ours].get("ms")
        row["ratio"] = round(row["ms"] / base, 2) if base and "ms" in row else None
    return {"case": contest.case, **contest.about, "threads": torch.get_num_threads(), "rows": list(rows.values())}


def interleave(
    variants: Mapping[str, Run], repeats: int = 15, seconds: float = 20.0, *, warm: bool = False, least: int = 3
) -> dict[str, dict[str, float | int]]:
    """Time the variants in turn, ``repeats`` rounds; one that has used up its ``seconds`` sits out those after ``least``.

    Args:
        variants: what to run, by name.
        warm: whether each has run once already.

    Returns:
        :func:`summary` of each.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for run in () if warm else variants.values():
        run()
    for _ in range(repeats):
        for name, run in variants.items():
            if len(times[name]) >= least and sum(times[name]) > seconds:
                continue
            if torch.get_num_threads() > 1:
                time.sleep(REST)
            if min(times[name], default=QUICK) < QUICK:
                run()
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: summary(values) for name, values in times.items()}


def summary(values: Sequence[float]) -> dict[str, float | int]:
    """Median and quartiles in milliseconds, of seconds."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return {"ms": _ms(median), "q1": _ms(low), "q3": _ms(high), "repeats": len(values)}


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


def short(problem: BaseException) -> str:
    """An error in a line."""
    return " ".join(f"{type(problem).__name__}: {problem}".split())[:300]


def error(result: Tensor, truth: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return float((result.detach().double() - truth).norm() / truth.norm())


def worst_error(results: Sequence[Tensor], truths: Sequence[Tensor]) -> float:
    """The largest of the relative errors of an output and its gradients."""
    return max(error(result, truth) for result, truth in zip(results, truths, strict=True))


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Run torch with ``number`` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --------------------------------------------------------------------------------------------------------------------
# where and with what


def machine() -> dict[str, object]:
    """What the numbers are measured on."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "vector": torch.backends.cpu.get_cpu_capability(),
        **versions(),
    }


def versions(packages: Sequence[str] = ()) -> dict[str, str]:
    """Versions of Python, torch, regard and of those packages that are here."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("regard", *packages):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """The name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine()


def folder(results: Path) -> Path:
    """Where the results of this kind of machine go."""
    name = re.sub(r"[^a-z0-9]+", "-", f"{processor()} {os.cpu_count()} cores".lower()).strip("-")
    return results / name


# --------------------------------------------------------------------------------------------------------------------
# files


def write(path: Path, cases: Sequence[Mapping[str, Any]], about: Mapping[str, object]) -> Path:
    """Write cases in one step, so that a killed run leaves the old file whole.

    Args:
        path: of the json file; its folder is created.
        cases: what was measured.
        about: the machine, see :func:`machine`.
    """
    return write_atomically(path, json.dumps({"machine": about, "cases": cases}, indent=1) + "\n")


class Book:
    """Results in a json file that is whole after every case: a killed run keeps what it has.

    Cases that were there stay, but for those that are measured anew.

    Args:
        path: of the file.
        packages: whose versions are kept with each case, where they are here.
        fresh: whether to begin without the cases that are there.
    """

    def __init__(self, path: Path, packages: Sequence[str] = (), *, fresh: bool = False) -> None:
        self.path, self.packages = path, packages
        self.cases: list[dict[str, Any]] = []
        if path.is_file() and not fresh:
            self.cases = json.loads(path.read_text())["cases"]

    def put(self, case: Mapping[str, Any]) -> None:
        """Add a case, or replace the one of the same name, sizes and threads, and write the file."""
        dated = {**case, "versions": versions(self.packages), "measured": datetime.now(UTC).date().isoformat()}
        names = [_name(each) for each in self.cases]
        if (name := _name(dated)) in names:
            self.cases[names.index(name)] = dated
        else:
            self.cases.append(dated)
        write(self.path, self.cases, machine())


def _name(case: Mapping[str, Any]) -> str:
    return json.dumps({key: value for key, value in case.items() if key not in FOUND}, sort_keys=True)
