"""Figures of a comparison, as SVG text or PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from .noise import frontier, standard_error
from .study import Look, Outcome

COLOURS = (
    "#3d5a80", "#d1603d", "#3a8f6b", "#8a5fbf", "#c2992b", "#4aa3b5", "#b0476e", "#6b7280",
    "#2f6f3e", "#7a4a2b", "#1f78b4", "#e07fb0", "#8fae3b", "#444b9e", "#c0392b", "#16a394",
)  # fmt: skip
INK, QUIET, LINES = "#1f2933", "#6b7785", "#e4e8ec"
MARK = "#111111"


def _figure(width: float, height: float, **grid: Any) -> tuple[Any, Any]:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('figures need matplotlib; pip install "regard[train]"') from error
    matplotlib.rcParams.update({
        "font.family": "sans-serif", "font.size": 9, "text.color": INK, "axes.labelcolor": QUIET, "axes.edgecolor": LINES,
        "xtick.color": QUIET, "ytick.color": QUIET, "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "grid.color": LINES, "grid.linewidth": 0.8, "axes.axisbelow": True, "svg.hashsalt": "regard",
        "svg.fonttype": "none",
    })  # fmt: skip
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(**grid)


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]  # the prologue names a DTD on the web


def pareto(outcomes: Sequence[Outcome], images: int) -> str:
    """Accuracy over latency; those that buy accuracy with time are joined, see :func:`regard.compare.noise.frontier`.

    Args:
        outcomes: what is compared.
        images: independent ones that the accuracies were measured on.
    """
    figure, axes = _figure(5.6, 3.7 + 0.12 * max(0, len(outcomes) - 6))
    points = [(o.numbers["latency_ms"], 100 * o.accuracy) for o in outcomes]
    front = [(o.numbers["latency_ms"], 100 * o.accuracy) for o in frontier(outcomes, images)]
    if len(front) > 1:
        axes.plot(*zip(*front, strict=True), color=QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=1, gid="frontier")
    span = max(outcome.numbers["latency_high_ms"] for outcome in outcomes)
    for index, (outcome, (x, y)) in enumerate(zip(outcomes, points, strict=True)):
        colour = COLOURS[index % len(COLOURS)]
        low, high = outcome.numbers["latency_low_ms"], outcome.numbers["latency_high_ms"]
        error = 100 * standard_error(outcome.accuracy, images)
        axes.errorbar(x, y, xerr=[[x - low], [high - x]], yerr=error, color=colour, linewidth=1.2, zorder=2)
        axes.scatter([x], [y], s=70, color=colour, edgecolor="white", linewidth=1.2, zorder=3)
    axes.set_xlim(0, 1.05 * span)
    axes.margins(y=0.15)
    axes.set_xlabel("latency in ms per batch (quartiles)")
    axes.set_ylabel("accuracy in % (standard error)")
    bars = [(o.numbers["latency_low_ms"], o.numbers["latency_high_ms"]) for o in outcomes]
    _label_points(figure, axes, points, bars, short_labels([outcome.label for outcome in outcomes]))
    return _svg(figure)


def short_labels(labels: Sequence[str]) -> list[str]:
    """Labels without options, where that leaves them apart."""
    short = [label.partition(" (")[0] for label in labels]
    return [label if short.count(brief) > 1 else brief for label, brief in zip(labels, short, strict=True)]


def _label_points(
    figure: Any,
    axes: Any,
    points: Sequence[tuple[float, float]],
    bars: Sequence[tuple[float, float]],
    labels: Sequence[str],
) -> None:
    """Write each label at the first place around its point that no other label, point or error bar takes, in its colour."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer, frame = canvas.get_renderer(), axes.get_window_extent()
    dots = axes.transData.transform(points)
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in dots]
    for (low, high), (_, y) in zip(bars, points, strict=True):
        (left, middle), (right, _) = axes.transData.transform([(low, y), (high, y)])
        taken.append(Bbox.from_extents(left, middle - 1, right, middle + 1))
    places = [(9, -3, "left"), (-9, -3, "right"), (4, 6, "left"), (-4, 6, "right"), (4, -13, "left"), (-4, -13, "right")]
    places += [(side * 9, step * 9 - 3, "left" if side > 0 else "right") for step in (1, -1, 2, -2, 3, -3) for side in (1, -1)]
    for index, (point, label) in enumerate(zip(points, labels, strict=True)):
        for dx, dy, align in places:
            text = axes.annotate(
                label, point, xytext=(dx, dy), textcoords="offset points", ha=align, fontsize=8,
                color=COLOURS[index % len(COLOURS)], fontweight="bold",
            )  # fmt: skip
            box = text.get_window_extent(renderer)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
            if (dx, dy, align) != places[-1]:
                text.remove()
        taken.append(box)


def curves(outcomes: Sequence[Outcome], chance: float) -> str:
    """Validation accuracy after each epoch; the names stand at the ends of their curves, spread so that all can be read."""
    figure, axes = _figure(5.6, 3.7 + 0.12 * max(0, len(outcomes) - 6))
    last = max(len(outcome.history) for outcome in outcomes)
    ends = []
    for index, outcome in enumerate(outcomes):
        colour = COLOURS[index % len(COLOURS)]
        epochs = [entry["epoch"] for entry in outcome.history]
        accuracies = [100 * entry["val_accuracy"] for entry in outcome.history]
        axes.plot(epochs, accuracies, color=colour, linewidth=1.6, marker="o", markersize=2.5)
        ends.append((epochs[-1], accuracies[-1], colour))
    axes.axhline(100 * chance, color=QUIET, linewidth=1, linestyle=(0, (2, 3)))
    axes.annotate("chance", (1, 100 * chance), xytext=(0, 3), textcoords="offset points", color=QUIET, fontsize=8)
    axes.set_ylim(0, 1.08 * max(end[1] for end in ends))
    axes.set_xlim(right=last + 0.45 * max(1, last - 1))
    axes.set_xticks(range(1, last + 1, max(1, last // 8)))
    axes.set_xlabel("epoch")
    axes.set_ylabel("accuracy in %")
    room = axes.get_ylim()[1] * 0.052
    order = sorted(range(len(ends)), key=lambda index: ends[index][1])
    heights = spread([ends[index][1] for index in order], room)
    axes.set_ylim(0, max(axes.get_ylim()[1], heights[-1] + room))
    labels = short_labels([outcome.label for outcome in outcomes])
    for index, height, label in zip(order, heights, [labels[index] for index in order], strict=True):
        x, y, colour = ends[index]
        axes.annotate(
            label, (x, y), xytext=(last + 0.07 * max(1, last - 1), height), textcoords="data", va="center", fontsize=8,
            color=colour, fontweight="bold", arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkB": 2},
        )  # fmt: skip
    return _svg(figure)


def spread(heights: Sequence[float], room: float) -> list[float]:
    """Rising heights moved so that they are ``room`` apart: neighbours that are too close move together, about their mean."""
    groups: list[list[float]] = []  # mean wish, number
    for height in heights:
        groups.append([height, 1])
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < room * (groups[-1][1] + groups[-2][1]) / 2:
            mean, number = groups.pop()
            other, count = groups.pop()
            groups.append([(mean * number + other * count) / (number + count), number + count])
    return [mean + room * (i - (number - 1) / 2) for mean, number in groups for i in range(int(number))]


def attention(photo: Tensor, looks: Sequence[Look], queries: Sequence[tuple[float, float]]) -> bytes:
    """Attention maps on a photograph: a row for each mixer, for each query the stages side by side, as PNG.

    Each map is scaled to its own largest weight; the query is marked. Squares are tokens.

    Args:
        photo: ``(3, height, width)``, uint8.
        looks: from :func:`regard.compare.study.look`.
        queries: the places that were looked from, as fractions of height and width.
    """
    shown = [one for one in looks if one.weights]
    labels = short_labels([one.label for one in shown])
    stages = max(len(one.weights) for one in shown)
    columns, rows = stages * len(queries), len(shown)
    figure, axes = _figure(1.75 * columns + 0.4, 1.76 * rows + 0.3, nrows=rows, ncols=columns, squeeze=False)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
    picture = photo.permute(1, 2, 0).numpy()
    height, width = picture.shape[:2]
    backdrop = np.repeat(picture.mean(-1, keepdims=True), 3, -1) / 255 * 0.65 + 0.3
    for row, one in enumerate(shown):
        for column in range(columns):
            number, stage = divmod(column, stages)
            cell = axes[row, column]
            cell.set_axis_off()
            if stage >= len(one.weights):
                continue
            weights = one.weights[stage][number].float().cpu().numpy()
            heat = weights / max(weights.max(), 1e-12)
            extent = (0, width, height, 0)
            cell.imshow(backdrop.clip(0, 1), extent=extent)
            cell.imshow(heat, cmap="inferno", alpha=np.where(weights > 0, 0.25 + 0.65 * heat, 0.0), extent=extent,
                        interpolation="nearest", vmin=0, vmax=1)  # fmt: skip
            y, x = ((int(place * tokens) + 0.5) / tokens for place, tokens in zip(queries[number], weights.shape, strict=True))
            cell.plot([x * width], [y * height], marker="o", markersize=6, markerfacecolor="none",
                      markeredgecolor="white", markeredgewidth=2.6)  # fmt: skip
            cell.plot([x * width], [y * height], marker="o", markersize=6, markerfacecolor="none",
                      markeredgecolor=MARK, markeredgewidth=1.4)  # fmt: skip
            if row == 0:
                rows_columns = "×".join(map(str, weights.shape))
                cell.set_title(f"{one.layers[stage]}, {rows_columns} tokens", fontsize=8, color=QUIET)
        axes[row, 0].text(
            -0.06, 0.5, labels[row].replace(" (", "\n("), transform=axes[row, 0].transAxes, rotation=90, ha="right",
            va="center", fontsize=9, fontweight="bold",
        )  # fmt: skip
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=115, facecolor="white", metadata={"Software": None})
    return _small_png(buffer.getvalue())


def _small_png(data: bytes) -> bytes:
    """The picture with a palette of 128 colours: a third of the bytes."""
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(io.BytesIO(data)) as picture:
        picture.convert("RGB").quantize(128).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
