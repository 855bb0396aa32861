"""What all attention mixers share: project, ask the mechanism for its sources, attend, project back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import LARGEST, check_choice, check_integer, check_number, check_tensor, checked
from ...ops import Source, attend
from ...ops.backends.choice import BACKENDS
from ...ops.patterns import Dense, Pattern
from ..linear import linear, project_qkv
from ..positions import OffsetBias, RotaryPositions


class TokenMixer(nn.Module):
    """Base of all token mixers ``(batch, *grid, dim) -> (batch, *grid, dim)``: checks of sizes and of tokens.

    Args:
        dim, heads: channels, and the heads that share them.
        head_dim: channels of a head; ``dim // heads`` by default.

    Raises:
        ValueError: ``dim`` is not a multiple of ``heads`` and no ``head_dim`` is given.
    """

    rank: int | None = None
    """Grid axes that a mechanism is made for; None for any number."""
    joins_extra: ClassVar[bool] = True
    """Whether tokens outside the grid see its tokens."""
    one_grid: ClassVar[bool] = False
    """Whether a context must lie on the grid of the tokens that look at it."""
    proj: nn.Module
    proj_drop: nn.Module

    def __init__(self, dim: int, heads: int, head_dim: int | None = None) -> None:
        super().__init__()
        check_sizes_of(dim, heads, head_dim)
        self.dim, self.heads = dim, heads

    def check_tokens(self, x: Tensor, extra: Tensor | None = None, context: Tensor | None = None) -> None:
        """Check the inputs of the mixer, see :func:`check_tokens`."""
        check_tokens(self.dim, self.rank, x, extra, context)
        if self.one_grid and context is not None and context.shape != x.shape:
            raise ValueError(f"windows lie on one grid: expected a context {tuple(x.shape)}; got {tuple(context.shape)}")

    def project_out(self, y: Tensor) -> Tensor:
        """The last projection, of a mixer that has ``proj`` and ``proj_drop``."""
        return self.proj_drop(linear(self.proj, y))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}"


class AttentionMixer(TokenMixer):
    """Token mixer ``(batch, *grid, dim) -> (batch, *grid, dim)`` by softmax attention.

    A mechanism overrides :meth:`sources`. Tokens outside the grid (class, register, prompt) come as ``extra`` and see, and
    are seen by, everything. With ``context`` the keys and values come from another grid.

    Args:
        dim: channels.
        heads: attention heads.
        kv_heads: key and value heads, a divisor of ``heads``; all by default.
        head_dim: width of the queries and keys of a head, ``dim // heads`` by default.
        value_dim: width of the values of a head, ``head_dim`` by default.
        qkv_bias, proj_bias: whether the projections have a bias.
        rope: whether queries and keys are rotated by their grid positions.
        scale: factor on the logits, ``head_dim ** -0.5`` by default.
        attn_drop, proj_drop: dropout on the attention weights and on the output.
        backend: see :func:`regard.attend`.

    Raises:
        ValueError: ``dim`` is not a multiple of ``heads`` and no ``head_dim`` is given; input of another width or rank.
    """

    @checked()
    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        rope: bool = False,
        scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        backend: str = "auto",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(dim, heads, head_dim)
        for name, size in (("kv_heads", kv_heads), ("head_dim", head_dim), ("value_dim", value_dim)):
            if size is not None:
                check_integer(name, size, 1)
        if scale is not None:
            check_number("scale", scale)
        self.kv_heads = kv_heads or heads
        if heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads; got heads={heads}, kv_heads={self.kv_heads}")
        self.head_dim = head_dim or dim // heads
        check_number("attn_drop", attn_drop, 0.0, below=1.0)
        check_number("proj_drop", proj_drop, 0.0, below=1.0)
        check_choice("backend", backend, ("auto", *BACKENDS))
        self.value_dim = value_dim or self.head_dim
        self.scale, self.attn_drop, self.backend = scale, attn_drop, backend
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.widths = (heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.value_dim)
        if dim * sum(self.widths) > LARGEST:
            raise ValueError(
                f"the projections would have more than {LARGEST} weights; got {dim=}, {heads=}, widths {self.widths}"
            )
        self.add_projections(qkv_bias, factory)
        self.rope = RotaryPositions() if rope else None
        self.proj: nn.Module = nn.Linear(heads * self.value_dim, dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    @property
    def factory(self) -> dict[str, Any]:
        """Device and dtype of the parameters, for further ones."""
        like = next(self.parameters())
        return {"device": like.device, "dtype": like.dtype}

    def add_projections(self, bias: bool, factory: dict[str, Any]) -> None:
        """Create the layers that :meth:`project` uses."""
        self.qkv = nn.Linear(self.dim, sum(self.widths), bias=bias, **factory)

    def initialise(self) -> None:
        """Start in a way of the mechanism's own; models call it after they have drawn the weights of all linear layers."""

    def sources(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Sequence[Source]:
        """The sources that grid queries see: ``k`` and ``v`` are ``(batch, *grid, kv_heads, head_dim)``."""
        raise NotImplementedError

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, extra: Sequence[Source]) -> Tensor:
        """What grid queries gather from their sources and from the ``extra`` tokens: ``(batch, *grid, heads, value_dim)``."""
        return self.attend(q, [*self.sources(x, q, k, v), *extra])

    def padding(self, grid: Sequence[int]) -> Sequence[int]:
        """Tokens of zeros appended to each axis before projection, for mechanisms whose numbers depend on it."""
        return (0,) * len(grid)

    def weigh_heads(self, y: Tensor, x: Tensor, q: Tensor) -> Tensor:
        """The heads' outputs ``(batch, *tokens, heads, value_dim)`` of grid or extra tokens, weighted where a mechanism does.

        ``x`` are the tokens and ``q`` their queries, which a rotation may have turned.
        """
        return y

    def finish(self, y: Tensor, x: Tensor, v: Tensor) -> Tensor:
        """What is done to the heads' joint output ``(batch, *grid, heads * value_dim)`` before the projection."""
        return y

    def attend(self, q: Tensor, sources: Sequence[Source], q_start: int | Sequence[int] = 0) -> Tensor:
        """:func:`regard.attend` with the mixer's scale, dropout and backend."""
        dropout = self.attn_drop if self.training else 0.0
        y = attend(q, sources, scale=self.scale, q_start=q_start, dropout=dropout, backend=self.backend)
        assert isinstance(y, Tensor)  # no lse was asked for
        return y

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of ``x``, keys and values of ``context``: ``(batch, *grid, heads, width)``."""
        q, k, v = project_qkv(self.qkv, x, context, self.widths)
        return (
            q.unflatten(-1, (self.heads, self.head_dim)),
            k.unflatten(-1, (self.kv_heads, self.head_dim)),
            v.unflatten(-1, (self.kv_heads, self.value_dim)),
        )

    def forward(self, x: Tensor, extra: Tensor | None = None, *, context: Tensor | None = None) -> Any:
        """Mix tokens.

        Args:
            x: ``(batch, *grid, dim)``.
            extra: tokens outside the grid ``(batch, n, dim)``.
            context: ``(batch, *key_grid, dim)``, where keys and values come from; ``x`` by default.

        Returns:
            A tensor like ``x``; with ``extra`` also one like it.
        """
        self.check_tokens(x, extra, context)
        grid = tuple(x.shape[1:-1])
        key_grid = grid if context is None else tuple(context.shape[1:-1])
        x = self._pad(x)
        q, k, v = self.project(x, x if context is None else self._pad(context))
        if self.rope is not None:
            q, k = self.rope(q), self.rope(k)
        if extra is None:
            return self._out(self.weigh_heads(self.mix(x, q, k, v, []), x, q), x, v, grid)
        extra_q, extra_k, extra_v = self.project(extra, extra)
        seen = Source(extra_k, extra_v, Dense())  # named, since a compiled graph cannot make a default value
        y = self._out(self.weigh_heads(self.mix(x, q, k, v, [seen]), x, q), x, v, grid)
        y_extra = self.attend(extra_q, [Source(_crop(k, key_grid), _crop(v, key_grid), Dense()), seen])
        y_extra = self.weigh_heads(y_extra, extra, extra_q)
        return y, self.project_out(y_extra.flatten(-2))

    def _pad(self, x: Tensor) -> Tensor:
        pads = self.padding(tuple(x.shape[1:-1]))
        return F.pad(x, [0, 0, *(n for pad in reversed(pads) for n in (0, pad))]) if any(pads) else x

    def _out(self, y: Tensor, x: Tensor, v: Tensor, grid: tuple[int, ...]) -> Tensor:
        return self.project_out(_crop(self.finish(y.flatten(-2), x, v), grid))

    def extra_repr(self) -> str:
        kv = f", kv_heads={self.kv_heads}" if self.kv_heads != self.heads else ""
        return f"{super().extra_repr()}{kv}"


class SplitMixer(AttentionMixer):
    """Attention whose queries have a layer of their own, ``q``, apart from that of keys and values, ``kv``.

    Args:
        dim, heads, **projections: see :class:`AttentionMixer`.
    """

    def add_projections(self, bias: bool, factory: dict[str, Any]) -> None:
        self.q = nn.Linear(self.dim, self.widths[0], bias=bias, **factory)
        self.kv = nn.Linear(self.dim, sum(self.widths[1:]), bias=bias, **factory)

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (linear(self.q, x).unflatten(-1, (self.heads, self.head_dim)), *self.project_keys(context))

    def project_keys(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of ``context`` alone."""
        k, v = linear(self.kv, context).split(self.widths[1:], -1)
        return k.unflatten(-1, (self.kv_heads, self.head_dim)), v.unflatten(-1, (self.kv_heads, self.value_dim))

    def sources(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Sequence[Source]:
        return [Source(k, v, Dense())]


class PatternMixer(AttentionMixer):
    """Attention under one static pattern, with an optional learned bias over its offsets.

    Args:
        dim, heads: channels and attention heads.
        pattern: which keys a query sees.
        relative_bias: whether to learn an :class:`OffsetBias`.
        rank: number of grid axes the bias is for.
        grid: the largest grid, for patterns whose offsets only the grid bounds.
        **projections: see :class:`AttentionMixer`.
    """

    @checked(rank=0)
    def __init__(
        self,
        dim: int,
        heads: int,
        pattern: Pattern,
        *,
        relative_bias: bool,
        rank: int,
        grid: Sequence[int] | None = None,
        **projections,
    ) -> None:
        super().__init__(dim, heads, **projections)
        self.pattern = pattern
        self.rank = rank if relative_bias else None
        self.bias = OffsetBias(heads, pattern, rank, grid=grid, **self.factory) if relative_bias else None

    def sources(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Sequence[Source]:
        return [Source(k, v, self.pattern, bias=self.bias)]


def check_tokens(dim: int, rank: int | None, x: Tensor, extra: Tensor | None = None, context: Tensor | None = None) -> None:
    """Check the inputs of a mixer of ``dim`` channels, on a grid of ``rank`` axes (None for any number).

    Raises:
        TypeError: no tensor, or one that is not dense or not floating point.
        ValueError: another width, rank, batch size, dtype or device, or a grid without tokens.
    """
    axes = "*grid" if rank is None else f"{rank} grid axes"
    for name, tokens, shape, count in (("x", x, axes, rank), ("extra", extra, "n", 1), ("context", context, axes, rank)):
        if tokens is None and name != "x":
            continue
        there = check_tensor(name, tokens, what=f"(batch, {shape}, {dim})", device=x.device if name != "x" else None)
        empty = name != "extra" and 0 in there.shape[1:]
        if there.ndim < 3 or there.shape[-1] != dim or (count is not None and there.ndim != count + 2) or empty:
            hint = _layout_hint(there.shape, dim, count) if name == "x" else ""
            raise ValueError(f"expected {name} (batch, {shape}, {dim}); got {tuple(there.shape)}{hint}")
        if there.shape[0] != x.shape[0]:
            raise ValueError(f"expected {name} of as many images as x, {x.shape[0]}; got {name} {tuple(there.shape)}")
        if there.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"expected {name} in the dtype of x, {x.dtype}; got {there.dtype}")


def _layout_hint(shape: Sequence[int], dim: int, rank: int | None) -> str:
    """What brings tokens of another common layout into ``(batch, *grid, dim)``: channels first, or a flat row of them."""
    if len(shape) == 3 and shape[-1] == dim and rank is not None and rank > 1:
        return ": give the tokens their grid, x.unflatten(1, grid)"
    if len(shape) > 3 and shape[1] == dim != shape[-1]:
        return ": channels come last, x.movedim(1, -1)"
    return ""


def check_sizes_of(dim: int, heads: int, head_dim: int | None = None) -> None:
    """Check channels and heads, where each head has its share of the channels unless its width is given."""
    check_integer("dim", dim, 1)
    check_integer("heads", heads, 1)
    if head_dim is None and dim % heads:
        raise ValueError(f"dim must be a positive multiple of heads; got dim={dim}, heads={heads}")


def _crop(x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """The first tokens of every axis of ``(batch, *grid, ...)``."""
    if x.shape[1 : 1 + len(grid)] == grid:
        return x
    return x[(slice(None), *(slice(n) for n in grid))]
