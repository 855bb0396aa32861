"""Attention flow: the largest flow from a token of the last layer to each input token, with attention as capacities.

    edges from each token to those it attends to, of capacity A' = (1 - w) I + w A   (as rollout has them)

Cost: a maximum flow problem for each input token, on a graph with a layer of nodes for each attention; minutes for a ViT of a
few hundred tokens. Source: Abnar & Zuidema, arXiv:2005.00928.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_integer, shown
from .captured import Map, plain
from .layered import Shares, Step, beginning, shares_on, steps_of
from .rollout import kind_of, roll

UNIT = 1 << 30
"""Whole numbers per unit of capacity, as the solver wants them."""


def flow(
    maps: Iterable[Map],
    start: object = None,
    *,
    item: int = 0,
    targets: Sequence[int] | None = None,
    heads: str = "mean",
    attention_share: float = 0.5,
) -> Shares:
    """Follow attention from the last layer to the image, without letting two paths share a capacity.

    Args:
        maps, start, heads, attention_share: see :func:`regard.lens.rollout`.
        item: of the batch.
        targets: row-major cells of the first grid to compute the flow to, all by default; the others show 0.

    Returns:
        :class:`Shares` of one item. They do not sum to one: each is a flow of its own. Tokens without a place are targets only
        where all are.

    Raises:
        ImportError: scipy is missing: install ``regard[lens]``.
        ValueError: see :func:`regard.lens.rollout`; an item or target that does not exist.
    """
    steps = steps_of(maps)
    (first, *_) = (*steps[-1].inner, *steps[-1].outer)
    if not 0 <= check_integer("item", item, None) < first.batch:
        raise ValueError(f"item must be one of the batch of {first.batch}; got {item}")
    shares = beginning(steps, start, first.batch, *kind_of(first))
    layers = [_row(shares)[item]]
    for step in reversed(steps):
        before = shares
        shares = shares_on(shares, step)
        if shares.grid != before.grid or shares.outside.shape != before.outside.shape:
            layers.append(_matrix(before, lambda each, step=step: shares_on(each, step))[item])
        layers.append(_matrix(shares, lambda each, step=step: _one(step, each, heads, attention_share))[item])
    cells = math.prod(shares.grid)
    wanted = range(cells + shares.outside.shape[-1]) if targets is None else _indices(targets)
    if not all(0 <= target < cells + shares.outside.shape[-1] for target in wanted):
        raise ValueError(f"targets must be cells 0 to {cells - 1} of the grid {shares.grid}; got {targets}")
    flows = maximum_flows(layers, wanted).to(layers[0])
    grid_part, outside = flows[:cells].reshape(1, 1, *shares.grid), flows[cells:].reshape(1, 1, -1)
    return Shares(grid_part, outside, shares.image_size, shares.reduction)


def _indices(targets: Any) -> list[int]:
    targets = plain("targets", targets)
    if isinstance(targets, (str, bytes)) or not isinstance(targets, Sequence):
        raise TypeError(f"targets must be a list of cells; got {shown(targets)}")
    return [check_integer("each of targets", target, None) for target in targets]


def _one(step: Step, shares: Shares, heads: str, attention_share: float) -> Shares:
    return roll([step], shares, heads=heads, attention_share=attention_share)


def _row(shares: Shares) -> Tensor:
    return torch.cat([shares.cells.flatten(2), shares.outside], -1)


def _matrix(shares: Shares, take) -> Tensor:
    """The matrix ``(batch, nodes, nodes after)`` of what a step does to rows of shares."""
    batch, cells, count = shares.cells.shape[0], math.prod(shares.grid), shares.outside.shape[-1]
    every = torch.eye(cells + count, dtype=shares.cells.dtype, device=shares.cells.device).expand(batch, -1, -1)
    split = Shares(every[..., :cells].unflatten(-1, shares.grid), every[..., cells:], shares.image_size, shares.reduction)
    return _row(take(split))


def maximum_flows(layers: Sequence[Tensor], targets: Iterable[int]) -> Tensor:
    """The largest flow from one node to each of the last layer's.

    Args:
        layers: capacities ``(nodes, next nodes)`` between a layer and the next, from 0 to 1; the first has one row.
        targets: nodes of the last layer; the others get 0.

    Returns:
        ``(last nodes,)`` in float64, exact to the rounding of each capacity to 2 ** -30.

    Raises:
        ImportError: scipy is missing.
    """
    try:
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import maximum_flow
    except ImportError as error:
        raise ImportError("flow needs scipy: pip install 'regard[lens]'") from error
    rows: list[Tensor] = []
    columns: list[Tensor] = []
    capacities: list[Tensor] = []
    first = 0
    for layer in layers:
        whole = (layer.double().cpu() * UNIT).round().to(torch.int32)
        source, target = whole.nonzero(as_tuple=True)
        rows.append(source + first)
        columns.append(target + first + len(whole))
        capacities.append(whole[source, target])
        first += len(whole)
    nodes = first + layers[-1].shape[1]
    index = [torch.cat(part).to(torch.int32).numpy() for part in (rows, columns)]
    graph = csr_array((torch.cat(capacities).numpy(), tuple(index)), shape=(nodes, nodes))
    flows = torch.zeros(layers[-1].shape[1], dtype=torch.float64)
    for goal in targets:
        flows[goal] = maximum_flow(graph, 0, first + goal).flow_value / UNIT
    return flows
