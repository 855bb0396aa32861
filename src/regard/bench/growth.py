"""How cost grows: time and peak memory from 14 x 14 to 224 x 224 tokens, of every operator and mixer, with the exponents.

    exponent = slope of log cost over log tokens, by least squares over the larger half of the sizes

Peak memory is that of all tensors allocated beyond the inputs, output included. A size that would exceed the budget is left
out and listed, and so are all larger ones: cost is foretold from the size before, as if it grew with the square of the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ..layers.mixers import create_mixer, list_mixers, mixer_card
from ..ops import attend
from ..ops import patterns as P
from ..ops.attention.transposed import attend_transposed
from ..ops.channel import channel_attend
from ..ops.linear.attend import linear_attend
from ..ops.tokens import route
from .cases.scope import random
from .harness import Run, interleave, short
from .usage import peak_memory

SIDES = (14, 20, 28, 40, 56, 80, 112, 160, 224)
"""Tokens per axis; the number of tokens about doubles from one to the next."""

HEADS, DIM = 4, 32
Operator = Callable[[Tensor, Tensor, Tensor], Any]


@dataclass(frozen=True)
class Budget:
    """What one run may cost: seconds and bytes; and the seconds and rounds that the timing of a size may take."""

    seconds: float = 10.0
    bytes: float = 4e9
    timing_seconds: float = 2.0
    rounds: int = 9

    def __str__(self) -> str:
        return f"{self.seconds:g} s and {self.bytes / 1e9:g} GB a run"


# --------------------------------------------------------------------------------------------------------------------
# what is measured


def _routed(q: Tensor, k: Tensor, v: Tensor) -> Any:
    """The 8 blocks of 7 x 7 keys whose means suit the mean of the block of queries best, routing included."""
    block = (7, 7)
    means = [route.summaries(t.flatten(3), block) for t in (q, k)]
    return attend(q, k, v, route.top_k(route.affinity(*means), 8, block))


def _listed(q: Tensor, k: Tensor, v: Tensor) -> Any:
    """49 keys listed for each query, anywhere: consecutive ones from a place of its own."""
    tokens = q.shape[1:-2].numel()
    start = torch.arange(tokens)[:, None] * 7919
    return attend(q, k, v, P.Tokens(((start + torch.arange(49)) % tokens)[None, None]))


def _clustered(q: Tensor, k: Tensor, v: Tensor) -> Any:
    """Clusters of about 49 tokens that lie far apart."""
    tokens = q.shape[1:-2].numel()
    return attend(q, k, v, P.Clusters(torch.arange(tokens)[None] % max(1, tokens // 49)))


def _pattern(pattern: P.Pattern) -> Operator:
    return lambda q, k, v: attend(q, k, v, pattern)


OPERATORS: dict[str, Operator] = {
    "dense": _pattern(P.Dense()),
    "causal": _pattern(P.Causal()),
    "window 7": _pattern(P.Window(7)),
    "window 7, shifted by 3": _pattern(P.Window(7, shift=3)),
    "neighborhood 7": _pattern(P.Neighborhood(7)),
    "neighborhood 7, dilation 2": _pattern(P.Neighborhood(7, dilation=2)),
    "neighborhood 13": _pattern(P.Neighborhood(13)),
    "halo 8 + 3": _pattern(P.Halo(8, 3)),
    "grid 7": _pattern(P.Grid(7)),
    "axis": _pattern(P.Axis(1)),
    "criss-cross": _pattern(P.Axis(0) | P.Axis(1)),
    "window 7 and neighborhood 7, half of the heads each": _pattern(P.PerHead(((P.Window(7), 2), (P.Neighborhood(7), 2)))),
    "blocks of 7 x 7, best 8": _routed,
    "listed tokens, 49": _listed,
    "clusters of 49": _clustered,
    "transposed, window 7": lambda q, k, v: attend_transposed(q, k, v, P.Window(7)),
    "linear": lambda q, k, v: linear_attend(q, k, v, feature="elu_plus_one", norm="sum"),
    "linear, causal": lambda q, k, v: linear_attend(q, k, v, feature="elu_plus_one", norm="sum", causal=True),
    "channel": lambda q, k, v: channel_attend(q, k, v),
}


def subjects() -> dict[str, Callable[[int], Run]]:
    """What is measured, by name: makes, for a side, what is timed. Mixers include their projections."""
    made: dict[str, Callable[[int], Run]] = {name: partial(_operator, compute) for name, compute in OPERATORS.items()}
    cards = [mixer_card(name) for name in list_mixers()]
    for card in cards:
        if card.computes:
            made[f"mixer {card.name}"] = partial(_mixer, card.name, card.options_for)
    for card in cards:
        for label, options in card.varied.items():
            made[f"mixer {card.name}, {label}"] = partial(_mixer, card.name, options)
    return made


def _operator(compute: Operator, side: int) -> Run:
    q, k, v = _inputs(side, HEADS, DIM)
    return lambda: compute(q, k, v)


def _mixer(name: str, options: Callable[[Sequence[int]], Mapping[str, Any]], side: int) -> Run:
    module = create_mixer(name, dim=HEADS * DIM, heads=HEADS, **options((side, side))).eval()
    x, *_ = _inputs(side, HEADS * DIM)
    return lambda: module(x)


@lru_cache(maxsize=2)
def _inputs(side: int, *shape: int) -> list[Tensor]:
    """Inputs that all subjects of a size share."""
    return random(1, side, side, *shape)


# --------------------------------------------------------------------------------------------------------------------
# measuring


def fitted_exponent(tokens: Sequence[float], costs: Sequence[float]) -> float | None:
    """Slope of log cost over log tokens, by least squares over the larger half of the sizes; None for fewer than two of them.

    Args:
        tokens: sizes, in any order.
        costs: of each; those of 0 do not count.
    """
    points = sorted((math.log(n), math.log(cost)) for n, cost in zip(tokens, costs, strict=True) if cost > 0)
    half = points[len(points) // 2 :]
    if len(half) < 2:
        return None
    x, y = (sum(values) / len(half) for values in zip(*half, strict=True))
    spread = sum((a - x) ** 2 for a, _ in half)
    return sum((a - x) * (b - y) for a, b in half) / spread if spread else None


def grow(
    chosen: Mapping[str, Callable[[int], Run]], sides: Sequence[int] = SIDES, budget: Budget = Budget()
) -> Iterator[list[dict[str, Any]]]:
    """Measure size by size, the subjects of a size interleaved; yields all cases so far after each size.

    Each case has ``rows`` of side, tokens, median and quartiles in milliseconds and peak bytes; ``left_out``, sides and
    reasons; and ``time_exponent`` and ``memory_exponent``.
    """
    torch.manual_seed(0)  # the mixers' weights
    peak_memory(lambda: None, torch.device("cpu"))  # the profiler wants to be first used on the main thread
    cases = {
        name: {"case": f"growth, {name}", "batch": 1, "heads": HEADS, "head_dim": DIM, "dtype": "float32",
               "budget": str(budget), "threads": torch.get_num_threads(), "rows": [], "left_out": []}
        for name in chosen
    }  # fmt: skip
    for side in sorted(sides):
        with torch.no_grad():
            _one_size(cases, chosen, side, budget)
        for case in cases.values():
            rows: list[dict[str, Any]] = case["rows"]  # type: ignore[assignment]
            tokens = [row["tokens"] for row in rows]
            case["time_exponent"] = _rounded(fitted_exponent(tokens, [row["ms"] for row in rows]))
            case["memory_exponent"] = _rounded(fitted_exponent(tokens, [row["peak_bytes"] for row in rows]))
        yield list(cases.values())


def _one_size(cases: Mapping[str, dict], chosen: Mapping[str, Callable[[int], Run]], side: int, budget: Budget) -> None:
    runs: dict[str, Run] = {}
    peaks: dict[str, int] = {}
    for name, make in chosen.items():
        case = cases[name]
        if (why := _too_much(case, side, budget)) is not None:
            case["left_out"].append({"side": side, "why": why})
            continue
        try:
            run = make(side)
            run()  # plans are made at the first call
            peaks[name] = _peak(run)
            runs[name] = run
        except Exception as problem:  # the others still count
            case["left_out"].append({"side": side, "why": short(problem)})
    times = interleave(runs, budget.rounds, budget.timing_seconds, warm=True, least=2)
    for name in runs:
        cases[name]["rows"].append({"side": side, "tokens": side**2, **times[name], "peak_bytes": peaks[name]})


def _peak(run: Run) -> int:
    """Peak memory of a run on a thread of its own: what threads keep between calls belongs to the call then."""

    def measured() -> int:
        with torch.no_grad():
            return peak_memory(run, torch.device("cpu"))

    with ThreadPoolExecutor(1) as executor:
        return executor.submit(measured).result()


def _too_much(case: Mapping[str, Any], side: int, budget: Budget) -> str | None:
    if case["left_out"]:
        return "a smaller one was left out"
    if not case["rows"]:
        return None
    last = case["rows"][-1]
    growth = (side**2 / last["tokens"]) ** 2
    if (seconds := growth * last["ms"] * 1e-3) > budget.seconds:
        return f"would take up to {seconds:.0f} s"
    if (size := growth * last["peak_bytes"]) > budget.bytes:
        return f"would hold up to {size / 1e9:.1f} GB"
    return None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
