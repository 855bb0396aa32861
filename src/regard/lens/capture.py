"""Capture: the exact attention weights of chosen queries, from any model built on :func:`regard.attend`, and from others.

    with regard.lens.capture(model, rows=[(12, 30)], layers="stages.2.*") as maps:
        model(images)
    maps["stages.2.blocks.0.mixer"].weights[0]      # (batch, heads, 1, *k_grid)

The attention itself runs as ever, on its own backend; the weights of the chosen rows are computed beside it, or later from
queries and keys (``lazy``). Models of other libraries are reached through :mod:`regard.hosts`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import LARGEST, check_flag, check_integer, check_number, check_text, shown
from ..hosts import attach
from ..hosts.running import Trail
from ..layers.mixers import AttentionMixer, calls_of
from ..layers.reduce import TokenMap
from ..ops.calls.footprint import Footprint
from ..ops.calls.observe import OBSERVERS, WATCHERS, Record, Weighing, listening, within
from ..ops.patterns import Dense, as_pattern
from .captured import Arrival, Backward, Map, Maps, check_bytes, check_limit, needed_bytes, plain
from .hosted import Found, reporting
from .kept import Kept, KeptAttention, KeptPart, KeptWeighing, detached
from .places import Cells, Reduced, Where

Rows = Sequence[int] | Sequence[Sequence[int]] | Sequence[Sequence[float]]

PREFIX = 16
"""Tokens at most that may stand before those of a grid in a flat sequence."""


@contextmanager
def capture(
    model: nn.Module,
    rows: Rows | None = None,
    layers: str | Sequence[str] = "*",
    *,
    kinds: str | Sequence[str] = "*",
    lazy: bool = False,
    gradients: bool = False,
    limit: int = 2 << 30,
) -> Iterator[Maps]:
    """Record the exact attention weights of a model while the context is entered.

    Args:
        model: a module; what it attends outside of its own ``forward`` is not recorded, nor what activation checkpointing
            recomputes, nor what runs in another thread than the one that entered the context (as replicas of ``DataParallel``
            do). Built on :func:`regard.attend`, on :class:`torch.nn.MultiheadAttention`, on attention modules like
            those of timm, or a vision model of transformers.
        rows: the queries to look at, all by default: row-major indices, coordinates such as ``[(12, 30)]``, or fractions of
            the grid such as ``[(0.5, 0.25)]``, which name the same place at every resolution. Attentions whose grid has
            another number of axes than the coordinates (those of extra tokens) are passed over.
        layers: shell-style pattern of module paths, or several.
        kinds: likewise of operators, see :class:`Map`; operators that do not weigh places are recorded only without ``rows``.
        lazy: keep queries, keys and values, which is linear in tokens, and compute weights when they are asked for.
        gradients: keep what the derivatives by the weights need as well; implies ``lazy``.
        limit: bytes of weights, or with ``lazy`` of queries, keys and values, to keep at most.

    Yields:
        The :class:`Maps`, which fill up as the model runs.

    Raises:
        ValueError: rows outside a grid; more bytes than the limit.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module; got {shown(model)}")
    lazy, gradients = check_flag("lazy", lazy), check_flag("gradients", gradients)
    globs = _globs("layers", layers), _globs("kinds", kinds)
    chosen = _Choice(_checked_rows(rows), *globs, lazy or gradients, gradients, check_bytes(limit))
    recorder = _Recorder(model, chosen)
    with ExitStack() as stack:
        stack.enter_context(recorder)
        stack.enter_context(listening(OBSERVERS, recorder.attended))
        stack.enter_context(listening(WATCHERS, recorder.weighed))
        stack.enter_context(attach(model, reporting(recorder.found), strict=False))
        yield recorder.maps


@dataclass(frozen=True)
class _Choice:
    """What to record."""

    rows: Rows | None
    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    lazy: bool
    gradients: bool
    limit: int


@dataclass(frozen=True)
class _Run:
    """One run of a module: its number, and the grid of the tokens that a mixer was called with."""

    number: int
    grid: tuple[int, ...] | None


class _Recorder(Trail):
    """The observer behind :func:`capture`: what runs, on which image, and with which tokens left."""

    def __init__(self, model: nn.Module, choice: _Choice) -> None:
        super().__init__()
        self.model, self.choice = model, choice
        self.names = {module: name for name, module in model.named_modules()}
        self.maps = Maps()
        self.calls: Counter[tuple[str, str]] = Counter()
        self.backward = Backward()
        self.taken = 0
        self.runs: list[_Run] = []  # of the modules that are running
        self.visited = 0
        self.image_size: tuple[int, int] | None = None
        self.patches: tuple[tuple[int, int], int] | None = None  # grid and side of the patches of another library's model
        self.tokens: tuple[TokenMap, tuple[int, ...]] | None = None
        self.last_grid: tuple[int, ...] = ()
        self.last_reduction: int | None = None

    # ----- what runs

    def _enter(self, module: nn.Module, args) -> None:
        super()._enter(module, args)
        self.visited += 1
        tokens = args[0] if args and isinstance(module, AttentionMixer) else None
        self.runs.append(_Run(self.visited, tuple(tokens.shape[1:-1]) if isinstance(tokens, Tensor) else None))
        if module is self.model:
            self.image_size, self.patches, self.tokens, self.last_grid = None, None, None, ()
        image = args[0] if args and isinstance(args[0], Tensor) else None
        if self.image_size is None and image is not None and image.ndim == 4 and image.is_floating_point():
            channels = getattr(module, "in_channels", None) if isinstance(module, nn.Conv2d) else None
            if module is self.model:
                channels = getattr(module, "in_chans", 3)
            if channels is not None and image.shape[1] == channels:
                self.image_size = (image.shape[2], image.shape[3])

    def _leave(self, module: nn.Module, args, output) -> None:
        super()._leave(module, args, output)
        del self.runs[len(self.modules) :]
        if (
            isinstance(module, nn.Conv2d)
            and self.patches is None
            and isinstance(output, Tensor)
            and self.image_size is not None
        ):
            side = module.stride[0]
            if side > 1 and module.stride == module.kernel_size:
                self.patches = ((output.shape[-2], output.shape[-1]), int(side))
        if isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], TokenMap):
            cells = output[1].place.shape[1]
            stage = self._stage(self.path(self.names) or "")
            known = (self.last_grid if self.tokens is None else self.tokens[1], () if stage is None else stage[0])
            self.tokens = next(((output[1], grid) for grid in known if grid and math.prod(grid) == cells), self.tokens)

    def _wanted(self, name: str | None, kind: str) -> bool:
        return (
            name is not None
            and not self.recomputing
            and any(fnmatchcase(name, glob) for glob in self.choice.layers)
            and any(fnmatchcase(kind, glob) for glob in self.choice.kinds)
        )

    # ----- what is observed

    def attended(self, record: Record) -> Callable[[Tensor], None] | None:
        """Observe an ``attend``."""
        name = self.path(self.names)
        if name is not None and not self.recomputing and len(record.q.shape) > 4:
            self.last_grid, self.last_reduction = self._cropped(tuple(record.q.shape[1:-2])), self._reduction(name)
        if within() or not self._wanted(name, "attention"):
            return None
        assert name is not None  # it is wanted
        grid = tuple(record.q.shape[1:-2])
        k_grids = [tuple(source.k.shape[1:-2]) for source in record.sources]
        stage = self._stage(name)
        row_places = self._row_places(grid, k_grids, stage)
        flat = all(len(k_grid) == 1 for k_grid in k_grids)
        columns: list[tuple[int, int, int]] = []
        places: list[Where | None] = []
        patterns, shapes = [], []
        for number, (source, k_grid) in enumerate(zip(record.sources, k_grids, strict=True)):
            stands = source.footprint or self._key_places(k_grid, grid, row_places, stage, flat and number == 0)
            prefix = stands.prefix if isinstance(stands, Footprint) and stands.kind == "list" else 0
            keys = math.prod(k_grid)
            parts: list[tuple[int, int, tuple[int, ...], Where | None]]
            if isinstance(stands, Footprint) and stands.kind == "list":
                stands.check(k_grid)
                parts = [(0, prefix, (prefix,), None), (prefix, keys, stands.grid, Cells(stands.grid))]
            else:
                parts = [(0, keys, k_grid, stands)]
            for start, stop, shape, where in parts:
                if stop > start:
                    columns.append((number, start, stop))
                    places.append(where)
                    shapes.append(shape)
                    patterns.append(as_pattern(source.pattern))
        kept: Kept = KeptAttention(detached(record))
        if len(columns) > len(record.sources):
            kept = KeptPart(kept, 0, tuple(columns))
        lossy = record.sink is not None or any(any(pair) for call in record.calls for pair in call.zeros)
        visit, order = self._run()
        arrival = self._add(
            name, "attention", kept, grid, tuple(patterns), tuple(shapes), tuple(places), row_places, lossy, visit, order,
            (record.q.data_ptr(), tuple(record.q.shape)), None, self.last_reduction,
        )  # fmt: skip
        if arrival is None or not self.choice.gradients:
            return None
        return lambda output: _listen(output, arrival)

    def weighed(self, weighing: Weighing) -> None:
        """Observe another operator."""
        name = self.path(self.names)
        if not self._wanted(name, weighing.kind) or (self.choice.rows is not None and not weighing.on_grid):
            return
        assert name is not None  # it is wanted
        stage = self._stage(name)
        grid, key_grid = weighing.grid, weighing.key_grid
        if weighing.on_grid and stage is not None and grid == key_grid == (math.prod(stage[0]),):
            grid = key_grid = stage[0]  # all tokens of the stage, in a row
        row_places = self._row_places(grid, [key_grid], stage) if weighing.on_grid else None
        where = self._key_places(key_grid, grid, row_places, stage, False) if weighing.on_grid else None
        visit, order = self._run()
        self._add(
            name, weighing.kind, KeptWeighing(weighing), grid, (Dense(),), (key_grid,), (where,), row_places, False, visit,
            order, None,
        )  # fmt: skip

    def found(self, found: Found) -> None:
        """Observe an attention of another library."""
        name = self.names[found.module]
        if not self._wanted(name, "attention"):
            return
        visit, order = self._run()
        reduction = self.patches[1] if self.patches and found.grid is None else None
        arrival = Arrival(self.backward)
        if found.grid is not None:
            where = Cells(found.grid)
            parts = iter([(found.kept, found.grid, (found.grid,), (where,), where)])
        else:
            parts = self._split(found)
        for kept, grid, shapes, places, row_places in parts:
            self._add(
                name, "attention", kept, grid, (Dense(),) * len(shapes), shapes, places, row_places, False, visit, order,
                None, arrival, reduction,
            )  # fmt: skip
        if self.choice.gradients:
            _listen(found.output, arrival, found.to_tokens)

    def _split(self, found: Found):
        """The tokens of patches and those before them, apart, as mixers of regard have them."""
        cells = math.prod(self.patches[0]) if self.patches else 0
        queries, keys = found.queries, found.keys
        before = keys - cells
        if not cells or not 0 <= before <= PREFIX or queries not in (keys, before):
            places: tuple[Where | None, ...] = (None,)
            yield found.kept, (queries,), ((keys,),), places, None
            return
        assert self.patches is not None  # there are cells
        grid = self.patches[0]
        columns = ((0, before, keys), (0, 0, before)) if before else ((0, 0, keys),)
        shapes = (grid, (before,)) if before else (grid,)
        stands = (Cells(grid), None) if before else (Cells(grid),)
        if queries == keys:
            yield KeptPart(found.kept, before, columns), grid, shapes, stands, Cells(grid)
        if before:
            yield KeptPart(found.kept, 0, columns), (before,), shapes, stands, None

    # ----- where tokens are

    def _stage(self, name: str) -> tuple[tuple[int, ...], int] | None:
        """The grid that the model says a module works on, and pixels per token side."""
        reduction = self._reduction(name)
        if reduction is None or self.image_size is None:
            return None
        return tuple(-(-side // reduction) for side in self.image_size), reduction

    def _reduction(self, name: str) -> int | None:
        info = getattr(self.model, "feature_info", None)
        if not isinstance(info, list):
            return None
        fitting = [line for line in info if isinstance(line, dict) and f"{name}.".startswith(f"{line.get('module')}.")]
        return int(max(fitting, key=lambda line: len(line["module"]))["reduction"]) if fitting else None

    def _running(self) -> tuple[nn.Module | None, _Run]:
        """The innermost running module of the model."""
        running = zip(reversed(self.modules), reversed(self.runs), strict=True)
        return next(((module, run) for module, run in running if module in self.names), (None, _Run(0, None)))

    def _cropped(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """The grid without what the running mixer appended to it."""
        given = self._running()[1].grid
        if given is None or len(given) != len(grid) or not all(n >= m for n, m in zip(grid, given, strict=True)):
            return grid
        return given

    def _row_places(self, grid: tuple[int, ...], k_grids, stage) -> Cells | Reduced | None:
        if len(grid) > 1:
            return Cells(self._cropped(grid))
        reduced = self._reduced(grid)
        if reduced is not None:
            return reduced
        alone = all(len(k_grid) == 1 for k_grid in k_grids) and k_grids[0] == grid
        return Cells(grid) if alone and stage is None else None

    def _key_places(self, k_grid, grid, row_places, stage, flat: bool) -> Where | None:
        if len(k_grid) == 1:
            reduced = self._reduced(k_grid)
            if reduced is not None:
                return reduced
            if isinstance(row_places, Cells) and row_places.grid == k_grid:
                return row_places
            cells = stage[0] if stage is not None else self.last_grid
            before = k_grid[0] - math.prod(cells)
            return Footprint(cells, "list", prefix=before) if flat and cells and 0 <= before <= PREFIX else None
        if stage is not None and k_grid == stage[0]:
            return Cells(k_grid)
        if len(grid) == len(k_grid) and k_grid != grid and all(k <= q for k, q in zip(k_grid, grid, strict=True)):
            return Footprint(grid, "parts")
        return Cells(self._cropped(k_grid) if k_grid == grid or len(grid) == 1 else k_grid)

    def _reduced(self, grid: tuple[int, ...]) -> Reduced | None:
        if self.tokens is None or int(self.tokens[0].place.max()) >= grid[0]:
            return None
        tokens, cells = self.tokens
        return Reduced(cells, tokens.place) if grid[0] in (tokens.present, math.prod(cells)) else None

    def _run(self) -> tuple[int, str | None]:
        """The run that an attention belongs to, and how the attentions of that run stand to each other."""
        for module, run in zip(self.modules, self.runs, strict=True):
            if calls_of(module) == "parallel":
                return run.number, "parallel"
        innermost, run = self._running()
        return run.number, "sequence" if innermost is not None and calls_of(innermost) == "sequence" else None

    # ----- what is kept

    def _add(
        self, name, kind, kept: Kept, grid, patterns, shapes, places, row_places, lossy, visit, order, q_key,
        arrival: Arrival | None = None, reduction: int | None = None,
    ) -> Arrival | None:  # fmt: skip
        call = self.calls[name, kind]
        self.calls[name, kind] += 1
        rows = _flat_rows(self.choice.rows, grid, name)
        if not rows:
            return None
        needed = kept.size if self.choice.lazy else needed_bytes(kept, len(rows), shapes)
        self.taken += needed
        check_limit(name, len(rows), needed, self.taken - needed, self.choice.limit)
        stored = None
        if not self.choice.lazy:
            found = kept.weights(torch.tensor(rows, device=kept.device))
            stored = tuple(w.unflatten(-1, shape) for w, shape in zip(found, shapes, strict=True))
        arrival = (arrival or Arrival(self.backward)) if self.choice.gradients else None
        self.maps.append(Map(
            name, call, grid, rows, patterns, shapes, places, row_places, kind, self.image_size,
            reduction or self._reduction(name), lossy, visit, order, q_key, self.choice.limit,
            kept if self.choice.lazy else None, stored, arrival,
        ))  # fmt: skip
        return arrival


def _listen(output: Tensor, arrival: Arrival, to_tokens: Callable[[Tensor], Tensor] = lambda gradient: gradient) -> None:
    if output.requires_grad:
        output.register_hook(lambda gradient: arrival.arrive(to_tokens(gradient.detach())))


def _globs(name: str, globs: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(globs, str):
        return (globs,)
    if not isinstance(globs, (list, tuple, set, frozenset)):
        raise TypeError(f"{name} must be a shell-style pattern, or several; got {shown(globs)}")
    return tuple(check_text(f"each of {name}", each) for each in globs)


def _checked_rows(rows: Any) -> Rows | None:
    """The rows as plain numbers; whether there are such queries is known when a grid is."""
    if rows is None:
        return None
    rows = plain("rows", rows)
    if isinstance(rows, (str, bytes)) or not isinstance(rows, Sequence):
        raise TypeError(f"rows must be a list of indices, of coordinates or of fractions; got {shown(rows)}")
    return [_checked_row(row) for row in rows]


def _checked_row(row: Any) -> Any:
    row = plain("each of rows", row)
    if isinstance(row, (str, bytes)) or not isinstance(row, Sequence):
        return check_integer("each of rows", row, None)
    return tuple((check_number if isinstance(x, float) else check_integer)("each of rows", x, -LARGEST) for x in row)


def _flat_rows(rows: Rows | None, grid: tuple[int, ...], name: str) -> tuple[int, ...]:
    """Row-major indices of the chosen queries; none where the coordinates belong to another rank."""
    count = torch.Size(grid).numel()
    if rows is None:
        return tuple(range(count))
    chosen = []
    for row in rows:
        if isinstance(row, Sequence):
            if len(row) != len(grid):
                continue
            if not all(0 <= x < (1 if isinstance(x, float) else n) for x, n in zip(row, grid, strict=True)):
                raise ValueError(
                    f"rows must be coordinates inside the grid {grid} of {name!r}, or fractions in [0, 1) of it; got {row}"
                )
            index = 0
            for x, n in zip(row, grid, strict=True):
                index = index * n + int(x * n if isinstance(x, float) else x)
            chosen.append(index)
        elif 0 <= row < count:
            chosen.append(int(row))
        else:
            raise ValueError(f"rows must be indices in 0..{count - 1} on the grid {grid} of {name!r}; got {row}")
    return tuple(chosen)
