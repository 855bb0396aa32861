"""Run the fuzzer over many numbered cases in processes of their own, and say which of them do not hold.

    python -m tests.fuzz --calls 100000 --invalid 100000 --files 20000 --seed 0 --processes 2
    python -m tests.fuzz --only calls:4711

A case is made of the seed, its kind and its number alone, so ``--only kind:number`` plays it again. A process that dies or
hangs is a fault of the case it was at; another goes on behind it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import re
import resource
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty

import numpy as np
import torch

from .judging import Refused, Wrong

KINDS = ("calls", "invalid", "files")
MEMORY = 6 << 30
"""Bytes of data that a process may have: what asks for more than a case needs is a fault."""
PATIENCE = 60.0
"""Seconds that a case may take."""
REPORT = 50


def checker(kind: str) -> Callable[[np.random.Generator], str]:
    if kind == "calls":
        from .calls import check
    elif kind == "invalid":
        from .wrong import check
    else:
        from .files import check
    return check


def one(kind: str, number: int, seed: int) -> tuple[str, str]:
    """Make and check a case: how it ended (``held``, ``refused`` or ``wrong``) and what it was."""
    rng = np.random.default_rng([seed, KINDS.index(kind), number])
    torch.manual_seed(number)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return "held", checker(kind)(rng)
        except Refused as refused:
            return "refused", str(refused)
        except Wrong as wrong:
            return "wrong", str(wrong)
        except Exception as error:  # the fuzzer's own formulas, or what no case expects
            where = traceback.extract_tb(error.__traceback__)[-1]
            said = " ".join(str(error).split())[:200]
            return "wrong", f"unexpected {type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {said}"


def in_turn(kind: str, first: int, count: int, seed: int) -> Iterator[tuple[int, str, str]]:
    for number in range(first, first + count):
        yield number, *one(kind, number, seed)


def work(kind: str, numbers: list[int], seed: int, at, results) -> None:
    """One process: cases one after another; ``at`` says which one is under way."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ["PYTHONFAULTHANDLER"] = "0"
    tally: Counter[str] = Counter()
    for number in numbers:
        at.value = number
        how, what = one(kind, number, seed)
        tally[f"{how}: {what}" if how != "wrong" else how] += 1
        if how == "wrong":
            results.put(("wrong", number, what))
        if sum(tally.values()) == 200:
            results.put(("tally", number, dict(tally)))
            tally.clear()
    results.put(("tally", numbers[-1], dict(tally)))


class Worker:
    """A process and the numbers it still has to do."""

    def __init__(self, kind: str, numbers: list[int], seed: int, context) -> None:
        self.kind, self.numbers, self.seed, self.context = kind, numbers, seed, context
        self.results = context.Queue()
        self.start()

    def start(self) -> None:
        self.at, self.last, self.since = self.context.Value("q", -1), -1, time.monotonic()
        arguments = (self.kind, self.numbers, self.seed, self.at, self.results)
        self.process = self.context.Process(target=work, args=arguments, daemon=True)
        self.process.start()

    def fault(self) -> tuple[int, str] | None:
        """The number at which the process died or hangs, with how; it is then ended."""
        if self.at.value != self.last:
            self.last, self.since = self.at.value, time.monotonic()
        if self.process.is_alive():
            if time.monotonic() - self.since < PATIENCE + 60.0 * (self.last < 0):
                return None
            self.process.kill()
            self.process.join()
            return self.last, f"hangs: longer than {PATIENCE:.0f} s"
        if self.process.exitcode == 0:
            return None
        return self.last, f"the process died with exit code {self.process.exitcode}"

    def skip(self, number: int) -> bool:
        """Go on behind a number, in a new process; whether there is anything left."""
        self.numbers = self.numbers[self.numbers.index(number) + 1 :] if number in self.numbers else []
        if self.numbers:
            self.start()
        return bool(self.numbers)


def shape_of(what: str) -> str:
    """A fault without its numbers, so that alike ones count together."""
    return re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "#", what.split(" | ")[0])[:110]


class Tally:
    """What came of all cases of one kind."""

    def __init__(self, kind: str) -> None:
        self.kind, self.counts, self.wrong = kind, Counter(), {}

    def take(self, message: tuple) -> None:
        sort, number, what = message
        if sort == "tally":
            self.counts.update({key: n for key, n in what.items() if key != "wrong"})
        else:
            self.wrong[number] = what

    def as_dict(self) -> dict:
        held = sum(n for key, n in self.counts.items() if key.startswith("held"))
        refused = sum(self.counts.values()) - held
        return {
            "cases": held + refused + len(self.wrong), "held": held, "refused": refused, "wrong": len(self.wrong),
            "sorts": dict(self.counts.most_common()), "faults": {str(n): what for n, what in sorted(self.wrong.items())},
        }  # fmt: skip

    def told(self) -> str:
        found = self.as_dict()
        lines = [f"{self.kind}: " + ", ".join(f"{found[how]:,} {how}" for how in ("cases", "held", "refused", "wrong"))]
        kinds: dict[str, list[int]] = {}
        for number, what in sorted(self.wrong.items()):
            kinds.setdefault(shape_of(what), []).append(number)
        for _, numbers in sorted(kinds.items(), key=lambda pair: -len(pair[1]))[:REPORT]:
            lines.append(f"  {len(numbers):5d} x {self.kind}:{numbers[0]}  {self.wrong[numbers[0]][:300]}")
        return "\n".join(lines)


def run(kind: str, count: int, seed: int, processes: int, first: int = 0) -> Tally:
    """All cases of one kind, shared among processes."""
    tally, context = Tally(kind), multiprocessing.get_context("spawn")
    shares = [list(range(first + i, first + count, processes)) for i in range(min(processes, count))]
    workers = [Worker(kind, share, seed, context) for share in shares]
    while workers:
        time.sleep(0.2)
        for worker in list(workers):
            ended = not worker.process.is_alive()
            while True:
                try:
                    tally.take(worker.results.get(timeout=0.5 if ended else 0.01))
                except Empty:
                    break
            if (fault := worker.fault()) is not None:
                tally.wrong[fault[0]] = fault[1]
                if not worker.skip(fault[0]):
                    workers.remove(worker)
            elif ended:
                workers.remove(worker)
    return tally


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n")[0])
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=int, default=0, metavar="N", help=f"cases of {kind}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--only", metavar="KIND:NUMBER", help="play one case again, with its traceback")
    parser.add_argument("--json", type=Path, help="where to write the counts")
    given = parser.parse_args(arguments)
    if given.only:
        kind, _, number = given.only.partition(":")
        how, what = one(kind, int(number), given.seed)
        print(f"{how}: {what}")
        return int(how == "wrong")
    counts = {kind: getattr(given, kind) for kind in KINDS if getattr(given, kind)}
    began, found = time.monotonic(), {}
    for kind, count in counts.items():
        since = time.monotonic()
        tally = run(kind, count, given.seed, given.processes, given.first)
        found[kind] = {**tally.as_dict(), "seconds": round(time.monotonic() - since)}
        print(tally.told(), flush=True)
    about = {
        "seed": given.seed, "first": given.first, "processes": given.processes, "seconds": round(time.monotonic() - began),
        "torch": torch.__version__, "python": platform.python_version(), "cpu": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip
    if given.json:
        given.json.write_text(json.dumps({**about, "kinds": found}, indent=1) + "\n")
    return int(any(kind["wrong"] for kind in found.values()))


if __name__ == "__main__":
    sys.exit(main())
