"""Patterns as sets of coordinates, written down from their papers once more, without a line of the library's own masks.

A pattern is here plain data, ``(name, arguments)`` or ``(name, members)``, from which both sides are made: the library's object
(:func:`build`), and the array of what each query sees (:func:`seen`). Coordinates may lie outside the grid: zero keys.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from regard.ops import patterns as P

Spec = tuple[str, Any]
Grid = tuple[int, ...]
COMBINED = {"union": "|", "intersection": "&"}
ROUTED = ("blocks", "tokens", "clusters")


def of_axis(value: Any, axis: int) -> Any:
    return value[axis] if isinstance(value, tuple) else value


# --------------------------------------------------------------------------------------------------------------------
# what a query sees


@lru_cache(maxsize=1 << 16)
def neighborhood(q: int, length: int, kernel: int, dilation: int, stride: int, causal: bool, border: str) -> tuple[int, ...]:
    """Generalised neighborhood attention: the nearest of each dilation group, around the leader of a stride group."""
    group = range(q % dilation, length, dilation)
    last, place = len(group) - 1, q // dilation
    if causal:
        leader = min(place // stride * stride + stride - 1, last)
        return tuple(group[u] for u in range(max(0, leader - kernel + 1), place + 1))
    leader = min(place // stride * stride + stride // 2, last)
    if border == "shift":  # the nearest in the group, the earlier of two equally near
        return tuple(group[u] for u in sorted(range(len(group)), key=lambda u: (abs(u - leader), u))[:kernel])
    window = [leader - kernel // 2 + i for i in range(kernel)]
    if border == "mask":
        window = [u for u in window if 0 <= u <= last]
    return tuple(q % dilation + u * dilation for u in window)


def window(q: int, length: int, size: int, shift: int, pad: str) -> Sequence[int]:
    full = range(math.ceil(length / size) * size if pad == "zero" else length)
    return full if length <= size else [k for k in full if (k - shift) // size == (q - shift) // size]


def halo(q: int, length: int, block: int, reach: int, border: str, stride: int) -> Sequence[int]:
    first = q * stride // block * block - reach
    around = range(first, first + block + 2 * reach)
    if border == "mask":
        return [k for k in around if 0 <= k < length]
    if border == "shift":  # moved inward as it is, or everything where it does not fit
        first = min(max(first, 0), length - len(around))
        return range(length) if len(around) >= length else range(first, first + len(around))
    return around


def along(spec: Spec, axis: int, q: int, length: int, rank: int) -> Sequence[int]:
    """Coordinates on one axis that a query at ``q`` of that axis sees."""
    name, given = spec
    mine = {key: of_axis(value, axis) for key, value in given.items()}
    if name == "dense":
        return range(length)
    if name == "neighborhood":
        return neighborhood(
            q, length, mine["kernel_size"], mine.get("dilation", 1), mine.get("stride", 1), mine.get("causal", False),
            mine.get("border", "shift"),
        )  # fmt: skip
    if name == "window":
        return window(q, length, mine["size"], mine.get("shift", 0), mine.get("pad", "mask"))
    if name == "halo":
        return halo(q, length, mine["block"], mine["halo"], mine.get("border", "zero"), mine.get("stride", 1))
    if name == "grid":
        spacing = math.ceil(length / mine["size"])
        return range(q % spacing, length, spacing)
    assert name == "axis"
    if axis != mine["axis"] % rank:
        return [q]
    return range(q + 1) if mine.get("causal", False) else range(length)


def leaves(spec: Spec) -> list[Spec]:
    name, inside = spec
    if name in COMBINED:
        return [leaf for member in inside for leaf in leaves(member)]
    if name == "per_head":
        return [leaf for member, _ in inside for leaf in leaves(member)]
    return [spec]


def is_static(spec: Spec) -> bool:
    return not any(name in ROUTED for name, _ in leaves(spec))


class Scene:
    """Where queries and keys stand: coordinates of the queries, and the key grid with a margin for zero keys."""

    def __init__(self, spec: Spec, q_grid: Grid, k_grid: Grid, start: Grid | None = None, batch: int = 1, heads: int = 1):
        self.spec, self.q_grid, self.k_grid, self.batch, self.heads = spec, q_grid, k_grid, batch, heads
        self.start = start or (0,) * len(q_grid)
        self.q = list(itertools.product(*(range(s, s + n) for s, n in zip(self.start, q_grid, strict=True))))
        self.margins = [self._margin(axis) for axis in range(len(k_grid))]
        outer = [range(-before, n + after) for n, (before, after) in zip(k_grid, self.margins, strict=True)]
        self.k = list(itertools.product(*outer))
        self.inside = np.array([all(0 <= x < n for x, n in zip(k, k_grid, strict=True)) for k in self.k])

    def _margin(self, axis: int) -> tuple[int, int]:
        low, high, n = 0, 0, self.k_grid[axis]
        if len(self.q_grid) != len(self.k_grid):
            return 0, 0
        for leaf in leaves(self.spec):
            hangs = leaf[1].get("border") == "zero" or leaf[1].get("pad") == "zero" or leaf[0] == "halo"
            if leaf[0] in ROUTED or not hangs:
                continue
            for q in range(self.start[axis], self.start[axis] + self.q_grid[axis]):
                found = along(leaf, axis, q, n, len(self.k_grid))
                low, high = max(low, -min(found, default=0)), max(high, max(found, default=0) - n + 1)
        return low, high

    def seen(self) -> np.ndarray:
        """``(1 or batch, 1 or heads, queries, keys with margins)``."""
        return self._seen(self.spec, range(self.heads))

    def _seen(self, spec: Spec, heads: Sequence[int]) -> np.ndarray:
        name, inside = spec
        if name in COMBINED:
            parts = [self._seen(member, heads) for member in inside]
            join = np.logical_or if name == "union" else np.logical_and
            return join.reduce(np.broadcast_arrays(*parts))
        if name == "per_head":
            first, parts = 0, []
            for member, count in inside:
                part = self._seen(member, range(first, first + count))
                parts.append(np.broadcast_to(part, (self.batch, count, *part.shape[2:])))
                first += count
            return np.concatenate(parts, 1)
        if name == "dense":
            return np.broadcast_to(self.inside, (1, 1, len(self.q), len(self.k)))
        if name == "causal":  # tuples compare in raster order
            return np.array([[k <= q for k in self.k] for q in self.q])[None, None] & self.inside
        if name in ROUTED:
            return self._routed(name, inside, heads) & self.inside
        rank, result = len(self.k_grid), np.ones((1, 1), dtype=bool)
        for axis, (n, (before, after)) in enumerate(zip(self.k_grid, self.margins, strict=True)):
            rows = np.zeros((self.q_grid[axis], before + n + after), dtype=bool)
            for i in range(self.q_grid[axis]):
                rows[i, [k + before for k in along(spec, axis, self.start[axis] + i, n, rank)]] = True
            result = np.kron(result, rows).astype(bool)
        return result[None, None]

    def _routed(self, name: str, given: dict[str, Any], heads: Sequence[int]) -> np.ndarray:
        result = np.zeros((self.batch, len(heads), len(self.q), len(self.k)), dtype=bool)
        for item, (place, head) in itertools.product(range(self.batch), enumerate(heads)):
            if name == "clusters":
                mine = pick(given["labels"], item, head, 1)[[flat(q, self.q_grid) for q in self.q]]
                theirs = given["labels"] if given.get("key_labels") is None else given["key_labels"]
                theirs = pick(theirs, item, head, 1)[[flat(k, self.k_grid) for k in self.k]]
                result[item, place] = mine[:, None] == theirs[None]
                continue
            block = given.get("block", 1)
            table = pick(given["table"], item, head, 2)
            of_key = np.array([number_of(k, block, self.k_grid) for k in self.k])
            for i, q in enumerate(self.q):
                result[item, place, i] = np.isin(of_key, table[number_of(q, block, self.q_grid)])
        return result


def pick(array: np.ndarray, item: int, head: int, inner: int) -> np.ndarray:
    """The part of an array ``(batch, [heads,] ...)`` with ``inner`` last axes that a batch item and head have."""
    array = array if array.ndim == inner + 2 else array[:, None]
    return array[item % array.shape[0], head % array.shape[1]]


def flat(position: Grid, grid: Grid) -> int:
    index = 0
    for p, n in zip(position, grid, strict=True):
        index = index * n + p
    return index


def number_of(position: Grid, block: Any, grid: Grid) -> int:
    """Row-major number of the block that holds a position."""
    return flat(
        tuple(p // of_axis(block, a) for a, p in enumerate(position)),
        tuple(math.ceil(n / of_axis(block, a)) for a, n in enumerate(grid)),
    )


def offset(spec: Spec, axis: int, q: int, k: int, length: int) -> int:
    """Index of a relative bias, from its middle: steps from query to key, in the pattern's own steps."""
    name, given = spec
    away = k - q
    if name == "neighborhood":
        return away // of_axis(given.get("dilation", 1), axis)
    if name == "grid":
        return away // math.ceil(length / of_axis(given["size"], axis))
    return away


# --------------------------------------------------------------------------------------------------------------------
# the library's objects

NAMES = {
    "dense": P.Dense, "causal": P.Causal, "window": P.Window, "neighborhood": P.Neighborhood, "halo": P.Halo, "grid": P.Grid,
    "axis": P.Axis, "blocks": P.Blocks, "tokens": P.Tokens, "clusters": P.Clusters,
}  # fmt: skip


def build(spec: Spec) -> P.Pattern:
    name, inside = spec
    if name in COMBINED:
        members = [build(member) for member in inside]
        result = members[0]
        for member in members[1:]:
            result = result | member if name == "union" else result & member
        return result
    if name == "per_head":
        return P.PerHead(tuple((build(member), count) for member, count in inside))
    arguments = {key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in inside.items()}
    return NAMES[name](**arguments)


def text(spec: Spec) -> str:
    """The text form of a static pattern, as a user writes it."""
    name, inside = spec
    if name in COMBINED:
        return f" {COMBINED[name]} ".join(f"({text(member)})" for member in inside)
    if name == "per_head":
        return "PerHead({" + ", ".join(f"{text(member)}: {count}" for member, count in inside) + "})"
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in inside.items())})"


# --------------------------------------------------------------------------------------------------------------------
# at random


def choose(rng: np.random.Generator, *options: Any) -> Any:
    return options[int(rng.integers(len(options)))]


def per_axis(rng: np.random.Generator, rank: int, low: int, high: int) -> int | Grid:
    """A number for all axes, or one for each."""
    if rng.random() < 0.6:
        return int(rng.integers(low, high + 1))
    return tuple(int(n) for n in rng.integers(low, high + 1, rank))


def separable(rng: np.random.Generator, rank: int, strided: bool = False) -> Spec:
    """One static pattern that is a product over the axes; with ``strided``, perhaps with fewer queries than keys."""
    name = choose(rng, "neighborhood", "neighborhood", "window", "window", "halo", "grid", "axis")
    if name == "window":
        return name, {"size": per_axis(rng, rank, 1, 5), "shift": per_axis(rng, rank, 0, 6), "pad": choose(rng, "mask", "zero")}
    if name == "grid":
        return name, {"size": per_axis(rng, rank, 1, 4)}
    if name == "axis":
        return name, {"axis": int(rng.integers(-rank, rank)), "causal": bool(rng.integers(2))}
    border = choose(rng, "shift", "mask", "zero")
    if name == "halo":
        stride = int(rng.integers(1, 3)) if strided else 1
        block = per_axis(rng, rank, 1, 4)
        block = tuple(n * stride for n in block) if isinstance(block, tuple) else block * stride
        return name, {"block": block, "halo": per_axis(rng, rank, 0, 3), "border": border, "stride": stride}
    kernel = tuple(int(n) for n in rng.integers(1, 6, rank))
    given = {"kernel_size": kernel, "dilation": per_axis(rng, rank, 1, 3), "border": border}
    if border != "zero":
        given |= {"stride": tuple(int(rng.integers(1, n + 1)) for n in kernel)}
        given |= {"causal": choose(rng, False, False, True, tuple(bool(x) for x in rng.integers(0, 2, rank)))}
    return name, given


def routed(rng: np.random.Generator, q_grid: Grid, k_grid: Grid, batch: int, heads: int, names: Sequence[str] = ROUTED) -> Spec:
    """Tables with holes, repetitions, partial blocks, and lists of nothing at all; shared or not over batch and heads."""
    name = choose(rng, *names)
    lead = [choose(rng, 1, batch), choose(rng, 1, heads)][: int(rng.integers(1, 3))]
    if name == "clusters":
        labels = rng.integers(0, 4, (*lead, math.prod(q_grid)))
        if q_grid == k_grid and rng.random() < 0.5:
            return name, {"labels": labels}
        return name, {"labels": labels, "key_labels": rng.integers(0, 4, (*lead, math.prod(k_grid)))}
    block = 1 if name == "tokens" else per_axis(rng, len(k_grid), 1, 4)
    of_q, of_k = (math.prod(math.ceil(n / of_axis(block, a)) for a, n in enumerate(grid)) for grid in (q_grid, k_grid))
    table = rng.integers(-1, of_k, (*lead, of_q, int(rng.integers(1, 5))))
    return name, {"table": table} | ({} if name == "tokens" else {"block": block})


def static(rng: np.random.Generator, rank: int, depth: int = 2) -> Spec:
    if depth == 0 or rng.random() < 0.55:
        return separable(rng, rank) if rng.random() < 0.85 else (choose(rng, "dense", "causal"), {})
    return choose(rng, *COMBINED), tuple(
        static(rng, rank, depth - 1) for _ in range(int(rng.integers(2, 4 if depth > 1 else 3)))
    )
