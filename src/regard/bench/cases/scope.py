"""The settings and helpers of all cases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops import Source, attend
from ...ops.attention.weights import attend_weights
from ...ops.patterns import Pattern
from ..harness import Contest, Run, error, worst_error

Case = Callable[[], Contest | dict[str, Any]]
"""Makes a contest when its turn comes, so that only one holds memory; or measures by itself."""

CHECKED = 128
"""Queries whose output is compared with the definition."""


@dataclass(frozen=True)
class Scope:
    """Which cases to make.

    Args:
        smoke: tiny sizes, to see that everything runs.
        peers: the names of the peers to measure beside, see :data:`regard.bench.peers.PEERS`.
    """

    smoke: bool = False
    peers: tuple[str, ...] = ()

    def size(self, full: int, tiny: int) -> int:
        return tiny if self.smoke else full


def random(*shape: int, number: int = 3, dtype: torch.dtype = torch.float32, grad: bool = False, seed: int = 0) -> list[Tensor]:
    """Normal tensors, the same on every run."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(dtype).requires_grad_(grad) for _ in range(number)]


def with_gradients(run: Run, inputs: Sequence[Tensor], cotangent: Tensor) -> Run:
    """The output and the gradients of the inputs."""

    def step() -> tuple[Tensor, ...]:
        out = run()
        return (out, *torch.autograd.grad(out, inputs, cotangent))

    return step


def sdpa(inputs: Sequence[Tensor], **options: Any) -> Tensor:
    """torch's attention of queries, keys and values ``(batch, heads, tokens, dim)``."""
    q, k, v = inputs
    return F.scaled_dot_product_attention(q, k, v, **options)


def against_definition(q: Tensor, k: Tensor, v: Tensor, *patterns: Pattern) -> Callable[[Tensor | tuple], float]:
    """Error of an attention's output on some queries of the first item, against its definition in float64.

    Under several patterns it is the sum of as many attentions.
    """
    queries = q.shape[1:-2].numel()
    rows = torch.linspace(0, queries - 1, min(CHECKED, queries)).long()
    first = [t[:1].detach().double() for t in (q, k, v)]
    truth = torch.zeros(len(rows), q.shape[-2], v.shape[-1], dtype=torch.float64)
    for pattern in patterns:
        (weights,) = attend_weights(first[0], [Source(first[1], first[2], pattern)], rows=rows)
        truth += torch.einsum("hqk,khd->qhd", weights.flatten(3)[0], first[2].flatten(1, -3)[0])

    def of(result: Tensor | tuple) -> float:
        out = result[0] if isinstance(result, tuple) else result
        return error(out[0].flatten(0, -3)[rows], truth)

    return of


def gradients_against_definition(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, cotangent: Tensor, shape: Callable[[Tensor], Tensor] = lambda t: t
) -> Callable[[tuple[Tensor, ...]], float]:
    """Largest error of an attention's output and gradients in the first item, against its definition in float64.

    Args:
        q, k, v, pattern, cotangent: of the attention, ``(batch, *grid, heads, dim)``.
        shape: brings the first item of a gradient into that form.
    """
    first = [t[:1].detach().double().requires_grad_() for t in (q, k, v)]
    with torch.enable_grad():
        out: Any = attend(first[0], first[1], first[2], pattern, backend="reference")
        truth = (out.detach(), *torch.autograd.grad(out, first, cotangent[:1].double()))

    def of(results: tuple[Tensor, ...]) -> float:
        out, *gradients = results
        return worst_error([out[:1], *(shape(gradient[:1]) for gradient in gradients)], truth)

    return of


def compiled_flex() -> Callable[..., Tensor]:
    """FlexAttention, compiled for each case; beyond torch's limit it would run uncompiled without a word."""
    from torch._dynamo import config
    from torch.nn.attention.flex_attention import flex_attention

    config.recompile_limit = max(config.recompile_limit, 256)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 1024)
    return torch.compile(flex_attention, dynamic=False)
