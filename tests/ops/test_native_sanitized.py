"""The compiled kernels under AddressSanitizer and UndefinedBehaviorSanitizer: random calls touch nothing that is not theirs.

The library is compiled with both and loaded, in a process of its own, in the place of the usual one; each call is compared with
the reference too.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from regard import Source, attend
from regard.ops import patterns as P
from regard.ops.calls.source import HeadTable
from regard.ops.compiled import library
from regard.ops.linear.attend import LinearState, linear_attend

CALLS = 400
SANITIZE = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


def _runtime(compiler: list[str]) -> str | None:
    """The runtime library of AddressSanitizer, None where there is none."""
    done = subprocess.run([*compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=False)
    path = Path(done.stdout.strip() or "libasan.so")
    return str(path.resolve()) if path.is_absolute() and path.exists() else None


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_random_calls_touch_nothing_that_is_not_theirs(seed, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    gcc = shutil.which("gcc")
    runtime = None if gcc is None else _runtime([gcc])
    if gcc is None or runtime is None:
        pytest.skip("needs gcc with libasan: " + ("there is no gcc" if gcc is None else "gcc has no libasan.so"))
    path = folder / "sanitized.so"
    if not path.exists():
        flags = [flag for flag in library.FLAGS if flag != "-O3"]
        command = [gcc, *flags, *SANITIZE, "-march=native", *map(str, library.SOURCES), "-o", str(path), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True)
    environment = {
        **os.environ, "LD_PRELOAD": runtime, "OMP_NUM_THREADS": "2", "REGARD_NATIVE": "1",
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.ops.test_native_sanitized", str(path), str(seed)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert done.stdout.split()[-2:] == [str(CALLS), "calls"]


def test_random_calls_are_right():
    """The same calls, fewer of them, of the usual library (or of torch's operators where there is none)."""
    for seed in range(60):
        check(random.Random(f"fast {seed}"))


def check(draw: random.Random) -> None:
    """One random call and its gradients, native against the reference."""
    (linear if draw.random() < 0.25 else attention)(draw)


def attention(draw: random.Random) -> None:
    torch.manual_seed(draw.getrandbits(30))
    rank = draw.choice((1, 1, 2, 2, 2, 3))
    grid = tuple(draw.choice((1, 2, 3, 5, 7, 8, 11, 23) if rank < 3 else (1, 2, 3, 4)) for _ in range(rank))
    batch, kv_heads = draw.choice((1, 1, 2, 3)), draw.choice((1, 2))
    heads = kv_heads * draw.choice((1, 2, 3))
    dim, value = draw.choice((1, 3, 4, 8, 16, 17, 33)), draw.choice((1, 4, 8, 9, 32))
    kind = draw.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16))
    q, k, v = (
        torch.randn(batch, *grid, h, d).to(kind).requires_grad_() for h, d in ((heads, dim), (kv_heads, dim), (kv_heads, value))
    )
    pattern = any_pattern(draw, grid, batch, heads)
    leaves, options = [q, k, v], {"return_lse": True}
    if draw.random() < 0.3:
        options["valid"] = torch.rand(batch, *grid) > 0.4
    bounded = isinstance(pattern, (P.Window, P.Neighborhood, P.Halo, P.Grid, P.Axis))
    if bounded and draw.random() < 0.4:
        extents = [pattern.extent(axis, n, rank) for axis, n in enumerate(grid)]
        table = torch.randn(draw.choice((1, heads)), *[2 * e + 1 for e in extents], requires_grad=True)
        options["bias"] = HeadTable(table, pattern)
        leaves.append(table)
    if draw.random() < 0.2:
        options["sink"] = 0.3
    if draw.random() < 0.2 and "bias" not in options:
        second = tuple(draw.choice((1, 2, 4)) for _ in range(rank))
        more = [torch.randn(batch, *second, kv_heads, d).to(kind).requires_grad_() for d in (dim, value)]
        leaves += more
        sources = [Source(k, v, pattern, valid=options.pop("valid", None)), Source(*more)]
        same(
            lambda backend: attend(q, sources, backend=backend, **options), leaves, kind, f"{pattern!r} on {grid}, two sources"
        )
        return
    same(lambda backend: attend(q, k, v, pattern, backend=backend, **options), leaves, kind, f"{pattern!r} on {grid}")


def any_pattern(draw: random.Random, grid: tuple[int, ...], batch: int, heads: int) -> P.Pattern:
    rank = len(grid)

    def separable() -> P.Pattern:
        size, shift = draw.choice((1, 2, 3, 4, 6)), draw.choice((0, 0, 1, 2))
        return draw.choice((
            P.Window(size, shift), P.Grid(size), P.Axis(draw.randrange(rank)), P.Dense(), P.Neighborhood(size),
            P.Neighborhood(size, draw.choice((1, 2))), P.Neighborhood(size, border="mask"), P.Neighborhood(size, causal=True),
            P.Halo(size, draw.choice((0, 1)), border="mask"), P.Window(tuple(draw.choice((1, 2, 5)) for _ in grid)),
        ))  # fmt: skip

    choice = draw.random()
    if choice < 0.35:
        return separable()
    if choice < 0.6:
        members = [separable() for _ in range(draw.choice((2, 2, 3)))]
        pattern = members[0]
        for member in members[1:]:
            pattern = pattern | member if draw.random() < 0.7 else pattern & member
        return pattern
    if choice < 0.7 and heads > 1:
        return P.PerHead(((separable() | separable(), 1), (separable(), heads - 1)))
    listed = draw.choice((0, 1, 2, 4))
    lead = [draw.choice((1, batch))] + ([heads] if draw.random() < 0.5 else [])
    if choice < 0.9:
        size = draw.choice((1, 2, 3, 5))
        blocks = 1
        for n in grid:
            blocks *= -(-n // size)
        table = torch.randint(-1, blocks, (*lead, blocks, listed))
        return P.Blocks(table.fill_(-1) if draw.random() < 0.1 else table, size)
    tokens = 1
    for n in grid:
        tokens *= n
    return P.Tokens(torch.randint(-1, tokens, (*lead, tokens, listed)))


def linear(draw: random.Random) -> None:
    torch.manual_seed(draw.getrandbits(30))
    batch, tokens, heads = draw.choice((1, 2)), draw.choice((1, 2, 7, 16, 65, 130, 300)), draw.choice((1, 2, 5))
    dim, value = draw.choice((1, 3, 8, 16, 33)), draw.choice((1, 4, 8, 17, 40))
    kind = draw.choice((torch.float32, torch.float32, torch.bfloat16))
    q, k, v = (torch.randn(batch, tokens, heads, d).to(kind).requires_grad_() for d in (dim, dim, value))
    leaves, causal = [q, k, v], draw.random() < 0.6
    options = {"feature": draw.choice(("none", "relu", "elu_plus_one", "silu")), "causal": causal}
    if draw.random() < 0.4:
        options["valid"] = torch.rand(batch, tokens) > 0.3
    if causal and draw.random() < 0.5:
        shape = draw.choice(((heads,), (batch, tokens, heads)))
        options["log_decay"] = -torch.rand(shape) * draw.choice((0.1, 3.0))
    if causal and draw.random() < 0.5:
        options["state"] = LinearState(torch.randn(batch, heads, dim, value), None, None)

    def run(backend: str):
        return linear_attend(q, k, v, backend="naive" if backend == "reference" else backend, **options)

    same(run, leaves, kind, f"linear attention of {tuple(q.shape)} and {value}, {options['feature']}, causal={causal}")


def same(run, leaves: list[torch.Tensor], kind: torch.dtype, what: str) -> None:
    found, expected = (_with_gradients(run, leaves, name) for name in ("native", "reference"))
    tolerance = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[kind]
    for left, right in zip(found, expected, strict=True):
        assert left.shape == right.shape, what
        assert left.isfinite().equal(right.isfinite()), what
        left, right = left.double().nan_to_num(neginf=0.0), right.double().nan_to_num(neginf=0.0)
        if right.numel():
            error = (left - right).abs().max() / right.abs().max().clamp(min=1.0)
            assert error <= tolerance, f"{what}: off by {error:.1e}"


def _with_gradients(run, leaves: list[torch.Tensor], backend: str) -> list[torch.Tensor]:
    try:
        found = run(backend)
    except ValueError as error:
        if backend != "native" or "cannot run this call" not in str(error):
            raise
        found = run("auto")  # raster order, bias of another kind: what native leaves to others
    outs = [t for t in (found if isinstance(found, tuple) else (found,)) if isinstance(t, torch.Tensor)]
    loss = sum(
        (t.double() * torch.linspace(-1, 1, t.numel()).view(t.shape)).masked_fill(~t.isfinite(), 0.0).sum() for t in outs
    )
    return [*outs, *torch.autograd.grad(loss, leaves)]


if __name__ == "__main__":
    loaded = library.opened(Path(sys.argv[1]))
    library.looked_for = lambda: loaded
    from regard.ops.backends.native import attention as compiled

    compiled.SMALL = 0  # several threads whatever the size
    for call in range(CALLS):
        check(random.Random(f"{sys.argv[2]} {call}"))
    print(CALLS, "calls")
