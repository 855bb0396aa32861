"""What the contracts over mixers, backbones and systems have in common: random weights, adapters, hooks, gradients."""

from __future__ import annotations

from collections.abc import Iterator
from zlib import crc32

import torch
from torch import Tensor, nn

LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""What adapters take the place of, and hooks listen to."""


def randomise(model: nn.Module) -> nn.Module:
    """Give parameters and statistics numbers that their names decide: branches and gains that start at zero hide faults."""
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(crc32(key.encode())))
            value.copy_(1 + 0.2 * noise.abs() if value.ndim == 1 else noise * value[0].numel() ** -0.5)
    return model


def without_gradient(model: nn.Module) -> dict[str, str]:
    """The parameters whose gradient is missing, zero or not finite, and which of these."""
    faults = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            faults[name] = "missing"
        elif not parameter.grad.isfinite().all():
            faults[name] = "not finite"
        elif not parameter.grad.any():
            faults[name] = "zero"
    return faults


class Adapter(nn.Module):
    """What low-rank adaptation puts in the place of a linear layer or a convolution; its weight can be read, as there."""

    def __init__(self, base: nn.Module, like: Tensor) -> None:
        super().__init__()
        self.base = base
        self.shift = nn.Parameter(torch.full((), 0.1, dtype=like.dtype))
        self.scale = nn.Parameter(torch.ones((), dtype=like.dtype))

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return self.scale * y + self.shift * y.cos()


def adaptable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in list(model.named_modules()):
        if isinstance(module, LINEAR):
            yield name, module


def adapt(model: nn.Module) -> dict[str, Adapter]:
    """Freeze a model and put an adapter in the place of each linear layer and convolution."""
    model.requires_grad_(False)
    placed = {}
    for name, module in adaptable(model):
        parent, _, last = name.rpartition(".")
        placed[name] = Adapter(module, module.weight)
        setattr(model.get_submodule(parent), last, placed[name])
    return placed


def heard(model: nn.Module, run) -> dict[str, bool]:
    """For each linear layer and convolution, whether a hook that changes what it gives changes the output of ``run``."""
    plain, changed = run(), {}
    for name, module in adaptable(model):
        handle = module.register_forward_hook(_changed)
        try:
            changed[name] = bool((run() - plain).abs().max() > 1e-9 * plain.abs().max())
        finally:
            handle.remove()
    return changed


def _changed(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    """Other numbers, and not in proportion: norms and softmax would undo a factor or a shift."""
    wave = torch.linspace(0, 1 + 0.7 * output.numel(), output.numel(), dtype=output.dtype).reshape(output.shape).sin()
    return output * wave + wave
