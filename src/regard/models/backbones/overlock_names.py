"""The names of OverLoCK's released checkpoints, whole and with merged kernels."""

from __future__ import annotations

from collections.abc import Sequence

from ...layers.conv_norm import DILATED_BRANCHES
from ..checkpoints import Layout, Rule


def _conv_rules(theirs: str, ours: str, conv: int = 0) -> tuple[Rule, ...]:
    """A convolution and its norm, which stand one behind the other in a sequence."""
    return (
        Rule(f"{theirs}.{conv}.weight", f"{ours}.conv.weight"),
        Rule(f"{theirs}.{conv + 1}.{{name}}", f"{ours}.norm.{{name}}"),
    )


def _linear_rules(theirs: str, ours: str) -> tuple[Rule, ...]:
    return Rule(f"{theirs}.weight", f"{ours}.weight", "conv1x1"), Rule(f"{theirs}.bias", f"{ours}.bias")


def _affine_rules(theirs: str, ours: str) -> tuple[Rule, ...]:
    return Rule(f"{theirs}.weight", f"{ours}.weight", "depthwise1x1"), Rule(f"{theirs}.bias", f"{ours}.bias")


def _gate_rules(theirs: str, ours: str) -> tuple[Rule, ...]:
    return (
        *_linear_rules(f"{theirs}.proj.1", f"{ours}.op.fc1"),
        *_linear_rules(f"{theirs}.proj.3", f"{ours}.op.fc2"),
    )


def _mlp_rules(theirs: str, ours: str, first: int = 0) -> tuple[Rule, ...]:
    return (
        *_linear_rules(f"{theirs}.{first}", f"{ours}.fc1"),
        Rule(f"{theirs}.{first + 2}.{{name}}", f"{ours}.position.conv.{{name}}"),
        Rule(f"{theirs}.{first + 3}.{{name}}", f"{ours}.response.{{name}}", "channel_map"),
        *_linear_rules(f"{theirs}.{first + 4}", f"{ours}.fc2"),
    )


def _kernel_rules(theirs: str, ours: str, kernel_size: int, merged: bool) -> tuple[Rule, ...]:
    if merged:
        return (Rule(f"{theirs}.lk_origin.{{name}}", f"{ours}.{{name}}"),)
    return (
        Rule(f"{theirs}.lk_origin.weight", f"{ours}.large.conv.weight"),
        Rule(f"{theirs}.origin_bn.{{name}}", f"{ours}.large.norm.{{name}}"),
        *(
            rule
            for n, (size, dilation) in enumerate(DILATED_BRANCHES[kernel_size])
            for rule in (
                Rule(f"{theirs}.dil_conv_k{size}_{dilation}.weight", f"{ours}.dilated.{n}.conv.weight"),
                Rule(f"{theirs}.dil_bn_k{size}_{dilation}.{{name}}", f"{ours}.dilated.{n}.norm.{{name}}"),
            )
        ),
    )


def _block_rules(theirs: str, ours: str, kernel_size: int, merged: bool) -> tuple[Rule, ...]:
    return (
        Rule(f"{theirs}.dwconv.{{name}}", f"{ours}.position.conv.{{name}}"),
        Rule(f"{theirs}.proj.0.{{name}}", f"{ours}.norm.{{name}}"),
        *_kernel_rules(f"{theirs}.proj.1", f"{ours}.large.op.kernel", kernel_size, merged),
        Rule(f"{theirs}.proj.2.{{name}}", f"{ours}.large.op.norm.{{name}}"),
        *_gate_rules(f"{theirs}.proj.3", f"{ours}.gate"),
        *_mlp_rules(f"{theirs}.proj", f"{ours}.mlp", 4),
        *_affine_rules(f"{theirs}.ls", f"{ours}.scale"),
    )


def _dynamic_rules(theirs: str, ours: str, kernel_size: int, merged: bool) -> tuple[Rule, ...]:
    return (
        *_affine_rules(f"{theirs}.x_scale", f"{ours}.hidden_scale"),
        *_affine_rules(f"{theirs}.h_scale", f"{ours}.context_scale"),
        Rule(f"{theirs}.dwconv{{i}}.{{name}}", f"{ours}.position{{i}}.conv.{{name}}"),
        Rule(f"{theirs}.norm{{i}}.{{name}}", f"{ours}.norm{{i}}.{{name}}"),
        Rule(f"{theirs}.fusion.0.{{name}}", f"{ours}.fuse_conv.{{name}}"),
        Rule(f"{theirs}.fusion.1.{{name}}", f"{ours}.fuse_norm.{{name}}"),
        *_linear_rules(f"{theirs}.fusion.3", f"{ours}.fuse_proj"),
        Rule(f"{theirs}.fusion.4.{{name}}", f"{ours}.response.{{name}}", "channel_map"),
        *_conv_rules(f"{theirs}.weight_query", f"{ours}.mixer.query"),
        *_conv_rules(f"{theirs}.weight_key", f"{ours}.mixer.key", 1),
        *_linear_rules(f"{theirs}.weight_proj", f"{ours}.mixer.taps"),
        Rule(f"{theirs}.rpb1", f"{ours}.mixer.bias_small.table"),
        Rule(f"{theirs}.rpb2", f"{ours}.mixer.bias_large.table"),
        *_conv_rules(f"{theirs}.dyconv_proj", f"{ours}.mixer_proj.op"),
        *_kernel_rules(f"{theirs}.lepe.0", f"{ours}.large.op.kernel", kernel_size, merged),
        Rule(f"{theirs}.lepe.1.{{name}}", f"{ours}.large.op.norm.{{name}}"),
        *_gate_rules(f"{theirs}.se_layer", f"{ours}.squeeze"),
        *_conv_rules(f"{theirs}.gate", f"{ours}.gate.op"),
        Rule(f"{theirs}.proj.0.{{name}}", f"{ours}.proj_norm.{{name}}"),
        *_linear_rules(f"{theirs}.proj.1", f"{ours}.proj"),
        *_mlp_rules(f"{theirs}.mlp", f"{ours}.mlp"),
        *_affine_rules(f"{theirs}.ls{{i}}", f"{ours}.scale{{i}}"),
    )


def overlock_layout(kernel_sizes: Sequence[int], merged: bool) -> Layout:
    blocks = (
        _block_rules(f"blocks{n + 1}.{{j}}", f"stages.{n}.blocks.{{j}}", size, merged) for n, size in enumerate(kernel_sizes)
    )
    dynamic = (
        _dynamic_rules(f"sub_blocks{n + 3}.{{j}}", f"focus.stages.{n}.blocks.{{j}}", size, merged)
        for n, size in enumerate(kernel_sizes[-2:])
    )
    rules = (
        *(rule for n in range(4) for rule in _conv_rules("patch_embed1", f"stem.convs.{n}", 3 * n)),
        *(rule for n in (1, 2, 3) for rule in _conv_rules(f"patch_embed{n + 1}", f"stages.{n}.downsample.op")),
        *(rule for each in blocks for rule in each),
        *_linear_rules("high_level_proj", "focus.context"),
        *_conv_rules("patch_embedx.x_proj", "focus.stages.1.downsample.0.op"),
        *_conv_rules("patch_embedx.h_proj", "focus.stages.1.downsample.1.op"),
        *(rule for each in dynamic for rule in each),
        *_conv_rules("head", "norm.op"),
        *_linear_rules("head.4", "head"),
        Rule("aux_head.0.{name}", "aux_head.norm.{name}"),
        *_linear_rules("aux_head.2", "aux_head.linear"),
    )
    return Layout("official", rules)
