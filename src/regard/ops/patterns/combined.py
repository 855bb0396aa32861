"""Unions, intersections and patterns per head, and how combinations fall into disjoint products."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from ...checks import check_integer, shown
from ...names import arguments_named
from .base import Pattern, Separable, along_axis, check_grids, fold, positional

DEEPEST = 64
"""Combinations within combinations."""
MOST_PARTS = 64
"""Disjoint parts that a combination is cut into; they may double with every member, and a mask serves as well then."""


class _Combined(Pattern):
    members: tuple[Pattern, ...]
    sign: ClassVar[str]
    operation: ClassVar[Any]
    """Of two masks."""

    def __post_init__(self):
        name = type(self).__name__
        if isinstance(self.members, (str, Pattern)) or not isinstance(self.members, Iterable):
            raise TypeError(f"{name} takes a tuple of patterns; got {shown(self.members)}")
        members = tuple(self.members)
        object.__setattr__(self, "members", members)
        if not members:
            raise ValueError(f"{name} needs at least one pattern; got none")
        for member in members:
            if not isinstance(member, Pattern):
                raise TypeError(f"{name} takes patterns; got {shown(member)}")
            if isinstance(member, PerHead):
                raise ValueError(f"{name} joins what one head sees: put it inside PerHead, not around it; got {member!r}")
        object.__setattr__(self, "depth", 1 + max(getattr(member, "depth", 0) for member in members))
        if self.depth > DEEPEST:  # type: ignore[attr-defined]  # set above
            raise ValueError(f"{name} holds combinations within combinations, more than {DEEPEST} deep")
        self.rank()

    @property
    def static(self) -> bool:  # type: ignore[override]  # a combination is as static as its members
        return all(m.static for m in self.members)

    def as_joined(self):
        return self.members, self.operation

    def rank(self):
        return _common_rank(self, self.members)

    def visible(self, q_pos, k_pos, q_grid, k_grid):
        return fold(self.operation, [m.visible(q_pos, k_pos, q_grid, k_grid) for m in self.members])

    def place(self, q):
        return max(m.place(q) for m in self.members)

    def check(self, q_grid, k_grid):
        for member in self.members:
            member.check(q_grid, k_grid)
        if not self.static and any(any(self.zero_keys(i, n, len(k_grid))) for i, n in enumerate(k_grid)):
            raise ValueError(f"zero keys cannot be combined with routed patterns: {self!r}")

    def degree(self, q_grid, k_grid=None, q_start=None):
        q_grid, k_grid, q_start = check_grids(q_grid, k_grid, q_start)
        parts = disjoint_parts(self, len(k_grid))
        if parts is None:
            return super().degree(q_grid, k_grid, q_start)
        self.check(q_grid, k_grid)
        q_start = q_start or (0,) * len(q_grid)
        total = torch.zeros(tuple(q_grid), dtype=torch.long)
        for part in parts:
            counts = torch.ones(tuple(q_grid), dtype=torch.long)
            for axis, (n, length) in enumerate(zip(q_grid, k_grid, strict=True)):
                q, k = np.arange(q_start[axis], q_start[axis] + n)[:, None], np.arange(length)[None]
                seen = np.ones((n, length), dtype=bool)
                for pattern, positive in part[axis]:
                    seen &= np.asarray(pattern.axis_visible(axis, q, k, length, len(k_grid))) == positive
                counts *= along_axis(seen.sum(1), axis, len(q_grid))
            total += counts
        return total

    def zero_keys(self, axis, length, rank):
        pairs = [m.zero_keys(axis, length, rank) for m in self.members]
        return (max(p[0] for p in pairs), max(p[1] for p in pairs))

    def extent(self, axis, length, rank):
        return max(m.extent(axis, length, rank) for m in self.members)

    def __repr__(self):
        return f" {self.sign} ".join(f"({m!r})" if isinstance(m, _Combined) else repr(m) for m in self.members)


@dataclass(frozen=True, repr=False)
class Union(_Combined):
    """Keys that any member sees, each counted once."""

    members: tuple[Pattern, ...] = positional()
    sign: ClassVar[str] = "|"
    operation = staticmethod(torch.logical_or)

    def reach(self, axis, interval, grid):
        reaches = [m.reach(axis, interval, grid) for m in self.members]
        return min(r[0] for r in reaches), max(r[1] for r in reaches)


@dataclass(frozen=True, repr=False)
class Intersection(_Combined):
    """Keys that all members see."""

    members: tuple[Pattern, ...] = positional()
    sign: ClassVar[str] = "&"
    operation = staticmethod(torch.logical_and)

    def reach(self, axis, interval, grid):
        reaches = [m.reach(axis, interval, grid) for m in self.members]
        start, stop = max(r[0] for r in reaches), min(r[1] for r in reaches)
        return start, max(start, stop)


@arguments_named("pattern")
@dataclass(frozen=True, repr=False)
class PerHead(Pattern):
    """Different patterns for consecutive groups of heads: ``PerHead({Window(7): 2, Dense(): 2})``.

    The keys and values are common to all groups.
    """

    groups: tuple[tuple[Pattern, int], ...] = positional()

    def __post_init__(self):
        groups = tuple(self.groups.items()) if isinstance(self.groups, Mapping) else self.groups
        if isinstance(groups, (str, Pattern)) or not isinstance(groups, Iterable):
            raise TypeError(f"PerHead maps patterns to numbers of heads; got {shown(self.groups)}")
        groups = tuple(groups)
        if not groups:
            raise ValueError("PerHead maps patterns to numbers of heads; got none")
        settled = []
        for group in groups:
            if not isinstance(group, (tuple, list)) or len(group) != 2 or not isinstance(group[0], Pattern):
                raise TypeError(f"PerHead maps patterns to numbers of heads; got {shown(group)}")
            if isinstance(group[0], PerHead):
                raise ValueError(f"PerHead maps patterns to numbers of heads, and holds no other PerHead; got {group[0]!r}")
            settled.append((group[0], check_integer(f"PerHead's number of heads of {group[0]!r}", group[1], 1)))
        object.__setattr__(self, "groups", tuple(settled))
        self.rank()

    @property
    def static(self) -> bool:  # type: ignore[override]  # as static as its groups
        return all(p.static for p, _ in self.groups)

    @property
    def heads(self) -> int:
        return sum(n for _, n in self.groups)

    def head_groups(self):
        return self.groups

    def rank(self):
        return _common_rank(self, [pattern for pattern, _ in self.groups])

    def place(self, q):
        return max(p.place(q) for p, _ in self.groups)

    def check(self, q_grid, k_grid):
        for pattern, _ in self.groups:
            pattern.check(q_grid, k_grid)

    def visible(self, q_pos, k_pos, q_grid, k_grid):
        masks = []
        for pattern, heads in self.groups:
            seen = pattern.visible(q_pos, k_pos, q_grid, k_grid)
            seen = seen if seen.ndim > 3 else seen[None, None]
            masks.append(seen.expand(-1, heads, *seen.shape[2:]))
        batch = max(m.shape[0] for m in masks)
        return torch.cat([m.expand(batch, *m.shape[1:]) for m in masks], 1)

    def degree(self, q_grid, k_grid=None, q_start=None):
        counts = []
        for pattern, heads in self.groups:
            each = pattern.degree(q_grid, k_grid, q_start)
            each = each if each.ndim > len(q_grid) else each[None, None]
            counts.append(each.expand(-1, heads, *q_grid))
        batch = max(c.shape[0] for c in counts)
        return torch.cat([c.expand(batch, *c.shape[1:]) for c in counts], 1)

    def reach(self, axis, interval, grid):
        reaches = [p.reach(axis, interval, grid) for p, _ in self.groups]
        return min(r[0] for r in reaches), max(r[1] for r in reaches)

    def extent(self, axis, length, rank):
        return max(p.extent(axis, length, rank) for p, _ in self.groups)

    def __repr__(self):
        return "PerHead({" + ", ".join(f"{p!r}: {n}" for p, n in self.groups) + "})"


def _common_rank(pattern: Pattern, members: Iterable[Pattern]) -> int | None:
    """The grid rank that all members which have one are made for."""
    ranks = {rank for rank in [member.rank() for member in members] if rank is not None}
    if len(ranks) > 1:
        raise ValueError(f"{pattern!r} joins patterns for grids of {' and '.join(map(str, sorted(ranks)))} axes")
    return ranks.pop() if ranks else None


class Literal(NamedTuple):
    """A separable pattern that must hold on an axis (or must not)."""

    pattern: Separable
    positive: bool


Part = tuple[frozenset[Literal], ...]
"""A product of one condition per axis: all literals of an axis hold there."""


def disjoint_parts(pattern: Pattern, rank: int) -> list[Part] | None:
    """Disjoint products whose union is ``pattern``.

    None for patterns that are not built from separable ones, or fall into more than ``MOST_PARTS``.
    """
    if (product := pattern.as_product(rank)) is not None:
        return [(frozenset({Literal(product, True)}),) * rank]
    if not isinstance(pattern, _Combined):
        return None
    members = [disjoint_parts(m, rank) for m in pattern.members]
    if any(m is None for m in members):
        return None
    result: list[Part] = members[0]  # type: ignore[assignment]  # checked above
    for parts in members[1:]:
        if isinstance(pattern, Intersection):
            result = [tuple(a | b for a, b in zip(p, q, strict=True)) for p in result for q in parts]  # type: ignore[union-attr]
        else:
            fresh = list(parts)  # type: ignore[arg-type]
            for taken in result:
                fresh = [piece for part in fresh for piece in _without(part, taken)]
                if len(fresh) > MOST_PARTS:
                    return None
            result = result + fresh
        if len(result) > MOST_PARTS:
            return None
    return result


def _without(part: Part, taken: Part) -> list[Part]:
    """``part`` minus ``taken`` as disjoint products: the first axis on which a literal of ``taken`` fails tells which."""
    pieces: list[Part] = []
    prefix = list(part)
    for axis, literals in enumerate(taken):
        for literal in sorted(literals, key=repr):
            failed = Literal(literal.pattern, not literal.positive)
            if literal not in prefix[axis]:
                if failed in prefix[axis]:  # disjoint already
                    return [*pieces, tuple(prefix)]
                pieces.append((*prefix[:axis], prefix[axis] | {failed}, *prefix[axis + 1 :]))
            prefix[axis] = prefix[axis] | {literal}
    return pieces
