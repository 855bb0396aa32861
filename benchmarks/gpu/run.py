"""Attention on a GPU, right and how fast: ``python benchmarks/gpu/run.py [case ...]``, all in a few minutes.

First every backend against the definition: output, log-sum-exp and gradients. Then the cases, each against its peers: cuDNN's
dense attention (all pairs), FlexAttention compiled, the portable tiles, and NATTEN and flash-attn where they can be imported.
Variants are interleaved in one process. ``ms`` is end to end by events, with everything a call does (permutations, padding),
medians and quartiles; ``kernel_ms`` is what the profiler saw on the device. Building plans and compiling are reported apart, as
``first_s``. Every time stands beside the error against the definition in float64, on a subset of the queries. The Triton
kernels run with boxes read by pointers and by tensor descriptors. Where a kernel leaves the device unusable, the cases that are
left run in a fresh process.

Floors on an H200 (790 TFLOP/s of matrix products in bfloat16, 4.3 TB/s): 224 x 224 tokens, batch 16, 4 heads of 32, kernel 7
move 0.82 GB, 0.19 ms, and compute 0.03 ms; 256 x 256 tokens, 24 heads of 128, kernel 80 compute 5.2 TFLOP, 6.5 ms, and move
0.38 ms.

``--smoke`` runs the same code on tiny sizes on a CPU, Triton by its interpreter.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if "--smoke" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when Triton is imported

import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from regard import Source, attend
from regard import patterns as P
from regard.bench.harness import error, machine, short, summary, versions, write
from regard.ops.attention.weights import attend_weights
from regard.ops.backends.triton import backend as triton_backend
from regard.ops.calls.source import HeadTable

RESULTS = Path(__file__).parents[1] / "results"
Run = Callable[[], object]
DESCRIBED = "triton, descriptors"
BACKENDS = ("dense", "tiled", "triton", DESCRIBED, "flex", "natten")
FLEX = ("neighborhood(7)", "causal", "neighborhood(7, dilation=2)", "blocks")
"""What FlexAttention is checked on: it compiles for seconds each time."""


@dataclass(frozen=True)
class Settings:
    """Where and how long to measure."""

    smoke: bool
    device: torch.device
    dtype: torch.dtype
    repeats: int
    seconds: float

    def size(self, full: tuple[int, ...], tiny: tuple[int, ...]) -> tuple[int, ...]:
        return tiny if self.smoke else full


def described(run: Run) -> Run:
    """The same with boxes of keys read by tensor descriptors."""

    def by_descriptors() -> object:
        triton_backend.DESCRIPTORS = True
        try:
            return run()
        finally:
            triton_backend.DESCRIPTORS = False

    return by_descriptors


def inputs(settings: Settings, *shape: int, dtype: torch.dtype | None = None, number: int = 3) -> list[Tensor]:
    generator = torch.Generator(settings.device).manual_seed(0)
    made = [torch.randn(shape, generator=generator, device=settings.device) for _ in range(number)]
    return [t.to(dtype or settings.dtype) for t in made]


# --------------------------------------------------------------------------------------------------------------------
# right


def correctness(settings: Settings) -> Iterator[dict]:
    """Largest error of each backend over the largest value, of output, log-sum-exp and gradients, on odd sizes."""
    shapes = [
        ("neighborhood(7)", (61,)), ("causal", (130,)), ("dense", (70,)),
        ("neighborhood(7, dilation=2)", (29, 37)), ("neighborhood(5, stride=2, causal=True)", (23, 31)),
        ("neighborhood(5, border='zero')", (19, 23)), ("window(7, shift=3)", (25, 30)), ("halo(8, 3)", (21, 26)),
        ("grid(7)", (20, 33)), ("axis(1)", (17, 40)), ("neighborhood(3, dilation=2)", (7, 11, 13)),
        ("neighborhood((5, 3, 7), causal=(True, False, False))", (6, 9, 12)), ("blocks", (24, 32)),
    ]  # fmt: skip
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    if settings.smoke:
        shapes, dtypes = [("neighborhood(3)", (6, 5)), ("blocks", (8, 8))], dtypes[:1]
    for dtype in dtypes:
        for text, grid in shapes if dtype == torch.bfloat16 or settings.smoke else shapes[::3]:
            for bias in (False, True):
                if not bias or (text not in ("blocks", "dense", "causal") and dtype != torch.float16):
                    yield from _compare(settings, text, grid, dtype, bias)


def _compare(settings: Settings, text: str, grid: tuple[int, ...], dtype: torch.dtype, bias: bool) -> list[dict]:
    heads, dim = 2, 16 if settings.smoke else 64
    pattern = _routed(settings, grid) if text == "blocks" else P.parse(text)
    q, k, v = inputs(settings, 1, *grid, heads, dim, dtype=dtype)
    k, v = k[..., :1, :], v[..., :1, :]
    table = None
    if bias:
        sizes = [2 * pattern.extent(axis, n, len(grid)) + 1 for axis, n in enumerate(grid)]
        (table,) = inputs(settings, heads, *sizes, dtype=torch.float32, number=1)

    def results(backend: str, kind: torch.dtype) -> list[Tensor]:
        tensors = [t.detach().to(kind).requires_grad_() for t in (q, k, v)]
        if table is not None:
            tensors.append(
                table.detach().clone().to(torch.float64 if kind == torch.float64 else torch.float32).requires_grad_()
            )
        source = HeadTable(tensors[3], pattern) if table is not None else None
        out, lse = attend(*tensors[:3], pattern, bias=source, return_lse=True, backend=backend)
        loss = (out.double() * out.detach().double().cos()).sum() + lse.double().sin().sum()
        return [out, lse, *torch.autograd.grad(loss, tensors)]

    expected = results("reference", torch.float64)
    rows = []
    for backend in BACKENDS:
        if backend == "flex" and not settings.smoke and (bias or dtype != torch.bfloat16 or text not in FLEX):
            continue
        run = partial(results, "triton" if backend == DESCRIBED else backend, dtype)
        row = {"case": text, "grid": list(grid), "dtype": str(dtype), "bias": bias, "backend": backend}
        try:
            found = described(run)() if backend == DESCRIBED else run()
            worst = [
                float((a.detach().double() - b.detach()).abs().max() / b.detach().abs().max().clamp(min=1))
                for a, b in zip(found, expected, strict=True)
            ]
            row["errors"] = dict(zip(("out", "lse", "dq", "dk", "dv", "dtable"), worst, strict=False))
            limit = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
            row["right"] = max(worst) <= limit  # a NaN is not
        except Exception as problem:
            refused = "cannot run this call" in str(problem)
            row["refused" if refused else "failed"] = short(problem)
        rows.append(row)
    return rows


def _routed(settings: Settings, grid: tuple[int, ...], block: int = 4, listed: int = 3) -> P.Blocks:
    number = math.prod(-(-n // block) for n in grid)
    generator = torch.Generator(settings.device).manual_seed(0)
    table = torch.randint(-1, number, (1, number, listed), generator=generator, device=settings.device)
    return P.Blocks(table, block)


# --------------------------------------------------------------------------------------------------------------------
# how fast


def wait(settings: Settings) -> None:
    if settings.device.type == "cuda":
        torch.cuda.synchronize()


def timed(settings: Settings, run: Run) -> float:
    """Seconds of one run, by events where there are any."""
    if settings.device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def kernel_ms(settings: Settings, run: Run, repeats: int = 3) -> float | None:
    """Milliseconds on the device of one run, without the gaps between kernels."""
    if settings.device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            run()
        wait(settings)
    total = sum(e.self_device_time_total for e in profile.key_averages() if e.device_type != torch.autograd.DeviceType.CPU)
    return round(total / repeats * 1e-3, 4)


def measure(settings: Settings, variants: dict[str, Run], truth: Callable[[object], float] | None, ours: str) -> list[dict]:
    """Interleaved times of the variants; one that fails is recorded and the others go on."""
    rows: dict[str, dict] = {name: {"variant": name} for name in variants}
    alive: dict[str, Run] = {}
    for name, run in variants.items():
        try:
            wait(settings)
            if settings.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            result = run()
            wait(settings)
            rows[name]["first_s"] = round(time.perf_counter() - start, 2)
            if settings.device.type == "cuda":
                rows[name]["extra_mb"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
            rows[name]["error"] = truth(result) if truth else None
            del result
            alive[name] = run
        except Exception as problem:  # the next variants still count
            rows[name]["failed"] = short(problem)
            if settings.device.type == "cuda":
                torch.cuda.empty_cache()
    times: dict[str, list[float]] = {name: [] for name in alive}
    for _ in range(settings.repeats):
        for name, run in alive.items():
            if len(times[name]) < 3 or sum(times[name]) < settings.seconds:
                times[name].append(timed(settings, run))
    for name, run in alive.items():
        rows[name] |= summary(times[name]) | {"kernel_ms": kernel_ms(settings, run)}
    base = rows.get(ours, {}).get("ms")
    for row in rows.values():
        row["ratio"] = round(row["ms"] / base, 2) if base and "ms" in row else None
    return list(rows.values())


def subset_error(q: Tensor, k: Tensor, v: Tensor, pattern: P.Pattern, number: int = 64) -> Callable[[object], float]:
    """The error of an output on some queries of the first item and head, against the definition in float64."""
    queries = math.prod(q.shape[1:-2])
    rows = torch.linspace(0, queries - 1, min(number, queries), device=q.device).long()
    single = [t[:1, ..., :1, :].double() for t in (q, k, v)]
    (weights,) = attend_weights(single[0], [Source(single[1], single[2], pattern)], rows=rows)
    truth = weights.flatten(3)[0, 0] @ single[2].flatten(1, -3)[0, :, 0]

    def of(result: object) -> float:
        out = result[0] if isinstance(result, tuple) else result
        return error(out[0, ..., 0, :].reshape(queries, -1)[rows], truth)  # type: ignore[index]

    return of


def operator(
    settings: Settings, name: str, pattern: P.Pattern, grid: tuple[int, ...], batch: int, heads: int, dim: int, backward: bool,
    dense: bool = True,
) -> dict:  # fmt: skip
    """One attention against its peers."""
    tensors = [t.requires_grad_(backward) for t in inputs(settings, batch, *grid, heads, dim)]
    q, k, v = tensors
    (grad,) = inputs(settings, batch, *grid, heads, dim, number=1)

    def step(run: Callable[[], Tensor]) -> Run:
        def both() -> tuple[Tensor, ...]:
            out = run()
            return (out, *torch.autograd.grad(out, tensors, grad))

        return both if backward else run

    def whole(kind: str) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        rows = [t.flatten(1, -3).transpose(1, 2) for t in tensors]
        with sdpa_kernel(getattr(SDPBackend, kind)):
            return F.scaled_dot_product_attention(*rows).transpose(1, 2).unflatten(1, grid)

    def flash() -> Tensor:
        from flash_attn import flash_attn_func

        return flash_attn_func(*(t.flatten(1, -3) for t in tensors)).unflatten(1, grid)

    variants = {b: step(partial(attend, q, k, v, pattern, backend=b)) for b in ("triton", "tiled", "flex", "natten")}
    variants[DESCRIBED] = described(variants["triton"])
    if dense:  # computes all pairs: for its time, not its output
        variants["all pairs, cuDNN"] = step(partial(whole, "CUDNN_ATTENTION"))
        variants["all pairs, torch flash"] = step(partial(whole, "FLASH_ATTENTION"))
        if importlib.util.find_spec("flash_attn"):
            variants["all pairs, flash-attn"] = step(flash)
    of_pattern = subset_error(q.detach(), k.detach(), v.detach(), pattern)
    with torch.set_grad_enabled(backward):
        rows = measure(settings, variants, of_pattern, "triton")
    planned = regard.plan(
        pattern, grid, batch=batch, heads=heads, head_dim=dim, dtype=settings.dtype, device=settings.device,
        backend="triton",
    )  # fmt: skip
    for row in rows:
        if row["variant"] in ("triton", DESCRIBED) and row.get("kernel_ms") and not backward:
            row["computed_tflops"] = round(planned.flops / row["kernel_ms"] * 1e-9, 1)
        if row["variant"].startswith("all pairs"):
            row["error"] = None
    about = {
        "grid": list(grid),
        "batch": batch,
        "heads": heads,
        "head_dim": dim,
        "dtype": str(settings.dtype),
        "waste": planned.waste,
    }
    return {
        "case": f"{name}, {'forward and backward' if backward else 'forward'}",
        "pattern": repr(pattern),
        **about,
        "rows": rows,
    }


def backbone(settings: Settings, name: str, training: bool) -> dict:
    """Images per second of a backbone; the same model on every backend, and timm's where it can be imported."""
    batch, side = settings.size((128, 224), (1, 64))
    images = torch.randn(batch, 3, side, side, device=settings.device)
    options = {"img_size": side} if settings.smoke and "swin" in name else {}

    def runner(model: torch.nn.Module) -> Run:
        model = model.to(settings.device).train(training)

        def step() -> Tensor:
            with torch.autocast(settings.device.type, settings.dtype, enabled=not settings.smoke):
                out = model(images)
            if training:
                out.float().square().mean().backward()
                model.zero_grad(set_to_none=True)
            return out.detach()

        return step

    def ours(backend: str) -> Run:
        model = regard.create_model(name, **options)
        for module in model.modules():
            if hasattr(module, "backend"):
                module.backend = backend
        return runner(model)

    variants: dict[str, Run] = {}
    for backend in ("auto",) if settings.smoke else ("auto", "triton", "dense"):
        variants[f"regard, {backend}"] = ours(backend)
    if "regard, triton" in variants:
        variants[f"regard, {DESCRIBED}"] = described(variants["regard, triton"])
    if importlib.util.find_spec("timm"):
        import timm

        if name in timm.list_models() and not settings.smoke:
            variants["timm"] = runner(timm.create_model(name))
    with torch.set_grad_enabled(training):
        rows = measure(settings, variants, None, "regard, auto")
    for row in rows:
        row["images_per_s"] = round(batch / row["ms"] * 1e3, 1) if "ms" in row else None
    return {"case": f"{name}, {'training' if training else 'inference'}", "batch": batch, "side": side, "rows": rows}


def cases(settings: Settings) -> dict[str, list[Callable[[], dict]]]:
    """The cases by number; each a list of what is measured."""

    def of(name: str, pattern: P.Pattern, full, tiny, backward=(False,), dense: bool = True) -> list[Callable[[], dict]]:
        *grid, batch, heads, dim = settings.size(full, tiny)
        return [partial(operator, settings, name, pattern, tuple(grid), batch, heads, dim, b, dense) for b in backward]

    both = (False, True)
    seven, thirteen = (P.Neighborhood(3), P.Neighborhood(3)) if settings.smoke else (P.Neighborhood(7), P.Neighborhood(13))
    wide = P.Neighborhood(4 if settings.smoke else 80)
    wide_strided = P.Neighborhood(4, stride=4) if settings.smoke else P.Neighborhood(80, stride=16)
    video = P.Neighborhood((2, 3, 3)) if settings.smoke else P.Neighborhood((18, 24, 24))
    video_strided = P.Neighborhood(2, stride=2) if settings.smoke else P.Neighborhood((18, 24, 24), stride=(16, 8, 8))
    plane, space = (5, 6, 1, 1, 16), (2, 4, 4, 1, 1, 16)
    return {
        "9": [
            *of("neighborhood 7", seven, (56, 56, 64, 4, 32), plane, both),
            *of("neighborhood 7", seven, (224, 224, 16, 4, 32), plane, both, dense=False),
        ],
        "10": [
            run
            for dilation in (1, 2)
            for run in of(
                "neighborhood 13",
                P.Neighborhood(thirteen.kernel_size, dilation),
                (224, 224, 4, 4, 64),
                plane,
                both,
                dense=False,
            )
        ],
        "11": of("image of 4096", wide, (256, 256, 1, 24, 128), plane),
        "12": of("video", video, (30, 48, 80, 1, 24, 128), space, both),
        "13": [
            *of("image of 4096, strided", wide_strided, (256, 256, 1, 24, 128), plane, dense=False),
            *of("video, strided", video_strided, (30, 48, 80, 1, 24, 128), space, dense=False),
        ],
        "14": of(
            "video autoencoder", P.Neighborhood(3 if settings.smoke else 7), (32, 64, 64, 1, 8, 64), space, both, dense=False
        ),
        "15": [
            partial(backbone, settings, name, training)
            for name in (("nat_mini",) if settings.smoke else ("nat_tiny", "dinat_tiny", "swin_tiny_patch4_window7_224"))
            for training in ((False,) if settings.smoke else both)
        ],
    }


def shown(case: dict) -> str:
    """A case as a table."""
    lines = [f"\n{case['case']}  " + "  ".join(f"{k}={v}" for k, v in case.items() if k not in ("case", "rows", "pattern"))]
    for row in case["rows"]:
        if "ms" not in row:
            lines.append(f"  {row['variant']:<24}{row.get('failed', 'no time')[:120]}")
            continue
        kernel = "" if row["kernel_ms"] is None else f"  kernels {row['kernel_ms']:>9.3f} ms"
        further = "".join(
            f"  {key} {row[key]:.3g}" for key in ("error", "extra_mb", "computed_tflops", "images_per_s") if row.get(key)
        )
        lines.append(
            f"  {row['variant']:<24}{row['ms']:>10.3f} ms ({row['q1']:.3f}-{row['q3']:.3f}){kernel}  x{row['ratio']}{further}"
        )
    return "\n".join(lines)


def usable(settings: Settings) -> bool:
    """Whether the device still answers: after an illegal access nothing in this process does."""
    try:
        wait(settings)
    except RuntimeError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cases", nargs="*", help="correctness, or numbers of cases; all by default")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=8.0, help="cases not begun by then are left out")
    given = parser.parse_args()
    if not given.smoke and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --smoke runs tiny sizes on the CPU")
    device = torch.device("cpu" if given.smoke else "cuda")
    dtype = torch.float32 if given.smoke else torch.bfloat16
    settings = Settings(given.smoke, device, dtype, 2 if given.smoke else 25, 0.0 if given.smoke else 4.0)
    chip = "cpu" if given.smoke else torch.cuda.get_device_name()
    where = given.out or RESULTS / re.sub(r"[^a-z0-9]+", "-", chip.lower()).strip("-")
    about = machine() | {"device": chip} | versions(("triton", "natten", "flash-attn", "timm"))
    if not given.smoke:
        about["cudnn"], about["cuda"] = torch.backends.cudnn.version(), torch.version.cuda
    every = cases(settings)
    if unknown := set(given.cases) - {"correctness", *every}:
        raise SystemExit(f"unknown cases {sorted(unknown)}; there are correctness, {', '.join(every)}")
    began = time.perf_counter()

    def restart_if_broken(left: list[str]) -> None:
        """Run the cases that are left in a process of their own where this one has lost its device."""
        if usable(settings):
            return
        print("the device is lost to this process:", ", ".join(left) or "nothing", "left", flush=True)
        minutes = given.minutes - (time.perf_counter() - began) / 60
        if left and minutes > 0:
            where_to = ["--out", str(where), "--minutes", f"{minutes:.2f}"]
            os.execv(sys.executable, [sys.executable, __file__, *left, *where_to])
        raise SystemExit(1)

    numbers = [number for number in given.cases or every if number != "correctness"]
    if not given.cases or "correctness" in given.cases:
        rows: list[dict] = []
        try:
            rows.extend(correctness(settings))
        except RuntimeError as problem:  # the device is lost
            print("correctness broke off:", short(problem), flush=True)
        write(where / "correctness.json", rows, about)
        for backend in BACKENDS:
            own = [row for row in rows if row["backend"] == backend]
            wrong = [row for row in own if row.get("right") is False or "failed" in row]
            print(f"{backend:<8} right {sum(row.get('right', False) for row in own)}, refused "
                  f"{sum('refused' in row for row in own)}, wrong or failed {len(wrong)}", flush=True)  # fmt: skip
            for row in wrong:
                print("   ", {key: value for key, value in row.items() if key != "backend"}, flush=True)
        restart_if_broken(numbers)
    for i, number in enumerate(numbers):
        measured: list[dict] = []
        for run in every.get(number, ()):
            if time.perf_counter() - began > given.minutes * 60:
                measured.append({"case": f"{number}", "failed": f"not begun within {given.minutes} minutes", "rows": []})
                continue
            try:
                measured.append(run())
            except Exception as problem:  # the next cases still count
                measured.append({"case": f"{number}", "failed": short(problem), "rows": []})
            print(shown(measured[-1]), flush=True)
            write(where / f"case-{number}.json", measured, about)
            restart_if_broken(numbers[i + 1 :])


if __name__ == "__main__":
    main()
