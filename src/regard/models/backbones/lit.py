"""LITv2: convolutional MLPs alone on fine maps, HiLo attention on coarse ones, merged where the image asks for it.

    stages 1, 2:  x + DWMLP(LN(x));   stages 3, 4:  x + HiLo(LN(x)), x + DWMLP(LN(x));   between: GELU(BN(deformable 2 x 2))
Cost: N / s^2 keys per query in stage 3, dense in stage 4. Source: Pan et al., LITv2, arXiv:2205.13213.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice
from ...layers.blocks import TokenBatchNorm
from ...layers.conv import convolve_tokens
from ...layers.linear import is_plain
from ...layers.mixers import HiLoAttention
from ...layers.mlps import ConvMLP
from ...layers.stems import PatchEmbed, pad_to_even
from ...ops.affine import affine
from ...ops.local.deform import sample_points
from ..checkpoints import Layout, Rule, block_rules
from ..registry import ModelCard, register_models
from ..spec import BackboneSpec, BlockSpec, StageSpec

LAYOUTS = (
    Layout(
        "official",
        (
            Rule("patch_embed.{name}", "stem.{name}"),
            *block_rules(
                "layers.{i}.blocks.{j}",
                "stages.{i}.blocks.{j}",
                Rule("attn.h_{name}", "mixer.op.high.{name}"),
                Rule("attn.l_{name}", "mixer.op.low.{name}"),
                Rule("mlp.dwconv.dwconv.{name}", "mlp.op.conv.{name}"),
                attn=None,
            ),
            Rule("layers.{i}.downsample.dconv.conv_offset.{name}", "stages.{i+1}.downsample.offset.{name}"),
            Rule("layers.{i}.downsample.dconv.{name}", "stages.{i+1}.downsample.conv.{name}"),
            Rule("layers.{i}.downsample.norm_layer.{name}", "stages.{i+1}.downsample.norm.{name}"),
            Rule("norm.{name}", "norm.{name}"),
            Rule("head.{name}", "head.{name}"),
        ),
        pad="token",
    ),
)


class DeformableMerging(nn.Module):
    """A 2 x 2 convolution of stride 2 whose four taps are moved by what the tokens say, then batch norm and GELU.

    The offsets start at 0, where this is a plain convolution; the published training gives ``offset`` a hundredth of the
    learning rate.

    Args:
        dim, out: channels in and out.
        pad: where an axis is of odd length, ``"mask"`` adds a row of zeros to it, and ``"token"`` makes no square of the last
            row, which taps may still be moved to (the official segmentation and detection code).

    Source: Dai et al., arXiv:1703.06211; Pan et al., LITv2, arXiv:2205.13213.
    """

    def __init__(self, dim: int, out: int, *, pad: str = "mask", device=None, dtype=None) -> None:
        super().__init__()
        self.pad = check_choice("pad", pad, ("mask", "token"))
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.offset = nn.Conv2d(dim, 8, 2, stride=2, **factory)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)  # type: ignore[arg-type]  # it has one
        self.conv = nn.Conv2d(dim, out, 2, stride=2, **factory)
        self.norm = TokenBatchNorm(out, **factory)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        if self.pad == "mask":
            x = pad_to_even(x)
        elif 1 in x.shape[1:3]:  # nothing would be left of a single row
            x = F.pad(x, [0, 0, 0, x.shape[2] == 1, 0, x.shape[1] == 1])
        offset = convolve_tokens(self.offset, x).unflatten(-1, (1, 4, 2))  # (batch, rows, columns, 1, tap, (row, column))
        rows, columns = (2 * torch.arange(n, device=x.device) for n in offset.shape[1:3])
        squares = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)[:, :, None, None]
        taps = torch.cartesian_prod(torch.arange(2, device=x.device), torch.arange(2, device=x.device))
        offset = offset.to(torch.promote_types(offset.dtype, torch.float32))  # coordinates outgrow the bits of bfloat16
        samples = sample_points(x.unsqueeze(-2), offset + squares + taps)  # (batch, rows, columns, 1, tap, dim)
        samples = samples.squeeze(-3)
        if is_plain(self.conv, nn.Conv2d):
            kernel = self.conv.weight.permute(0, 2, 3, 1).flatten(1)  # (out, tap and dim)
            merged = affine(samples.flatten(-2), kernel, self.conv.bias)
        else:  # the taps of each square side by side, as a map that the convolution takes
            merged = convolve_tokens(self.conv, samples.unflatten(-2, (2, 2)).transpose(2, 3).flatten(3, 4).flatten(1, 2))
        return self.act(self.norm(merged))


def litv2(
    dim: int = 96,
    depths: Sequence[int] = (2, 2, 6, 2),
    *,
    head_dim: int = 32,
    window_sizes: Sequence[int | None] = (None, None, 2, 1),
    alpha: float = 0.9,
    pad: str | None = None,
    mlp_ratio: float = 4.0,
    drop_path: float = 0.2,
    num_classes: int = 1000,
) -> BackboneSpec:
    """The table of a LITv2.

    Args:
        dim: channels of the first stage; they double from stage to stage.
        depths: blocks per stage.
        head_dim: channels per head.
        window_sizes: per stage, tokens per axis of HiLo's windows; None for blocks without attention.
        alpha: share of HiLo's heads for low frequencies.
        pad: on grids that do not divide into windows, see :class:`regard.layers.mixers.HiLoAttention`, or into the squares
            that are merged, see :class:`DeformableMerging`. None is what the checkpoint that is loaded was trained with, and
            ``"mask"`` without one.
        mlp_ratio: hidden channels of the MLPs over ``dim``.
        drop_path: stochastic depth of the last block.
        num_classes: outputs of the classifier.
    """
    if len(window_sizes) < len(depths):
        raise ValueError(f"window_sizes must be given for each of {len(depths)} stages; got {tuple(window_sizes)}")
    stages = []
    for index, (depth, size) in enumerate(zip(depths, window_sizes, strict=False)):
        width = dim * 2**index
        block = BlockSpec(None)
        if size is not None:
            block = BlockSpec(HiLoAttention, {"window_size": size, "alpha": alpha, "pad": pad or "mask"})
        stages.append(StageSpec(width, width // head_dim, depth, (block,)))
    return BackboneSpec(
        tuple(stages),
        stem=partial(PatchEmbed, patch_size=4),
        downsample=partial(DeformableMerging, pad=pad or "mask"),
        mlp=ConvMLP,
        mlp_ratio=mlp_ratio,
        drop_path=drop_path,
        num_classes=num_classes,
        layouts=LAYOUTS,
        pad=pad,
    )


_DEEP, _PAPER = (2, 2, 18, 2), "2205.13213"
_BASE = partial(litv2, dim=128, depths=_DEEP, drop_path=0.5)

register_models([
    ModelCard("litv2_small", partial(litv2), _PAPER, 27_844_000, 3.7),
    ModelCard("litv2_medium", partial(litv2, depths=_DEEP, drop_path=0.3), _PAPER, 48_830_368, 7.5),
    ModelCard("litv2_base", _BASE, _PAPER, 86_520_704, 13.2),
    ModelCard("litv2_base_384", _BASE, _PAPER, 86_520_704, 39.7, 384),
])  # fmt: skip
