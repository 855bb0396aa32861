"""Heat over a photograph: colours, a mark at the query, a legend, and sheets of several such pictures.

Drawn with numpy and Pillow alone, in a few milliseconds.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

INK, QUIET, PAPER = (31, 41, 51), (107, 119, 133), (255, 255, 255)
INFERNO = (
    (0, 0, 4), (31, 12, 72), (85, 15, 109), (136, 34, 106), (186, 54, 85), (227, 89, 51), (249, 140, 10), (249, 201, 50),
    (252, 255, 164),
)  # fmt: skip
"""Colours from least to most, evenly spaced; matplotlib's ``inferno``."""

Place = tuple[float, float]
"""Row and column as fractions of height and width."""


def colours(heat: np.ndarray) -> np.ndarray:
    """RGB ``(..., 3)`` in 0..255 for values in 0..1."""
    at = np.linspace(0.0, 1.0, len(INFERNO))
    return np.stack([np.interp(heat, at, channel) for channel in zip(*INFERNO, strict=True)], -1)


def overlay(photo: Tensor, heat: Tensor, side: int, query: Place | None = None, least: float = 0.0) -> np.ndarray:
    """A heat map over a pale grey photograph.

    Args:
        photo: ``(3, height, width)``, uint8.
        heat: ``(rows, columns)`` over the same field of view; its largest value has the brightest colour.
        side: of the result's longer side, in pixels.
        query: where to draw the mark.
        least: what stays uncoloured, with all that is less.

    Returns:
        ``(height, width, 3)``, uint8.
    """
    small = resized(photo, side)
    size = small.shape[:2]
    backdrop = np.repeat(small.mean(-1, keepdim=True).numpy(), 3, -1) * 0.65 + 76.0
    values = heat.detach().float().cpu().numpy() - least
    values = (values / max(float(values.max()), 1e-30)).clip(0.0, 1.0)
    rows, columns = (np.arange(n) * m // n for n, m in zip(size, values.shape, strict=True))
    values = values[rows][:, columns]
    opacity = np.where(values > 0.0, 0.3 + 0.62 * values, 0.0)[..., None]
    drawn = (backdrop * (1.0 - opacity) + colours(values) * opacity).clip(0, 255).astype(np.uint8)
    return drawn if query is None else marked(drawn, query)


def resized(photo: Tensor, side: int) -> Tensor:
    """A photograph ``(3, height, width)`` with a longer side of so many pixels: ``(height, width, 3)``, float."""
    height, width = photo.shape[1:]
    size = [max(1, round(side * n / max(height, width))) for n in (height, width)]
    small = torch.nn.functional.interpolate(photo[None].float(), size, mode="bilinear", antialias=True)[0]
    return small.permute(1, 2, 0)


def marked(drawn: np.ndarray, place: Place) -> np.ndarray:
    """A picture with a ring at a place: black in white, to be seen on any colour."""
    from PIL import Image, ImageDraw

    canvas = Image.fromarray(drawn)
    draw = ImageDraw.Draw(canvas)
    y, x = (fraction * n for fraction, n in zip(place, drawn.shape, strict=False))
    radius = max(3.0, min(drawn.shape[:2]) / 50)
    for extra, colour, width in ((1.5, (255, 255, 255), 5), (0.0, (17, 17, 17), 2)):
        r = radius + extra
        draw.ellipse((x - r, y - r, x + r, y + r), outline=colour, width=width)
    return np.asarray(canvas)


@cache
def font(size: int) -> Any:
    """The font that comes with Pillow."""
    try:
        from PIL import ImageFont
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('pictures need Pillow; pip install "regard[lens]"') from error
    return ImageFont.load_default(size)


def legend(width: int, labels: Sequence[str], height: int = 34) -> np.ndarray:
    """A bar of the colours, with labels spread evenly below it: ``(height, width, 3)``, uint8."""
    from PIL import Image, ImageDraw

    bar = np.full((height, width, 3), PAPER, np.uint8)
    ramp = np.linspace(0.0, 1.0, width)
    opacity = (0.3 + 0.62 * ramp)[:, None]  # as it looks on a mid-grey photograph
    bar[6 : height - 18] = (160.0 * (1.0 - opacity) + colours(ramp) * opacity).astype(np.uint8)
    canvas = Image.fromarray(bar)
    draw = ImageDraw.Draw(canvas)
    for index, label in enumerate(labels):
        anchor = "l" if index == 0 else "r" if index == len(labels) - 1 else "m"
        x = width * index // max(1, len(labels) - 1)
        draw.text((x, height - 1), label, fill=QUIET, font=font(12), anchor=f"{anchor}b")
    return np.asarray(canvas)


def number(value: float) -> str:
    """A weight as people read it."""
    return "0" if value == 0.0 else f"{value:.3f}" if value >= 0.01 else f"{value:.1e}"


@dataclass(frozen=True, eq=False)
class Tile:
    """One picture of a sheet: what it shows, the words above it, those below it."""

    drawn: np.ndarray
    title: str = ""
    note: str = ""


def sheet(tiles: Sequence[Tile], columns: int, gap: int = 10, text: int = 12) -> np.ndarray:
    """Pictures in rows of so many, with their words, in as many lines as these need: ``(height, width, 3)``, uint8."""
    from PIL import Image, ImageDraw

    columns = min(columns, len(tiles))
    height, width = (max(tile.drawn.shape[axis] for tile in tiles) for axis in (0, 1))
    titles, notes = ([wrapped(getattr(tile, name), width, text) for tile in tiles] for name in ("title", "note"))
    above, below = (max(map(len, words)) * (text + 6) for words in (titles, notes))
    rows = -(-len(tiles) // columns)
    step_y, step_x = height + above + below + gap, width + gap
    canvas = Image.new("RGB", (columns * step_x + gap, rows * step_y + gap), PAPER)
    draw = ImageDraw.Draw(canvas)
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        left, top = gap + column * step_x, gap + row * step_y
        first = top + above - len(titles[index]) * (text + 6)  # short titles stand right above their pictures
        for words, start, ink in ((titles[index], first, INK), (notes[index], top + above + height + 3, QUIET)):
            for i, each in enumerate(words):
                draw.text((left, start + i * (text + 6)), each, fill=ink, font=font(text))
        canvas.paste(Image.fromarray(tile.drawn), (left, top + above))
    return np.asarray(canvas)


def headline(words: str, width: int, size: int = 16) -> np.ndarray:
    """Words as a picture so wide, in as many lines as they need: ``(height, width, 3)``, uint8."""
    from PIL import Image, ImageDraw

    lines = wrapped(words, width - 20, size)
    canvas = Image.new("RGB", (width, 16 + max(1, len(lines)) * (size + 4) - 4), PAPER)
    for i, each in enumerate(lines):
        ImageDraw.Draw(canvas).text((10, 12 + i * (size + 4)), each, fill=INK, font=font(size))
    return np.asarray(canvas)


def wrapped(words: str, width: int, size: int) -> list[str]:
    """Words in lines of at most so many pixels, broken at spaces, else after dots and underscores, else anywhere."""
    lines = [""]
    for word in re.findall(r"\S+", words):
        joined = f"{lines[-1]} {word}".strip()
        if _fits(joined, width, size):
            lines[-1] = joined
        elif _fits(word, width, size):
            lines.append(word)
        else:
            lines += _broken(word, width, size)
    return [each for each in lines if each]


def _broken(word: str, width: int, size: int) -> list[str]:
    """A word in lines, each as long as fits."""
    lines = []
    while not _fits(word, width, size):
        longest = next((n for n in range(len(word) - 1, 1, -1) if _fits(word[:n], width, size)), 1)
        cut = max((n for n in range(2, longest + 1) if word[n - 1] in "._"), default=longest)
        lines.append(word[:cut])
        word = word[cut:]
    return [*lines, word]


def _fits(words: str, width: int, size: int) -> bool:
    return font(size).getlength(words) <= width


def png(drawn: np.ndarray, palette: int | None = None) -> bytes:
    """As the bytes of a PNG file, with a palette of so many colours where given."""
    from PIL import Image

    buffer = io.BytesIO()
    picture = Image.fromarray(drawn)
    (picture.quantize(palette) if palette else picture).save(buffer, format="PNG", optimize=palette is not None)
    return buffer.getvalue()
