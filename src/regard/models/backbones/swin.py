"""Swin Transformer: windows of M x M tokens, moved by M // 2 in every other block, merged 2 x 2 between stages.

    x + attention(LN(x)) in windows,  x + MLP(LN(x));  shift 0, M // 2, 0, M // 2, ...
Cost: linear in tokens. Source: Liu et al., Swin Transformer, arXiv:2103.14030.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ...checks import check_choice
from ...layers.mixers import WindowAttention
from ...layers.stems import PatchEmbed, PatchMerging
from ...ops import Source
from ...ops import patterns as P
from ...ops.tracing import fill
from ..checkpoints import Layout, Rule, block_rules
from ..registry import ModelCard, register_models
from ..spec import BackboneSpec, BlockSpec, StageSpec

_COMMON = (
    Rule("patch_embed.{name}", "stem.{name}"),
    *block_rules(
        "layers.{i}.blocks.{j}",
        "stages.{i}.blocks.{j}",
        Rule("attn.relative_position_bias_table", "mixer.op.bias.table", "query_minus_key_table"),
    ),
    Rule("norm.{name}", "norm.{name}"),
)
_BUFFERS = (r"\.attn_mask$", r"\.relative_position_index$")

LAYOUTS = (
    Layout(
        "official",
        (*_COMMON, Rule("layers.{i}.downsample.{name}", "stages.{i+1}.downsample.{name}"), Rule("head.{name}", "head.{name}")),
        _BUFFERS,
        "token",
    ),
    Layout(
        "timm",
        (*_COMMON, Rule("layers.{i}.downsample.{name}", "stages.{i}.downsample.{name}"), Rule("head.fc.{name}", "head.{name}")),
        _BUFFERS,
        "timm",
    ),
)


PADS = ("mask", "token", "timm")


class RolledWindowAttention(WindowAttention):
    """Shifted windows that can also be what timm computes where the grid does not divide.

    With ``pad="timm"`` the map is rolled first and padded after. The zeros then lie between the last tokens and the first ones
    that the roll brought round, and a window that holds both is cut ``shift`` tokens before its end, not where they meet. On
    grids that divide, and with another ``pad``, it is :class:`WindowAttention`.
    """

    def __init__(self, dim: int, heads: int, window_size: int = 7, shift: int = 0, *, pad: str = "timm", **options) -> None:
        super().__init__(dim, heads, window_size, shift, **options)
        self.size, self.shift, self.pad = window_size, shift, check_choice("pad", pad, PADS)

    def forward(self, x: Tensor, extra: Tensor | None = None, *, context: Tensor | None = None) -> Tensor:
        if self.pad != "timm":
            return super().forward(x, extra, context=context)
        if extra is not None or context is not None:
            raise ValueError("rolled windows attend within one grid: extra tokens and a context are not defined")
        shifts = [self.shift if n > self.size else 0 for n in x.shape[1:3]]
        if not any(shifts):
            return super().forward(x)
        rolled = torch.roll(x, [-shift for shift in shifts], (1, 2))
        return torch.roll(super().forward(rolled), shifts, (1, 2))

    def padding(self, grid: Sequence[int]) -> Sequence[int]:
        if self.pad != "timm":
            return super().padding(grid)
        return [fill(n, min(self.size, n)) for n in grid]

    def sources(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Sequence[Source]:
        if self.pad != "timm":
            return super().sources(x, q, k, v)
        # of the two windows of this second size, the first ends where timm cuts the last window of the first size
        cut = tuple(n - self.shift if n > self.size else n for n in q.shape[1:3])
        pattern = P.Window(self.size) & P.Window(cut) if self.shift else P.Window(self.size)
        return [Source(k, v, pattern, bias=self.bias)]


def swin(
    dim: int = 96,
    depths: Sequence[int] = (2, 2, 6, 2),
    *,
    head_dim: int = 32,
    window_size: int = 7,
    pad: str | None = None,
    mlp_ratio: float = 4.0,
    drop_path: float = 0.2,
    num_classes: int = 1000,
) -> BackboneSpec:
    """The table of a Swin Transformer.

    Args:
        dim: channels of the first stage; they double from stage to stage.
        depths: blocks per stage.
        head_dim: channels per head.
        window_size: tokens per axis of a window.
        pad: where a grid does not divide into windows, ``"mask"`` clips the last ones, ``"token"`` pads with zeros that take
            part (the official detection code), ``"timm"`` does so after rolling. All agree on sizes that divide. None is
            what the checkpoint that is loaded was trained with, and ``"mask"`` without one.
        mlp_ratio: hidden channels of the MLPs over ``dim``.
        drop_path: stochastic depth of the last block.
        num_classes: outputs of the classifier.
    """
    if pad is not None and pad not in PADS:
        raise ValueError(f"pad must be 'mask', 'token' or 'timm'; got {pad!r}")
    options = {"window_size": window_size, "pad": pad or "mask"}
    period = tuple(BlockSpec(RolledWindowAttention, options | {"shift": shift}) for shift in (0, window_size // 2))
    widths = [dim * 2**i for i in range(len(depths))]
    return BackboneSpec(
        stages=tuple(StageSpec(w, w // head_dim, depth, period) for w, depth in zip(widths, depths, strict=True)),
        stem=partial(PatchEmbed, patch_size=4),
        downsample=PatchMerging,
        mlp_ratio=mlp_ratio,
        drop_path=drop_path,
        num_classes=num_classes,
        layouts=LAYOUTS,
        pad=pad,
    )


_DEEP = (2, 2, 18, 2)
_22K = 21841
_TINY, _SMALL = partial(swin), partial(swin, depths=_DEEP, drop_path=0.3)
_BASE, _LARGE = partial(swin, dim=128, depths=_DEEP, drop_path=0.5), partial(swin, dim=192, depths=_DEEP)


def _card(name: str, table: partial[BackboneSpec], params: int, gmacs: float, input_size: int = 224) -> ModelCard:
    return ModelCard(name, table, "2103.14030", params, gmacs, input_size)


register_models([
    _card("swin_tiny_patch4_window7_224", _TINY, 28_288_354, 4.5),
    _card("swin_small_patch4_window7_224", _SMALL, 49_606_258, 8.7),
    _card("swin_base_patch4_window7_224", _BASE, 87_768_224, 15.4),
    _card("swin_base_patch4_window12_384", partial(_BASE, window_size=12), 87_903_584, 47.1, 384),
    _card("swin_large_patch4_window7_224", _LARGE, 196_532_476, 34.5),
    _card("swin_large_patch4_window12_384", partial(_LARGE, window_size=12), 196_735_516, 103.9, 384),
    # pretrained on ImageNet-22k
    _card("swin_tiny_patch4_window7_224.ms_in22k", partial(_TINY, drop_path=0.1, num_classes=_22K), 44_315_083, 4.5),
    _card("swin_small_patch4_window7_224.ms_in22k", partial(_SMALL, drop_path=0.2, num_classes=_22K), 65_632_987, 8.7),
    _card("swin_base_patch4_window7_224.ms_in22k", partial(_BASE, drop_path=0.2, num_classes=_22K), 109_130_249, 15.4),
    _card(
        "swin_base_patch4_window12_384.ms_in22k",
        partial(_BASE, window_size=12, drop_path=0.2, num_classes=_22K), 109_265_609, 47.1, 384,
    ),
    _card("swin_large_patch4_window7_224.ms_in22k", partial(_LARGE, num_classes=_22K), 228_565_093, 34.5),
    _card(
        "swin_large_patch4_window12_384.ms_in22k", partial(_LARGE, window_size=12, num_classes=_22K), 228_768_133, 103.9, 384
    ),
])  # fmt: skip
