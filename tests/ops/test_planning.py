"""Plans: the numbers equal a brute-force count, and the choice is the one attend makes."""

from __future__ import annotations

import importlib.util
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import regard
from regard import attend
from regard.ops import patterns as P
from regard.ops.attention.planning import Plan
from regard.ops.backends.choice import BACKENDS
from regard.ops.calls.geometry import Geometry
from regard.ops.tiles.plan import tile_plan

from . import naive
from .cases import FASTEST, Case, cases


def plan_of(case: Case, backend: str = "auto") -> Plan:
    return regard.plan(
        case.pattern, case.grid, batch=case.batch, heads=case.heads, kv_heads=case.kv_heads, head_dim=case.dim,
        value_dim=case.value_dim, bias=case.table, backend=backend,
    )  # fmt: skip


@given(cases())
@settings(max_examples=60)
def test_attended_pairs_equal_a_brute_force_count(case):
    plan = plan_of(case)
    attended = int(naive.mask(case.pattern, case.grid, case.grid, case.batch, case.heads).sum())
    dense = case.batch * case.heads * math.prod(case.grid) ** 2
    assert plan.attended_pairs == attended
    assert plan.dense_pairs == dense
    assert plan.useful_flops == 2 * attended * (case.dim + case.value_dim)
    assert plan.waste == (plan.computed_pairs / attended if attended else math.inf)
    assert plan.bound == (dense / attended if attended else math.inf)
    assert plan.computed_pairs >= attended


@given(cases())
@settings(max_examples=40)
def test_flops_of_tiles_equal_those_torch_counts(case):
    call = dict(zip("qkv", (case.tensors(torch.float32)[name] for name in "qkv"), strict=True))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        try:
            attend(call["q"], call["k"], call["v"], case.pattern, backend=FASTEST)
        except ValueError:
            return
    case.table = False
    assert counter.get_total_flops() == plan_of(case, FASTEST).flops == plan_of(case, "tiled").flops


def test_computed_pairs_of_tiles_are_all_visited_once():
    """A tile computes queries times keys: counted from the index tables of the plan."""
    plan = tile_plan(Geometry.on("Neighborhood(5)", (9, 8)))
    visited = torch.zeros(72, 72, dtype=torch.long)
    for part in plan.parts:
        for group in part:
            for queries, keys in zip(group.queries, group.keys, strict=True):
                visited[torch.from_numpy(queries)[:, None], torch.from_numpy(keys)[None]] += 1
    assert visited.max() == 1
    assert (visited.bool() | ~P.Neighborhood(5).mask((9, 8))).all()
    assert int(visited.sum()) == plan.computed_pairs
    assert regard.plan("neighborhood(5)", (9, 8), backend="tiled").computed_pairs == plan.computed_pairs


@given(cases())
@settings(max_examples=40)
def test_the_plan_names_the_backend_that_runs(case):
    case.valid = False
    chosen = plan_of(case).backend.split(" + ")
    ran: set[str] = set()
    originals = {name: backend.run for name, backend in BACKENDS.items()}

    def spy(name):
        def run(call):
            ran.add(name)
            return originals[name](call)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name, backend in BACKENDS.items():
            patch.setattr(backend, "run", spy(name))
        case.sink = None
        with torch.no_grad():
            case.run(case.tensors(torch.float32), "auto", return_lse=False)
    assert ran == set(chosen)


def test_a_plan_prints_what_it_knows():
    plan = regard.plan("neighborhood(7)", (56, 56), batch=4, heads=4)
    text = str(plan)
    lines = dict(line.split("  ", 1) for line in text.splitlines())
    assert plan.backend == FASTEST
    assert plan.attended_pairs == 4 * 4 * 56 * 56 * 49
    assert plan.bound == 64.0
    assert f"{plan.attended_pairs:,}" in lines["attended pairs"]
    assert "64.00 x" in text
    assert "not dense" in text
    assert len({line.index(value.strip()) for line, value in zip(text.splitlines(), lines.values(), strict=True)}) == 1
    assert set(plan.others) == set(BACKENDS) - {FASTEST}
    assert json.loads(json.dumps(plan.as_dict()))["tile_bound"] == plan.tile_bound


def test_perfectly_tiled_patterns_waste_nothing():
    for pattern in ("window(7)", "grid(7)", "neighborhood(7, stride=7)"):
        plan = regard.plan(pattern, (28, 28), heads=2, backend="tiled")
        assert plan.waste == 1.0
        assert plan.bound == plan.tile_bound == 16.0
    assert regard.plan("axis(0) | axis(1)", (20, 30)).bound == pytest.approx(600 / 49)


def test_plans_of_devices_that_are_not_here():
    plan = regard.plan("neighborhood(7)", (56, 56), device="cuda", dtype=torch.bfloat16, training=True, bias=True)
    assert plan.backend == "tiled"
    assert ("bias" if importlib.util.find_spec("natten") else "not installed") in plan.others["natten"]
    with pytest.raises(ValueError, match="cannot run this call: no backward on CPU"):
        regard.plan("neighborhood(7)", (56, 56), training=True, backend="flex")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_plans_that_return_the_lse_store_no_weights(device):
    plan = regard.plan("dense", (64, 64), heads=4, dtype=torch.bfloat16, device=device, training=True, return_lse=True)
    if device == "cpu" and FASTEST == "native":
        assert (plan.backend, plan.reason) == ("native", "compiled for this CPU")
    else:
        assert (plan.backend, plan.reason) == ("tiled", "returns lse without storing the weights")


@given(cases(routed=False), st.booleans())
@settings(max_examples=60)
def test_classes_of_tiles_say_what_the_pattern_says_of_each_pair(case, other):
    """Every pair of every tile, by its class: visible, and at the offset of the bias table, as the pattern itself says."""
    rank = len(case.grid)
    if isinstance(case.pattern, P.PerHead):
        return
    zeros = tuple(case.pattern.zero_keys(axis, n, rank) for axis, n in enumerate(case.grid))
    biased = P.Neighborhood(3, 2) if other else case.pattern
    sizes = tuple(2 * biased.extent(axis, n, rank) + 1 for axis, n in enumerate(case.grid))
    plan = tile_plan(Geometry.on(case.pattern.spec, case.grid)._replace(table=(biased.spec, sizes)))
    if plan is None or plan.causal:
        return
    padded = [n + sum(pair) for n, pair in zip(case.grid, zeros, strict=True)]
    q_pos, k_pos = P.grid_positions(case.grid), P.grid_positions(padded, [-before for before, _ in zeros])
    expected = case.pattern.visible(q_pos[:, None], k_pos[None], case.grid, case.grid)
    index = torch.zeros_like(expected, dtype=torch.long)
    for axis, size in enumerate(sizes):
        steps = biased.offset(axis, q_pos[:, None, axis], k_pos[None, :, axis], case.grid[axis], rank)
        index = index * size + steps.clamp(-(size // 2), size // 2) + size // 2
    seen = torch.zeros_like(expected, dtype=torch.long)
    for group in (group for part in plan.parts for group in part):
        for queries, keys, kind in zip(group.queries, group.keys, group.kinds, strict=True):
            pairs = torch.from_numpy(queries)[:, None], torch.from_numpy(keys)[None]
            visible = torch.ones(1, 1, dtype=torch.bool) if group.mask is None else torch.from_numpy(group.mask[kind])
            visible = visible.expand(len(queries), len(keys))
            seen.index_put_(pairs, visible.long(), accumulate=True)
            assert (torch.from_numpy(group.offsets[kind]) == index[pairs])[visible].all()
    assert (seen == expected.long()).all()


@pytest.mark.parametrize("combined", [lambda p: p, lambda p: p | P.Window(2), lambda p: P.PerHead({p: 1})])
def test_tables_without_numbers_have_no_plan(combined):
    for pattern in (
        P.Blocks(torch.zeros(1, 4, 1, dtype=torch.long, device="meta"), 2),
        P.Clusters(torch.zeros(1, 8).long().to("meta")),
    ):
        with pytest.raises(ValueError, match="must hold numbers; got a tensor on meta"):
            regard.plan(combined(pattern), (8,))


@pytest.mark.slow
def test_a_plan_that_memory_does_not_hold_says_so():
    with pytest.raises(ValueError, match=r"no memory holds the tiles of Dense\(\) on \(16777216,\)"):
        regard.plan("dense", (1 << 24,), bias=True)


def test_backends_say_where_they_run():
    found = regard.backends()
    assert list(found) == ["reference", "dense", "tiled", "native", "triton", "flex", "natten"]
    assert [found[name] for name in ("reference", "dense", "tiled")] == [None] * 3
