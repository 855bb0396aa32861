"""VOLO: outlookers on a fine grid, transformers on a coarse one, and class attention at the end.

    x + outlook(LN(x)), x + MLP(LN(x));  2 x 2 convolution, + positions;  x + attention(LN(x)), x + MLP(LN(x));  class blocks
    logits = head(class token) + max over tokens of aux_head(token) / 2
Cost: quadratic in the coarse tokens. Source: Yuan et al., VOLO, arXiv:2106.13112; Jiang et al., arXiv:2104.10858.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...layers.blocks import DropPath
from ...layers.conv_norm import ConvNorm
from ...layers.linear import linear
from ...layers.mixers import MultiHeadAttention, OutlookAttention
from ...layers.mlps import MLP
from ...layers.pools import ClassAttention
from ...layers.positions import PositionTable
from ...layers.stems import ConvDownsample
from ...ops.tracing import fill
from ..backbone import Backbone, initialise_weights
from ..checkpoints import Layout, Rule, block_rules
from ..registry import ModelCard, register_models
from ..spec import BackboneSpec, BlockSpec, StageSpec

_RULES = (
    *(Rule(f"patch_embed.conv.{3 * n}.{{name}}", f"stem.conv.{n}.conv.{{name}}") for n in range(3)),
    *(Rule(f"patch_embed.conv.{3 * n + 1}.{{name}}", f"stem.conv.{n}.norm.{{name}}") for n in range(3)),
    Rule("patch_embed.proj.{name}", "stem.proj.{name}"),
    *block_rules("network.0.{j}", "stages.0.blocks.{j}"),
    Rule("network.1.proj.{name}", "stages.1.downsample.conv.{name}"),
    Rule("pos_embed", "stages.1.downsample.position.table"),
    *block_rules("network.{i+1}.{j}", "stages.{i}.blocks.{j}"),
    Rule("cls_token", "cls_token"),
    Rule("post_network.{name}", "class_blocks.{name}"),
    Rule("norm.{name}", "norm.{name}"),
    Rule("head.{name}", "head.{name}"),
    Rule("aux_head.{name}", "aux_head.{name}"),
)

LAYOUTS = (Layout("official", _RULES), Layout("timm", _RULES))


# --------------------------------------------------------------------------------------------------------------------
# mixing images by tokens


class Box(NamedTuple):
    """A rectangle of tokens, its ends not included."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def area(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)


def random_box(grid: Sequence[int], generator: torch.Generator | None = None) -> Box:
    """A box around a uniform centre whose area, before the border cuts it, is a uniform share of a grid.

    Source: Yun et al., CutMix, arXiv:1905.04899; Jiang et al., arXiv:2104.10858.
    """
    side = math.sqrt(torch.rand((), generator=generator).item())
    ends = []
    for length in grid:
        size = int(length * side)
        centre = int(torch.randint(length, (), generator=generator))
        ends.append((max(centre - size // 2, 0), min(centre + (size + 1) // 2, length)))
    (top, bottom), (left, right) = ends
    return Box(top, left, bottom, right)


def mix_tokens(x: Tensor, box: Box) -> Tensor:
    """Inside the box, the tokens ``(batch, rows, columns, channels)`` of the batch in reverse order; its own inverse."""
    rows, columns = slice(box.top, box.bottom), slice(box.left, box.right)
    mixed = x.clone()
    mixed[:, rows, columns] = x.flip(0)[:, rows, columns]
    return mixed


# --------------------------------------------------------------------------------------------------------------------
# modules


class VoloStem(nn.Module):
    """Three convolutions with batch norm and ReLU at half resolution, then patches of 4 x 4."""

    reduction = 8

    def __init__(self, in_chans: int, dim: int, *, hidden: int = 64, device=None, dtype=None) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv = nn.Sequential(
            ConvNorm(in_chans, hidden, 7, 2, act=nn.ReLU, **factory),
            ConvNorm(hidden, hidden, 3, act=nn.ReLU, **factory),
            ConvNorm(hidden, hidden, 3, act=nn.ReLU, **factory),
        )
        self.proj = nn.Conv2d(hidden, dim, 4, stride=4, **factory)

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv(image)
        bottom, right = fill(x.shape[-2], 4), fill(x.shape[-1], 4)
        x = F.pad(x, [0, right, 0, bottom]) if bottom or right else x
        return self.proj(x).movedim(1, -1)


class PositionedDownsample(ConvDownsample):
    """A 2 x 2 convolution of stride 2 without norm, and learned positions."""

    def __init__(self, dim: int, out: int, *, grid: Sequence[int], device=None, dtype=None) -> None:
        super().__init__(dim, out, kernel_size=2, norm=nn.Identity, bias=True, device=device, dtype=dtype)
        self.position = PositionTable(out, grid, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.position(super().forward(x))


def _downsample(dim: int, out: int, *, grid: Sequence[int], device=None, dtype=None) -> nn.Module:
    """Only the outlookers have a grid, and a width, of their own."""
    return nn.Identity() if dim == out else PositionedDownsample(dim, out, grid=grid, device=device, dtype=dtype)


class ClassBlock(nn.Module):
    """Class attention and MLP that change the first of the tokens ``(batch, 1 + n, dim)`` only.

    Source: Touvron et al., CaiT, arXiv:2103.17239.
    """

    def __init__(self, dim: int, heads: int, hidden: int, *, device=None, dtype=None) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, **factory)
        self.attn = ClassAttention(dim, heads, **factory)
        self.norm2 = nn.LayerNorm(dim, **factory)
        self.mlp = MLP(dim, hidden, **factory)

    def forward(self, x: Tensor) -> Tensor:
        first = x[:, :1] + self.attn(self.norm1(x))
        first = first + self.mlp(self.norm2(first))
        return torch.cat([first, x[:, 1:]], 1)


class Volo(Backbone):
    """The network of a :func:`volo` table: a backbone with class attention and a classifier of every token.

    Stochastic depth spares the outlookers, as in the release.

    Args:
        spec, **options: see :class:`Backbone`.
    """

    num_prefix_tokens = 1

    def __init__(self, spec: BackboneSpec, **options) -> None:
        super().__init__(spec, **options)
        for info in self.feature_info[2:]:
            info["reduction"] = self.feature_info[1]["reduction"]
        for module in self.stages[0].modules():
            if isinstance(module, DropPath):
                module.p = 0.0
        factory: dict[str, Any] = {"device": self.norm.weight.device, "dtype": self.norm.weight.dtype}
        dim, heads = self.num_features, spec.stages[-1].heads
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim, **factory))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.class_blocks = nn.Sequential(*(ClassBlock(dim, heads, int(dim * spec.mlp_ratio), **factory) for _ in range(2)))
        self.class_blocks.apply(initialise_weights)

    def reset_classifier(self, num_classes: int) -> None:
        super().reset_classifier(num_classes)
        self.aux_head: nn.Module = nn.Identity()
        if not num_classes:
            self.unused_keys |= {"aux_head.weight", "aux_head.bias"}
            return
        like = self.norm.weight
        self.aux_head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
        self.aux_head.apply(initialise_weights)

    def no_weight_decay(self) -> set[str]:
        return {"cls_token", "stages.1.downsample.position.table"} | super().no_weight_decay()

    def _classify(self, x: Tensor) -> Tensor:
        """The class token before the normalised tokens of the last stage, ``(batch, 1 + rows * columns, dim)``."""
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(1, 2)], 1)
        return self.norm(self.class_blocks(x))

    def forward_features(self, image: Tensor) -> Tensor:
        """The normalised class token and tokens of the last stage, ``(batch, 1 + rows * columns, num_features)``."""
        return self._classify(self.run_stages(image)[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Classify the class token and add half of the best that any token says; ``pre_logits`` stops before both."""
        x = self.head_drop(x)
        if pre_logits or not self.num_classes:
            return x[:, 0]
        return self.head(x[:, 0]) + 0.5 * linear(self.aux_head, x[:, 1:]).amax(1)

    def forward_dense(self, image: Tensor, box: Box | None = None) -> tuple[Tensor, Tensor]:
        """Logits of the class token and of every token, for training with token labels.

        Args:
            image: ``(batch, in_chans, height, width)``.
            box: tokens of the last stage that come from the batch in reverse order, see :func:`random_box`. The images are
                mixed after the stem, and the logits of their tokens put back where they belong.

        Returns:
            ``(batch, num_classes)``, of the mixed images, and ``(batch, rows, columns, num_classes)``.

        Raises:
            ValueError: a model without a classifier.
        """
        if not self.num_classes:
            raise ValueError("forward_dense needs a classifier; got a model with num_classes=0")
        x = self.embed(image)
        if box is not None:
            x = mix_tokens(x, Box(*(2 * end for end in box)))
        for stage in self.stages:
            x = stage(x)
        tokens = self.head_drop(self._classify(x))
        dense = linear(self.aux_head, tokens[:, 1:]).unflatten(1, x.shape[1:3])
        return self.head(tokens[:, 0]), dense if box is None else mix_tokens(dense, box)


# --------------------------------------------------------------------------------------------------------------------
# tables


def volo(
    dim: int = 192,
    depths: Sequence[int] = (4, 4, 8, 2),
    *,
    head_dim: int | tuple[int, int] = 32,
    kernel_size: int = 3,
    stride: int = 2,
    grid: tuple[int, int] = (14, 14),
    stem_dim: int = 64,
    mlp_ratio: float = 3.0,
    drop_path: float = 0.1,
    num_classes: int = 1000,
) -> BackboneSpec:
    """The table of a VOLO.

    Args:
        dim: channels of the outlookers; the transformers have twice as many.
        depths: outlookers, then transformers in as many stages as published weights name.
        head_dim: channels per head; two numbers for outlookers and transformers.
        kernel_size, stride: of the outlookers' windows.
        grid: tokens per axis that the transformers' positions are learned for; resized for other images.
        stem_dim: channels of the stem.
        mlp_ratio: hidden channels of the MLPs over their width.
        drop_path: stochastic depth of the last block; outlookers have none.
        num_classes: outputs of the classifiers.
    """
    fine, coarse = (head_dim, head_dim) if isinstance(head_dim, int) else head_dim
    outlook = BlockSpec(OutlookAttention, {"kernel_size": kernel_size, "stride": stride})
    dense = BlockSpec(MultiHeadAttention, {"qkv_bias": False})
    first, *rest = depths
    stages = [StageSpec(dim, dim // fine, first, (outlook,))]
    stages += [StageSpec(2 * dim, 2 * dim // coarse, depth, (dense,)) for depth in rest]
    return BackboneSpec(
        tuple(stages),
        stem=partial(VoloStem, hidden=stem_dim),
        downsample=partial(_downsample, grid=grid),
        mlp_ratio=mlp_ratio,
        drop_path=drop_path,
        num_classes=num_classes,
        layouts=LAYOUTS,
        network=Volo,
    )


_D1, _D2 = partial(volo), partial(volo, dim=256, depths=(6, 4, 10, 4), drop_path=0.2)
_D3 = partial(volo, dim=256, depths=(8, 8, 16, 4), drop_path=0.5)
_D4 = partial(volo, dim=384, depths=(8, 8, 16, 4), head_dim=(32, 48), drop_path=0.5)
_D5 = partial(volo, dim=384, depths=(12, 12, 20, 4), head_dim=(32, 48), stem_dim=128, mlp_ratio=4.0, drop_path=0.75)


def _card(name: str, table: partial[BackboneSpec], params: int, gmacs: float, input_size: int = 224) -> ModelCard:
    return ModelCard(name, partial(table, grid=(input_size // 16,) * 2), "2106.13112", params, gmacs, input_size)


register_models([
    _card("volo_d1_224", _D1, 26_632_040, 6.94),
    _card("volo_d1_384", _D1, 26_777_960, 22.75, 384),
    _card("volo_d2_224", _D2, 58_678_336, 14.34),
    _card("volo_d2_384", _D2, 58_872_896, 46.17, 384),
    _card("volo_d3_224", _D3, 86_325_072, 20.78),
    _card("volo_d3_448", _D3, 86_626_128, 96.33, 448),
    _card("volo_d4_224", _D4, 192_961_520, 44.34),
    _card("volo_d4_448", _D4, 193_413_104, 197.13, 448),
    _card("volo_d5_224", _D5, 295_455_584, 72.4),
    _card("volo_d5_448", _D5, 295_907_168, 315.06, 448),
    _card("volo_d5_512", _D5, 296_091_488, 425.09, 512),
], tiny={"grid": (5, 5)})  # fmt: skip
