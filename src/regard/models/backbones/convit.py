"""ConViT: a vision transformer whose first blocks start as convolutions, and whose class token comes after them.

    10 blocks of gated positional attention on patches alone;  [class token, patches] in 2 blocks of plain attention
Cost: quadratic in tokens. Source: d'Ascoli et al., ConViT, arXiv:2103.10697.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from ...layers.mixers import GatedPositionalAttention, MultiHeadAttention
from ..checkpoints import Layout, Rule
from ..registry import ModelCard, register_models
from ..spec import BlockSpec
from .vit import RULES, TransformerSpec, vit

_RULES = (
    Rule("blocks.{j}.attn.pos_proj.{name}", "stages.0.blocks.{j}.mixer.op.position.{name}"),
    Rule("blocks.{j}.attn.gating_param", "stages.0.blocks.{j}.mixer.op.gate"),
    *RULES,
)
_BUFFERS = (r"\.rel_indices$",)
LAYOUTS = (Layout("official", _RULES, _BUFFERS), Layout("timm", _RULES, _BUFFERS))


def convit(
    dim: int = 192,
    depth: int = 12,
    *,
    head_dim: int = 48,
    plain: int = 2,
    strength: float = 1.0,
    patch_size: int = 16,
    image_size: int = 224,
    mlp_ratio: float = 4.0,
    drop_path: float = 0.1,
    num_classes: int = 1000,
) -> TransformerSpec:
    """The table of a ConViT.

    Args:
        dim, depth: channels and blocks.
        head_dim: channels per head; square numbers of heads start as square stencils.
        plain: how many of the last blocks have plain attention; the class token enters before them.
        strength: how sharply the heads attend to their places of the stencil at the start.
        patch_size, image_size, mlp_ratio, drop_path, num_classes: see :func:`regard.models.backbones.vit.vit`.

    Raises:
        ValueError: a number of plain blocks that leaves none for the class token, or of gated ones.
    """
    if not 1 <= plain < depth:
        raise ValueError(f"of {depth} blocks 1 to {depth - 1} may be plain; got {plain}")
    host = vit(
        dim, depth, head_dim=head_dim, patch_size=patch_size, image_size=image_size, mlp_ratio=mlp_ratio, drop_path=drop_path,
        num_classes=num_classes,
    )  # fmt: skip
    gated = BlockSpec(GatedPositionalAttention, {"strength": strength})
    period = (gated,) * (depth - plain) + (BlockSpec(MultiHeadAttention, {"qkv_bias": False}),) * plain
    (stage,) = host.stages
    return replace(host, stages=(replace(stage, period=period),), layouts=LAYOUTS, enter=depth - plain)


_PAPER = "2103.10697"

register_models([
    ModelCard("convit_tiny", partial(convit), _PAPER, 5_710_512, 1.0),
    ModelCard("convit_small", partial(convit, dim=432), _PAPER, 27_777_322, 5.4),
    ModelCard("convit_base", partial(convit, dim=768), _PAPER, 86_540_040, 17.0),
])  # fmt: skip
