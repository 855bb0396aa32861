"""The Triton backend under the interpreter: it equals the reference in output, log-sum-exp and all gradients."""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from regard import Source, attend, plan
from regard.ops import patterns as P
from regard.ops.backends.triton import backend, boxes
from regard.ops.calls.geometry import Geometry

from .cases import Case, assert_equal, cases, results, static
from .interpreted import HERE, TRITON, run_interpreted

SMALL = ((16, 16, 4), (32, 16, 4), (16, 32, 4))
"""Tiles and boxes so small that a test's grid has full boxes, partial ones and several tiles on an axis."""

INSIDE = pytest.mark.skipif(not HERE, reason="runs in a process of its own, with TRITON_INTERPRET=1")


@pytest.fixture
def small(monkeypatch):
    for sizes in backend.SIZES.values():
        for kind in sizes:
            monkeypatch.setitem(sizes, kind, ((256, SMALL),))


@pytest.fixture
def descriptors(monkeypatch):
    monkeypatch.setattr(backend, "DESCRIPTORS", True)


@pytest.fixture
def launched(monkeypatch):
    """Whether each launch that reads boxes of keys does so by descriptors."""
    seen: list[bool] = []
    launch = backend._launch

    def note(kernel, programs, arguments, constants, warps):
        if "DESCRIBED" in constants:
            seen.append(constants["DESCRIBED"])
        launch(kernel, programs, arguments, constants, warps)

    monkeypatch.setattr(backend, "_launch", note)
    return seen


@TRITON
@pytest.mark.skipif(HERE, reason="this is that process")
@pytest.mark.parametrize("only", ["float32", pytest.param("routed or float16 or device", marks=pytest.mark.slow)])
def test_kernels_under_the_interpreter(only):
    run_interpreted(__file__, only)


GROUPED = {"heads": 2, "kv_heads": 1}

WINDOWS = [
    ((23,), P.Neighborhood(7), {"table": True}),
    ((25,), P.Neighborhood(5, dilation=2, causal=True, stride=2), {"heads": 4, "kv_heads": 2}),
    ((1,), P.Neighborhood(3), {"table": True}),
    ((50,), P.Causal(), {"dim": 20, "value_dim": 12}),
    ((40,), P.Dense(), {"valid": True}),
    ((8, 7), P.Neighborhood((3, 5), dilation=(2, 1)), {"table": True, **GROUPED}),
    ((12, 12), P.Neighborhood(9), {}),
    ((9, 11), P.Neighborhood((5, 7), stride=(2, 3), causal=(False, True)), {"valid": True}),
    ((7, 10), P.Neighborhood(5, border="zero"), {"table": True}),
    ((10, 9), P.Window(4, shift=2), {"table": True}),
    ((9, 10), P.Window((3, 4), shift=(1, 2), pad="zero"), {}),
    ((8, 10), P.Halo(4, 1), {"table": True}),
    ((7, 9), P.Grid(3), {"table": True}),
    ((4, 20), P.Axis(1, causal=True), {}),
    ((3, 4, 6), P.Neighborhood((3, 1, 3), dilation=(1, 1, 2), causal=(True, False, False)), {"table": True}),
    ((6, 3, 4), P.Neighborhood(3), {}),
]


def case_of(grid, pattern, options) -> Case:
    return Case(grid, pattern, **{"batch": 1, "dim": 16, "value_dim": 16, **options})


@TRITON
@INSIDE
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("grid", "pattern", "options"), WINDOWS, ids=repr)
def test_equals_reference_in_float32(grid, pattern, options):
    case = case_of(grid, pattern, options)
    expected = results(case, "reference", torch.float32, True, exact=True)
    assert_equal(results(case, "triton", torch.float32, True), expected, 1e-5)


@TRITON
@INSIDE
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("grid", "pattern", "options"), [WINDOWS[5], WINDOWS[8]], ids=repr)
def test_equals_reference_in_float16(grid, pattern, options):
    case = case_of(grid, pattern, options)
    expected = results(case, "reference", torch.float16, True, exact=True)
    assert_equal(results(case, "triton", torch.float16, True), expected, 4e-3)


DESCRIBED = [
    ((29,), P.Neighborhood(5, dilation=2, causal=True, stride=2), torch.float32, {}),
    ((6, 7), P.Neighborhood((3, 5), dilation=(2, 1)), torch.float16, GROUPED),
    ((2, 3, 5), P.Neighborhood(3, dilation=(1, 1, 2)), torch.float32, {"batch": 2, "table": True}),
]


@TRITON
@INSIDE
@pytest.mark.usefixtures("small", "descriptors")
@pytest.mark.parametrize(("grid", "pattern", "dtype", "options"), DESCRIBED, ids=["line", "plane", "space"])
def test_descriptors_equal_reference_on_the_device(grid, pattern, dtype, options, launched):
    case = case_of(grid, pattern, options)
    expected = results(case, "reference", dtype, True, exact=True)
    assert_equal(results(case, "triton", dtype, True), expected, 1e-5 if dtype == torch.float32 else 4e-3)
    assert launched == [True, True]


def blocks_of(size: int) -> P.Blocks:
    return P.Blocks(torch.tensor([[[0, 2], [1, -1], [3, 3], [2, 1]]]), size)


@TRITON
@INSIDE
@pytest.mark.usefixtures("small", "descriptors")
@pytest.mark.parametrize(("changes", "described"), [
    ({}, True),
    ({"pattern": blocks_of(4), "grid": (7, 8)}, True),
    ({"pattern": blocks_of(3), "grid": (6, 6)}, False),  # a box of four holds a part of the next block
    ({"valid": True}, False),  # missing keys would be read
    ({"dim": 18}, False),  # 72 bytes from token to token
    ({"value_dim": 22}, False),
])  # fmt: skip
def test_descriptors_serve_what_they_can_on_the_device(changes, described, launched):
    case = Case(**{"grid": (5, 6), "pattern": P.Neighborhood(3), "batch": 1, "dim": 16, "value_dim": 16, **changes})
    with torch.no_grad():
        found = [case.run(case.tensors(torch.float32), name, return_lse=False) for name in ("reference", "triton")]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    assert launched == [described]


@TRITON
@INSIDE
@pytest.mark.usefixtures("small", "descriptors")
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("poison", [torch.inf, torch.nan])
def test_descriptors_do_not_read_past_the_keys_of_a_tile_on_the_device(poison, launched, monkeypatch):
    """What stands beside the keys of a tile in the same box is never multiplied, not even by zero."""
    monkeypatch.setattr(backend.definition, "guarded", lambda call: (call, False))  # it would keep such values from the kernel
    q, k, v = (torch.randn(1, 36, 1, 16) for _ in range(3))
    expected = attend(q[:, :12], k[:, :12], v[:, :12], "window(12)", backend="reference")
    v[:, 12:] = poison
    torch.testing.assert_close(attend(q, k, v, "window(12)", backend="triton")[:, :12], expected, rtol=1e-5, atol=1e-5)
    assert launched == [True]


@TRITON
@INSIDE
@pytest.mark.usefixtures("small", "descriptors")
def test_descriptors_need_aligned_views_on_the_device(launched):
    """A view that begins at the second number of its memory is read by pointers."""
    memory = torch.randn(3, 4 + 30 * 16)
    for first, described in ((0, True), (1, False)):
        q, k, v = (row[first : first + 30 * 16].view(1, 5, 6, 1, 16) for row in memory)
        found = [attend(q, k, v, "neighborhood(3)", backend=name) for name in ("reference", "triton")]
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
        assert launched.pop() is described


@TRITON
def test_pointers_are_the_default():
    """No time of descriptors has been measured on a GPU yet."""
    assert backend.DESCRIPTORS is False


@TRITON
@INSIDE
def test_equals_reference_in_float32_with_its_own_tiles():
    case = Case((13, 11), P.Neighborhood(5), batch=1, dim=24, value_dim=16, table=True)
    expected = results(case, "reference", torch.float32, True, exact=True)
    assert_equal(results(case, "triton", torch.float32, True), expected, 1e-5)


@TRITON
@INSIDE
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("block", "shape", "valid"), [(4, (1, 2), False), ((3, 4), (2, 1), True)])
def test_routed_blocks_equal_reference(block, shape, valid):
    """Holes, repetitions and blocks cut by the border of the grid; lists shared over batch or heads, or not."""
    grid, size = (7, 8), block if isinstance(block, tuple) else (block, block)
    number = math.prod(-(-n // b) for n, b in zip(grid, size, strict=True))
    table = torch.randint(-1, number, (*shape, number, 3), generator=torch.Generator().manual_seed(1))
    case = Case(grid, P.Blocks(table, block), heads=2, kv_heads=1 if valid else 2, batch=2, dim=16, value_dim=16, valid=valid)
    expected = results(case, "reference", torch.float32, True, exact=True)
    assert_equal(results(case, "triton", torch.float32, True), expected, 1e-5)


@TRITON
@INSIDE
@pytest.mark.usefixtures("small")
def test_routed_blocks_that_are_even_need_no_mask():
    table = torch.randint(0, 4, (1, 4, 2), generator=torch.Generator().manual_seed(1))
    walk = boxes.block_walk((8, 8), (8, 8), (4, 4), SMALL, False)
    assert walk.full == walk.boxes
    case = Case((8, 8), P.Blocks(table, 4), batch=1, dim=16, value_dim=16)
    expected = results(case, "reference", torch.float32, True, exact=True)
    assert_equal(results(case, "triton", torch.float32, True), expected, 1e-5)


@TRITON
@INSIDE
@pytest.mark.usefixtures("small")
def test_views_and_expanded_gradients_on_the_device():
    """q, k and v cut out of one projection and cropped, one of them used twice, and a gradient without memory of its own."""
    packed = torch.randn(1, 6, 7, 3, 1, 16)[:, :5, 1:]
    found = []
    for name in ("reference", "triton"):
        q, k, _ = (t.detach().requires_grad_() for t in packed.unbind(3))
        out = attend(q, k, k, P.Neighborhood(3), backend=name)
        found.append((out, *torch.autograd.grad(out.sum(), (q, k))))
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


@TRITON
@INSIDE
@pytest.mark.usefixtures("small")
def test_queries_whose_keys_are_all_missing_on_the_device():
    """They give 0, an lse of minus infinity and no gradient, in a tile with queries that see something."""
    q, k, v = (torch.randn(1, 12, 1, 16, requires_grad=True) for _ in range(3))
    valid = torch.arange(12)[None] >= 4
    found = []
    for name in ("reference", "triton"):
        source = Source(k, v, P.Window(4), valid=valid)
        out, lse = attend(q, [source], return_lse=True, backend=name)
        found.append((out, lse, *torch.autograd.grad(out.square().sum() + lse[:, 4:].sum(), (q, k, v))))
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
    assert (found[1][1][:, :4] == -torch.inf).all()


@TRITON
@INSIDE
@pytest.mark.usefixtures("small")
def test_the_first_query_may_stand_anywhere_on_the_device():
    q, k = torch.randn(1, 3, 5, 1, 16), torch.randn(1, 8, 9, 1, 16)
    found = [attend(q, k, k, P.Neighborhood(5), q_start=(4, 2), backend=name) for name in ("reference", "triton")]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@TRITON
@INSIDE
@pytest.mark.parametrize(("number", "begin", "full"), [((3, 4, 5), (1, 0, 2), (1, 3, 2)), ((2, 3, 3), (0, 1, 1), (2, 1, 1))])
def test_boxes_are_walked_once_on_the_device(number, begin, full):
    """The full boxes of three axes first, and then all others, each once."""
    from .box_kernel import corners

    counts = math.prod(full), math.prod(number) - math.prod(full)
    found = []
    for partial, count in enumerate(counts):
        out = torch.zeros(count, 3, dtype=torch.int32)
        corners[(1,)](out, *number, *begin, *full, count, PARTIAL=partial)
        found.append({tuple(row) for row in out.tolist()})
    inner = set(itertools.product(*(range(f, f + m) for f, m in zip(begin, full, strict=True))))
    assert found[0] == inner
    assert found[1] == set(itertools.product(*map(range, number))) - inner
    assert [len(boxes_) for boxes_ in found] == list(counts)


# --------------------------------------------------------------------------------------------------------------------
# the tables, by numpy alone


def unpacked(walk: boxes.Walk) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    numbers = np.frombuffer(walk.tables, dtype=np.int32)
    header, slots = numbers[: boxes.HEADER], int(numbers[16])
    windows = numbers[boxes.HEADER : boxes.HEADER + 3 * slots].reshape(3, slots)
    tables = numbers[boxes.HEADER + 3 * slots :].reshape(boxes.FIELDS, -1)
    return header, windows, np.split(tables, np.cumsum(header[:2]), axis=1)


@given(cases(routed=False))
@settings(max_examples=60)
def test_boxes_hold_every_visible_pair_once_and_full_ones_nothing_else(case):
    """Walked in Python by both passes, boxes give back the pattern's own mask."""
    if isinstance(case.pattern, P.PerHead) or isinstance(boxes.classes_of(Geometry.on(case.pattern.spec, case.grid)), str):
        return
    geometry = Geometry.on(case.pattern.spec, case.grid)
    sizes = [(n, m, 4) for n, m in ((2, 2), (4, 8), (8, 4))]
    rank = len(case.grid)
    positions = [P.grid_positions(case.grid), P.grid_positions(geometry.padded, [-before for before, _ in geometry.zeros])]
    expected = case.pattern.visible(positions[0][:, None], positions[1][None], case.grid, case.grid).numpy()
    axes = boxes.classes_of(geometry)
    for by_key in (False, True):
        walk = boxes.window_walk(geometry, tuple(sizes), by_key, False)
        _, _, tables = unpacked(walk)
        mask = np.ones((1, 1), dtype=bool)
        counted = np.ones((1, 1), dtype=int)
        for axis, table, tile, box in zip(axes, tables, walk.tile, walk.box, strict=True):
            seen = np.zeros((len(axis.low), axis.length), dtype=int)
            for column in table.T:
                first, count, lo, hi, number, begin, full = (int(column[i]) for i in (0, 1, 3, 4, 5, 6, 7))
                assert 0 < count <= tile
                assert number == -(-(hi - lo) // box)
                for i in range(number):
                    own, other = np.arange(first, first + count), np.arange(lo + i * box, min(lo + i * box + box, hi))
                    slots, j = (other, own) if by_key else (own, other)
                    residue = int(column[2 if by_key else 8]) // math.prod([a.length for a in axes[axes.index(axis) + 1 :]])
                    inside = (j >= axis.low[slots, None]) & (j < axis.high[slots, None])
                    if begin <= i < begin + full:
                        assert inside.all()
                        assert len(other) == box
                    seen[np.ix_(axis.position[slots], residue + axis.step * j)] += inside
            counted = np.einsum("ab,cd->acbd", counted, seen).reshape(len(counted) * len(seen), -1)
        assert counted.max() <= 1
        mask = counted.astype(bool)
        assert (mask == expected).all(), (case, by_key, rank)


@given(static(2))
@settings(max_examples=40)
def test_walks_count_their_boxes(pattern):
    geometry = Geometry.on(pattern.spec, (9, 10))
    if isinstance(boxes.classes_of(geometry), str):
        return
    walk = boxes.window_walk(geometry, ((4, 4, 4),), False, False)
    _, _, tables = unpacked(walk)
    of_tile = [np.multiply.outer(np.multiply.outer(*(t[field] for t in tables[:2])), tables[2][field]) for field in (5, 7)]
    assert (walk.boxes, walk.full) == tuple(int(n.sum()) for n in of_tile)
    assert walk.programs == of_tile[0].size


@TRITON
def test_it_is_never_chosen_and_the_plan_says_why():
    """No time has been measured on a GPU yet."""
    made = plan("neighborhood(7)", (56, 56), heads=4, head_dim=64, dtype=torch.bfloat16, device="cuda")
    assert made.backend != "triton"
    assert made.others["triton"] == "not measured on a GPU yet; runs where asked for"


@TRITON
def test_planned_pairs_are_those_of_the_boxes():
    """56 x 56 in tiles of 8 x 8 queries whose windows of 7 reach over 14 x 14 keys: two boxes of 8 x 16 each."""
    made = plan("neighborhood(7)", (56, 56), heads=2, dtype=torch.bfloat16, device="cuda", backend="triton")
    assert (made.tile, made.tiles) == ((64, 128), 2 * 49)
    assert made.computed_pairs == 2 * 49 * 2 * 64 * 128


@TRITON
@pytest.mark.skipif(HERE, reason="the interpreter runs on CPU")
@pytest.mark.parametrize(("changes", "reason"), [
    ({"device": "cpu"}, "only CUDA, or a CPU with TRITON_INTERPRET=1; got cpu"),
    ({"dtype": torch.float64}, "only float32, float16 and bfloat16; got torch.float64"),
    ({"head_dim": 320}, "head and value dims up to 256; got 320 and 320"),
    ({"pattern": "axis(0) | axis(1)"}, r"only patterns separable by axis and routed blocks; got Axis\(0\) | Axis\(1\)"),
    ({"pattern": "window(2)", "grid": (4, 4, 4, 4)}, r"only grids with 1 to 3 axes; got \(4, 4, 4, 4\)"),
])  # fmt: skip
def test_refusals_say_what_is_allowed(changes, reason):
    arguments = {"pattern": "window(4)", "grid": (8, 8), "device": "cuda", **changes}
    with pytest.raises(ValueError, match=reason):
        plan(**arguments, backend="triton")


@TRITON
@INSIDE
@pytest.mark.usefixtures("small")
def test_traces_without_breaks_on_the_device():
    q, k, v = (torch.randn(1, 4, 5, 1, 16, requires_grad=True) for _ in range(3))

    def loss(q, k, v):
        return attend(q, k, v, P.Neighborhood(3), backend="triton").square().sum()

    expected = torch.autograd.grad(loss(q, k, v), (q, k, v))
    found = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(q, k, v), (q, k, v))
    torch.testing.assert_close(found, expected)


# --------------------------------------------------------------------------------------------------------------------
# cross-compilation for compute capability 9.0: no GPU needed

KINDS = {
    "*i32": ("plan", "members", "ranges"), "*u8": ("valid",), "fp32": ("scale", "factor"),
    "*fp32": ("lse", "bias", "grad_lse", "delta", "dbias"), "*bf16": ("q", "k", "v", "out", "grad", "dq", "dk", "dv"),
}  # fmt: skip


def compiled(name: str, dim: int, size: tuple[int, int, int], folder: Path, described: bool = False) -> tuple[str, str]:
    """Intermediate code and resource usage of a kernel for two-dimensional neighborhoods in bfloat16."""
    triton = pytest.importorskip("triton", reason="its compiler makes the kernels")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from regard.ops.backends.triton import kernels as attention

    kernel = getattr(attention, {"forward": name, "queries": "backward_queries", "keys": "backward_keys"}[name])
    tile, box, warps = size
    shape = {16: (1, 4, 4), 32: (1, 4, 8), 64: (1, 8, 8), 128: (1, 8, 16)}
    constants = {
        "D": dim, "DV": dim, "BLOCK_D": dim, "BLOCK_V": dim, "AXES": 2, "BIAS": False, "VALID": False, "ROUTED": False,
        "FIRST": 0, "LAST": 2, "WIDE": False, "PRECISION": "tf32", "GRAD_LSE": False, "GRAD_BIAS": False,
        "DESCRIBED": described,
        **{f"T{axis}": n for axis, n in enumerate(shape[tile])}, **{f"B{axis}": n for axis, n in enumerate(shape[box])},
    }  # fmt: skip
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    signature, aligned = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        kind = next((kind for kind, names in KINDS.items() if argument in names), "i32")
        signature[argument] = "constexpr" if argument in constants else kind
        if kind.startswith("*") or re.fullmatch("[qkv]_[bth]", argument):
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": 2})
    binary = folder / "kernel.cubin"
    binary.write_bytes(made.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    return made.asm["ptx"], usage


@TRITON
@pytest.mark.slow
@pytest.mark.skipif(HERE or os.uname().machine != "x86_64", reason="the tools come with Triton's wheel for x86-64")
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", ["forward", "queries", "keys"])
def test_kernels_for_hopper_use_its_matrix_units_and_spill_nothing(name, dim, tmp_path):
    sizes = next(sizes for limit, sizes in backend.SIZES[name]["half"] if dim <= limit)
    for size in sizes:
        code, usage = compiled(name, dim, size, tmp_path)
        assert "wgmma.mma_async" in code, size
        assert "mma.sync" not in code, size
        assert "cp.async" in code, size  # boxes are on their way while the last one is computed
        assert "STACK:0 " in usage, (size, usage)
        assert "LOCAL:0 " in usage, (size, usage)


@TRITON
@pytest.mark.slow
@pytest.mark.skipif(HERE or os.uname().machine != "x86_64", reason="the tools come with Triton's wheel for x86-64")
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", ["forward", "queries"])
def test_described_boxes_go_from_memory_to_the_matrix_units(name, dim, tmp_path):
    """Keys and values arrive by bulk tensor copies, no thread copies any itself, and nothing spills."""
    sizes = next(sizes for limit, sizes in backend.SIZES[name]["half"] if dim <= limit)
    for size in sizes:
        code, usage = compiled(name, dim, size, tmp_path, described=True)
        assert "wgmma.mma_async" in code, size
        assert "mma.sync" not in code, size
        assert "cp.async.bulk.tensor" in code, size
        assert "cp.async.cg" not in code, size
        assert "STACK:0 " in usage, (size, usage)
        assert "LOCAL:0 " in usage, (size, usage)
