"""Plans of linear attention: their FLOPs are those torch counts, and the backend is the one that runs."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from regard import plan_linear
from regard.ops.compiled import missing
from regard.ops.linear.attend import linear_attend
from regard.ops.linear.backends import BACKENDS

FASTEST = "native" if missing() is None else "chunked"
WAYS = list(itertools.product(("none", "sum", "count"), (True, False), ("none", "head", "token"), (4, 64)))


def decay_of(kind: str, q: torch.Tensor) -> torch.Tensor | None:
    shapes = {"head": q.shape[-2:-1], "feature": q.shape[-2:], "token": q.shape[:-1], "token and feature": q.shape}
    return None if kind == "none" else -torch.rand(shapes[kind])


@pytest.mark.parametrize(("norm", "causal", "decay", "chunk"), WAYS)
@pytest.mark.parametrize("backend", ["chunked", "auto"])
def test_flops_equal_those_torch_counts(norm, causal, decay, chunk, backend):
    q, k, v = torch.rand(2, 5, 7, 3, 6), torch.rand(2, 5, 7, 3, 6), torch.rand(2, 5, 7, 3, 9)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        options = {"feature": "relu", "norm": norm, "causal": causal, "chunk": chunk, "backend": backend}
        linear_attend(q, k, v, log_decay=decay_of(decay, q), **options)
    made = plan_linear((5, 7), batch=2, heads=3, head_dim=6, value_dim=9, decay=decay, **options)
    assert made.flops == counter.get_total_flops()


@pytest.mark.parametrize(("norm", "causal"), itertools.product(("none", "sum", "count"), (True, False)))
def test_flops_of_the_definition_equal_those_torch_counts(norm, causal):
    q, k, v = torch.rand(2, 11, 3, 6), torch.rand(2, 11, 3, 6), torch.rand(2, 11, 3, 9)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        linear_attend(q, k, v, norm=norm, causal=causal, backend="naive")
    made = plan_linear((11,), batch=2, heads=3, head_dim=6, value_dim=9, norm=norm, causal=causal, backend="naive")
    assert made.flops == counter.get_total_flops()
    assert made.computed_pairs == 2 * 3 * 11 * 11
    assert made.dense_flops == 2 * made.computed_pairs * (6 + 9)


def test_counts_of_a_plan():
    """By hand: batch 2, heads 3, 10 queries, 20 keys, width 4, values of 5."""
    made = plan_linear((10,), k_grid=(4, 5), batch=2, heads=3, head_dim=4, value_dim=5)
    assert made.flops == 2 * 2 * 3 * (10 + 20) * 4 * 5  # keys times values, queries times that
    assert made.bytes == 4 * 2 * 3 * (10 * 4 + 20 * 4 + 20 * 5 + 10 * 5)
    assert made.computed_pairs == 0
    assert made.dense_flops == 2 * 2 * 3 * 10 * 20 * (4 + 5)
    assert made.bound == made.as_dict()["bound"] == 3.0
    causal = plan_linear((10,), batch=2, heads=3, head_dim=4, value_dim=5, causal=True, chunk=4)
    assert causal.computed_pairs == 2 * 3 * 12 * 4  # three chunks of 4 hold 10 tokens
    assert causal.flops == 2 * 2 * 3 * 12 * (4 * (4 + 5) + 2 * 4 * 5)
    both = plan_linear((10,), batch=2, heads=3, head_dim=4, value_dim=5, decay="head", chunk=4)
    assert both.flops == 2 * causal.flops


@pytest.mark.parametrize("decay", ["none", "head", "feature", "token", "token and feature"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("causal", [True, False])
def test_the_plan_names_the_backend_that_runs(decay, dtype, causal, monkeypatch):
    made, ran = plan_linear((6, 3), heads=2, head_dim=4, dtype=dtype, causal=causal, decay=decay), []
    for name, backend in BACKENDS.items():
        monkeypatch.setattr(backend, "run", lambda call, name=name, run=backend.run: ran.append(name) or run(call))
    q = torch.rand(1, 6, 3, 2, 4, dtype=dtype)
    logs = decay_of(decay, q)
    linear_attend(q, q, q, causal=causal, log_decay=None if logs is None else logs.to(dtype))
    assert ran == [made.backend]
    assert made.backend == (FASTEST if dtype == torch.float32 and "feature" not in decay else "chunked")
    assert set(made.others) == set(BACKENDS) - {made.backend}


def test_plans_say_why():
    made = plan_linear((8, 8), device="cuda", dtype=torch.bfloat16)
    assert (made.backend, made.reason) == ("chunked", "linear in tokens, on any device")
    assert made.others["native"] == "compiled for CPUs; got cuda"
    assert made.others["naive"] == "computes all weights"
    with pytest.raises(ValueError, match="one decay per head, or per token and head; got \\(1, 2\\)"):
        plan_linear((8,), head_dim=2, decay="feature", backend="native")
    with pytest.raises(ValueError, match=r"k_grid\[0\] must be at least 1"):
        plan_linear((8,), k_grid=(0,))
    with pytest.raises(ValueError, match="decay must be one of none, head"):
        plan_linear((8,), decay="heads")
    with pytest.raises(ValueError, match="on one grid under causal or a decay"):
        plan_linear((8,), k_grid=(9,), causal=True)


def test_what_is_differentiated_in_another_way_takes_the_definition(monkeypatch):
    ran = []
    for name, backend in BACKENDS.items():
        monkeypatch.setattr(backend, "run", lambda call, name=name, run=backend.run: ran.append(name) or run(call))
    q = torch.rand(1, 6, 2, 4)
    torch.func.grad(lambda q: linear_attend(q, q, q).sum())(q)
    assert ran == ["naive"]
