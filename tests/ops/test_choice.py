"""The choice between backends: the supporting one of least expected time, or the one that is asked for."""

from __future__ import annotations

import itertools

import pytest
import torch

import regard
from regard import Source
from regard.ops import patterns as P
from regard.ops.backends import choice, costs
from regard.ops.backends.base import Backend, Cost, choose, cost_of, flop, others
from regard.ops.calls.call import Call
from regard.ops.calls.lower import break_up
from regard.ops.compiled import missing

COMPILED = missing() is None


def call_of(pattern, grid=(8, 8), heads=2, dim=4, need_lse=False, dtype=torch.float32) -> Call:
    q = torch.zeros(1, *grid, heads, dim, dtype=dtype)
    (group,) = break_up(q, [Source(q, q, pattern)], scale=None, q_start=0, dropout=0.0, need_lse=need_lse)
    return group[0][1]


class Said(Backend[Call]):
    """A backend that says what it is told to."""

    passed_over = "slower"

    def __init__(self, name, time, problem=None, automatic=True):
        self.name, self._time, self._problem, self._automatic = name, time, problem, automatic

    def supports(self, call):
        return self._problem

    def automatic(self, call):
        return self._automatic

    def time(self, call):
        return self._time

    def cost(self, call):
        return Cost(1, 2, 3)

    def why_not(self, call, chosen):
        return f"{self.passed_over} than {chosen.bytes} bytes"


def among(*backends):
    return {b.name: b for b in backends}


def test_the_least_expected_time_of_those_that_support_the_call_is_chosen():
    call = call_of("window(4)")
    three = among(Said("a", 3.0), Said("b", 1.0, problem="only on Sundays"), Said("c", 2.0), Said("d", 0.1, automatic=False))
    assert choose(three, call).name == "c"
    assert choose(three, call, "d").name == "d"
    assert others(three, call, three["c"]) == {
        "a": "slower than 3 bytes", "b": "only on Sundays", "d": "slower than 3 bytes",
    }  # fmt: skip
    with pytest.raises(ValueError, match="backend 'b' cannot run this call: only on Sundays"):
        choose(three, call, "b")
    with pytest.raises(ValueError, match="backend must be one of auto, a, b, c, d; got 'e'"):
        choose(three, call, "e")


def test_of_those_that_take_the_same_time_the_last_on_the_list_is_chosen():
    call = call_of("window(4)")
    for order in itertools.permutations("abc"):
        assert choose(among(*(Said(name, 1.0) for name in order)), call).name == order[-1]


def test_a_backend_that_is_put_on_the_list_runs_and_is_planned(monkeypatch):
    class Zeros(Backend[Call]):
        name, passed_over = "zeros", "wrong"

        def time(self, call):
            return 0.0

        def cost(self, call):
            return cost_of(call, 5, extra=7)

        def run(self, call):
            return torch.zeros_like(call.q), None

        def reason(self, call):
            return "quick"

    monkeypatch.setitem(choice.BACKENDS, "zeros", Zeros())
    q = torch.randn(1, 8, 8, 2, 4)
    assert not regard.attend(q, q, q, "window(4)").any()
    made = regard.plan("window(4)", (8, 8), heads=2, head_dim=4)
    assert (made.backend, made.reason, made.computed_pairs) == ("zeros", "quick", 2 * 5)
    assert made.flops == 2 * 2 * 5 * (4 + 4)
    assert made.bytes == 4 * 4 * 64 * 2 * 4 + 7
    assert regard.plan("window(4)", (8, 8), backend="dense").others["zeros"] == "wrong"
    assert regard.backends()["zeros"] is None


@pytest.mark.parametrize("need_lse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pattern", ["dense", "window(4)", "window(7)", "neighborhood(5)", "axis(0) | axis(1)", "causal"])
def test_the_table_gives_the_rule_that_it_was_fitted_to(pattern, dtype, need_lse):
    """Compiled tiles where they save pairs or have much to do; else gathered tiles that save 1.4 times; else dense."""
    for grid, heads, dim in itertools.product([(8, 8), (14, 14), (20, 9)], (1, 8), (4, 64)):
        call = call_of(pattern, grid, heads, dim, need_lse, dtype)
        tiled, native = choice.BACKENDS["tiled"], choice.BACKENDS["native"]
        pairs, dense = tiled.cost(call).computed_pairs // heads, call.queries * call.keys
        if native.supports(call) is None and (pairs < dense or flop(call, pairs) >= 1e7):
            expected = "native"
        else:
            expected = "tiled" if 1.4 * pairs <= dense or need_lse else "dense"
        assert choose(choice.BACKENDS, call).name == expected


@pytest.mark.parametrize(("listed", "few"), [(2, True), (20, False)])
def test_keys_listed_for_single_queries_must_save_more(listed, few):
    table = torch.arange(listed).expand(1, 64, listed)
    call = call_of(P.Tokens(table))
    assert (costs.SINGLE * listed <= 64) == few
    fastest = "native" if COMPILED else "tiled"
    assert choose(choice.BACKENDS, call).name == (fastest if few else "dense")
    assert choose(choice.BACKENDS, call_of(P.Blocks(table, 1))).name == fastest
    if not few:
        assert choose(choice.BACKENDS, call_of(P.Tokens(table), need_lse=True)).name == "tiled"


def test_no_backend_imports_another_and_the_choice_names_none():
    import ast
    from pathlib import Path

    import regard.ops.backends as room

    folder = Path(room.__file__).parent
    backends = {"dense", "flex", "natten", "reference", "tiled", "native", "triton"}
    found = {}
    for path in folder.rglob("*.py"):
        if path.name == "choice.py":
            continue
        own, names = path.relative_to(folder).parts[0].removesuffix(".py"), set()
        depth = len(path.relative_to(folder).parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == depth:
                names |= {(node.module or "").split(".")[0], *(() if node.module else (alias.name for alias in node.names))}
        found[str(path)] = (names & backends) - {own}
    assert len(found) > 10
    assert not any(found.values()), found
    planning = (folder.parent / "attention" / "planning.py").read_text()
    assert not any(f'"{name}"' in planning for name in backends)
