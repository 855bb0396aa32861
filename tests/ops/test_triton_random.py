"""Random calls of the Triton kernels under the interpreter, like those of the compiled kernels, equal the reference."""

from __future__ import annotations

import random

import pytest
import torch

from regard import attend
from regard.ops.backends.triton import backend
from regard.ops.calls.source import HeadTable
from regard.ops.patterns import Halo, Neighborhood, Window

from .interpreted import HERE, TRITON, run_interpreted
from .test_native_sanitized import any_pattern

CALLS = 15


@TRITON
@pytest.mark.slow
@pytest.mark.skipif(HERE, reason="this is that process")
def test_random_calls_under_the_interpreter():
    run_interpreted(__file__, "random_calls_equal")


@TRITON
@pytest.mark.skipif(not HERE, reason="runs in a process of its own, with TRITON_INTERPRET=1")
def test_random_calls_equal_the_reference(monkeypatch):
    """Empty tables, axes of one, biases, missing keys; tiles so small that there are several of them."""
    for sizes in backend.SIZES.values():
        for kind in sizes:
            monkeypatch.setitem(sizes, kind, ((256, ((16, 16, 4), (32, 16, 4), (16, 32, 4))),))
    done = 0
    for call in range(10 * CALLS):
        done += check(random.Random(f"triton {call}"))
        if done == CALLS:
            return
    pytest.fail(f"only {done} calls are for these kernels")


def check(draw: random.Random) -> bool:
    """One call and its gradients; False where the kernels do not claim it."""
    torch.manual_seed(draw.getrandbits(30))
    rank = draw.choice((1, 2, 2, 3))
    grid = tuple(draw.choice((1, 2, 3, 5, 7) if rank < 3 else (1, 2, 3)) for _ in range(rank))
    batch, kv_heads = draw.choice((1, 2)), draw.choice((1, 2))
    heads, dim, value = kv_heads * draw.choice((1, 2)), draw.choice((1, 4, 16, 17)), draw.choice((1, 8, 20))
    shapes = ((heads, dim), (kv_heads, dim), (kv_heads, value))
    leaves = [torch.randn(batch, *grid, *shape, requires_grad=True) for shape in shapes]
    pattern, options = any_pattern(draw, grid, batch, heads), {"return_lse": True}
    if draw.random() < 0.3:
        options["valid"] = torch.rand(batch, *grid) > 0.4
    if isinstance(pattern, (Window, Neighborhood, Halo)) and draw.random() < 0.4:
        extents = [pattern.extent(axis, n, rank) for axis, n in enumerate(grid)]
        leaves.append(torch.randn(heads, *[2 * e + 1 for e in extents], requires_grad=True))
        options["bias"] = HeadTable(leaves[-1], pattern)
    try:
        found = attend(*leaves[:3], pattern, backend="triton", **options)
    except ValueError as error:
        if "cannot run this call" not in str(error):
            raise
        return False
    expected = attend(*leaves[:3], pattern, backend="reference", **options)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=f"{pattern!r} on {grid}")
    weights = torch.randn_like(expected[0])
    grads = (torch.autograd.grad((out * weights).sum(), leaves) for out, _ in (found, expected))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4, msg=f"gradients of {pattern!r} on {grid}")
    return True
