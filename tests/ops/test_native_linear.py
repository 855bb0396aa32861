"""The compiled linear attention equals the definition in float64: output, state and all gradients."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regard.ops.compiled import library, missing
from regard.ops.linear import chunks as linear_chunks
from regard.ops.linear import memory as linear_memory_of
from regard.ops.linear import native
from regard.ops.linear.attend import LinearState, linear_attend

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"no compiled kernels: {missing()}")


def results(tensors: dict[str, Tensor], weights: dict[str, Tensor], backend: str, **options) -> dict[str, Tensor]:
    """Output, state and gradients, in float64."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    given = {name: leaves[name] for name in ("q", "k", "v")}
    state = LinearState(leaves["state"], None, None) if "state" in leaves else None
    y, final = linear_attend(
        **given, log_decay=leaves.get("decay"), state=state, causal=True, return_state=True, backend=backend, **options
    )
    loss = (y.double() * weights["y"]).sum() + (final.memory.double() * weights["memory"]).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    found = {"y": y, "memory": final.memory} | {f"gradient of {n}": g for n, g in zip(leaves, grads, strict=True)}
    return {name: t.detach().double() for name, t in found.items()}


def assert_native_is_exact(tensors: dict[str, Tensor], tolerance: float, **options) -> None:
    batch, tokens, heads, dim = tensors["q"].shape
    value = tensors["v"].shape[-1]
    weights = {
        "y": torch.randn(batch, tokens, heads, value, dtype=torch.float64),
        "memory": torch.randn(batch, heads, dim, value, dtype=torch.float64),
    }
    found = results(tensors, weights, "native", **options)
    expected = results({n: t.double() for n, t in tensors.items()}, weights, "naive", **options)
    for name, right in expected.items():
        assert found[name].shape == right.shape, name
        error = (found[name] - right).abs().max() / right.abs().max().clamp(min=1.0)
        assert error <= tolerance, f"{name}: {error:.2e}"


@st.composite
def attentions(draw):
    """Every remainder of chunks, vectors and blocks of rows; decays of heads and of tokens, some of which leave nothing."""
    batch, heads, tokens = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 90))
    dim, value = draw(st.integers(1, 37)), draw(st.integers(1, 37))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {"q": normal(batch, tokens, heads, dim), "k": normal(batch, tokens, heads, dim)}
    tensors["v"] = normal(batch, tokens, heads, value)
    kind = draw(st.sampled_from(("none", "head", "token", "forgetting")))
    if kind != "none":
        decay = -torch.rand(*[heads] if kind == "head" else (batch, tokens, heads), generator=generator)
        tensors["decay"] = decay.masked_fill(decay < -0.9, -1e3) if kind == "forgetting" else decay
    if draw(st.booleans()):
        tensors["state"] = normal(batch, heads, dim, value)
    valid = torch.rand(batch, tokens, generator=generator) > 0.3 if draw(st.booleans()) else None
    return tensors, valid


@given(attentions(), st.sampled_from(["none", "relu", "elu_plus_one", "silu"]), st.sampled_from([1, 4, 16, 32, 64, 256]))
@settings(max_examples=120)
def test_native_equals_the_definition(attention, feature, chunk):
    tensors, valid = attention
    assert_native_is_exact(tensors, 2e-5, feature=feature, valid=valid, chunk=chunk)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_rows_on_several_threads(threads, dtype):
    tensors = {name: torch.randn(2, 500, 3, 48).to(dtype) for name in "qkv"} | {"decay": -torch.rand(2, 500, 3)}
    torch.set_num_threads(threads)
    try:
        assert_native_is_exact(tensors, 2e-5 if dtype == torch.float32 else 2e-2, feature="elu_plus_one")
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("strength", [1e-4, 0.1, 5.0, 60.0, float("inf")])
def test_sums_of_strong_decays_are_not_rounded_away(strength):
    """Weak decays after strong ones: differences of large sums, of which float32 alone would keep three digits."""
    decay = -torch.rand(1, 120, 2) * 0.05
    decay[:, ::40] = -strength
    tensors = {name: torch.randn(1, 120, 2, 16) for name in "qkv"}
    outs = [
        linear_attend(*(t.to(kind) for t in tensors.values()), causal=True, log_decay=decay.to(kind), backend=backend).double()
        for kind, backend in ((torch.float32, "native"), (torch.float64, "naive"))
    ]
    assert (outs[0] - outs[1]).abs().max() <= 1e-6 * outs[1].abs().max()


def test_a_stream_of_parts_is_the_whole():
    q, k, v = (torch.randn(1, 150, 2, 16) for _ in range(3))
    decay = -torch.rand(1, 150, 2)
    options = {"causal": True, "feature": "relu", "norm": "sum", "eps": 1e-3, "backend": "native"}
    whole = linear_attend(q, k, v, log_decay=decay, **options)
    state, parts = None, []
    for rows in (slice(0, 7), slice(7, 100), slice(100, 150)):
        y, state = linear_attend(
            q[:, rows], k[:, rows], v[:, rows], log_decay=decay[:, rows], state=state, return_state=True, **options
        )
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_rows_are_read_where_they_lie():
    q, k, v = torch.randn(2, 60, 3, 2, 24).unbind(2)
    expected = linear_attend(q, k, v, causal=True, backend="naive")
    torch.testing.assert_close(linear_attend(q, k, v, causal=True, backend="native"), expected, rtol=1e-4, atol=1e-4)
    turned = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in (q, k, v)]
    torch.testing.assert_close(linear_attend(*turned, causal=True, backend="native"), expected, rtol=1e-4, atol=1e-4)


def test_few_heads_on_many_threads_are_left_to_operators(monkeypatch):
    asked = []
    monkeypatch.setattr(native, "scan", lambda *arguments: asked.append(1) or linear_chunks.scan(*arguments))
    q = torch.randn(1, 40, 2, 8)
    expected = linear_attend(q, q, q, causal=True)
    assert asked == [1]
    torch.set_num_threads(7)
    try:
        torch.testing.assert_close(linear_attend(q, q, q, causal=True), expected)
    finally:
        torch.set_num_threads(1)
    assert asked == [1]


@given(attentions(), st.sampled_from(["none", "relu", "elu_plus_one", "silu"]), st.sampled_from(["none", "sum", "floor"]))
@settings(max_examples=80)
def test_over_all_keys(attention, feature, norm):
    tensors, valid = attention
    tensors = {name: tensors[name] for name in "qkv"}
    options = {"feature": feature, "valid": valid, "norm": "none" if norm == "none" else "sum"}
    if norm != "none":  # sums of any sign may come close to 0
        tensors |= {name: tensors[name].abs() for name in "qk"}
        options |= {"floor": 1.0 if norm == "floor" else None, "eps": 0.5}
    found = []
    for kind, backend in ((torch.float32, "native"), (torch.float64, "naive")):
        leaves = [t.to(kind).requires_grad_() for t in tensors.values()]
        y = linear_attend(*leaves, backend=backend, **options)
        grads = torch.autograd.grad(y.square().sum(), leaves)
        found.append([t.double() for t in (y, *grads)])
    for left, right in zip(*found, strict=True):
        assert (left - right).abs().max() <= 2e-5 * right.abs().max().clamp(min=1.0)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_over_all_keys_tokens_are_shared_out(threads):
    """More chunks than slices, and fewer; queries of another number than keys."""
    q, k, v = torch.randn(1, 1000, 2, 16), torch.randn(1, 290, 2, 16), torch.randn(1, 290, 2, 40)
    options = {"feature": "elu_plus_one", "norm": "sum"}
    torch.set_num_threads(threads)
    try:
        found = linear_attend(q, k, v, backend="native", **options)
    finally:
        torch.set_num_threads(1)
    expected = linear_attend(q.double(), k.double(), v.double(), backend="naive", **options)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("decay", [None, "head", "token"])
def test_the_operators_are_well_formed(decay):
    q, k, v = (torch.randn(1, 20, 2, 8, requires_grad=True) for _ in range(3))
    logs = {None: None, "head": -torch.rand(2), "token": -torch.rand(1, 20, 2)}[decay]
    arguments = (q, k, v, None if logs is None else logs.requires_grad_(), None, None, "silu", 16, "native")
    torch.library.opcheck(linear_chunks.linear_scan, arguments)
    torch.library.opcheck(linear_memory_of.linear_memory, (k, v, None, "silu", "native"))
    memory, total = torch.randn(1, 2, 8, 8, requires_grad=True), torch.rand(1, 2, 8, requires_grad=True)
    torch.library.opcheck(linear_memory_of.linear_read, (q, memory, total, 0.1, 0.2, "relu", "native"))


def test_it_says_what_it_cannot_do():
    q = torch.randn(1, 20, 2, 8)
    for tensor, options, reason in (
        (q.double(), {"causal": True}, "only float32 and bfloat16; got torch.float64"),
        (q, {"causal": True, "log_decay": torch.zeros(2, 8)}, "one decay per head, or per token and head; got \\(2, 8\\)"),
        (q.to("meta"), {"causal": True}, "compiled for CPUs; got meta"),
    ):
        with pytest.raises(ValueError, match=f"backend 'native' cannot run this call: .*{reason}"):
            linear_attend(tensor, tensor, tensor, backend="native", **options)


def test_the_task_is_laid_out_as_in_c():
    assert library.library().regard_scan_size() == ctypes.sizeof(native.Scan)
