"""Axial Transformer: images written pixel by pixel, with all pixels above seen through two cheap axes.

    u = shift_down(columns-and-rows(embed(x) + c));  logits = head(causal rows(u + c + shift_right(embed(x))))

Rows are looked along freely and columns causally, so that u at row i knows the rows above i and nothing else; the causal rows
of the inner decoder add the pixels to the left. Slices (colour channels, frames) follow one another: c is what axial
attention without masks makes of the slices before.
Cost: pixels times the sum of the axis lengths, per layer. Source: Ho et al., Axial Transformer, arXiv:1912.12180.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...layers.blocks import Residual
from ...layers.linear import linear
from ...layers.mixers import AxialAttention
from ...layers.mlps import MLP


class AxialBlock(nn.Module):
    """``y = x + attention along one axis(LN(x))``, then ``y + MLP(LN(y))``, on ``(batch, height, width, dim)``.

    Args:
        dim, heads: channels and attention heads.
        axis: 0 looks along columns, 1 along rows.
        causal: whether a pixel sees only itself and what precedes it on the axis.
        mlp_ratio: hidden channels of the MLP over ``dim``.
    """

    def __init__(
        self, dim: int, heads: int, axis: int, *, causal: bool = False, mlp_ratio: float = 4.0, device=None, dtype=None
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.attention = AxialAttention(dim, heads, (axis,), causal=causal, **factory)
        self.norm = nn.LayerNorm(dim, **factory)
        self.mlp = Residual(nn.LayerNorm(dim, **factory), MLP(dim, int(dim * mlp_ratio), **factory))

    def forward(self, x: Tensor, cache: list[Tensor] | None = None) -> Tensor:
        """Mix all pixels; or, where a causal layer is given a cache of those before, the next ones on its axis."""
        y = self.norm(x)
        if cache is None or not self.attention.causal:
            return self.mlp(x + self.attention(y))
        return self.mlp(x + self.attention.extend(y, cache))


class AxialTransformer(nn.Module):
    """Distribution of an image of integers, each pixel given those before: slice by slice, in raster order.

    Args:
        size: height and width.
        slices: colour channels or frames, written one after the other.
        values: each pixel is one of ``0 .. values - 1``.
        dim, heads: channels and attention heads.
        outer, inner, encoder: pairs of row and column blocks of the outer decoder, row blocks of the inner decoder, pairs of
            blocks that read the slices before.
        mlp_ratio: hidden channels of the MLPs over ``dim``.

    Raises:
        ValueError: sizes that are not positive; input that is not integers ``(batch, slices, height, width)``.
    """

    def __init__(
        self,
        size: Sequence[int],
        slices: int = 1,
        values: int = 256,
        dim: int = 512,
        heads: int = 8,
        *,
        outer: int = 4,
        inner: int = 4,
        encoder: int = 2,
        mlp_ratio: float = 4.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if len(size) != 2 or min(*size, slices, values, outer, inner) < 1:
            given = f"{tuple(size)}, {slices}, {values}, {outer} and {inner}"
            raise ValueError(f"size (height, width), slices, values, outer and inner must be positive; got {given}")
        self.size, self.slices, self.values = tuple(size), slices, values
        factory = {"device": device, "dtype": dtype}

        def block(axis: int, causal: bool = False) -> AxialBlock:
            return AxialBlock(dim, heads, axis, causal=causal, mlp_ratio=mlp_ratio, **factory)

        self.embed = nn.Embedding(values, dim, **factory)
        self.rows = nn.Parameter(torch.empty(size[0], 1, dim, **factory))
        self.columns = nn.Parameter(torch.empty(size[1], dim, **factory))
        if slices > 1:
            self.past = nn.Embedding((slices - 1) * values, dim, **factory)
            self.order = nn.Parameter(torch.empty(slices, 1, 1, dim, **factory))
            self.encoder = nn.Sequential(*(block(axis) for _ in range(encoder) for axis in (1, 0)))
        self.outer = nn.ModuleList(block(axis, causal=axis == 0) for _ in range(outer) for axis in (1, 0))
        self.inner = nn.ModuleList(block(1, causal=True) for _ in range(inner))
        self.norm = nn.LayerNorm(dim, **factory)
        self.head = nn.Linear(dim, values, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        embeddings = [module.weight for module in self.modules() if isinstance(module, nn.Embedding)]
        for table in (*self.parameters(recurse=False), *embeddings):
            nn.init.normal_(table, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(batch, slices, height, width, values)`` of every pixel of ``x (batch, slices, height, width)``."""
        if x.ndim != 4 or tuple(x.shape[1:]) != (self.slices, *self.size) or x.is_floating_point():
            shape = f"(batch, {self.slices}, {self.size[0]}, {self.size[1]})"
            raise ValueError(f"expected integers {shape}; got {tuple(x.shape)} of {x.dtype}")
        context = self.context(x).flatten(0, 1)
        h = self.embed(x.flatten(0, 1)) + self.positions  # (batch * slices, height, width, dim)
        above = h + context
        for block in self.outer:
            above = block(above)
        h = self._join(_shift(above, 1), _shift(h, 2), self.positions, context)
        for block in self.inner:
            h = block(h)
        return linear(self.head, self.norm(h)).unflatten(0, x.shape[:2])

    def bits_per_dim(self, x: Tensor) -> Tensor:
        """Mean number of bits that a pixel costs: the loss, and the published measure."""
        return F.cross_entropy(self(x).flatten(0, -2), x.flatten()) / math.log(2)

    @torch.no_grad()
    def sample(self, count: int, *, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Draw images ``(count, slices, height, width)``; temperature 0 takes the likeliest value of every pixel."""

        def draw(logits: Tensor) -> Tensor:
            if temperature == 0:
                return logits.argmax(-1)
            return torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)[:, 0]

        return self.write(count, draw)

    def write(self, count: int, choose: Callable[[Tensor], Tensor]) -> Tensor:
        """Write images pixel by pixel; ``choose`` turns logits ``(count, values)`` into values ``(count,)``.

        Semi-parallel: the slices before are read once a slice, the outer decoder runs once a row on that row, the inner
        decoder once a pixel on that pixel; keys and values of what came before are kept.
        """
        height, width = self.size
        x = torch.zeros(count, self.slices, height, width, dtype=torch.long, device=self.rows.device)
        positions = self.positions
        for part in range(self.slices):
            context = self.context(x)[:, part]
            columns: list[list[Tensor]] = [[] for _ in self.outer]
            above = torch.zeros_like(context[:, :1])
            for row in range(height):
                at = slice(row, row + 1)
                caches: list[list[Tensor]] = [[] for _ in self.inner]
                left = torch.zeros_like(above[:, :, :1])
                for column in range(width):
                    here = (slice(None), at, slice(column, column + 1))
                    h = self._join(above[:, :, here[2]], left, positions[here[1:]], context[here])
                    for block, cache in zip(self.inner, caches, strict=True):
                        h = block(h, cache)
                    x[:, part, row, column] = choose(linear(self.head, self.norm(h))[:, 0, 0])
                    left = self.embed(x[:, part, at, here[2]]) + positions[here[1:]]
                above = self.embed(x[:, part, at]) + positions[at] + context[:, at]
                for block, cache in zip(self.outer, columns, strict=True):
                    above = block(above, cache)
        return x

    @property
    def positions(self) -> Tensor:
        """One table an axis, summed: ``(height, width, dim)``."""
        return self.rows + self.columns

    def context(self, x: Tensor) -> Tensor:
        """What each slice knows of those before it ``(batch, slices, height, width, dim)``."""
        if self.slices == 1:
            return torch.zeros_like(self.positions).expand(len(x), 1, *self.size, -1)
        first = torch.arange(self.slices - 1, device=x.device)[:, None, None] * self.values
        before = F.pad(self.past(x[:, :-1] + first).cumsum(1), (0, 0, 0, 0, 0, 0, 1, 0))  # (batch, slices, height, width, dim)
        read = self.encoder((before + self.order + self.positions).flatten(0, 1))
        return read.unflatten(0, before.shape[:2])

    def _join(self, above: Tensor, left: Tensor, positions: Tensor, context: Tensor) -> Tensor:
        """What the inner decoder starts from; positions once more, for the shifts moved those of its inputs."""
        return above + left + positions + context


def _shift(x: Tensor, axis: int) -> Tensor:
    """Move tokens by one along an axis of ``(batch, height, width, dim)``, zeros first: nobody sees himself."""
    first = torch.zeros_like(x.narrow(axis, 0, 1))
    return torch.cat((first, x.narrow(axis, 0, x.shape[axis] - 1)), axis)
