"""Nothing of another shape, type or range than it says goes to C, and nothing empty; what is left then is right or an error."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from regard import Source, attend
from regard.ops import patterns as P
from regard.ops.backends import tiled
from regard.ops.backends.native import attention
from regard.ops.backends.native import backend as native
from regard.ops.backends.native.attention import TileSet
from regard.ops.calls.geometry import Geometry
from regard.ops.compiled import missing, pointers
from regard.ops.linear import native as linear
from regard.ops.linear.attend import linear_attend
from regard.ops.tiles.plan import tile_plan

COMPILED = pytest.mark.skipif(missing() is not None, reason=f"no compiled kernels: {missing()}")
FAST = [pytest.param("native", marks=COMPILED), "tiled"]


def one_wide_axes():
    """Unions in which an axis of a tile is one query and one key, which sees nothing in some classes of tiles."""
    yield (5, 5), P.Grid(2) | P.Window(2)
    yield (9,), P.Window(4) | P.Window(2, shift=1)
    yield (5, 7), P.Neighborhood(1, border="mask") | P.Window(2, shift=(0, 3))
    yield (1, 6), P.Grid(2) | P.Window(2)
    yield (4, 1, 5), P.Axis(2) | P.Grid(2) | P.Window(1)
    yield (5, 5), P.PerHead(((P.Grid(2) | P.Window(2), 1), (P.Dense(), 1)))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("grid", "pattern"), one_wide_axes(), ids=repr)
def test_unions_with_tiles_that_are_one_wide_equal_the_definition(grid, pattern, kind, backend):
    q, k, v, weights = (torch.randn(1, *grid, 2, 4) for _ in range(4))
    other = Source(torch.randn(1, *(2 for _ in grid), 2, 4).to(kind), torch.randn(1, *(2 for _ in grid), 2, 4).to(kind))
    found = []
    for name in (backend, "reference"):
        leaves = [t.to(kind).requires_grad_() for t in (q, k, v)]
        out, lse = attend(leaves[0], [Source(*leaves[1:], pattern), other], return_lse=True, backend=name)
        grads = torch.autograd.grad((out.float() * weights).sum() + lse.sum(), leaves)
        found.append([out, lse, *grads])
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if kind == torch.float32 else {"rtol": 4e-2, "atol": 8e-2}
    torch.testing.assert_close(*found, **tolerance)


@pytest.mark.parametrize("spec", ["grid(2)|window(2)", "window(2)|grid(3)|neighborhood(1)", "axis(0)|window(1)"])
@pytest.mark.parametrize("grid", [(5, 5), (1, 4), (7, 1)])
def test_masks_are_of_all_pairs(spec, grid):
    plan = tile_plan(Geometry.on(spec, grid))
    assert plan is not None
    for part in plan.parts:
        queries = torch.cat([torch.from_numpy(group.queries).flatten() for group in part])
        assert queries.sort().values.equal(torch.arange(grid[0] * grid[1]))
        for group in part:
            shape = (group.kinds.max() + 1, group.queries.shape[1], group.keys.shape[1])
            assert group.mask is None or group.mask.shape == shape


@pytest.mark.parametrize("backend", ["reference", "dense", *FAST, "auto"])
@pytest.mark.parametrize("heads", [(), (2,)])
@pytest.mark.parametrize("pattern", [lambda t: P.Blocks(t(4), (4, 4)), lambda t: P.Tokens(t(49))], ids=["Blocks", "Tokens"])
def test_a_table_that_lists_nothing_shows_nothing(pattern, heads, backend):
    pattern = pattern(lambda rows: torch.zeros(1, *heads, rows, 0, dtype=torch.long))
    q, k, v = (torch.randn(2, 7, 7, 2, 8, requires_grad=True) for _ in range(3))
    out, lse = attend(q, k, v, pattern, return_lse=True, backend=backend)
    assert not out.any()
    assert (lse == -torch.inf).all()
    assert not attend(q, k, v, pattern, backend=backend).any()
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert not grad.any()


@pytest.mark.parametrize("operators", [
    pytest.param((native.native_attention, native.native_attention_backward), marks=COMPILED),
    (tiled.tiled_attention, tiled.tiled_attention_backward),
], ids=["native", "tiled"])  # fmt: skip
def test_an_empty_batch_gives_an_empty_result(operators):
    forward, backward = operators
    q, k, v = (torch.zeros(0, 6, 7, 2, d) for d in (8, 8, 5))
    table = torch.ones(2, 5, 5)
    static = [[], "window(3)", "window(3)", [0, 0], [0, 0, 0, 0], 1.0]
    out, lse = forward(q, k, v, table, None, None, *static, True)
    assert out.shape == (0, 6, 7, 2, 5)
    assert lse.shape == (0, 6, 7, 2)
    *grads, grad_table = backward(out, lse, q, k, v, table, None, None, out, lse, *static, True)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]
    assert grad_table.shape == table.shape
    assert not grad_table.any()


@pytest.mark.parametrize("operator", [pytest.param(native.native_attention, marks=COMPILED), tiled.tiled_attention])
@pytest.mark.parametrize("entry", [-2, -(2**40), 4, 2**40])
def test_a_table_that_names_what_is_not_there_is_refused_before_it_is_gathered(operator, entry):
    q = torch.randn(1, 8, 8, 2, 4)
    table = torch.zeros(1, 1, 4, 2, dtype=torch.long)
    table[0, 0, 1, 1] = entry
    with pytest.raises(ValueError, match=str(entry)):
        operator(q, q, q, None, None, table, [4, 4], "", "", [0, 0], [0, 0, 0, 0], 1.0, True)


def tile_set(**changes) -> TileSet:
    queries, keys = torch.arange(6).view(2, 3), torch.arange(8).view(1, 1, 2, 4)
    lists = {"queries": queries, "keys": keys, "kinds": torch.zeros(2, dtype=torch.long)}
    return TileSet(**(lists | changes))


@COMPILED
@pytest.mark.parametrize("changes", [
    {"queries": torch.zeros(2, 0, dtype=torch.long)},
    {"queries": torch.full((2, 3), -1)},
    {"queries": torch.zeros(2, 3, dtype=torch.int32)},
    {"queries": torch.zeros(3, 2, dtype=torch.long).T},
    {"keys": torch.zeros(1, 1, 3, 4, dtype=torch.long)},
    {"keys": torch.zeros(1, 1, 2, 0, dtype=torch.long)},
    {"kinds": torch.zeros(3, dtype=torch.long)},
    {"kinds": torch.zeros(2, dtype=torch.long), "bias": torch.zeros(1, 1, 1, 16)},
    {"kinds": torch.ones(2, dtype=torch.long), "bias": torch.zeros(1, 1, 3, 16)},
    {"bias": torch.zeros(1, 1, 3, 3)},
    {"seen": torch.ones(1, 1, 2, 3, dtype=torch.bool)},
    {"seen": torch.ones(1, 2, 2, 4, dtype=torch.bool)},
    {"seen": torch.ones(1, 1, 2, 4)},
], ids=str)  # fmt: skip
def test_tiles_that_do_not_go_together_are_refused(changes):
    if "bias" in changes and changes["bias"].shape[3] == 16:
        changes = changes | {"bias": changes["bias"][..., : attention.lanes()].contiguous()}
    with pytest.raises(ValueError, match=r"got|must|classes|exist"):
        tile_set(**changes)


@COMPILED
@pytest.mark.parametrize(("name", "wrong"), [
    ("q", torch.zeros(1, 5, 2, 4)),  # the tiles name query 5
    ("k", torch.zeros(1, 7, 2, 4)),
    ("k", torch.zeros(1, 8, 2, 5)),
    ("k", torch.zeros(1, 8, 0, 4)),
    ("k", torch.zeros(2, 8, 2, 4)),
    ("v", torch.zeros(1, 7, 2, 4)),
    ("v", torch.zeros(1, 8, 2, 4, dtype=torch.bfloat16)),
    ("q", torch.zeros(1, 6, 2, 4, dtype=torch.float64)),
    ("q", torch.zeros(1, 6, 2, 8)[..., ::2]),
    ("q", torch.zeros(0, 6, 2, 4)),
    ("out", torch.zeros(1, 6, 2, 3)),
    ("out", torch.zeros(1, 6, 2, 4, dtype=torch.float64)),
    ("lse", torch.zeros(1, 6, 1)),
    ("lse", torch.zeros(1, 6, 2, dtype=torch.float64)),
], ids=lambda value: f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else value)  # fmt: skip
def test_tensors_that_do_not_go_with_their_tiles_are_refused(name, wrong):
    tensors = {"q": torch.zeros(1, 6, 2, 4), "k": torch.zeros(1, 8, 2, 4), "v": torch.zeros(1, 8, 2, 4)}
    tensors |= {"out": torch.zeros(1, 6, 2, 4), "lse": torch.zeros(1, 6, 2)}
    tiles = tile_set()
    attention.attend(*(tensors[n] for n in "qkv"), tiles, 1.0, tensors["out"], tensors["lse"], False)
    tensors[name] = wrong
    with pytest.raises(ValueError, match=r"must|there are|got"):
        attention.attend(*(tensors[n] for n in "qkv"), tiles, 1.0, tensors["out"], tensors["lse"], False)


@pytest.mark.parametrize("wrong", [
    torch.zeros(2, 3, 1, 4, device="meta"),
    torch.zeros(2, 3, 1, 4).double(),
    torch.zeros(2, 3, 1, 5),
    torch.zeros(2, 3, 4),
    torch.zeros(2, 3, 1, 8)[..., ::2],
    torch.zeros(2, 3, 1, 1).expand(2, 3, 1, 4),
    torch._neg_view(torch.zeros(2, 3, 1, 4)),
], ids=str)  # fmt: skip
def test_no_address_is_taken_of_what_is_not_as_it_is_said_to_be(wrong):
    for taken in (pointers.rows, pointers.block):
        taken("it", torch.zeros(2, 3, 1, 4), (2, 3, 1, 4), pointers.SINGLE)
        with pytest.raises(ValueError, match=r"it of a compiled kernel must be float32 \(2, 3, 1, 4\) on a CPU"):
            taken("it", wrong, (2, 3, 1, 4), pointers.SINGLE)
        with pytest.raises(ValueError, match="no axis empty"):
            taken("it", torch.zeros(2, 0, 1, 4), (2, 0, 1, 4), pointers.SINGLE)


@COMPILED
def test_rows_of_one_number_may_have_any_step():
    q, k, v = (torch.randn(1, 6, 2, 1, 3)[..., 1] for _ in range(3))
    assert q.stride(3) == 3
    found, expected = (attend(q, k, v, "window(3)", backend=name) for name in ("native", "reference"))
    torch.testing.assert_close(found, expected)
    found, expected = (linear_attend(q, k, v, causal=True, backend=name) for name in ("native", "naive"))
    torch.testing.assert_close(found, expected)


@COMPILED
def test_tiles_for_another_batch_are_refused():
    q, k = torch.zeros(2, 6, 2, 4), torch.zeros(2, 8, 2, 4)
    tiles = replace(tile_set(), seen=torch.ones(3, 1, 2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="do not broadcast"):
        attention.attend(q, k, k, tiles, 1.0, torch.zeros_like(q), None, False)


@COMPILED
@pytest.mark.parametrize("changes", [
    {"state": torch.zeros(1, 2, 1, 16)},
    {"state": torch.zeros(1, 2, 64, 17)},
    {"state": torch.zeros(1, 2, 64, 16, dtype=torch.float64)},
    {"decay": torch.zeros(3)},
    {"decay": torch.zeros(1, 7, 2)},
    {"valid": torch.ones(1, 7, dtype=torch.bool)},
    {"valid": torch.ones(2, 8, dtype=torch.bool)},
    {"k": torch.zeros(1, 7, 2, 64)},
    {"v": torch.zeros(1, 8, 1, 16)},
    {"v": torch.zeros(1, 8, 2, 16, dtype=torch.float16)},
], ids=str)  # fmt: skip
def test_linear_scans_of_tensors_that_do_not_go_together_are_refused(changes):
    tensors = {"q": torch.zeros(1, 8, 2, 64), "k": torch.zeros(1, 8, 2, 64), "v": torch.zeros(1, 8, 2, 16)}
    tensors |= {"decay": torch.zeros(1, 8, 2), "state": torch.zeros(1, 2, 64, 16), "valid": torch.ones(1, 8, dtype=torch.bool)}
    linear.scan(**tensors, activation="none", chunk=64)
    with pytest.raises(ValueError, match="must be"):
        linear.scan(**(tensors | changes), activation="none", chunk=64)


@COMPILED
def test_a_memory_of_another_width_is_refused():
    q = torch.zeros(1, 8, 2, 6)
    with pytest.raises(ValueError, match="must be"):
        linear.read(q, torch.zeros(1, 2, 5, 4), None, None, 0.0, "none")
    with pytest.raises(ValueError, match="must be"):
        linear.read(q, torch.zeros(1, 2, 6, 4), torch.zeros(1, 2, 5), None, 0.0, "none")


@COMPILED
@pytest.mark.slow
def test_steps_beyond_32_bits_are_followed():
    """Tokens that lie 2^30 numbers apart: the memory between them is reserved and never touched."""
    numbers = 5 * 2**30
    try:
        memory = torch.empty(numbers, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"10 GB of addresses are not to be had: {error}")
    far = memory.as_strided((1, 5, 1, 8), (0, 2**30, 8, 1))
    near = torch.randn(1, 5, 1, 8).bfloat16()
    far.copy_(near)
    found = attend(far, far, far, "window(3)", backend="native")
    torch.testing.assert_close(found, attend(near, near, near, "window(3)", backend="native"), rtol=0, atol=0)  # the same sums
