"""NATTEN's interface on the CPU, one thread: ``python benchmarks/compat_natten.py``.

The two halves of NATTEN 0.17 with a relative bias, as transformers' DiNAT calls them, against the fused function, against the
same halves by gathering every key of every query (what one writes without NATTEN), and against NATTEN's own where a version
that has them is installed. ``cpu_operators.py`` measures the fused functions against NATTEN.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from harness import error, interleave, write
from torch import Tensor

from regard import patterns as P
from regard.compat.natten import functional as regard
from regard.compat.natten import legacy

KERNEL = 7
Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of queries (scaled), keys, values ``(batch, heads, rows, columns, dim)`` and relative biases."""


def _halves(functions) -> Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor) -> Tensor:
        return functions.na2d_av(functions.na2d_qk(q, k, KERNEL, rpb=rpb).softmax(-1), v, KERNEL)

    return attention


def _fused(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor) -> Tensor:
    out = legacy.na2d(*(t.movedim(1, -2) for t in (q, k, v)), KERNEL, rpb=rpb, scale=1.0)
    return out.movedim(-2, 1)


def _gathered(side: int) -> Attention:
    """Every key of every query side by side."""
    mask = P.Neighborhood(KERNEL).mask((side, side))
    index = mask.nonzero()[:, 1].view(side * side, KERNEL**2)
    query = torch.arange(side * side)[:, None]
    rows, columns = index // side - query // side + KERNEL - 1, index % side - query % side + KERNEL - 1

    def attention(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor) -> Tensor:
        keys, values = (t.flatten(2, 3)[:, :, index] for t in (k, v))  # (batch, heads, tokens, taps, dim)
        scores = torch.einsum("bhnd,bhntd->bhnt", q.flatten(2, 3), keys) + rpb[:, rows, columns]
        return torch.einsum("bhnt,bhntd->bhnd", scores.softmax(-1), values).unflatten(2, (side, side))

    return attention


def _variants(side: int) -> dict[str, Attention]:
    variants = {"halves": _halves(regard), "fused": _fused, "gathered": _gathered(side)}
    if importlib.util.find_spec("natten"):
        functional = importlib.import_module("natten.functional")
        if hasattr(functional, "na2d_qk"):
            variants["natten halves"] = _halves(functional)
    return variants


def _run(attention: Attention, inputs: list[Tensor], backward: bool) -> Tensor:
    out = attention(*inputs)
    if backward:
        torch.autograd.grad(out, inputs, torch.ones_like(out))
    return out


def case(side: int, batch: int, backward: bool, heads: int = 4, dim: int = 32) -> dict:
    inputs = [torch.randn(batch, heads, side, side, dim) for _ in range(3)]
    inputs[0] *= dim**-0.5
    inputs.append(torch.randn(heads, 2 * KERNEL - 1, 2 * KERNEL - 1))
    truth = _gathered(side)(*(t.double() for t in inputs))
    inputs = [t.requires_grad_(backward) for t in inputs]
    runs = {name: partial(_run, attention, inputs, backward) for name, attention in _variants(side).items()}
    errors = {name: error(run(), truth) for name, run in runs.items()}
    times = interleave(runs, repeats=9, seconds=15.0)
    ours = times["halves"]["ms"]
    rows = [
        {"variant": name, **times[name], "ratio": round(times[name]["ms"] / ours, 2), "error": errors[name]} for name in runs
    ]
    about = {"case": "attention with relative bias", "side": side, "batch": batch, "kernel": KERNEL, "backward": backward}
    print(about)
    for row in rows:
        print(f"  {row['variant']:<16}{row['ms']:>10.2f} ms   x{row['ratio']:<8} error {row['error']:.1e}", flush=True)
    return {**about, "rows": rows}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(write("compat_natten", [case(*size, backward) for size in ((28, 8), (56, 4)) for backward in (False, True)]))
