"""Operators on the CPU against their peers, one thread: ``python benchmarks/cpu_operators.py [case ...]``.

Floor of the first case (56x56 tokens, batch 4, 4 heads of 32, kernel 7, float32): 4 * 4 * 3136 * 49 * 128 = 315 MFLOP and
26 MB of q, k, v and output: 3 ms of arithmetic on a core of 100 GFLOP/s, 1 ms of memory. The tiles compute about twice the
pairs of the pattern.

Peers: torch's SDPA with a cached additive mask, FlexAttention compiled (row order, blocks of 128 and 64), NATTEN where it is
installed, and for windows, axes and criss-cross the code that models use today, written out. Every row shows its error
against the definition in float64.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import error, interleave, write
from torch import Tensor

from regard import attend
from regard import patterns as P
from regard.layers.positions import OffsetBias

Variants = dict[str, Callable[[], Tensor | tuple[Tensor, ...]]]


def _inputs(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(dtype).requires_grad_(grad) for _ in range(3)]


def _measure(name: str, variants: Variants, truth: Tensor | None, **about: object) -> dict:
    errors = {}
    for label, run in variants.items():
        result = run()
        errors[label] = error(result[0] if isinstance(result, tuple) else result, truth) if truth is not None else None
    times = interleave(variants)
    ours = times["regard"]["ms"]
    rows = [
        {"variant": label, **times[label], "ratio": round(times[label]["ms"] / ours, 2), "error": errors[label]}
        for label in variants
    ]
    print(f"\n{name}  {about}")
    for row in rows:
        shown = "" if row["error"] is None else f"   error {row['error']:.1e}"
        print(f"  {row['variant']:<28}{row['ms']:>10.2f} ms   x{row['ratio']:<8}{shown}", flush=True)
    return {"case": name, **about, "rows": rows}


# --------------------------------------------------------------------------------------------------------------------
# neighborhoods


def _flex(pattern: P.Neighborhood, side: int, block: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    kernel = pattern.kernel_size

    def window(position: Tensor) -> Tensor:
        return (position - kernel // 2).clamp(0, side - kernel)

    def visible(b, h, q, k):
        row, column = window(q // side), window(q % side)
        inside_row = (k // side >= row) & (k // side < row + kernel)
        return inside_row & (k % side >= column) & (k % side < column + kernel)

    mask = create_block_mask(visible, None, None, side * side, side * side, device="cpu", BLOCK_SIZE=block)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def neighborhood(side: int, batch: int, kernel: int, dilation: int, backward: bool, peers: set[str]) -> dict:
    pattern = P.Neighborhood(kernel, dilation=dilation)
    q, k, v = _inputs(batch, side, side, 4, 32, grad=backward)
    flat = [t.detach().flatten(1, 2).transpose(1, 2).contiguous().requires_grad_(backward) for t in (q, k, v)]
    grad = torch.randn(batch, side, side, 4, 32)
    truth = None
    if side <= 56:
        truth = attend(*(t.detach().double() for t in (q, k, v)), pattern, backend="tiled")

    def trained(run: Callable[[], Tensor], inputs: list[Tensor], cotangent: Tensor) -> Callable:
        def step():
            out = run()
            gradients = torch.autograd.grad(out, inputs, cotangent)
            return (out, *gradients)

        return step

    def in_grid(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: run().transpose(1, 2).unflatten(1, (side, side))

    variants: Variants = {}

    def add(label: str, run: Callable[[], Tensor], inputs: list[Tensor], cotangent: Tensor) -> None:
        variants[label] = trained(run, inputs, cotangent) if backward else run

    add("regard", lambda: attend(q, k, v, pattern), [q, k, v], grad)
    if "dense" in peers:
        mask = torch.zeros(side**2, side**2).masked_fill_(~pattern.mask((side, side)), -math.inf)
        run = in_grid(lambda: F.scaled_dot_product_attention(*flat, attn_mask=mask))
        add("dense SDPA, cached mask", run, flat, grad)
    if "flex" in peers:
        for block in (128, 64):
            flex = _flex(pattern, side, block)
            add(f"FlexAttention, blocks {block}", in_grid(lambda flex=flex: flex(*flat)), flat, grad)
    if "natten" in peers:
        import natten

        add("NATTEN", lambda: natten.na2d(q, k, v, kernel_size=kernel, dilation=dilation), [q, k, v], grad)
    about = {"grid": [side, side], "batch": batch, "heads": 4, "head_dim": 32, "kernel": kernel, "dilation": dilation}
    direction = "forward and backward" if backward else "forward"
    with torch.set_grad_enabled(backward):
        return _measure(f"neighborhood, {direction}", variants, truth, **about)


def memory(side: int = 224, kernel: int = 13) -> dict:
    """Peak memory that the operator adds to its inputs and output, in a process of its own."""
    code = f"""
import torch
from regard import attend, patterns as P
torch.set_num_threads(1)
torch.manual_seed(0)
attend(*[torch.randn(1, 8, 8, 4, 32)] * 3, P.Neighborhood(3))
q, k, v = (torch.randn(1, {side}, {side}, 4, 32) for _ in range(3))


def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


open("/proc/self/clear_refs", "w").write("5")  # the peak starts from here
before = status("VmRSS")
out = attend(q, k, v, P.Neighborhood({kernel}))
print(status("VmHWM") - before - out.numel() * 4)
"""
    extra = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    mask = 4 * side**4
    print(f"\nneighborhood, memory  {side}x{side} kernel {kernel}: {extra / 1e6:.0f} MB beyond q, k, v and the output;")
    print(f"  a dense float mask alone would take {mask / 1e9:.0f} GB")
    return {"case": "neighborhood, memory", "grid": [side, side], "kernel": kernel, "extra_bytes": extra, "dense_mask": mask}


# --------------------------------------------------------------------------------------------------------------------
# windows


def windows(side: int, batch: int, heads: int, size: int, dtype: torch.dtype, backward: bool = False) -> dict:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, side, side, 3, heads, 32, generator=generator).to(dtype).requires_grad_(backward)
    pattern = P.Window(size)
    bias = OffsetBias(heads, pattern, std=1.0)
    table = bias.table.detach().flip(1, 2).flatten(1).t().contiguous().requires_grad_(backward)
    cells = torch.cartesian_prod(torch.arange(size), torch.arange(size))
    steps = cells[:, None] - cells[None] + size - 1
    index = (steps[..., 0] * (2 * size - 1) + steps[..., 1]).view(-1)
    number = side // size

    def matmul_path() -> Tensor:
        x = qkv.view(batch, number, size, number, size, 3, heads, 32).transpose(2, 3).reshape(-1, size**2, 3, heads, 32)
        q, k, v = x.permute(2, 0, 3, 1, 4).unbind(0)
        relative = table[index].view(size**2, size**2, -1).permute(2, 0, 1).contiguous()
        weights = ((q * 32**-0.5) @ k.transpose(-2, -1) + relative.to(dtype)).softmax(-1)
        y = (weights @ v).transpose(1, 2).reshape(batch, number, number, size, size, heads, 32)
        return y.transpose(2, 3).reshape(batch, side, side, heads, 32)

    def ours() -> Tensor:
        return attend(*qkv.unbind(3), pattern, bias=bias)

    grad = torch.randn(batch, side, side, heads, 32).to(dtype)

    def step(run: Callable[[], Tensor], learned: Tensor) -> Callable:
        def both():
            out = run()
            return (out, *torch.autograd.grad(out, (qkv, learned), grad))

        return both if backward else run

    wide = OffsetBias(heads, pattern).double()
    wide.table.data = bias.table.data.double()
    with torch.no_grad():
        truth = attend(*qkv.double().unbind(3), pattern, bias=wide)
    variants: Variants = {"regard": step(ours, bias.table), "matmul and softmax": step(matmul_path, table)}
    about = {"grid": [side, side], "batch": batch, "heads": heads, "window": size, "dtype": str(dtype)[6:]}
    direction = "forward and backward" if backward else "forward"
    with torch.set_grad_enabled(backward):
        return _measure(f"window with bias, {direction}", variants, truth, **about)


# --------------------------------------------------------------------------------------------------------------------
# axes and routed blocks


def axes(side: int = 64, batch: int = 4) -> list[dict]:
    q, k, v = _inputs(batch, side, side, 4, 32)
    same = torch.eye(side, dtype=torch.bool)[:, None, None]

    def rows() -> Tensor:
        return torch.einsum("byxhd,byzhd->byxhz", q, k) * 32**-0.5

    def columns() -> Tensor:
        return torch.einsum("byxhd,bzxhd->byxhz", q, k) * 32**-0.5

    def back(row: Tensor, column: Tensor) -> Tensor:
        return torch.einsum("byxhz,byzhd->byxhd", row, v) + torch.einsum("byxhz,bzxhd->byxhd", column, v)

    def concatenated() -> Tensor:
        column = columns().masked_fill(same, -math.inf)
        weights = torch.cat([rows(), column], -1).softmax(-1)
        return back(weights[..., :side], weights[..., side:])

    def separate() -> Tensor:
        return back(rows().softmax(-1), columns().softmax(-1))

    cross = P.Axis(0) | P.Axis(1)
    wide = [t.double() for t in (q, k, v)]
    about = {"grid": [side, side], "batch": batch, "heads": 4, "head_dim": 32}
    with torch.no_grad():
        return [
            _measure(
                "criss-cross, forward",
                {"regard": lambda: attend(q, k, v, cross), "concatenated softmax": concatenated},
                attend(*wide, cross),
                **about,
            ),
            _measure(
                "axial, forward",
                {
                    "regard": lambda: attend(q, k, v, P.Axis(1)) + attend(q, k, v, P.Axis(0)),
                    "einsum and softmax": separate,
                },
                attend(*wide, P.Axis(1)) + attend(*wide, P.Axis(0)),
                **about,
            ),
        ]


def routed(tokens: int = 4096, block: int = 64, listed: int = 8) -> dict:
    q, k, v = _inputs(1, tokens, 4, 64)
    generator = torch.Generator().manual_seed(0)
    blocks = tokens // block
    table = torch.stack([torch.randperm(blocks, generator=generator)[:listed] for _ in range(blocks)])[None]
    pattern = P.Blocks(table, block)
    flat = [t.transpose(1, 2) for t in (q, k, v)]
    mask = torch.zeros(tokens, tokens).masked_fill_(~pattern.mask((tokens,))[0, 0], -math.inf)
    variants: Variants = {
        "regard": lambda: attend(q, k, v, pattern),
        "dense SDPA, cached mask": lambda: F.scaled_dot_product_attention(*flat, attn_mask=mask).transpose(1, 2),
    }
    truth = attend(*(t.double() for t in (q, k, v)), pattern)
    about = {"tokens": tokens, "block": block, "listed": listed, "heads": 4, "head_dim": 64}
    with torch.no_grad():
        return _measure("routed blocks, forward", variants, truth, **about)


# --------------------------------------------------------------------------------------------------------------------


def _installed(name: str) -> set[str]:
    try:
        __import__(name)
    except ImportError:
        return set()
    return {name}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=["neighborhood", "memory", "windows", "axes", "routed"])
    chosen = parser.parse_args().cases
    torch.set_num_threads(1)
    results: list[dict] = []
    if "neighborhood" in chosen:
        results.append(neighborhood(56, 4, 7, 1, False, {"dense", "flex"} | _installed("natten")))
        results.append(neighborhood(56, 4, 7, 2, False, {"dense"}))
        results.append(neighborhood(56, 4, 13, 1, False, {"dense", "flex"}))
        results.append(neighborhood(28, 8, 7, 1, False, {"dense"}))
        results.append(neighborhood(28, 8, 13, 2, False, {"dense"}))
        results.append(neighborhood(56, 4, 7, 1, True, {"dense"}))
        results.append(neighborhood(56, 4, 7, 2, True, {"dense"}))
        results.append(neighborhood(56, 4, 13, 1, True, {"dense"}))
        results.append(neighborhood(28, 8, 7, 1, True, {"dense"}))
        results.append(neighborhood(224, 1, 13, 1, False, set()))
        results.append(neighborhood(224, 1, 13, 1, True, set()))
    if "memory" in chosen:
        results.append(memory())
    if "windows" in chosen:
        for dtype in (torch.float32, torch.bfloat16):
            results.append(windows(56, 8, 3, 7, dtype))
            results.append(windows(14, 8, 12, 7, dtype))
        results.append(windows(64, 4, 4, 8, torch.float32))
        results.append(windows(56, 8, 3, 7, torch.float32, backward=True))
    if "axes" in chosen:
        results.extend(axes())
    if "routed" in chosen:
        results.append(routed())
    print(f"\nwritten to {write('operators', results)}")


if __name__ == "__main__":
    main()
