"""Linear attention, against sums over pairs of tokens written out, one number at a time or one step at a time."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from regard.bench import count
from regard.lens import capture
from regard.ops.linear import chunks as linear_chunks
from regard.ops.linear import memory as linear_memory_of
from regard.ops.linear import naive
from regard.ops.linear import spans as linear_spans
from regard.ops.linear.attend import LinearState, linear_attend, linear_weights
from regard.ops.linear.features import CosineFeatures, RandomFeatures

PHI = {
    "none": lambda x: x,
    "relu": lambda x: max(x, 0.0),
    "elu_plus_one": lambda x: x + 1 if x > 0 else math.exp(x),
    "silu": lambda x: x / (1 + math.exp(-x)),
}
DECAYS = ("none", "head", "feature", "token", "token and feature")


def random(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_(grad)


def qkv(batch: int = 2, tokens: int = 13, heads: int = 2, dim: int = 3, value: int = 4, grad: bool = False) -> list[Tensor]:
    return [random(batch, tokens, heads, n, grad=grad) for n in (dim, dim, value)]


def decay_of(kind: str, q: Tensor, strength: float = 1.0) -> Tensor | None:
    """Logarithms between 0 and ``-strength``."""
    shapes = {
        "none": None, "head": q.shape[-2:-1], "feature": q.shape[-2:], "token": q.shape[:-1], "token and feature": q.shape,
    }  # fmt: skip
    return None if shapes[kind] is None else (-strength * torch.rand(shapes[kind], dtype=torch.float64)).requires_grad_()


def per_token(decay: Tensor | None, q: Tensor) -> Tensor:
    """The decays as factors ``(batch, tokens, heads, dim)``."""
    if decay is None:
        return torch.ones_like(q)
    if decay.ndim <= 2:
        decay = decay.reshape(1, 1, q.shape[-2], -1)
    elif decay.ndim == q.ndim - 1:
        decay = decay.unsqueeze(-1)
    return decay.exp().expand_as(q)


def recurrent(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None, state: Tensor | None = None):
    """One step at a time: ``S <- lambda S + k v^T``, ``y = q^T S``."""
    factors = per_token(decay, q)
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[-1]) if state is None else state
    out = []
    for t in range(q.shape[1]):
        state = factors[:, t].unsqueeze(-1) * state + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        out.append((q[:, t].unsqueeze(-1) * state).sum(-2))
    return torch.stack(out, 1), state


def pairwise(q, k, v, *, phi="none", norm="none", floor=None, eps=0.0, causal=False, decay=None, valid=None, scale=(1.0, 1.0)):
    """The definition, a pair of tokens at a time, for one batch item; returns weights ``(heads, queries, keys)`` and output."""
    factors = per_token(decay, q).tolist() if decay is not None else None
    tokens, keys, heads, dim = q.shape[1], k.shape[1], q.shape[2], q.shape[3]
    qs, ks = q[0].tolist(), k[0].tolist()
    weights = torch.zeros(heads, tokens, keys, dtype=torch.float64)
    for h in range(heads):
        for t in range(tokens):
            seen = [s for s in range(keys) if (not causal or s <= t) and (valid is None or valid[0, s])]
            row = {}
            for s in seen:
                weight = 0.0
                for i in range(dim):
                    left = 1.0
                    if factors is not None:
                        for u in range(min(s, t) + 1, max(s, t) + 1):
                            left *= factors[0][u][h][i]
                    weight += PHI[phi](qs[t][h][i]) * PHI[phi](ks[s][h][i]) * left
                row[s] = weight
            divisor = {"none": 1.0, "sum": sum(row.values()), "count": float(len(seen) or 1)}[norm]
            if norm == "sum":
                divisor = (divisor if floor is None else max(divisor, floor)) + eps
            for s, weight in row.items():
                weights[h, t, s] = 0.0 if divisor == 0 else scale[h] * weight / divisor
    return weights, torch.einsum("hts,she->the", weights, v[0])


def gradients(out, inputs: list[Tensor], *, again: bool = False) -> list[Tensor]:
    """Gradients of a sum of all outputs, each entry with its own weight; ``again`` where more of the same graph follow."""
    outs = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]
    generator = torch.Generator().manual_seed(1)
    total = sum((t * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)).sum() for t in outs)
    return list(torch.autograd.grad(total, inputs, retain_graph=again))


def close(found, expected, **tolerance) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("backend", ["chunked", "naive"])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("norm", ["none", "sum", "count"])
@pytest.mark.parametrize("causal", [False, True])
def test_it_is_the_sum_over_pairs(causal, norm, decay, backend):
    q, k, v = qkv(1, tokens=11)
    logs = decay_of(decay, q)
    valid = torch.rand(1, 11) > 0.3
    scale = torch.tensor([0.5, 2.0], dtype=torch.float64)
    options = {"norm": norm, "causal": causal, "valid": valid, "floor": 0.7 if norm == "sum" else None, "eps": 0.01}
    weights, out = pairwise(q, k, v, phi="elu_plus_one", decay=logs, scale=scale.tolist(), **options)
    options |= {"feature": "elu_plus_one", "log_decay": logs, "scale": scale}
    close([linear_attend(q, k, v, chunk=4, backend=backend, **options)[0]], [out])
    close([linear_weights(q, k, **options)[0]], [weights])


@pytest.mark.parametrize("feature", PHI)
@pytest.mark.parametrize("causal", [False, True])
def test_features_are_made_of_every_value(causal, feature):
    q, k, v = qkv(1, tokens=9)
    found = linear_attend(q, k, v, feature=feature, causal=causal, chunk=4)
    close([found[0]], [pairwise(q, k, v, phi=feature, causal=causal)[1]])


@given(
    tokens=st.integers(1, 40), dim=st.integers(1, 9), value=st.integers(1, 9), heads=st.integers(1, 3),
    batch=st.integers(1, 3), chunk=st.sampled_from([1, 2, 8, 32]), decay=st.sampled_from(DECAYS), seed=st.integers(0, 99),
)  # fmt: skip
def test_chunks_of_any_shape_are_the_recurrence_with_gradients(tokens, dim, value, heads, batch, chunk, decay, seed):
    torch.manual_seed(seed)
    q, k, v = qkv(batch, tokens, heads, dim, value, grad=True)
    logs, state = decay_of(decay, q, 3.0), random(batch, heads, dim, value, grad=True)
    inputs = [t for t in (q, k, v, state, logs) if t is not None]
    out, final = linear_attend(q, k, v, causal=True, log_decay=logs, state=LinearState(state), return_state=True, chunk=chunk)
    expected = recurrent(q, k, v, logs, state)
    close([out, final.memory], expected, rtol=1e-10, atol=1e-10)
    close(gradients([out, final.memory], inputs), gradients(expected, inputs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("decay", ["none", "head", "token"])
def test_more_tokens_and_items_than_are_taken_at_once(decay):
    """Several batch items after one another, each in several pieces, and an incomplete chunk at the end."""
    q, k, v = qkv(2, 64 * 12 + 9, 3, 2, 2, grad=True)
    logs, state = decay_of(decay, q, 0.1), random(2, 3, 2, 2, grad=True)
    inputs = [t for t in (q, k, v, state, logs) if t is not None]
    out, final = linear_attend(q, k, v, causal=True, log_decay=logs, state=LinearState(state), return_state=True)
    expected = recurrent(q, k, v, logs, state)
    close([out, final.memory], expected, rtol=1e-9, atol=1e-9)
    close(gradients([out, final.memory], inputs), gradients(expected, inputs), rtol=1e-9, atol=1e-8)
    if decay == "none":
        q, k = q.abs(), k.abs()
        found = linear_attend(q, k, v, norm="sum")
        weights = torch.einsum("bthd,bshd->bhts", q, k)
        expected = torch.einsum("bhts,bshe->bthe", weights / weights.sum(-1, keepdim=True), v)
        mine = gradients(found, inputs[:3], again=True)
        close([found, *mine], [expected, *gradients(expected, inputs[:3])], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("feature", PHI)
@pytest.mark.parametrize("value", [3, 4])  # as wide as the keys, or not
@pytest.mark.parametrize("block", [1, 20, 100, 1000])  # a token, some, some items, everything
def test_blocks_of_any_size_change_nothing(monkeypatch, block, value, feature):
    monkeypatch.setattr(linear_spans, "BLOCK", block)
    q, k, v = qkv(3, tokens=8, value=value, grad=True)
    k = k[:, :7]
    valid = torch.rand(3, 7) > 0.3
    valid[:, 0] = True
    scale = random(2, grad=True)
    for norm in ("none", "sum"):
        options = {"feature": feature, "norm": norm, "valid": valid, "floor": 2.0, "eps": 0.1, "scale": scale}
        found, expected = (linear_attend(q, k, v[:, :7], backend=b, **options) for b in ("chunked", "naive"))
        close([found, *gradients(found, [q, k, v, scale])], [expected, *gradients(expected, [q, k, v, scale])])


@pytest.mark.parametrize("tokens", [linear_spans.TALL - 1, linear_spans.TALL, 2 * linear_spans.TALL + 3])
@pytest.mark.parametrize("dim", [8, 9])
def test_many_rows_in_float32(tokens, dim):
    """Where each head is a product of its own."""
    q, k, v = qkv(2, tokens, 3, 8, dim, grad=True)
    narrow = [t.detach().float().requires_grad_() for t in (q, k, v)]
    for norm in ("none", "sum"):
        options = {"feature": "elu_plus_one", "norm": norm, "floor": 1.0}
        found, expected = linear_attend(*narrow, **options), linear_attend(q, k, v, backend="naive", **options)
        results = zip([found, *gradients(found, narrow)], [expected, *gradients(expected, [q, k, v])], strict=True)
        for mine, exact in results:
            assert (mine.double() - exact).norm() < 2e-6 * exact.norm()


@pytest.mark.parametrize("heads", [1, 16, 17])
def test_rows_meet_the_vector_of_their_head(heads):
    rows, vectors = random(2, 5, heads, 3), random(2, heads, 3)
    close([linear_spans.rows_dot(rows, vectors)], [torch.einsum("bthd,bhd->bth", rows, vectors)])


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_the_state_alone_and_of_the_output_alone(causal):
    q, k, v = qkv(tokens=11, grad=True)
    earlier = random(2, 2, 3, 4, grad=True)
    logs = decay_of("token", q) if causal else None
    options = {"causal": causal, "log_decay": logs, "state": LinearState(earlier), "return_state": True, "chunk": 4}
    out, final = linear_attend(q, k, v, **options)
    expected, left = linear_attend(q, k, v, backend="naive", **options)
    inputs = [k, v, earlier, *([logs] if causal else [])]
    close(gradients(final.memory, inputs, again=True), gradients(left.memory, inputs, again=True))
    close(gradients(out, [q, *inputs]), gradients(expected, [q, *inputs]))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("norm", ["none", "sum", "count"])
def test_a_scale_per_head_gets_its_gradient(norm, causal):
    q, k, v = (t.abs() for t in qkv(tokens=7))
    scale = random(2, grad=True)
    unscaled = linear_attend(q, k, v, norm=norm, causal=causal)
    found = linear_attend(q, k, v, norm=norm, causal=causal, scale=scale, chunk=4)
    expected = unscaled * scale[:, None]
    close([found, *gradients(found, [scale])], [expected, *gradients(expected, [scale])])


@pytest.mark.parametrize("feature", ["relu", "elu_plus_one", "silu"])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_exact(causal, feature):
    q, k, v = qkv(tokens=7, grad=True)
    valid = torch.rand(2, 7) > 0.3
    valid[:, 0] = True
    logs = decay_of("token and feature", q)
    for options in ({"norm": "none"}, {"norm": "count"}, {"norm": "sum", "floor": 2.0, "eps": 0.1}):
        fixed = {"feature": feature, "causal": causal, "valid": valid, "chunk": 4, **options}
        assert torch.autograd.gradcheck(lambda q, k, v, f=fixed: linear_attend(q, k, v, **f), (q, k, v), fast_mode=True)
        assert torch.autograd.gradcheck(
            lambda q, k, v, g, f=fixed: linear_attend(q, k, v, log_decay=g, **f), (q, k, v, logs), fast_mode=True
        )


@pytest.mark.parametrize("decay", ["head", "token", "token and feature"])
@pytest.mark.parametrize("norm", ["none", "sum"])
def test_both_ways_equals_the_definition_with_gradients(norm, decay):
    q, k, v = qkv(tokens=21, grad=True)
    logs = decay_of(decay, q)
    options = {"feature": "elu_plus_one", "norm": norm, "log_decay": logs}
    inputs = [q, k, v, logs]
    found, expected = (linear_attend(q, k, v, chunk=8, backend=b, **options) for b in ("chunked", "naive"))
    close([found, *gradients(found, inputs)], [expected, *gradients(expected, inputs)])
    turned = {
        **options,
        "log_decay": logs if decay == "head" else F.pad(logs[:, 1:].flip(1), (0, 0) * (logs.ndim - 2) + (1, 0)),
    }
    mirrored = linear_attend(*(t.flip(1) for t in (q, k, v)), **turned)
    close([mirrored.flip(1)], [found])  # it knows no direction


def test_a_floor_of_one_hundred_leaves_small_activations_undivided():
    q, k, v = (t.relu() for t in qkv(tokens=20))
    out = linear_attend(q, k, v, norm="sum", floor=100.0, scale=torch.tensor([0.5, 2.0]))
    weights = torch.einsum("bthd,bshd->bhts", q, k)
    mass = weights.sum(-1, keepdim=True)
    assert mass.max() < 100
    expected = torch.einsum("bhts,bshe->bthe", weights / 100, v) * torch.tensor([0.5, 2.0])[:, None]
    close([out], [expected])
    large = linear_attend(30 * q, 30 * k, v, norm="sum", floor=100.0)
    above = (900 * mass > 100).transpose(1, 2)
    assert above.any()
    plain = torch.einsum("bhts,bshe->bthe", weights / mass, v)
    close([large[above.expand_as(large)]], [plain[above.expand_as(large)]])


def test_an_epsilon_relative_to_the_mean_weight():
    q, k, v = (t.abs() for t in qkv(tokens=20))
    found = linear_attend(q, k, v, norm="sum", eps=20 * 1e-2)
    memory, mean = torch.einsum("bshd,bshe->bhde", k, v) / 20, k.mean(1)
    expected = torch.einsum("bthd,bhde->bthe", q, memory) / (torch.einsum("bthd,bhd->bth", q, mean) + 1e-2).unsqueeze(-1)
    close([found], [expected])


def test_queries_that_see_nothing_get_zero_and_finite_gradients():
    q, k, v = qkv(tokens=6, grad=True)
    valid = torch.zeros(2, 6, dtype=torch.bool)
    valid[1, 3:] = True
    for causal in (False, True):
        for norm in ("none", "sum", "count"):
            out = linear_attend(q, k, v, feature="elu_plus_one", norm=norm, causal=causal, valid=valid, chunk=4)
            assert not out[0].any()
            assert not causal or not out[1, :3].any()
            assert out[1, 3:].all()
            assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_a_small_divisor_still_divides():
    q, k, v = (t.abs() for t in qkv(tokens=9))
    small = linear_attend(1e-6 * q, 1e-6 * k, v, norm="sum")
    close([small], [linear_attend(q, k, v, norm="sum")])


@pytest.mark.parametrize("norm", ["sum", "count"])
def test_weights_are_the_same_in_pieces(monkeypatch, norm):
    q, k, _ = qkv(tokens=13)
    state = LinearState(random(2, 2, 3, 4), random(2, 2, 3).abs(), torch.tensor([3.0, 5.0], dtype=torch.float64))
    options = {"feature": "elu_plus_one", "norm": norm, "causal": True, "log_decay": decay_of("token", q), "state": state}
    whole = linear_weights(q, k, **options)
    monkeypatch.setattr(naive, "WEIGHTS", 3 * 2 * 2 * 13)  # three rows at a time
    close([linear_weights(q, k, **options)], [whole])
    some = torch.tensor([12, 0, 5, 5, 7])
    close([linear_weights(q, k, rows=some, **options)], [whole[:, :, some]])


def test_missing_keys_count_nothing_but_their_tokens_decay():
    q, k, v = qkv(1, tokens=8)
    logs = decay_of("token", q)
    valid = torch.tensor([[True, False] * 4])
    out = linear_attend(q, k, v, feature="elu_plus_one", causal=True, log_decay=logs, valid=valid)
    again = linear_attend(
        q, k.where(valid[..., None, None], 99.0), v, feature="elu_plus_one", causal=True, log_decay=logs, valid=valid
    )
    close([again], [out])
    close([out[0]], [pairwise(q, k, v, phi="elu_plus_one", causal=True, decay=logs, valid=valid)[1]])


def test_keys_may_lie_on_another_grid():
    q = random(2, 3, 4, 2, 5)
    k, v = random(2, 7, 2, 5), random(2, 7, 2, 6)
    out = linear_attend(q, k, v, feature="elu_plus_one", norm="sum")
    weights = torch.einsum("byxhd,bshd->bhyxs", F.elu(q) + 1, F.elu(k) + 1)
    close([out], [torch.einsum("bhyxs,bshe->byxhe", weights / weights.sum(-1, keepdim=True), v)])


def test_grids_are_in_raster_order():
    q, k, v = (random(1, 2, 3, 5, 2, n) for n in (4, 4, 6))
    logs = -torch.rand(1, 2, 3, 5, 2, dtype=torch.float64)
    flat = linear_attend(*(t.flatten(1, 3) for t in (q, k, v)), causal=True, log_decay=logs.flatten(1, 3), chunk=4)
    close([linear_attend(q, k, v, causal=True, log_decay=logs)], [flat.unflatten(1, (2, 3, 5))])


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("norm", ["none", "sum", "count"])
def test_the_size_of_chunks_changes_nothing(norm, decay):
    q, k, v = qkv(tokens=70)
    options = {"feature": "elu_plus_one", "norm": norm, "causal": True, "log_decay": decay_of(decay, q)}
    expected = linear_attend(q, k, v, chunk=1, **options)
    for chunk in (2, 16, 64, 128):
        close([linear_attend(q, k, v, chunk=chunk, **options)], [expected], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("strength", [1.0, 30.0, 1e4, math.inf])
@pytest.mark.parametrize("decay", ["head", "feature", "token", "token and feature"])
def test_decays_of_any_strength_are_exact_in_float32(decay, strength):
    """A strong decay among weak ones must not cost the weak ones their digits."""
    q, k, v = qkv(tokens=150, dim=5)
    logs = decay_of(decay, q, 0.01).detach()
    logs[torch.rand(logs.shape) < 0.2] = -strength
    exact, _ = recurrent(q, k, v, logs)
    inputs = [t.float().requires_grad_() for t in (q, k, v, logs)]
    found = linear_attend(*inputs[:3], causal=True, log_decay=inputs[3])
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())
    grads = torch.autograd.grad(found.square().sum(), inputs)
    assert all(g.isfinite().all() for g in grads)
    if decay in ("head", "token"):
        close(
            [linear_attend(q, k, v, log_decay=logs, norm="sum", backend="naive")],
            [linear_attend(q, k, v, log_decay=logs, norm="sum")],
        )


def test_no_decay_is_a_plain_sum_and_full_decay_leaves_the_own_key():
    q, k, v = qkv(tokens=30)
    plain = linear_attend(q, k, v, causal=True)
    close([plain], [torch.einsum("bthd,bthde->bthe", q, torch.einsum("bshd,bshe->bshde", k, v).cumsum(1))])
    close([linear_attend(q, k, v, causal=True, log_decay=torch.zeros(2))], [plain])
    own = (q * k).sum(-1, keepdim=True) * v
    for logs in (torch.full((2,), -1e4), torch.full((2, 3), -torch.inf), torch.full((2, 30, 2), -torch.inf)):
        close([linear_attend(q, k, v, causal=True, log_decay=logs)], [own])
        close([linear_attend(q, k, v, log_decay=logs)], [own])


def test_a_decay_per_head_is_the_power_of_the_distance():
    q, k, v = qkv(tokens=40)
    rate = torch.tensor([0.5, 0.97], dtype=torch.float64)
    distance = torch.arange(40)[:, None] - torch.arange(40)
    for causal in (True, False):
        decayed = rate[:, None, None] ** distance.abs() * (distance >= 0 if causal else 1)
        expected = torch.einsum("bthd,bshd,hts,bshe->bthe", q, k, decayed, v)
        close([linear_attend(q, k, v, causal=causal, log_decay=rate.log(), chunk=16)], [expected])


@pytest.mark.parametrize("backend", ["chunked", "naive"])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("norm", ["none", "sum", "count"])
def test_a_stream_in_pieces_of_any_length_equals_the_whole(norm, decay, backend):
    q, k, v = qkv(tokens=33, grad=True)
    logs, valid = decay_of(decay, q), torch.rand(2, 33) > 0.2
    options = {"feature": "elu_plus_one", "norm": norm, "causal": True, "eps": 0.1, "chunk": 8}
    inputs = [t for t in (q, k, v, logs) if t is not None]
    whole, last = linear_attend(q, k, v, log_decay=logs, valid=valid, return_state=True, **options)
    state, outs, at = None, [], 0
    for n in (1, 10, 1, 16, 5):
        part = slice(at, at + n)
        local = logs[:, part] if logs is not None and logs.ndim > 2 else logs
        out, state = linear_attend(
            q[:, part], k[:, part], v[:, part], log_decay=local, valid=valid[:, part], state=state, return_state=True,
            backend=backend, **options,
        )  # fmt: skip
        outs.append(out)
        at += n
    streamed = torch.cat(outs, 1)
    close([streamed], [whole])
    for a, b in zip(state, last, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)
    found = gradients([streamed, state.memory], inputs)
    close(found, gradients([whole, last.memory], inputs))


@pytest.mark.parametrize("backend", ["chunked", "naive"])
def test_nothing_is_left_of_a_state_after_a_full_decay(backend):
    q, k, v = (t.abs() for t in qkv(tokens=12))
    logs = decay_of("token", q).detach()
    logs[:, 5, 0] = -torch.inf
    earlier = LinearState(random(2, 2, 3, 4), random(2, 2, 3).abs())
    kept = [t.clone() for t in earlier[:2]]
    out, final = linear_attend(
        q, k, v, norm="sum", causal=True, log_decay=logs, state=earlier, return_state=True, chunk=4, backend=backend
    )
    close(earlier[:2], kept)  # what was given stays as it was
    ones = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    sums, left = recurrent(q, k, ones, logs, torch.cat([kept[0], kept[1].unsqueeze(-1)], -1))
    close([out, final.memory, final.total], [sums[..., :-1] / sums[..., -1:], left[..., :-1], left[..., -1]])
    again = linear_attend(*(t[:, 5:] for t in (q, k, v)), norm="sum", causal=True, log_decay=logs[:, 5:], backend=backend)
    close([out[:, 5:, 0]], [again[:, :, 0]])


@pytest.mark.parametrize("norm", ["none", "sum", "count"])
def test_keys_given_earlier_are_seen_by_all_queries(norm):
    q, k, v = qkv(tokens=20)
    options = {"feature": "elu_plus_one", "norm": norm}
    _, state = linear_attend(q[:, :1], k[:, :12], v[:, :12], return_state=True, **options)
    found = linear_attend(q, k[:, 12:], v[:, 12:], state=state, **options)
    close([found], [linear_attend(q, k, v, **options)])


def test_the_state_does_not_grow():
    for tokens in (5, 500):
        _, state = linear_attend(*qkv(tokens=tokens), causal=True, norm="sum", return_state=True)
        assert (state.memory.shape, state.total.shape) == ((2, 2, 3, 4), (2, 2, 3))


def test_random_features_estimate_the_softmax():
    torch.manual_seed(0)
    q, k, v = (0.4 * t for t in qkv(1, tokens=24, dim=8))
    exact = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    errors = []
    for features in (64, 1 << 14):
        generator = torch.Generator().manual_seed(0)
        maps = RandomFeatures(RandomFeatures.draw(features, 8, generator, heads=2), eps=0.0)
        errors.append((linear_attend(q, k, v, feature=maps, norm="sum") - exact).norm() / exact.norm())
    assert errors[1] < 0.02
    assert errors[1] < errors[0] / 5


def test_random_directions_are_those_of_normal_vectors():
    omega = RandomFeatures.draw(6 * 400, 6, torch.Generator().manual_seed(0), heads=2)
    assert omega.shape == (2, 2400, 6)
    assert not omega[0].equal(omega[1])
    assert (omega > 0).double().mean((0, 1)).sub(0.5).abs().max() < 0.05  # no orthant is missing
    for place in range(6):  # in each place of a block
        assert (omega[:, place::6] > 0).double().mean((0, 1)).sub(0.5).abs().max() < 0.1
    squares = omega.square().sum(-1).flatten()
    assert abs(squares.mean() - 6) < 0.3
    assert abs(squares.var() - 12) < 1.5  # chi-squared of 6
    assert RandomFeatures.draw(7, 3).shape == (7, 3)


def test_the_largest_product_of_random_features_is_a_constant():
    q, k, _ = qkv(1, tokens=6, grad=True)
    omega = RandomFeatures.draw(5, 3, torch.Generator().manual_seed(0)).double()

    def features(x, axes):
        z = x * 3**-0.25
        along = z @ omega.T
        top = along.detach().amax(axes, keepdim=True)
        return (torch.exp(along - z.square().sum(-1, keepdim=True) / 2 - top) + 0.01) / math.sqrt(5)

    expected = torch.einsum("bthm,bshm->bhts", features(q, -1), features(k, (1, 3)))
    found = linear_weights(q, k, feature=RandomFeatures(omega, eps=0.01))
    close([found, *gradients(found, [q, k])], [expected, *gradients(expected, [q, k])])


def test_random_features_are_those_of_the_formula():
    q, k, v = qkv(1, tokens=6)
    omega = RandomFeatures.draw(5, 3, torch.Generator().manual_seed(0)).double()
    blocks = omega[:3]
    close([blocks @ blocks.T], [torch.diag((blocks @ blocks.T).diagonal())], rtol=0, atol=1e-6)

    def features(x, keys):
        rows = []
        top = max(float(omega[j] @ x[s]) for s in range(6) for j in range(5)) * 3**-0.25
        for t in range(6):
            z = x[t] * 3**-0.25
            along = [float(omega[j] @ z) for j in range(5)]
            high = top if keys else max(along)
            rows.append([(math.exp(a - float(z @ z) / 2 - high) + 0.01) / math.sqrt(5) for a in along])
        return torch.tensor(rows, dtype=torch.float64)

    weights = linear_weights(q, k, feature=RandomFeatures(omega, eps=0.01))
    for h in range(2):
        close([weights[0, h]], [features(q[0, :, h], False) @ features(k[0, :, h], True).T])
    close([linear_attend(q, k, v, feature=RandomFeatures(omega, eps=0.01))], [torch.einsum("bhts,bshe->bthe", weights, v)])


def test_cosine_features_weigh_by_the_distance():
    q, k, v = qkv(tokens=12)
    places = torch.arange(12, dtype=torch.float64)
    nearness = torch.cos(math.pi / 2 * (places[:, None] - places) / 16)
    weights = torch.einsum("bthd,bshd->bhts", q.relu(), k.relu()) * nearness
    for causal in (False, True):
        seen = weights.tril() if causal else weights
        expected = torch.einsum("bhts,bshe->bthe", seen / (seen.sum(-1, keepdim=True) + 1e-6), v)
        options = {"feature": CosineFeatures(16), "norm": "sum", "eps": 1e-6, "causal": causal}
        close([linear_attend(q, k, v, **options)], [expected])
    first, state = linear_attend(*(t[:, :5] for t in (q, k, v)), return_state=True, **options)
    second = linear_attend(*(t[:, 5:] for t in (q, k, v)), state=state, start=5, **options)
    close([torch.cat([first, second], 1)], [expected])


def test_far_positions_are_told_apart_in_half_precision():
    q, k = torch.ones(2, 1, 1000, 1, 1).unbind()
    weights = linear_weights(q[:, :1].bfloat16(), k[:, :1].bfloat16(), feature=CosineFeatures(1000), start=501)
    exact = linear_weights(q[:, :1], k[:, :1], feature=CosineFeatures(1000), start=501)
    torch.testing.assert_close(weights, exact, rtol=2**-6, atol=0)
    places = CosineFeatures(1000)(q.bfloat16(), 0, False).double()
    angles = torch.arange(1000) * (math.pi / 2000)
    torch.testing.assert_close(places[0, :, 0], torch.stack([angles.cos(), angles.sin()], -1).double(), rtol=0, atol=2**-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", ["none", "head", "token", "token and feature"])
def test_half_precision_keeps_float32_states(decay, dtype):
    """Over 3000 tokens a state in half precision would stop growing."""
    q, k, v = (t.abs().to(dtype) for t in qkv(1, 3000, 2, 8, 8))
    logs = decay_of(decay, q, 0.01)
    for options in ({"causal": True, "log_decay": logs}, {}):
        exact = linear_attend(q.double(), k.double(), v.double(), norm="sum", **options)
        found, state = linear_attend(q, k, v, norm="none", **{"log_decay": None, **options}, return_state=True)
        assert found.dtype == dtype
        assert state.memory.dtype == torch.float32
        found = linear_attend(q, k, v, norm="sum", **options)
        error = (found.double() - exact).norm() / exact.norm()
        assert error < (2**-7 if dtype == torch.bfloat16 else 2**-10)


def test_sums_beyond_the_range_of_float16_divide_to_what_is_within():
    q, k, v = (50 * torch.rand(1, 2000, 1, 8).half() for _ in range(3))
    out = linear_attend(q, k, v, causal=True, norm="sum")
    exact = linear_attend(q.double(), k.double(), v.double(), causal=True, norm="sum")
    torch.testing.assert_close(out.double(), exact, rtol=2**-9, atol=0)


def test_autocast_stays_outside():
    q, k, v = torch.randn(3, 1, 40, 2, 4).unbind()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close(
            [linear_attend(q, k, v, causal=True, log_decay=-torch.rand(1, 40, 2))[:, 0]],
            [(q * k).sum(-1, keepdim=True)[:, 0] * v[:, 0]],
        )
        mixed = linear_attend(q.bfloat16(), k, v)
    assert mixed.dtype == torch.bfloat16


class Layer(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.options = options

    def forward(self, q, k, v, logs=None):
        return linear_attend(q, k, v, log_decay=logs, chunk=8, **self.options)


GRAPHS = {
    "everything": {"feature": "elu_plus_one", "norm": "sum", "eps": 0.1},
    "causal": {"causal": True, "feature": "relu", "norm": "sum", "eps": 0.1},
    "a stream": {"causal": True, "norm": "count", "return_state": True},
    "cosine": {"feature": CosineFeatures(64), "causal": True},
}


@pytest.mark.parametrize("name", GRAPHS)
def test_it_compiles_without_a_break(name):
    layer = Layer(**GRAPHS[name])
    dynamic = name == "causal"
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (11, 20) if dynamic else (20,):
        q, k, v = qkv(tokens=tokens, grad=True)
        logs = decay_of("token", q) if layer.options.get("causal") else None
        inputs = [t for t in (q, k, v, logs) if t is not None]
        found, expected = compiled(*inputs), layer(*inputs)
        close(gradients(found, inputs), gradients(expected, inputs))


def test_one_tensor_may_be_query_key_and_value():
    compiled = torch.compile(partial(linear_attend, causal=True, norm="sum"), fullgraph=True, backend="aot_eager")
    x = random(1, 9, 2, 3).abs().requires_grad_()
    found, expected = compiled(x, x, x), linear_attend(x, x, x, causal=True, norm="sum")
    close([found, *gradients(found, [x])], [expected, *gradients(expected, [x])])


@pytest.mark.parametrize(
    ("name", "decay"),
    [
        ("everything", "none"),
        ("everything", "token"),
        ("causal", "token and feature"),
        ("causal", "token"),
        ("a stream", "head"),
    ],
)
def test_exported_programs_hold_plain_operators(name, decay):
    layer = Layer(**GRAPHS[name])
    inputs = qkv(tokens=20)
    logs = decay_of(decay, inputs[0])
    fixed = () if logs is None else (logs.detach(),)
    program = torch.export.export(layer, (*inputs, *fixed))
    others = [torch.randn_like(t) for t in inputs]
    found, expected = (torch.utils._pytree.tree_leaves(f(*others, *fixed)) for f in (program.module(), layer))
    close(found, expected)
    assert not [node for node in program.graph.nodes if "regard" in str(node.target)]


def test_shapes_without_data():
    q, k, v = (torch.empty(2, 4, 5, 3, n, device="meta") for n in (8, 8, 6))
    out, state = linear_attend(q, k, v, causal=True, norm="sum", log_decay=torch.empty(3, device="meta"), return_state=True)
    assert (out.shape, state.memory.shape, state.total.shape) == ((2, 4, 5, 3, 6), (2, 3, 8, 6), (2, 3, 8))
    assert linear_attend(q, k, v, norm="sum").shape == out.shape


@pytest.mark.parametrize("decay", DECAYS)
def test_the_operators_are_well_formed(decay):
    q, k, v = qkv(tokens=11, grad=True)
    state, valid = random(2, 2, 3, 4, grad=True), torch.rand(2, 11) > 0.3
    torch.library.opcheck(linear_chunks.linear_scan, (q, k, v, decay_of(decay, q), state, valid, "silu", 4, "torch"))
    if decay == "none":
        torch.library.opcheck(linear_memory_of.linear_memory, (k, v, valid, "relu", "torch"))
        memory, total = random(2, 2, 3, 4, grad=True), random(2, 2, 3, grad=True)
        torch.library.opcheck(linear_memory_of.linear_read, (q, memory, total, 1.0, 0.1, "elu_plus_one", "torch"))


def test_flops_grow_with_the_tokens():
    from torch.utils.flop_counter import FlopCounterMode

    found = []
    for tokens in (1024, 2048):
        q, k, v = (torch.randn(1, tokens, 2, 16, requires_grad=True) for _ in range(3))
        with FlopCounterMode(display=False) as counter:
            linear_attend(q, k, v, causal=True).sum().backward()
        found.append(counter.get_total_flops())
    forward, backward = 2 * 64 * 32 + 2 * 2 * 16 * 16, 2 * 64 * (5 * 16) + 2 * 5 * 16 * 16
    assert found == [1024 * 2 * (forward + backward), 2048 * 2 * (forward + backward)]


def test_observers_see_the_weights_and_the_cost():
    layer = nn.ModuleList([Layer(causal=True, feature="elu_plus_one", norm="sum")])
    q, k, v = (random(2, 3, 4, 2, n) for n in (3, 3, 5))
    logs = -torch.rand(2, 3, 4, 2, dtype=torch.float64)
    with capture(layer, rows=[5]) as maps, count() as cost:
        out = layer[0](q, k, v, logs)
    (weights,) = maps["0"].weights
    close([torch.einsum("bhyx,byxhe->bhe", weights[:, :, 0], v)], [out[:, 1, 1]])
    assert not weights[0, 0, 0].flatten()[6:].any()
    tokens = 2 * 12 * 2
    assert cost.flops == 2 * 2 * tokens * 3 * (5 + 1)
    assert cost.bytes == 8 * tokens * (3 + 3 + 5 + 5)
    assert cost.pairs == 0


def test_the_divisor_of_half_precision_is_not_rounded():
    q, k = torch.randint(1, 5, (2, 2, 40, 2, 4)).bfloat16().unbind()
    v = torch.randn(2, 40, 2, 4).bfloat16()
    sums = linear_attend(q, k, v, norm="none", backend="chunked")
    mass = (q.float() * k.float().sum(1, keepdim=True)).sum(-1, keepdim=True)
    assert torch.equal(linear_attend(q, k, v, norm="sum", backend="chunked"), (sums.float() * mass.reciprocal()).bfloat16())


def test_the_gradient_of_a_decay_in_bfloat16_is_exact_where_the_states_are():
    """Ones and zeros, whose sums below 256 bfloat16 holds; the products of states before and after a chunk it does not."""
    q, k = torch.randint(0, 2, (2, 1, 320, 2, 1)).unbind()
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        logs = torch.zeros(2, requires_grad=True)
        given = logs.double() if dtype == torch.float64 else logs
        v = torch.ones_like(q).to(dtype)
        linear_attend(q.to(dtype), k.to(dtype), v, causal=True, log_decay=given, chunk=16).sum().backward()
        found.append(logs.grad)
    assert torch.equal(*found)


def test_a_decay_of_heads_is_that_of_tokens_all_alike_in_half_precision():
    q, k, v = (t.bfloat16() for t in qkv(1, 300, 2, 8, 8))
    logs = -torch.rand(2)
    by_head = linear_attend(q, k, v, causal=True, log_decay=logs)
    # bitwise: the same operators on the same shapes
    assert torch.equal(by_head, linear_attend(q, k, v, causal=True, log_decay=logs.expand(1, 300, 2)))


def test_misfits_are_named():
    q, k, v = qkv(tokens=5)
    cases = [
        ("q and k must be .* got q \\(2, 5, 2, 3\\), k \\(2, 4, 2, 3\\)", {"causal": True, "k": k[:, :4], "v": v[:, :4]}),
        ("v must be .* beside k \\(2, 5, 2, 3\\); got \\(2, 4, 2, 4\\)", {"v": v[:, :4]}),
        ("norm must be one of none, sum, count; got 'mean'", {"norm": "mean"}),
        ("feature must be one of none, relu, elu_plus_one, silu, or a feature map; got 'exp'", {"feature": "exp"}),
        ("backend must be one of auto, naive, chunked, native, triton; got 'flex'", {"backend": "flex"}),
        ("chunk must be a power of two; got 48", {"chunk": 48}),
        ("valid must be \\(2, 5\\), .*; got a bool tensor \\(2, 4\\)", {"valid": torch.ones(2, 4, dtype=torch.bool)}),
        ("scale must be a number or one per head, \\(2,\\); got a float32 tensor \\(3,\\)", {"scale": torch.ones(3)}),
        ("log_decay must be one of .*\\(2, 5, 2, 3\\); got \\(3,\\)", {"log_decay": torch.zeros(3), "causal": True}),
        ("in both directions leaves no state", {"log_decay": torch.zeros(2), "return_state": True}),
        ("RandomFeatures depend on later tokens", {"feature": RandomFeatures(torch.zeros(4, 3)), "return_state": True}),
        ("omega must be", {"feature": RandomFeatures(torch.zeros(4, 5))}),
        ("positions below length=4 end before 5 tokens", {"feature": CosineFeatures(4)}),
        ("needs the state of an attention with the same norm", {"norm": "sum", "state": LinearState(random(2, 2, 3, 4))}),
        ("= \\(2, 2, 3, 4\\); got a float64 tensor \\(2, 2, 3, 5\\)", {"state": LinearState(random(2, 2, 3, 5))}),
        ("= \\(2, 2, 3, 4\\); got a float64 tensor \\(3, 2, 3, 4\\)", {"state": LinearState(random(3, 2, 3, 4))}),
    ]
    for message, options in cases:
        given = {"q": q, "k": k, "v": v, **options}
        with pytest.raises(ValueError, match=message):
            linear_attend(given.pop("q"), given.pop("k"), given.pop("v"), **given)
