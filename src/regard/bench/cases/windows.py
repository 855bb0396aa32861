"""Windows with a relative bias, and axes, against the code that models use today, written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...layers.positions import OffsetBias
from ...ops import attend
from ...ops import patterns as P
from ..harness import Contest, Run, Variant, worst_error
from .scope import Case, Scope, against_definition, random

DIM = 32


def window_cases(scope: Scope) -> list[Case]:
    if scope.smoke:
        return [partial(_windows, 6, 1, 2, 3, torch.float32, backward) for backward in (False, True)]
    return [
        partial(_windows, *sizes, dtype, backward)
        for sizes in ((56, 8, 3, 7), (14, 8, 12, 7), (64, 4, 4, 8))
        for dtype, backward in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False))
    ]


def _windows(side: int, batch: int, heads: int, size: int, dtype: torch.dtype, backward: bool) -> Contest:
    (qkv,) = random(batch, side, side, 3, heads, DIM, number=1, dtype=dtype, grad=backward)
    pattern = P.Window(size)
    generator = torch.random.get_rng_state()
    torch.manual_seed(0)
    bias = OffsetBias(heads, pattern, std=1.0)
    torch.random.set_rng_state(generator)
    table = bias.table.detach().flip(1, 2).flatten(1).t().contiguous().requires_grad_(backward)
    cells = torch.cartesian_prod(torch.arange(size), torch.arange(size))
    steps = cells[:, None] - cells[None] + size - 1
    index = (steps[..., 0] * (2 * size - 1) + steps[..., 1]).view(-1)
    number = side // size

    def matmul_path() -> Tensor:
        x = qkv.view(batch, number, size, number, size, 3, heads, DIM).transpose(2, 3).reshape(-1, size**2, 3, heads, DIM)
        q, k, v = x.permute(2, 0, 3, 1, 4).unbind(0)
        relative = table[index].view(size**2, size**2, -1).permute(2, 0, 1).contiguous()
        weights = ((q * DIM**-0.5) @ k.transpose(-2, -1) + relative.to(dtype)).softmax(-1)
        y = (weights @ v).transpose(1, 2).reshape(batch, number, number, size, size, heads, DIM)
        return y.transpose(2, 3).reshape(batch, side, side, heads, DIM)

    (cotangent,) = random(batch, side, side, heads, DIM, number=1, dtype=dtype, seed=1)

    def step(run: Run, learned: Tensor) -> Run:
        def both() -> tuple[Tensor, ...]:
            out = run()
            return (out, *torch.autograd.grad(out, (qkv, learned), cotangent))

        return both if backward else run

    wide = OffsetBias(heads, pattern, dtype=torch.float64)
    wide.table.data = bias.table.data.double()
    inputs = qkv.detach().double().requires_grad_(backward)
    with torch.set_grad_enabled(backward):
        q, k, v = inputs.unbind(3)
        out: Any = attend(q, k, v, pattern, bias=wide, backend="reference")
        truth = [out.detach()]
        if backward:
            truth += torch.autograd.grad(out, (inputs, wide.table), cotangent.double())

    def check(results: Tensor | tuple[Tensor, ...], as_ours: Callable[[Tensor], Tensor] = lambda t: t) -> float:
        found = results if isinstance(results, tuple) else (results,)
        return worst_error([*found[:2], *(as_ours(t) for t in found[2:])], truth)

    def of_flat_table(gradient: Tensor) -> Tensor:
        return gradient.t().unflatten(1, (2 * size - 1, 2 * size - 1)).flip(1, 2)

    def ours() -> Any:
        q, k, v = qkv.unbind(3)
        return attend(q, k, v, pattern, bias=bias)

    variants = {
        "regard": Variant(step(ours, bias.table), check, False),
        "matmul and softmax": Variant(step(matmul_path, table), partial(check, as_ours=of_flat_table)),
    }
    about = {"grid": [side, side], "batch": batch, "heads": heads, "head_dim": DIM, "window": size, "dtype": str(dtype)[6:]}
    case = f"window with bias, {'forward and backward' if backward else 'forward'}"
    return Contest(case, about, variants, backward)


def axis_cases(scope: Scope) -> list[Case]:
    side, batch = scope.size(64, 6), scope.size(4, 1)
    return [partial(_criss_cross, side, batch), partial(_axial, side, batch)]


def _rows(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("byxhd,byzhd->byxhz", q, k) * q.shape[-1] ** -0.5


def _columns(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("byxhd,bzxhd->byxhz", q, k) * q.shape[-1] ** -0.5


def _gathered(row: Tensor, column: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("byxhz,byzhd->byxhd", row, v) + torch.einsum("byxhz,bzxhd->byxhd", column, v)


def _axes(side: int, batch: int) -> tuple[list[Tensor], dict[str, object]]:
    return random(batch, side, side, 4, DIM), {"grid": [side, side], "batch": batch, "heads": 4, "head_dim": DIM}


def _criss_cross(side: int, batch: int) -> Contest:
    (q, k, v), about = _axes(side, batch)
    cross = P.Axis(0) | P.Axis(1)
    same = torch.eye(side, dtype=torch.bool)[:, None, None]

    def concatenated() -> Tensor:
        column = _columns(q, k).masked_fill(same, -math.inf)
        weights = torch.cat([_rows(q, k), column], -1).softmax(-1)
        return _gathered(weights[..., :side], weights[..., side:], v)

    check = against_definition(q, k, v, cross)
    variants = {
        "regard": Variant(lambda: attend(q, k, v, cross), check, False),
        "concatenated softmax": Variant(concatenated, check),
    }
    return Contest("criss-cross, forward", about, variants)


def _axial(side: int, batch: int) -> Contest:
    (q, k, v), about = _axes(side, batch)

    def ours() -> Any:
        return attend(q, k, v, P.Axis(1)) + attend(q, k, v, P.Axis(0))  # type: ignore[operator]  # tensors: no lse is asked for

    check = against_definition(q, k, v, P.Axis(0), P.Axis(1))
    variants = {
        "regard": Variant(ours, check, False),
        "einsum and softmax": Variant(lambda: _gathered(_rows(q, k).softmax(-1), _columns(q, k).softmax(-1), v), check),
    }
    return Contest("axial, forward", about, variants)
