"""Photographs as a model sees them: the middle square, at its size."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from ..names import nearest
from .embedded import PHOTOGRAPHS, photograph
from .images import decode_image


def cut_square(image: str, query: str | None = None) -> tuple[Tensor, tuple[float, float] | None]:
    """The middle square of a photograph, and where a pixel of the photograph lies in it.

    Args:
        image: a file, or the name of an embedded photograph.
        query: ``y,x``: two pixels of the whole photograph, or two fractions of its height and width.

    Returns:
        ``(3, edge, edge)``, uint8, and the query as fractions of it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an image; not two numbers; a query outside of the square.
    """
    if query is not None and not re.fullmatch(r"\s*(\d{1,9}\s*,\s*\d{1,9}|0?\.\d+\s*,\s*0?\.\d+)\s*", query):
        raise ValueError(f"query must be y,x: two pixels such as 120,80 or two fractions such as 0.5,0.25; got {query!r}")
    if image in PHOTOGRAPHS and not Path(image).exists():
        photo = photograph(image)
    elif not Path(image).exists() and Path(image).name == image:
        near = nearest(image, PHOTOGRAPHS)
        told = f"did you mean {', '.join(near)}?" if near else f"photographs that come along are {', '.join(PHOTOGRAPHS)}"
        raise FileNotFoundError(f"no image file {image}; {told}")
    else:
        photo = decode_image(Path(image), image)
    height, width = photo.shape[1:]
    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    cut = photo[:, top : top + edge, left : left + edge]
    if query is None:
        return cut, None
    y, x = (float(n) * (size if "." in n else 1) for n, size in zip(query.split(","), (height, width), strict=True))
    place = (y - top) / edge, (x - left) / edge
    if not all(0.0 <= fraction < 1.0 for fraction in place):
        raise ValueError(
            f"the query {query} lies outside of what the model sees of the image: rows {top} to {top + edge - 1} of {height}, "
            f"columns {left} to {left + edge - 1} of {width}"
        )
    return cut, place


def seen_at(photo: Tensor, side: int) -> Tensor:
    """A square photograph ``(3, edge, edge)``, uint8, at the size that a model sees."""
    seen = torch.nn.functional.interpolate(photo[None].float(), (side, side), mode="bicubic", antialias=True)[0]
    return seen.round().clamp(0, 255).to(torch.uint8)


def square(image: str, side: int, query: str | None = None) -> tuple[Tensor, tuple[float, float] | None]:
    """:func:`cut_square` at the size ``side``."""
    cut, place = cut_square(image, query)
    return seen_at(cut, side), place
