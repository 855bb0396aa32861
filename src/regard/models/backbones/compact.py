"""Compact: shallow pyramids for small images and small machines, made to compare token mixers on.

    patches of p x p pixels + sin-cos positions;  blocks x + mixer(LN(x)), x + MLP(LN(x));  one 2 x 2 merging
Only two stages and no convolutions: what a token knows of pixels farther than 2 p away, the mixer has told it.
Cost: that of the mixer. Not a published model: the stem is that of MAE, arXiv:2111.06377, the merging Swin's, arXiv:2103.14030.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from ...layers.mixers import MultiHeadAttention
from ...layers.positions import sincos
from ...layers.stems import PatchEmbed, PatchMerging
from ..registry import ModelCard, register_models
from ..spec import BackboneSpec, BlockSpec, StageSpec


class PositionedPatchEmbed(PatchEmbed):
    """Patches with fixed sin-cos positions added, for grids of any size."""

    def forward(self, image: Tensor) -> Tensor:
        x = super().forward(image)
        _, *grid, dim = x.shape
        return x + sincos(grid, dim, device=x.device, dtype=x.dtype).reshape(*grid, dim)


def compact(
    dim: int = 32,
    depths: Sequence[int] = (2, 2),
    *,
    head_dim: int = 16,
    patch_size: int = 4,
    mlp_ratio: float = 2.0,
    drop_path: float = 0.0,
    num_classes: int = 1000,
) -> BackboneSpec:
    """The table of a compact pyramid; its mixer is dense attention, to be swapped by ``mixer=``.

    Args:
        dim: channels of the first stage; they double from stage to stage.
        depths: blocks per stage.
        head_dim: channels per head.
        patch_size: pixels of a token's side; 2 for images of about 32 x 32, 4 for larger ones.
        mlp_ratio: hidden channels of the MLPs over ``dim``.
        drop_path: stochastic depth of the last block.
        num_classes: outputs of the classifier.
    """
    period = (BlockSpec(MultiHeadAttention),)
    widths = [dim * 2**i for i in range(len(depths))]
    return BackboneSpec(
        stages=tuple(StageSpec(w, w // head_dim, depth, period) for w, depth in zip(widths, depths, strict=True)),
        stem=partial(PositionedPatchEmbed, patch_size=patch_size),
        downsample=PatchMerging,
        mlp_ratio=mlp_ratio,
        drop_path=drop_path,
        num_classes=num_classes,
    )


_PAPER = "2103.14030"

register_models(
    [
        ModelCard("compact_nano", partial(compact), _PAPER, 159_240, 0.0188, 64),
        ModelCard("compact_small", partial(compact, 64, (2, 4), head_dim=32, drop_path=0.1), _PAPER, 762_664, 0.0743, 64),
    ],
    tiny={"depths": (1, 1)},
)
