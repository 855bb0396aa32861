"""Sparsifiner: DeiT whose patches each see the quarter of the tokens that a low-rank map lists for them.

Cost: that of the host with a quarter of the attention, and of the map. Source: Wei et al., Sparsifiner, arXiv:2303.13755.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from ..layers.mixers import SparsifinerAttention
from .builder import BlockSpec
from .checkpoints import Layout, Rule
from .registry import ModelCard, register_models
from .vit import RULES, TransformerSpec, vit

_PREDICTOR = {"proj_c_q.{name}": "q.{name}", "proj_c_k.{name}": "k.{name}", "proj_n": "down", "proj_back_n": "up"}
_RULES = tuple(
    Rule(f"blocks.{{j}}.attn.mask_predictor.{theirs}", f"stages.0.blocks.{{j}}.mixer.op.predictor.{ours}")
    for theirs, ours in _PREDICTOR.items()
)
LAYOUTS = (Layout("official", (*_RULES, *RULES)),)


def sparsifiner(
    dim: int = 384,
    depth: int = 12,
    *,
    keep_rate: float = 0.25,
    threshold: float | None = None,
    token_ratio: int = 6,
    channel_ratio: int = 2,
    head_dim: int = 64,
    patch_size: int = 16,
    image_size: int = 224,
    mlp_ratio: float = 4.0,
    drop_path: float = 0.1,
    num_classes: int = 1000,
) -> TransformerSpec:
    """The table of a Sparsifiner. Weights of its host fit but for the predictors: ``load_state_dict(..., strict=False)``.

    Args:
        dim, depth: channels and blocks.
        keep_rate, threshold, token_ratio, channel_ratio: see :class:`regard.layers.mixers.SparsifinerAttention`.
        head_dim, patch_size, image_size, mlp_ratio, drop_path, num_classes: see :func:`regard.models.vit.vit`.
    """
    host = vit(
        dim, depth, head_dim=head_dim, patch_size=patch_size, image_size=image_size, mlp_ratio=mlp_ratio, drop_path=drop_path,
        num_classes=num_classes,
    )  # fmt: skip
    options = {
        "keep_rate": keep_rate, "threshold": threshold, "token_ratio": token_ratio, "channel_ratio": channel_ratio,
        "grid": host.grid, "prefix": 1,
    }  # fmt: skip
    (stage,) = host.stages
    return replace(host, stages=(replace(stage, period=(BlockSpec(SparsifinerAttention, options),)),), layouts=LAYOUTS)


_PAPER = "2303.13755"

register_models([
    ModelCard("sparsifiner_deit_tiny", partial(sparsifiner, dim=192), _PAPER, 5_918_632, 1.2),
    ModelCard("sparsifiner_deit_small", partial(sparsifiner), _PAPER, 22_251_880, 4.5),
    ModelCard("sparsifiner_deit_base", partial(sparsifiner, dim=768), _PAPER, 86_768_872, 17.4),
])  # fmt: skip
