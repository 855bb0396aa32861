"""Attention from layer to layer: what rollout, flow and relevance have in common.

The maps of a model are put in order as steps; a step takes what its queries have to the keys they attend to:

    r  ->  a r + b r A        for row vectors r over the cells of the grid and the tokens without a place

It never makes a matrix of its own: the rows of A are computed a few at a time. Between steps of different resolution each cell
is a window of the finer grid, whose mass it shares out evenly. Layers that were not captured (convolutions, MLPs) are taken to
leave every token where it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_integer, check_number, shown
from .captured import CHUNK, Map, check_map, plain
from .places import coarser, pixel_footprint

Reduce = Callable[[Tensor, Tensor | None], Tensor]
"""Weights ``(batch, heads, rows, keys)``, and their gradients where asked for, to ``(batch, rows, keys)``."""


@dataclass(frozen=True, eq=False)
class Shares:
    """What each of some queries has of the cells of a grid and of the tokens without a place.

    Attributes:
        cells: ``(batch, rows, *grid)``.
        outside: ``(batch, rows, tokens)``.
        image_size: of the model's input, where it was an image.
        reduction: pixels per cell side, where it is known.
    """

    cells: Tensor
    outside: Tensor
    image_size: tuple[int, int] | None = None
    reduction: int | None = None

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(self.cells.shape[2:])

    def on_image(self, image_size: Sequence[int] | None = None) -> Tensor:
        """``(batch, rows, height, width)``: every pixel an equal part of what its cell has.

        Raises:
            ValueError: no image, or a grid that is none.
        """
        size = image_size or self.image_size
        if size is None or len(self.grid) != 2:
            raise ValueError(f"a map needs two axes and an image size; got the grid {self.grid} and {size}")
        return pixel_footprint(self.grid, size, self.reduction).spread(self.cells.unsqueeze(1)).squeeze(1)


@dataclass(frozen=True, eq=False)
class Step:
    """The attentions of one run of a module: those of the grid (several where they stand side by side) and of other tokens."""

    name: str
    inner: tuple[Map, ...]
    outer: tuple[Map, ...]

    @property
    def grid(self) -> tuple[int, ...]:
        """The cells of its queries, or of its keys where no query has a place."""
        for found in self.inner:
            assert found.row_places is not None  # that is what makes it one of these
            return found.row_places.grid
        grids = [where.grid for found in self.outer for where in found.places if where is not None]
        if not grids:
            raise ValueError(f"neither queries nor keys of {self.name!r} have a place")
        return grids[0]

    @property
    def key_grid(self) -> tuple[int, ...]:
        """The cells of its keys: finer than those of the queries where it reduces the grid."""
        return next((at.grid for found in self.inner for at in found.places if at is not None), self.grid)

    @property
    def outside(self) -> int:
        """How many tokens without a place take part."""
        return max(_outside(found) for found in (*self.inner, *self.outer))


def steps_of(maps: Iterable[Map]) -> list[Step]:
    """The attentions of a model, in order.

    Raises:
        ValueError: none; only some of the queries captured; an operator that is no attention but moves things between places;
            several attentions in one run of a module of which it is not known how they belong together.
    """
    runs: dict[int, list[Map]] = {}
    if not isinstance(maps, Iterable):
        raise TypeError(f"maps must be the maps of a capture; got {shown(maps)}")
    for found in maps:
        check_map(found)
        if found.kind in ("channel", "mixture"):
            continue  # they move nothing between places
        if found.kind != "attention":
            raise ValueError(
                f"{found.name!r} moves values by {found.kind!r}, whose weights do not sum to one: to leave it out, as if "
                f"tokens stayed where they are, capture(model, kinds='attention')"
            )
        if len(found.rows) != math.prod(found.grid):
            raise ValueError(
                f"all {math.prod(found.grid)} queries of {found.name!r} are needed; {len(found.rows)} were captured"
            )
        runs.setdefault(found.visit, []).append(found)
    if not runs:
        raise ValueError("no attention was captured")
    return [step for run in runs.values() for step in _steps_of_run(run)]


def _steps_of_run(run: list[Map]) -> list[Step]:
    inner = [found for found in run if found.row_places is not None]
    outer = [found for found in run if found.row_places is None]
    name = run[0].name
    if len(inner) < 2 or run[0].order == "parallel":
        return [Step(name, tuple(inner), tuple(outer))]
    if run[0].order == "sequence":
        turns = [run[0:0]]
        for found in run:  # the tokens outside the grid come after those of the grid
            turns.append([found]) if found.row_places is not None else turns[-1].append(found)
        return [step for turn in turns if turn for step in _steps_of_run(turn)]
    if len({found.q_key for found in inner}) == 1 and inner[0].q_key is not None:
        return [Step(name, tuple(inner), tuple(outer))]
    raise ValueError(
        f"{name!r} attends {len(inner)} times with different queries, and how its results are put together is not known: "
        f"leave it out with layers="
    )


def _outside(found: Map) -> int:
    keys = sum(grid[0] for grid, where in zip(found.k_grids, found.places, strict=True) if where is None)
    return max(keys, found.grid[0] if found.row_places is None else 0)


def walk(
    steps: Sequence[Step], shares: Shares, reduce: Reduce, *, stay: float, move: float, normalise: bool, gradients: bool = False
) -> Shares:
    """Take shares from the last step to the first: ``r -> stay r + move r A`` at each.

    Args:
        steps: from first to last.
        shares: on the grid of the last step.
        reduce: makes of the weights of all heads those of A.
        stay, move: factors on what stays and on what moves.
        normalise: whether each row of ``stay I + move A`` is divided by its sum.
        gradients: whether ``reduce`` gets gradients.

    Raises:
        ValueError: a grid that is no window of the one before; tokens without a place whose number changes.
    """
    for step in reversed(steps):
        shares = _taken(step, shares_on(shares, step), reduce, stay, move, normalise, gradients)
    return shares


def shares_on(shares: Shares, step: Step) -> Shares:
    """Shares on the grid of a step that comes before."""
    cells, outside = shares.cells, shares.outside
    if shares.grid != step.grid:
        try:
            relation = coarser(step.grid, shares.grid)
        except ValueError as error:
            raise ValueError(f"there is no way back from the grid {shares.grid} to that of {step.name!r}: {error}") from None
        cells = relation.spread(cells.unsqueeze(1)).squeeze(1)
    if step.outside and outside.shape[-1] != step.outside:
        if outside.shape[-1]:
            raise ValueError(f"{step.name!r} has {step.outside} tokens without a place, later layers {outside.shape[-1]}")
        outside = cells.new_zeros(*cells.shape[:2], step.outside)
    (first, *_) = (*step.inner, *step.outer)
    return Shares(cells, outside, first.image_size, first.reduction)


def _taken(step: Step, shares: Shares, reduce: Reduce, stay: float, move: float, normalise: bool, gradients: bool) -> Shares:
    cells = shares.cells.new_zeros(*shares.cells.shape[:2], *step.key_grid)
    outside = torch.zeros_like(shares.outside)
    if step.inner:
        where = step.inner[0].row_places
        assert where is not None  # that is what makes it one of these
        tokens = where.collect(shares.cells, step.inner[0].grid).flatten(2)
        before = Shares(cells, outside)
        staying, moved, apart = _sent(step.inner, tokens, before, reduce, stay, move, normalise, gradients)
        stayed = where.spread(staying.unflatten(-1, step.inner[0].grid).unsqueeze(1))
        if step.key_grid != step.grid:
            stayed = coarser(step.key_grid, step.grid).spread(stayed)
        cells, outside = moved + stayed.squeeze(1), outside + apart
    else:
        cells = cells + shares.cells
    if step.outer:
        before = Shares(cells, outside)
        staying, moved, apart = _sent(step.outer, shares.outside, before, reduce, stay, move, normalise, gradients)
        cells, outside = cells + moved, outside + apart + staying
    else:
        outside = outside + shares.outside
    return Shares(cells, outside, shares.image_size, shares.reduction)


def _sent(
    maps: Sequence[Map],
    tokens: Tensor,
    before: Shares,
    reduce: Reduce,
    stay: float,
    move: float,
    normalise: bool,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What stays with the tokens ``(batch, rows, tokens)``, and what they send: to cells and other tokens as in ``before``.

    Attentions side by side count by their heads.
    """
    heads = sum(found.heads for found in maps)
    chunk = max(1, CHUNK // sum(found.batch * found.heads * sum(map(math.prod, found.k_grids)) for found in maps))
    staying = torch.zeros_like(tokens)
    received = [[tokens.new_zeros(*tokens.shape[:2], math.prod(grid)) for grid in found.k_grids] for found in maps]
    for pieces in zip(*(found.stream(chunk, gradients=gradients) for found in maps), strict=True):
        part = pieces[0][0]
        rows = [
            [
                reduce(w.flatten(3), None if slopes is None else slopes[i].flatten(3)).to(tokens.dtype) * (found.heads / heads)
                for i, w in enumerate(weights)
            ]
            for found, (_, weights, slopes) in zip(maps, pieces, strict=True)
        ]
        held = tokens[:, :, part]
        if normalise:
            masses = [_mass(row, found, i) for found, each in zip(maps, rows, strict=True) for i, row in enumerate(each)]
            moving = torch.stack(masses).sum(0)
            held = held / (stay + move * moving)[:, None].clamp(min=torch.finfo(tokens.dtype).tiny)
        staying[:, :, part] = stay * held
        for taken, each in zip(received, rows, strict=True):
            for number, row in enumerate(each):
                taken[number] += move * (held @ row)
    cells, outside = torch.zeros_like(before.cells), torch.zeros_like(before.outside)
    for found, taken in zip(maps, received, strict=True):
        moved, apart = _placed(found, taken, before)
        cells, outside = cells + moved, outside + apart
    return staying, cells, outside


def _mass(rows: Tensor, found: Map, source: int) -> Tensor:
    """How much of each row ``(batch, rows, keys)`` goes to keys that exist, on the grid or without a place."""
    where = found.places[source]
    return (
        rows.sum(-1)
        if where is None
        else where.spread(rows.unflatten(-1, found.k_grids[source])[:, None]).flatten(3).sum(-1)[:, 0]
    )


def _placed(found: Map, taken: Sequence[Tensor], shares: Shares) -> tuple[Tensor, Tensor]:
    """What the keys of an attention got, by cells and by tokens without a place."""
    cells, apart = torch.zeros_like(shares.cells), []
    for value, k_grid, where in zip(taken, found.k_grids, found.places, strict=True):
        if where is None:
            apart.append(value)
        elif where.grid != shares.grid:
            raise ValueError(f"the keys of {found.name!r} lie on several grids, {where.grid} and {shares.grid}")
        else:
            cells = cells + where.spread(value.unflatten(-1, k_grid).unsqueeze(1)).squeeze(1)
    outside = torch.cat(apart, -1) if apart else torch.zeros_like(shares.outside)
    if outside.shape != shares.outside.shape:
        raise ValueError(
            f"{found.name!r} attends to {outside.shape[-1]} tokens without a place where {shares.outside.shape[-1]} are known"
        )
    return cells, outside


def beginning(steps: Sequence[Step], start: object, batch: int, dtype: torch.dtype, device: torch.device) -> Shares:
    """Shares of the tokens that a model's answer is read from: all of one row.

    Args:
        steps: the attentions, from first to last.
        start: ``"class"``, the first token without a place; ``"mean"``, all cells alike; coordinates on the last grid, whole
            numbers or fractions of it; None for ``"class"`` where there is one and ``"mean"`` otherwise.
        batch, dtype, device: of the result.

    Raises:
        ValueError: another start; a class token where there is none; coordinates outside the grid.
    """
    last = steps[-1]
    grid, count = last.grid, last.outside
    cells, outside = (torch.zeros(batch, 1, *shape, dtype=dtype, device=device) for shape in (grid, (count,)))
    if start is None:
        start = "class" if last.outer else "mean"
    start = plain("start", start)
    given = repr(start) if isinstance(start, str) else shown(start)
    if not isinstance(start, (str, Sequence)):
        raise ValueError(f"start must be 'class', 'mean' or coordinates on the last grid {grid}; got {given}")
    if start == "mean":
        cells += 1.0 / math.prod(grid)
    elif start == "class":
        if not count:
            raise ValueError(f"there is no token without a place in {last.name!r}: start from 'mean' or from coordinates")
        outside[..., 0] = 1.0
    elif not isinstance(start, (str, bytes)) and len(start) == len(grid):
        place = [
            math.floor(check_number("start", x) * n) if isinstance(x, float) else check_integer("start", x, None)
            for x, n in zip(start, grid, strict=True)
        ]
        if not all(0 <= x < n for x, n in zip(place, grid, strict=True)):
            raise ValueError(f"start must lie inside the last grid {grid}; got {start}")
        index = torch.tensor(place, device=device)
        cells[:, 0].index_put_((torch.arange(batch, device=device), *index), torch.ones((), dtype=dtype, device=device))
    else:
        raise ValueError(f"start must be 'class', 'mean' or coordinates on the last grid {grid}; got {given}")
    return Shares(cells, outside)
