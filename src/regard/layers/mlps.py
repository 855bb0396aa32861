"""Channel mixers: what a block does to each token, ``(batch, *grid, dim) -> (batch, *grid, dim)``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from .conv import convolve_tokens, depthwise


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
        return self.act(self.fc1(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.hidden(x))))


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
        return self.act(convolve_tokens(self.conv, self.fc1(x)))


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
        gate, value = self.fc1(x).chunk(2, -1)
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
        gate, value = self.fc1(x).chunk(2, -1)
        return self.act(convolve_tokens(self.conv, gate)) * value
