"""Valid calls at random, each compared with the oracle: attention, sources, linear attention, merges, patterns, transforms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import regard
from regard import Source, attend, merge
from regard.ops import attend_weights
from regard.ops import patterns as P
from regard.ops.calls.source import HeadTable
from regard.ops.linear.attend import LinearState, linear_attend

from . import oracle
from .judging import TOLERANCES, Refused, Wrong, same
from .sets import ROUTED, Scene, Spec, build, choose, is_static, routed, separable, static, text

BACKENDS = ("auto", "auto", "native", "native", "tiled", "tiled", "dense", "reference")
DTYPES = (torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
LONGEST = {1: 24, 2: 6, 3: 4}
NO_WAY = "cannot run this call"
"""With these words a named backend refuses a call that others take."""


def check(rng: np.random.Generator) -> str:
    """Make and check one case; returns what it was."""
    sort = rng.random()
    if sort < 0.60:
        return attention(rng)
    if sort < 0.76:
        return linear(rng)
    if sort < 0.88:
        return transformed(rng)
    return facts(rng) if sort < 0.96 else merged(rng)


# --------------------------------------------------------------------------------------------------------------------
# tensors: what is drawn once, and the view of it that is given


View = Callable[[Tensor], Tensor]


def drawn(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype, size: float = 1.0) -> tuple[Tensor, View]:
    """Numbers, and a view that makes a tensor of ``shape`` of them: as they are, expanded, transposed, a part, or negated."""
    kind, view, base = rng.random(), (lambda t: t), shape
    if kind < 0.1:
        axis = int(rng.integers(len(shape)))
        base = (*shape[:axis], 1, *shape[axis + 1 :])
        view = lambda t: t.expand(shape)  # noqa: E731  # a view is a value here
    elif kind < 0.2:
        order = [int(a) for a in rng.permutation(len(shape))]
        base = tuple(shape[a] for a in order)
        view = lambda t: t.permute(*np.argsort(order).tolist())  # noqa: E731
    elif kind < 0.3:
        axis = int(rng.integers(len(shape)))
        base = (*shape[:axis], 2 * shape[axis] + 1, *shape[axis + 1 :])
        view = lambda t: t[(slice(None),) * axis + (slice(1, None, 2),)]  # noqa: E731
    elif kind < 0.35:
        view = torch._neg_view
    numbers = torch.from_numpy(rng.standard_normal(base) * size).to(dtype)
    return numbers, view


@dataclass
class Given:
    """Tensors of a case by name: what was drawn, and its view."""

    dtype: torch.dtype
    bases: dict[str, Tensor] = field(default_factory=dict)
    views: dict[str, View] = field(default_factory=dict)

    def add(self, rng: np.random.Generator, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
        self.bases[name], self.views[name] = drawn(rng, shape, dtype or self.dtype)

    def leaves(self, exact: bool, grad: bool) -> dict[str, Tensor]:
        made = {n: t.double() if exact else t.clone() for n, t in self.bases.items()}
        return {n: t.requires_grad_() for n, t in made.items()} if grad else made

    def seen(self, made: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.views[name](t) for name, t in made.items()}


# --------------------------------------------------------------------------------------------------------------------
# softmax attention


@dataclass
class Part:
    """One source of a case, in plain data."""

    spec: Spec
    scene: Scene
    prefix: str
    valid: Tensor | None = None
    heads: tuple[int, ...] | None = None
    as_text: bool = False

    def pattern(self) -> P.Pattern | str:
        return text(self.spec) if self.as_text else build(self.spec)

    def bias(self, made: dict[str, Tensor]) -> Any:
        if (table := made.get(f"{self.prefix}table")) is not None:
            return HeadTable(table, build(self.spec))
        return made.get(f"{self.prefix}bias")

    def source(self, made: dict[str, Tensor]) -> Source:
        p = self.prefix
        return Source(
            made[f"{p}k"], made[f"{p}v"], self.pattern(), q=made.get(f"{p}q"), bias=self.bias(made), valid=self.valid,
            heads=self.heads,
        )  # fmt: skip

    def asked(self, made: dict[str, Tensor]) -> oracle.Asked:
        p = self.prefix
        return oracle.Asked(
            self.scene, made[f"{p}k"], made[f"{p}v"], made.get(f"{p}q"), made.get(f"{p}bias"), made.get(f"{p}table"), self.spec,
            self.valid, self.heads,
        )  # fmt: skip


@dataclass
class Case:
    """An attention: its tensors, its sources and its options."""

    given: Given
    parts: list[Part]
    q_start: tuple[int, ...]
    scale: float | None
    sink: Any
    listed: bool
    backend: str

    def run(self, made: dict[str, Tensor], **options: Any) -> Any:
        made = self.given.seen(made)
        sink = made.get("sink", self.sink)
        options = {"q_start": self.q_start, "scale": self.scale, "sink": sink, "backend": self.backend, **options}
        if self.listed:
            return attend(made["q"], [part.source(made) for part in self.parts], **options)
        (part,) = self.parts
        return attend(
            made["q"], made["k"], made["v"], part.pattern(), bias=part.bias(made), valid=part.valid, **options
        )  # fmt: skip

    def right(self, made: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        made = self.given.seen(made)
        scale = made["q"].shape[-1] ** -0.5 if self.scale is None else self.scale
        sink = made.get("sink", None if self.sink is None else torch.tensor(float(self.sink), dtype=torch.float64))
        return oracle.attention(made["q"], [part.asked(made) for part in self.parts], scale, sink)

    def __str__(self) -> str:
        specs = [text(part.spec) if is_static(part.spec) else part.spec[0] for part in self.parts]
        grids = [(part.scene.q_grid, part.scene.k_grid) for part in self.parts]
        kind = str(self.given.dtype).removeprefix("torch.")
        return f"{self.backend} {kind} {' + '.join(specs)} on {grids} start {self.q_start} scale {self.scale}"


def grids(rng: np.random.Generator, rank: int) -> tuple[int, ...]:
    return tuple(int(n) for n in rng.integers(1, LONGEST[rank] + 1, rank))


def a_part(
    rng: np.random.Generator, given: Given, prefix: str, q_grid: tuple[int, ...], start: tuple[int, ...] | None,
    k_grid: tuple[int, ...], batch: int, heads: int, dims: tuple[int, int], listed: bool,
) -> Part:  # fmt: skip
    """A pattern that fits the grids, and its keys, values and biases."""
    rank, some = len(k_grid), None
    if listed and heads > 1 and rng.random() < 0.2:
        some = tuple(int(h) for h in rng.permutation(heads)[: int(rng.integers(1, heads + 1))])
    mine = heads if some is None else len(some)
    if len(q_grid) != rank or any(s + n > m for s, n, m in zip(start or (0,) * rank, q_grid, k_grid, strict=True)):
        names = ("tokens", "clusters") if len(q_grid) != rank else ROUTED  # these count tokens alone
        spec: Spec = ("dense", {})
        if rng.random() < 0.5 and not any(start or ()):
            spec = routed(rng, q_grid, k_grid, batch, mine, names)
    elif not any(start or ()) and rng.random() < 0.25:
        spec = routed(rng, q_grid, k_grid, batch, mine)
        if rng.random() < 0.4:
            # what goes with a table has no zero keys
            other = [s for s in (separable(rng, rank) for _ in range(3)) if "zero" not in s[1].values() and s[0] != "halo"]
            spec = (choose(rng, "union", "intersection"), (spec, other[0])) if other else spec
    elif mine > 1 and rng.random() < 0.15:
        first = int(rng.integers(1, mine))
        spec = ("per_head", ((static(rng, rank, 1), first), (static(rng, rank, 1), mine - first)))
    else:
        spec = static(rng, rank)
    scene = Scene(spec, q_grid, k_grid, start, batch, mine)
    kv = choose(rng, *[n for n in range(1, mine + 1) if mine % n == 0])
    given.add(rng, f"{prefix}k", (batch, *k_grid, kv, dims[0]))
    given.add(rng, f"{prefix}v", (batch, *k_grid, kv, dims[1]))
    part = Part(spec, scene, prefix, heads=some, as_text=is_static(spec) and bool(rng.random() < 0.2))
    if listed and some is None and rng.random() < 0.15:
        given.add(rng, f"{prefix}q", (batch, *q_grid, heads, dims[0]))
    kind = rng.random()
    bounded = spec[0] in ("neighborhood", "window", "halo", "grid", "axis", "causal", "dense") and len(q_grid) == rank
    if kind < 0.2:
        shape = tuple(choose(rng, 1, n) for n in (batch, mine, math.prod(q_grid), math.prod(k_grid)))
        given.add(rng, f"{prefix}bias", shape[int(rng.integers(0, 3)) :])
        if rng.random() < 0.3:
            base = given.bases[f"{prefix}bias"]
            base[torch.from_numpy(rng.random(tuple(base.shape)) < 0.3)] = (
                -torch.inf if given.views[f"{prefix}bias"] is not (torch._neg_view) else torch.inf
            )
    elif kind < 0.35 and bounded and spec[1].get("stride", 1) == 1:
        extents = [build(spec).extent(a, n, rank) for a, n in enumerate(k_grid)]
        given.add(rng, f"{prefix}table", (choose(rng, 1, mine), *(2 * e + 1 for e in extents)))
    if rng.random() < 0.25:
        part.valid = torch.from_numpy(rng.random((choose(rng, 1, batch), *k_grid)) < choose(rng, 0.0, 0.5, 0.8))
    return part


def a_case(rng: np.random.Generator, dtype: torch.dtype | None = None, single: bool = False) -> Case:
    rank, batch, heads = int(rng.integers(1, 4)), int(rng.integers(1, 3)), int(rng.integers(1, 5))
    dims = (choose(rng, 1, 2, 4, 8, 9), choose(rng, 1, 3, 4, 8, 17))
    k_grid, kind = grids(rng, rank), rng.random()
    q_grid, start = k_grid, (0,) * rank
    if kind < 0.15:  # a part of the grid asks
        start = tuple(int(rng.integers(0, n)) for n in k_grid)
        q_grid = tuple(int(rng.integers(1, n - s + 1)) for n, s in zip(k_grid, start, strict=True))
    elif kind < 0.25:  # queries on a grid of their own
        q_grid = grids(rng, choose(rng, 1, 2, 3))
        start = (0,) * len(q_grid)
    given = Given(dtype or choose(rng, *DTYPES))
    given.add(rng, "q", (batch, *q_grid, heads, dims[0]))
    if not single and kind >= 0.15 and rng.random() < 0.15:
        count, parts = int(rng.integers(1, 4)), []
        for i in range(count):
            own = k_grid if i == 0 or kind >= 0.6 else grids(rng, choose(rng, 1, 2, 3))
            parts.append(a_part(rng, given, f"{i}.", q_grid, start, own, batch, heads, dims, True))
    else:
        parts = [a_part(rng, given, "", q_grid, start, k_grid, batch, heads, dims, False)]
    listed = parts[0].prefix != ""
    sink = choose(rng, None, None, None, 0.4, -3, "each")
    if sink == "each":
        given.add(rng, "sink", (heads,), torch.float64 if given.dtype == torch.float64 else torch.float32)
        sink = None
    scale = choose(rng, None, None, None, 0.37, 1.5, 0.0, -0.7, -2)
    start = tuple(start)
    q_start: Any = start[0] if not any(start[1:]) and rng.random() < 0.5 else start
    return Case(given, parts, q_start, scale, sink, listed, choose(rng, *BACKENDS))


def refused(error: Exception, case: Case) -> None:
    """Whether a named backend does not claim the call; anything else is a fault."""
    if isinstance(error, ValueError) and NO_WAY in str(error) and case.backend != "auto":
        raise Refused(f"{case.backend} does not claim it")
    raise Wrong(f"a valid call raised {type(error).__name__}: {' '.join(str(error).split())[:160]}") from error


def attention(rng: np.random.Generator) -> str:
    case = a_case(rng)
    grad, lse = bool(rng.random() < 0.4), bool(rng.random() < 0.5)
    tolerance = TOLERANCES[case.given.dtype] * (1.0 if case.scale is None else 1.0 + abs(case.scale))
    exact = case.given.leaves(True, grad)
    right = case.right(exact)
    made = case.given.leaves(False, grad)
    shown = torch.ones((), dtype=torch.bool)
    if rng.random() < 0.15 and not grad and not case.listed:
        shown = poisoned(rng, case, made)
    try:
        found = case.run(made, return_lse=lse)
    except Exception as error:
        refused(error, case)
    out = found[0] if lse else found
    try:
        if out.dtype != case.given.dtype:
            raise Wrong(f"out: {out.dtype} for {case.given.dtype}")
        same("out", out, right[0], tolerance, shown)
        if lse:
            same("lse", found[1], right[1], max(tolerance / 4, 1e-12), shown.squeeze(-1) if shown.ndim else shown)
        if grad:
            weights = torch.from_numpy(rng.standard_normal(tuple(out.shape)))
            of_lse = torch.from_numpy(rng.standard_normal(tuple(right[1].shape))) if lse else None
            gradients(case, made, (out, found[1] if lse else None), exact, right, weights, of_lse, tolerance)
    except Wrong as wrong:
        raise Wrong(f"{wrong} | {case}") from None
    return f"attend {case.backend}{' gradient' if grad else ''}"


def poisoned(rng: np.random.Generator, case: Case, made: dict[str, Tensor]) -> Tensor:
    """Put NaN and infinity into some keys and values; returns the rows of queries that see none of them."""
    (part,) = case.parts
    scene, inside = part.scene, torch.from_numpy(part.scene.inside)
    views = case.given.views
    if views["k"](torch.zeros_like(case.given.bases["k"])).numel() != case.given.bases["k"].numel() or any(
        case.given.bases[n].numel() != views[n](case.given.bases[n]).numel() for n in ("k", "v")
    ):
        return torch.ones((), dtype=torch.bool)  # one number may stand for several keys here
    keys = math.prod(scene.k_grid)
    bad = torch.from_numpy(rng.random(keys) < 0.3)
    if part.valid is not None and rng.random() < 0.7:
        bad = bad & ~part.valid.flatten(1).any(0)
    for name in ("k", "v"):
        with torch.no_grad():
            flat = views[name](made[name])
            where = bad.view(1, *scene.k_grid, 1, 1).expand(flat.shape)
            flat.masked_fill_(where, float(choose(rng, math.nan, math.inf, -math.inf)))
    visible = part.asked(case.given.seen(case.given.leaves(True, False))).visible[..., inside]
    touched = (visible & bad).any(-1)  # (1 or batch, 1 or heads, queries)
    return ~touched.transpose(1, 2).unflatten(1, scene.q_grid).unsqueeze(-1)


def gradients(case: Case, made, found, exact, right, weights, of_lse, tolerance) -> None:
    def loss(out: Tensor, lse: Tensor | None) -> Tensor:
        value = (out.double() * weights).sum()
        if lse is None or of_lse is None:
            return value
        finite = right[1].isfinite()
        return value + (torch.where(finite, lse.double(), 0.0) * of_lse).sum()

    names = list(exact)
    expected = torch.autograd.grad(loss(*right), [exact[n] for n in names], allow_unused=True)
    computed = torch.autograd.grad(loss(*found), [made[n] for n in names], allow_unused=True)
    for name, left, wanted in zip(names, computed, expected, strict=True):
        wanted = torch.zeros_like(exact[name]) if wanted is None else wanted
        same(f"gradient of {name}", torch.zeros_like(wanted) if left is None else left, wanted, 2 * tolerance)


# --------------------------------------------------------------------------------------------------------------------
# transforms: right, or refused by name

TRANSFORMS = ("vmap", "jvp", "forward_ad", "grad", "vmap_grad", "jacrev", "double")


def transformed(rng: np.random.Generator) -> str:
    name = choose(rng, *TRANSFORMS)
    if rng.random() < 0.25:
        plain = Case(Given(torch.float64), [], (), None, None, False, choose(rng, "auto", "chunked", "naive"))
        shape = (int(rng.integers(1, 3)), int(rng.integers(1, 9)), 2, int(rng.integers(1, 5)))
        if rng.random() < 0.5:
            plain.given.dtype = torch.float32
        for each in "qkv":
            plain.given.add(rng, each, shape)
        ways = oracle.Linear(choose(rng, "relu", "elu_plus_one", "silu"), "none", causal=bool(rng.integers(2)))
        case: Case = plain

        def ours(q, k, v):
            q, k, v = case.given.seen({"q": q, "k": k, "v": v}).values()
            return linear_attend(q, k, v, feature=ways.feature, causal=ways.causal, backend=case.backend)

        def theirs(q, k, v):
            q, k, v = case.given.seen({"q": q, "k": k, "v": v}).values()
            return ways(q, k, v, None, None, [None, None, None])[0]

        label = f"linear {ways}"
    else:
        case = a_case(rng, choose(rng, torch.float32, torch.float64), single=True)

        def ours(q, k, v):
            return case.run({**case.given.leaves(False, False), "q": q, "k": k, "v": v})

        def theirs(q, k, v):
            return case.right({**case.given.leaves(True, False), "q": q, "k": k, "v": v})[0]

        label = str(case)
    plain_views = {
        name: (lambda t: t) for name, view in case.given.views.items() if view is torch._neg_view
    }  # vmap has no rule
    case.given.views |= plain_views
    exact, made = ([case.given.leaves(e, False)[n] for n in "qkv"] for e in (True, False))
    weights = None
    noise = [torch.from_numpy(rng.standard_normal(tuple(t.shape))) for t in made]

    def loss(function):
        def value(q, k, v):
            out = function(q, k, v)
            return (out.double().sin() * weights.to(out.device)).sum()

        return value

    weights = torch.from_numpy(rng.standard_normal(tuple(theirs(*exact).shape)))
    try:
        right = TAKE[name](theirs, loss(theirs), exact, noise)
        try:
            found = TAKE[name](ours, loss(ours), made, [n.to(case.given.dtype) for n in noise])
        except Exception as error:
            if NO_WAY in str(error) or (isinstance(error, (NotImplementedError, RuntimeError, ValueError)) and (
                'backend="reference"' in str(error) or "backend='reference'" in str(error) or "naive" in str(error)
            )):  # fmt: skip
                raise Refused(f"{name} refused by name") from None
            raise Wrong(f"{name} raised {type(error).__name__}: {' '.join(str(error).split())[:160]}") from error
        tolerance = 4 * TOLERANCES[case.given.dtype] * (1.0 if case.scale is None else 1.0 + abs(case.scale)) ** 2
        for i, (left, wanted) in enumerate(zip(found, right, strict=True)):
            same(f"{name} {i}", left, wanted, tolerance)
    except Wrong as wrong:
        raise Wrong(f"{wrong} | {label}") from None
    return f"transform {name}"


def _forward_ad(function, loss, tensors, noise):
    with torch.autograd.forward_ad.dual_level():
        out = function(*(torch.autograd.forward_ad.make_dual(t, n) for t, n in zip(tensors, noise, strict=True)))
        tangent = torch.autograd.forward_ad.unpack_dual(out).tangent
        return [torch.zeros_like(out) if tangent is None else tangent]


def _double(function, loss, tensors, noise):
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    first = torch.autograd.grad(loss(*tensors), tensors, create_graph=True)
    total = sum((g.double() * n.double()).sum() for g, n in zip(first, noise, strict=True))
    return [g if g is not None else torch.zeros_like(t) for g, t in
            zip(torch.autograd.grad(total, tensors, allow_unused=True), tensors, strict=True)]  # fmt: skip


def _stacked(tensors, noise):
    return [torch.stack([t, t + n]) for t, n in zip(tensors, noise, strict=True)]


TAKE: dict[str, Callable] = {
    "vmap": lambda f, loss, x, n: [torch.func.vmap(f)(*_stacked(x, n))],
    "jvp": lambda f, loss, x, n: list(torch.func.jvp(f, tuple(x), tuple(n))),
    "forward_ad": _forward_ad,
    "grad": lambda f, loss, x, n: torch.func.grad(loss, (0, 1, 2))(*x),
    "vmap_grad": lambda f, loss, x, n: torch.func.vmap(torch.func.grad(loss, (0, 1, 2)))(*_stacked(x, n)),
    "jacrev": lambda f, loss, x, n: [torch.func.jacrev(lambda q: f(q, *x[1:]).sum((0, -1)))(x[0])],
    "double": _double,
}


# --------------------------------------------------------------------------------------------------------------------
# linear attention


def linear(rng: np.random.Generator) -> str:
    dtype, backend = choose(rng, *DTYPES), choose(rng, "auto", "auto", "native", "chunked", "naive")
    batch, heads, dim, value_dim = (int(n) for n in rng.integers(1, (3, 4, 6, 7)))
    norm, causal = choose(rng, "none", "sum", "count"), bool(rng.integers(2))
    feature = choose(rng, "relu", "elu_plus_one") if norm == "sum" else choose(rng, *oracle.FEATURES)
    decays = choose(rng, None, None, "head", "feature", "token", "both")
    grid = choose(rng, (int(rng.integers(1, 40)),), grids(rng, 2))
    k_grid = grid if causal or decays else choose(rng, grid, grids(rng, 1))
    stateful = bool(rng.random() < 0.4) and (causal or not decays)
    grad = bool(rng.random() < 0.35)
    given = Given(dtype)
    for name, shape in (("q", (*grid, heads, dim)), ("k", (*k_grid, heads, dim)), ("v", (*k_grid, heads, value_dim))):
        given.add(rng, name, (batch, *shape))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if stateful:
        given.add(rng, "memory", (batch, heads, dim, value_dim), wide)
        if norm == "sum":
            given.add(rng, "total", (batch, heads, dim), wide)
            given.bases["total"], given.views["total"] = torch.rand(batch, heads, dim, dtype=wide) + 0.1, lambda t: t
    logs = None
    if decays:
        shape = {"head": (heads,), "feature": (heads, dim), "token": (batch, *grid, heads), "both": (batch, *grid, heads, dim)}
        logs = -torch.from_numpy(rng.exponential(choose(rng, 0.05, 0.5, 3.0), shape[decays])).to(wide)
        if rng.random() < 0.15 and decays == "token":
            logs[torch.from_numpy(rng.random(shape[decays]) < 0.1)] = -torch.inf
    valid = None
    if rng.random() < 0.3:
        valid = torch.from_numpy(rng.random((batch, *k_grid)) < choose(rng, 0.0, 0.6))
    seen_before = torch.from_numpy(rng.integers(0, 5, batch)).to(wide) if stateful and norm == "count" else None
    scale: Any = choose(rng, 1.0, 1.0, 0.3, torch.from_numpy(rng.standard_normal(heads)).to(wide))
    floor = choose(rng, None, 0.5) if norm == "sum" else None
    eps = choose(rng, 0.0, 0.1) if norm == "sum" else 0.0
    ways = oracle.Linear(feature, norm, floor, eps, causal, scale.double() if isinstance(scale, Tensor) else scale)

    exact, made = given.leaves(True, grad), given.leaves(False, grad)
    e, m = given.seen(exact), given.seen(made)
    flat_logs = logs if logs is None or logs.ndim <= 2 else logs.flatten(1, len(grid))
    before = [e.get("memory"), e.get("total"), None if seen_before is None else seen_before.double()]
    right, left_over, divisor = ways(
        *(e[n].flatten(1, -3) for n in "qkv"), None if flat_logs is None else flat_logs.double(),
        None if valid is None else valid.flatten(1), before,
    )  # fmt: skip
    label = f"{backend} {dtype} {ways} decay {decays} valid {valid is not None} state {stateful} on {grid} {k_grid} dim {dim}"
    least = float(divisor.detach().abs().masked_fill(divisor == 0, 1.0).min())
    if norm == "sum" and least < 1e-3:
        return "linear badly conditioned"
    tolerance = TOLERANCES[dtype] / min(1.0, least) * 2
    state = LinearState(m["memory"], m.get("total"), seen_before) if stateful else None
    returns = stateful or (rng.random() < 0.2 and (causal or not decays))
    try:
        found = linear_attend(
            m["q"], m["k"], m["v"], feature=feature, norm=norm, floor=floor, eps=eps, causal=causal, log_decay=logs,
            scale=scale,
            valid=valid, state=state, return_state=returns, chunk=choose(rng, 64, 64, 1, 4, 16), backend=backend,
        )  # fmt: skip
    except Exception as error:
        if NO_WAY in str(error) and backend == "native":
            raise Refused("native does not claim it") from None
        raise Wrong(f"a valid call raised {type(error).__name__}: {' '.join(str(error).split())[:160]} | {label}") from error
    try:
        y, after = found if returns else (found, None)
        same("linear out", y.flatten(1, -3), right, tolerance)
        if after is not None:
            narrow = max(TOLERANCES[dtype] / 10, 1e-9) if dtype in (torch.float32, torch.float64) else TOLERANCES[dtype]
            same("memory", after.memory, left_over[0], narrow)
            if norm == "sum":
                same("total", after.total, left_over[1], narrow)
            if norm == "count":
                same("keys", after.keys, left_over[2], 0.0)  # whole numbers
        if grad:
            weights = torch.from_numpy(rng.standard_normal(tuple(right.shape)))
            expected = torch.autograd.grad((right * weights).sum(), list(exact.values()), allow_unused=True)
            computed = torch.autograd.grad((y.flatten(1, -3).double() * weights).sum(), list(made.values()), allow_unused=True)
            for name, a, b in zip(exact, computed, expected, strict=True):
                zero = torch.zeros_like(exact[name])
                same(f"gradient of {name}", zero if a is None else a, zero if b is None else b, 3 * tolerance / min(1.0, least))
    except Wrong as wrong:
        raise Wrong(f"linear: {wrong} | {label}") from None
    return f"linear {backend}{' gradient' if grad else ''}"


# --------------------------------------------------------------------------------------------------------------------
# patterns as values, weights, plans, merges


def facts(rng: np.random.Generator) -> str:
    """The mask, the number of keys, the text form and the plan of a pattern; what is drawn of its weights."""
    case = a_case(rng, torch.float32, single=True)
    (part,) = case.parts
    scene, pattern = part.scene, build(part.spec)
    start = case.q_start if isinstance(case.q_start, tuple) else (case.q_start,) + (0,) * (len(scene.q_grid) - 1)
    if len(scene.q_grid) != len(scene.k_grid):
        return "pattern of other ranks"
    seen = torch.from_numpy(np.ascontiguousarray(scene.seen()[..., scene.inside]))
    try:
        found = pattern.mask(scene.q_grid, scene.k_grid, q_start=start)
        found = found if found.ndim == 4 else found[None, None]
        if not torch.equal(found.expand(seen.shape), seen.expand(torch.broadcast_shapes(found.shape, seen.shape))):
            raise Wrong("mask")
        degree = pattern.degree(scene.q_grid, scene.k_grid, start)
        wanted = seen.sum(-1).unflatten(-1, scene.q_grid)
        if not torch.equal(degree.expand(wanted.shape), wanted):
            raise Wrong("degree")
        if is_static(part.spec):
            for form in (pattern.spec, text(part.spec)):
                if P.parse(form) != pattern or hash(P.parse(form)) != hash(pattern):
                    raise Wrong(f"text {form}")
        if not any(start):
            planned = regard.plan(pattern, scene.q_grid, k_grid=scene.k_grid, heads=scene.heads, batch=scene.batch)
            pairs = int(seen.expand(scene.batch, scene.heads, -1, -1).sum())
            if planned.attended_pairs != pairs and is_static(part.spec):
                raise Wrong(f"plan: {planned.attended_pairs} pairs, right is {pairs}")
        if rng.random() < 0.3:
            weights(case)
    except Wrong as wrong:
        raise Wrong(f"{wrong} | {case}") from None
    except Exception as error:
        raise Wrong(f"facts raised {type(error).__name__}: {' '.join(str(error).split())[:160]} | {case}") from error
    return "pattern"


def weights(case: Case) -> None:
    """The weights times the values are the output, less what zero keys take."""
    made = case.given.leaves(False, False)
    seen, (part,) = case.given.seen(made), case.parts
    sink = seen.get("sink", case.sink)
    found = attend_weights(
        seen["q"], [part.source(seen)], scale=case.scale, sink=sink, q_start=case.q_start
    )  # fmt: skip
    (drawn_weights,) = found
    right, _ = case.right(case.given.leaves(True, False))
    v = seen["v"].flatten(1, -3).repeat_interleave(part.scene.heads // seen["v"].shape[-2], 2).double()
    shown = drawn_weights.double().flatten(3)
    same("weights", torch.einsum("bhqk,bkhd->bqhd", shown, v).unflatten(1, part.scene.q_grid), right, 1e-4)


def merged(rng: np.random.Generator) -> str:
    """Attention to parts of the keys, put together, is attention to all; also where a part shows nothing."""
    dtype = choose(rng, *DTYPES)
    shape, parts = (int(rng.integers(1, 3)), int(rng.integers(1, 7)), 2), int(rng.integers(1, 4))
    dim, keys = int(rng.integers(1, 5)), [int(n) for n in rng.integers(1, 5, parts)]
    scores = [torch.from_numpy(rng.standard_normal((*shape, n))) * choose(rng, 1.0, 30.0) for n in keys]
    values = [torch.from_numpy(rng.standard_normal((*shape, n, dim))) for n in keys]
    for score in scores:
        score[torch.from_numpy(rng.random(shape) < 0.3)] = -torch.inf
    outs, lses = [], []
    for score, value in zip(scores, values, strict=True):
        lse = score.logsumexp(-1)
        outs.append(torch.einsum("...k,...kd->...d", score.softmax(-1).nan_to_num(0.0), value).to(dtype))
        lses.append(lse.to(torch.float64 if dtype == torch.float64 else torch.float32))
    out, lse = merge(outs, lses)
    whole, every = torch.cat(scores, -1), torch.cat(values, -2)
    try:
        same("merged", out, torch.einsum("...k,...kd->...d", whole.softmax(-1).nan_to_num(0.0), every), TOLERANCES[dtype])
        same("merged lse", lse, whole.logsumexp(-1), 1e-5)
    except Wrong as wrong:
        raise Wrong(f"merge: {wrong} | {dtype}") from None
    return "merge"
