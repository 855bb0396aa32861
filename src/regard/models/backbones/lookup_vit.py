"""LookupViT: all patches stay, at little cost; a few compressed tokens look them up, do the work and tell them the outcome.

    z = resize(x) to m x m tokens at the start;  in every block, on z:  z + gather(LN(z), LN(x)),  z + attention(LN(z)),
    z + MLP(LN(z)),  and on x:  x + spread(z) along the attention of the gathering,  x + MLP(LN(x)) of half the channels
    logits = W (mean of LN(z) + mean of LN(x))
Cost: C^2 (4 N + 15 M) + C (4 N M + 2 M^2) multiply-adds per block of N patches, M compressed tokens and C channels, where a
transformer has 12 C^2 N + 2 C N^2: linear in N. Source: Koner et al., LookupViT, arXiv:2407.12753.

No code and no weights were published. What the paper leaves open is decided here: gathering and spreading have an output
projection each; what goes back is not normalised before it is projected; the weights of the way there go back transposed
(``reuse="probs"``; ``"logits"`` is the other reading); both sets of tokens are read out through one classifier; positions are
learned, added to the patches, and reach the compressed tokens by the resize. The published sizes are those of the hosts, ViT.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...layers.blocks import DropPath, Residual
from ...layers.mixers import MultiHeadAttention
from ...layers.mixers.bidirectional import BidirectionalAttention
from ...layers.pools import sizes_of
from ...layers.positions import PositionTable
from ...layers.reduce import ResizingReducer, TokenMap
from ...layers.stems import PatchEmbed
from ...ops.patterns import Ints
from ..backbone import Backbone, Block, FeatureBackbone, Stage, Staged, stage_indices
from ..features import FeatureInfo
from ..registry import ModelCard, register_models
from ..spec import BackboneSpec, BlockSpec, StageSpec


@dataclass(frozen=True)
class LookupSpec(BackboneSpec):
    """A table of one stage whose mixers work on the compressed tokens.

    Args:
        grid: lengths of the axes of the table of positions, two for images and three for videos; it is resized to any other.
        size: compressed tokens per axis.
        reuse: how gathering is turned round, see :class:`regard.layers.mixers.bidirectional.BidirectionalAttention`.
        lookup_ratio: hidden channels of the MLPs of the lookup tokens over ``dim``.
    """

    grid: tuple[int, ...] = (14, 14)
    size: Ints = 7
    reuse: str = "probs"
    lookup_ratio: float = 0.5


class LookupState(NamedTuple):
    """What goes from block to block."""

    compressed: Tensor
    """``(batch, *size, dim)``."""
    lookup: Tensor
    """``(batch, *grid, dim)``."""
    tokens: TokenMap
    """Which compressed token stands for each place of the grid."""

    def places(self, compressed: bool = False) -> Tensor:
        """Features of every place of the grid, ``(batch, *grid, dim)``: of its own token, or of the compressed one."""
        if not compressed:
            return self.lookup
        return self.tokens.restore(self.compressed.flatten(1, -2), prefix=0).unflatten(1, self.lookup.shape[1:-1])


class LookupBlock(Block):
    """Gather, a whole transformer block on the compressed tokens, spread, and a narrow MLP on the lookup tokens."""

    mixer: Residual
    mlp: Residual

    def __init__(
        self,
        spec: LookupSpec,
        stage: StageSpec,
        block: BlockSpec,
        drop_path: float,
        *,
        dim_in: int,
        stride: int,
        **factory,
    ) -> None:
        super().__init__(spec, stage, block, drop_path, **factory)
        dim = stage.dim
        self.compressed_norm, self.lookup_norm = spec.norm(dim, **factory), spec.norm(dim, **factory)
        self.exchange = BidirectionalAttention(dim, stage.heads, reuse=spec.reuse, **factory)
        self.drop_path = DropPath(drop_path)
        narrow = spec.mlp(dim, int(dim * spec.lookup_ratio), **factory)
        self.lookup_mlp = Residual(spec.norm(dim, **factory), narrow, drop_path=drop_path)

    def forward(self, state: LookupState) -> LookupState:
        compressed, lookup, tokens = state
        gathered, link = self.exchange.gather(self.compressed_norm(compressed), self.lookup_norm(lookup))
        compressed = self.mlp(self.mixer(compressed + self.drop_path(gathered)))
        lookup = lookup + self.drop_path(self.exchange.spread(compressed, link))
        return LookupState(compressed, self.lookup_mlp(lookup), tokens)


class _Trunk(Staged):
    """What whole and cut models share: from images or videos to both sets of tokens after each block."""

    spec: LookupSpec
    positions: PositionTable
    compress: ResizingReducer
    norm: nn.Module
    lookup_norm: nn.Module

    def set_size(self, size: Ints) -> None:
        """Let so many compressed tokens per axis, a number or one per axis, do the work from now on; weights are for any."""
        sizes_of(self.spec.grid, size)
        self.compress.size = size

    def draw_size(self, sizes: Sequence[Ints] = (3, 5, 7), generator: torch.Generator | None = None) -> Ints:
        """Set one of several sizes at random, as training for several budgets does before each step; returns it."""
        if not sizes:
            raise ValueError(f"sizes must hold at least one size; got {sizes}")
        chosen = sizes[int(torch.randint(len(sizes), (), generator=generator))]
        self.set_size(chosen)
        return chosen

    def run_blocks(self, image: Tensor, wanted: Sequence[int] = (-1,)) -> list[LookupState]:
        """The state after each of the ``wanted`` blocks, which are in ascending order."""
        rank = len(self.spec.grid)
        self.check_image(image, "height, width" if rank == 2 else "frames, height, width")
        x = self.positions(self.stem(image))
        compressed, tokens = self.compress(x, TokenMap.full(x.shape[0], math.prod(x.shape[1:-1]), x.device))
        state = LookupState(compressed, x, tokens)
        stage: Any = self.stages[0]
        indices = stage_indices(wanted, len(stage.blocks))
        states = []
        for index, block in enumerate(stage.blocks[: indices[-1] + 1]):
            recompute = stage.grad_checkpointing and self.training
            state = checkpoint(block, state, use_reentrant=False) if recompute else block(state)
            if index in indices:
                states.append(state)
        return states

    def get_intermediate_layers(
        self,
        image: Tensor,
        n: int | Sequence[int] = 1,
        *,
        reshape: bool = False,
        norm: bool = False,
        compressed: bool = False,
    ) -> list[Tensor]:
        """The lookup tokens after the last ``n`` blocks, or after the listed ones.

        Args:
            image: ``(batch, in_chans, height, width)``, or ``(batch, in_chans, frames, height, width)``.
            n: how many blocks, or their indices.
            reshape: return maps ``(batch, dim, *grid)`` instead of sequences ``(batch, places, dim)``.
            norm: apply the final norm of these tokens.
            compressed: of each place return the compressed token that stands for it instead.
        """
        count = len(self.stages[0].blocks)  # type: ignore[arg-type]  # a module list
        states = self.run_blocks(image, stage_indices(range(-n, 0) if isinstance(n, int) else n, count))
        maps = [state.places(compressed) for state in states]
        if norm:
            maps = [(self.norm if compressed else self.lookup_norm)(x) for x in maps]
        return [x.movedim(-1, 1) if reshape else x.flatten(1, -2) for x in maps]

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone besides norms and biases: tables."""
        return super().no_weight_decay() | {"positions.table"}


class LookupViT(_Trunk, Backbone):
    """The network that a :class:`LookupSpec` describes, with the outside of a :class:`Backbone`.

    Its feature maps are the lookup tokens after each block. ``forward_features`` returns both sets of tokens after the last
    block, each normalised: ``(batch, compressed + places, dim)``.

    Args:
        spec, **options: see :class:`Backbone`.
    """

    def __init__(self, spec: LookupSpec, *, device=None, dtype=None, **options) -> None:
        super().__init__(spec, device=device, dtype=dtype, **options)
        factory = {"device": device, "dtype": dtype}
        dim, depth = spec.stages[0].dim, spec.stages[0].depth
        self.lookup_norm = (spec.final_norm or spec.norm)(dim, **factory)
        self.positions = PositionTable(dim, spec.grid, **factory)
        self.compress = ResizingReducer(spec.size)
        self.set_size(spec.size)
        reduction = self.feature_info[0]["reduction"]
        self.feature_info = FeatureInfo(
            {"num_chs": dim, "reduction": reduction, "module": f"stages.0.blocks.{i}"} for i in range(depth)
        )

    @property
    def num_prefix_tokens(self) -> int:  # type: ignore[override]  # it changes with the size
        """The number of compressed tokens, which come first."""
        return math.prod(sizes_of(self.spec.grid, self.compress.size))

    def forward_features(self, image: Tensor) -> Tensor:
        """Both sets of tokens after the last block, normalised: ``(batch, compressed + places, dim)``."""
        (state,) = self.run_blocks(image)
        return torch.cat([self.norm(state.compressed).flatten(1, -2), self.lookup_norm(state.lookup).flatten(1, -2)], 1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Classify the sum of the means of both sets of tokens; ``pre_logits`` stops before the classifier."""
        count = self.num_prefix_tokens
        pooled = self.head_drop(x[:, :count].mean(1) + x[:, count:].mean(1))
        return pooled if pre_logits else self.head(pooled)

    def first_stages(self, last: int) -> list[Stage]:
        """The blocks up to the ``last``, as one stage."""
        whole: Any = self.stages[0]
        return [Stage(nn.Identity(), whole.blocks[: last + 1])]

    def cut(self, out_indices: Sequence[int] | None = None) -> FeatureBackbone:
        """The maps of some blocks, see :class:`LookupFeatures`."""
        return LookupFeatures(self, out_indices)


class LookupFeatures(_Trunk, FeatureBackbone):
    """A LookupViT cut to the lookup tokens of some blocks: a list of ``(batch, channels, *grid)``.

    Args:
        model: gives its parts up to the last of these blocks; keys of the state dict stay the same.
        out_indices: blocks whose maps to return; all by default.
    """

    def __init__(self, model: LookupViT, out_indices: Sequence[int] | None = None) -> None:
        super().__init__(model, out_indices)
        self.positions, self.compress = model.positions, model.compress

    def forward(self, image: Tensor) -> list[Tensor]:
        return self.get_intermediate_layers(image, self.out_indices, reshape=True)


def lookup_vit(
    dim: int = 768,
    depth: int = 12,
    *,
    size: Ints = 7,
    reuse: str = "probs",
    head_dim: int = 64,
    patch_size: Ints = 16,
    image_size: Ints = 224,
    lookup_ratio: float = 0.5,
    mlp_ratio: float = 4.0,
    drop_path: float = 0.0,
    num_classes: int = 1000,
) -> LookupSpec:
    """The table of a LookupViT.

    Args:
        dim, depth: channels and blocks of the host.
        size: compressed tokens per axis, a number or one per axis; it can be changed afterwards.
        reuse: how gathering is turned round, ``"probs"`` or ``"logits"``, see
            :class:`regard.layers.mixers.bidirectional.BidirectionalAttention`.
        head_dim: channels per head.
        patch_size: pixels of a token's side, or of each side ``(frames, rows, columns)`` of a tubelet for videos.
        image_size: pixels of the side of the images, or of each side of the videos, that the table of positions is for.
        lookup_ratio: hidden channels of the MLPs of the lookup tokens over ``dim``, 1 / q in the paper.
        mlp_ratio: hidden channels of the MLPs of the compressed tokens over ``dim``.
        drop_path: stochastic depth of the last block.
        num_classes: outputs of the classifier.

    Raises:
        ValueError: patches that are neither of images nor of videos; another number of axes of images than of patches.
    """
    patch = patch_size if isinstance(patch_size, tuple) else (patch_size, patch_size)
    if len(patch) not in (2, 3):
        raise ValueError(f"patch_size is a number, or one per axis of images (2) or videos (3); got {patch_size}")
    grid = tuple(-(-length // step) for length, step in zip(sizes_of(patch, image_size), patch, strict=True))
    return LookupSpec(
        stages=(StageSpec(dim, dim // head_dim, depth, (BlockSpec(MultiHeadAttention),)),),
        stem=partial(PatchEmbed, patch_size=patch, norm=None),
        block=LookupBlock,
        norm=partial(nn.LayerNorm, eps=1e-6),
        mlp_ratio=mlp_ratio,
        drop_path=drop_path,
        num_classes=num_classes,
        network=LookupViT,
        grid=grid,
        size=size,
        reuse=reuse,
        lookup_ratio=lookup_ratio,
    )


_PAPER = "2407.12753"
_LARGE = partial(lookup_vit, dim=1024, depth=24)
# 32 frames in tubelets of 2 x 16 x 16, as ViViT has them
_VIDEO = partial(lookup_vit, patch_size=(2, 16, 16), image_size=(32, 224, 224), size=(8, 7, 7), num_classes=400)

# multiply-adds are those of the reconstruction
register_models([
    ModelCard("lookupvit_base_patch16_224", partial(lookup_vit), _PAPER, 136_237_288, 11.3),
    ModelCard("lookupvit_large_patch16_224", _LARGE, _PAPER, 480_819_176, 39.4),
    ModelCard("lookupvit_base_tubelet2x16_224.k400", _VIDEO, _PAPER, 138_623_632, 182.4),
    ModelCard("lookupvit_base_tubelet2x16_224.ssv2", partial(_VIDEO, num_classes=174), _PAPER, 138_449_838, 182.4),
    ModelCard("lookupvit_large_tubelet2x16_224.k400", partial(_VIDEO, dim=1024, depth=24), _PAPER, 484_001_168, 597.5),
], tiny={"size": (10, 9)})  # mixers work on the compressed tokens  # fmt: skip
