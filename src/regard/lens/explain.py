"""Explain: where a model looks on one photograph, as a picture and as a page of one file.

    explain(model, picture, query=(0.4, 0.6), with_rollout=True)

What a place attends to in every layer and head (``query``), what moves from the image to the answer (``with_rollout``), and
what speaks for a class (``with_relevance``).

Cost: a forward pass for a query; for rollout and relevance all weights of every layer, which is quadratic in tokens.
"""

from __future__ import annotations

import base64
import html
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from ..models.opening import normalised
from .capture import capture
from .captured import Map, Maps
from .layered import Shares
from .maps import image_map
from .pictures import Place, Tile, headline, legend, marked, number, overlay, png, resized, sheet
from .relevance import backward, relevance_of
from .rollout import rollout

WEIGHTS = 4_000_000_000
"""Weights at most of a rollout or of relevance: some minutes on one core."""


@dataclass(frozen=True, eq=False)
class Panel:
    """One heat map.

    Attributes:
        title: what it is of.
        heat: ``(height, width)`` on the model's input.
        note: its numbers in a line.
        query: the place it is about.
        least: what is not coloured.
    """

    title: str
    heat: Tensor
    note: str
    query: Place | None = None
    least: float = 0.0


@dataclass(frozen=True, eq=False)
class Explanation:
    """Where a model looks.

    Attributes:
        title: model and weights.
        photo: what the model saw, ``(3, height, width)``, uint8.
        answer: the most probable class, where there are classes.
        panels: the maps, heads averaged.
        heads: those of each head, by layer.
    """

    title: str
    photo: Tensor
    answer: str
    panels: list[Panel]
    heads: dict[str, list[Panel]] = field(default_factory=dict)

    def picture(self, side: int = 224, columns: int = 6) -> np.ndarray:
        """The photograph and all maps on a sheet: ``(height, width, 3)``, uint8, each map with the full range of colours."""
        query = next((panel.query for panel in self.panels if panel.query), None)
        first = Tile(_coloured(self.photo, side, query), "image", self.answer)
        tiles = [first, *(self._tile(panel, side) for panel in self.panels)]
        drawn = sheet(tiles, min(columns, max(2, math.ceil(math.sqrt(len(tiles) * 1.4)))))
        foot = np.full((52, drawn.shape[1], 3), 255, np.uint8)
        width = min(240, drawn.shape[1] - 20)
        foot[:34, 10 : 10 + width] = legend(width, ("least", "most"))
        return np.concatenate([headline(self.title, drawn.shape[1]), drawn, foot])

    def png(self) -> bytes:
        """:meth:`picture` as a PNG file."""
        return png(self.picture())

    def html(self) -> str:
        """A page that holds all its pictures: the sheet, and each layer by head."""
        parts = [_image(self.png(), f"Attention of {self.title}")]
        for layer, panels in self.heads.items():
            tiles = [self._tile(panel, 112) for panel in panels]
            parts.append(f"<h2>{html.escape(layer)}</h2>" + _image(png(sheet(tiles, 8), palette=128), f"Heads of {layer}"))
        title = html.escape(self.title)
        words = "Every map has the full range of colours: those of a query from 0, rollout and relevance from their least."
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>{title}</title>\n<style>{_STYLE}</style></head>\n"
            f"<body><h1>{title}</h1><p>{html.escape(self.answer)}. {words}</p>\n" + "\n".join(parts) + "\n</body></html>\n"
        )

    def _tile(self, panel: Panel, side: int) -> Tile:
        return Tile(overlay(self.photo, panel.heat, side, panel.query, panel.least), panel.title, panel.note)


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;color:#1f2933;max-width:1440px;margin:2rem auto;padding:0 1rem}"
    "h1{font-size:1.4rem}h2{font-size:1rem;margin:1.6rem 0 .2rem}img{max-width:100%}p{color:#6b7785;max-width:46rem}"
)


def _image(data: bytes, label: str) -> str:
    return f'<img alt="{html.escape(label)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def _coloured(photo: Tensor, side: int, query: Place | None) -> np.ndarray:
    """The photograph in its own colours."""
    drawn = resized(photo, side).round().clamp(0, 255).to(torch.uint8).numpy()
    return drawn if query is None else marked(drawn, query)


def explain(
    model: nn.Module,
    photo: Tensor,
    *,
    title: str = "",
    query: Place | None = None,
    with_rollout: bool = False,
    with_relevance: bool = False,
    target: int | None = None,
    layers: str | Sequence[str] = "*",
    normalise: str = "imagenet",
) -> Explanation:
    """Look at a model while it looks at a photograph.

    Args:
        model: any that :func:`regard.lens.capture` knows.
        photo: ``(3, height, width)``, uint8, at the size that the model shall see.
        title: of the result.
        query: a place, as fractions of height and width: what it attends to in each layer. Also where rollout and relevance
            start; without it they start at the class token or from all places alike.
        with_rollout, with_relevance: whether to follow attention through the layers, see :func:`regard.lens.rollout` and
            :func:`regard.lens.relevance`.
        target: the class that relevance speaks for; the most probable by default.
        layers: whose attention counts, see :func:`regard.lens.capture`.
        normalise: how the model was trained to see: one of ``NORMALISATIONS``.

    Raises:
        ValueError: nothing asked for; a target without relevance; an unknown normalisation; no attention on the image; more
            weights than ``WEIGHTS``; see also :func:`regard.lens.rollout`.
    """
    if query is None and not (with_rollout or with_relevance):
        raise ValueError("say what to look for: a query, rollout or relevance")
    if target is not None and not with_relevance:
        raise ValueError(f"a target is what relevance speaks for: ask for relevance with it; got {target} alone")
    if query is not None and not all(0.0 <= x < 1.0 for x in query):
        raise ValueError(f"a query must lie inside the image: two fractions in [0, 1); got {query}")
    images = normalised(photo, normalise)
    model.eval()
    panels: list[Panel] = []
    heads: dict[str, list[Panel]] = {}
    with torch.no_grad():
        if query is not None:
            with capture(model, rows=[query], layers=layers, kinds="attention") as maps:
                output = model(images)
            check_layers(maps, model, images, layers)
            found = on_image(maps)
            names = layer_names(found)
            for name, each in zip(names, found, strict=True):
                by_head = image_map(each, None).map[0, :, 0]
                at = centre(query, each.grid)
                weights = torch.cat([w[0, :, 0].flatten(1) for w in each.weights], 1)  # (heads, keys)
                panels.append(Panel(name, by_head.mean(0), _note(weights.mean(0), each.grid), at))
                heads[name] = [
                    Panel(f"head {i}", heat, _note(row, each.grid), at)
                    for i, (heat, row) in enumerate(zip(by_head, weights, strict=True))
                ]
        if with_rollout:
            with capture(model, layers=layers, kinds="attention", lazy=True) as maps:
                output = model(images)
            check_layers(maps, model, images, layers)
            check_weights(maps)
            panels.append(_followed("rollout", rollout(maps, start=query), images, query))
        if query is None and not with_rollout:
            output = model(images)
    if with_relevance:
        if target is not None and _logits(output, model) is None:
            raise ValueError(f"target is a class, and this model has no classes: leave it out; got {target}")
        maps = backward(model, images, target, layers=layers)
        check_layers(maps, model, images, layers)
        check_weights(maps)
        about = "" if target is None else f", class {target}"
        panels.append(_followed(f"relevance{about}", relevance_of(maps, query), images, query))
    return Explanation(title or type(model).__name__, photo, answer(output, model), panels, heads)


def check_layers(maps: Sequence[Map], model: nn.Module, images: Tensor, layers: str | Sequence[str]) -> None:
    """Raise ``ValueError`` that lists the layers there are, where ``layers`` names none of those that attend."""
    if maps or layers == "*":
        return
    with torch.no_grad(), capture(model, rows=[0], kinds="attention") as every:
        model(images)
    names = list(dict.fromkeys(found.name for found in every))
    raise ValueError(f"no layer that attends matches {layers!r}; there are {', '.join(names) or 'none'}")


def on_image(maps: Maps | Sequence[Map]) -> list[Map]:
    """Those attentions that a picture can show.

    Raises:
        ValueError: there is none.
    """
    found = [m for m in maps if len(m.grid) == 2 and any(at is not None and len(at.grid) == 2 for at in m.places)]
    if not found:
        raise ValueError("no attention on the image was recorded: this model has none, or `layers` names none of it")
    return found


def at_place(found: Map, place: Place) -> Map:
    """A recorded attention, of the query at a place alone."""
    row = 0
    for fraction, n in zip(place, found.grid, strict=True):
        row = row * n + min(n - 1, int(fraction * n))
    if found._stored is not None:
        raise ValueError(f"{found.name!r} was not captured with lazy=True")
    return replace(found, rows=(row,))


def centre(place: Place, grid: Sequence[int]) -> Place:
    """The middle of the cell of a grid that a place lies in."""
    y, x = ((min(n - 1, int(fraction * n)) + 0.5) / n for fraction, n in zip(place, grid, strict=True))
    return y, x


def check_weights(maps: Sequence[Map]) -> None:
    """Raise ``ValueError`` where there is no attention to follow, or following it would take more than ``WEIGHTS`` weights."""
    if not maps:
        raise ValueError("no attention was recorded: this model has none, or `layers` names none of it")
    total = sum(m.batch * m.heads * len(m.rows) * sum(map(math.prod, m.k_grids)) for m in maps)
    if total > WEIGHTS:
        largest = max(maps, key=lambda m: m.heads * len(m.rows))
        raise ValueError(
            f"following attention takes {total:.2g} weights, more than {WEIGHTS:.2g}; most in {largest.name!r} with "
            f"{len(largest.rows)} queries: choose a smaller size, or fewer layers"
        )


def layer_names(maps: Sequence[Map]) -> list[str]:
    """A name for each: that of its module, numbered where it attends several times."""
    times = Counter(m.name for m in maps)
    seen: Counter[str] = Counter()
    names = []
    for found in maps:
        seen[found.name] += 1
        short = found.name.removesuffix(".op").removesuffix(".mixer") or "attention"
        names.append(f"{short} #{seen[found.name]}" if times[found.name] > 1 else short)
    return names


def _note(weights: Tensor, grid: Sequence[int]) -> str:
    return f"{grid[0]}x{grid[1]} tokens, most {number(float(weights.max()))}"


def _followed(title: str, shares: Shares, images: Tensor, query: Place | None) -> Panel:
    heat = shares.on_image((images.shape[-2], images.shape[-1]))[0, 0]
    at = None if query is None else centre(query, shares.grid)
    return Panel(title, heat, followed_note(shares), at, float(heat.min()))  # all cells have nearly the same in common


def followed_note(shares: Shares) -> str:
    """The numbers of rollout or relevance in a line."""
    cells, (rows, columns) = shares.cells[0, 0], shares.grid
    return f"{rows}x{columns} tokens, {number(float(cells.min()))} to {number(float(cells.max()))}"


def answer(output: object, model: nn.Module) -> str:
    """What a model says of an image, in words: its most probable class, with its name where the model has names."""
    logits = _logits(output, model)
    if logits is None:
        return "no classes"
    chances = logits[0].detach().float().softmax(-1)
    best = int(chances.argmax())
    name = getattr(getattr(model, "config", None), "id2label", {}).get(best, f"LABEL_{best}")
    called = "" if name == f"LABEL_{best}" else f" ({name})"
    return f"class {best}{called} of {len(chances)}, {float(chances.max()):.1%}"


def _logits(output: object, model: nn.Module) -> Tensor | None:
    """The logits ``(batch, classes)`` in the output of a model; None where it has no classes, but features."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) and logits.ndim == 2 and getattr(model, "num_classes", None) != 0 else None
