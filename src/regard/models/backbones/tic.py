"""TiC: layers of attention within a kernel followed by a convolution, which is MLP and downsampling at once.

    norm, then MSA-Conv (see :class:`regard.layers.mixers.MSAConv`), its heads rolled in every other layer
Cost: linear in tokens. Source: Zhang et al., TiC, arXiv:2310.04134.

What is published is the operator. The network here is a reconstruction: its stem, widths, depths, heads, directions and steps
of the roll, and the batch norm before each layer are this library's, not the paper's, and pooling between layers is left out.
No published weights exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from ...layers.blocks import TokenBatchNorm
from ...layers.mixers.msa_conv import MSAConv
from ...layers.stems import ConvStem
from ..registry import ModelCard, register_models
from ..spec import BackboneSpec, BlockSpec, StageSpec


class TiCBlock(nn.Module):
    """A norm and one MSA-Conv.

    Args:
        spec, stage, block, drop_path, dim_in, stride: as for :class:`regard.models.backbone.Block`.
    """

    def __init__(
        self, spec: BackboneSpec, stage: StageSpec, block: BlockSpec, drop_path: float, *, dim_in: int, stride: int, **factory
    ) -> None:
        super().__init__()
        self.norm = spec.norm(dim_in, **factory)
        # the layer that widens has the heads of the stage, on the channels that enter
        self.op = MSAConv(dim_in, stage.heads, out=stage.dim, stride=stride, drop_path=drop_path, **block.options, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(self.norm(x))


def tic(
    dim: int = 96,
    depths: Sequence[int] = (2, 2, 6, 2),
    *,
    head_dim: int = 32,
    kernel_size: int = 7,
    dilation: int = 1,
    shift: int = 3,
    mask_padding: bool = False,
    attn_drop: float = 0.1,
    drop_path: float = 0.0,
    num_classes: int = 1000,
) -> BackboneSpec:
    """The table of a TiC, reconstructed.

    Args:
        dim: channels of the first stage; they double from stage to stage.
        depths: layers per stage.
        head_dim: channels per head.
        kernel_size, dilation, mask_padding: of the attention, see :class:`regard.layers.mixers.MSAConv`.
        shift: steps by which the heads of every other layer are rolled.
        attn_drop: dropout on the attention weights.
        drop_path: stochastic depth of the attention in the last layer.
        num_classes: outputs of the classifier.
    """
    common = {"kernel_size": kernel_size, "dilation": dilation, "mask_padding": mask_padding, "attn_drop": attn_drop}
    period = tuple(BlockSpec(MSAConv, common | {"shift": steps}) for steps in (0, shift))
    widths = [dim * 2**i for i in range(len(depths))]
    return BackboneSpec(
        tuple(StageSpec(w, w // head_dim, depth, period) for w, depth in zip(widths, depths, strict=True)),
        stem=ConvStem,
        downsample=None,
        block=TiCBlock,
        norm=TokenBatchNorm,
        drop_path=drop_path,
        num_classes=num_classes,
        fixed="a layer of TiC is token mixer, MLP and downsampling in one",
    )


_PAPER = "2310.04134"

# multiply-adds are those of the reconstruction
register_models([
    ModelCard("tic_tiny", partial(tic), _PAPER, 21_485_512, 4.1),
    ModelCard("tic_small", partial(tic, depths=(2, 2, 18, 2)), _PAPER, 42_742_216, 8.3),
    ModelCard("tic_base", partial(tic, dim=128, depths=(2, 2, 18, 2)), _PAPER, 75_624_040, 14.6),
])  # fmt: skip
