"""Numbers about attention, from the rows of its maps a few at a time.

    entropy    = - sum_k a_k log a_k
    distance   = sum_k a_k |x_k - x_q| / sum_k a_k   over keys with a place
    similarity = linear CKA of two heads' maps, or 1 - their Jensen-Shannon divergence / log 2
    effective rank = exp of the entropy of the singular values of a map

Cost: that of the maps; CKA and rank also keys squared, in float64. Source: Dosovitskiy et al., arXiv:2010.11929 (distance);
Kornblith et al., arXiv:1905.00414 (CKA); Roy & Vetterli, "The effective rank", EUSIPCO 2007.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import shown
from .captured import Map, check_bytes, check_map
from .places import Cells, cell_centres

SIMILARITIES = ("js", "cka")


def entropy(found: Map) -> Tensor:
    """The entropy of each query's weights, in nats: ``(batch, heads, rows)`` in float64.

    A sink, with zero keys outside the grid, counts as one more key. A row that sees nothing has entropy 0.
    """
    check_map(found)
    parts = []
    for _, weights, _ in found.stream():
        rows = _joined(weights)
        if found.lossy:
            rows = torch.cat([rows, (1.0 - rows.sum(-1, keepdim=True)).clamp(min=0.0)], -1)
        parts.append(_entropy(rows))
    return torch.cat(parts, -1)


def distance(found: Map) -> Tensor:
    """How far each query looks: the mean distance of what it attends to, ``(batch, heads, rows)`` in float64.

    The distance to the middle of each cell, in cells of the query grid; times the reduction of the stage it is in pixels. Only
    weights of keys with a place count, relative to their sum; where there are none it is 0.

    Raises:
        ValueError: queries or keys without a place.
    """
    check_map(found)
    if not isinstance(found.row_places, Cells) or all(where is None for where in found.places):
        raise ValueError(f"distances need queries and keys with places of their own; {found!r} has queries {found.row_places}")
    extent = [float(n) for n in found.row_places.grid]  # without queries that pad the grid
    queries = cell_centres(found.grid, [float(n) for n in found.grid]).flatten(0, -2)[list(found.rows)]
    totals = []
    for part, weights, _ in found.stream():
        moved, mass = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for weight, where in zip(weights, found.places, strict=True):
            if where is None:
                continue
            cells = where.spread(weight.double()).flatten(3)  # (batch, heads, rows, cells)
            middles = cell_centres(where.grid, extent).flatten(0, -2)  # of a finer or coarser grid: in the same frame
            away = torch.cdist(queries[part].to(cells.device), middles.to(cells.device))
            moved = moved.to(cells.device) + (cells * away).sum(-1)
            mass = mass.to(cells.device) + cells.sum(-1)
        totals.append(torch.where(mass > 0, moved / mass.clamp(min=torch.finfo(torch.float64).tiny), 0.0))
    return torch.cat(totals, -1)


def head_similarity(found: Map, kind: str = "js", *, limit: int = 2 << 30) -> Tensor:
    """How alike the heads attend: ``(batch, heads, heads)`` in float64, 1 for equal heads.

    Args:
        found: a captured attention.
        kind: ``"js"``: one minus the Jensen-Shannon divergence of the rows of two heads over log 2, averaged over rows.
            ``"cka"``: linear CKA of the maps, whose rows are the samples; 0 for a head whose rows are all the same.
        limit: bytes of the products that CKA needs.

    Raises:
        ValueError: an unknown kind; products beyond the limit.
    """
    check_map(found)
    if not isinstance(kind, str) or kind not in SIMILARITIES:
        raise ValueError(f"kind must be one of {SIMILARITIES}; got {repr(kind) if isinstance(kind, str) else shown(kind)}")
    check_bytes(limit)
    return _shannon(found) if kind == "js" else _aligned(found, limit)


def effective_rank(found: Map, *, limit: int = 2 << 30) -> Tensor:
    """How many directions a map has: ``exp(- sum p log p)`` of its normalised singular values, ``(batch, heads)`` in float64.

    Args:
        found: a captured attention.
        limit: bytes of the Gram matrices.

    Raises:
        ValueError: Gram matrices beyond the limit.
    """
    check_map(found)
    check_bytes(limit)
    keys = sum(map(math.prod, found.k_grids))
    if keys >= len(found.rows):  # the smaller side of the map
        _check(found, len(found.rows) * keys, "maps", limit)
        values = torch.linalg.svdvals(torch.cat([_joined(weights) for _, weights, _ in found.stream()], 2))
    else:
        _check(found, keys**2, "Gram matrices", limit)
        gram = sum(rows.transpose(-1, -2) @ rows for rows in (_joined(weights) for _, weights, _ in found.stream()))
        squares = torch.linalg.eigvalsh(gram)  # rounding makes small ones up to eps times the largest
        noise = squares.amax(-1, keepdim=True) * keys * torch.finfo(torch.float64).eps
        values = squares.masked_fill(squares <= noise, 0.0).sqrt()
    shares = values / values.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return _entropy(shares).exp()


def _joined(weights: list[Tensor]) -> Tensor:
    return torch.cat([w.flatten(3) for w in weights], -1).double()


def _entropy(rows: Tensor) -> Tensor:
    return -torch.xlogy(rows, rows).sum(-1)


def _check(found: Map, entries: int, what: str, limit: int) -> None:
    needed = 8 * found.batch * found.heads * entries
    if needed > limit:
        raise ValueError(
            f"the {what} of {found.name!r} take {needed / 2**20:.1f} MiB, more than limit={limit / 2**20:.1f} MiB: "
            f"capture fewer rows, or raise limit="
        )


def _shannon(found: Map) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for _, weights, _ in found.stream():
        rows = _joined(weights)
        if found.lossy:
            rows = torch.cat([rows, (1.0 - rows.sum(-1, keepdim=True)).clamp(min=0.0)], -1)
        own = _entropy(rows)  # (batch, heads, rows)
        divergences = [_entropy((rows + rows[:, [head]]) / 2) - (own + own[:, [head]]) / 2 for head in range(rows.shape[1])]
        total = total.to(rows.device) + torch.stack(divergences, 1).sum(-1)
    return 1.0 - total / (len(found.rows) * math.log(2.0))


def _aligned(found: Map, limit: int) -> Tensor:
    keys = sum(map(math.prod, found.k_grids))
    _check(found, found.heads * keys**2, "products", limit)
    means = sum(_joined(weights).sum(2, keepdim=True) for _, weights, _ in found.stream()) / len(found.rows)
    products: Tensor | float = 0.0
    for _, weights, _ in found.stream():
        rows = _joined(weights) - means
        products = products + torch.einsum("bgqi,bhqj->bghij", rows, rows)
    assert isinstance(products, Tensor)  # there is a row
    shared = products.square().sum((-2, -1))  # (batch, heads, heads)
    own = shared.diagonal(dim1=-2, dim2=-1).sqrt()
    scale = own[:, :, None] * own[:, None]
    return torch.where(scale > 0, shared / scale.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
