"""The frame of SHViT and EfficientViT written out plainly, with the official names; tokens (batch, rows, columns, channels)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from naive_backbones import Weights, batch_norm, conv
from torch import Tensor


def conv_norm(x: Tensor, weights: Weights, name: str, stride: int = 1, groups: int = 1) -> Tensor:
    return batch_norm(conv(x, weights, f"{name}.c", stride, groups), weights, f"{name}.bn")


def depthwise(x: Tensor, weights: Weights, name: str) -> Tensor:
    return x + conv_norm(x, weights, f"{name}.m", groups=x.shape[-1])


def feed_forward(x: Tensor, weights: Weights, name: str) -> Tensor:
    return x + conv_norm(conv_norm(x, weights, f"{name}.m.pw1").relu(), weights, f"{name}.m.pw2")


def merging(x: Tensor, weights: Weights, name: str) -> Tensor:
    x = conv_norm(x, weights, f"{name}.conv1").relu()
    x = conv_norm(x, weights, f"{name}.conv2", 2, x.shape[-1]).relu()
    gate = x.mean((1, 2), keepdim=True)
    gate = (gate @ weights[f"{name}.se.fc1.weight"][..., 0, 0].T + weights[f"{name}.se.fc1.bias"]).relu()
    gate = gate @ weights[f"{name}.se.fc2.weight"][..., 0, 0].T + weights[f"{name}.se.fc2.bias"]
    return conv_norm(x / (1 + torch.exp(-gate)), weights, f"{name}.conv3")


def classify(x: Tensor, weights: Weights, name: str = "head") -> Tensor:
    pooled = batch_norm(x.mean((1, 2)), weights, f"{name}.bn")
    return pooled @ weights[f"{name}.l.weight"].T + weights[f"{name}.l.bias"]


def naive_tokens(image: Tensor, weights: Weights, depths: Sequence[int], block: Callable[..., Tensor]) -> Tensor:
    """The last tokens; ``block(x, weights, name, stage)`` is the family's."""
    x = image.permute(0, 2, 3, 1)
    for i in range(4):
        x = conv_norm(x, weights, f"patch_embed.{2 * i}", 2)
        x = x.relu() if i < 3 else x
    for stage, depth in enumerate(depths):
        name, first = f"blocks{stage + 1}", 0
        if stage:
            x = feed_forward(depthwise(x, weights, f"{name}.0.0"), weights, f"{name}.0.1")
            x = merging(x, weights, f"{name}.1")
            x = feed_forward(depthwise(x, weights, f"{name}.2.0"), weights, f"{name}.2.1")
            first = 3
        for j in range(depth):
            x = block(x, weights, f"{name}.{first + j}", stage)
    return x
