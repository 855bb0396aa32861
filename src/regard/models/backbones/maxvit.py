"""MaxViT: a convolution block, attention in windows and attention over a dilated grid, at every resolution.

    MBConv(x),  x + window(LN(x)),  x + MLP(LN(x)),  x + grid(LN(x)),  x + MLP(LN(x))
Cost: linear in tokens; window and grid together reach the whole image. Source: Tu et al., MaxViT, arXiv:2204.01697.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from ...layers.conv_norm import Activation, MBConv, convolution
from ...layers.mixers import GridAttention, WindowAttention
from ...layers.mlps import MLP
from ..checkpoints import Layout, Rule, block_rules
from ..registry import ModelCard, register_models
from ..spec import BackboneSpec, BlockSpec, StageSpec

_TABLE = Rule("attn.rel_pos.relative_position_bias_table", "mixer.op.bias.table")
_CONV, _BEFORE = "stages.{i}.blocks.{j}.conv", "stages.{i}.blocks.{2j}.before"

LAYOUTS = (
    Layout(
        "timm",
        (
            Rule("stem.{name}", "stem.{name}"),
            Rule(f"{_CONV}.shortcut.expand.{{name}}", f"{_BEFORE}.expand_shortcut.{{name}}"),
            Rule(f"{_CONV}.pre_norm.{{name}}", f"{_BEFORE}.norm.{{name}}"),
            Rule(f"{_CONV}.conv1_1x1.{{name}}", f"{_BEFORE}.expand.conv.{{name}}"),
            Rule(f"{_CONV}.norm1.{{name}}", f"{_BEFORE}.expand.norm.{{name}}"),
            Rule(f"{_CONV}.conv2_kxk.{{name}}", f"{_BEFORE}.depthwise.conv.{{name}}"),
            Rule(f"{_CONV}.norm2.{{name}}", f"{_BEFORE}.depthwise.norm.{{name}}"),
            Rule(f"{_CONV}.se.fc1.weight", f"{_BEFORE}.gate.fc1.weight", "conv1x1"),
            Rule(f"{_CONV}.se.fc2.weight", f"{_BEFORE}.gate.fc2.weight", "conv1x1"),
            Rule(f"{_CONV}.se.{{name}}", f"{_BEFORE}.gate.{{name}}"),
            Rule(f"{_CONV}.conv3_1x1.{{name}}", f"{_BEFORE}.reduce.{{name}}"),
            *block_rules("stages.{i}.blocks.{j}.attn_block", "stages.{i}.blocks.{2j}", _TABLE),
            *block_rules("stages.{i}.blocks.{j}.attn_grid", "stages.{i}.blocks.{2j+1}", _TABLE),
            Rule("head.norm.{name}", "norm.{name}"),
            Rule("head.pre_logits.{name}", "pre_logits.{name}"),
            Rule("head.fc.{name}", "head.{name}"),
        ),
        (r"_lookup$",),
    ),
)


class MaxViTStem(nn.Module):
    """Two 3 x 3 convolutions, the first of stride 2 and followed by batch norm and an activation.

    Args:
        in_chans, dim: channels in and out.
        padding: see :class:`regard.layers.conv_norm.ConvNorm`.
        act: class of the activation.
        eps: of the norm.
    """

    reduction = 2

    def __init__(
        self,
        in_chans: int,
        dim: int,
        *,
        padding: int | str | None = None,
        act: Activation = nn.GELU,
        eps: float = 1e-5,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.conv1 = convolution(in_chans, dim, 3, 2, padding, device=device, dtype=dtype)
        self.norm1 = nn.BatchNorm2d(dim, eps=eps, device=device, dtype=dtype)
        self.act = act()
        self.conv2 = convolution(dim, dim, 3, 1, padding, device=device, dtype=dtype)

    def forward(self, image: Tensor) -> Tensor:
        return self.conv2(self.act(self.norm1(self.conv1(image)))).movedim(1, -1)


class TokenMBConv(MBConv):
    """:class:`regard.layers.conv_norm.MBConv` on tokens ``(batch, rows, columns, channels)``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


def maxvit(
    dim: int = 64,
    depths: Sequence[int] = (2, 2, 5, 2),
    *,
    stem_dim: int = 64,
    head_dim: int = 32,
    window_size: int = 7,
    mlp_ratio: float = 4.0,
    padding: int | str | None = "same",
    norm_eps: float = 1e-3,
    approximate: str = "tanh",
    drop_path: float = 0.2,
    num_classes: int = 1000,
) -> BackboneSpec:
    """The table of a MaxViT. Its published blocks are two of ours: convolution, window and MLP; then grid and MLP.

    Any input size works: at the bottom and on the right windows are clipped, and grids have fewer tokens, where the
    resolution is not a multiple of ``window_size``.

    Args:
        dim: channels of the first stage; they double from stage to stage.
        depths: published blocks per stage.
        stem_dim: channels of the stem.
        head_dim: channels per head.
        window_size: tokens per axis of a window, and of a grid; published models have an image size over 32.
        mlp_ratio: hidden channels of the MLPs over ``dim``.
        padding: of the convolutions: ``"same"`` is TensorFlow's, which the published weights need; None is symmetric.
        norm_eps: of the batch norms.
        approximate: of GELU, ``"tanh"`` (published weights) or ``"none"``.
        drop_path: stochastic depth of the last published block.
        num_classes: outputs of the classifier.
    """
    act = partial(nn.GELU, approximate=approximate)
    conv = partial(TokenMBConv, padding=padding, act=act, eps=norm_eps)
    window = BlockSpec(WindowAttention, {"window_size": window_size}, before=conv)
    period = (window, BlockSpec(GridAttention, {"grid_size": window_size}))
    widths = [dim * 2**i for i in range(len(depths))]
    return BackboneSpec(
        stages=tuple(StageSpec(w, w // head_dim, 2 * depth, period) for w, depth in zip(widths, depths, strict=True)),
        stem=partial(MaxViTStem, padding=padding, act=act, eps=norm_eps),
        stem_dim=stem_dim,
        first_stride=2,
        downsample=None,
        mlp=partial(MLP, act=act),
        mlp_ratio=mlp_ratio,
        drop_path=drop_path,
        unit=2,
        pool_first=True,
        pre_logits=widths[-1],
        num_classes=num_classes,
        layouts=LAYOUTS,
    )


_PAPER = "2204.01697"
_22K = 21843
_DEEP = (2, 6, 14, 2)
_TINY, _SMALL = partial(maxvit), partial(maxvit, dim=96, drop_path=0.3)
_BASE = partial(maxvit, dim=96, depths=_DEEP, drop_path=0.4)
_LARGE = partial(maxvit, dim=128, depths=_DEEP, stem_dim=128, drop_path=0.6)
_XLARGE = partial(maxvit, dim=192, depths=_DEEP, stem_dim=192, drop_path=0.6)


def _cards(size: str, table: partial[BackboneSpec], params: Sequence[int], gmacs: Sequence[float]) -> list[ModelCard]:
    """One card for each published image size: windows grow with the image, and with them the bias tables."""
    images = (224, 384, 512)
    return [
        ModelCard(f"maxvit_{size}_tf_{image}", partial(table, window_size=image // 32), _PAPER, count, cost, image)
        for image, count, cost in zip(images, params, gmacs, strict=True)
    ]


register_models([
    *_cards("tiny", _TINY, (30_916_528, 30_977_008, 31_049_584), (5.6, 17.7, 33.7)),
    *_cards("small", _SMALL, (68_927_956, 69_018_676, 69_127_540), (11.7, 36.1, 67.6)),
    *_cards("base", _BASE, (119_467_708, 119_653_468, 119_876_380), (24.2, 74.2, 138.5)),
    *_cards("large", _LARGE, (211_785_560, 212_033_240, 212_330_456), (43.9, 133.1, 245.4)),
    *_cards("xlarge", _XLARGE, (474_951_952, 475_323_472, 475_769_296), (97.8, 293.7, 535.2)),
    # pretrained on ImageNet-21k
    ModelCard("maxvit_base_tf_224.in21k", partial(_BASE, num_classes=_22K), _PAPER, 135_495_975, 24.2),
    ModelCard("maxvit_large_tf_224.in21k", partial(_LARGE, num_classes=_22K), _PAPER, 233_149_635, 43.9),
    ModelCard("maxvit_xlarge_tf_224.in21k", partial(_XLARGE, num_classes=_22K), _PAPER, 506_987_643, 97.8),
])  # fmt: skip
