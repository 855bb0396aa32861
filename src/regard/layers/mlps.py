"""Channel mixers: the part of a block that works on each token alone, ``(batch, *grid, dim) -> (batch, *grid, dim)``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..ops.affine import affine
from .conv import convolve_tokens, depthwise
from .linear import is_plain, is_unheard, linear

PIECE = 512
"""Tokens per thread whose hidden channels are in the caches at once."""


class MLP(nn.Module):
    """``fc2(act(fc1(x)))``.

    Args:
        dim: channels.
        hidden: channels between the two layers, ``4 * dim`` by default.
        out: channels of the result, ``dim`` by default.
        act: class of the activation.
        drop: dropout after each layer.
        bias: whether the layers have one.
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        out: int | None = None,
        *,
        act: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        hidden = hidden or 4 * dim
        self.fc1 = nn.Linear(dim, hidden, bias=bias, device=device, dtype=dtype)
        self.act = act()
        self.fc2 = nn.Linear(hidden, out or dim, bias=bias, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop)

    def hidden(self, x: Tensor) -> Tensor:
        """The activated hidden tokens."""
        return self.act(linear(self.fc1, x))

    def forward(self, x: Tensor) -> Tensor:
        if self._in_pieces(x):
            return self._forward_in_pieces(x)
        return self.drop(linear(self.fc2, self.drop(self.hidden(x))))

    def _in_pieces(self, x: Tensor) -> bool:
        """Whether a few tokens at a time give the same and are faster: at inference on a CPU, nobody listening inside."""
        return (
            not torch.compiler.is_compiling()
            and not torch.is_grad_enabled()
            and x.device.type == "cpu"
            and not (self.training and self.drop.p)
            and type(self).hidden is MLP.hidden
            and type(self.act) is nn.GELU
            and self.act.approximate == "none"
            and is_plain(self.fc1)
            and is_plain(self.fc2)
            and is_unheard(self.act)
            and is_unheard(self.drop)
        )

    def _forward_in_pieces(self, x: Tensor) -> Tensor:
        """GELU with the first layer, and the hidden tokens never leave the caches."""
        rows = x.reshape(-1, x.shape[-1])
        out = rows.new_empty(len(rows), self.fc2.out_features)
        step = PIECE * torch.get_num_threads()
        for first in range(0, len(rows), step):
            hidden = affine(rows[first : first + step], self.fc1.weight, self.fc1.bias, gelu=True)
            out[first : first + step] = linear(self.fc2, hidden)
        return out.unflatten(0, x.shape[:-1])


class ConvMLP(MLP):
    """An MLP with a depthwise convolution of the hidden tokens, ``fc2(act(conv(fc1(x))))``.

    Args:
        dim, hidden, out, **options: see :class:`MLP`.
        kernel_size: of the convolution.
        rank: number of grid axes, 1 to 3.

    Source: Wang et al., PVT v2, arXiv:2106.13797.
    """

    def __init__(
        self, dim: int, hidden: int | None = None, out: int | None = None, *, kernel_size: int = 3, rank: int = 2, **options
    ) -> None:
        super().__init__(dim, hidden, out, **options)
        like = self.fc1.weight
        self.conv = depthwise(self.fc1.out_features, kernel_size, rank, device=like.device, dtype=like.dtype)

    def hidden(self, x: Tensor) -> Tensor:
        return self.act(convolve_tokens(self.conv, linear(self.fc1, x)))


class GLU(MLP):
    """A gated linear unit, ``fc2(act(gate) * value)`` with ``gate, value = fc1(x)``.

    Args:
        dim, hidden, out, **options: see :class:`MLP`; ``hidden`` counts the channels after gating, ``fc1`` makes twice as many.

    Source: Shazeer, arXiv:2002.05202.
    """

    def __init__(self, dim: int, hidden: int | None = None, out: int | None = None, **options) -> None:
        super().__init__(dim, hidden, out, **options)
        self.fc1 = nn.Linear(
            dim, 2 * self.fc2.in_features, bias=self.fc1.bias is not None,
            device=self.fc1.weight.device, dtype=self.fc1.weight.dtype,
        )  # fmt: skip

    def hidden(self, x: Tensor) -> Tensor:
        gate, value = linear(self.fc1, x).chunk(2, -1)
        return self.act(gate) * value


class ConvGLU(GLU):
    """A gated linear unit whose gate looks around, ``fc2(act(conv(gate)) * value)`` with a depthwise convolution.

    Args:
        dim, hidden, out, **options: see :class:`GLU`.
        kernel_size: of the convolution.
        rank: number of grid axes, 1 to 3.

    Source: Shi, TransNeXt, arXiv:2311.17132.
    """

    def __init__(
        self, dim: int, hidden: int | None = None, out: int | None = None, *, kernel_size: int = 3, rank: int = 2, **options
    ) -> None:
        super().__init__(dim, hidden, out, **options)
        like = self.fc1.weight
        self.conv = depthwise(self.fc2.in_features, kernel_size, rank, device=like.device, dtype=like.dtype)

    def hidden(self, x: Tensor) -> Tensor:
        gate, value = linear(self.fc1, x).chunk(2, -1)
        return self.act(convolve_tokens(self.conv, gate)) * value


class MixerMLP(MLP):
    """An MLP that also mixes places, ``fc2(act(fc1(x + tokens(x))))`` with an MLP along the tokens in each channel.

    Args:
        dim, hidden, out, **options: see :class:`MLP`.
        tokens: how many tokens there are, all axes of the grid together; any other number is refused.
        token_hidden: hidden width along the tokens, ``2 * tokens`` by default.

    Source: Tolstikhin et al., MLP-Mixer, arXiv:2105.01601.
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        out: int | None = None,
        *,
        tokens: int,
        token_hidden: int | None = None,
        **options,
    ) -> None:
        super().__init__(dim, hidden, out, **options)
        like = self.fc1.weight
        self.tokens = MLP(tokens, token_hidden or 2 * tokens, device=like.device, dtype=like.dtype)

    def hidden(self, x: Tensor) -> Tensor:
        count = self.tokens.fc1.in_features
        if x.shape[1:-1].numel() != count:
            raise ValueError(f"expected (batch, *grid, dim) with {count} tokens; got {tuple(x.shape)}")
        mixed = self.tokens(x.flatten(1, -2).transpose(1, 2)).transpose(1, 2)
        return super().hidden(x + mixed.unflatten(1, x.shape[1:-1]))
