"""Plans of linear attention: what it would cost and how it would run, without running it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch

from ...checks import LARGEST, check_choice, check_device, check_dtype, check_flag, check_grid, check_integer
from ..backends.base import choose, others
from .backends import BACKENDS
from .call import CHUNK, pose
from .features import FeatureMap

DECAYS = ("none", "head", "feature", "token", "token and feature")
"""What a decay is given for."""


@dataclass(frozen=True)
class LinearPlan:
    """How a linear attention runs and what it costs: totals over batch and heads, of one forward pass.

    Attributes:
        q_grid, k_grid: the grids.
        backend: the backend that runs it, and ``reason`` why.
        others: why not each of the other backends.
        computed_pairs: weights of a query and a key that are computed: inside chunks; all of them by the definition.
        flops: of the products; features, decays and divisions are not counted.
        dense_flops: of all weights of all queries and keys, and their weighted sum: what the definition computes.
        bytes: moved at least: q, k, v and the output once in each direction, and weights that are stored.
    """

    q_grid: tuple[int, ...]
    k_grid: tuple[int, ...]
    backend: str
    reason: str
    others: dict[str, str]
    computed_pairs: int
    flops: int
    dense_flops: int
    bytes: int

    @property
    def bound(self) -> float:
        """FLOPs of all weights over those computed."""
        return self.dense_flops / self.flops

    def as_dict(self) -> dict[str, object]:
        """All fields and the ratio as plain data."""
        return {**asdict(self), "bound": self.bound}


def plan_linear(
    grid: Sequence[int],
    *,
    k_grid: Sequence[int] | None = None,
    batch: int = 1,
    heads: int = 1,
    head_dim: int = 32,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    feature: str | FeatureMap = "none",
    norm: str = "none",
    causal: bool = False,
    decay: str = "none",
    chunk: int = CHUNK,
    backend: str = "auto",
) -> LinearPlan:
    """How :func:`regard.ops.linear.attend.linear_attend` would run, and its exact cost; nothing is allocated.

    Args:
        grid, k_grid: grids of queries and keys; the same by default.
        batch, heads, head_dim, value_dim, dtype, device: of the tensors; the device need not exist here.
        feature, norm, causal, chunk, backend: see :func:`regard.ops.linear.attend.linear_attend`.
        decay: what a decay is given for, one of ``"none"``, ``"head"``, ``"feature"``, ``"token"``, ``"token and feature"``.

    Raises:
        TypeError, ValueError: as ``linear_attend`` would.
    """
    grid = check_grid("grid", grid)
    k_grid = grid if k_grid is None else check_grid("k_grid", k_grid)
    batch, heads, head_dim = (check_integer(n, m, 1) for n, m in (("batch", batch), ("heads", heads), ("head_dim", head_dim)))
    value_dim = head_dim if value_dim is None else check_integer("value_dim", value_dim, 1)
    check_flag("causal", causal)
    check_choice("decay", decay, DECAYS)
    if check_dtype("dtype", dtype) is None or (where := check_device("device", device)) is None:
        raise TypeError(f"plan_linear needs a dtype and a device; got dtype={dtype}, device={device}")
    if batch * heads * max(head_dim, value_dim) * max(math.prod(grid), math.prod(k_grid)) > LARGEST:
        raise ValueError(f"no memory holds such tensors: {batch=}, {heads=}, {head_dim=}, {value_dim=}, {grid=}, {k_grid=}")

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, v = (
        empty(batch, *grid, heads, head_dim),
        empty(batch, *k_grid, heads, head_dim),
        empty(batch, *k_grid, heads, value_dim),
    )
    shapes = {"head": (heads,), "feature": (heads, head_dim), "token": q.shape[:-1], "token and feature": q.shape}
    logs = None if decay == "none" else empty(*shapes[decay])
    call = pose(q, k, v, feature, norm, None, 0.0, causal, logs, 1.0, None, None, 0, chunk=chunk)
    call = replace(call, place=where)
    chosen = choose(BACKENDS, call, backend)
    cost = chosen.cost(call)
    return LinearPlan(
        q_grid=grid,
        k_grid=k_grid,
        backend=chosen.name,
        reason="asked for" if backend != "auto" else chosen.reason(call),
        others=others(BACKENDS, call, chosen),
        computed_pairs=cost.computed_pairs,
        flops=cost.flops,
        dense_flops=2 * batch * heads * math.prod(grid) * math.prod(k_grid) * (call.q.shape[-1] + value_dim),
        bytes=cost.bytes,
    )
