"""DependencyViT: a vision transformer of reversed attention, in which trees of dependencies between patches emerge.

    x + ReversedAttention(LN(x)), x + MLP(LN(x));  class = W sum_s M_s LN(x_s) / sum_s M_s, M the message left at the end
The Lite models drop the patches that send least, four times 16 % of all; each is represented by its parent from then on.
Cost: that of ViT, with two attentions a block. Source: Ding et al., DependencyViT, arXiv:2304.03282.

No code and no weights were released. Widths, depth, heads, temperature and the layers that drop patches are the paper's.
Reconstructed are: selector and controller without biases, half the width inside the controller, patches dropped between
attention and MLP, and layers counted from 1, so that blocks 1, 4, 7 and 10 of 0 to 11 drop them. How cycles of dependencies
become trees is this library's, see :func:`regard.ops.tokens.tree.dependency_tree`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ...layers.mixers import ReversedAttention
from ...layers.reduce import TokenMap, TreeReducer
from ...ops.tokens.tree import dependency_tree, subtrees
from ..registry import ModelCard, register_models
from .vit import TokenBlock, TokenBlockSpec, TokenState, TransformerSpec, VisionTransformer, vit


class DependencyBlock(TokenBlock):
    """Reversed attention and MLP, with a reduction between them that follows the dependencies where the table has one."""

    def forward(self, state: TokenState) -> TokenState:
        x, prefix, grid, tokens, before = state
        mixer, reducer = self.mixer, self.reducer
        reducer = None if reducer is None or reducer.rate == 1.0 else reducer
        y, messages, dependencies = mixer.op.send(mixer.norm(x), before, need_dependencies=reducer is not None)
        x = x + mixer.drop_path(mixer.scale(y))
        if reducer is not None:
            known = TokenMap.full(x.shape[0], x.shape[1], x.device) if tokens is None else tokens
            with_message = torch.cat([x, messages.unsqueeze(-1).to(x.dtype)], -1)  # what is dropped takes its message along
            reduced, known = reducer(with_message, messages, known, dependency_tree(dependencies))
            if reduced is not with_message:
                x, messages, grid, tokens = reduced[..., :-1], reduced[..., -1], reduced.shape[1:2], known
        return TokenState(self.mlp(x), prefix, tuple(grid), tokens, messages)


class Dependencies(NamedTuple):
    """What a model says of the patches of images, row by row; see :meth:`DependencyViT.parse`."""

    weights: Tensor
    """``(batch, places, places)``: how much each place sends to each, summed over the blocks; rows are senders."""
    parents: Tensor
    """``(batch, places)``: the place that each hangs on; the root is its own parent."""

    def subtrees(self) -> Tensor:
        """Which places each place's subtree holds: ``(batch, places, places)`` boolean; entities and parts of them."""
        return subtrees(self.parents)


class DependencyViT(VisionTransformer):
    """A vision transformer without class tokens, whose patches are averaged with their messages as weights.

    ``forward_features`` returns the normalised tokens, each times its weight, so that their mean is the weighted one.
    """

    def forward_features(self, image: Tensor) -> Tensor:
        """The normalised tokens after the last block, times weights with a mean of one: ``(batch, n, dim)``."""
        state = self.run_blocks(image)[-1]
        assert state.messages is not None  # every block hands them on
        x = self.norm(state.x)
        weights = state.messages.softmax(-1) * x.shape[1]  # M over its mean; the logarithms cannot underflow
        return x * weights.unsqueeze(-1).to(x.dtype)

    def forward_heads(self, x: Tensor) -> list[Tensor]:
        """The logits, of the mean of all tokens of :meth:`forward_features`."""
        return [self.head(self.forward_head(x, pre_logits=True))]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Average the tokens of :meth:`forward_features` and classify them; ``pre_logits`` stops before the classifier."""
        x = self.head_drop(x.mean(1))
        return x if pre_logits else self.head(x)

    def set_rates(self, drop: float) -> None:
        """Let the reductions drop this share of all patches each; 0 is the model without them.

        Raises:
            ValueError: a share that leaves nothing.
        """
        reducers = [block.reducer for block in self.blocks if block.reducer is not None]
        for reducer, rate in zip(reducers, _rates(drop, len(reducers)), strict=True):
            reducer.rate = rate

    def dependencies(self, image: Tensor) -> list[Tensor]:
        """How much each place sends to each in every block: ``(batch, places, places)``, rows are senders.

        A row sums to the sender's message; rows and columns of places whose tokens were dropped before are 0.

        Args:
            image: ``(batch, in_chans, height, width)``.
        """
        maps: list[Tensor] = []
        mixers = [block.mixer.op for block in self.blocks]
        for mixer in mixers:
            mixer.maps = maps
        try:
            with torch.no_grad():
                states = self.run_blocks(image, range(len(mixers)))
        finally:
            for mixer in mixers:
                mixer.maps = None
        entering = [None, *(state.tokens for state in states[:-1])]
        return [each if tokens is None else tokens.spread(each) for each, tokens in zip(maps, entering, strict=True)]

    def parse(self, image: Tensor, blocks: Sequence[int] | None = None) -> Dependencies:
        """The dependency tree of the patches of each image.

        Its root is the patch that sends most over the blocks together, a parent the patch that most is sent to, see
        :func:`regard.ops.tokens.tree.dependency_tree`.

        Args:
            image: ``(batch, in_chans, height, width)``.
            blocks: those to sum over; all by default.
        """
        found = self.dependencies(image)
        chosen = found if blocks is None else [found[i] for i in blocks]
        weights = torch.stack(chosen).sum(0)
        return Dependencies(weights, dependency_tree(weights))


def _rates(drop: float, count: int) -> list[float]:
    """The share of the present tokens that each reduction keeps, where each drops the same share of all."""
    if not 0.0 <= drop * count < 1.0:
        raise ValueError(f"{count} reductions may each drop less than 1/{count} of all tokens; got drop={drop}")
    left = [1.0 - i * drop for i in range(count + 1)]
    return [after / before for before, after in pairwise(left)]


def dependency_vit(
    dim: int = 384,
    depth: int = 12,
    *,
    heads: int = 12,
    temperature: float = 0.1,
    drop: float = 0.0,
    reduce_at: Sequence[int] | None = None,
    patch_size: int = 16,
    image_size: int = 224,
    mlp_ratio: float = 4.0,
    drop_path: float = 0.1,
    num_classes: int = 1000,
) -> TransformerSpec:
    """The table of a DependencyViT.

    Args:
        dim, depth: channels and blocks.
        heads: kinds of relations.
        temperature: see :class:`regard.layers.mixers.ReversedAttention`.
        drop: share of all tokens that each reduction drops, 0.16 in the Lite models; 0 for none.
        reduce_at: blocks with a reduction; by default the second of every three, but for none where ``drop`` is 0.
        patch_size, image_size, mlp_ratio, drop_path, num_classes: see :func:`regard.models.backbones.vit.vit`.

    Raises:
        ValueError: a block that does not exist; reductions that leave nothing.
    """
    chosen = list(range(1, depth, 3)) if reduce_at is None else sorted(reduce_at)
    chosen = chosen if drop else []
    if any(not 0 <= i < depth for i in chosen):
        raise ValueError(f"reduce_at must be blocks 0 to {depth - 1}; got {chosen}")
    host = vit(
        dim, depth, head_dim=dim // heads, patch_size=patch_size, image_size=image_size, mlp_ratio=mlp_ratio,
        drop_path=drop_path, num_classes=num_classes,
    )  # fmt: skip
    reducers = {at: partial(TreeReducer, rate) for at, rate in zip(chosen, _rates(drop, len(chosen)), strict=True)}
    options = {"temperature": temperature}
    period = tuple(TokenBlockSpec(ReversedAttention, options, reducer=reducers.get(i)) for i in range(depth))
    (stage,) = host.stages
    return replace(
        host, stages=(replace(stage, heads=heads, period=period),), block=DependencyBlock, prefix=(), layouts=(),
        fixed="DependencyViT hands the messages of its reversed attention on from block to block", network=DependencyViT,
    )  # fmt: skip


_PAPER = "2304.03282"

# multiply-adds are those of the reconstruction
register_models([
    ModelCard("dependency_vit_tiny", partial(dependency_vit, dim=192), _PAPER, 5_967_016, 1.40),
    ModelCard("dependency_vit_small", partial(dependency_vit), _PAPER, 22_992_232, 4.95),
    ModelCard("dependency_vit_lite_tiny", partial(dependency_vit, dim=192, drop=0.16), _PAPER, 5_967_016, 0.92),
    ModelCard("dependency_vit_lite_small", partial(dependency_vit, drop=0.16), _PAPER, 22_992_232, 3.29),
], tiny={"heads": 4})  # fmt: skip
