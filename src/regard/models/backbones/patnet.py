"""PATNet: a convolution of a quarter of the channels, and attention of the others, over channels first and tokens last.

    y = [conv(x1), norm(gate(x2))],  x + MLP(y)  in all stages but the last;  there
    x + [conv(x1), attention(LN(x2))],  x + MLP(x)
Cost: linear in tokens but in the last stage. Source: Huang et al., arXiv:2503.03148; as released by arXiv:2502.01303.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...layers.blocks import DropPath, Residual, TokenBatchNorm
from ...layers.conv import convolve_tokens
from ...layers.conv_norm import ConvNorm
from ...layers.gates import StatisticsGate
from ...layers.linear import linear
from ...layers.mixers import AttentionMixer
from ...layers.positions import DistanceBias
from ...ops import Source
from ...ops import patterns as P
from ..backbone import make_mixer
from ..checkpoints import Layout, Rule
from ..registry import ModelCard, register_models
from ..spec import BackboneSpec, BlockSpec, StageSpec

PARTS = 4
"""One of so many parts of the channels is convolved."""


class PatchConvNorm(nn.Module):
    """Patches of ``size`` squared pixels, projected and normalised over the batch; zeros fill those that pass the edge."""

    def __init__(self, in_chans: int, dim: int, *, size: int = 4, device=None, dtype=None) -> None:
        super().__init__()
        self.reduction = size
        self.conv = ConvNorm(in_chans, dim, size, size, 0, device=device, dtype=dtype)
        self.apply(_init_convolutions)

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        image = F.pad(image, [0, -width % self.reduction, 0, -height % self.reduction])
        return self.conv(image).movedim(1, -1)


class PatchReduction(PatchConvNorm):
    """The same of squares of 2 x 2 tokens."""

    def __init__(self, dim: int, out: int, *, device=None, dtype=None) -> None:
        super().__init__(dim, out, size=2, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(-1, 1))


class PartialMixer(nn.Module):
    """A 3 x 3 convolution of the first quarter of the channels; what becomes of the others is told by a subclass.

    Args:
        dim: channels, a multiple of 4.

    Raises:
        ValueError: another number of channels; tokens that are not ``(batch, rows, columns, dim)``.
    """

    def __init__(self, dim: int, *, device=None, dtype=None) -> None:
        super().__init__()
        if dim % PARTS:
            raise ValueError(f"dim must be a multiple of {PARTS}; got {dim}")
        self.dim, self.part = dim, dim // PARTS
        self.conv = nn.Conv2d(self.part, self.part, 3, padding=1, bias=False, device=device, dtype=dtype)

    def mix_rest(self, x: Tensor) -> Tensor:
        """The other channels, tokens in and out."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[-1] != self.dim:
            raise ValueError(f"expected x (batch, rows, columns, {self.dim}); got {tuple(x.shape)}")
        first, rest = x.split((self.part, self.dim - self.part), -1)
        return torch.cat([convolve_tokens(self.conv, first), self.mix_rest(rest)], -1)


class PartialChannelGate(PartialMixer):
    """The other channels are gated by their means and deviations, and normalised over the batch (PAT_ch)."""

    def __init__(self, dim: int, heads: int = 1, *, device=None, dtype=None) -> None:
        super().__init__(dim, device=device, dtype=dtype)
        self.gate = StatisticsGate(dim - self.part, device=device, dtype=dtype)
        self.norm = TokenBatchNorm(dim - self.part, device=device, dtype=dtype)

    def mix_rest(self, x: Tensor) -> Tensor:
        return self.norm(convolve_tokens(self.gate, x))


class DistanceAttention(AttentionMixer):
    """Attention of everything to everything, with a bias that depends on the rounded distance."""

    def __init__(self, dim: int, heads: int, **projections) -> None:
        super().__init__(dim, heads, **projections)
        self.distance_bias = DistanceBias(heads, **self.factory)

    def sources(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Sequence[Source]:
        return [Source(k, v, P.Dense(), bias=self.distance_bias.over(k.shape[1:3]))]


class PartialSelfAttention(PartialMixer):
    """The other channels attend to each other's tokens (PAT_sf)."""

    def __init__(self, dim: int, heads: int, *, drop: float = 0.1, device=None, dtype=None) -> None:
        super().__init__(dim, device=device, dtype=dtype)
        rest = dim - self.part
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(rest, eps=1e-6, **factory)
        self.attention = DistanceAttention(rest, heads, qkv_bias=False, attn_drop=drop, proj_drop=drop, **factory)

    def mix_rest(self, x: Tensor) -> Tensor:
        return self.attention(self.norm(x))


class PartialSpatialGate(nn.Module):
    """Half of the channels times one factor per position, the others projected, each normalised (PAT_sp).

        [norm(x1 * hardsigmoid(w . x1)), W norm(x2)]

    Channels first.
    """

    def __init__(self, dim: int, *, device=None, dtype=None) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        projected = dim // 2
        gated = dim - projected
        self.widths = (gated, projected)
        self.score = nn.Conv2d(gated, 1, 1, bias=False, **factory)
        self.norm_gated = nn.BatchNorm2d(gated, **factory)
        self.norm_projected = nn.BatchNorm2d(projected, **factory)
        self.proj = nn.Conv2d(projected, projected, 1, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        gated, projected = x.split(self.widths, 1)
        gated = self.norm_gated(gated * F.hardsigmoid(self.score(gated)))
        return torch.cat([gated, self.proj(self.norm_projected(projected))], 1)


class PartialMLP(nn.Module):
    """``gate(reduce(act(norm(expand(x)))))``, channels first; the gate is :class:`PartialSpatialGate`, or nothing."""

    def __init__(
        self, dim: int, hidden: int, *, act: Callable[[], nn.Module], spatial_gate: bool, device=None, dtype=None
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.expand = ConvNorm(dim, hidden, act=act, **factory)
        self.reduce = nn.Conv2d(hidden, dim, 1, bias=False, **factory)
        self.gate = PartialSpatialGate(dim, **factory) if spatial_gate else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.reduce(self.expand(x)))


class PartialBlock(nn.Module):
    """A mixer and an MLP: in one residual branch where the mixer is partial without self-attention, else in one each.

    A registered mixer gets the table's norm before it.

    Args:
        spec, stage, block, drop_path: as for :class:`regard.models.backbone.Block`.
        act: class of the activation of the MLP.
        spatial_gate: whether the MLP ends with a :class:`PartialSpatialGate`.
    """

    def __init__(
        self,
        spec: BackboneSpec,
        stage: StageSpec,
        block: BlockSpec,
        drop_path: float,
        *,
        act: Callable[[], nn.Module],
        spatial_gate: bool,
        dim_in: int | None = None,
        stride: int = 1,
        **factory,
    ) -> None:
        super().__init__()
        dim = stage.dim
        if dim_in not in (None, dim) or stride != 1:
            raise ValueError(f"a partial block keeps {dim} channels and stride 1; got {dim_in} and {stride}")
        mixer = make_mixer(block, dim, stage.heads, **factory)
        self.shared = isinstance(mixer, PartialMixer) and not isinstance(mixer, PartialSelfAttention)
        norm = spec.norm(dim, **factory) if isinstance(block.mixer, str) else nn.Identity()
        self.mixer = mixer if self.shared else Residual(norm, mixer)
        self.mlp = PartialMLP(dim, int(dim * spec.mlp_ratio), act=act, spatial_gate=spatial_gate, **factory)
        self.drop_path = DropPath(drop_path)
        self.apply(_init_convolutions)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mixer(x)
        return (x if self.shared else mixed) + self.drop_path(convolve_tokens(self.mlp, mixed))


class HiddenHead(nn.Module):
    """``fc2(act(fc1(x)))``: a classifier of wider features."""

    def __init__(
        self, dim: int, num_classes: int, *, hidden: int, act: Callable[[], nn.Module], device=None, dtype=None
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=False, device=device, dtype=dtype)
        self.act = act()
        self.fc2 = nn.Linear(hidden, num_classes, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return linear(self.fc2, self.act(linear(self.fc1, x)))


def _init_convolutions(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)


_BLOCK, _OURS = "stages.{2i}.blocks.{j}", "stages.{i}.blocks.{j}"
_MIXER = f"{_BLOCK}.spatial_mixing"
_LAST, _OURS_LAST = "stages.6.blocks.{j}.spatial_mixing", "stages.3.blocks.{j}.mixer.op"

OFFICIAL = Layout(
    "official",
    (
        Rule("patch_embed.proj.{name}", "stem.conv.conv.{name}"),
        Rule("patch_embed.norm.{name}", "stem.conv.norm.{name}"),
        Rule("stages.{2i+1}.reduction.{name}", "stages.{i+1}.downsample.conv.conv.{name}"),
        Rule("stages.{2i+1}.norm.{name}", "stages.{i+1}.downsample.conv.norm.{name}"),
        Rule(f"{_LAST}.partial_conv3.{{name}}", f"{_OURS_LAST}.conv.{{name}}"),
        Rule(f"{_LAST}.norm.{{name}}", f"{_OURS_LAST}.norm.{{name}}"),
        Rule(f"{_LAST}.attn.rpe_k.lookup_table_bias", f"{_OURS_LAST}.attention.distance_bias.table"),
        Rule(f"{_LAST}.attn.{{name}}", f"{_OURS_LAST}.attention.{{name}}"),
        Rule(f"{_MIXER}.partial_conv3.{{name}}", f"{_OURS}.mixer.conv.{{name}}"),
        Rule(f"{_MIXER}.attn.cfc1.weight", f"{_OURS}.mixer.gate.fc.weight", "side_by_side"),
        Rule(f"{_MIXER}.attn.bn.{{name}}", f"{_OURS}.mixer.gate.norm.{{name}}"),
        Rule(f"{_MIXER}.norm.{{name}}", f"{_OURS}.mixer.norm.{{name}}"),
        Rule(f"{_BLOCK}.mlp.0.{{name}}", f"{_OURS}.mlp.expand.conv.{{name}}"),
        Rule(f"{_BLOCK}.mlp.1.{{name}}", f"{_OURS}.mlp.expand.norm.{{name}}"),
        Rule(f"{_BLOCK}.mlp.3.{{name}}", f"{_OURS}.mlp.reduce.{{name}}"),
        Rule(f"{_BLOCK}.mlp.4.conv_attn.{{name}}", f"{_OURS}.mlp.gate.score.{{name}}"),
        Rule(f"{_BLOCK}.mlp.4.conv.{{name}}", f"{_OURS}.mlp.gate.proj.{{name}}"),
        Rule(f"{_BLOCK}.mlp.4.norm.{{name}}", f"{_OURS}.mlp.gate.norm_gated.{{name}}"),
        Rule(f"{_BLOCK}.mlp.4.norm2.{{name}}", f"{_OURS}.mlp.gate.norm_projected.{{name}}"),
        Rule("avgpool_pre_head.1.weight", "head.fc1.weight", "conv1x1"),
        Rule("head.{name}", "head.fc2.{name}"),
    ),
)


def patnet(
    dim: int = 32,
    depths: Sequence[int] = (1, 2, 8, 2),
    *,
    heads: int = 4,
    act: Callable[[], nn.Module] = nn.ReLU,
    spatial_gate: bool = False,
    hidden_features: int = 1280,
    mlp_ratio: float = 2.0,
    drop_path: float = 0.0,
    num_classes: int = 1000,
) -> BackboneSpec:
    """The table of a PATNet.

    Args:
        dim: channels of the first stage; they double from stage to stage.
        depths: blocks per stage; those of the last attend to tokens.
        heads: attention heads of the last stage, a divisor of three quarters of its channels. The released configurations
            have 4 for all sizes, the published description has 6 for all but the smallest.
        act: class of the activations.
        spatial_gate: whether the MLPs end with a :class:`PartialSpatialGate`.
        hidden_features: channels between the two layers of the classifier.
        mlp_ratio: hidden channels of the MLPs over those of the stage.
        drop_path: stochastic depth of the last block.
        num_classes: outputs of the classifier.
    """
    last = len(depths) - 1
    stages = []
    for i, depth in enumerate(depths):
        mixer = BlockSpec(PartialSelfAttention, {"heads": heads}) if i == last else BlockSpec(PartialChannelGate)
        # gates have no heads, and those of the attention divide its part only: these are for mixers that take their place
        stages.append(StageSpec(dim * 2**i, max(1, dim * 2**i // 32), depth, (mixer,)))
    return BackboneSpec(
        tuple(stages),
        stem=PatchConvNorm,
        downsample=PatchReduction,
        block=partial(PartialBlock, act=act, spatial_gate=spatial_gate),
        final_norm=nn.Identity,
        mlp_ratio=mlp_ratio,
        drop_path=drop_path,
        head=partial(HiddenHead, hidden=hidden_features, act=act),
        num_classes=num_classes,
        layouts=(OFFICIAL,),
    )


# the multiply-adds are counted, not published
_PAPER = "2503.03148"
_LARGER = partial(patnet, heads=6)
_T1 = partial(_LARGER, dim=48, act=nn.GELU, spatial_gate=True, drop_path=0.02)
_T2 = partial(_LARGER, dim=64, depths=(2, 2, 6, 4), drop_path=0.05)
_S = partial(_LARGER, dim=96, depths=(2, 2, 9, 4), drop_path=0.1)
_M = partial(_LARGER, dim=128, depths=(2, 3, 16, 4), drop_path=0.2)
_L = partial(_LARGER, dim=160, depths=(2, 3, 20, 4), drop_path=0.3)

register_models([
    ModelCard("patnet_t0", partial(patnet, act=nn.GELU), _PAPER, 3_486_160, 0.233),
    ModelCard("patnet_t1", _T1, _PAPER, 6_144_876, 0.54),
    ModelCard("patnet_t2", _T2, _PAPER, 12_270_464, 1.033),
    ModelCard("patnet_s", _S, _PAPER, 28_013_952, 2.705),
    ModelCard("patnet_m", _M, _PAPER, 59_179_648, 6.673),
    ModelCard("patnet_l", _L, _PAPER, 100_641_984, 11.882),
])  # fmt: skip
