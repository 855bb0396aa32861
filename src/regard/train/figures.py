"""Figures of a comparison, as SVG text or PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from .comparing import Look, Outcome

COLOURS = ("#3d5a80", "#d1603d", "#3a8f6b", "#8a5fbf", "#c2992b", "#4aa3b5", "#b0476e", "#6b7280")
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


def pareto(outcomes: Sequence[Outcome]) -> str:
    """Accuracy over latency; the outcomes that no other beats in both are joined."""
    figure, axes = _figure(5.6, 3.7)
    points = [(o.numbers["latency_ms"], 100 * o.accuracy) for o in outcomes]
    front = sorted(p for p in points if not any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points))
    tall = max(y for _, y in points) - min(y for _, y in points)
    axes.plot(*zip(*front, strict=True), color=QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    span = max(outcome.numbers["latency_high_ms"] for outcome in outcomes)
    for index, (outcome, (x, y)) in enumerate(zip(outcomes, points, strict=True)):
        colour = COLOURS[index % len(COLOURS)]
        low, high = outcome.numbers["latency_low_ms"], outcome.numbers["latency_high_ms"]
        axes.errorbar(x, y, xerr=[[x - low], [high - x]], color=colour, linewidth=1.2, zorder=2)
        axes.scatter([x], [y], s=70, color=colour, edgecolor="white", linewidth=1.2, zorder=3)
        right = x < 0.7 * span
        low_neighbour = any(0 <= other_y - y < 0.12 * tall and other != index for other, (_, other_y) in enumerate(points))
        axes.annotate(
            outcome.label, (x, y), xytext=(9 if right else -9, -13 if low_neighbour else 5), textcoords="offset points",
            ha="left" if right else "right", color=colour, fontweight="bold",
        )  # fmt: skip
    axes.set_xlim(0, 1.05 * span)
    axes.margins(y=0.25)
    axes.set_xlabel("latency in ms per batch (quartiles)")
    axes.set_ylabel("accuracy in %")
    return _svg(figure)


def curves(outcomes: Sequence[Outcome], chance: float) -> str:
    """Validation accuracy after each epoch."""
    figure, axes = _figure(5.6, 3.7)
    for index, outcome in enumerate(outcomes):
        colour = COLOURS[index % len(COLOURS)]
        epochs = [entry["epoch"] for entry in outcome.history]
        accuracies = [100 * entry["val_accuracy"] for entry in outcome.history]
        axes.plot(epochs, accuracies, color=colour, linewidth=1.8, marker="o", markersize=3, label=outcome.label)
    axes.axhline(100 * chance, color=QUIET, linewidth=1, linestyle=(0, (2, 3)))
    axes.annotate("chance", (1, 100 * chance), xytext=(0, 3), textcoords="offset points", color=QUIET, fontsize=8)
    last = max(len(outcome.history) for outcome in outcomes)
    axes.set_ylim(bottom=0)
    axes.set_xticks(range(1, last + 1, max(1, last // 8)))
    axes.set_xlabel("epoch")
    axes.set_ylabel("accuracy in %")
    axes.legend(loc="lower right", framealpha=0.9, edgecolor="white")
    return _svg(figure)


def attention(photo: Tensor, looks: Sequence[Look], queries: Sequence[tuple[float, float]]) -> bytes:
    """Attention maps on a photograph: a row for each mixer, for each query the stages side by side, as PNG.

    Each map is scaled to its own largest weight; the query is marked. Squares are tokens.

    Args:
        photo: ``(3, height, width)``, uint8.
        looks: from :func:`regard.train.comparing.look`.
        queries: the places that were looked from, as fractions of height and width.
    """
    shown = [one for one in looks if one.weights]
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
        axes[row, 0].text(-0.06, 0.5, one.label.replace(" (", "\n("), transform=axes[row, 0].transAxes, rotation=90, ha="right",
                          va="center", fontsize=9, fontweight="bold")  # fmt: skip
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
