"""Attention inside compiled, exported and shape-only programs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from regard import Source, attend
from regard.layers.positions import OffsetBias
from regard.ops import patterns as P
from regard.ops.backends import tiled
from regard.ops.backends.native import backend as native
from regard.ops.compiled import missing

STATIC = (
    "dense", "causal", "window(4)", "window(3, shift=1)", "neighborhood(3)", "neighborhood(5, dilation=2, stride=2)",
    "neighborhood(3, border='zero')", "halo(3, 1)", "grid(3)", "axis(0)", "axis(0) | axis(1)",
    "perhead({window(3): 1, dense: 1})",
)  # fmt: skip


def qkv(height: int = 9, width: int = 8, grad: bool = False) -> list[Tensor]:
    return [torch.randn(2, height, width, 2, 8, requires_grad=grad) for _ in range(3)]


def loss_and_gradients(function, inputs):
    out = function(*inputs)
    return (out, *torch.autograd.grad(out.square().sum(), inputs))


def close(found, expected) -> None:
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("pattern", STATIC)
def test_compiles_into_one_graph_with_gradients(pattern):
    def function(q, k, v):
        return attend(q, k, v, pattern)

    inputs = qkv(grad=True)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    close(loss_and_gradients(compiled, inputs), loss_and_gradients(function, inputs))


@pytest.mark.parametrize("pattern", ["neighborhood(3)", "window(4)", "dense", "axis(0) | axis(1)"])
def test_compiles_with_dynamic_shapes(pattern):
    def function(q, k, v):
        return attend(q, k, v, pattern)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((9, 8), (10, 12), (7, 5)):
        inputs = qkv(*size, grad=True)
        close(loss_and_gradients(compiled, inputs), loss_and_gradients(function, inputs))


def test_compiles_where_one_tensor_is_query_key_and_value():
    def function(x):
        return attend(x, x, x, "neighborhood(3)")

    x = qkv(grad=True)[0]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    close(loss_and_gradients(compiled, [x]), loss_and_gradients(function, [x]))


@pytest.mark.slow
def test_compiles_by_the_default_compiler():
    def function(q, k, v, table):
        y = attend(q, k, v, P.Neighborhood(3))
        return y + attend(q, k, v, P.Blocks(table, 4)) + attend(q, [Source(k, v, "window(4)"), Source(k, v, "grid(2)")])

    inputs = qkv(grad=True)
    table = torch.randint(-1, 6, (2, 6, 2))
    compiled = torch.compile(lambda *x: function(*x, table), fullgraph=True)
    close(loss_and_gradients(compiled, inputs), loss_and_gradients(lambda *x: function(*x, table), inputs))


def test_routed_patterns_cross_the_border_of_a_compiled_graph():
    def route(labels, table):
        return P.Clusters(labels + 1), P.Blocks(table.flip(-1), 4)

    def use(q, k, v, clusters, blocks):
        return attend(q, k, v, clusters) + attend(q, k, v, blocks)

    inputs = qkv()
    labels, table = torch.randint(0, 3, (2, 72)), torch.randint(-1, 6, (2, 6, 2))
    patterns = torch.compile(route, fullgraph=True, backend="aot_eager")(labels, table)
    compiled = torch.compile(use, fullgraph=True, backend="aot_eager")
    close([compiled(*inputs, *patterns)], [use(*inputs, *route(labels, table))])


@pytest.mark.parametrize("pattern", STATIC)
def test_shapes_without_data(pattern):
    q, k, v = (torch.empty(2, 9, 8, 2, n, device="meta") for n in (8, 8, 5))
    out, lse = attend(q, k, v, pattern, return_lse=True)
    assert out.is_meta
    assert out.shape == (2, 9, 8, 2, 5)
    assert lse.shape == (2, 9, 8, 2)


class Attention(nn.Module):
    def __init__(self, pattern: str, bias: bool = False, return_lse: bool = False) -> None:
        super().__init__()
        self.pattern, self.return_lse = P.parse(pattern), return_lse
        self.bias = OffsetBias(2, self.pattern, std=1.0) if bias else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor):
        return attend(q, k, v, self.pattern, bias=self.bias, return_lse=self.return_lse)


@pytest.mark.parametrize("pattern", STATIC)
@pytest.mark.parametrize("return_lse", [False, True])
def test_exported_program_equals_eager(pattern, return_lse):
    module = Attention(pattern, return_lse=return_lse)
    program = torch.export.export(module, tuple(qkv()))
    inputs = qkv()
    found, expected = program.module()(*inputs), module(*inputs)
    close(found if return_lse else [found], expected if return_lse else [expected])
    assert not [node for node in program.graph.nodes if "regard" in str(node.target)]  # plain operators only


@pytest.mark.parametrize("pattern", ["window(4, shift=1)", "neighborhood(3, dilation=2)", "halo(3, 1)", "grid(3)"])
def test_exported_program_keeps_the_relative_bias(pattern):
    module = Attention(pattern, bias=True)
    program = torch.export.export(module, tuple(qkv()))
    inputs = qkv()
    close([program.module()(*inputs)], [module(*inputs)])


def test_exported_program_takes_routed_blocks():
    class Routed(nn.Module):
        def forward(self, q, k, v, table):
            return attend(q, k, v, P.Blocks(table, 3))

    program = torch.export.export(Routed(), (*qkv(), torch.randint(-1, 9, (2, 9, 2))))
    inputs = (*qkv(), torch.randint(-1, 9, (2, 9, 2)))
    close([program.module()(*inputs)], [Routed()(*inputs)])


OPERATORS = [tiled.tiled_attention] + ([native.native_attention] if missing() is None else [])
SAMPLES = {
    "neighborhood": {"spec": "Neighborhood(3)"},
    "window with bias": {"spec": "Window(4)", "table": (2, 7, 7), "bias_spec": "Window(4)"},
    "halo with zero keys": {"spec": "Halo(3, 1)", "zeros": [1, 1, 1, 2]},
    "blocks": {"spec": "", "blocks": True, "block": [4, 4]},
    "a key mask": {"spec": "Axis(0)", "valid": True},
}


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", SAMPLES)
def test_the_operator_is_well_formed(name, operator):
    sample = SAMPLES[name]
    zeros = sample.get("zeros", [0, 0, 0, 0])
    q = torch.randn(2, 9, 8, 2, 4, requires_grad=True)
    k, v = (torch.randn(2, 9 + zeros[0] + zeros[1], 8 + zeros[2] + zeros[3], 2, 4, requires_grad=True) for _ in range(2))
    table = torch.randn(sample["table"], requires_grad=True) if "table" in sample else None
    valid = torch.rand(2, 9, 8) > 0.3 if sample.get("valid") else None
    blocks = torch.randint(-1, 6, (2, 1, 6, 2)) if sample.get("blocks") else None
    arguments = (
        q, k, v, table, valid, blocks, sample.get("block", []), sample["spec"], sample.get("bias_spec", ""), [0, 0], zeros, 0.5,
        True,
    )  # fmt: skip
    torch.library.opcheck(operator, arguments)
