"""Neighborhoods: torch's SDPA with a cached mask, FlexAttention, unfolded windows and NATTEN.

Floor of 56x56 tokens, batch 4, 4 heads of 32, kernel 7, float32: 4 * 4 * 3136 * 49 * 128 = 315 MFLOP and 26 MB of q, k, v
and output: 3 ms of arithmetic on a core of 100 GFLOP/s, 1 ms of memory. The tiles compute about twice the pairs of the pattern.
"""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...ops import attend
from ...ops import patterns as P
from ..harness import Contest, Run, Variant
from .scope import Case, Scope, against_definition, compiled_flex, gradients_against_definition, random, sdpa, with_gradients

HEADS, DIM = 4, 32
FLEX_TILE = 8
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def cases(scope: Scope) -> list[Case]:
    if scope.smoke:
        make = partial(_contest, scope, 12, 2, 3)
        return [partial(make, 1, False), partial(make, 2, True), partial(_memory, 28, 3)]
    made: list[Case] = []
    for side, batch, kernel, dilation, backward in (
        (56, 4, 7, 1, False), (56, 4, 7, 2, False), (56, 4, 13, 1, False), (56, 4, 13, 2, False), (28, 8, 7, 1, False),
        (28, 8, 13, 2, False), (56, 4, 7, 1, True), (56, 4, 7, 2, True), (56, 4, 13, 1, True), (56, 4, 13, 2, True),
        (28, 8, 7, 1, True), (224, 1, 13, 1, False), (224, 1, 13, 1, True),
    ):  # fmt: skip
        made.append(partial(_contest, scope, side, batch, kernel, dilation, backward))
    made.append(partial(_contest, scope, 224, 1, 13, 1, False, torch.bfloat16))
    made.append(partial(_memory, 224, 13))
    return made


def _contest(
    scope: Scope, side: int, batch: int, kernel: int, dilation: int, backward: bool, dtype: torch.dtype = torch.float32
) -> Contest:
    pattern = P.Neighborhood(kernel, dilation=dilation)
    q, k, v = random(batch, side, side, HEADS, DIM, dtype=dtype, grad=backward)
    flat = [t.detach().flatten(1, 2).transpose(1, 2).contiguous().requires_grad_(backward) for t in (q, k, v)]
    (cotangent,) = random(batch, side, side, HEADS, DIM, number=1, dtype=dtype, seed=1)
    checked = side <= 56 and backward  # the definition's gradients need all weights
    if checked:
        check: Callable = gradients_against_definition(q, k, v, pattern, cotangent)
        flat_check: Callable = gradients_against_definition(q, k, v, pattern, cotangent, partial(_on_grid, side=side))
    else:
        check = flat_check = against_definition(q, k, v, pattern)
    variants: dict[str, Variant] = {}

    def add(name: str, run: Run, inputs: Sequence[Tensor], error: Callable, peer: bool = True) -> None:
        variants[name] = Variant(with_gradients(run, inputs, cotangent) if backward else run, error, peer)

    add("regard", lambda: attend(q, k, v, pattern), [q, k, v], check, False)
    if side <= 56:
        mask = torch.zeros(side**2, side**2).masked_fill_(~pattern.mask((side, side)), -math.inf)
        add(
            "SDPA, cached mask",
            lambda: _on_grid(sdpa(flat, attn_mask=mask), side),
            flat,
            flat_check,
        )
        add("unfolded windows", lambda: _unfolded(q, k, v, kernel, dilation), [q, k, v], check)
    if "flex" in scope.peers and not backward and dilation == 1 and side == 56:
        for block in (128, 64):
            flex = _flex(side, kernel, block, tiled=False)
            add(
                f"FlexAttention, blocks of {block}",
                lambda flex=flex: _on_grid(flex(*flat), side),  # type: ignore[misc]
                flat,
                flat_check,
            )
        tiled = _flex(side, kernel, FLEX_TILE**2, tiled=True)
        add(f"FlexAttention, tiles of {FLEX_TILE} x {FLEX_TILE}", lambda: _in_tiles(tiled, q, k, v), [q, k, v], check)
    if "natten" in scope.peers and not backward and (side, kernel) in ((56, 7), (28, 7), (28, 13), (12, 3)):
        natten = importlib.import_module("natten")
        add("NATTEN", lambda: natten.na2d(q, k, v, kernel_size=kernel, dilation=dilation), [q, k, v], check)
    about = {
        "grid": [side, side], "batch": batch, "heads": HEADS, "head_dim": DIM, "kernel": kernel, "dilation": dilation,
        "dtype": str(dtype)[6:],
    }  # fmt: skip
    return Contest(f"neighborhood, {'forward and backward' if backward else 'forward'}", about, variants, backward)


def _on_grid(rows: Tensor, side: int) -> Tensor:
    """``(batch, heads, tokens, dim)`` as ``(batch, side, side, heads, dim)``."""
    return rows.transpose(1, 2).unflatten(1, (side, side))


def _unfolded(q: Tensor, k: Tensor, v: Tensor, kernel: int, dilation: int) -> Tensor:
    """All windows of keys laid out side by side, dilation groups taken apart first."""
    side = q.shape[1]
    if dilation > 1:  # (batch * groups, side / dilation, side / dilation, heads, dim)
        q, k, v = (_dilation_groups(t, dilation) for t in (q, k, v))
        return _together(_unfolded(q, k, v, kernel, 1), dilation)
    start = (torch.arange(side) - kernel // 2).clamp(0, side - kernel)

    def windows(t: Tensor) -> Tensor:  # (batch, side, side, heads, dim, kernel, kernel)
        return t.unfold(1, kernel, 1).unfold(2, kernel, 1)[:, start][:, :, start]

    scores = torch.einsum("bijhd,bijhdyx->bijhyx", q * q.shape[-1] ** -0.5, windows(k))
    weights = scores.flatten(-2).softmax(-1).view_as(scores)
    return torch.einsum("bijhyx,bijhdyx->bijhd", weights, windows(v))


def _dilation_groups(t: Tensor, dilation: int) -> Tensor:
    batch, side, _, heads, dim = t.shape
    t = t.view(batch, side // dilation, dilation, side // dilation, dilation, heads, dim)
    return t.permute(0, 2, 4, 1, 3, 5, 6).flatten(0, 2)


def _together(t: Tensor, dilation: int) -> Tensor:
    t = t.unflatten(0, (-1, dilation, dilation)).permute(0, 3, 1, 4, 2, 5, 6)
    return t.flatten(1, 2).flatten(2, 3)


def _flex(side: int, kernel: int, block: int, tiled: bool) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask

    across = side // FLEX_TILE

    def place(index: Tensor) -> tuple[Tensor, Tensor]:
        if not tiled:
            return index // side, index % side
        tile, inside = index // FLEX_TILE**2, index % FLEX_TILE**2
        return tile // across * FLEX_TILE + inside // FLEX_TILE, tile % across * FLEX_TILE + inside % FLEX_TILE

    def window(position: Tensor) -> Tensor:
        return (position - kernel // 2).clamp(0, side - kernel)

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        (q_row, q_column), (row, column) = place(query), place(key)
        top, left = window(q_row), window(q_column)
        return (row >= top) & (row < top + kernel) & (column >= left) & (column < left + kernel)

    mask = create_block_mask(visible, None, None, side * side, side * side, device="cpu", BLOCK_SIZE=block)
    compiled = compiled_flex()
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def _in_tiles(attention: Attention, *tensors: Tensor) -> Tensor:
    """With the tokens of a tile side by side; bringing them there and back is part of the time."""
    side, tile = tensors[0].shape[1], FLEX_TILE
    rows = [
        t.unflatten(2, (-1, tile)).unflatten(1, (-1, tile)).permute(0, 5, 1, 3, 2, 4, 6).flatten(2, 5) for t in tensors
    ]  # (batch, heads, tokens in tile order, dim)
    out = attention(*rows).unflatten(2, (side // tile, side // tile, tile, tile))
    return out.permute(0, 2, 4, 3, 5, 1, 6).flatten(1, 2).flatten(2, 3)


def _memory(side: int, kernel: int) -> dict[str, Any]:
    """Peak memory that the operator adds to its inputs and output, of the whole process, in a process of its own."""
    code = f"""
import torch
from regard import attend, patterns as P
torch.set_num_threads({torch.get_num_threads()})
torch.manual_seed(0)
attend(*[torch.randn(1, 8, 8, {HEADS}, {DIM})] * 3, P.Neighborhood(3))
q, k, v = (torch.randn(1, {side}, {side}, {HEADS}, {DIM}) for _ in range(3))


def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


open("/proc/self/clear_refs", "w").write("5")  # the peak starts from here
before = status("VmRSS")
out = attend(q, k, v, P.Neighborhood({kernel}))
print(status("VmHWM") - before - out.numel() * 4)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    about = {"grid": [side, side], "batch": 1, "heads": HEADS, "head_dim": DIM, "kernel": kernel, "dtype": "float32"}
    rows = [
        {"variant": "regard", "peer": False, "extra_mb": round(int(done.stdout) / 1e6, 1)},
        {"variant": "a dense float mask alone", "peer": True, "extra_mb": round(4 * side**4 / 1e6, 1)},
    ]
    threads = torch.get_num_threads()
    return {"case": "neighborhood, memory beyond q, k, v and the output", **about, "threads": threads, "rows": rows}
