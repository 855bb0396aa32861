"""Random attentions for hypothesis, and the comparison of what two backends make of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor

from regard import attend
from regard.ops import patterns as P
from regard.ops.calls.source import HeadTable
from regard.ops.compiled import missing

FASTEST = "native" if missing() is None else "tiled"
"""The backend on tiles that is chosen on a CPU, for float32 and below."""


@dataclass
class Case:
    """Arguments of one attention; tensors are made from ``seed``, so that every backend gets its own copy."""

    grid: tuple[int, ...]
    pattern: P.Pattern
    heads: int = 1
    kv_heads: int = 1
    dim: int = 4
    value_dim: int = 4
    batch: int = 2
    table: bool = False
    valid: bool = False
    scale: float | None = None
    sink: float | None = None
    seed: int = 0
    options: dict = field(default_factory=dict)

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

        tensors = {
            "q": normal(self.batch, *self.grid, self.heads, self.dim),
            "k": normal(self.batch, *self.grid, self.kv_heads, self.dim),
            "v": normal(self.batch, *self.grid, self.kv_heads, self.value_dim),
        }
        if self.table:
            extents = [self.pattern.extent(axis, n, len(self.grid)) for axis, n in enumerate(self.grid)]
            tensors["table"] = normal(self.heads, *[2 * e + 1 for e in extents])
        return tensors

    def mask(self) -> Tensor | None:
        if not self.valid:
            return None
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.rand(self.batch, *self.grid, generator=generator) > 0.4

    def run(self, tensors: dict[str, Tensor], backend: str, return_lse: bool = True):
        table = HeadTable(tensors["table"], self.pattern) if self.table else None
        return attend(
            tensors["q"], tensors["k"], tensors["v"], self.pattern, bias=table, valid=self.mask(), scale=self.scale,
            sink=self.sink, return_lse=return_lse, backend=backend,
        )  # fmt: skip


def sizes(rank: int):
    """Grids of at most about 150 tokens, with axes of one and primes among them."""
    longest = {1: 41, 2: 13, 3: 6}[rank]
    return st.tuples(*[st.integers(1, longest)] * rank)


def per_axis(values, rank: int):
    """A number for all axes, or one for each."""
    return st.one_of(values, st.tuples(*[values] * rank))


@st.composite
def neighborhoods(draw, rank: int) -> P.Neighborhood:
    border = draw(st.sampled_from(("shift", "shift", "mask", "zero")))
    kernel = draw(st.tuples(*[st.integers(1, 7)] * rank))
    dilation = draw(per_axis(st.integers(1, 3), rank))
    if border == "zero":
        return P.Neighborhood(kernel, dilation, border=border)
    stride = tuple(draw(st.integers(1, k)) for k in kernel)
    causal = draw(per_axis(st.booleans(), rank))
    return P.Neighborhood(kernel, dilation, stride, causal, border)


def separable(rank: int):
    size = per_axis(st.integers(1, 6), rank)
    return st.one_of(
        neighborhoods(rank),
        st.builds(P.Window, size, per_axis(st.integers(0, 5), rank), st.sampled_from(("mask", "zero"))),
        st.builds(P.Halo, size, per_axis(st.integers(0, 3), rank), st.sampled_from(("zero", "mask", "shift"))),
        st.builds(P.Grid, size),
        st.builds(P.Axis, st.integers(-rank, rank - 1), st.booleans()),
    )


def static(rank: int):
    """Separable patterns, raster order, everything, and unions and intersections of two or three."""
    one = st.one_of(separable(rank), st.just(P.Dense()))
    two = st.builds(lambda a, b, both: a & b if both else a | b, one, one, st.booleans())
    three = st.builds(lambda a, b, both: a & b if both else a | b, two, one, st.booleans())
    return st.one_of(separable(rank), separable(rank), two, three, st.just(P.Dense()), st.just(P.Causal()))


@st.composite
def blocks(draw, grid: tuple[int, ...], batch: int, heads: int) -> P.Blocks:
    """Tables with holes, repetitions and partial blocks, shared or not over batch and heads."""
    size = draw(per_axis(st.integers(1, 5), len(grid)))
    number = math.prod(-(-n // (size[a] if isinstance(size, tuple) else size)) for a, n in enumerate(grid))
    listed = draw(st.integers(1, 4))
    shape = [draw(st.sampled_from((1, batch))), number, listed]
    if draw(st.booleans()):
        shape.insert(1, draw(st.sampled_from((1, heads))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return P.Blocks(torch.randint(-1, number, shape, generator=generator), size)


@st.composite
def listed_tokens(draw, grid: tuple[int, ...], batch: int, heads: int) -> P.Tokens:
    """Lists of keys for every query, with holes and repetitions, shared or not over batch and heads."""
    tokens = math.prod(grid)
    shape = [draw(st.sampled_from((1, batch))), draw(st.sampled_from((1, heads))), tokens, draw(st.integers(1, 5))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return P.Tokens(torch.randint(-1, tokens, shape, generator=generator))


@st.composite
def clusters(draw, grid: tuple[int, ...], batch: int, heads: int) -> P.Clusters:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    shape = [draw(st.sampled_from((1, batch))), math.prod(grid)]
    if draw(st.booleans()):
        shape.insert(1, draw(st.sampled_from((1, heads))))
    return P.Clusters(torch.randint(0, 4, shape, generator=generator))


@st.composite
def cases(draw, routed: bool | None = None) -> Case:
    rank = draw(st.integers(1, 3))
    grid = draw(sizes(rank))
    kv_heads = draw(st.integers(1, 2))
    heads = kv_heads * draw(st.integers(1, 2))
    batch = draw(st.integers(1, 2))
    routed = draw(st.booleans()) if routed is None else routed
    if routed:
        kind = st.one_of(blocks(grid, batch, heads), listed_tokens(grid, batch, heads), clusters(grid, batch, heads))
        pattern = draw(st.one_of(kind, kind, st.builds(lambda a, b: a | b, kind, st.builds(P.Grid, st.integers(1, 3)))))
    elif heads > 1 and draw(st.integers(0, 3)) == 0:
        pattern = P.PerHead(((draw(static(rank)), 1), (draw(static(rank)), heads - 1)))
    else:
        pattern = draw(static(rank))
    bounded = isinstance(pattern, (P.Window, P.Neighborhood, P.Halo, P.Grid, P.Axis))
    return Case(
        grid, pattern, heads, kv_heads, dim=draw(st.sampled_from((1, 4, 5))), value_dim=draw(st.sampled_from((2, 4, 7))),
        batch=batch, table=bounded and draw(st.booleans()), valid=draw(st.integers(0, 3)) == 0,
        scale=draw(st.sampled_from((None, 0.37))), sink=draw(st.sampled_from((None, None, 0.4))), seed=draw(st.integers(0, 99)),
    )  # fmt: skip


def results(case: Case, backend: str, dtype: torch.dtype, lse_gradient: bool, exact: bool = False) -> dict[str, Tensor]:
    """Output, lse and all gradients, in float64. With ``exact``, computed in float64 from tensors of ``dtype``."""
    tensors = case.tensors(dtype)
    if exact:
        tensors = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    out = case.run(tensors, backend, return_lse=lse_gradient)
    out, lse = out if lse_gradient else (out, None)
    generator = torch.Generator().manual_seed(case.seed + 2)
    loss = (out.double() * torch.randn(out.shape, generator=generator, dtype=torch.float64)).sum()
    if lse is not None:
        weights = torch.randn(lse.shape, generator=generator, dtype=torch.float64)
        loss = loss + (lse.double() * weights).masked_fill(lse == -torch.inf, 0.0).sum()
    grads = torch.autograd.grad(loss, list(tensors.values()))
    found = {"out": out, **{f"gradient of {name}": g for name, g in zip(tensors, grads, strict=True)}}
    if lse is not None:
        found["lse"] = lse
    return {name: t.detach().double() for name, t in found.items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Largest error at most ``tolerance`` times the largest value (at least 1); rows that see nothing agree exactly."""
    for name, right in expected.items():
        left = found[name]
        assert left.shape == right.shape, name
        assert left.isfinite().equal(right.isfinite()), name
        left, right = left.nan_to_num(neginf=0.0), right.nan_to_num(neginf=0.0)
        error = (left - right).abs().max().item() / max(1.0, right.abs().max().item())
        assert error <= tolerance, f"{name}: {error:.2e}"
