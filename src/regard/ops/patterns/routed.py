"""Routed patterns: tensors decide, at run time, perhaps per batch item and head."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...checks import INTEGERS, check_range, check_sizes, check_tensor, shown
from ..tracing import count_steps
from .base import Ints, ListedBlocks, Pattern, check_grids, grid_positions, per_axis, positional


class _Routed(Pattern):
    """A pattern decided at run time by a tensor; a pytree node, so it may cross compiled regions."""

    static: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()

        def flatten(pattern):
            names = [f.name for f in fields(pattern)]
            tensors = [n for n in names if isinstance(getattr(pattern, n), Tensor)]
            rest = {n: getattr(pattern, n) for n in names if n not in tensors}
            return [getattr(pattern, n) for n in tensors], (tensors, rest)

        def unflatten(values, context):
            names, rest = context
            pattern = object.__new__(cls)
            for name, value in {**rest, **dict(zip(names, values, strict=True))}.items():
                object.__setattr__(pattern, name, value)
            return pattern

        pytree.register_pytree_node(cls, flatten, unflatten)


@dataclass(frozen=True, eq=False, repr=False)
class Blocks(_Routed):
    """Routed blocks: the queries of a block see the keys of the blocks that ``table`` lists.

    ``table`` is ``(batch, query_blocks, listed)`` or ``(batch, heads, query_blocks, listed)`` of key block indices in
    row-major order of the block grid (``ceil(length / block)`` per axis; the last block of an axis may be partial). -1 lists
    nothing, as does a table of no entries; a block listed twice counts once; batch and heads may be 1. ``block`` is one size,
    or one per axis. Integers of any width are kept as int64.

    Source: Zhu et al., BiFormer, arXiv:2303.08810.
    """

    table: Tensor = positional()
    block: Ints = positional()
    source: ClassVar[str] = "arXiv:2303.08810"
    places_queries: ClassVar[bool] = False
    single: ClassVar[bool] = False
    """Whether keys are listed for each query by itself."""

    def __post_init__(self):
        object.__setattr__(self, "table", _indices("table", self.table, (3, 4), "(batch, [heads,] query_blocks, listed)"))
        object.__setattr__(self, "block", check_sizes("block", self.block))

    def rank(self):
        return len(self.block) if isinstance(self.block, tuple) else None

    def as_blocks(self, rank):
        return ListedBlocks(self.table4(), tuple(per_axis(self.block, axis) for axis in range(rank)), self.single)

    def batch_shapes(self):
        return [tuple(self.table.shape[:-2])]

    def pairs_by_size(self, q_grid, k_grid):
        return self.even_pairs(q_grid, k_grid) if self.table.is_meta else None

    def block_grid(self, grid: Sequence[int]) -> tuple[int, ...]:
        return tuple(count_steps(n, per_axis(self.block, axis)) for axis, n in enumerate(grid))

    def check(self, q_grid, k_grid):
        super().check(q_grid, k_grid)
        if len(q_grid) != len(k_grid):
            raise ValueError(f"{self!r} needs grids of one rank; got queries {tuple(q_grid)}, keys {tuple(k_grid)}")
        blocks = math.prod(self.block_grid(q_grid))
        if self.table.shape[-2] != blocks:
            raise ValueError(
                f"table lists {self.table.shape[-2]} query blocks, but grid {tuple(q_grid)} in blocks of "
                f"{self.block} has {blocks}"
            )
        check_range(f"the table of {self!r}", self.table, -1, math.prod(self.block_grid(k_grid)), "key blocks")

    def table4(self) -> Tensor:
        """The table as ``(batch, heads, query_blocks, listed)``."""
        return self.table if self.table.ndim == 4 else self.table[:, None]

    def visible(self, q_pos, k_pos, q_grid, k_grid):
        q_block = flat_block(q_pos, self.block, self.block_grid(q_grid))
        k_block = flat_block(k_pos, self.block, self.block_grid(k_grid))
        return self.pairs(k_grid)[:, :, q_block, k_block]

    def pairs(self, k_grid: Sequence[int]) -> Tensor:
        """Which key blocks each query block lists: ``(batch, heads, query_blocks, key_blocks)`` boolean."""
        table = self.table4()
        pairs = torch.zeros(*table.shape[:3], math.prod(self.block_grid(k_grid)) + 1, dtype=torch.bool, device=table.device)
        return pairs.scatter(-1, table + 1, True)[..., 1:]  # column 0 took the entries that list nothing

    def degree(self, q_grid, k_grid=None, q_start=None):
        q_grid, k_grid, q_start = check_grids(q_grid, k_grid, q_start)
        self.check(q_grid, k_grid)
        counts = (self.pairs(k_grid) * self._block_sizes(k_grid)).sum(-1)
        q_block = flat_block(grid_positions(q_grid, q_start, self.table.device), self.block, self.block_grid(q_grid))
        return counts[..., q_block].unflatten(-1, tuple(q_grid))

    def even_pairs(self, q_grid: Sequence[int], k_grid: Sequence[int]) -> int:
        """Pairs of a batch item and head if the table listed all blocks equally often, none twice; needs only its size."""
        blocks = math.prod(self.block_grid(k_grid))
        return math.prod(q_grid) * min(self.table.shape[-1], blocks) * math.prod(k_grid) // blocks

    def _block_sizes(self, grid: Sequence[int]) -> Tensor:
        """Tokens of each block, ``(blocks,)``."""
        sizes = torch.ones(1, dtype=torch.int64, device=self.table.device)
        for axis, n in enumerate(grid):
            block = per_axis(self.block, axis)
            along = (n - torch.arange(0, n, block, device=self.table.device)).clamp(max=block)
            sizes = (sizes[:, None] * along).flatten()
        return sizes

    def __repr__(self):
        return f"Blocks(table{tuple(self.table.shape)}, block={self.block!r})"


@dataclass(frozen=True, eq=False, repr=False)
class Tokens(Blocks):
    """Routed tokens: every query sees the keys that ``table`` lists for it; blocks of one token, on grids of any rank.

    ``table`` is ``(batch, queries, listed)`` or ``(batch, heads, queries, listed)`` of key indices in row-major order. -1 lists
    nothing; a key listed twice counts once; batch and heads may be 1.

    Source: Wei et al., Sparsifiner, arXiv:2303.13755.
    """

    block: Ints = field(default=1, init=False)
    source: ClassVar[str] = "arXiv:2303.13755"
    flat: ClassVar[bool] = True
    single: ClassVar[bool] = True

    def check(self, q_grid, k_grid):
        queries = math.prod(q_grid)
        if self.table.shape[-2] != queries:
            raise ValueError(f"table lists keys for {self.table.shape[-2]} queries; the grid {tuple(q_grid)} has {queries}")
        check_range(f"the table of {self!r}", self.table, -1, math.prod(k_grid), "keys")

    def __repr__(self):
        return f"Tokens(table{tuple(self.table.shape)})"


def flat_block(pos: Tensor, block: Ints, block_grid: tuple[int, ...]) -> Tensor:
    index = pos[..., 0] // per_axis(block, 0)
    for axis in range(1, len(block_grid)):
        index = index * block_grid[axis] + pos[..., axis] // per_axis(block, axis)
    return index


@dataclass(frozen=True, eq=False, repr=False)
class Clusters(_Routed):
    """A query sees the keys that carry its label.

    ``labels`` are integers ``(batch, *q_grid)`` or ``(batch, heads, *q_grid)`` flattened over the grid:
    ``(batch, queries)`` or ``(batch, heads, queries)``; ``key_labels`` likewise, by default the same.

    Source: Roy et al., Routing Transformer, arXiv:2003.05997.
    """

    labels: Tensor = positional()
    key_labels: Tensor | None = None
    source: ClassVar[str] = "arXiv:2003.05997"
    flat: ClassVar[bool] = True
    places_queries: ClassVar[bool] = False
    across_grids: ClassVar[bool] = True

    def __post_init__(self):
        for name in ("labels", "key_labels"):
            labels = getattr(self, name)
            if name == "labels" or labels is not None:
                object.__setattr__(self, name, _indices(name, labels, (2, 3), "(batch, [heads,] tokens)"))

    def rank(self):
        return None

    def check(self, q_grid, k_grid):
        keys = self.labels if self.key_labels is None else self.key_labels
        for name, labels, grid in (("query", self.labels, q_grid), ("key", keys, k_grid)):
            if labels.shape[-1] != math.prod(grid):
                raise ValueError(f"{labels.shape[-1]} {name} labels for a grid {tuple(grid)} of {math.prod(grid)} tokens")

    def as_labels(self):
        keys = self.labels if self.key_labels is None else self.key_labels
        queries, keys = (labels if labels.ndim == 3 else labels[:, None] for labels in (self.labels, keys))
        return queries, keys

    def batch_shapes(self):
        return [tuple(labels.shape[:-1]) for labels in (self.labels, self.key_labels) if labels is not None]

    def visible(self, q_pos, k_pos, q_grid, k_grid):
        queries, keys = self.as_labels()
        return queries[..., flat_block(q_pos, 1, tuple(q_grid))] == keys[..., flat_block(k_pos, 1, tuple(k_grid))]

    def transposed(self):
        return self if self.key_labels is None else replace(self, labels=self.key_labels, key_labels=self.labels)

    def __repr__(self):
        return f"Clusters(labels{tuple(self.labels.shape)})"


def _indices(name: str, value: object, ranks: tuple[int, ...], shape: str) -> Tensor:
    """A tensor of integers of one of some ranks, as int64."""
    tensor = check_tensor(name, value, INTEGERS, what=shape)
    if tensor.ndim not in ranks:
        raise ValueError(f"{name} must be integers {shape}; got {shown(tensor)}")
    return tensor if tensor.dtype == torch.int64 else tensor.long()


def leaves(pattern: Pattern) -> Iterator[Pattern]:
    """The patterns that a combination is made of, however deep; the pattern itself where it is none."""
    joined, groups = pattern.as_joined(), pattern.head_groups()
    if joined is None and groups is None:
        yield pattern
    for member in joined[0] if joined else [member for member, _ in groups or ()]:
        yield from leaves(member)


def tensors_of(pattern: Pattern) -> Iterable[Tensor]:
    """The tensors a routed pattern holds."""
    return (leaf for leaf in pytree.tree_leaves(pattern) if isinstance(leaf, Tensor))
