"""FIT: tokens look at each other inside their group; a few latents per group carry what the groups tell each other.

    x <- local(x);  z <- z + cross(z, x of its group);  z <- global(z);  x <- x + cross(x, z of its group);  and again

Tokens lie on a grid of (groups, tokens), latents on one of (groups, latents): "inside the group" is the last axis of both.
Cost: tokens times group size, and the latents squared. Source: Chen & Li, FIT, arXiv:2305.12689.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...layers.blocks import Residual
from ...layers.linear import Chain, linear
from ...layers.mixers import PatternMixer
from ...layers.mlps import MLP
from ...ops import attend
from ...ops import patterns as P


class CrossAttention(nn.Module):
    """``y = x + W_o softmax(q k^T / sqrt(d)) v`` with queries from ``LN(x)``, keys and values from ``LN(context)``.

    Args:
        dim, context_dim: channels of what looks and of what is looked at; the heads share the smaller of the two.
        heads: attention heads.
        hidden: of an MLP that follows, ``y + MLP(LN(y))``; 0 for none.
    """

    def __init__(self, dim: int, context_dim: int, heads: int, hidden: int = 0, **factory: Any) -> None:
        super().__init__()
        self.heads, width = heads, min(dim, context_dim)
        if width % heads:
            raise ValueError(f"the smaller of both widths must be a multiple of heads; got {dim}, {context_dim}, heads={heads}")
        self.norm = nn.LayerNorm(dim, eps=1e-6, **factory)
        self.context_norm = nn.LayerNorm(context_dim, eps=1e-6, **factory)
        self.q = nn.Linear(dim, width, **factory)
        self.kv = nn.Linear(context_dim, 2 * width, **factory)
        self.proj = nn.Linear(width, dim, **factory)
        self.mlp = _mlp(dim, hidden, factory) if hidden else nn.Identity()

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = linear(self.q, self.norm(x)).unflatten(-1, (self.heads, -1))
        k, v = linear(self.kv, self.context_norm(context)).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        y = attend(q, k, v)
        assert isinstance(y, Tensor)  # no lse was asked for
        return self.mlp(x + linear(self.proj, y.flatten(-2)))


class Segment(nn.Module):
    """Local blocks, latents reading their tokens (and a condition), global blocks, tokens reading their latents.

    Args:
        depths: local and global blocks; without global blocks the latents take no part.
        widths, heads: of tokens and of latents.
        local, wide: patterns of the local and the global blocks.
        conditional: whether latents also read a condition.
        writes: whether tokens read their latents afterwards.
        cross_mlp: whether an MLP follows where latents read tokens, and tokens latents.
        mlp_ratio: hidden channels of the MLPs over the width.
    """

    def __init__(
        self,
        depths: tuple[int, int],
        widths: tuple[int, int],
        heads: tuple[int, int],
        local: P.Pattern,
        wide: P.Pattern,
        *,
        conditional: bool,
        writes: bool,
        cross_mlp: bool,
        mlp_ratio: float,
        **factory: Any,
    ) -> None:
        super().__init__()
        (dim, latent_dim), fewer = widths, min(heads)
        hidden, latent_hidden = (int(d * mlp_ratio) if cross_mlp else 0 for d in widths)
        self.local = _transformer(depths[0], dim, heads[0], local, mlp_ratio, factory)
        if depths[1]:
            self.read = CrossAttention(latent_dim, dim, fewer, latent_hidden, **factory)
            self.wide = _transformer(depths[1], latent_dim, heads[1], wide, mlp_ratio, factory)
        both = bool(depths[1])
        self.condition = CrossAttention(latent_dim, latent_dim, heads[1], **factory) if both and conditional else None
        self.write = CrossAttention(dim, latent_dim, fewer, hidden, **factory) if both and writes else None
        self.both = both

    def forward(self, x: Tensor, z: Tensor, condition: Tensor | None, delay: int) -> tuple[Tensor, Tensor]:
        """Tokens ``(batch, groups, tokens, dim)`` and latents ``(batch, groups, latents, latent_dim)``.

        Tokens read the latents of ``delay`` groups before; where there are none, zeros.
        """
        x = self.local(x)
        if not self.both:
            return x, z
        groups = x.shape[:2]
        z = self.read(z.flatten(0, 1), x.flatten(0, 1)).unflatten(0, groups)
        if self.condition is not None:
            z = self.condition(z, condition)
        z = self.wide(z)
        if self.write is not None:
            late = F.pad(z[:, : groups[1] - delay], (0, 0, 0, 0, delay, 0))
            x = self.write(x.flatten(0, 1), late.flatten(0, 1)).unflatten(0, groups)
        return x, z


def _mlp(dim: int, hidden: int, factory: dict) -> Residual:
    return Residual(nn.LayerNorm(dim, eps=1e-6, **factory), MLP(dim, hidden, **factory))


def _transformer(depth: int, dim: int, heads: int, pattern: P.Pattern, mlp_ratio: float, factory: dict) -> nn.Sequential:
    """Pre-norm blocks of attention and MLP."""
    return nn.Sequential(
        *(
            part
            for _ in range(depth)
            for part in (
                Residual(
                    nn.LayerNorm(dim, eps=1e-6, **factory),
                    PatternMixer(dim, heads, pattern, relative_bias=False, rank=2, **factory),
                ),
                _mlp(dim, int(dim * mlp_ratio), factory),
            )
        )
    )


class Interleaved(nn.Module):
    """What the three FITs share: token positions, latents and segments.

    Args:
        layers: local blocks in brackets and global blocks in turn, such as ``"(2)4(2)4(2)"``.
        groups, group_size, latents: groups, tokens per group and latents per group.
        dim, latent_dim, heads, latent_heads: channels and heads of tokens and of latents.
        causal: whether tokens see only those before them in their group, and latents only their own and earlier groups.
        conditional: whether latents read a condition ``(batch, tokens, latent_dim)``.
        cross_mlp: whether an MLP follows where latents read tokens, and tokens latents.
        mlp_ratio: hidden channels of the MLPs over the width.

    Raises:
        ValueError: layers that cannot be read; segments before the last without global blocks.
    """

    def __init__(
        self,
        layers: str,
        groups: int,
        group_size: int,
        latents: int,
        dim: int,
        latent_dim: int,
        heads: int,
        latent_heads: int,
        *,
        causal: bool = False,
        conditional: bool = False,
        cross_mlp: bool = False,
        mlp_ratio: float = 4.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        depths = _depths(layers)
        factory = {"device": device, "dtype": dtype}
        self.grid, self.causal = (groups, group_size), causal
        self.positions = nn.Parameter(torch.empty(group_size, dim, **factory))
        nn.init.normal_(self.positions, std=0.02)
        self.register_parameter("latents", None)
        wide: P.Pattern = P.Dense()
        if any(depth for _, depth in depths):
            self.latents = nn.Parameter(torch.empty(groups, latents, latent_dim, **factory))
            nn.init.normal_(self.latents, std=0.02)
            wide = P.Neighborhood((groups, latents), causal=(True, False)) if causal else wide
        self.segments = nn.ModuleList(
            Segment(
                depth, (dim, latent_dim), (heads, latent_heads), P.Axis(1, causal), wide,
                conditional=conditional, writes=i < len(depths) - 1, cross_mlp=cross_mlp, mlp_ratio=mlp_ratio, **factory,
            )
            for i, depth in enumerate(depths)
        )  # fmt: skip

    def check(self, x: Tensor, *dim: int) -> None:
        """Raise ``ValueError`` where ``x`` is not tokens in these groups."""
        if tuple(x.shape[1:]) != (*self.grid, *dim) or x.ndim != 3 + len(dim):
            shape = ", ".join(map(str, (*self.grid, *dim)))
            raise ValueError(f"expected x (batch, {shape}); got {tuple(x.shape)}")

    def forward(
        self, x: Tensor, condition: Tensor | None = None, before: Tensor | None = None, extra: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokens and latents after all segments.

        ``before`` is added to the first latents; ``extra`` are tokens ``(batch, groups, n, dim)`` without positions that stand
        before those of their group, here and in the result.
        """
        z = x[:, :, :0] if self.latents is None else self.latents.expand(len(x), -1, -1, -1)
        z = z if before is None else z + before
        x = x + self.positions
        x = x if extra is None else torch.cat((extra, x), 2)
        for segment in self.segments:
            x, z = segment(x, z, condition, int(self.causal))
        return x, z


def _depths(layers: str) -> Sequence[tuple[int, int]]:
    """Local and global blocks of each segment."""
    text = layers + "0" if layers.endswith(")") else layers
    if not re.fullmatch(r"(\(\d+\)\d+)+", text):
        raise ValueError(f"layers must be (local blocks) and global blocks in turn, such as '(2)4(2)'; got {layers!r}")
    depths = [(int(local), int(wide)) for local, wide in re.findall(r"\((\d+)\)(\d+)", text)]
    if any(wide == 0 for _, wide in depths[:-1]):
        raise ValueError(f"only the last segment may have no global blocks; got {layers!r}")
    return depths


def _stem(in_dim: int, dim: int, factory: dict) -> Chain:
    return Chain(nn.Linear(in_dim, dim, **factory), nn.LayerNorm(dim, eps=1e-6, **factory))


class FIT(nn.Module):
    """The encoder: features of grouped tokens ``(batch, groups, group_size, in_dim)``, and its latents.

    An image is grouped by :func:`regard.ops.tokens.permute.to_tiles`, so that a group is a tile.

    Args:
        in_dim: channels of the input.
        extra_dim: channels of further tokens of each group; 0 where there are none.
        **body: see :class:`Interleaved`.
    """

    def __init__(self, layers: str, groups: int, group_size: int, latents: int, in_dim: int, dim: int, latent_dim: int,
                 heads: int, latent_heads: int, *, extra_dim: int = 0, device=None, dtype=None, **body) -> None:  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.stem = _stem(in_dim, dim, factory)
        self.extra_stem = _stem(extra_dim, dim, factory) if extra_dim else None
        self.body = Interleaved(layers, groups, group_size, latents, dim, latent_dim, heads, latent_heads, **factory, **body)
        self.norm = nn.LayerNorm(dim, eps=1e-6, **factory)
        self.latent_norm = None if self.body.latents is None else nn.LayerNorm(latent_dim, eps=1e-6, **factory)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encode.

        Args:
            x: ``(batch, groups, group_size, in_dim)``.
            extra: ``(batch, groups, n, extra_dim)``, tokens without positions that take part in their group.

        Returns:
            The tokens of each group, the extra ones first, ``(batch, groups, n + group_size, dim)``, and the latents
            ``(batch, groups, latents, latent_dim)``.
        """
        self.body.check(x, self.stem[0].in_features)  # type: ignore[arg-type]  # of the linear layer
        if extra is not None:
            width = 0 if self.extra_stem is None else self.extra_stem[0].in_features
            if self.extra_stem is None or extra.shape[:2] != x.shape[:2] or extra.ndim != 4 or extra.shape[-1] != width:
                shape = f"(batch, {x.shape[1]}, n, {width})" if width else "none, as extra_dim is 0"
                raise ValueError(f"expected extra {shape}; got {tuple(extra.shape)}")
            extra = self.extra_stem(extra)
        x, z = self.body(self.stem(x), extra=extra)
        return self.norm(x), z if self.latent_norm is None else self.latent_norm(z)


class FITDenoiser(nn.Module):
    """The diffusion denoiser: what is left of noise in grouped tokens, given the time and a condition.

    Args:
        in_dim, out_dim: channels of the input and of the prediction, the same by default.
        condition_dim: channels of the condition's tokens.
        layers to latent_heads, cross_mlp, mlp_ratio: see :class:`Interleaved`.
    """

    def __init__(self, layers: str, groups: int, group_size: int, latents: int, in_dim: int, dim: int, latent_dim: int,
                 heads: int, latent_heads: int, *, condition_dim: int, out_dim: int | None = None, cross_mlp: bool = False,
                 mlp_ratio: float = 4.0, device=None, dtype=None) -> None:  # fmt: skip
        super().__init__()
        if latent_dim % 8:
            raise ValueError(f"latent_dim must be a multiple of 8, for the waves of the time; got {latent_dim}")
        factory = {"device": device, "dtype": dtype}
        self.stem = _stem(in_dim, dim, factory)
        self.waves = latent_dim // 8
        self.time = nn.Sequential(
            nn.Linear(2 * self.waves, latent_dim, **factory), nn.SiLU(), nn.Linear(latent_dim, latent_dim, **factory)
        )
        self.condition = nn.Linear(condition_dim, latent_dim, **factory)
        self.before = _mlp(latent_dim, int(latent_dim * mlp_ratio), factory)
        self.before_norm = nn.LayerNorm(latent_dim, eps=1e-6, **factory)
        nn.init.zeros_(self.before_norm.weight)
        self.body = Interleaved(
            layers, groups, group_size, latents, dim, latent_dim, heads, latent_heads, conditional=True,
            cross_mlp=cross_mlp, mlp_ratio=mlp_ratio, **factory,
        )  # fmt: skip
        if self.body.latents is None:
            raise ValueError(f"time and condition enter through the latents: layers need global blocks; got {layers!r}")
        self.head = Chain(nn.LayerNorm(dim, eps=1e-6, **factory), nn.Linear(dim, out_dim or in_dim, **factory))

    def forward(self, x: Tensor, time: Tensor, condition: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Predict for noisy tokens.

        Args:
            x: ``(batch, groups, group_size, in_dim)``.
            time: ``(batch,)`` in [0, 1].
            condition: ``(batch, tokens, condition_dim)``.
            before: latents of an earlier estimate ``(batch, groups, latents, latent_dim)``; zeros by default.

        Returns:
            The prediction ``(batch, groups, group_size, out_dim)`` and the latents.
        """
        self.body.check(x, self.stem[0].in_features)  # type: ignore[arg-type]  # of the linear layer
        seen = torch.cat((self.time(self._waves(time).to(x.dtype))[:, None], linear(self.condition, condition)), 1)
        latents = self.body.latents
        assert latents is not None  # the constructor checked
        before = latents.new_zeros(len(x), *latents.shape) if before is None else before
        x, z = self.body(self.stem(x), seen, self.before_norm(self.before(before)))
        return self.head(x), z

    def _waves(self, time: Tensor) -> Tensor:
        """Sines and cosines of the time ``(batch, channels)``, of mean 0 and variance 1."""
        time = time.to(torch.promote_types(time.dtype, torch.float32))
        steps = torch.arange(self.waves, device=time.device, dtype=time.dtype)
        frequencies = 10000.0 ** (-steps / self.waves)
        angles = 1000.0 * time[:, None] * frequencies
        return F.layer_norm(torch.cat((angles.sin(), angles.cos()), -1), (2 * self.waves,), eps=0.0)


class FITAutoregressive(nn.Module):
    """The decoder: logits of the next token, at every token of groups of integers ``(batch, groups, group_size)``.

    Tokens see those before them in their group, and earlier groups through latents that come one group late.

    Args:
        values: tokens are ``0 .. values - 1``.
        tied: whether the embedding of a value is also its output weight.
        **body: see :class:`Interleaved`.
    """

    def __init__(self, layers: str, groups: int, group_size: int, latents: int, values: int, dim: int, latent_dim: int,
                 heads: int, latent_heads: int, *, tied: bool = True, device=None, dtype=None, **body) -> None:  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.embed = nn.Embedding(values, dim, **factory)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.body = Interleaved(
            layers, groups, group_size, latents, dim, latent_dim, heads, latent_heads, causal=True, **factory, **body
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6, **factory)
        self.head = nn.Linear(dim, values, **factory)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(batch, groups, group_size, values)``: at each token, of the one that follows it."""
        self.body.check(x)
        return linear(self.head, self.norm(self.body(self.embed(x))[0]))
