"""The affine map is the definition, whichever form computes it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from regard.layers.linear import Chain, linear, linear_part
from regard.layers.mlps import MLP, PIECE
from regard.ops.affine import affine, fast_here


def _operands(rows: tuple[int, ...], width: int, out: int, bias: bool = True):
    torch.manual_seed(0)
    x, weight = torch.randn(*rows, width), torch.randn(out, width) / width**0.5
    return x, weight, torch.randn(out) if bias else None


@given(st.integers(1, 70), st.integers(1, 40), st.integers(1, 40), st.booleans(), st.booleans())
def test_affine_equals_the_definition_in_float64(rows, width, out, bias, gelu):
    x, weight, b = _operands((2, rows), width, out, bias)
    truth = torch.einsum("brw,ow->bro", x.double(), weight.double()) + (0 if b is None else b.double())
    truth = truth * 0.5 * (1 + torch.erf(truth / 2**0.5)) if gelu else truth
    torch.testing.assert_close(affine(x, weight, b, gelu=gelu).double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("width", "out"), [(24, 96), (96, 24)])
def test_first_and_second_derivatives_are_those_of_the_definition(width, out):
    x, weight, bias = (t.requires_grad_() for t in _operands((3, 17), width, out))
    direction = torch.randn(3, 17, out)

    def derivatives(function, *tensors):
        y = (function(*tensors).tanh() * direction.to(tensors[0].dtype)).sum()
        first = torch.autograd.grad(y, tensors, create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in first), tensors)
        return *first, *second

    ours = derivatives(affine, x, weight, bias)
    truth = derivatives(F.linear, *(t.detach().double().requires_grad_() for t in (x, weight, bias)))
    for mine, right in zip(ours, truth, strict=True):
        assert (mine.double() - right).norm() <= 1e-5 * right.norm()


def test_strided_and_broadcast_inputs_are_as_good_as_contiguous_ones():
    x, weight, bias = _operands((4, 30), 16, 24)
    for given_x in (x.transpose(0, 1), x[:, ::2], x[..., :1].expand(-1, -1, 16), x.flip(-1).movedim(0, 1)):
        torch.testing.assert_close(affine(given_x, weight, bias), F.linear(given_x.contiguous(), weight, bias))
    torch.testing.assert_close(affine(x, weight[::2], bias[::2]), F.linear(x, weight[::2], bias[::2]))


def test_other_types_and_autocast_keep_their_meaning():
    x, weight, bias = _operands((4, 30), 16, 24)
    assert affine(x.double(), weight.double(), bias.double()).dtype == torch.float64
    assert affine(x.bfloat16(), weight.bfloat16(), bias.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert affine(x, weight, bias).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="tokens must be bfloat16, as the weights are; got a float32"):
        affine(x, weight.bfloat16(), bias)
    with pytest.raises(ValueError, match="tokens must have 16 channels"):
        affine(x[..., :8], weight, bias)


def test_function_transforms_and_forward_mode_agree_with_torch():
    x, weight, bias = _operands((4, 30), 16, 24)
    seen = torch.func.vmap(lambda row: affine(row, weight, bias))(x)
    torch.testing.assert_close(seen, F.linear(x, weight, bias))
    tangent = torch.randn_like(x)
    _, pushed = torch.func.jvp(lambda row: affine(row, weight, bias), (x,), (tangent,))
    torch.testing.assert_close(pushed, F.linear(tangent, weight))
    with torch.autograd.forward_ad.dual_level():
        dual = affine(torch.autograd.forward_ad.make_dual(x, tangent), weight, bias)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, F.linear(tangent, weight))


def test_a_compiled_layer_is_one_graph_of_plain_operators():
    layer = Chain(nn.Linear(16, 24))
    x = torch.randn(4, 30, 16)
    expected = F.linear(x, layer[0].weight, layer[0].bias)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), expected)
    exported = torch.export.export(layer, (x,))
    assert any("linear" in str(node.target) for node in exported.graph.nodes)
    assert not any("mkldnn" in str(node.target) for node in exported.graph.nodes)


def test_flops_are_counted_in_both_directions():
    layer, x = nn.Linear(16, 24), torch.randn(4, 30, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        linear(layer, x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 4 * 30 * 16 * 24


@pytest.mark.skipif(not fast_here(), reason="this machine multiplies as fast with torch's own matrix product")
def test_the_fast_form_is_the_one_that_runs():
    layer, x = nn.Linear(16, 24), torch.randn(4, 30, 16)
    with torch.profiler.profile() as profile, torch.no_grad():
        linear(layer, x)
    assert any("linear_pointwise" in event.key for event in profile.key_averages())


def test_a_part_of_a_layer_equals_that_part_of_what_it_gives():
    torch.manual_seed(0)
    for bias in (True, False):
        layer, x = nn.Linear(16, 24, bias=bias, dtype=torch.float64), torch.randn(4, 30, 16, dtype=torch.float64)
        torch.testing.assert_close(linear_part(layer, x, 5, 17), layer(x)[..., 5:17])
        handle = layer.register_forward_hook(lambda module, inputs, output: 2 * output)
        torch.testing.assert_close(linear_part(layer, x, 5, 17), 2 * F.linear(x, layer.weight, layer.bias)[..., 5:17])
        handle.remove()


@pytest.mark.parametrize("change", ["hook", "pre_hook", "forward", "class", "parametrized", "global"])
def test_a_layer_that_somebody_changed_is_called(change):
    """In the fast form nothing of these would take effect."""
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 24), torch.randn(4, 30, 16)
    plain, handle = layer(x), None
    if change == "hook":
        layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    elif change == "pre_hook":
        layer.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    elif change == "forward":
        layer.forward = lambda x: 2 * plain
    elif change == "class":
        layer = nn.Sequential(layer, nn.Tanh())
    elif change == "parametrized":
        nn.utils.parametrize.register_parametrization(layer, "weight", nn.Tanh())
    else:
        handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: 2 * output)
    try:
        with torch.no_grad():
            torch.testing.assert_close(linear(layer, x), layer(x))
            assert (linear(layer, x) - plain).abs().max() > 1e-3
    finally:
        if handle is not None:
            handle.remove()


def test_an_mlp_in_pieces_equals_the_whole():
    torch.manual_seed(0)
    mlp = MLP(24, 56)
    x = torch.randn(3, 2 * PIECE * torch.get_num_threads() // 3 + 7, 24)
    whole = mlp(x)  # with gradients, nothing is cut
    with torch.no_grad():
        pieces = mlp(x)
    truth = mlp.double()(x.double())
    torch.testing.assert_close(pieces.double(), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole, pieces, rtol=1e-5, atol=1e-5)


def test_layers_inside_an_mlp_may_be_listened_to_or_replaced():
    torch.manual_seed(0)
    mlp, x, heard = MLP(24, 56), torch.randn(2, 40, 24), []
    handle = mlp.fc1.register_forward_hook(lambda module, inputs, output: heard.append(output))
    with torch.no_grad():
        before = mlp(x)
    handle.remove()
    assert len(heard) == 1
    torch.testing.assert_close(heard[0], F.linear(x, mlp.fc1.weight, mlp.fc1.bias))

    class Doubled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, tokens):
            return 2 * self.inner(tokens)

    mlp.fc2 = Doubled(mlp.fc2)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), 2 * before)
