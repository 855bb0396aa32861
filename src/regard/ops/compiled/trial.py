"""What a freshly compiled library must get right before it is kept: attention and linear attention, with their gradients."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from . import library

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def run(path: str) -> None:
    """Compare a library with the definitions in torch's operators. It may end the process: give it one of its own.

    Raises:
        Unavailable: it cannot be loaded.
        ValueError: it computes something else.
    """
    from ..attention.softmax import attend
    from ..linear.attend import linear_attend

    loaded = library.opened(Path(path))
    library.looked_for = lambda: loaded  # type: ignore[assignment]  # this process uses no other

    generator = torch.Generator().manual_seed(0)
    valid = torch.rand(1, 9, 11, generator=generator) > 0.2
    q, k, v = (torch.randn(1, 9, 11, 2, 21, generator=generator) for _ in range(3))
    for kind in TOLERANCE:
        for pattern in ("neighborhood(5)", "axis(0)|window(4)"):
            found, expected = (
                _with_gradients(
                    lambda q, k, v, name=name, p=pattern: attend(q, k, v, p, valid=valid, backend=name), (q, k, v), kind
                )
                for name in ("native", "reference")
            )
            _compare(f"attention of {pattern} in {kind}", found, expected, TOLERANCE[kind])
        flat = [t.flatten(1, 2) for t in (q, k, v)]
        for causal in (True, False):
            options = {"feature": "relu", "causal": causal, "valid": valid.flatten(1)}
            found, expected = (
                _with_gradients(lambda *x, name=name, o=options: linear_attend(*x, backend=name, **o), flat, kind)
                for name in ("native", "naive")
            )
            _compare(f"linear attention, causal={causal}, in {kind}", found, expected, TOLERANCE[kind])


def _with_gradients(function, tensors, kind: torch.dtype) -> list[Tensor]:
    leaves = [t.to(kind).requires_grad_() for t in tensors]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]


def _compare(what: str, found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, left, right in zip(("output", "q", "k", "v"), found, expected, strict=True):
        error = (left - right).abs().max().item() / max(1.0, right.abs().max().item())
        if not error <= tolerance:
            raise ValueError(f"{what} is off by {error:.1e} in {name}")
