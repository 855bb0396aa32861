"""Tables of backbones: what stands in each stage, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import cycle
from typing import TYPE_CHECKING, Any

from torch import nn

from ..checks import shown
from ..layers.mlps import MLP
from ..layers.stems import Norm, PatchEmbed, PatchMerging
from ..ops.patterns import Pattern
from .checkpoints import Layout

if TYPE_CHECKING:
    from .backbone import Backbone


MixerChoice = str | tuple[str, Mapping[str, Any]] | list["str | tuple[str, Mapping[str, Any]]"]


@dataclass(frozen=True)
class BlockSpec:
    """The token mixer of one block, and what stands before it.

    Args:
        mixer: a registered name or a constructor; None for a block without one.
        options: of the mixer, besides ``dim`` and ``heads``.
        before: a module on tokens at the start of the block, called with ``(dim_in, dim, stride, drop_path=...)``; where the
            table has no ``downsample``, that of a stage's first block changes width and resolution.
    """

    mixer: str | Callable[..., nn.Module] | None
    options: Mapping[str, Any] = field(default_factory=dict)
    before: Callable[..., nn.Module] | None = None


@dataclass(frozen=True)
class StageSpec:
    """``depth`` blocks at one resolution; their mixers repeat ``period``, so that alternation is data.

    ``mlp_ratio`` is the backbone's where it is None.
    """

    dim: int
    heads: int
    depth: int
    period: tuple[BlockSpec, ...]
    mlp_ratio: float | None = None


@dataclass(frozen=True)
class BackboneSpec:
    """A hierarchical backbone as a table.

    Args:
        stages: from fine to coarse.
        stem: called with ``(in_chans, dim)``; its ``reduction`` is the number of pixels per token.
        stem_dim: channels of the stem; those of the first stage by default.
        first_stride: by how much the first stage reduces the sides of the stem's grid.
        downsample: at the start of a stage that is coarser than what it gets, called with ``(dim, next_dim)``; halves both
            sides. None where the first block of the stage does it.
        block: makes a block, called as :class:`Block` is; that by default.
        norm: of the blocks, called with ``dim``.
        final_norm: after the last stage; ``norm`` by default.
        stage_norm: after each stage but the last; None for none.
        mlp: of the blocks, called with ``(dim, hidden)``.
        mlp_ratio: hidden channels of the MLPs over ``dim``.
        position_kernel: size of the depthwise convolution that encodes positions at the start of each block; 0 for none.
        mlp_position_kernel: likewise before the MLP.
        layer_scale: initial scale of the residual branches; None for none.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
        unit: how many consecutive blocks share a rate of stochastic depth.
        num_features: channels after ``final_norm`` where it changes them.
        pool_first: whether tokens are pooled before ``final_norm``.
        pre_logits: channels of a linear layer with tanh between pooling and classifier; 0 for none.
        head: the classifier, called with the width of the pooled features and ``num_classes``.
        num_classes: outputs of the classifier.
        layouts: the names of published checkpoints.
        pad: how grids that do not divide are padded, where the caller chose that; None leaves it to the checkpoint.
        fixed: why the token mixers cannot be swapped; empty where they can.
        network: the module that :func:`regard.create_model` builds from the table; :class:`Backbone` by default.
    """

    stages: tuple[StageSpec, ...]
    stem: Callable[..., nn.Module] = PatchEmbed
    stem_dim: int | None = None
    first_stride: int = 1
    downsample: Callable[..., nn.Module] | None = PatchMerging
    block: Callable[..., nn.Module] | None = None
    norm: Norm = nn.LayerNorm
    final_norm: Norm | None = None
    stage_norm: Norm | None = None
    mlp: Callable[..., nn.Module] = MLP
    mlp_ratio: float = 4.0
    position_kernel: int = 0
    mlp_position_kernel: int = 0
    layer_scale: float | None = None
    drop_path: float = 0.0
    unit: int = 1
    num_features: int | None = None
    pool_first: bool = False
    pre_logits: int = 0
    head: Callable[..., nn.Module] = nn.Linear
    num_classes: int = 1000
    layouts: tuple[Layout, ...] = ()
    pad: str | None = None
    fixed: str = ""
    network: Callable[..., Backbone] | None = None

    def with_mixer(self, mixer: MixerChoice) -> BackboneSpec:
        """The same table with another token mixer in every block that has one, and without the names of checkpoints.

        Args:
            mixer: a registered name, or a name and options, ``("window", {"window_size": 4})``; a list of these is a period
                that the blocks of each stage repeat.

        Raises:
            ValueError: anything else, or a table whose mixers are ``fixed``.
        """
        if self.fixed:
            given = repr(mixer) if isinstance(mixer, str) else shown(mixer)
            raise ValueError(f"{self.fixed}: it takes no other mixer; got {given}")
        choices = mixer if isinstance(mixer, list) else [mixer]
        period = tuple(_block_spec(choice) for choice in choices)
        if not period:
            raise ValueError("mixer must name at least one mixer; got an empty list")

        def swapped(stage: StageSpec) -> StageSpec:
            lines = [stage.period[i % len(stage.period)] for i in range(stage.depth)]
            blocks = tuple(
                line if line.mixer is None else replace(line, mixer=choice.mixer, options=choice.options)
                for line, choice in zip(lines, cycle(period), strict=False)
            )
            return replace(stage, period=blocks)

        return replace(self, stages=tuple(map(swapped, self.stages)), layouts=())


def _block_spec(choice: object) -> BlockSpec:
    if isinstance(choice, str):
        return BlockSpec(choice)
    if isinstance(choice, tuple) and len(choice) == 2 and isinstance(choice[0], str) and isinstance(choice[1], Mapping):
        taken = {"dim", "heads"} & choice[1].keys()
        if taken:
            raise ValueError(f"dim and heads are the model's; mixer {choice[0]!r} was given {', '.join(sorted(taken))}")
        return BlockSpec(choice[0], dict(choice[1]))
    if isinstance(choice, type) and issubclass(choice, nn.Module):
        hint = ": register_mixer of regard.layers.mixers gives a class a name"
    elif isinstance(choice, Pattern):
        hint = ": subclass PatternMixer of regard.layers.mixers and give it a name by register_mixer"
    else:
        hint = ""
    raise ValueError(f"mixer must be a name, (name, options) or a list of these; got {shown(choice)}{hint}")
