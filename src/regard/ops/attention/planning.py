"""Plans: what an attention would cost and how it would run, without running it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch

from ...checks import LARGEST, check_device, check_dtype, check_flag, check_grid, check_integer, shown
from ..backends.base import choose, others
from ..backends.choice import BACKENDS
from ..calls.call import Call
from ..calls.lower import break_up
from ..calls.source import HeadTable, Source
from ..patterns import Pattern, as_pattern, leaves, tensors_of
from ..tiles.simulator import Tile, TileWalk, walk_tiles

MOST_TOKENS = 1 << 24
"""Tokens of a grid whose tiles are still planned."""


@dataclass(frozen=True)
class Plan:
    """How an attention runs and what it costs.

    All counts are totals over the batch and all heads, of one forward pass; a multiplication and an addition are two FLOPs.

    Attributes:
        pattern: text form of the pattern.
        backend: the backend that runs it, and ``reason`` why.
        others: why not each of the other backends.
        tile: queries and keys of the most common tile; empty where the backend has no tiles.
        tiles: number of tiles, over batch and heads.
        attended_pairs: pairs of query and key that the pattern shows: the sum of its ``degree``. Zero keys do not count.
        computed_pairs: pairs whose logit the backend computes, masked ones and zero keys included.
        dense_pairs: pairs of dense attention between the same grids.
        flops: of the computed pairs, logits and weighted sum; softmax, bias and mask are not counted.
        useful_flops: of the attended pairs.
        bytes: moved at least: q, k, v and the output once, and what the backend gathers into tiles or stores per pair.
        waste: computed over attended pairs; 1 is perfect.
        bound: dense over attended pairs: no exact method can be faster than dense attention by more than this, where both
            run at the same rate.
        tile_bound: dense over computed pairs: the same for these tiles.
        walk: what a fused kernel with other tiles would compute, where tiles were given.
    """

    pattern: str
    q_grid: tuple[int, ...]
    k_grid: tuple[int, ...]
    backend: str
    reason: str
    others: dict[str, str]
    tile: tuple[int, ...]
    tiles: int
    attended_pairs: int
    computed_pairs: int
    dense_pairs: int
    flops: int
    useful_flops: int
    bytes: int
    walk: TileWalk | None = None

    @property
    def waste(self) -> float:
        return self.computed_pairs / self.attended_pairs if self.attended_pairs else math.inf

    @property
    def bound(self) -> float:
        return self.dense_pairs / self.attended_pairs if self.attended_pairs else math.inf

    @property
    def tile_bound(self) -> float:
        return self.dense_pairs / self.computed_pairs if self.computed_pairs else math.inf

    def as_dict(self) -> dict[str, object]:
        """All fields and ratios as plain data."""
        walk = None if self.walk is None else self.walk.as_dict()
        return {**asdict(self), "waste": self.waste, "bound": self.bound, "tile_bound": self.tile_bound, "walk": walk}

    def __str__(self) -> str:
        grids = _times(self.q_grid) if self.q_grid == self.k_grid else f"{_times(self.q_grid)} -> {_times(self.k_grid)}"
        tile = "{} queries x {} keys, {:,} of all sizes".format(*self.tile, self.tiles) if self.tile else "none"
        rows = [
            ("pattern", f"{self.pattern} on {grids}"),
            ("backend", f"{self.backend} ({self.reason})"),
            ("tile", tile),
            ("attended pairs", f"{self.attended_pairs:,}"),
            ("computed pairs", f"{self.computed_pairs:,} ({self.waste:.2f} x attended)"),
            ("FLOPs", f"{_scaled(self.flops)}FLOP ({_scaled(self.useful_flops)}FLOP useful)"),
            ("bytes", f"{_scaled(self.bytes)}B"),
            ("at best over dense", f"{self.bound:.2f} x by the pattern, {self.tile_bound:.2f} x by these tiles"),
            *self._walked(),
            *((f"not {name}", why) for name, why in self.others.items()),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def _walked(self) -> list[tuple[str, str]]:
        if self.walk is None:
            return []
        walk = self.walk
        tiles = f"{_times(walk.q_tile)} queries, {_times(walk.k_tile)} keys"
        dense = walk.q_tiles * walk.k_tiles
        return [
            ("tile walk", f"{tiles}: {walk.visited:,} of {dense:,} visited, {'no' if walk.mask_free else 'with'} mask inside"),
            ("at best by the walk", f"{walk.tile_bound:.2f} x, {walk.worst_bound:.2f} x by the slowest query tile"),
            ("wasted by the walk", f"{walk.wasted:.1%} of the computed pairs"),
        ]


def _times(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


def _scaled(value: float) -> str:
    for unit in ("", "k", "M", "G", "T", "P"):
        if value < 1000 or unit == "P":
            return f"{value:.4g} {unit}"
        value /= 1000
    raise AssertionError


def plan(
    pattern: Pattern | str,
    grid: Sequence[int],
    *,
    k_grid: Sequence[int] | None = None,
    batch: int = 1,
    heads: int = 1,
    kv_heads: int | None = None,
    head_dim: int = 32,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    bias: bool = False,
    training: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
    tiles: tuple[Tile, Tile] | None = None,
) -> Plan:
    """How ``attend`` would run an attention of this pattern, and its exact cost; see :class:`Plan` for what each number means.

    Nothing is allocated: the device need not exist here.

    Args:
        pattern: a pattern or its text form; routed ones with their tensors.
        grid, k_grid: query grid and key grid (the same by default).
        batch, heads, kv_heads, head_dim, value_dim: of q, k and v.
        dtype, device: where and in what it would run.
        bias: with a relative bias table over the pattern.
        training: whether gradients are needed.
        return_lse: whether the log-sum-exp is asked for.
        backend: see :func:`regard.attend`.
        tiles: query and key tile of a fused kernel to simulate, see :func:`regard.ops.tiles.simulator.walk_tiles`.

    Raises:
        TypeError, ValueError: as :func:`regard.attend` would; tiles that cannot be walked; grids of more than ``MOST_TOKENS``,
            or tensors of more elements than an index of 63 bits tells apart.
    """
    pattern = as_pattern(pattern)
    grid, k_grid = _grid("grid", grid), _grid("k_grid", grid if k_grid is None else k_grid)
    batch, heads, head_dim = (check_integer(n, m, 1) for n, m in (("batch", batch), ("heads", heads), ("head_dim", head_dim)))
    kv_heads = heads if kv_heads is None else check_integer("kv_heads", kv_heads, 1)
    value_dim = head_dim if value_dim is None else check_integer("value_dim", value_dim, 1)
    if check_dtype("dtype", dtype) is None or (where := check_device("device", device)) is None:
        raise TypeError(f"plan needs a dtype and a device; got dtype={dtype}, device={device}")
    for name, flag in (("bias", bias), ("training", training), ("return_lse", return_lse)):
        check_flag(name, flag)
    if batch * max(heads, kv_heads) * max(head_dim, value_dim) * max(math.prod(grid), math.prod(k_grid)) > 2**60:
        raise ValueError(f"no memory holds such tensors: {batch=}, {heads=}, {head_dim=}, {value_dim=}, {grid=}, {k_grid=}")
    if any(table.is_meta for member in leaves(pattern) for table in tensors_of(member)):
        raise ValueError(f"plan counts the pairs that a table lists: {pattern!r} must hold numbers; got a tensor on meta")
    if tiles is not None and (isinstance(tiles, str) or not isinstance(tiles, Sequence) or len(tiles) != 2):
        raise TypeError(f"tiles must be a tile of queries and one of keys; got {shown(tiles)}")

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=training)

    q = empty(batch, *grid, heads, head_dim)
    k = empty(batch, *k_grid, kv_heads, head_dim)
    v = empty(batch, *k_grid, kv_heads, value_dim)
    table = None
    if bias:
        extents = [pattern.extent(axis, n, len(k_grid)) for axis, n in enumerate(k_grid)]
        if math.prod(2 * e + 1 for e in extents) > LARGEST:
            raise ValueError(f"a bias over {pattern!r} on {k_grid} would need too large a table: extents {extents}")
        table = HeadTable(empty(heads, *[2 * e + 1 for e in extents]), pattern)
    try:
        with torch.set_grad_enabled(training):
            source = Source(k, v, pattern, bias=table)
            (group,) = break_up(q, [source], scale=None, q_start=0, dropout=0.0, need_lse=return_lse)
            plans = [_planned(replace(call, device=where), backend) for _, call in group]
    except MemoryError as error:
        raise ValueError(f"no memory holds the tiles of {pattern!r} on {grid} and {k_grid}: {error}") from error
    made = plans[0] if len(plans) == 1 else _joined(plans, pattern)
    return made if tiles is None else replace(made, walk=walk_tiles(pattern, grid, *tiles, k_grid=k_grid))


def _grid(name: str, value: Sequence[int]) -> tuple[int, ...]:
    grid = check_grid(name, value)
    if math.prod(grid) > MOST_TOKENS:
        raise ValueError(f"{name} must have at most {MOST_TOKENS:,} tokens in all to be planned; got {grid}")
    return grid


def _planned(call: Call, backend: str = "auto") -> Plan:
    """The plan of one call whose queries start at the origin."""
    chosen = choose(BACKENDS, call, backend)
    cost, each = chosen.cost(call), call.batch * call.heads
    degree = call.pattern.degree(call.q_grid, call.k_grid)
    attended = int(degree.sum()) * each // (degree.numel() // call.queries)
    widths = call.q.shape[-1] + call.v.shape[-1]
    return Plan(
        pattern=repr(call.pattern),
        q_grid=call.q_grid,
        k_grid=call.k_grid,
        backend=chosen.name,
        reason="asked for" if backend != "auto" else chosen.reason(call),
        others=others(BACKENDS, call, chosen),
        tile=cost.tile,
        tiles=cost.tiles,
        attended_pairs=attended,
        computed_pairs=cost.computed_pairs,
        dense_pairs=each * call.queries * math.prod(call.k_grid),
        flops=cost.flops,
        useful_flops=2 * attended * widths,
        bytes=cost.bytes,
    )


def backends() -> dict[str, str | None]:
    """The backends of ``attend``: None where one is available here, else the reason why not."""
    return {name: backend.available() for name, backend in BACKENDS.items()}


def _joined(plans: Sequence[Plan], pattern: Pattern) -> Plan:
    """The plan of groups of heads with patterns of their own."""

    def total(name: str) -> int:
        return sum(getattr(p, name) for p in plans)

    distinct = list(dict.fromkeys(p.backend for p in plans))
    names = {name for p in plans for name in p.others if name not in distinct}
    return Plan(
        pattern=repr(pattern),
        q_grid=plans[0].q_grid,
        k_grid=plans[0].k_grid,
        backend=" + ".join(distinct),
        reason="; ".join(f"{p.pattern}: {p.reason}" for p in plans),
        others={n: "; ".join(dict.fromkeys(p.others[n] for p in plans if n in p.others)) for n in BACKENDS if n in names},
        tile=(),
        tiles=total("tiles"),
        attended_pairs=total("attended_pairs"),
        computed_pairs=total("computed_pairs"),
        dense_pairs=total("dense_pairs"),
        flops=total("flops"),
        useful_flops=total("useful_flops"),
        bytes=total("bytes"),
    )
