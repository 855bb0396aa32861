"""Transforms of torch over every operator: right, by finite differences or the definition in float64, or refused by name."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import regard
from regard import attend
from regard import patterns as P
from regard.ops.calls.source import HeadTable
from regard.ops.compiled import missing
from regard.ops.linear.attend import LinearState, linear_attend
from regard.ops.local.deform import sample_points
from regard.ops.local.neighbors import neighbor_scores, neighbor_sum

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

BLOCKS = P.Blocks(torch.tensor([[[0, 1], [1, -1], [2, 3], [3, 0]]]), (2, 2))
PATTERNS = ["window(2)", "neighborhood(3)", "axis(0) | axis(1)", "causal", "dense", BLOCKS]
FUSED = ["tiled"] + ["native"] * (missing() is None)
RIGHT = "auto", "reference", "dense"


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def qkv() -> tuple[Tensor, ...]:
    return tuple(randn(1, 4, 4, 2, 3, seed=i) for i in range(3))


def slope(function, tensors, directions, step: float = 1e-6) -> Tensor:
    """The derivative along directions, by central differences."""
    ahead = function(*(t + step * d for t, d in zip(tensors, directions, strict=True)))
    behind = function(*(t - step * d for t, d in zip(tensors, directions, strict=True)))
    return (ahead - behind) / (2 * step)


def check_transforms(function, tensors: tuple[Tensor, ...]) -> None:
    """Every transform of the table in the guide, against finite differences and plain gradients."""
    directions = tuple(randn(*t.shape, seed=10 + i) for i, t in enumerate(tensors))
    expected = slope(function, tensors, directions)
    close = {"atol": 1e-6, "rtol": 1e-6}
    torch.testing.assert_close(torch.func.jvp(function, tensors, directions)[1], expected, **close)
    for i, direction in enumerate(directions):  # one at a time: not only queries carry tangents
        with forward_ad.dual_level(), torch.no_grad():
            dual = [forward_ad.make_dual(t, direction) if i == j else t for j, t in enumerate(tensors)]
            found = forward_ad.unpack_dual(function(*dual)).tangent
        alone = [direction if i == j else torch.zeros_like(t) for j, t in enumerate(tensors)]
        torch.testing.assert_close(found, slope(function, tensors, alone), **close)

    cotangent = randn(*expected.shape, seed=20)
    leaves = [t.clone().requires_grad_() for t in tensors]
    grads = torch.autograd.grad((function(*leaves) * cotangent).sum(), leaves)
    torch.testing.assert_close((cotangent * expected).sum(), sum((g * d).sum() for g, d in zip(grads, directions, strict=True)))

    def loss(*tensors: Tensor) -> Tensor:
        return (function(*tensors) * cotangent).sum()

    everywhere = tuple(range(len(tensors)))
    torch.testing.assert_close(torch.func.grad(loss, everywhere)(*tensors), grads)
    torch.testing.assert_close(torch.func.vjp(function, *tensors)[1](cotangent), grads)
    torch.testing.assert_close(torch.func.jacrev(loss, everywhere)(*tensors), grads)
    torch.testing.assert_close(torch.func.jacfwd(loss)(*tensors), grads[0])
    batched = tuple(torch.stack([t, t]) for t in tensors)
    torch.testing.assert_close(torch.func.vmap(function)(*batched), torch.stack([function(*tensors)] * 2))
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(*batched)[1], grads[0])
    curvature = torch.func.jvp(torch.func.grad(loss), tensors, directions)[1]  # as torch.func.hessian, along one direction
    torch.testing.assert_close(
        curvature, slope(lambda *t: torch.func.grad(loss)(*t), tensors, directions), atol=1e-5, rtol=1e-5
    )
    mapped = torch.func.jvp(torch.func.vmap(function), batched, tuple(torch.stack([d, d]) for d in directions))[1]
    torch.testing.assert_close(mapped, torch.stack([expected] * 2), **close)
    with forward_ad.dual_level(), torch.no_grad():  # tangents from outside
        dual = [forward_ad.make_dual(b, torch.stack([d, d])) for b, d in zip(batched, directions, strict=True)]
        torch.testing.assert_close(forward_ad.unpack_dual(torch.func.vmap(function)(*dual)).tangent, mapped)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("backend", RIGHT)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_every_transform_of_attention_is_right(pattern, backend):
    check_transforms(lambda q, k, v: attend(q, k, v, pattern, backend=backend), qkv())


def test_every_transform_is_right_for_biases_sinks_and_sources():
    pattern = P.Neighborhood(3)
    check_transforms(
        lambda q, k, v, table, sink: attend(q, k, v, pattern, bias=HeadTable(table, pattern), sink=sink),
        (*qkv(), randn(2, 5, 5, seed=4), randn(2, seed=5)),
    )
    check_transforms(lambda q, k, v, bias: attend(q, k, v, bias=bias), (*qkv(), randn(1, 2, 16, 16, seed=4)))

    def of_sources(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, [regard.Source(k, v, "window(2)"), regard.Source(k[:, :2], v[:, :2])])

    check_transforms(of_sources, qkv())


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("argument", [0, 1, 2])
def test_a_fused_backend_refuses_what_it_has_no_formula_for(backend, argument):
    tensors = [t.float() for t in qkv()]

    def function(x: Tensor) -> Tensor:
        return attend(*tensors[:argument], x, *tensors[argument + 1 :], "window(2)", backend=backend)

    x = tensors[argument]
    with pytest.raises(ValueError, match=f"backend '{backend}' cannot run this call: no forward-mode.*backend='auto' has them"):
        torch.func.jvp(function, (x,), (x,))
    with pytest.raises(ValueError, match=r"no gradients by torch\.func"):
        torch.func.grad(lambda x: function(x).sum())(x)
    with forward_ad.dual_level(), torch.no_grad(), pytest.raises(ValueError, match="no forward-mode"):
        function(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("pattern", ["window(2)", "neighborhood(3)", "axis(0) | axis(1)", BLOCKS], ids=str)
def test_gradients_of_fused_backends_are_differentiated_by_the_definition(pattern, backend):
    dtype = torch.float64 if backend == "tiled" else torch.float32
    found = []
    for name, kind in ((backend, dtype), ("reference", torch.float64)):
        leaves = [t.to(kind).requires_grad_() for t in qkv()]
        # one tensor in two places: each takes its own part of the gradient
        y, lse = attend(leaves[0], leaves[0] + leaves[1], leaves[2], pattern, backend=name, return_lse=True)
        grads = torch.autograd.grad(y.square().sum() + lse.sum(), leaves, create_graph=True)
        found.append([g.double() for g in torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)])
    torch.testing.assert_close(*found, atol=2e-4, rtol=2e-4)


def test_the_gradient_of_a_bias_table_is_differentiated_too():
    pattern = P.Window(2)
    found = []
    for name in ("tiled", "reference"):
        leaves = [*(t.requires_grad_() for t in qkv()), randn(2, 3, 3, seed=4).requires_grad_()]
        y = attend(*leaves[:3], pattern, bias=HeadTable(leaves[3], pattern), backend=name)
        grads = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("backend", FUSED)
def test_values_alone_are_differentiated_twice_beside_a_log_sum_exp_that_does_not_depend_on_them(backend):
    q, k, v = (t.float() for t in qkv())
    v.requires_grad_()
    found = []
    for name in (backend, "reference"):
        out, lse = attend(q, k, v, "window(2)", return_lse=True, backend=name)
        (grad,) = torch.autograd.grad(out.square().sum() + lse.sum(), v, create_graph=True)
        found.append((grad, *torch.autograd.grad(grad.square().sum(), v)))
    torch.testing.assert_close(*found)


def test_vmap_of_a_fused_backend_is_the_loop_over_items():
    q, k, v = (torch.stack([t, 2 * t]).float() for t in qkv())
    for backend in FUSED:
        found = torch.func.vmap(lambda q, k, v, name=backend: attend(q, k, v, "window(2)", backend=name))(q, k, v)
        expected = torch.stack([attend(*one, "window(2)", backend="reference") for one in zip(q, k, v, strict=True)])
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("feature", ["none", "elu_plus_one", "silu"])
def test_every_transform_of_linear_attention_is_right(feature, causal):
    valid = torch.tensor([[True] * 5 + [False] + [True] * 3])
    tensors = randn(1, 9, 2, 3).abs() + 0.1, randn(1, 9, 2, 3, seed=1).abs() + 0.1, randn(1, 9, 2, 4, seed=2)
    check_transforms(
        lambda q, k, v: linear_attend(q, k, v, feature=feature, norm="sum", causal=causal, valid=valid, chunk=4), tensors
    )


def test_every_transform_of_decays_and_states_is_right():
    tensors = randn(1, 6, 2, 3).abs(), randn(1, 6, 2, 3, seed=1).abs(), randn(1, 6, 2, 4, seed=2)
    carried = randn(1, 6, 2, seed=3), randn(1, 2, 3, 4, seed=4), randn(1, 2, 3, seed=5).abs()

    def function(q, k, v, decay, memory, total):
        state = LinearState(memory, total)
        return linear_attend(q, k, v, causal=True, norm="sum", log_decay=-decay.exp(), state=state, chunk=2)

    check_transforms(function, (*tensors, *carried))
    check_transforms(lambda q, k, v, d: linear_attend(q, k, v, log_decay=-d.exp(), chunk=2), (*tensors, carried[0]))


def test_a_named_backend_of_linear_attention_refuses():
    x = torch.randn(1, 6, 2, 3)
    with pytest.raises(ValueError, match=r"backend 'chunked' cannot run this call: no forward-mode.*backend='auto' has them"):
        torch.func.jvp(lambda v: linear_attend(x, x, v, backend="chunked"), (x,), (x,))


@pytest.mark.parametrize("pattern", ["neighborhood(3)", "window(2)", "neighborhood(3, border='mask')"])
def test_every_transform_of_neighbours_is_right(pattern):
    q, k = randn(1, 4, 5, 2, 3), randn(1, 4, 5, 2, 3, seed=1)
    check_transforms(lambda q, k: neighbor_scores(q, k, pattern).exp(), (q, k))
    taps = neighbor_scores(q, k, pattern).shape[-1]
    check_transforms(lambda w, v: neighbor_sum(w, v, pattern), (randn(1, 4, 5, 2, taps), k))


def test_every_transform_of_sampled_points_is_right():
    points = torch.rand(1, 3, 2, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 6 - 1
    check_transforms(sample_points, (randn(1, 4, 5, 2, 3), points))


@pytest.mark.parametrize("name", [name for name in regard.list_mixers() if name != "identity"])
def test_every_transform_of_a_mixer_is_right(name):
    torch.manual_seed(0)
    mixer = regard.create_mixer(name, dim=16, heads=2).double().eval()
    for parameter in mixer.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    weights = {key: p.detach() for key, p in mixer.named_parameters()}
    x, direction = randn(1, 5, 4, 16), randn(1, 5, 4, 16, seed=1)

    def run(weights, x: Tensor) -> Tensor:
        y = torch.func.functional_call(mixer, weights, (x,))
        return y[0] if isinstance(y, tuple) else y

    cotangent = randn(*run(weights, x).shape, seed=2)

    def loss(weights, x: Tensor) -> Tensor:
        return (run(weights, x) * cotangent).sum()

    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad((run(dict(mixer.named_parameters()), leaf) * cotangent).sum(), leaf, create_graph=True)
    of_weights, of_x = torch.func.grad(loss, (0, 1))(weights, x)
    torch.testing.assert_close(of_x, grad.detach())
    (grad * direction).sum().backward()
    numeric = slope(lambda x: torch.func.grad(loss, 1)(weights, x), (x,), (direction,))
    torch.testing.assert_close(leaf.grad, numeric, atol=1e-5, rtol=1e-4)  # the Hessian is symmetric
    moved = {key: randn(*w.shape, seed=3) for key, w in weights.items()}
    tangent = torch.func.jvp(loss, (weights, x), (moved, direction))[1]
    together = sum((of_weights[key] * moved[key]).sum() for key in weights) + (of_x * direction).sum()
    torch.testing.assert_close(tangent, together)


def test_tensors_without_values_are_not_looked_at():
    with FakeTensorMode():
        q, logs = torch.zeros(1, 9, 2, 4), torch.zeros(2)
        state = LinearState(torch.zeros(1, 2, 4, 4), None, torch.zeros(1))
        assert linear_attend(q, q, q, causal=True, log_decay=logs, norm="count", state=state).shape == q.shape
        for backend in ("auto", "reference"):
            assert attend(q, q, q, P.Blocks(torch.zeros(1, 3, 1, dtype=torch.long), 3), backend=backend).shape == q.shape
        assert neighbor_sum(neighbor_scores(q, q, "window(3)"), q, "window(3)").shape == q.shape


def test_transforms_leave_nothing_behind_in_the_caches():
    regard.clear_caches()
    q, k, v = qkv()
    torch.func.grad(lambda q: attend(q, k, v, "window(2)").sum())(q)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = attend(q, k, v, "window(2)", backend="reference")
    torch.testing.assert_close(attend(q, k, v, "window(2)", backend="dense"), expected)


def test_a_compiled_function_takes_gradients_by_the_definition():
    torch._dynamo.reset()
    q, k, v = qkv()

    def loss(q: Tensor) -> Tensor:
        return attend(q, k, v, "window(2)").square().sum()

    compiled = torch.compile(lambda q: torch.func.grad(loss)(q), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q), torch.func.grad(loss)(q))
