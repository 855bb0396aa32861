"""Channel group attention: A = softmax(k^T v / sqrt(d)) (d x d) over the channels of a head,  y_n = A q_n.

Cost: tokens times channels times head width, linear in tokens. Source: Ding et al., DaViT, arXiv:2204.03645.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...checks import checked
from ...ops.channel import channel_attend
from ..linear import project_qkv
from .base import TokenMixer
from .registry import register_mixer


@register_mixer("channel_group")
class ChannelGroupAttention(TokenMixer):
    """Attention of channels to the channels of their group; every token of the image takes part in the affinities.

    As in the published weights, the affinity is between what they call keys and values, and the queries are what is mixed.
    Tokens outside the grid are tokens like the others; a ``context`` gives keys and values, and so the affinities.

    Args:
        dim: channels.
        heads: groups of channels.
        qkv_bias, proj_bias: whether the projections have a bias.
        scale: factor on the affinities, ``(dim // heads) ** -0.5`` by default.
        proj_drop: dropout on the output.

    Raises:
        ValueError: ``dim`` is not a multiple of ``heads``; input of another width.
    """

    @checked()
    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        scale: float | None = None,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(dim, heads)
        self.scale = scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of ``x``, keys and values of ``context``, sequences both: ``(batch, n, heads, width)``."""
        q, k, v = project_qkv(self.qkv, x, context, (self.dim,) * 3)
        return q.unflatten(-1, (self.heads, -1)), k.unflatten(-1, (self.heads, -1)), v.unflatten(-1, (self.heads, -1))

    def forward(self, x: Tensor, extra: Tensor | None = None, *, context: Tensor | None = None) -> Any:
        """Mix channels; arguments and results as for :class:`AttentionMixer`."""
        self.check_tokens(x, extra, context)
        count = x.shape[1:-1].numel()
        beside = [] if extra is None else [extra]
        tokens = torch.cat([x.flatten(1, -2), *beside], 1)
        q, k, v = self.project(tokens, tokens if context is None else torch.cat([context.flatten(1, -2), *beside], 1))
        y = self.project_out(channel_attend(k, v, q, scale=self.scale).flatten(-2))
        grid = y[:, :count].unflatten(1, x.shape[1:-1])
        return grid if extra is None else (grid, y[:, count:])
