"""Linear attention in Triton: equal to the operators of torch under Triton's interpreter, and compiled without a GPU."""

import os
import subprocess

import pytest
import torch
from torch import Tensor

from regard.ops.linear import chunks as linear_chunks
from regard.ops.linear import memory as linear_memory_of
from regard.ops.linear.attend import linear_attend

from .interpreted import HERE, TRITON, run_interpreted

pytestmark = TRITON
interpreted = pytest.mark.skipif(not HERE, reason="runs in the process with the interpreter")
outside = pytest.mark.skipif(HERE, reason="runs outside of the interpreter")


@outside
def test_the_kernels_pass_under_the_interpreter():
    run_interpreted(__file__, "test")


@outside
def test_without_a_gpu_and_an_interpreter_it_says_so():
    q = torch.randn(1, 4, 1, 8)
    with pytest.raises(ValueError, match="backend 'triton' cannot run this call: it needs tensors on a GPU; got cpu"):
        linear_attend(q, q, q, backend="triton")


def randoms(batch: int, tokens: int, heads: int, dim: int, value: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(batch, tokens, heads, n).to(dtype).requires_grad_() for n in (dim, dim, value)]


def decay_of(kind: str, batch: int, tokens: int, heads: int) -> Tensor | None:
    shapes = {"none": None, "head": (heads,), "token": (batch, tokens, heads), "strong": (batch, tokens, heads)}
    if shapes[kind] is None:
        return None
    decay = -torch.rand(shapes[kind])
    return decay.where(torch.rand(decay.shape) > (0.1 if kind == "strong" else 0.0), -1e4).requires_grad_()


def with_gradients(run, inputs: list[Tensor | None]) -> list[Tensor]:
    outs = run(*inputs)
    generator = torch.Generator().manual_seed(1)
    total = sum((t.double() * torch.randn(t.shape, generator=generator, dtype=torch.float64)).sum() for t in outs)
    return [*outs, *torch.autograd.grad(total, [t for t in inputs if t is not None])]


def check(run, inputs: list[Tensor | None], dtype: torch.dtype) -> None:
    """Equal to the operators of torch in float64, output and gradients."""
    found = with_gradients(lambda *t: run(*t, "triton"), inputs)
    wide = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    expected = with_gradients(lambda *t: run(*t, "torch"), wide)
    for ours, exact in zip(found, expected, strict=True):
        limit = {torch.float32: 2e-6, torch.float16: 2**-10}[dtype]
        assert ours.dtype in (dtype, torch.float32)
        assert (ours.double() - exact).norm() <= limit * exact.norm() + 1e-30


ODD = (2, 21, 2, 5, 7, 16)  # odd everywhere, an incomplete chunk
WIDE_KEYS = (1, 35, 1, 80, 20, 32)  # two tiles of features
WIDE_VALUES = (1, 9, 2, 16, 72, 64)  # several tiles of values, fewer tokens than a chunk


@interpreted
@pytest.mark.parametrize(
    ("sizes", "decay", "dtype"),
    [
        (ODD, "none", torch.float32),
        (ODD, "head", torch.float32),
        (ODD, "token", torch.float16),
        (ODD, "strong", torch.float32),
        (WIDE_KEYS, "token", torch.float32),
        (WIDE_VALUES, "head", torch.float16),
        (WIDE_VALUES, "token", torch.float32),
    ],
    ids=str,
)
def test_causal_attention_equals_the_chunks(sizes, decay, dtype):
    batch, tokens, heads, dim, value, chunk = sizes
    state = torch.randn(batch, heads, dim, value, requires_grad=True)
    inputs = [*randoms(batch, tokens, heads, dim, value, dtype), decay_of(decay, batch, tokens, heads), state]
    valid = torch.rand(batch, tokens) > 0.3 if decay != "head" else None

    def run(q, k, v, logs, state, kernel):
        return linear_chunks.linear_scan(q, k, v, logs, state, valid, "elu_plus_one", chunk, kernel)

    check(run, inputs, dtype)


@interpreted
@pytest.mark.parametrize(
    ("sizes", "dtype"), [(ODD, torch.float16), (WIDE_KEYS, torch.float32), (WIDE_VALUES, torch.float32)], ids=str
)
def test_attention_to_all_keys_equals_the_products(sizes, dtype):
    batch, tokens, heads, dim, value, _ = sizes
    inputs = randoms(batch, tokens, heads, dim, value, dtype)
    valid = torch.rand(batch, tokens) > 0.3

    def run(q, k, v, kernel):
        memory, total = linear_memory_of.linear_memory(k, v, valid, "elu_plus_one", kernel)
        divided, _ = linear_memory_of.linear_read(q, memory, total, 3.0, 0.1, "elu_plus_one", kernel)
        return divided, linear_memory_of.linear_read(q, memory, None, None, 0.0, "elu_plus_one", kernel)[0]

    check(run, inputs, dtype)


@interpreted
@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
def test_features_are_made_in_the_kernels(activation):
    inputs = randoms(1, 20, 1, 8, 8, torch.float32)
    check(
        lambda q, k, v, kernel: linear_chunks.linear_scan(q, k, v, None, None, None, activation, 16, kernel),
        inputs,
        torch.float32,
    )

    def everything(q, k, v, kernel):
        memory, total = linear_memory_of.linear_memory(k, v, None, activation, kernel)
        return [linear_memory_of.linear_read(q, memory, total, 0.5, 0.0, activation, kernel)[0]]

    check(everything, inputs, torch.float32)


@interpreted
def test_sums_over_many_parts_add_up():
    tokens = 64 * 64 + 700  # two tiles in every part
    k, v = torch.randn(1, tokens, 1, 4), torch.randn(1, tokens, 1, 4)
    memory, total = linear_memory_of.linear_memory(k, v, None, "relu", "triton")
    exact, sums = linear_memory_of.linear_memory(k.double(), v.double(), None, "relu", "torch")
    torch.testing.assert_close(memory.double(), exact, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(total.double(), sums, rtol=1e-5, atol=1e-4)


@interpreted
@pytest.mark.parametrize("options", [{"causal": True, "norm": "sum"}, {"norm": "sum"}, {"norm": "count"}], ids=str)
def test_the_front_door_takes_the_kernels_where_asked(options):
    q, k, v = (torch.randn(2, 3, 5, 2, n) for n in (8, 8, 6))
    options |= {"feature": "elu_plus_one", "return_state": True}
    out, state = linear_attend(q, k, v, backend="triton", **options)
    expected, last = linear_attend(*(t.double() for t in (q, k, v)), backend="naive", **options)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.memory.double(), last.memory, rtol=1e-5, atol=1e-5)


@interpreted
def test_float16_sums_leave_its_range_inside():
    q, k, v = (50 * torch.rand(1, 200, 1, 16).half() for _ in range(3))
    exact = linear_attend(*(t.double() for t in (q, k, v)), causal=True, norm="sum")
    found = linear_attend(q, k, v, causal=True, norm="sum", backend="triton")
    torch.testing.assert_close(found.double(), exact, rtol=2**-9, atol=0)


# --------------------------------------------------------------------------------------------------------------------
# compiled for a GPU that is not there


def compiled(name: str, kind: str, dim: int):
    """A kernel for sm_90, with tensors of ``kind`` and heads of ``dim``."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from regard.ops.linear import triton as linear

    kernel = getattr(linear, name)
    constants = {
        "D": dim, "E": dim, "BD": 64, "BE": 64, "BT": 64, "ACTIVATION": "elu_plus_one", "VALID": True, "DECAY": True,
        "ENTER": False, "REVERSE": False, "LEARNED": True, "KIND": tl.bfloat16 if kind == "bf16" else tl.float32,
        "PRECISION": "tf32" if kind == "fp16" else "ieee", "DIVIDE": True, "WEIGH": True, "FLOOR": True, "SUM": True,
        "SIZE": dim * dim, "BLOCK": 1024,
    }  # fmt: skip
    if name == "_keys_kernel":
        constants |= linear.crowded(constants["KIND"])
    if name in ("_output_kernel", "_values_kernel"):
        constants |= linear.stepped(dim)
    integers = ("tokens", "heads", "chunks", "length", "by_item", "by_token", "by_head")
    halves = ("q", "k", "v", "x", "y", "grad", "grad_q", "grad_k", "grad_v", "out")
    signature: dict[str, str] = {}
    for parameter in kernel.params:
        argument = parameter.name
        if parameter.is_constexpr:
            signature[argument] = "constexpr"
        elif argument in integers:
            signature[argument] = "i32"
        elif argument in ("floor", "eps"):
            signature[argument] = "fp32"
        elif argument == "valid":
            signature[argument] = "*i1"
        else:
            signature[argument] = (
                f"*{kind}" if argument in halves and not (name == "_added_kernel" and argument == "out") else "*fp32"
            )
    fixed = {argument: constants[argument] for argument, type_ in signature.items() if type_ == "constexpr"}
    return triton.compile(ASTSource(kernel, signature, fixed), target=GPUTarget("cuda", 90, 32), options=linear.WARPS)


KERNELS = [
    "_added_kernel",
    "_output_kernel",
    "_keys_kernel",
    "_values_kernel",
    "_memory_kernel",
    "_read_kernel",
    "_turned_kernel",
]


@pytest.mark.slow
@outside
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kind", ["bf16", "fp16"])
@pytest.mark.parametrize("name", [*KERNELS, "_states_kernel"])
def test_kernels_compile_for_hopper_without_spills(name, kind, dim, tmp_path):
    import triton

    kernel = compiled(name, kind, dim)
    code = tmp_path / "kernel.cubin"
    code.write_bytes(kernel.asm["cubin"])
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    usage = subprocess.run([tool, "--dump-resource-usage", code], capture_output=True, text=True, check=True).stdout
    assert "STACK:0" in usage
    assert "LOCAL:0" in usage
    if name != "_states_kernel":
        assert "wgmma.mma_async" in kernel.asm["ptx"]
        assert "mma.sync" not in kernel.asm["ptx"]


@TRITON
def test_more_rows_than_the_second_axis_of_a_launch_holds_lie_on_the_first():
    """Only the first axis of a launch may have more than 65535 programs."""
    linear = pytest.importorskip("regard.ops.linear.triton", reason="triton is not installed")
    q = torch.empty(9000, 130, 8, 32, device="meta")
    of = linear._Scan(q, q, None, None, "identity", 64)
    for grid in (of.grid("D", "E"), linear._launch(q, 32, 32, "identity", "E")[0]):
        assert grid == (72000, 3, 1)
