"""NATTEN's interface (:mod:`regard.compat.natten`): the two halves of its 0.17 with a relative bias, as models call them.

Beside them the fused function, the same by gathering every key of every query (what one writes without NATTEN), and NATTEN's
own halves where a version that has them is installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...compat.natten import functional, legacy
from ...ops import patterns as P
from ..harness import Contest, Run, Variant, worst_error
from .scope import Case, Scope, random

HEADS, DIM = 4, 32
Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of queries (scaled), keys, values ``(batch, heads, rows, columns, dim)`` and relative biases."""


def cases(scope: Scope) -> list[Case]:
    sizes = ((8, 1, 3),) if scope.smoke else ((28, 8, 7), (56, 4, 7))
    return [partial(_contest, scope, *size, backward) for size in sizes for backward in (False, True)]


def _contest(scope: Scope, side: int, batch: int, kernel: int, backward: bool) -> Contest:
    inputs = random(batch, HEADS, side, side, DIM)
    inputs[0] *= DIM**-0.5
    inputs += random(HEADS, 2 * kernel - 1, 2 * kernel - 1, number=1, seed=1)
    gathered = _gathered(side, kernel)
    variants: dict[str, Attention] = {
        "regard, halves": _halves(functional, kernel),
        "regard, fused": partial(_fused, kernel),
        "gathered keys": gathered,
    }
    if "natten" in scope.peers:
        theirs = importlib.import_module("natten.functional")
        if hasattr(theirs, "na2d_qk"):
            variants["NATTEN, halves"] = _halves(theirs, kernel)
    wide = [t.double().requires_grad_(backward) for t in inputs]
    truth = _run(gathered, wide, backward)()
    inputs = [t.requires_grad_(backward) for t in inputs]

    def check(results: list[Tensor]) -> float:
        return worst_error(results, truth)

    made = {name: Variant(_run(run, inputs, backward), check, "regard" not in name) for name, run in variants.items()}
    about = {"grid": [side, side], "batch": batch, "heads": HEADS, "head_dim": DIM, "kernel": kernel, "dtype": "float32"}
    case = f"neighborhood with bias by NATTEN's interface, {'forward and backward' if backward else 'forward'}"
    return Contest(case, about, made, backward)


def _run(attention: Attention, inputs: list[Tensor], backward: bool) -> Run:
    def run() -> list[Tensor]:
        out = attention(*inputs)
        gradients = torch.autograd.grad(out, inputs, torch.ones_like(out)) if backward else ()
        return [out.detach(), *gradients]

    return run


def _halves(functions: Any, kernel: int) -> Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor) -> Tensor:
        return functions.na2d_av(functions.na2d_qk(q, k, kernel, rpb=rpb).softmax(-1), v, kernel)

    return attention


def _fused(kernel: int, q: Tensor, k: Tensor, v: Tensor, rpb: Tensor) -> Tensor:
    out = legacy.na2d(*(t.movedim(1, -2) for t in (q, k, v)), kernel, rpb=rpb, scale=1.0)
    return out.movedim(-2, 1)


def _gathered(side: int, kernel: int) -> Attention:
    """Every key of every query side by side."""
    mask = P.Neighborhood(kernel).mask((side, side))
    index = mask.nonzero()[:, 1].view(side * side, kernel**2)
    query = torch.arange(side * side)[:, None]
    rows, columns = index // side - query // side + kernel - 1, index % side - query % side + kernel - 1

    def attention(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor) -> Tensor:
        keys, values = (t.flatten(2, 3)[:, :, index] for t in (k, v))  # (batch, heads, tokens, taps, dim)
        scores = torch.einsum("bhnd,bhntd->bhnt", q.flatten(2, 3), keys) + rpb[:, rows, columns]
        return torch.einsum("bhnt,bhntd->bhnd", scores.softmax(-1), values).unflatten(2, (side, side))

    return attention
