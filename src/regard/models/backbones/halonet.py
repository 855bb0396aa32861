"""HaloNet: a ResNet whose bottlenecks attend to a block of tokens and its halo where others convolve 3 x 3.

    act(x + BN(W_o act(BN(halo(act(BN(W_i x)))))));  where a stage begins, queries are every second token of an axis
Cost: linear in tokens, (b + 2h)^2 keys per query. Source: Vaswani et al., HaloNet, arXiv:2103.12731; Wightman, timm (H1 and
the hybrids with convolutions).

H0 and H2 to H7 have the paper's blocks, halos, widths and depths, and its numbers of parameters; its weights were never
released. H1 is timm's, with 8 heads in the first stage too, where the paper has 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from ...layers.blocks import DropPath
from ...layers.conv import convolve_tokens
from ...layers.conv_norm import Activation, ConvNorm, round_channels
from ...layers.gates import EfficientChannelGate, SqueezeGate
from ...layers.linear import linear
from ...layers.mixers import HaloAttention
from ...layers.positions import OffsetEmbedding
from ..backbone import make_mixer
from ..checkpoints import Layout, Rule
from ..registry import ModelCard, register_models
from ..spec import BackboneSpec, BlockSpec, StageSpec

_THEIRS, _OURS = "stages.{i}.{j}", "stages.{i}.blocks.{j}"


def _conv_rules(theirs: str, ours: str) -> tuple[Rule, Rule]:
    return Rule(f"{theirs}.conv.{{name}}", f"{ours}.conv.{{name}}"), Rule(f"{theirs}.bn.{{name}}", f"{ours}.norm.{{name}}")


LAYOUTS = (
    Layout(
        "timm",
        (
            *_conv_rules("stem.conv{i+1}", "stem.convs.{i}"),
            *_conv_rules(f"{_THEIRS}.shortcut", f"{_OURS}.shortcut"),
            *_conv_rules(f"{_THEIRS}.conv1_1x1", f"{_OURS}.conv1"),
            *_conv_rules(f"{_THEIRS}.conv2_kxk", f"{_OURS}.conv2"),
            Rule(f"{_THEIRS}.attn.fc1.weight", f"{_OURS}.gate.fc1.weight", "conv1x1"),
            Rule(f"{_THEIRS}.attn.fc2.weight", f"{_OURS}.gate.fc2.weight", "conv1x1"),
            Rule(f"{_THEIRS}.attn.{{name}}", f"{_OURS}.gate.{{name}}"),
            Rule(f"{_THEIRS}.self_attn.pos_embed.height_rel", f"{_OURS}.mixer.embedding.tables.0"),
            Rule(f"{_THEIRS}.self_attn.pos_embed.width_rel", f"{_OURS}.mixer.embedding.tables.1"),
            Rule(f"{_THEIRS}.self_attn.q.weight", f"{_OURS}.mixer.q.weight", "conv1x1"),
            Rule(f"{_THEIRS}.self_attn.kv.weight", f"{_OURS}.mixer.kv.weight", "conv1x1"),
            Rule(f"{_THEIRS}.post_attn.{{name}}", f"{_OURS}.norm.{{name}}"),
            *_conv_rules(f"{_THEIRS}.conv3_1x1", f"{_OURS}.conv3"),
            *_conv_rules("final_conv", "norm.conv"),
            Rule("head.fc.{name}", "head.{name}"),
        ),
    ),
)


class BareHaloAttention(HaloAttention):
    """Halo attention without biases and without a projection of the output, which a bottleneck has anyway.

    Keys and values of a head lie side by side in ``kv``, and the tables of the embedding have ``2 halo_size`` entries before
    those that occur, ``2 (block_size + 2 halo_size) - 1`` in all: published weights hold them.

    Args:
        dim, heads, block_size, halo_size: see :class:`regard.layers.mixers.HaloAttention`.
        value_ratio: channels of the result, and so of all values, over ``dim``.
        **options: see :class:`regard.layers.mixers.HaloAttention`.

    Attributes:
        out: channels of the result.
    """

    def __init__(
        self, dim: int, heads: int, block_size: int = 8, halo_size: int = 3, *, value_ratio: float = 1.0, **options
    ) -> None:
        self.out = int(dim * value_ratio)
        if self.out % heads:
            raise ValueError(f"heads must divide {self.out} channels of values; got {dim=}, {value_ratio=}, {heads=}")
        options |= {"value_dim": self.out // heads, "relative_embedding": False, "qkv_bias": False}
        super().__init__(dim, heads, block_size, halo_size, **options)
        factory = self.factory
        span = block_size + 2 * halo_size
        self.embedding = OffsetEmbedding(self.head_dim, self.pattern, span, spare=2 * halo_size, **factory)
        self.q = nn.Linear(dim, self.widths[0], bias=False, **factory)
        self.kv = nn.Linear(dim, sum(self.widths[1:]), bias=False, **factory)
        self.proj = nn.Identity()
        del self.qkv

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = linear(self.q, x).unflatten(-1, (self.heads, -1))
        k, v = linear(self.kv, context).unflatten(-1, (self.heads, -1)).split([self.head_dim, self.value_dim], -1)
        return q, k, v


class ResNetStem(nn.Module):
    """Convolutions with batch norm and activation, and a max pool.

    Args:
        in_chans, dim: channels in and out.
        widths: channels of the convolutions as parts of ``dim``.
        kernel_size: of the convolutions; the first has stride 2.
        pool: whether a pool of stride 2 follows; otherwise the last convolution has stride 2.
        act: class of the activation.
    """

    reduction = 4

    def __init__(
        self,
        in_chans: int,
        dim: int,
        *,
        widths: Sequence[float] = (1.0,),
        kernel_size: int = 7,
        pool: bool = True,
        act: Activation = nn.ReLU,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        channels = [in_chans, *(int(dim * width) for width in widths)]
        strides = [2] * len(widths) if len(widths) == 1 else [2, *[1] * (len(widths) - 2), 1 if pool else 2]
        self.convs = nn.Sequential(*(
            ConvNorm(channels[i], channels[i + 1], kernel_size, stride, act=act, device=device, dtype=dtype)
            for i, stride in enumerate(strides)
        ))  # fmt: skip
        self.pool = nn.MaxPool2d(3, 2, 1) if pool else nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        return self.pool(self.convs(image)).movedim(1, -1)


class Bottleneck(nn.Module):
    """``act(shortcut(x) + expand(inner(reduce(x))))`` on tokens, where ``inner`` is a token mixer or a 3 x 3 convolution.

    A mixer is followed by batch norm and activation. Where the block begins a coarser stage, the convolution and
    :class:`BareHaloAttention` have the stride; after any other mixer, squares of 2 x 2 tokens are averaged.

    Args:
        spec, stage, block, drop_path, dim_in, stride: see :class:`regard.models.backbone.Block`; ``mlp_ratio`` is that of the
            channels inside, rounded to a multiple of 8.
        gate: follows each convolution, called with its channels; None for none.
        group_size: channels per group of the convolutions; 0 for one group.
        act: class of the activations.

    Source: He et al., arXiv:1512.03385; Srinivas et al., BoTNet, arXiv:2101.11605.
    """

    def __init__(
        self,
        spec: BackboneSpec,
        stage: StageSpec,
        block: BlockSpec,
        drop_path: float,
        *,
        dim_in: int,
        stride: int = 1,
        gate: Callable[..., nn.Module] | None = None,
        group_size: int = 0,
        act: Activation = nn.ReLU,
        **factory,
    ) -> None:
        super().__init__()
        dim = stage.dim
        width = round_channels(dim * (spec.mlp_ratio if stage.mlp_ratio is None else stage.mlp_ratio))
        changes = stride > 1 or dim_in != dim
        self.shortcut = ConvNorm(dim_in, dim, 1, stride, **factory) if changes else nn.Identity()
        self.conv1 = ConvNorm(dim_in, width, act=act, **factory)
        self.mixer: nn.Module | None = None
        if block.mixer is None:
            groups = width // group_size if group_size else 1
            self.conv2 = ConvNorm(width, width, 3, stride, groups=groups, act=act, **factory)
            self.gate = nn.Identity() if gate is None else gate(width, **factory)
        else:
            strided = stride > 1 and block.mixer is BareHaloAttention
            line = replace(block, options={**block.options, "stride": stride}) if strided else block
            self.mixer = make_mixer(line, width, stage.heads, **factory)
            width = self.mixer.out if isinstance(self.mixer, BareHaloAttention) else width
            pools = stride > 1 and not strided
            self.pool = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False) if pools else nn.Identity()
            self.norm = nn.BatchNorm2d(width, **factory)
        self.conv3 = ConvNorm(width, dim, gamma=0.0, **factory)
        self.drop_path = DropPath(drop_path)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(-1, 1)
        y = self.conv1(x)
        if self.mixer is None:
            y = self.gate(self.conv2(y))
        else:
            y = self.mixer(y.movedim(1, -1)).movedim(-1, 1)
            y = self.act(self.norm(self.pool(y)))
        return self.act(self.shortcut(x) + self.drop_path(self.conv3(y))).movedim(1, -1)


def _squeeze_gate(dim: int, *, ratio: float, **factory: Any) -> SqueezeGate:
    return SqueezeGate(dim, round_channels(dim * ratio), **factory)


class FinalConv(nn.Module):
    """A pointwise convolution with batch norm and activation on tokens, in place of a final norm."""

    def __init__(self, dim: int, *, out: int, act: Activation, device=None, dtype=None) -> None:
        super().__init__()
        self.conv = ConvNorm(dim, out, act=act, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return convolve_tokens(self.conv, x)


def halonet(
    dim: int = 64,
    depths: Sequence[int] = (3, 3, 10, 3),
    *,
    kinds: Sequence[str] = ("a", "a", "a", "a"),
    widths: Sequence[int] = (1, 2, 4, 8),
    ratios: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    heads: Sequence[int] = (8, 8, 8, 8),
    head_dim: int | None = None,
    block_size: int = 8,
    halo_size: int = 3,
    value_ratio: float = 1.0,
    query_dim: int | None = None,
    stem_dim: int = 64,
    stem_widths: Sequence[float] = (1.0,),
    stem_kernel: int = 7,
    stem_pool: bool = True,
    gate: Callable[..., nn.Module] | None = None,
    group_size: int = 0,
    final_dim: int | None = None,
    act: Activation = nn.ReLU,
    drop_path: float = 0.0,
    num_classes: int = 1000,
) -> BackboneSpec:
    """The table of a HaloNet, or of a hybrid with convolutions.

    Any input size works: blocks at the bottom and on the right are filled up with the zeros that also surround the image.

    Args:
        dim: channels that the first stage returns.
        depths: bottlenecks per stage.
        kinds: for each stage what its bottlenecks have inside, repeated: ``"a"`` attention, ``"c"`` convolution.
        widths: channels of each stage over ``dim``.
        ratios: for each stage, channels inside its bottlenecks over those outside.
        heads: attention heads of each stage.
        head_dim: channels per head, which then decides instead of ``heads``.
        block_size, halo_size: see :class:`regard.layers.mixers.HaloAttention`.
        value_ratio: channels of the values over those inside a bottleneck.
        query_dim: channels per head of queries and keys; by default the channels inside a bottleneck over the heads.
        stem_dim, stem_widths, stem_kernel, stem_pool: see :class:`ResNetStem`.
        gate, group_size: see :class:`Bottleneck`.
        final_dim: channels of a last pointwise convolution; None for none.
        act: class of the activations.
        drop_path: stochastic depth of the last bottleneck.
        num_classes: outputs of the classifier.
    """
    unknown = set("".join(kinds)) - {"a", "c"}
    if unknown or not all(kinds):
        raise ValueError(f"kinds must be made of 'a' (attention) and 'c' (convolution); got {tuple(kinds)}")
    lines = {
        "a": BlockSpec(
            BareHaloAttention,
            {"block_size": block_size, "halo_size": halo_size, "value_ratio": value_ratio, "head_dim": query_dim},
        ),
        "c": BlockSpec(None),
    }
    stages = []
    for index, depth in enumerate(depths):
        out, ratio = dim * widths[index], ratios[index]
        count = heads[index] if head_dim is None else round_channels(out * ratio) // head_dim
        stages.append(StageSpec(out, count, depth, tuple(lines[kind] for kind in kinds[index]), mlp_ratio=ratio))
    return BackboneSpec(
        tuple(stages),
        stem=partial(ResNetStem, widths=stem_widths, kernel_size=stem_kernel, pool=stem_pool, act=act),
        stem_dim=stem_dim,
        downsample=None,
        block=partial(Bottleneck, gate=gate, group_size=group_size, act=act),
        final_norm=nn.Identity if final_dim is None else partial(FinalConv, out=final_dim, act=act),
        num_features=final_dim,
        drop_path=drop_path,
        num_classes=num_classes,
        layouts=LAYOUTS,
    )


_PAPER = "2103.12731"
_QUARTER = (0.25, 0.25, 0.25, 0.25)
_HYBRID = partial(halonet, dim=256, ratios=_QUARTER, stem_widths=(3 / 8, 1 / 2, 1.0), stem_kernel=3)
_26 = partial(_HYBRID, depths=(2, 2, 2, 2), kinds=("c", "c", "ca", "a"), halo_size=2)
_50 = partial(_HYBRID, depths=(3, 4, 6, 3), kinds=("c", "ccca", "ca", "ca"), heads=(8, 4, 8, 8), act=nn.SiLU)
_33 = partial(
    _HYBRID, depths=(2, 3, 3, 2), kinds=("c", "cca", "cca", "a"), widths=(1, 2, 4, 6), ratios=(0.25, 0.25, 0.25, 1 / 3),
    stem_pool=False, gate=partial(_squeeze_gate, ratio=1 / 16), final_dim=1280, act=nn.SiLU,
)  # fmt: skip


def _pure(depth: int, ratio: float, *, final_dim: int | None = None, **table) -> partial[BackboneSpec]:
    """The paper's tables: blocks in the third stage, channels outside of the bottlenecks over those inside."""
    return partial(
        halonet, dim=int(64 * ratio), depths=(3, 3, depth, 3), ratios=(1 / ratio,) * 4, heads=(4, 8, 8, 8), final_dim=final_dim,
        **table,
    )  # fmt: skip


_H3 = _pure(12, 1.5, block_size=10, final_dim=1024)
_H4 = _pure(12, 3.0, block_size=12, halo_size=2, final_dim=1280)
_H5 = _pure(23, 2.0, block_size=14, halo_size=2, value_ratio=2.5, final_dim=1536)
_H6 = _pure(24, 2.75, halo_size=4, value_ratio=3.0, final_dim=1536)
_H7 = _pure(26, 3.5, block_size=10, value_ratio=4.0, final_dim=2048)
_NEXT = partial(_26, group_size=16, gate=EfficientChannelGate, query_dim=16, act=nn.SiLU)

# no multiply-adds are published for H0 to H7: these are of all pairs in blocks and halos, and of queries and embeddings
register_models([
    ModelCard("halonet_h0", _pure(7, 0.5), _PAPER, 5_502_248, 2.5, 256),
    ModelCard("halonet_h1", partial(halonet), _PAPER, 8_100_056, 3.1, 256),
    ModelCard("halonet_h2", _pure(11, 1.25), _PAPER, 9_405_608, 3.4, 256),
    ModelCard("halonet_h3", _H3, _PAPER, 11_842_792, 6.3, 320),
    ModelCard("halonet_h4", _H4, _PAPER, 19_103_464, 12.2, 384),
    ModelCard("halonet_h5", _H5, _PAPER, 30_718_952, 32.4, 448),
    ModelCard("halonet_h6", _H6, _PAPER, 43_458_280, 53.1, 512),
    ModelCard("halonet_h7", _H7, _PAPER, 67_434_728, 111.0, 600),
    ModelCard("halonet26t", _26, _PAPER, 12_480_288, 3.2, 256),
    ModelCard("halonet50ts", _50, _PAPER, 22_733_280, 5.3, 256),
    ModelCard("sehalonet33ts", _33, _PAPER, 13_691_712, 3.6, 256),
    ModelCard("eca_halonext26ts", _NEXT, _PAPER, 10_756_885, 2.4, 256),
], tiny={"ratios": (0.5, 0.5, 0.5, 0.5)})  # fmt: skip
