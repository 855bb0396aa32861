"""Run groups of cases and keep their results."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import growth
from .backbones import backbone_cases
from .cases import CASES, Case, Scope
from .harness import FOUND, Book, Effort, folder, measure, short, threads
from .peers import PEERS

GROUPS = (*CASES, "growth")
SMOKE = Effort(repeats=3, seconds=0.0)
SMOKE_SIDES, SMOKE_BUDGET = (8, 11, 16), growth.Budget(timing_seconds=0.0, rounds=2)
_VERSIONS = tuple(name for name, peer in PEERS.items() if peer.requirements)

Tell = Callable[[str], None]


def bench_operators(
    chosen: Sequence[str], results: Path, *, scope: Scope = Scope(), threads_list: Sequence[int] = (1, 2),
    effort: Effort = Effort(), budget: growth.Budget = growth.Budget(), minutes: float = float("inf"), fresh: bool = False,
    tell: Tell = print,
) -> Path:  # fmt: skip
    """Measure groups of operators; ``operators.json`` and ``growth.json`` are written after each case.

    Args:
        chosen: some of :data:`GROUPS`; all if empty.
        results: the folder of all machines' results.
        scope: sizes and peers.
        threads_list: numbers of threads; ``growth`` takes the first.
        effort: rounds and seconds per case.
        budget: of growth.
        minutes: cases that have not begun by then are left for another time.
        fresh: whether to forget what was measured before, else only what is measured anew is replaced.
        tell: is told each case.

    Returns:
        The folder of this machine.

    Raises:
        ValueError: an unknown group.
    """
    if unknown := [name for name in chosen if name not in GROUPS]:
        raise ValueError(f"unknown cases {', '.join(map(repr, unknown))}; there are {', '.join(GROUPS)}")
    where, end = folder(results), time.perf_counter() + 60 * minutes
    effort = SMOKE if scope.smoke else effort
    groups = [name for name in GROUPS if not chosen or name in chosen]
    if groups != ["growth"]:
        book = Book(where / "operators.json", _VERSIONS, fresh=fresh)
        for name in groups:
            for case in CASES[name](scope) if name in CASES else ():
                _run(case, book, effort, threads_list, end, tell)
    if "growth" in groups:
        _grow(Book(where / "growth.json", fresh=fresh), scope, threads_list[0], budget, end, tell)
    return where


def bench_backbones(
    chosen: Sequence[str], results: Path, *, scope: Scope = Scope(), threads_list: Sequence[int] = (1, 2),
    effort: Effort = Effort(), minutes: float = float("inf"), fresh: bool = False, tell: Tell = print,
) -> Path:  # fmt: skip
    """Measure backbones; ``models.json`` is written after each case. Arguments as for :func:`bench_operators`."""
    where, end = folder(results), time.perf_counter() + 60 * minutes
    book = Book(where / "models.json", _VERSIONS, fresh=fresh)
    for case in backbone_cases(scope, chosen):
        _run(case, book, SMOKE if scope.smoke else effort, threads_list, end, tell)
    return where


def _run(case: Case, book: Book, effort: Effort, threads_list: Sequence[int], end: float, tell: Tell) -> None:
    for number in threads_list:
        if time.perf_counter() > end:
            tell("a case was left out: no time is left")
            continue
        with threads(number):
            try:
                made = case()
                found = made if isinstance(made, dict) else measure(made, effort)
            except Exception as problem:  # the next cases still count
                tell(f"a case failed: {short(problem)}")
                continue
        book.put(found)
        tell(shown(found))


def _grow(book: Book, scope: Scope, number: int, budget: growth.Budget, end: float, tell: Tell) -> None:
    sides = SMOKE_SIDES if scope.smoke else growth.SIDES
    with threads(number):
        for cases in growth.grow(growth.subjects(), sides, SMOKE_BUDGET if scope.smoke else budget):
            for case in cases:
                book.put(case)
            tell(f"growth: {max((row['side'] for case in cases for row in case['rows']), default=0)} x the same measured")
            if time.perf_counter() > end:
                tell("larger sizes were left out: no time is left")
                return


def shown(case: Mapping[str, Any]) -> str:
    """A case as a few lines."""
    sizes = ", ".join(f"{key} {value}" for key, value in case.items() if key not in ("case", *FOUND))
    lines = [f"{case['case']}: {sizes}"]
    for row in case["rows"]:
        if "ms" not in row:
            lines.append(f"  {row['variant']:<34}{row.get('failed') or str(row.get('extra_mb')) + ' MB'}")
            continue
        error = "" if row.get("error") is None else f"   error {row['error']:.1e}"
        quartiles = f"({row['q1']:.2f} to {row['q3']:.2f})"
        lines.append(f"  {row['variant']:<34}{row['ms']:>11.2f} ms {quartiles}   x{row['ratio']}{error}")
    return "\n".join(lines)
