"""What the playground shows of a mechanism: the keys of one query on a photograph, and what all queries cost.

Plain functions: settings in, pictures and numbers out. A mechanism runs once for a photograph; a click then computes one row.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from ..bench.usage import flops, peak_memory
from ..lens.capture import capture
from ..lens.captured import Map
from ..lens.explain import at_place, centre
from ..lens.maps import image_map
from ..lens.pictures import Place, legend, marked, number, overlay, resized
from ..ops.attention.planning import plan
from .mechanisms import build, load
from .uploads import photo

GRIDS = (14, 28, 56)
"""Tokens on each side that a photograph is cut into."""
GROWTH = (7, 14, 28, 56, 112)
"""Tokens on each side at which costs are shown."""
SIDE = 448
"""Of a map, in pixels."""
PATCH = 4
"""A token is made of so many times so many averages of the pixels below it."""
PATIENCE = 2.0
"""Seconds that a point of a growth curve may take, judged from the one before."""


@dataclass(frozen=True)
class Setting:
    """What both mechanisms have in common.

    Attributes:
        photo: its name, see :mod:`regard.app.uploads`.
        grid: tokens on each side.
        dim, heads: channels and attention heads.
        weights: ``"random"``, or ``"pattern"`` to give all keys that a query sees the same weight.
        head: which to show; the mean of all by default.
    """

    photo: str = "chelsea"
    grid: int = 56
    dim: int = 64
    heads: int = 4
    weights: str = "random"
    head: int | None = None


@dataclass(frozen=True)
class Choice:
    """A mechanism, its parameters as pairs, and where its weights lie, if not random."""

    name: str
    values: tuple[tuple[str, object], ...] = ()
    file: str = ""


@dataclass(frozen=True, eq=False)
class View:
    """The keys of one query.

    Attributes:
        drawn: ``(height, width, 3)``, uint8: the map above its legend; the map is square.
        heat: ``(grid, grid)``: the weight of every token.
        keys: how many keys the query sees.
        strongest: row, column and weight of the tokens with most of it.
        entropy: of the weights of the tokens, in bits.
        elsewhere: what goes to none of them.
    """

    drawn: np.ndarray
    heat: Tensor
    keys: int
    strongest: tuple[tuple[int, int, float], ...]
    entropy: float
    elsewhere: float


@lru_cache(maxsize=8)
def tokens_of(name: str, grid: int, dim: int) -> Tensor:
    """A photograph as tokens ``(1, grid, grid, dim)``: a fixed random projection of its patches, each token normalised."""
    small = nn.functional.interpolate(photo(name)[None].float(), (grid * PATCH,) * 2, mode="bilinear", antialias=True)
    patches = nn.functional.pixel_unshuffle((small - small.mean()) / small.std().clamp(min=1.0), PATCH)
    projection = torch.randn(patches.shape[1], dim, generator=torch.Generator().manual_seed(0))
    return nn.functional.layer_norm(patches.movedim(1, -1) @ projection, (dim,))


@lru_cache(maxsize=8)
def mixer_of(choice: Choice, dim: int, heads: int, grid: int) -> nn.Module:
    """The mixer of a choice, with its weights."""
    mixer = build(choice.name, dict(choice.values), dim, heads, grid)
    if choice.file.strip():
        load(mixer, choice.file)
    return mixer


@lru_cache(maxsize=8)
def _recorded(name: str, grid: int, dim: int, heads: int, choice: Choice) -> tuple[Map, ...]:
    """The attentions of a mechanism on a photograph, those between places if there are any."""
    mixer = mixer_of(choice, dim, heads, grid)
    with torch.no_grad(), capture(mixer, lazy=True) as maps:
        try:
            mixer(tokens_of(name, grid, dim))
        except (TypeError, RuntimeError, IndexError) as error:
            raise ValueError(f"{choice.name} does not run like this: {str(error).splitlines()[0]}") from error
    placed = [m for m in maps if len(m.grid) == 2 and any(where is not None and len(where.grid) == 2 for where in m.places)]
    found = [m for m in placed if m.kind == "attention"] or placed
    if not found:
        what = f"works on {maps[0].kind}s" if len(maps) else "attends to nothing"
        raise ValueError(f"{choice.name} {what}: it has no picture of places")
    return tuple(found)


def look(setting: Setting, choice: Choice, place: Place) -> View:
    """What the token at a place attends to.

    Where a mechanism attends several times, the mean over all its heads is shown.

    Args:
        setting, choice: what is looked at.
        place: fractions of height and width.

    Raises:
        ValueError: a mechanism that does not take these parameters, or that attends to no places; a head that it has not.
    """
    maps = _recorded(setting.photo, setting.grid, setting.dim, setting.heads, choice)
    if not all(0.0 <= fraction < 1.0 for fraction in place):
        raise ValueError(f"a place is two fractions in [0, 1); got {place}")
    size = (setting.grid, setting.grid)
    heats, seen, nowhere = [], [], []
    with torch.no_grad():
        for found in maps:
            one = at_place(found, place)
            drawn = image_map(one, None, image_size=size)
            visible = torch.stack([(w[0, :, 0] != 0).flatten(1).sum(1) for w in one.weights]).sum(0)  # (heads,)
            if setting.weights == "pattern":
                drawn = image_map(_even(one), None, image_size=size)
            heats.append(drawn.map[0, :, 0])
            seen.append(visible)
            nowhere.append(1.0 - heats[-1].sum((-1, -2)))
    heat, keys, rest = torch.cat(heats), torch.cat(seen), torch.cat(nowhere)
    if setting.head is not None:
        if not 0 <= setting.head < len(heat):
            raise ValueError(f"{choice.name} has the heads 0 to {len(heat) - 1} here; got {setting.head}")
        heat, keys, rest = (each[setting.head : setting.head + 1] for each in (heat, keys, rest))
    mean = heat.mean(0)
    if not bool(mean.isfinite().all()):
        raise ValueError(f"{choice.name} gives weights that are no finite numbers with these parameters")
    strongest = mean.flatten().topk(min(5, mean.numel()))
    shares = mean.flatten().clamp(min=0.0)
    shares = shares / shares.sum().clamp(min=1e-30)
    return View(
        drawn=_drawn(setting, mean, centre(place, size)),
        heat=mean,
        keys=round(float(keys.float().mean())),
        strongest=tuple(
            (int(i) // setting.grid, int(i) % setting.grid, float(w)) for w, i in zip(*strongest, strict=True) if w > 0
        ),
        entropy=float(-(shares * shares.clamp(min=1e-30).log2()).sum()),
        elsewhere=max(0.0, float(rest.mean())),
    )


def _even(found: Map) -> Map:
    """The same attention with equal weights for all keys that are seen."""
    shown = [(w != 0).float() for w in found.weights]
    total = torch.stack([w.flatten(3).sum(-1) for w in shown]).sum(0).clamp(min=1.0)  # (batch, heads, rows)
    even = tuple(w / total.reshape(*total.shape, *[1] * (w.ndim - 3)) for w in shown)
    return replace(found, _stored=even, _kept=None)


def _drawn(setting: Setting, heat: Tensor, place: Place) -> np.ndarray:
    most = float(heat.max())
    picture = overlay(photo(setting.photo), heat, SIDE, place)
    bar = legend(SIDE, ("0", number(most / 2), number(most)))
    return np.concatenate([picture, bar])


@dataclass(frozen=True)
class Cost:
    """What one forward pass of a mechanism costs.

    Attributes:
        flops, attention_flops: of everything, and of the pairs that the pattern shows.
        memory: bytes at the peak, beyond weights and input.
        milliseconds: median on this machine.
        speedup: dense over attended pairs: dense attention cannot be beaten by more; None without a pattern.
        tile_speedup: dense over computed pairs.
        backend: what runs it.
        params: learned values.
    """

    flops: float
    attention_flops: float
    memory: int
    milliseconds: float
    speedup: float | None
    tile_speedup: float | None
    backend: str
    params: int


def cost(setting: Setting, choice: Choice) -> Cost:
    """Count a mechanism, once for the same settings, and time it, each time that it is asked for.

    Raises:
        ValueError: see :func:`look`.
    """
    counted = _counted(setting, choice)
    mixer = mixer_of(choice, setting.dim, setting.heads, setting.grid)
    return replace(counted, milliseconds=_median(mixer, tokens_of(setting.photo, setting.grid, setting.dim)) * 1e3)


@lru_cache(maxsize=32)
def _counted(setting: Setting, choice: Choice) -> Cost:
    """What there is to say without a clock."""
    mixer = mixer_of(choice, setting.dim, setting.heads, setting.grid)
    tokens = tokens_of(setting.photo, setting.grid, setting.dim)
    try:
        counted = flops(mixer, tokens)
        with torch.inference_mode():
            memory = peak_memory(lambda: mixer(tokens), torch.device("cpu"))
    except (TypeError, RuntimeError, IndexError) as error:
        raise ValueError(f"{choice.name} does not run like this: {str(error).splitlines()[0]}") from error
    with torch.no_grad(), capture(mixer, lazy=True, kinds="attention") as maps:
        mixer(tokens)
    plans = [
        plan(pattern, found.grid, k_grid=k_grid, heads=found.heads, head_dim=max(1, setting.dim // setting.heads))
        for found in maps
        if len(found.grid) == 2
        for pattern, k_grid in zip(found.patterns, found.k_grids, strict=True)
        if len(k_grid) == 2
    ]
    dense = setting.heads * setting.grid**4
    attended, computed = sum(p.attended_pairs for p in plans), sum(p.computed_pairs for p in plans)
    return Cost(
        flops=counted["flops"],
        attention_flops=counted["attention_flops"],
        memory=memory,
        milliseconds=math.nan,
        speedup=dense / attended if attended else None,
        tile_speedup=dense / computed if computed else None,
        backend=" + ".join(dict.fromkeys(p.backend for p in plans)) or "none",
        params=sum(p.numel() for p in mixer.parameters()),
    )


def _median(mixer: nn.Module, tokens: Tensor, runs: int = 7, budget: float = 0.6) -> float:
    """Seconds of a forward pass: the median of some runs, after one that warms up, in about a given time."""
    times: list[float] = []
    with torch.inference_mode():
        mixer(tokens)
        while len(times) < runs and (not times or sum(times) < budget):
            start = time.perf_counter()
            mixer(tokens)
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


@lru_cache(maxsize=32)
def growth(setting: Setting, choice: Choice) -> tuple[tuple[int, float], ...]:
    """How the FLOPs of a mechanism grow with the resolution: tokens on a side, and FLOPs.

    Grids at which a mechanism does not run are left out, and those beyond ``GRIDS`` that would take long to count.
    """
    return _points(lambda side: _flops_at(setting, choice, side), GROWTH, certain=max(GRIDS))


def times(setting: Setting, choice: Choice, here: float) -> tuple[tuple[int, float], ...]:
    """How the time of a mechanism grows with the resolution: tokens on a side, and seconds.

    Args:
        setting, choice: what to look at.
        here: seconds at the grid of the setting, which are known; it is not measured twice.
    """

    def seconds(side: int) -> float:
        if side == setting.grid:
            return here
        tokens = tokens_of(setting.photo, side, setting.dim)
        return _median(mixer_of(choice, setting.dim, setting.heads, side), tokens, runs=5, budget=0.3)

    return _points(seconds, tuple(side for side in GROWTH if side <= max(GRIDS)))


def _points(value: Callable[[int], float], sides: Sequence[int], certain: int = 0) -> tuple[tuple[int, float], ...]:
    """The value at each side for which there is one, until one beyond ``certain`` would take long."""
    points: list[tuple[int, float]] = []
    took = 0.0
    for side in sides:
        if side > certain and took * 8 > PATIENCE:  # between linear and quadratic in tokens
            break
        start = time.perf_counter()
        try:
            points.append((side, value(side)))
        except (ValueError, RuntimeError, TypeError, IndexError):
            continue
        took = time.perf_counter() - start
    return tuple(points)


def _flops_at(setting: Setting, choice: Choice, side: int) -> float:
    """Counted without computing; where the mechanism chooses its keys by content, by computing small grids."""
    mixer = build(choice.name, dict(choice.values), setting.dim, setting.heads, side)
    try:
        counted = flops(mixer.to("meta"), torch.empty(1, side, side, setting.dim, device="meta"))
    except (NotImplementedError, RuntimeError):
        if side > max(GRIDS):
            raise
        counted = flops(mixer_of(choice, setting.dim, setting.heads, side), tokens_of(setting.photo, side, setting.dim))
    return counted["flops"]


def growth_figure(curves: Sequence[tuple[str, Sequence[tuple[int, float]], Sequence[tuple[int, float]]]]) -> np.ndarray:
    """FLOPs and time over resolution, both axes logarithmic: ``(height, width, 3)``, uint8.

    Args:
        curves: a name, points of FLOPs and points of seconds for each mechanism; the last is drawn as what the others are
            compared with.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ink, quiet, faint = "#1f2933", "#6b7785", "#e4e8ec"
    figure = Figure(figsize=(10.4, 3.0), layout="constrained", dpi=110, facecolor="white")
    for axes, which, title in zip(
        figure.subplots(1, 2), (1, 2), ("FLOPs of a forward pass", "Time on this machine"), strict=True
    ):
        for index, curve in enumerate(curves):
            points = [(x, y) for x, y in (curve[1] if which == 1 else curve[2]) if y > 0]
            if not points:
                continue
            last = index == len(curves) - 1
            axes.plot(
                *zip(*points, strict=True), color=("#3d5a80", "#d1603d")[index % 2] if not last else quiet, label=curve[0],
                linewidth=1.4 if last else 2.2, linestyle=(0, (4, 3)) if last else "-", marker="o", markersize=4,
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlim=(6.3, 124))
        axes.set_xticks(GROWTH, [f"{side}x{side}" for side in GROWTH])
        axes.xaxis.set_minor_locator(_no_ticks())
        heights = [y for line in axes.lines for y in line.get_ydata()]
        if heights and max(heights) < 30 * min(heights):  # powers of ten alone could all lie outside
            axes.yaxis.set_major_locator(_some_ticks())
            axes.set_ylim(min(heights) / 2, 2 * max(heights))
        axes.yaxis.set_major_formatter(lambda value, _, seconds=which == 2: _scaled(value, seconds))
        axes.yaxis.set_minor_locator(_no_ticks())
        axes.grid(color=faint, linewidth=0.8)
        axes.set_title(title, fontsize=10, color=ink, loc="left")
        axes.tick_params(labelsize=8.5, colors=quiet, length=0)
        for side in ("top", "right", "left", "bottom"):
            axes.spines[side].set_color(faint)
        if axes.lines:
            axes.legend(fontsize=8.5, frameon=False, loc="upper left")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _some_ticks():
    from matplotlib.ticker import LogLocator

    return LogLocator(subs=(1.0, 2.0, 5.0))


def _no_ticks():
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _scaled(value: float, seconds: bool = False) -> str:
    return duration(value) if seconds else short(value)


def duration(seconds: float) -> str:
    """A time with three digits: 4.12 ms, 1.73 s, 95 s."""
    if seconds < 0.9995:
        return f"{1e3 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:.0f} s"


def short(value: float) -> str:
    """A number with a prefix: 12.3 M."""
    if value < 1000:
        return f"{value:.3g}"
    power = min(5, int(math.log10(value)) // 3)
    return f"{value / 1000**power:.3g} {' kMGTP'[power]}"


def photograph_with(name: str, place: Place) -> np.ndarray:
    """A photograph with the query marked: ``(SIDE, SIDE, 3)``, uint8."""
    return marked(resized(photo(name), SIDE).round().clamp(0, 255).to(torch.uint8).numpy(), place)
