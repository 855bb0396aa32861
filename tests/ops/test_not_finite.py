"""Keys that a query does not see reach neither it nor its gradients, whatever they hold; those that it sees do.

The right values come from each query on its own: it gathers the keys that it sees, and knows of no others.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regard import attend
from regard.ops import patterns as P
from regard.ops.calls.source import HeadTable
from regard.ops.compiled import missing
from regard.ops.linear.attend import linear_attend

NATIVE = pytest.param("native", marks=pytest.mark.skipif(missing() is not None, reason=f"no compiled kernels: {missing()}"))
VALUES = [torch.nan, torch.inf, -torch.inf]

PATTERNS = [
    ((12,), P.Neighborhood(5)),
    ((12,), P.Window(4, shift=2)),
    ((6, 7), P.Neighborhood(3, border="mask")),
    ((5, 5), P.Grid(2) | P.Window(2)),
    ((6, 6), P.Axis(0) | P.Axis(1)),
    ((11,), P.Neighborhood(7, causal=True)),
    ((8, 8), P.Blocks(torch.tensor([[[0, 1], [1, -1], [2, 2], [-1, -1]]]), 4)),
    ((7, 7), P.Blocks(torch.tensor([[[[0, 3], [1, -1], [2, 2], [-1, -1]], [[1, 2], [0, 1], [-1, 3], [3, 3]]]]), (4, 4))),
]


def each_alone(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, tokens flat, of queries that gather what they see: ``seen (batch, heads, queries, keys)``."""
    q, k, v = (t.flatten(1, -3) for t in (q, k, v))
    group = q.shape[2] // k.shape[2]
    outs, lses = [], []
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for i in range(q.shape[1]):
                keys = seen[b, h, i].nonzero()[:, 0]
                scores = k[b, keys, h // group] @ q[b, i, h] * q.shape[-1] ** -0.5
                if bias is not None:
                    scores = scores + bias[h, i, keys]
                lses.append(torch.logsumexp(scores, 0) if len(keys) else scores.new_full((), -torch.inf))
                outs.append(torch.exp(scores - lses[-1]) @ v[b, keys, h // group])
    shape = (q.shape[0], q.shape[2], q.shape[1])
    return torch.stack(outs).view(*shape, -1).transpose(1, 2), torch.stack(lses).view(shape).transpose(1, 2)


def results(function, leaves: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Output, log-sum-exp and gradients of a loss of the outputs of some queries."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}
    out, lse = function(**leaves)
    out, lse = out.reshape(len(out), len(rows), *out.shape[-2:]), lse.reshape(len(out), len(rows), -1)
    weights = torch.linspace(-1, 1, out[:, rows].numel(), dtype=out.dtype).view(out[:, rows].shape)
    loss = (out[:, rows] * weights).sum() + lse[:, rows].masked_fill(lse[:, rows] == -torch.inf, 0.0).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"out": out, "lse": lse} | {f"gradient of {n}": g for n, g in zip(leaves, grads, strict=True)}


@pytest.mark.parametrize("backend", [NATIVE, "tiled"])
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize(("grid", "pattern"), PATTERNS, ids=repr)
@pytest.mark.parametrize("where", ["k", "v", "both, and a key that does not exist"])
def test_a_key_reaches_those_who_see_it_alone(where, grid, pattern, value, backend):
    generator = torch.Generator().manual_seed(5)
    tensors = {
        "q": torch.randn(2, *grid, 2, 8, generator=generator),
        "k": torch.randn(2, *grid, 1 if pattern.static else 2, 8, generator=generator),
        "v": torch.randn(2, *grid, 1 if pattern.static else 2, 6, generator=generator),
    }
    tokens = tensors["q"][0, ..., 0, 0].numel()
    valid = torch.ones(2, tokens, dtype=torch.bool)
    if "both" in where:
        valid[0, [1, 5]] = False
        for name in "kv":
            tensors[name].flatten(1, -3)[0, [1, 5]] = value
    for name in "kv":
        if name in where or "both" in where:
            tensors[name].flatten(1, -3)[0, 3, 0, 2] = value
    positions = torch.cartesian_prod(*map(torch.arange, grid)).view(tokens, len(grid))
    seen = pattern.visible(positions[:, None], positions[None], grid, grid)
    seen = seen.expand(2, 2, tokens, tokens) & valid[:, None, None]
    untouched = ~seen[0, :, :, 3].any(0)
    for rows in (torch.ones(tokens, dtype=torch.bool), untouched):
        found = results(
            lambda q, k, v: attend(q, k, v, pattern, valid=valid.view(2, *grid), return_lse=True, backend=backend),
            tensors,
            rows,
        )
        expected = results(lambda q, k, v: each_alone(q, k, v, seen, None), {n: t.double() for n, t in tensors.items()}, rows)
        for name, right in expected.items():
            left = found[name].double().reshape(right.shape)
            if name in ("out", "lse") or rows is untouched:
                torch.testing.assert_close(left, right, rtol=2e-4, atol=2e-5, equal_nan=True, msg=name)
            else:  # what is not finite may be NaN or infinite, but only where it is right
                assert left.isfinite().equal(right.isfinite()), name
        if rows is untouched:
            assert found["gradient of q"].flatten(1, -3)[:, rows].isfinite().all()


@pytest.mark.parametrize("backend", [NATIVE, "tiled"])
@pytest.mark.parametrize("value", VALUES)
def test_a_bias_that_is_not_finite_reaches_the_pairs_of_its_offset_alone(value, backend):
    """Entry 0 of the table, the offset that hidden pairs are given, belongs to pairs that some queries do see."""
    pattern, tokens = P.Window(3), 7
    generator = torch.Generator().manual_seed(5)
    tensors = {n: torch.randn(1, tokens, 2, 8, generator=generator) for n in "qkv"}
    tensors["table"] = torch.randn(2, 5, generator=generator)
    tensors["table"][0, 0] = value
    q_pos, k_pos = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    seen = (q_pos // 3 == k_pos // 3).expand(1, 2, tokens, tokens)
    offsets = (k_pos - q_pos).clamp(-2, 2) + 2
    if pattern.offset(0, torch.tensor(0), torch.tensor(2), tokens, 1) < 0:
        offsets = 4 - offsets
    if value == -torch.inf:  # which hides
        seen = seen & (torch.stack([offsets, offsets * 0 + 1]) != 0)[None]

    def run(q, k, v, table):
        return attend(q, k, v, pattern, bias=HeadTable(table, pattern), return_lse=True, backend=backend)

    found = results(run, tensors, torch.ones(tokens, dtype=torch.bool))
    expected = results(
        lambda q, k, v, table: each_alone(q, k, v, seen, table[:, offsets]),
        {n: t.double() for n, t in tensors.items()},
        torch.ones(tokens, dtype=torch.bool),
    )
    for name, right in expected.items():
        left = found[name].double().reshape(right.shape)
        if name in ("out", "lse"):
            torch.testing.assert_close(left, right, rtol=2e-4, atol=2e-5, equal_nan=True, msg=name)
        assert left.isfinite().equal(right.isfinite()), name


@pytest.mark.skipif(missing() is not None, reason=f"no compiled kernels: {missing()}")
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("where", ["k", "v", "kv"])
@pytest.mark.parametrize("decays", [False, True])
def test_causal_linear_attention_does_not_look_ahead(where, value, decays):
    """Nor at keys that do not exist: with zeros in their place the outputs and gradients of what is seen are the same."""
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, 150, 2, 9, generator=generator) for _ in range(3))
    log_decay = -torch.rand(2, 150, 2, generator=generator) if decays else None
    valid = torch.ones(2, 150, dtype=torch.bool)
    valid[:, 20:23] = False
    weights = torch.randn(q.shape, generator=generator)

    def run(value: float) -> list[Tensor]:
        leaves = [t.clone() for t in (q, k, v)]
        for name, leaf in zip("kv", leaves[1:], strict=True):
            if name in where:
                leaf[:, 20:23] = leaf[:, 141] = value
        leaves = [leaf.requires_grad_() for leaf in leaves]
        y = linear_attend(*leaves, feature="elu_plus_one", causal=True, valid=valid, log_decay=log_decay,
                          backend="native")  # fmt: skip
        early = y[:, :141]
        grads = torch.autograd.grad((early * weights[:, :141]).sum(), leaves)
        return [early, *(grad[:, :141] for grad in grads)]

    for found, expected in zip(run(value), run(0.0), strict=True):
        torch.testing.assert_close(found, expected)
