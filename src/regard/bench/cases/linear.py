"""Linear attention against softmax attention (torch's SDPA), the quadratic form (all weights) and the recurrence.

Floor of the causal case at 4096 tokens (batch 1, 4 heads of 64, float32): 4 * 4096 * 4 * 64 * 64 = 268 MFLOP and 17 MB of
q, k, v and output: 3 ms of arithmetic on a core of 100 GFLOP/s, half a millisecond of memory. Chunks of 64 tokens add as
many FLOPs inside the chunks. Over all keys the floor is the same and nothing is added.

The errors of the linear forms are against the recurrence in float64; softmax computes something else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.linear.attend import linear_attend, linear_weights
from ..harness import Contest, Run, Variant, worst_error
from .scope import Case, Scope, random, sdpa, with_gradients

HEADS, DIM = 4, 64
QUADRATIC = 4096
"""The most tokens that the forms with all weights, or with a step per token, are run on."""


def cases(scope: Scope) -> list[Case]:
    if scope.smoke:
        tiny = partial(_causal, 48, torch.float32)
        return [partial(tiny, "head", False), partial(tiny, "head", True), partial(_everything, 48, torch.float32, False)]
    made: list[Case] = [partial(_causal, tokens, torch.float32, "none", False) for tokens in (1024, 4096, 16384)]
    made.append(partial(_causal, 4096, torch.float32, "none", True))
    made += [partial(_causal, 4096, torch.float32, kind, False) for kind in ("head", "token", "token and feature")]
    made.append(partial(_causal, 4096, torch.float32, "head", True))
    made += [partial(_causal, tokens, torch.bfloat16, "none", False) for tokens in (4096, 16384)]
    made += [partial(_everything, 4096, dtype, False) for dtype in (torch.float32, torch.bfloat16)]
    made.append(partial(_everything, 4096, torch.float32, True))
    return made


def _inputs(tokens: int, dtype: torch.dtype, grad: bool) -> list[Tensor]:
    return [(t / 8).to(dtype).requires_grad_(grad) for t in random(1, tokens, HEADS, DIM)]


def _decay(kind: str, tokens: int) -> Tensor | None:
    shapes = {"none": None, "head": (HEADS,), "token": (1, tokens, HEADS), "token and feature": (1, tokens, HEADS, DIM)}
    shape = shapes[kind]
    return None if shape is None else -0.1 * torch.rand(shape, generator=torch.Generator().manual_seed(1))


def _recurrence(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None) -> Tensor:
    state = torch.zeros(1, HEADS, DIM, DIM, dtype=torch.promote_types(q.dtype, torch.float32))
    factors = None
    if decay is not None:
        factors = decay.to(state).exp().reshape(1, -1, HEADS, decay.shape[-1] if decay.ndim == 4 else 1)
        factors = factors.expand(1, q.shape[1], HEADS, -1)
    out = []
    for t in range(q.shape[1]):
        if factors is not None:
            state = factors[:, t].unsqueeze(-1) * state
        state = state + k[:, t].unsqueeze(-1).to(state) * v[:, t].unsqueeze(-2)
        out.append((q[:, t].unsqueeze(-2).to(state) @ state).squeeze(-2))
    return torch.stack(out, 1).to(q.dtype)


def _softmax(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return sdpa([t.transpose(1, 2) for t in (q, k, v)], is_causal=causal).transpose(1, 2)


def _contest(
    case: str, about: dict[str, object], inputs: list[Tensor], runs: dict[str, Run],
    exact: Callable[..., Any] | None, backward: bool,
) -> Contest:  # fmt: skip
    cotangent = torch.ones_like(inputs[0])

    def step(run: Run) -> Run:
        return with_gradients(run, inputs, cotangent) if backward else run

    truth: list[Tensor] = []
    if exact is not None:
        wide = [t.detach().double().requires_grad_(backward) for t in inputs]
        with torch.set_grad_enabled(backward):
            out = exact(*wide)
            truth = [out.detach(), *(torch.autograd.grad(out, wide, cotangent.double()) if backward else ())]

    def check(results: Tensor | tuple[Tensor, ...]) -> float:
        return worst_error(results if isinstance(results, tuple) else (results,), truth)

    variants = {
        name: Variant(step(run), check if truth and "softmax" not in name else None, name != "regard")
        for name, run in runs.items()
    }
    return Contest(f"{case}, {'forward and backward' if backward else 'forward'}", about, variants, backward)


def _causal(tokens: int, dtype: torch.dtype, decay: str, backward: bool) -> Contest:
    q, k, v = inputs = _inputs(tokens, dtype, backward)
    logs = _decay(decay, tokens)
    runs: dict[str, Run] = {
        "regard": lambda: linear_attend(q, k, v, causal=True, log_decay=logs),
        "softmax, SDPA": lambda: _softmax(q, k, v, True),
    }
    if tokens <= QUADRATIC:
        if decay != "token and feature":  # all weights of all features do not fit
            runs["quadratic form"] = lambda: torch.einsum(
                "bhts,bshe->bthe", linear_weights(q, k, causal=True, log_decay=logs).to(dtype), v
            )
        if not backward:
            runs["recurrence"] = lambda: _recurrence(q, k, v, logs)
    about = {"tokens": tokens, "heads": HEADS, "head_dim": DIM, "decay": decay, "dtype": str(dtype)[6:]}
    # a backward pass through the recurrence would keep the state of every token
    naive = partial(linear_attend, causal=True, log_decay=logs, backend="naive")
    exact: Callable[..., Any] = naive if backward else partial(_recurrence, decay=logs)
    return _contest("causal linear", about, inputs, runs, exact if tokens <= QUADRATIC else None, backward)


def _everything(tokens: int, dtype: torch.dtype, backward: bool) -> Contest:
    q, k, v = inputs = _inputs(tokens, dtype, backward)

    def products() -> Tensor:
        queries, keys = F.elu(q) + 1, F.elu(k) + 1
        memory, total = torch.einsum("bshd,bshe->bhde", keys, v), keys.sum(1)
        return torch.einsum("bthd,bhde->bthe", queries, memory) / torch.einsum("bthd,bhd->bth", queries, total)[..., None]

    options: dict[str, Any] = {"feature": "elu_plus_one", "norm": "sum"}
    runs: dict[str, Run] = {
        "regard": lambda: linear_attend(q, k, v, **options),
        "two products, einsum": products,
        "softmax, SDPA": lambda: _softmax(q, k, v, False),
    }
    about = {"tokens": tokens, "heads": HEADS, "head_dim": DIM, "dtype": str(dtype)[6:]}
    exact = partial(linear_attend, backend="naive", **options)
    return _contest("linear over all keys", about, inputs, runs, exact, backward)
