"""The plain vision transformer written out on dictionaries of tensors with the official names, for the tests of systems."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from naive_backbones import Weights, linear, mlp
from torch import Tensor, nn

from regard.models import create_model, export_state_dict


def small(name: str, **options) -> tuple[nn.Module, Weights]:
    """A narrow float64 version of a published transformer with weights that matter, and these under the official names."""
    narrow = {"dim": 16, "depth": 4, "head_dim": 8, "num_classes": 5}
    model = create_model(name, dtype=torch.float64, **narrow | options).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model, export_state_dict(model, "official")


def norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)


def embed(image: Tensor, weights: Weights) -> Tensor:
    """Class tokens and patches with their positions: ``(batch, prefix + n, dim)``; the grid is the table's own."""
    x = F.conv2d(image, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=16)
    x = x.flatten(2).transpose(1, 2)
    outer = [weights[name].expand(len(x), -1, -1) for name in ("cls_token", "dist_token") if name in weights]
    return torch.cat([*outer, x], 1) + weights["pos_embed"]


def split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attention_map(x: Tensor, weights: Weights, name: str, heads: int) -> tuple[Tensor, Tensor]:
    """Attention weights ``(batch, heads, tokens, tokens)`` and values ``(batch, heads, tokens, width)``."""
    q, k, v = (split(part, heads) for part in linear(x, weights, f"{name}.qkv").chunk(3, -1))
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1), v


def project(maps: Tensor, v: Tensor, weights: Weights, name: str) -> Tensor:
    return linear((maps @ v).transpose(1, 2).flatten(2), weights, f"{name}.proj")


def feed_forward(x: Tensor, weights: Weights, block: str) -> Tensor:
    return x + mlp(norm(x, weights, f"{block}.norm2"), weights, f"{block}.mlp.fc1", f"{block}.mlp.fc2")
