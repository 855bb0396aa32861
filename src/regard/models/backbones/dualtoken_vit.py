"""DualToken-ViT: convolutions for what is near, and a 7 x 7 grid of global tokens, carried through all stages, for the rest.

    local = x + MLP(LN(DW(x)));  y, G' = dual tokens of local and G (:class:`regard.layers.mixers.DualTokenAttention`)
    x' = local + y;  x'' = x' + gate(MLP(LN(x'))), the gate of LightViT: a factor per channel times one per token
Cost: linear in tokens. Source: Chu et al., DualToken-ViT, arXiv:2309.12424; stem, merging, gate and head of Huang et al.,
LightViT, arXiv:2207.05557.

No code and no weights were released, and the sizes are a reconstruction. Widths, heads and MLPs of the small model are those of
LightViT-T. The depth of its last stage, 3, follows from the ablations of the paper: attention in place of the weighted sum and
the steps costs 1.1 M parameters, and the steps cost 0.1 M and 0.03 G multiply-adds, which also makes them depthwise 3 x 3 and
pointwise convolutions. Width and depth of the tiny model are chosen to meet its published 0.5 G and 5.8 M. Hidden widths of the
MLPs of the global tokens (4 times; 3 times where places are mixed, and 98 along the 49 places), the norms before attention and
the residual in a step are this library's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...layers.blocks import DropPath, Residual
from ...layers.conv import convolve_tokens, depthwise
from ...layers.conv_norm import ConvNorm
from ...layers.gates import TokenGate
from ...layers.linear import Chain, linear
from ...layers.mixers.dual_token import DualTokenAttention
from ...layers.mlps import MLP
from ...layers.stems import Norm, PatchMerging, pad_to_even
from ..backbone import Backbone, FeatureBackbone, Staged, make_mixer
from ..registry import ModelCard, register_models
from ..spec import BackboneSpec, BlockSpec, StageSpec

_norm = partial(nn.LayerNorm, eps=1e-6)


class Streams(NamedTuple):
    """What goes from block to block."""

    x: Tensor
    """``(batch, rows, columns, dim)``: image tokens."""
    tokens: Tensor
    """``(batch, size, size, dim)``: global tokens."""


class LightStem(nn.Module):
    """Convolutions with batch norm and GELU, one and three depthwise, to a quarter; then one of stride 2, and a norm.

    Source: Huang et al., LightViT, arXiv:2207.05557.
    """

    reduction = 8

    def __init__(self, in_chans: int, dim: int, *, device=None, dtype=None) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        half = dim // 2
        self.convs = nn.Sequential(
            ConvNorm(in_chans, half, 3, 2, act=nn.GELU, **factory),
            *(ConvNorm(half, half, 3, stride, groups=half, act=nn.GELU, **factory) for stride in (1, 1, 2)),
        )
        self.proj = nn.Conv2d(half, dim, 3, stride=2, padding=1, **factory)
        self.norm = nn.LayerNorm(dim, **factory)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.proj(self.convs(image)).movedim(1, -1))


class DualMerging(nn.Module):
    """Patch merging beside a projection of the largest of each 2 x 2 image tokens; global tokens are only widened.

    Source: Huang et al., LightViT, arXiv:2207.05557.
    """

    def __init__(self, dim: int, out: int, *, device=None, dtype=None) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.merge = PatchMerging(dim, out, **factory)
        self.shortcut = nn.Linear(dim, out, bias=False, **factory)
        self.norm = nn.LayerNorm(dim, **factory)
        self.widen = nn.Linear(dim, out, bias=False, **factory)

    def forward(self, streams: Streams) -> Streams:
        x = pad_to_even(streams.x)
        largest = F.max_pool2d(x.movedim(-1, 1), 2).movedim(1, -1)
        return Streams(self.merge(x) + linear(self.shortcut, largest), linear(self.widen, self.norm(streams.tokens)))


class ConvEncoder(nn.Module):
    """``x + MLP(LN(DW(x)))`` with a depthwise convolution of 7 x 7: a ConvNeXt block on tokens.

    Source: Liu et al., ConvNeXt, arXiv:2201.03545.
    """

    def __init__(self, dim: int, drop_path: float = 0.0, *, norm: Norm = nn.LayerNorm, device=None, dtype=None) -> None:
        super().__init__()
        self.conv = depthwise(dim, 7, device=device, dtype=dtype)
        self.norm = norm(dim, device=device, dtype=dtype)
        self.mlp = MLP(dim, device=device, dtype=dtype)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mlp(self.norm(convolve_tokens(self.conv, x))))


class DualTokenBlock(nn.Module):
    """Convolution, exchange with the global tokens, and a gated MLP.

    Args:
        spec, stage, block, drop_path, dim_in, stride: as for :class:`regard.models.backbone.Block`.
    """

    def __init__(
        self, spec: BackboneSpec, stage: StageSpec, block: BlockSpec, drop_path: float, *, dim_in: int, stride: int, **factory
    ) -> None:
        super().__init__()
        dim = stage.dim
        ratio = spec.mlp_ratio if stage.mlp_ratio is None else stage.mlp_ratio
        self.local = ConvEncoder(dim, drop_path, norm=spec.norm, **factory)
        self.mixer = make_mixer(block, dim, stage.heads, **factory)
        self.drop_path = DropPath(drop_path)
        self.mlp = Residual(spec.norm(dim, **factory), spec.mlp(dim, int(dim * ratio), **factory), drop_path=drop_path)

    def forward(self, streams: Streams) -> Streams:
        x = self.local(streams.x)
        y, tokens = self.mixer(x, streams.tokens)
        return Streams(self.mlp(x + self.drop_path(y)), tokens)


class GatedMLP(nn.Sequential):
    """An MLP and :class:`regard.layers.gates.TokenGate` on what it gives."""

    def __init__(self, dim: int, hidden: int, **factory) -> None:
        super().__init__(MLP(dim, hidden, **factory), TokenGate(dim, **factory))


class Neck(Chain):
    """The norm after the last stage and one wide layer on every token, whose mean is classified.

    Source: Huang et al., LightViT, arXiv:2207.05557.
    """

    def __init__(self, dim: int, out: int, **factory) -> None:
        super().__init__(_norm(dim, **factory), nn.Linear(dim, out, **factory), nn.LayerNorm(out, **factory), nn.GELU())


class _TwoStreams(Staged):
    """What whole and cut networks share: global tokens go beside the image tokens."""

    global_tokens: nn.Parameter

    def run_streams(self, image: Tensor) -> list[Streams]:
        """Image tokens and global tokens after each stage."""
        x = self.embed(image)
        streams = Streams(x, self.global_tokens.expand(x.shape[0], -1, -1, -1))
        outputs = []
        for stage in self.stages:
            streams = stage(streams)
            outputs.append(streams)
        return outputs

    def run_stages(self, image: Tensor) -> list[Tensor]:
        return [streams.x for streams in self.run_streams(image)]

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone besides norms and biases: the global tokens."""
        return super().no_weight_decay() | {"global_tokens"}


class DualTokenViT(_TwoStreams, Backbone):
    """The network of a :func:`dualtoken_vit` table, with the outside of a :class:`Backbone`.

    Args:
        spec, **options: see :class:`Backbone`.

    Attributes:
        global_tokens: ``(1, size, size, dim)``, what the first block starts from.
    """

    def __init__(self, spec: BackboneSpec, *, device=None, dtype=None, **options) -> None:
        super().__init__(spec, device=device, dtype=dtype, **options)
        first = next(module for module in self.modules() if isinstance(module, DualTokenAttention))
        tokens = torch.empty(1, first.size, first.size, first.dim, device=device, dtype=dtype)
        self.global_tokens = nn.Parameter(tokens)
        nn.init.trunc_normal_(self.global_tokens, std=0.02)

    def cut(self, out_indices: Sequence[int] | None = None) -> FeatureBackbone:
        """The maps of some stages, see :class:`regard.models.FeatureBackbone`."""
        return DualTokenFeatures(self, out_indices)


class DualTokenFeatures(_TwoStreams, FeatureBackbone):
    """A DualToken-ViT cut to some of its feature maps, see :class:`FeatureBackbone`."""

    def __init__(self, backbone: DualTokenViT, out_indices: Sequence[int] | None = None) -> None:
        super().__init__(backbone, out_indices)
        self.global_tokens = backbone.global_tokens


def dualtoken_vit(
    dims: Sequence[int] = (64, 128, 256),
    depths: Sequence[int] = (2, 6, 3),
    *,
    heads: Sequence[int] = (2, 4, 8),
    mix: bool = False,
    size: int = 7,
    mlp_ratios: Sequence[float] = (8.0, 4.0, 4.0),
    neck: int = 1280,
    drop_path: float = 0.1,
    num_classes: int = 1000,
) -> BackboneSpec:
    """The table of a DualToken-ViT, reconstructed.

    Args:
        dims, depths, heads, mlp_ratios: of each stage.
        mix: whether the MLP of the global tokens mixes places too, see :class:`regard.layers.mixers.DualTokenAttention`.
        size: rows and columns of the global tokens, in every stage.
        neck: channels that are averaged and classified.
        drop_path: stochastic depth of the last block.
        num_classes: outputs of the classifier.

    Raises:
        ValueError: lists of different lengths.
    """
    if len({len(dims), len(depths), len(heads), len(mlp_ratios)}) != 1:
        raise ValueError(
            f"dims, depths, heads and mlp_ratios have one number per stage; got {tuple(dims)}, {tuple(depths)}, "
            f"{tuple(heads)} and {tuple(mlp_ratios)}"
        )
    options = {"size": size, "mix": mix, "mlp_ratio": 3.0 if mix else 4.0, "norm": _norm}
    stages = tuple(
        # the map of the last stage has the size of the global tokens where the image has 224 x 224 pixels
        StageSpec(dim, number, depth, (BlockSpec(DualTokenAttention, options | {"steps": len(dims) - 1 - i}),), ratio)
        for i, (dim, depth, number, ratio) in enumerate(zip(dims, depths, heads, mlp_ratios, strict=True))
    )
    return BackboneSpec(
        stages,
        stem=LightStem,
        downsample=cast(Any, DualMerging),
        block=DualTokenBlock,
        norm=_norm,
        final_norm=cast(Any, partial(Neck, out=neck)),
        mlp=GatedMLP,
        drop_path=drop_path,
        num_features=neck,
        num_classes=num_classes,
        fixed="DualToken-ViT carries global tokens from block to block, beside those that a mixer would mix",
        network=DualTokenViT,
    )


_PAPER = "2309.12424"
_TINY: dict[str, Any] = {"dims": (48, 96, 192), "depths": (2, 5, 2)}

# multiply-adds are those of the reconstruction
register_models([
    ModelCard("dualtoken_vit_tiny", partial(dualtoken_vit, **_TINY), _PAPER, 5_942_538, 0.504),
    ModelCard("dualtoken_vit_tiny_mix", partial(dualtoken_vit, mix=True, **_TINY), _PAPER, 5_780_505, 0.501),
    ModelCard("dualtoken_vit_small", partial(dualtoken_vit), _PAPER, 12_146_622, 1.053),
    ModelCard("dualtoken_vit_small_mix", partial(dualtoken_vit, mix=True), _PAPER, 11_646_011, 1.040),
], tiny={"depths": (1, 1, 1), "heads": (2, 2, 2)})  # fmt: skip
