"""Plots of how cost grows, as SVG that depends on the numbers alone."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

COLOURS = ("#3d5a80", "#d1603d", "#3a8f6b", "#8a5fbf", "#c2992b", "#4aa3b5", "#b0476e", "#6b7280")
MARKERS = ("o", "s", "^", "D", "v")
INK, QUIET, LINES = "#1f2933", "#6b7785", "#e4e8ec"


def growth(cases: Sequence[Mapping[str, Any]], quantity: str) -> str:
    """Cost over tokens, both axes logarithmic; the legend gives the exponents, the dearest first.

    Args:
        cases: of growth, see :func:`regard.bench.growth.grow`.
        quantity: ``"time"`` or ``"memory"``.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('plots need matplotlib; pip install "regard[train]"') from error
    style: Any = {
        "font.family": "sans-serif", "font.size": 9, "text.color": INK, "axes.labelcolor": QUIET, "axes.edgecolor": LINES,
        "xtick.color": QUIET, "ytick.color": QUIET, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.color": LINES, "grid.linewidth": 0.8, "axes.axisbelow": True, "svg.hashsalt": "regard", "svg.fonttype": "none",
    }  # fmt: skip
    key, unit = {"time": ("ms", "time in ms"), "memory": ("peak_bytes", "peak memory in MB")}[quantity]
    scale = 1e-6 if quantity == "memory" else 1.0
    lines = [(case, [(row["side"], row[key] * scale) for row in case["rows"] if row[key] > 0]) for case in cases]
    lines = sorted((line for line in lines if line[1]), key=lambda line: -_foretold(line[1]))
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8.6, max(3.6, 0.19 * len(lines) + 0.9)), layout="constrained")
        axes = figure.subplots()
        for index, (case, points) in enumerate(lines):
            exponent = case[f"{quantity}_exponent"]
            label = case["case"].partition(", ")[2] + ("" if exponent is None else f"  ({exponent:.2f})")
            axes.plot(
                [side**2 for side, _ in points], [cost for _, cost in points], color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index // len(COLOURS) % len(MARKERS)], markersize=3.5, linewidth=1.3, label=label,
            )  # fmt: skip
        sides = sorted({side for _, points in lines for side, _ in points})
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks([side**2 for side in sides], [f"{side}²" for side in sides])
        axes.minorticks_off()
        axes.set_xlabel("tokens")
        axes.set_ylabel(unit)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8, title="exponent in brackets")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, facecolor="white")
    text = buffer.getvalue()
    return text[text.index("<svg") :]  # the prologue names a DTD on the web


def _foretold(points: Sequence[tuple[int, float]], side: int = 224) -> float:
    """What the largest size would cost if it grew on as between the last two, for the order of the legend."""
    (last_side, last), (before_side, before) = points[-1], points[-2] if len(points) > 1 else (points[-1][0] / 2, 0.0)
    if last_side >= side or not before:
        return last
    return last * (last / before) ** ((side - last_side) / (last_side - before_side))
