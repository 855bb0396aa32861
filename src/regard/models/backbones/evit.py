"""EViT: the patches that the class token attends to least become one, between attention and MLP of three blocks.

    keep the ceil(rate * n) patches with the largest mean over heads of attention(class, patch);  fused = sum of the others,
    each weighted with that attention;  [class, kept, fused] goes on
Cost: that of ViT for fewer and fewer tokens; no parameters, so that every DeiT checkpoint fits. Source: Liang et al., EViT,
arXiv:2202.07800.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from ...layers.linear import linear
from ...layers.mixers import MultiHeadAttention
from ...layers.reduce import FusingReducer, TokenReducer, cosine_rate
from ...ops import Source
from ...ops import patterns as P
from ...ops.attention.weights import attend_weights
from ..registry import ModelCard, register_models
from .vit import TokenBlockSpec, TransformerSpec, VisionTransformer, vit


class ScoredAttention(MultiHeadAttention):
    """Dense attention that also tells how much of the first token outside the grid goes to each token of the grid."""

    def forward_scored(self, x: Tensor, extra: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mix tokens, see :meth:`AttentionMixer.forward`; the scores ``(batch, n)`` are means over heads, with gradient."""
        q, k, v = self.project(x, x)
        extra_q, extra_k, extra_v = self.project(extra, extra)
        sources = [Source(k, v, P.Dense()), Source(extra_k, extra_v, P.Dense())]
        y, y_extra = (self.proj_drop(linear(self.proj, self.attend(each, sources).flatten(-2))) for each in (q, extra_q))
        scores, _ = attend_weights(extra_q[:, :1], sources, scale=self.scale, reduce="heads")
        return y, y_extra, scores.flatten(1)


class EViT(VisionTransformer):
    """A vision transformer with token reducers; see :class:`VisionTransformer`."""

    def set_rate(self, rate: float) -> None:
        """Let every reducer keep this share of its tokens; 1 is the plain transformer."""
        for block in self.blocks:
            if block.reducer is not None:
                block.reducer.rate = rate

    def start_epoch(self, epoch: float, rate: float = 0.7, start: float = 10, span: float = 100) -> None:
        """Set the rate of an epoch of training, see :func:`regard.layers.reduce.cosine_rate`; evaluation keeps it too."""
        self.set_rate(cosine_rate(epoch, rate, start, span))


def evit(
    dim: int = 384,
    depth: int = 12,
    *,
    rate: float = 0.7,
    fuse: bool = True,
    reduce_at: Sequence[int] | None = None,
    head_dim: int = 64,
    patch_size: int = 16,
    image_size: int = 224,
    distilled: bool = False,
    mlp_ratio: float = 4.0,
    drop_path: float = 0.1,
    num_classes: int = 1000,
) -> TransformerSpec:
    """The table of an EViT.

    Args:
        dim, depth: channels and blocks.
        rate: share of the tokens that each reduction keeps; a fused token is counted like any other by the next one.
        fuse: whether the others become one token or are dropped.
        reduce_at: blocks with a reduction; by default those after each quarter of the depth: 3, 6 and 9 of 12.
        head_dim, patch_size, image_size, distilled, mlp_ratio, drop_path, num_classes: see :func:`vit.vit`.

    Raises:
        ValueError: a block that does not exist; a rate outside (0, 1].
    """
    chosen = sorted({depth * i // 4 for i in (1, 2, 3)}) if reduce_at is None else list(reduce_at)
    if any(not 0 <= i < depth for i in chosen):
        raise ValueError(f"reduce_at must be blocks 0 to {depth - 1}; got {chosen}")
    host = vit(
        dim, depth, head_dim=head_dim, patch_size=patch_size, image_size=image_size, distilled=distilled,
        mlp_ratio=mlp_ratio, drop_path=drop_path, num_classes=num_classes,
    )  # fmt: skip
    reducer = partial(FusingReducer if fuse else TokenReducer, rate)
    period = tuple(TokenBlockSpec(ScoredAttention, reducer=reducer if i in chosen else None) for i in range(depth))
    (stage,) = host.stages
    fixed = "EViT ranks tokens by the dense attention of the class token, and the kept ones lie on no grid"
    return replace(host, stages=(replace(stage, period=period),), fixed=fixed, network=EViT)


_PAPER = "2202.07800"

register_models([
    ModelCard("evit_deit_tiny", partial(evit, dim=192), _PAPER, 5_717_416, 0.8),
    ModelCard("evit_deit_small", partial(evit), _PAPER, 22_050_664, 3.0),
    ModelCard("evit_deit_base", partial(evit, dim=768), _PAPER, 86_567_656, 11.6),
])  # fmt: skip
