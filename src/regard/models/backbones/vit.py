"""Vision Transformer: patches of one size and class tokens, at one resolution from the first block to the last.

    x = [class tokens, patches] + positions;  x + attention(LN(x)),  x + MLP(LN(x));  the class token is classified
Cost: quadratic in tokens. Source: Dosovitskiy et al., ViT, arXiv:2010.11929; Touvron et al., DeiT, arXiv:2012.12877.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...layers.blocks import Residual
from ...layers.mixers import MultiHeadAttention, mixer_class
from ...layers.positions import resize_offset_table
from ...layers.reduce import TokenMap, TokenReducer
from ...layers.stems import PatchEmbed
from ...ops.tracing import count_steps
from ..backbone import Backbone, Block, FeatureBackbone, Stage, Staged, stage_indices
from ..checkpoints import Layout, Rule, block_rules
from ..features import FeatureInfo
from ..registry import ModelCard, register_models
from ..spec import BackboneSpec, BlockSpec, MixerChoice, StageSpec

# --------------------------------------------------------------------------------------------------------------------
# tables


@dataclass(frozen=True)
class TokenBlockSpec(BlockSpec):
    """A block with a token reducer between attention and MLP.

    Args:
        reducer: called with ``prefix``, the number of tokens outside the grid. The mixer then has ``forward_scored``, which
            returns, besides the tokens of the grid and those outside it, a score ``(batch, n)`` for each of the former.
    """

    reducer: Callable[..., TokenReducer] | None = None


@dataclass(frozen=True)
class TransformerSpec(BackboneSpec):
    """A table of one stage, with tokens outside the grid.

    Args:
        grid: rows and columns of the table of positions; it is resized to any other.
        prefix: names of the class tokens, each of which is classified; ``cls_token`` and ``dist_token``.
        registers: further tokens outside the grid, without positions, that nothing is read from.
        enter: the block before which the tokens outside the grid enter; only those that enter at 0 have positions.
    """

    grid: tuple[int, int] = (14, 14)
    prefix: tuple[str, ...] = ("cls_token",)
    registers: int = 0
    enter: int = 0

    def with_mixer(self, mixer: MixerChoice) -> BackboneSpec:
        """The same table with another token mixer in every block, see :meth:`BackboneSpec.with_mixer`.

        Raises:
            ValueError: no block is left in which the class tokens see the grid.
        """
        spec = super().with_mixer(mixer)
        names = [line.mixer for line in spec.stages[0].period[self.enter :] if isinstance(line.mixer, str)]
        if self.prefix and not any(getattr(mixer_class(name), "joins_extra", True) for name in names):
            raise ValueError(
                f"class tokens are classified, and the mixer leaves tokens outside the grid alone: they would never see the "
                f"image. Give a list with another mixer, such as [{names[-1]!r}, 'multi_head']; got {mixer!r}"
            )
        return spec


# --------------------------------------------------------------------------------------------------------------------
# modules


class TokenState(NamedTuple):
    """What goes from block to block."""

    x: Tensor
    """``(batch, prefix + n, dim)``: the tokens outside the grid, then the others."""
    prefix: int
    grid: tuple[int, ...]
    """Of the n tokens: rows and columns, or one number once tokens were reduced."""
    tokens: TokenMap | None = None
    """Which token stands for each place of the grid, once tokens were reduced."""
    messages: Tensor | None = None
    """``(batch, n)``: what blocks of reversed attention hand on beside the tokens."""

    def places(self) -> Tensor:
        """The features of every place of the original grid, ``(batch, places, dim)``."""
        return self.x[:, self.prefix :] if self.tokens is None else self.tokens.restore(self.x, self.prefix)


class TokenBlock(Block):
    """Mixer and MLP on tokens of a grid and outside it, with a reducer between them where the table has one."""

    mixer: Any
    mlp: Residual

    def __init__(
        self,
        spec: TransformerSpec,
        stage: StageSpec,
        block: BlockSpec,
        drop_path: float,
        *,
        dim_in: int,
        stride: int,
        **factory,
    ) -> None:
        super().__init__(spec, stage, block, drop_path, **factory)
        make = block.reducer if isinstance(block, TokenBlockSpec) else None
        self.reducer = None if make is None else make(prefix=len(spec.prefix) + spec.registers)

    def forward(self, state: TokenState) -> TokenState:
        x, prefix, grid, tokens, messages = state
        added, scores = self.attention(state)
        x = x + added
        if scores is not None:
            assert self.reducer is not None  # it asked for them
            known = TokenMap.full(x.shape[0], x.shape[1] - prefix, x.device) if tokens is None else tokens
            reduced, known = self.reducer(x, scores, known)
            if reduced is not x:
                x, grid, tokens = reduced, (reduced.shape[1] - prefix,), known
        return TokenState(self.mlp(x), prefix, grid, tokens, messages)

    def attention(self, state: TokenState) -> tuple[Tensor, Tensor | None]:
        """What attention adds to the tokens ``(batch, prefix + n, dim)``, and the scores of a reducer that is at work."""
        mixer, prefix, scores = self.mixer, state.prefix, None
        normed = mixer.norm(state.x)
        inner, outer = normed[:, prefix:].unflatten(1, state.grid), normed[:, :prefix]
        if self.reducer is not None and self.reducer.rate != 1.0:
            y, y_outer, scores = mixer.op.forward_scored(inner, outer)
        else:
            y, y_outer = mixer.op(inner, outer) if prefix else (mixer.op(inner), outer)
        return mixer.drop_path(mixer.scale(torch.cat([y_outer, y.flatten(1, -2)], 1))), scores


class SequencePositions(nn.Module):
    """A learned vector for every token of a sequence: first those outside the grid, then the places of the grid.

    On another grid than the table's own its places are resized bicubically, as fine-tuning at another resolution does.
    """

    def __init__(self, dim: int, grid: tuple[int, int], prefix: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.grid, self.prefix = grid, prefix
        self.table = nn.Parameter(torch.empty(1, prefix + grid[0] * grid[1], dim, device=device, dtype=dtype))
        nn.init.trunc_normal_(self.table, std=0.02)

    def places(self, grid: Sequence[int]) -> Tensor:
        """The vectors of the places of a grid, ``(1, places, dim)``."""
        table = self.table[:, self.prefix :]
        if tuple(grid) == self.grid:
            return table
        return self._resized(table, self.grid, grid)

    def adapted(self, name: str, table: Tensor) -> Tensor:
        """A checkpoint's table of a square grid, resized to this one's.

        Raises:
            ValueError: a table of other channels, or whose places are no square.
        """
        places = table.shape[1] - self.prefix if table.ndim == 3 else 0
        side = math.isqrt(max(places, 0))
        if side < 1 or side * side != places or table.shape[0] != 1 or table.shape[2] != self.table.shape[2]:
            raise ValueError(f"expected (1, {self.prefix} + side squared, {self.table.shape[2]}), the table of a square grid")
        maps = self._resized(table[:, self.prefix :], (side, side), self.grid)
        return torch.cat([table[:, : self.prefix], maps], 1)

    @staticmethod
    def _resized(table: Tensor, grid: Sequence[int], to: Sequence[int]) -> Tensor:
        """``(1, places, dim)`` of one grid for another."""
        return resize_offset_table(table[0].T.unflatten(1, grid), to).flatten(1).T[None]


_HEAD_KEYS = frozenset({"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"})


class _Trunk(Staged):
    """What whole and cut vision transformers share: from images to the tokens after each block."""

    spec: TransformerSpec
    positions: SequencePositions
    norm: nn.Module
    outer_names: tuple[str, ...]

    @property
    def blocks(self) -> Sequence[TokenBlock]:
        """The blocks, from first to last."""
        return list(cast(Any, self.stages[0]).blocks)

    def outer_tokens(self, batch: int) -> Tensor:
        """Class tokens, with their positions where they have any, and registers: ``(batch, prefix, dim)``."""
        outer = torch.cat([self.get_parameter(name) for name in self.outer_names], 1)
        placed = self.positions.prefix
        if placed:
            outer = torch.cat([outer[:, :placed] + self.positions.table[:, :placed], outer[:, placed:]], 1)
        return outer.expand(batch, -1, -1)

    def first_tokens(self, image: Tensor) -> TokenState:
        """The tokens of the grid with their positions, before any others enter."""
        self.check_image(image)
        x = self.stem(image)
        grid = tuple(x.shape[1:-1])
        return TokenState(x.flatten(1, -2) + self.positions.places(grid), 0, grid)

    def enter_tokens(self, state: TokenState) -> TokenState:
        """The state with the tokens outside the grid, where there are any."""
        if not self.outer_names:
            return state
        outer = self.outer_tokens(state.x.shape[0])
        return state._replace(x=torch.cat([outer, state.x], 1), prefix=outer.shape[1])

    def run_blocks(self, image: Tensor, wanted: Sequence[int] = (-1,)) -> list[TokenState]:
        """The state after each of the ``wanted`` blocks, which are in ascending order."""
        state = self.first_tokens(image)
        indices = stage_indices(wanted, len(self.blocks))
        states = []
        recompute = self.stages[0].grad_checkpointing and self.training
        for index, block in enumerate(self.blocks[: indices[-1] + 1]):
            state = self.enter_tokens(state) if index == self.spec.enter else state
            state = checkpoint(block, state, use_reentrant=False) if recompute else block(state)
            if index in indices:
                states.append(state)
        return states

    def get_intermediate_layers(
        self, image: Tensor, n: int | Sequence[int] = 1, *, reshape: bool = False, norm: bool = False
    ) -> list[Tensor]:
        """Tokens of the grid after the last ``n`` blocks, or after the listed ones, without those outside the grid.

        Where tokens were reduced, each place shows the token that stands for it, and 0 where none does.

        Args:
            image: ``(batch, in_chans, height, width)``.
            n: how many blocks, or their indices.
            reshape: return maps ``(batch, dim, rows, columns)`` instead of sequences ``(batch, rows * columns, dim)``.
            norm: apply the final norm.
        """
        indices = stage_indices(range(-n, 0) if isinstance(n, int) else n, len(self.blocks))
        states = self.run_blocks(image, indices)
        if norm:
            states = [state._replace(x=self.norm(state.x)) for state in states]
        grid = tuple(count_steps(side, self.feature_info[0]["reduction"]) for side in image.shape[-2:])
        return [s.places().transpose(1, 2).unflatten(2, grid) if reshape else s.places() for s in states]

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone besides norms and biases: tables and tokens."""
        return super().no_weight_decay() | {"positions.table", *self.outer_names}


class VisionTransformer(_Trunk, Backbone):
    """The network that a :class:`TransformerSpec` describes, with the outside of a :class:`Backbone`.

    Its feature maps are those after each block. ``forward_features`` returns the normalised tokens after the last block,
    ``(batch, prefix + n, dim)``.

    Args:
        spec, **options: see :class:`Backbone`.

    Attributes:
        num_prefix_tokens: tokens besides the grid: class tokens and registers.
    """

    def __init__(self, spec: TransformerSpec, *, device=None, dtype=None, **options) -> None:
        super().__init__(spec, device=device, dtype=dtype, **options)
        factory = {"device": device, "dtype": dtype}
        stage = spec.stages[0]
        if not 0 <= spec.enter < stage.depth:
            raise ValueError(f"tokens enter before one of {stage.depth} blocks, 0 to {stage.depth - 1}; got {spec.enter}")
        self.num_prefix_tokens = len(spec.prefix) + spec.registers
        self.outer_names = (*spec.prefix, *(["reg_token"] if spec.registers else []))
        for name in self.outer_names:
            count = spec.registers if name == "reg_token" else 1
            token = nn.Parameter(torch.empty(1, count, stage.dim, **factory))
            nn.init.trunc_normal_(token, std=0.02)
            self.register_parameter(name, token)
        self.positions = SequencePositions(stage.dim, spec.grid, 0 if spec.enter else len(spec.prefix), **factory)
        reduction = self.feature_info[0]["reduction"]
        self.feature_info = FeatureInfo(
            {"num_chs": stage.dim, "reduction": reduction, "module": f"stages.0.blocks.{i}"} for i in range(stage.depth)
        )

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifiers, one for each class token, by new ones; 0 removes them."""
        super().reset_classifier(num_classes)
        head = self.head
        if len(self.spec.prefix) > 1:
            super().reset_classifier(num_classes)
            self.head_dist, self.head = self.head, head
            if not num_classes:
                self.unused_keys |= {"head_dist.weight", "head_dist.bias"}

    def forward_features(self, image: Tensor) -> Tensor:
        """The normalised tokens after the last block, ``(batch, prefix + n, dim)``."""
        return self.norm(self.run_blocks(image)[-1].x)

    def forward_heads(self, x: Tensor) -> list[Tensor]:
        """The logits of each class token of :meth:`forward_features` apart, as distillation needs them."""
        heads = [self.head, self.head_dist] if len(self.spec.prefix) > 1 else [self.head]
        return [head(self.head_drop(x[:, i])) for i, head in enumerate(heads)]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Classify the class tokens, averaged over them; ``pre_logits`` averages the tokens themselves."""
        if pre_logits:
            return self.head_drop(x[:, : len(self.spec.prefix)].mean(1))
        logits = self.forward_heads(x)
        return sum(logits[1:], logits[0]) / len(logits)

    def first_stages(self, last: int) -> list[Stage]:
        """The blocks up to the ``last``, as one stage."""
        return [Stage(nn.Identity(), self.blocks[: last + 1])]

    def cut(self, out_indices: Sequence[int] | None = None) -> FeatureBackbone:
        """The maps of some blocks, see :class:`TransformerFeatures`."""
        return TransformerFeatures(self, out_indices)


class TransformerFeatures(_Trunk, FeatureBackbone):
    """A vision transformer cut to the feature maps of some blocks: a list of ``(batch, channels, rows, columns)``.

    Args:
        model: gives its parts up to the last of these blocks; keys of the state dict stay the same.
        out_indices: blocks whose maps to return; all by default.
    """

    def __init__(self, model: VisionTransformer, out_indices: Sequence[int] | None = None) -> None:
        super().__init__(model, out_indices)
        self.positions = model.positions
        self.outer_names = model.outer_names if self.out_indices[-1] >= model.spec.enter else ()
        for name in self.outer_names:
            self.register_parameter(name, model.get_parameter(name))
        self.unused_keys |= _HEAD_KEYS

    def forward(self, image: Tensor) -> list[Tensor]:
        return self.get_intermediate_layers(image, self.out_indices, reshape=True)


# --------------------------------------------------------------------------------------------------------------------
# published models


OUTSIDE = (
    Rule("patch_embed.{name}", "stem.{name}"),
    Rule("pos_embed", "positions.table"),
    *[Rule(name, name) for name in ("cls_token", "dist_token", "reg_token")],
    Rule("norm.{name}", "norm.{name}"),
    Rule("head.{name}", "head.{name}"),
    Rule("head_dist.{name}", "head_dist.{name}"),
)
RULES = (*block_rules("blocks.{j}", "stages.0.blocks.{j}"), *OUTSIDE)
LAYOUTS = (Layout("official", RULES), Layout("timm", RULES))


def vit(
    dim: int = 768,
    depth: int = 12,
    *,
    head_dim: int = 64,
    patch_size: int = 16,
    image_size: int = 224,
    distilled: bool = False,
    registers: int = 0,
    mlp_ratio: float = 4.0,
    drop_path: float = 0.0,
    num_classes: int = 1000,
) -> TransformerSpec:
    """The table of a Vision Transformer.

    Args:
        dim, depth: channels and blocks.
        head_dim: channels per head.
        patch_size: pixels of a token's side.
        image_size: pixels of the side of the images that the table of positions is for.
        distilled: whether a second class token learns from a teacher; classification averages both.
        registers: learned tokens without positions that nothing is read from.
        mlp_ratio: hidden channels of the MLPs over ``dim``.
        drop_path: stochastic depth of the last block.
        num_classes: outputs of the classifier.
    """
    side = -(-image_size // patch_size)
    return TransformerSpec(
        stages=(StageSpec(dim, dim // head_dim, depth, (BlockSpec(MultiHeadAttention),)),),
        stem=partial(PatchEmbed, patch_size=patch_size, norm=None),
        block=TokenBlock,
        norm=partial(nn.LayerNorm, eps=1e-6),
        mlp_ratio=mlp_ratio,
        drop_path=drop_path,
        num_classes=num_classes,
        layouts=LAYOUTS,
        network=VisionTransformer,
        grid=(side, side),
        prefix=("cls_token", "dist_token") if distilled else ("cls_token",),
        registers=registers,
    )


def _vit(name: str, dim: int, params: int, gmacs: float, **table) -> ModelCard:
    return ModelCard(f"vit_{name}_patch16_224", partial(vit, dim=dim, **table), "2010.11929", params, gmacs)


def _deit(name: str, dim: int, params: int, gmacs: float, input_size: int = 224, **table) -> ModelCard:
    return ModelCard(
        f"deit_{name}_patch16_{input_size}", partial(vit, dim=dim, image_size=input_size, drop_path=0.1, **table), "2012.12877",
        params, gmacs, input_size,
    )  # fmt: skip


def _dino(name: str, dim: int, patch_size: int, params: int, gmacs: float) -> ModelCard:
    """Self-supervised, without a classifier. Source: Caron et al., DINO, arXiv:2104.14294."""
    table = partial(vit, dim=dim, patch_size=patch_size, num_classes=0)
    return ModelCard(f"dino_{name}{patch_size}", table, "2104.14294", params, gmacs)


register_models([
    _vit("tiny", 192, 5_717_416, 1.3),
    _vit("small", 384, 22_050_664, 4.6),
    _vit("base", 768, 86_567_656, 17.6),
    _vit("large", 1024, 304_326_632, 61.6, depth=24),
    _deit("tiny", 192, 5_717_416, 1.3),
    _deit("small", 384, 22_050_664, 4.6),
    _deit("base", 768, 86_567_656, 17.6),
    _deit("base", 768, 86_859_496, 55.5, 384),
    _deit("tiny_distilled", 192, 5_910_800, 1.3, distilled=True),
    _deit("small_distilled", 384, 22_436_432, 4.6, distilled=True),
    _deit("base_distilled", 768, 87_338_192, 17.7, distilled=True),
    _deit("base_distilled", 768, 87_630_032, 55.6, 384, distilled=True),
    _dino("vits", 384, 16, 21_665_664, 4.6),
    _dino("vits", 384, 8, 21_670_272, 22.4),
    _dino("vitb", 768, 16, 85_798_656, 17.6),
    _dino("vitb", 768, 8, 85_807_872, 78.2),
])  # fmt: skip
