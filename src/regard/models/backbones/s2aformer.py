"""S2AFormer: convolutions, attention between thin strips and pooled keys, a local module and an MLP, four times residual.

    x + DW(x);  x + strip attention(LN(x));  x + local(LN(x));  x + MLP(LN(x))      local: PW, DW 3 x 3, GELU, PW
Cost: N^2 / r^2 pairs with r = 8, 4, 2, 1, of one channel per head. Source: Xu et al., S2AFormer, arXiv:2505.22195.

What is published is the block and the outline of the network. Neither code nor weights are, and these are this library's: the
widths, depths, heads and ratios of all sizes, one channel per head for queries and keys, the depthwise pooling convolution and
the norm after it, the width of the local module, and the norms of the stem and between stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from ...layers.blocks import Residual, TokenBatchNorm
from ...layers.conv_norm import ConvNorm
from ...layers.mixers.strip import StripAttention
from ...layers.mlps import ConvMLP
from ...layers.stems import ConvDownsample
from ..backbone import Block
from ..registry import ModelCard, register_models
from ..spec import BackboneSpec, BlockSpec, StageSpec


class ThreeConvStem(nn.Module):
    """Three convolutions of 3 x 3, the first of stride 2, each with batch norm and GELU."""

    reduction = 2

    def __init__(self, in_chans: int, dim: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.convs = nn.Sequential(*(
            ConvNorm(a, b, 3, 2 if index == 0 else 1, act=nn.GELU, device=device, dtype=dtype)
            for index, (a, b) in enumerate(pairwise([in_chans, dim, dim, dim]))
        ))  # fmt: skip

    def forward(self, image: Tensor) -> Tensor:
        return self.convs(image).movedim(1, -1)


class HybridPerceptionBlock(Block):
    """A block with a local interaction module, in a residual branch of its own, between the mixer and the MLP.

    Args:
        spec, stage, block, drop_path, **options: see :class:`regard.models.backbone.Block`.
        local_ratio: hidden channels of the local module over those of the stage.
    """

    def __init__(
        self, spec: BackboneSpec, stage: StageSpec, block: BlockSpec, drop_path: float, *, local_ratio: float, **options
    ) -> None:
        super().__init__(spec, stage, block, drop_path, **options)
        factory: dict[str, Any] = {key: options.get(key) for key in ("device", "dtype")}
        local = ConvMLP(stage.dim, int(stage.dim * local_ratio), **factory)
        mlp = self._modules.pop("mlp")  # a sequence calls its parts in the order in which they were named
        self.add_module("local", Residual(spec.norm(stage.dim, **factory), local, drop_path=drop_path))
        self.add_module("mlp", mlp)


def s2aformer(
    dim: int = 32,
    depths: Sequence[int] = (2, 2, 6, 2),
    *,
    head_dim: int = 16,
    ratios: Sequence[int] = (8, 4, 2, 1),
    strip: int = 1,
    pool: str = "conv",
    local_ratio: float = 1.0,
    mlp_ratio: float = 4.0,
    drop_path: float = 0.0,
    num_classes: int = 1000,
) -> BackboneSpec:
    """The table of an S2AFormer, reconstructed.

    Args:
        dim: channels of the first stage; they double from stage to stage.
        depths: blocks per stage.
        head_dim: channels of the values of a head.
        ratios: for each stage, tokens per key on an axis.
        strip, pool: see :class:`regard.layers.mixers.strip.StripAttention`.
        local_ratio: hidden channels of the local modules over those of the stage.
        mlp_ratio: hidden channels of the MLPs over those of the stage.
        drop_path: stochastic depth of the last block.
        num_classes: outputs of the classifier.

    Raises:
        ValueError: fewer ratios than stages.
    """
    if len(ratios) < len(depths):
        raise ValueError(f"ratios must be at least as many as stages; got {tuple(ratios)} for {tuple(depths)}")
    stages = []
    for i, (depth, ratio) in enumerate(zip(depths, ratios, strict=False)):
        mixer = BlockSpec(StripAttention, {"ratio": ratio, "strip": strip, "pool": pool})
        stages.append(StageSpec(dim * 2**i, dim * 2**i // head_dim, depth, (mixer,)))
    return BackboneSpec(
        tuple(stages),
        stem=ThreeConvStem,
        stem_dim=dim // 2,
        first_stride=2,
        downsample=partial(ConvDownsample, norm=TokenBatchNorm),
        block=partial(HybridPerceptionBlock, local_ratio=local_ratio),
        norm=partial(nn.LayerNorm, eps=1e-6),
        mlp_ratio=mlp_ratio,
        position_kernel=3,
        drop_path=drop_path,
        num_classes=num_classes,
    )


_PAPER = "2505.22195"

# parameters and multiply-adds are those of the reconstruction
register_models([
    ModelCard("s2aformer_mini", partial(s2aformer, depths=(1, 1, 3, 1)), _PAPER, 2_139_860, 0.36),
    ModelCard("s2aformer_t", partial(s2aformer), _PAPER, 3_624_432, 0.59),
    ModelCard("s2aformer_xs", partial(s2aformer, dim=48), _PAPER, 7_912_372, 1.31),
    ModelCard("s2aformer_s", partial(s2aformer, dim=64, depths=(2, 2, 8, 2), drop_path=0.1), _PAPER, 15_461_944, 2.59),
    ModelCard("s2aformer_m", partial(s2aformer, dim=80, depths=(3, 3, 12, 3), drop_path=0.2), _PAPER, 34_364_890, 5.67),
])  # fmt: skip
