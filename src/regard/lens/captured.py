"""What a capture holds: the weights of each attention, stored or computed when asked for."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import FLOATS, INTEGERS, check_integer, check_tensor, shown
from ..ops.patterns import Pattern
from .kept import Kept
from .places import Cells, Reduced, Where

CHUNK = 1 << 24
"""Weights computed at once."""


@dataclass
class Backward:
    """Whether a backward pass has reached any attention of a capture."""

    seen: bool = False


@dataclass
class Arrival:
    """The derivative by the output of an attention, once a backward pass has been there."""

    backward: Backward
    gradient: Tensor | None = None

    def arrive(self, gradient: Tensor) -> None:
        self.gradient, self.backward.seen = gradient, True


@dataclass(frozen=True, eq=False)
class Map:
    """The weights of one attention.

    Attributes:
        name: path of the module that attended.
        call: how many attentions (or uses of another operator of this kind) this module had computed before.
        grid: the query grid.
        rows: row-major indices of the chosen queries on it.
        patterns: one per source.
        k_grids: the key grid of each source.
        places: for each source the cells that its keys stand for; None for tokens that have no place (class tokens, latents).
        row_places: those of the queries.
        kind: ``"attention"``, or another operator: ``"channel"``, ``"kernel"``, ``"outlook"``, ``"transposed"``, ``"mixture"``.
        image_size: rows and columns of the image that the model was given, where it was given one.
        reduction: pixels per token side, where the model tells it.
        lossy: whether a sink or zero keys outside the grid take a share of each row.
        visit: number of the run of the module; attentions of one run belong together.
        order: whether several attentions of one run follow each other (``"sequence"``) or stand beside each other
            (``"parallel"``); None where that is not known.
    """

    name: str
    call: int
    grid: tuple[int, ...]
    rows: tuple[int, ...]
    patterns: tuple[Pattern, ...]
    k_grids: tuple[tuple[int, ...], ...]
    places: tuple[Where | None, ...]
    row_places: Cells | Reduced | None
    kind: str = "attention"
    image_size: tuple[int, int] | None = None
    reduction: int | None = None
    lossy: bool = False
    visit: int = 0
    order: str | None = None
    q_key: object = None
    """What tells the queries of one attention from those of another."""
    limit: int = 2 << 30
    _kept: Kept | None = field(default=None, repr=False)
    _stored: tuple[Tensor, ...] | None = field(default=None, repr=False)
    _arrival: Arrival | None = field(default=None, repr=False)

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """One per source, ``(batch, heads, rows, *k_grid)``.

        A row sums to one over all sources, the sink and zero keys outside the grid.

        Raises:
            ValueError: weights beyond the limit, where they were not computed yet.
        """
        if self._stored is not None:
            return self._stored
        return self._whole(lambda weights, _: weights, gradients=False)

    @property
    def keys(self) -> tuple[Tensor, ...]:
        """What queries were compared with, one per source, ``(batch, *k_grid, heads, head_dim)``: with their bias, not scaled.

        Raises:
            ValueError: the capture was not ``lazy``; another operator, or an attention that showed only its weights.
        """
        if self._kept is None:
            raise ValueError(f"keys of {self.name!r} were not kept: capture(model, lazy=True)")
        return tuple(k.unflatten(1, grid) for k, grid in zip(self._kept.keys(), self.k_grids, strict=True))

    @property
    def gradients(self) -> tuple[Tensor, ...]:
        """The derivatives by the weights, of whatever ``backward()`` was of; shaped as :attr:`weights`.

        They are 0 where the backward pass went past an attention: its output has no part in the answer.

        Raises:
            ValueError: the capture was not asked for gradients, or no backward pass has reached any of its attentions;
                gradients beyond the limit.
        """
        return self._whole(lambda _, gradients: gradients, gradients=True)

    def stream(
        self, chunk: int | None = None, *, gradients: bool = False
    ) -> Iterator[tuple[slice, list[Tensor], list[Tensor] | None]]:
        """Weights, and gradients where asked for, of a few chosen queries at a time.

        Args:
            chunk: how many; by default what makes about 16 million weights.
            gradients: also those.

        Yields:
            Which of the chosen queries, the weights of each source and their gradients, ``(batch, heads, queries, *k_grid)``.
        """
        arrived = self._gradient() if gradients else None  # None also where nothing came
        keys = sum(map(math.prod, self.k_grids))
        kept = self._kept
        if kept is None:
            assert self._stored is not None  # one of both is there
            each = self._stored[0].shape[0] * self._stored[0].shape[1] * keys
        else:
            each = kept.batch * kept.heads * keys
        chunk = chunk or max(1, CHUNK // each)
        for start in range(0, len(self.rows), chunk):
            part = slice(start, min(start + chunk, len(self.rows)))
            if self._stored is not None:
                weights = [w[:, :, part] for w in self._stored]
            else:
                assert kept is not None  # one of both is there
                weights = self._shaped(kept.weights(self._index(part)))
            found = None
            if arrived is not None:
                assert kept is not None  # gradients were asked for, so that it was kept
                found = self._shaped(kept.gradients(self._index(part), arrived))
            elif gradients:
                found = [torch.zeros_like(w) for w in weights]
            yield part, weights, found

    @property
    def batch(self) -> int:
        return self._kept.batch if self._kept is not None else self.weights[0].shape[0]

    @property
    def heads(self) -> int:
        return self._kept.heads if self._kept is not None else self.weights[0].shape[1]

    @property
    def pattern(self) -> Pattern:
        """The pattern of the first source."""
        return self.patterns[0]

    def _gradient(self) -> Tensor | None:
        if self._arrival is None:
            raise ValueError(f"gradients of {self.name!r} were not asked for: capture(model, gradients=True)")
        if not self._arrival.backward.seen:
            raise ValueError(
                f"no backward pass has reached the attention of {self.name!r}, or of any other layer: call backward() on "
                "something that depends on it, with gradients enabled and something before it that requires them"
            )
        return self._arrival.gradient

    def _index(self, part: slice) -> Tensor:
        assert self._kept is not None  # the callers checked
        return torch.tensor(self.rows[part], device=self._kept.device)

    def _shaped(self, found: Sequence[Tensor]) -> list[Tensor]:
        return [w.unflatten(-1, grid) for w, grid in zip(found, self.k_grids, strict=True)]

    def _whole(self, choose: Callable, gradients: bool) -> tuple[Tensor, ...]:
        if self._kept is not None:
            check_limit(self.name, len(self.rows), needed_bytes(self._kept, len(self.rows), self.k_grids), 0, self.limit)
        chunks = [choose(weights, found) for _, weights, found in self.stream(gradients=gradients)]
        return tuple(torch.cat(parts, 2) for parts in zip(*chunks, strict=True))

    def __repr__(self) -> str:
        shapes = ", ".join(f"{p!r} {grid}" for p, grid in zip(self.patterns, self.k_grids, strict=True))
        kind = "" if self.kind == "attention" else f"{self.kind}, "
        return f"Map({self.name!r}, {kind}call={self.call}, grid={self.grid}, rows={len(self.rows)}, {shapes})"


NOTHING = "no attention was captured: the model did not run inside, `layers` names none of it, or `rows` fit no grid of it"


class Maps(Sequence[Map]):
    """What :func:`capture` recorded, in order: ``maps[0]``, ``maps["stages.0.mixer"]``, ``maps["stages.0.mixer", 1]``."""

    def __init__(self) -> None:
        self._maps: list[Map] = []

    def append(self, found: Map) -> None:
        self._maps.append(found)

    def __len__(self) -> int:
        return len(self._maps)

    def __iter__(self) -> Iterator[Map]:
        return iter(self._maps)

    def __getitem__(self, key):
        """A map by its position, or by the name of its module and the number of the call (0 by default).

        Where a module also uses another operator, its attention is meant.
        """
        if isinstance(key, slice):
            return self._maps[key]
        if isinstance(key, int):
            if not -len(self) <= key < len(self):
                raise IndexError(f"no attention {key} was captured; there are {len(self)}" if self._maps else NOTHING)
            return self._maps[key]
        name, call = key if isinstance(key, tuple) else (key, 0)
        fitting = [found for found in self._maps if (found.name, found.call) == (name, call)]
        if fitting:
            return min(fitting, key=lambda found: found.kind != "attention")
        names = list(dict.fromkeys(m.name for m in self._maps))
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names
        raise KeyError(f"no attention {name!r}, call {call}, was captured; there are {', '.join(near) or 'none'}")

    def __repr__(self) -> str:
        return "\n".join(map(repr, self._maps)) or "Maps()"


def check_map(found: object) -> None:
    """Raise ``TypeError`` for anything but one attention of a capture."""
    if not isinstance(found, Map):
        raise TypeError(f"found must be one attention of a capture, such as maps[0]; got {shown(found)}")


def plain(name: str, value: Any) -> Any:
    """Numbers that stand in a tensor or an array, as lists; anything else as it is."""
    if isinstance(value, Tensor):
        value = check_tensor(name, value, (*INTEGERS, *FLOATS))
        if value.is_meta:
            raise ValueError(f"{name} must hold numbers; got {shown(value)}")
    return value.tolist() if isinstance(value, (Tensor, np.ndarray)) else value


def check_bytes(limit: object) -> int:
    """Check a limit of bytes."""
    return check_integer("limit", limit, 0, 2**63 - 1)


def needed_bytes(kept: Kept, rows: int, k_grids: Sequence[Sequence[int]]) -> int:
    """Bytes of the weights of some rows."""
    return kept.batch * kept.heads * rows * sum(map(math.prod, k_grids)) * kept.dtype.itemsize


def check_limit(name: str, rows: int, needed: int, before: int, limit: int) -> None:
    """Raise ``ValueError`` where bytes, with those taken before, are more than the limit."""
    if before + needed > limit:
        raise ValueError(
            f"the weights of {rows} queries of {name!r} take {needed / 2**20:.1f} MiB, with those before "
            f"{(before + needed) / 2**20:.1f} MiB, more than limit={limit / 2**20:.1f} MiB: "
            f"choose rows= or layers=, or raise limit="
        )
