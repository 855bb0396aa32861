"""Sparsifiner: DeiT whose patches each see the quarter of the tokens that a low-rank map lists for them.

Patches may also be dropped: after some blocks those that the class token attends to least become zeros that nothing sees.
Cost: that of the host with a quarter of the attention, and of the map. Source: Wei et al., Sparsifiner, arXiv:2303.13755.

Dropped patches are no keys of any query. In the release, which has no weights with them, the class token still sees them, as
keys and values of zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from ...layers.mixers import SparsifinerAttention
from ...layers.reduce import MaskingReducer, TokenMap
from ..checkpoints import Layout, Rule
from ..registry import ModelCard, register_models
from ..spec import BlockSpec
from .vit import RULES, TokenBlock, TokenBlockSpec, TokenState, TransformerSpec, vit

_PREDICTOR = {"proj_c_q.{name}": "q.{name}", "proj_c_k.{name}": "k.{name}", "proj_n": "down", "proj_back_n": "up"}
_RULES = tuple(
    Rule(f"blocks.{{j}}.attn.mask_predictor.{theirs}", f"stages.0.blocks.{{j}}.mixer.op.predictor.{ours}")
    for theirs, ours in _PREDICTOR.items()
)
LAYOUTS = (Layout("official", (*_RULES, *RULES)),)


class SparsifinerBlock(TokenBlock):
    """Attention among the tokens that are alive, and MLP; then a reducer, where the table has one, zeroes some more.

    While reconstruction is trained, nothing is dropped.
    """

    def forward(self, state: TokenState) -> TokenState:
        x, prefix, grid, tokens, messages = state
        mixer, reducer = self.mixer, self.reducer
        reducer = None if reducer is None or reducer.rate == 1.0 or mixer.op.maps is not None else reducer
        normed = mixer.norm(x)
        y, y_outer, scores = mixer.op.forward_scored(normed[:, prefix:].unflatten(1, grid), normed[:, :prefix], tokens)
        x = self.mlp(x + mixer.drop_path(mixer.scale(torch.cat([y_outer, y.flatten(1, -2)], 1))))
        if tokens is not None:
            x = torch.cat([x[:, :prefix], tokens.silence(x[:, prefix:])], 1)
        if reducer is not None:
            known = TokenMap.full(x.shape[0], x.shape[1] - prefix, x.device) if tokens is None else tokens
            x, tokens = reducer(x, scores, known)
        return TokenState(x, prefix, grid, tokens, messages)


def sparsifiner(
    dim: int = 384,
    depth: int = 12,
    *,
    keep_rate: float = 0.25,
    threshold: float | None = None,
    token_rate: float = 1.0,
    prune_at: Sequence[int] | None = None,
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
        token_rate: share of the patches that the first pruning keeps, ``token_rate ** 2`` of all the second, and so on; 1 for
            no pruning.
        prune_at: blocks after which patches are dropped; by default those after each quarter of the depth: 3, 6 and 9 of 12.
        head_dim, patch_size, image_size, mlp_ratio, drop_path, num_classes: see :func:`regard.models.backbones.vit.vit`.

    Raises:
        ValueError: a block that does not exist; a rate outside (0, 1].
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
    if token_rate == 1.0:
        return replace(host, stages=(replace(stage, period=(BlockSpec(SparsifinerAttention, options),)),), layouts=LAYOUTS)
    chosen = sorted({depth * i // 4 for i in (1, 2, 3)}) if prune_at is None else sorted(prune_at)
    if any(not 0 <= i < depth for i in chosen):
        raise ValueError(f"prune_at must be blocks 0 to {depth - 1}; got {chosen}")
    reducers = {block: partial(MaskingReducer, token_rate ** (i + 1)) for i, block in enumerate(chosen)}
    period = tuple(TokenBlockSpec(SparsifinerAttention, options, reducer=reducers.get(i)) for i in range(depth))
    return replace(
        host, stages=(replace(stage, period=period),), block=SparsifinerBlock, layouts=LAYOUTS,
        fixed="a Sparsifiner that prunes ranks tokens by its own attention, and leaves dropped ones out of it",
    )  # fmt: skip


_PAPER = "2303.13755"

register_models([
    ModelCard("sparsifiner_deit_tiny", partial(sparsifiner, dim=192), _PAPER, 5_918_632, 1.2),
    ModelCard("sparsifiner_deit_small", partial(sparsifiner), _PAPER, 22_251_880, 4.5),
    ModelCard("sparsifiner_deit_base", partial(sparsifiner, dim=768), _PAPER, 86_768_872, 17.4),
])  # fmt: skip
