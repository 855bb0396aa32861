"""Pieces of backbones written out plainly on dictionaries of tensors with the official names, for the tests of systems."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.bench import count
from regard.models import create_model, export_state_dict

Weights = Mapping[str, Tensor]


def randomise(model: nn.Module) -> nn.Module:
    """Give every parameter and statistic a value that matters: no zero biases, no unit scales, no tiny gammas."""
    generator = torch.Generator().manual_seed(1)
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
        if name.endswith("running_var"):
            value.copy_(1 + noise.abs())
        elif value.ndim == 1:
            value.copy_(0.5 + 0.3 * noise)
        else:
            value.copy_(noise * (1.5 / value[0].numel() ** 0.5 if value.ndim != 3 else 1.0))
    return model.eval()


def tiny(name: str, **options) -> tuple[nn.Module, Weights]:
    """A narrow float64 version of a published model with random weights, and these under the official names."""
    model = randomise(create_model(name, num_classes=5, dtype=torch.float64, **options))
    return model, export_state_dict(model, "official")


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def layer_norm(x: Tensor, weights: Weights, name: str, eps: float = 1e-5) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def batch_norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    scaled = (x - weights[f"{name}.running_mean"]) / (weights[f"{name}.running_var"] + 1e-5).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def mlp(x: Tensor, weights: Weights, first: str, second: str) -> Tensor:
    return linear(F.gelu(linear(x, weights, first)), weights, second)


def conv(x: Tensor, weights: Weights, name: str, stride: int = 1, groups: int = 1) -> Tensor:
    """A convolution of tokens (batch, rows, columns, channels) with padding of half a kernel."""
    kernel = weights[f"{name}.weight"]
    padding = (kernel.shape[-1] - 1) // 2
    bias = weights.get(f"{name}.bias")
    return F.conv2d(x.permute(0, 3, 1, 2), kernel, bias, stride, padding, 1, groups).permute(0, 2, 3, 1)


def patches(image: Tensor, weights: Weights, name: str, size: int) -> Tensor:
    """Non-overlapping patches, projected one by one."""
    image = F.pad(image, [0, -image.shape[-1] % size, 0, -image.shape[-2] % size])
    rows, columns = image.shape[-2] // size, image.shape[-1] // size
    kernel = weights[f"{name}.weight"].flatten(1)
    tokens = image.new_empty(image.shape[0], rows, columns, kernel.shape[0])
    for row in range(rows):
        for column in range(columns):
            patch = image[:, :, row * size : (row + 1) * size, column * size : (column + 1) * size]
            tokens[:, row, column] = patch.flatten(1) @ kernel.T + weights[f"{name}.bias"]
    return tokens


def merge_patches(x: Tensor, weights: Weights, name: str) -> Tensor:
    """Squares of 2 x 2 tokens in the order of the official code: down first, then right."""
    x = F.pad(x, [0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2])
    corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
    return linear(layer_norm(torch.cat(corners, -1), weights, f"{name}.norm"), weights, f"{name}.reduction")


def heads_of(x: Tensor, weights: Weights, name: str, heads: int) -> Iterator[Tensor]:
    """Queries, keys and values (batch, heads, tokens, dim) of tokens (batch, rows, columns, channels)."""
    for part in linear(x.flatten(1, 2), weights, name).chunk(3, -1):
        yield part.unflatten(-1, (heads, -1)).transpose(1, 2)


def dense_attention(
    x: Tensor, weights: Weights, name: str, heads: int, visible: Tensor, bias: Callable[[Tensor], Tensor]
) -> Tensor:
    """Attention of all tokens to all where ``visible`` (tokens, tokens); ``bias`` maps the grid's coordinates to logits."""
    q, k, v = heads_of(x, weights, f"{name}.qkv", heads)
    coordinates = torch.cartesian_prod(torch.arange(x.shape[1]), torch.arange(x.shape[2]))
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias(coordinates)
    out = logits.masked_fill(~visible, -torch.inf).softmax(-1) @ v
    return linear(out.transpose(1, 2).flatten(2), weights, f"{name}.proj").unflatten(1, x.shape[1:3])


def multiply_adds(model: nn.Module, size: int) -> float:
    """Multiply-adds of linear layers, convolutions and visible attention pairs for one image, in 10^9."""
    total = 0

    def add(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        each = module.in_features if isinstance(module, nn.Linear) else module.weight[0].numel()
        total += output.numel() * each

    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    hooks = [layer.register_forward_hook(add) for layer in layers]
    with count() as cost, torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size, device=next(model.parameters()).device))
    for hook in hooks:
        hook.remove()
    return (total + cost.flops / 2) / 1e9
