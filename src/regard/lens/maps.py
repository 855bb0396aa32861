"""Pictures of attention: the weights of any mechanism, at any stage of a pyramid, as a map of the image.

Every source is put on the cells that its keys stand for (windows, pooled keys, tokens that are left after a reduction), the
cells on their pixels, and all of them are added up. Mass is divided, never copied: the pixels of a map sum to what the keys on
the image got, and the shares of all sources with that of the sink to one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_grid, shown
from .captured import CHUNK, Map, check_map
from .places import pixel_footprint

HEADS = ("mean", "max", "min")


@dataclass(frozen=True, eq=False)
class ImageMap:
    """Attention in image coordinates.

    Attributes:
        map: ``(batch, rows, height, width)``, with heads ``(batch, heads, rows, height, width)``. Each pixel has an equal part
            of what its cell got.
        shares: ``(batch, rows, sources + 1)`` (with heads likewise): how much of each row every source got; the last is what
            the sink and keys outside the grid (zeros, padding) got, or all of a row that sees nothing. They sum to one, unless
            heads were reduced by their maximum or minimum.
        names: of the shares.
    """

    map: Tensor
    shares: Tensor
    names: tuple[str, ...]


def image_map(found: Map, heads: str | None = "mean", *, image_size: Sequence[int] | None = None) -> ImageMap:
    """The weights of a captured attention as a map of the image.

    Args:
        found: from :func:`regard.lens.capture`.
        heads: ``"mean"``, ``"max"`` or ``"min"`` over heads, or None to keep them apart.
        image_size: rows and columns of the image, those that the model was given by default.

    Raises:
        ValueError: an unknown reduction; no image size; keys none of which has a place on an image.
    """
    check_map(found)
    if heads is not None and (not isinstance(heads, str) or heads not in HEADS):
        given = repr(heads) if isinstance(heads, str) else shown(heads)
        raise ValueError(f"heads must be one of {HEADS} or None; got {given}")
    if image_size is not None and len(check_grid("image_size", image_size)) != 2:
        raise ValueError(f"image_size must be rows and columns; got {shown(image_size)}")
    totals, shares = [], []
    for _, weights, _ in found.stream(_rows_at_once(found, heads, image_size)):
        sources = zip(weights, found.places, strict=True)
        mass = torch.stack([(w if at is None else at.spread(w)).flatten(3).sum(-1) for w, at in sources], -1)
        rest = (1.0 - mass.sum(-1, keepdim=True)).clamp(min=0.0)
        shares.append(reduce_heads(torch.cat([mass, rest], -1), heads))
        if heads == "mean":  # of the weights already: a map is a sum of them
            weights = [w.mean(1, keepdim=True) for w in weights]
        totals.append(reduce_heads(to_pixels(found, weights, image_size), heads, keep=True))
    total = torch.cat(totals, 2)
    return ImageMap(total if heads is None else total[:, 0], torch.cat(shares, -2), source_names(found))


def _rows_at_once(found: Map, heads: str | None, image_size: Sequence[int] | None) -> int | None:
    """Queries of which the maps of all heads are made at once; as many as :meth:`Map.stream` takes where they need not be."""
    size = image_size or found.image_size
    if heads == "mean" or size is None:
        return None
    return max(1, CHUNK // (found.batch * found.heads * max(math.prod(size), sum(map(math.prod, found.k_grids)))))


def to_pixels(found: Map, values: Sequence[Tensor], image_size: Sequence[int] | None = None) -> Tensor:
    """Anything that the keys of a captured attention have, on the pixels of the image.

    Args:
        found: the attention.
        values: for each source ``(batch, heads, rows, *k_grid)``.
        image_size: see :func:`image_map`.

    Returns:
        ``(batch, heads, rows, height, width)``, summed over sources.

    Raises:
        ValueError: see :func:`image_map`.
    """
    size = image_size or found.image_size
    if size is None:
        raise ValueError(f"{found.name!r} was captured without an image: give image_size=(height, width)")
    total = None
    for value, where in zip(values, found.places, strict=True):
        if where is None or len(where.grid) != 2:
            continue
        pixels = pixel_footprint(where.grid, size, found.reduction).spread(where.spread(value))
        total = pixels if total is None else total + pixels
    if total is None:
        raise ValueError(f"no key of {found.name!r} ({found.kind}) has a place on an image; its key grids are {found.k_grids}")
    return total


def source_names(found: Map) -> tuple[str, ...]:
    """A name for each source of an attention, and for what goes to none."""
    names = []
    for pattern, grid, where in zip(found.patterns, found.k_grids, found.places, strict=True):
        size = "x".join(map(str, grid))
        names.append(f"{size} tokens without a place" if where is None else f"{size} {pattern!r}")
    return (*names, "nowhere")


def reduce_heads(weights: Tensor, heads: str | None, *, keep: bool = False) -> Tensor:
    """``(batch, heads, ...)`` reduced over heads; ``keep`` leaves an axis of 1."""
    if heads is None:
        return weights
    if heads == "mean":
        return weights.mean(1, keepdim=keep)
    return weights.amax(1, keepdim=keep) if heads == "max" else weights.amin(1, keepdim=keep)
