"""Fused attention by Triton kernels: neighborhoods, windows, halos, grids, axes, causal order and routed blocks.

    out, lse = attend(q, k, v) in one pass over the boxes of keys that a tile of queries needs; gradients in two more

Cost: the pairs of the walked boxes and O(tokens) memory, in both directions; no token is moved, no mask is stored. Boxes of
keys stand at the tile's own window in the grid, see :mod:`regard.ops.backends.triton.boxes`. A bias table gets its gradient by
atomic sums. On a CPU the kernels run only under Triton's interpreter, for tests.

Source: Dao, FlashAttention-2, arXiv:2307.08691; Hassani et al., Generalized Neighborhood Attention, arXiv:2504.16922.
"""

from __future__ import annotations

import contextvars
import importlib.util
import math
import os
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ...calls import definition
from ...calls.call import Call
from ...calls.definition import lse_like
from ...calls.geometry import Geometry
from ...tracing import constant_in_graphs
from ...transforms import PLAIN_ONLY
from ..base import Backend, Cost, cost_of
from ..operators import Inputs, define, run
from .boxes import Sizes, Walk, block_walk, classes_of, on_device, three, window_walk

INSTALLED = importlib.util.find_spec("triton") is not None
LOG2_E = 1.4426950408889634
COPIES = 16
"""Tables that take turns in summing the gradient of a bias, so that fewer atomic sums meet."""

DESCRIPTORS = False
"""Whether boxes of keys are read by tensor descriptors where chip, strides and pattern allow (see :meth:`Problem.describable`).

Each program writes two descriptors before its walk, which short walks may not earn back: unmeasured, so pointers are the
default; ``benchmarks/gpu/run.py`` measures both.
"""

SIZES: dict[str, dict[str, tuple[tuple[int, Sizes], ...]]] = {
    "forward": {
        "half": (
            (64, ((128, 128, 8), (128, 64, 8), (64, 128, 8), (64, 64, 4))),
            (128, ((128, 64, 8), (64, 64, 4))),
            (256, ((64, 64, 8), (64, 32, 8))),
        ),
        "half, biased": ((64, ((128, 64, 8), (64, 64, 4))), (128, ((128, 64, 8), (64, 64, 8))), (256, ((64, 32, 8),))),
        "single": ((64, ((64, 32, 4),)), (128, ((32, 32, 4),)), (256, ((16, 16, 4),))),
    },
    "queries": {
        "half": ((64, ((128, 64, 8), (64, 64, 4))), (128, ((64, 64, 4),)), (256, ((64, 32, 8),))),
        "half, biased": ((64, ((64, 32, 4),)), (128, ((64, 32, 8),)), (256, ((64, 16, 8),))),
        "single": ((64, ((64, 32, 4),)), (128, ((32, 32, 4),)), (256, ((16, 16, 4),))),
    },
    "keys": {
        "half": ((64, ((128, 32, 8), (64, 32, 8))), (128, ((64, 32, 8),)), (256, ((64, 16, 8),))),
        "half, biased": ((64, ((128, 32, 8),)), (128, ((128, 32, 8),)), (256, ((64, 16, 8),))),
        "single": ((64, ((32, 32, 4),)), (128, ((32, 16, 4),)), (256, ((16, 16, 4),))),
    },
}
"""Tokens of a tile, tokens of a box and warps, by pass, kind of operands and the largest head width they are for.

What fits in registers, by the compiler's report for compute capability 9.0.
"""


class TritonBackend(Backend[Call]):
    """Fused kernels for GPUs."""

    name = "triton"
    passed_over = "not measured on a GPU yet; runs where asked for"

    def available(self) -> str | None:
        return None if INSTALLED else "triton is not installed"

    def supports(self, call: Call) -> str | None:
        return _problem(call)

    def automatic(self, call: Call) -> bool:
        return False

    def cost(self, call: Call) -> Cost:
        walk = _walk_of(call)
        listed = 1 if (blocks := call.pattern.as_blocks(call.rank)) is None else blocks.table.shape[-1]
        tile, tiles = (math.prod(walk.tile), math.prod(walk.box)), call.batch * call.heads * walk.programs
        return cost_of(call, walk.computed_pairs * listed, 0, tile, tiles)

    def run(self, call: Call) -> tuple[Tensor, Tensor | None]:
        return _run(call)


def interpreted() -> bool:
    """Whether kernels run under Triton's interpreter, on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _problem(call: Call) -> str | None:
    if not INSTALLED:
        return "triton is not installed"
    if call.is_differentiated:
        return PLAIN_ONLY
    if call.bias is not None:
        return "a dense bias belongs to dense attention"
    if call.dropout:
        return "no attention dropout"
    if not call.scale > 0:
        return f"scale must be positive; got {call.scale}"
    if call.q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"only float32, float16 and bfloat16; got {call.q.dtype}"
    if max(call.q.shape[-1], call.v.shape[-1]) > 256:
        return f"head and value dims up to 256; got {call.q.shape[-1]} and {call.v.shape[-1]}"
    return _pattern_problem(call) or _device_problem(call)


def _pattern_problem(call: Call) -> str | None:
    blocks = call.pattern.as_blocks(call.rank)
    pattern = call.pattern
    if blocks.single if blocks is not None else pattern.as_product(call.rank) is None and not pattern.ordered:
        return f"only patterns separable by axis and routed blocks; got {call.pattern!r}"
    if call.rank > 3:
        return f"only grids with 1 to 3 axes; got {call.padded_grid}"
    if blocks is not None:
        return "no relative bias over routed blocks" if call.table is not None else None
    return _no_classes(*call.geometry)


def _device_problem(call: Call) -> str | None:
    if call.device.type == "cpu" and interpreted():
        return "Triton's interpreter cannot compute bfloat16" if call.q.dtype == torch.bfloat16 else None
    if call.device.type != "cuda":
        return f"only CUDA, or a CPU with TRITON_INTERPRET=1; got {call.device.type}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(call.device) < (8, 0):
        return f"needs compute capability 8.0; got {torch.cuda.get_device_capability(call.device)}"
    return None


@constant_in_graphs
def _no_classes(*geometry) -> str | None:
    """Why a pattern cannot be walked. A graph under trace sees the answer, not the tables."""
    made = classes_of(Geometry(*geometry))
    return made if isinstance(made, str) else None


def _run(call: Call) -> tuple[Tensor, Tensor | None]:
    call, careful = definition.guarded(call)
    if careful:
        return definition.run_pairs(call)
    return run(triton_attention, call)


def _walk_of(call: Call) -> Walk:
    blocks = call.pattern.as_blocks(call.rank)
    width = max(call.q.shape[-1], call.v.shape[-1])
    return _walk("forward", call.geometry, blocks.sizes if blocks else (), call.valid is not None, width, call.q.element_size())


def _walk(name: str, geometry: Geometry, block: tuple[int, ...], masked: bool, width: int, bytes_each: int) -> Walk:
    kind = "single" if bytes_each > 2 else "half" if geometry.table is None else "half, biased"
    sizes = next(sizes for limit, sizes in SIZES[name][kind] if width <= limit)
    if block:
        return block_walk(geometry.q_grid, geometry.k_grid, block, sizes, name == "keys")
    return window_walk(geometry, sizes, name == "keys", masked)


# --------------------------------------------------------------------------------------------------------------------
# launches


@dataclass(frozen=True, eq=False)
class Problem:
    """The operands of one call, grids flattened: what all three kernels are given.

    ``block`` is empty for a separable pattern; ``blocks`` are then None. ``table`` is scaled for powers of two.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    table: Tensor | None
    valid: Tensor | None
    blocks: Tensor | None
    block: tuple[int, ...]
    geometry: Geometry
    scale: float

    def walk(self, name: str) -> Walk:
        width = max(self.q.shape[-1], self.v.shape[-1])
        return _walk(name, self.geometry, self.block, self.valid is not None, width, self.q.element_size())

    def lists(self, by_key: bool) -> tuple[Tensor, Tensor, int, int]:
        """Listed blocks of each block in one row, where each row begins, and the rows of a batch item and of a head."""
        assert self.blocks is not None
        numbers = [math.prod(-(-n // size) for n, size in zip(grid, self.block, strict=True)) for grid in self.geometry[1:3]]
        batch, heads, queries, _ = self.blocks.shape
        number = numbers[by_key]
        table = self.blocks.long().sort(-1).values
        repeated = F.pad(table[..., 1:] == table[..., :-1], (1, 0))
        group = torch.arange(batch * heads, device=table.device).view(batch, heads, 1, 1) * number
        block = torch.arange(queries, device=table.device)[:, None]
        row = group + (table if by_key else block)
        row = row.masked_fill((table < 0) | repeated, batch * heads * number).flatten()
        row, order = row.sort(stable=True)
        members = (block.expand_as(table) if by_key else table).flatten()[order]
        begins = torch.searchsorted(row, torch.arange(batch * heads * number + 1, device=row.device))
        rows = (heads * number if batch > 1 else 0, number if heads > 1 else 0)
        return members.int(), begins.int(), *rows

    def describable(self, walk: Walk) -> bool:
        """Whether boxes of keys and values can be read by tensor descriptors.

        A chip of compute capability 9.0, addresses and strides of whole 16 bytes, and boxes that hold nothing else that exists
        and is not to be seen: no missing keys, no parts of further blocks.
        """
        if not _describes(self.q.device) or self.valid is not None:
            return False
        if self.block and any(n % size for n, size in zip(three(self.block), walk.box, strict=True)):
            return False
        return all(
            t.data_ptr() % 16 == 0
            and all(t.stride(i) * t.element_size() % 16 == 0 for i in (0, 1, 2) if i == 1 or t.shape[i] > 1)
            for t in (self.k, self.v)
        )

    def arguments(self, name: str, out: Tensor, lse: Tensor) -> tuple[list, dict, tuple[int, int]]:
        """Arguments and constants that the kernels share, and the number of tiles and of warps."""
        walk, q, k, v = self.walk(name), self.q, self.k, self.v
        none = lse  # stands where a pointer is not used
        members, begins, list_b, list_h = none, none, 0, 0
        if self.blocks is not None:
            members, begins, list_b, list_h = self.lists(name == "keys")
        valid_b = 0 if self.valid is None or len(self.valid) == 1 else self.valid.shape[1]
        bias_h = 0 if self.table is None or len(self.table) == 1 else self.table.shape[1]
        arguments = [
            q, k, v, out, lse,
            none if self.table is None else self.table,
            none if self.valid is None else self.valid,
            members, begins, on_device(walk, q.device), self.scale * LOG2_E,
            *(n for t in (q, k, v) for n in t.stride()[:3]),
            q.shape[2], q.shape[2] // k.shape[2], bias_h, valid_b, list_b, list_h,
        ]  # fmt: skip
        full = walk.full if self.valid is None else 0
        # an expanded tensor spans little, its gradient spans all
        farthest = max(max((t.shape[1] - 1) * t.stride(1), 0) + t[0].numel() for t in (q, k, v, out))
        constants = {
            "D": q.shape[3], "DV": v.shape[3], "BLOCK_D": _power(q.shape[3]), "BLOCK_V": _power(v.shape[3]),
            **{f"T{a}": n for a, n in enumerate(walk.tile)}, **{f"B{a}": n for a, n in enumerate(walk.box)},
            "AXES": self.geometry.rank, "BIAS": self.table is not None, "VALID": self.valid is not None,
            "ROUTED": self.blocks is not None, "FIRST": 0 if full else 1, "LAST": 1 if full == walk.boxes else 2,
            "WIDE": farthest >= 2**31, "PRECISION": precision(q.dtype),
        }  # fmt: skip
        if name != "keys":  # whose registers are full without
            constants["DESCRIBED"] = DESCRIPTORS and self.describable(walk)
        return arguments, constants, (walk.programs, walk.warps)


def _power(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


def precision(dtype: torch.dtype) -> str:
    """How products of float32 are computed: as torch's own, but on tensor cores."""
    if dtype != torch.float32:
        return "tf32"  # without meaning there
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def _pose(x: Inputs) -> Problem:
    def flat(tensor: Tensor) -> Tensor:
        tensor = tensor.flatten(1, -3)
        return tensor if tensor.stride(-1) == 1 else tensor.contiguous()

    return Problem(
        flat(x.q), flat(x.k), flat(x.v),
        None if x.table is None else x.table.flatten(1).float() * LOG2_E,
        None if x.valid is None else x.valid.flatten(1).to(torch.uint8),
        x.blocks, tuple(x.block), x.geometry, x.scale,
    )  # fmt: skip


def _forward(x: Inputs, need_lse: bool) -> tuple[Tensor, Tensor]:
    from . import kernels as attention

    problem, q = _pose(x), x.q
    out, lse = q.new_empty((*q.shape[:-1], x.v.shape[-1])), lse_like(q)
    arguments, constants, (tiles, warps) = problem.arguments("forward", out.flatten(1, -3), lse)
    _launch(attention.forward, tiles * len(q) * q.shape[-2], arguments, constants, warps)
    return out, lse if need_lse else lse.new_empty(0)


def _backward(
    x: Inputs, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, need_table: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    from . import kernels as attention

    problem, q, k = _pose(x), x.q, x.k
    grad_out, delta = grad_out.contiguous(), torch.empty_like(lse)
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, x.v))
    dtable = q.new_zeros((COPIES, *problem.table.shape) if need_table and problem.table is not None else 0, dtype=torch.float32)
    arguments, constants, (tiles, warps) = problem.arguments("queries", out.flatten(1, -3), lse)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    own = [grad_out, lse if grad_lse is None else grad_lse, delta, dq, dtable, COPIES, dtable[:1].numel(), x.scale]
    wanted = {"GRAD_LSE": grad_lse is not None, "GRAD_BIAS": need_table}
    _launch(attention.backward_queries, tiles * len(q) * q.shape[-2], arguments + own, constants | wanted, warps)
    arguments, constants, (tiles, warps) = problem.arguments("keys", out.flatten(1, -3), lse)
    own = [grad_out, delta, dk, dv, x.scale]
    _launch(attention.backward_keys, tiles * len(k) * k.shape[-2], arguments + own, constants, warps)
    table = x.table if need_table else None
    return dq, dk, dv, None if table is None else dtable.sum(0).view(table.shape).to(table.dtype)


def _launch(kernel, programs: int, arguments: list, constants: dict, warps: int) -> None:
    """Start a kernel on the device of its operands; its descriptors get memory without touching anyone else's allocator."""
    device = arguments[0].device
    start = partial(kernel[(programs,)], *arguments, **constants, num_warps=warps, num_stages=2)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if not constants.get("DESCRIBED"):
            start()
            return
        import triton

        def workspace(size: int, alignment: int, stream: int | None) -> Tensor:
            return torch.empty(size, dtype=torch.int8, device=device)

        context = contextvars.copy_context()
        context.run(triton.set_allocator, workspace)
        context.run(start)


def _describes(device: torch.device) -> bool:
    """Whether a device has tensor descriptors. The interpreter follows them by pointers."""
    return interpreted() if device.type == "cpu" else torch.cuda.get_device_capability(device) >= (9, 0)


def _pairs(name: str, x: Inputs) -> int:
    """Pairs of query and key that a kernel computes, over batch and heads, from shapes."""
    walk = _walk(name, x.geometry, tuple(x.block), False, max(x.q[-1], x.v[-1]), 2)
    return x.q[0] * x.q[-2] * walk.computed_pairs * (x.blocks[-1] if x.block else 1)


def _flops(x: Inputs) -> int:
    return 2 * _pairs("forward", x) * (x.q[-1] + x.v[-1])


def _flops_backward(x: Inputs) -> int:
    return 2 * _pairs("queries", x) * (2 * x.q[-1] + x.v[-1]) + 2 * _pairs("keys", x) * (2 * x.q[-1] + 2 * x.v[-1])


triton_attention, triton_attention_backward = define("triton_attention", _forward, _backward, _flops, _flops_backward)
