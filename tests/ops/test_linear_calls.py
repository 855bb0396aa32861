"""Every call of linear attention is right or refused: random calls against loops, states, missing keys, sums that underflow,
numbers that are not finite, and arguments of the wrong kind."""

import itertools
import math
import random as pseudo
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from regard.ops.linear.attend import LinearState, linear_attend, linear_weights
from regard.ops.linear.features import CosineFeatures, RandomFeatures

BACKENDS = ["naive", "chunked", "auto"]
"""The last is native where that is compiled and can."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
MAPS = {
    "none": lambda x: x,
    "relu": lambda x: x.clamp(min=0),
    "elu_plus_one": lambda x: torch.where(x > 0, x + 1, x.clamp(max=0).exp()),
    "silu": lambda x: x * x.sigmoid(),
}


def uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator, dtype=torch.float64) + 0.1


def looped(q, k, v, *, feature, norm, floor, eps, causal, log_decay, scale, valid, state):
    """The recurrence or the sum over pairs, a token at a time in float64; flat tokens, sums of weights that are not small."""
    batch, tokens, heads, width = q.shape
    q, k = MAPS[feature](q), MAPS[feature](k)
    there = torch.ones(k.shape[:2]) if valid is None else valid.double()
    k, ones = k * there[..., None, None], torch.ones(*v.shape[:-1], 1)
    logs = torch.zeros(batch, tokens, heads, width, dtype=torch.float64)
    if log_decay is not None:
        decay = log_decay.reshape(1, 1, heads, -1) if log_decay.ndim <= 2 else log_decay
        logs = logs + (decay if decay.ndim == 4 else decay.unsqueeze(-1))
    values = torch.cat([v, ones], -1)
    before = torch.zeros(batch, heads, width, v.shape[-1] + 1, dtype=torch.float64)
    seen = torch.zeros(batch, dtype=torch.float64)
    if state is not None:
        total = state.total if state.total is not None else torch.zeros(batch, heads, width)
        before, seen = torch.cat([state.memory, total.unsqueeze(-1)], -1), seen if state.keys is None else state.keys
    sums, counts = [], []
    for t in range(tokens):
        y = torch.zeros(batch, heads, v.shape[-1] + 1, dtype=torch.float64)
        for s in range(t + 1 if causal else k.shape[1]):
            first, last = min(s, t) + 1, max(s, t) + 1
            left = logs[:, first:last].sum(1).exp() if log_decay is not None else 1.0
            y = y + (q[:, t] * k[:, s] * left).sum(-1, keepdim=True) * values[:, s]
        entering = q[:, t] * (logs[:, : t + 1].sum(1).exp() if log_decay is not None else 1.0)
        sums.append(y + torch.einsum("bhd,bhde->bhe", entering, before))
        counts.append(seen + there[:, : t + 1 if causal else k.shape[1]].sum(1))
    y = torch.stack(sums, 1)
    if norm == "sum":
        y = y / ((y[..., -1:] if floor is None else y[..., -1:].clamp(min=floor)) + eps)
    elif norm == "count":
        y = y / torch.stack(counts, 1).clamp(min=1.0)[..., None, None]
    return y[..., :-1] * (scale if isinstance(scale, float) else scale[:, None])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(25))
def test_random_calls_equal_loops_with_gradients(seed, backend):
    """Features, norms, decays, states, missing keys that hold NaN, scales, chunks, dtypes and layouts, as they come."""
    choice, generator = pseudo.Random(f"{seed} {backend}"), torch.Generator().manual_seed(seed)
    batch, heads, dim, value = choice.randint(1, 2), choice.randint(1, 3), choice.randint(1, 6), choice.randint(1, 6)
    dtype, causal = choice.choice([torch.float32, torch.float32, torch.bfloat16, *TOLERANCE]), choice.random() < 0.6
    wide = torch.promote_types(dtype, torch.float32)
    kind = choice.choice(["none", "head", "token", "feature", "both"])
    tokens = choice.randint(1, 12)
    keys = tokens if causal or kind != "none" else choice.randint(1, 12)
    shapes = {
        "none": None, "head": (heads,), "feature": (heads, dim), "token": (batch, tokens, heads),
        "both": (batch, tokens, heads, dim),
    }  # fmt: skip
    tensors = {
        "q": uniform(generator, batch, tokens, heads, dim),
        "k": uniform(generator, batch, keys, heads, dim),
        "v": uniform(generator, batch, keys, heads, value) - 0.5,
        "scale": uniform(generator, heads) if choice.random() < 0.5 else None,
        "log_decay": -uniform(generator, *shapes[kind]) * choice.choice([0.1, 3.0]) if shapes[kind] else None,
    }
    norm = choice.choice(["none", "sum", "count"])
    if causal or kind == "none":
        tensors["memory"] = uniform(generator, batch, heads, dim, value)
        tensors["total"] = uniform(generator, batch, heads, dim) if norm == "sum" else None
    valid = uniform(generator, batch, keys) > 0.5 if choice.random() < 0.5 else None
    options = {
        "feature": choice.choice(list(MAPS)), "norm": norm, "eps": 0.2, "causal": causal, "valid": valid,
        "floor": choice.choice([None, 2.0]) if norm == "sum" else None,
    }  # fmt: skip
    narrow = {n: t if t is None else t.to(dtype if n in ("q", "k", "v") else wide) for n, t in tensors.items()}
    exact = {n: t.double().requires_grad_() for n, t in narrow.items() if t is not None}
    if valid is not None:
        for name in ("k", "v"):
            narrow[name] = narrow[name].masked_fill(~valid[..., None, None], choice.choice([math.nan, math.inf]))
    if choice.random() < 0.5:
        narrow["k"] = narrow["k"].transpose(1, 3).contiguous().transpose(1, 3)
    given = {n: t.requires_grad_() for n, t in narrow.items() if t is not None}
    results = []
    for leaves, run in ((given, linear_attend), (exact, looped)):
        keys_seen = torch.full((batch,), 3.0, dtype=leaves["memory"].dtype) if "memory" in leaves and norm == "count" else None
        state = LinearState(leaves["memory"], leaves.get("total"), keys_seen) if "memory" in leaves else None
        more = {"chunk": choice.choice([1, 4, 64]), "backend": backend} if run is linear_attend else {}
        y = run(
            *(leaves[n] for n in "qkv"), **options, log_decay=leaves.get("log_decay"), scale=leaves.get("scale", 1.5),
            state=state, **more,
        )  # fmt: skip
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).double()
        results.append([y, *torch.autograd.grad((y.double() * weight).sum(), list(leaves.values()))])
    assert results[0][0].dtype == dtype
    for name, mine, right in zip(["y", *given], *results, strict=True):
        limit = TOLERANCE[dtype] * right.abs().max().clamp(min=1.0)
        assert (mine.double() - right).abs().max() <= limit, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("decay", ["head", "token", "feature", "both"])
@pytest.mark.parametrize("rate", [0.4, 1.35, 50.0, math.inf])
def test_sums_that_decay_below_the_smallest_number_divide_to_zero(rate, decay, backend):
    """One key, which all later queries see less and less: its value, until the weight counts as 0."""
    tokens = 260
    shapes = {"head": (2,), "token": (1, tokens, 2), "feature": (2, 3), "both": (1, tokens, 2, 3)}
    q, k = torch.full((2, 1, tokens, 2, 3), 1.0).unbind()
    v = torch.randn(1, tokens, 2, 4)
    valid = torch.zeros(1, tokens, dtype=torch.bool)
    valid[:, 0] = True
    inputs = [t.clone().requires_grad_() for t in (q, k, v, torch.full(shapes[decay], -rate))]
    y = linear_attend(
        *inputs[:3], feature="relu", norm="sum", causal=True, log_decay=inputs[3], valid=valid, backend=backend, chunk=32
    )
    mass = math.log(3) - rate * torch.arange(tokens) if rate < math.inf else torch.tensor([0.0] + [-rate] * (tokens - 1))
    smallest = math.log(torch.finfo(torch.float32).tiny)
    clear, gone = mass > smallest + 15, mass < smallest - 1
    torch.testing.assert_close(y[:, clear], v[:, :1].expand_as(y)[:, clear], rtol=1e-3, atol=1e-5)
    assert not y[:, gone].any()
    grads = torch.autograd.grad(y.square().sum() * 10, inputs)
    assert y.isfinite().all()
    assert all(g.isfinite().all() for g in grads)
    from_values = torch.zeros_like(v)
    counted = (mass > smallest + math.log(2.0**24)).sum()  # below, the output is divided, but has no gradient
    from_values[:, 0] = 20 * v[:, 0] * counted
    torch.testing.assert_close(grads[2], from_values, rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_divisor_over_all_keys_below_the_smallest_number_counts_as_zero(backend):
    q, k, v = torch.ones(1, 3, 1, 1), torch.tensor([1e-20]).reshape(1, 1, 1, 1), torch.full((1, 1, 1, 2), 5.0)
    q[0, :, 0, 0] = torch.tensor([1.0, 1e-10, 1e-21])  # masses 1e-20, 1e-30, 1e-41
    q.requires_grad_()
    y = linear_attend(q, k, v, norm="sum", backend=backend)
    torch.testing.assert_close(y[0, :, 0, 0], torch.tensor([5.0, 5.0, 0.0]))
    (grad,) = torch.autograd.grad(y.sum() * 1e6, q)
    assert grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("decay", ["none", "head", "token"])
@pytest.mark.parametrize("norm", ["none", "sum"])
@pytest.mark.parametrize("causal", [False, True])
def test_what_is_not_finite_stays_in_its_head_and_with_those_that_see_it(causal, norm, decay, number, backend):
    """Also backward: of the outputs of earlier tokens all gradients are as they are without it."""
    tokens, at = 40, 21
    q, k, v = (torch.rand(2, tokens, 3, n) for n in (4, 4, 5))
    logs = {"none": None, "head": -torch.rand(3), "token": -torch.rand(2, tokens, 3)}[decay]
    options = {"norm": norm, "causal": causal, "log_decay": logs, "backend": backend, "chunk": 16, "feature": "elu_plus_one"}
    clean = [t.clone().requires_grad_() for t in (q, k, v)]
    right = linear_attend(*clean, **options)
    grads = torch.autograd.grad(right[:, :at].square().sum(), clean)
    for place, tensor in enumerate((q, k, v)):
        given = [t.clone() for t in (q, k, v)]
        given[place][0, at, 1, 2] = number
        given = [t.requires_grad_() for t in given]
        y = linear_attend(*given, **options)
        sees = torch.zeros(y.shape, dtype=torch.bool)
        first = at if causal or tensor is q else 0
        last = at + 1 if tensor is q else tokens
        sees[0, first:last, 1, slice(2, 3) if tensor is v else slice(None)] = True
        torch.testing.assert_close(y[~sees], right[~sees], rtol=1e-5, atol=1e-5)
        assert not y[sees].isfinite().any()
        if causal:
            found = torch.autograd.grad(y[:, :at].square().sum(), given)
            for mine, expected in zip(found, grads, strict=True):
                torch.testing.assert_close(mine[:, :at], expected[:, :at], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", ["none", "sum", "count"])
def test_a_state_with_a_number_that_is_not_finite_says_so(norm):
    q, k, v = torch.rand(3, 1, 6, 2, 3).unbind()
    k[0, 4, 0, 1], v[0, 2, 1, 2] = math.nan, math.inf
    _, state = linear_attend(q, k, v, causal=True, norm=norm, return_state=True)
    bad = torch.zeros(1, 2, 3, 3, dtype=torch.bool)
    bad[0, 0, 1], bad[0, 1, :, 2] = True, True
    assert torch.equal(~state.memory.isfinite(), bad)


@pytest.mark.parametrize("number", [math.nan, 1e4])
def test_maps_of_all_keys_see_only_those_that_exist(number):
    q, k, v = torch.randn(3, 2, 9, 2, 4, dtype=torch.float64).unbind()
    features = RandomFeatures(RandomFeatures.draw(8, 4, torch.Generator().manual_seed(0)).double(), eps=0.1)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[:, [0, 5]] = False
    hidden = k.masked_fill(~valid[..., None, None], number)
    keep = valid[0]
    for options in ({}, {"norm": "sum"}):
        found = linear_attend(q, hidden, v, feature=features, valid=valid, **options)
        expected = linear_attend(q, k[:, keep], v[:, keep], feature=features, **options)
        torch.testing.assert_close(found, expected)
    assert not linear_attend(q, hidden, v, feature=features, valid=torch.zeros_like(valid)).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("norm", ["none", "sum", "count"])
def test_a_batch_of_none_gives_none(norm, causal, backend):
    q, k, v = (torch.zeros(0, 5, 2, n, requires_grad=True) for n in (3, 3, 4))
    valid = torch.zeros(0, 5, dtype=torch.bool)
    y, state = linear_attend(
        q, k, v, norm=norm, causal=causal, valid=valid, return_state=True, backend=backend, feature="relu", chunk=4
    )
    assert (y.shape, state.memory.shape) == ((0, 5, 2, 4), (0, 2, 3, 4))
    again, _ = linear_attend(q, k, v, norm=norm, causal=causal, state=state, return_state=True, backend=backend)
    assert all(g.shape == t.shape for g, t in zip(torch.autograd.grad((y + again).sum(), (q, k, v)), (q, k, v), strict=True))
    assert linear_weights(q, k, norm=norm, causal=causal).shape == (0, 2, 5, 5)


@pytest.mark.parametrize("decay", [None, "head", "token"])
@pytest.mark.parametrize("seed", range(4))
def test_states_chained_over_random_cuts_are_the_whole(seed, decay):
    choice = pseudo.Random(seed)
    tokens = choice.randint(2, 60)
    q, k, v = torch.rand(3, 2, tokens, 2, 3, dtype=torch.float64).unbind()
    logs = {None: None, "head": -torch.rand(2), "token": -torch.rand(2, tokens, 2)}[decay]
    for feature in ("elu_plus_one", CosineFeatures(tokens)):
        options = {"feature": feature, "norm": "sum", "causal": True}
        whole, last = linear_attend(q, k, v, log_decay=logs, return_state=True, **options)
        cuts = sorted({0, tokens, *(choice.randint(0, tokens) for _ in range(4))})
        state, parts = None, []
        for first, end in itertools.pairwise(cuts):
            local = logs[:, first:end] if decay == "token" else logs
            y, state = linear_attend(
                *(t[:, first:end] for t in (q, k, v)), log_decay=local, state=state, start=first, return_state=True,
                chunk=choice.choice([1, 8, 64]), **options,
            )  # fmt: skip
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 1), whole)
        torch.testing.assert_close(state[:2], last[:2])


def test_vmap_over_calls_is_each_call():
    q, k, v = torch.rand(3, 4, 2, 9, 2, 3).unbind()
    for options in ({"causal": True, "norm": "sum"}, {"norm": "sum", "feature": "relu"}, {"causal": True, "backend": "naive"}):
        found = torch.func.vmap(lambda q, k, v, o=options: linear_attend(q, k, v, **o))(q, k, v)
        torch.testing.assert_close(found, torch.stack([linear_attend(*t, **options) for t in zip(q, k, v, strict=True)]))


class Map:
    """A feature map of a function."""

    streams = True

    def __init__(self, function) -> None:
        self.function = function

    def __call__(self, x: Tensor, start: int, keys: bool) -> Tensor:
        return self.function(x, keys)


Q = torch.rand(2, 6, 2, 3)
STATE = LinearState(torch.zeros(2, 2, 3, 3), torch.zeros(2, 2, 3), torch.zeros(2))
with warnings.catch_warnings(action="ignore"):  # that they are a prototype
    NESTED = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
WORDS = [None, [], "word", b"b", 2.5j, object(), np.zeros((2, 2)), torch.float32, int, {}]
TENSORS = [
    torch.zeros(2, 6, 2, 3, dtype=torch.complex64), torch.zeros(2, 6, 2, 3, dtype=torch.long), Q.to_sparse(), Q.to("meta"),
    NESTED, Q.double(), Q[0], Q[:, :0], Q[..., :2], Q[:, :, :1], Q[:1],
]  # fmt: skip
NUMBERS = [True, torch.tensor(1.0), math.nan, math.inf, 1e300, 10**400]
WRONG = {
    **{name: [*WORDS, *NUMBERS, *TENSORS] for name in "qkv"},
    "feature": [
        *WORDS, *NUMBERS, "reluu", torch.relu, CosineFeatures, CosineFeatures(3), Map(lambda x, keys: None),
        Map(lambda x, keys: x[:, 1:]), Map(lambda x, keys: x.half()), Map(lambda x, keys: x if keys else torch.cat([x, x], -1)),
        Map(lambda x, keys: x[..., :0]), Map(lambda x, keys: x.to("meta")), RandomFeatures(torch.ones(4, 5)),
    ],
    "norm": [*WORDS, *NUMBERS, "mean"],
    "floor": [*WORDS[1:], *NUMBERS],
    "eps": [*WORDS, *NUMBERS],
    "causal": [*WORDS, 1, torch.tensor(True)],
    "log_decay": [
        *WORDS[1:], *NUMBERS, *TENSORS, torch.tensor([0.0, 0.1]), torch.tensor([0.0, math.nan]), torch.zeros(2).cfloat(),
    ],
    "scale": [*WORDS, True, math.nan, 1e300, *TENSORS, torch.ones(2, 1), torch.ones(3), torch.ones(2).cfloat()],
    "valid": [*WORDS[1:], *NUMBERS, *TENSORS, torch.ones(2, 6), torch.ones(2, 1, dtype=torch.bool)],
    "state": [
        *WORDS[1:], *NUMBERS, Q, (), tuple(STATE[:2]), list(STATE), (*STATE, None), (None, None, None), (1, 2, 3),
        STATE._replace(memory=torch.zeros(2, 2, 1, 3)), STATE._replace(memory=torch.zeros(2, 2, 4, 3)),
        STATE._replace(memory=torch.zeros(1, 2, 3, 3)), STATE._replace(memory=torch.zeros(2, 1, 3, 3)),
        STATE._replace(memory=torch.zeros(2, 2, 3, 1)), STATE._replace(memory=torch.zeros(2, 2, 3, 3).double()),
        STATE._replace(memory=torch.zeros(2, 2, 3, 3, device="meta")), STATE._replace(total=None),
        STATE._replace(total=torch.zeros(2, 2, 1)), STATE._replace(total=torch.zeros(1, 2, 3)),
        STATE._replace(total=torch.zeros(2, 2, 3).half()), STATE._replace(keys=torch.zeros(1)),
        STATE._replace(keys=torch.zeros(3)), STATE._replace(keys=torch.zeros(2, dtype=torch.long)), STATE._replace(keys=3),
        STATE._replace(keys=torch.tensor([1.0, -1.0])), STATE._replace(keys=torch.tensor([math.nan, 1.0])),
        STATE._replace(memory=torch.zeros(2, 2, 3)), STATE._replace(memory=torch.zeros(2, 2, 3, 3, 1)),
    ],
    "start": [*WORDS, *NUMBERS, -1, 1.0, 2**31],
    "return_state": [*WORDS, 0],
    "chunk": [*WORDS, *NUMBERS, 64.0, 48, 0, -64, 2**31],
    "backend": [*WORDS, *NUMBERS, "cuda"],
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_each_wrong_argument_is_one_clear_error(name):
    options = {"causal": True, "norm": "sum", "state": STATE, "log_decay": torch.zeros(2), "return_state": True}
    linear_attend(Q, Q, Q, **options)
    functions = [linear_attend] if name in ("v", "return_state", "chunk", "backend") else [linear_attend, linear_weights]
    for wrong in WRONG[name]:
        for function in functions:
            given = {"q": Q, "k": Q, "v": Q, **options, name: wrong}
            if function is linear_weights:
                if isinstance(wrong, LinearState) and wrong.memory.shape == (2, 2, 3, 1):
                    continue  # weights know no values
                given = {n: a for n, a in given.items() if n not in ("v", "return_state")}
            with pytest.raises((TypeError, ValueError)) as caught:
                function(**given)
            text = str(caught.value)
            assert "\n" not in text
            assert len(text) < 400
            assert "got" in text, text


@pytest.mark.parametrize("rows", [[], [6], [-1], [0.5], [True], "0", 3, *map(torch.tensor, ([6], [[0]], [0.0], [-1]))], ids=str)
def test_rows_that_are_no_queries_are_refused(rows):
    with pytest.raises((TypeError, ValueError), match="rows must be"):
        linear_weights(Q, Q, rows=rows)


def test_rows_may_be_a_list():
    torch.testing.assert_close(linear_weights(Q, Q, rows=[5, 0]), linear_weights(Q, Q)[:, :, [5, 0]])


def test_feature_maps_check_what_they_are_made_of():
    for make in (
        lambda: CosineFeatures(0), lambda: CosineFeatures(2.5), lambda: RandomFeatures([1.0]), lambda: RandomFeatures(None),
        lambda: RandomFeatures(torch.zeros(3, 3, dtype=torch.cfloat)), lambda: RandomFeatures(torch.zeros(3, 3), eps=math.nan),
        lambda: RandomFeatures.draw(0, 3), lambda: RandomFeatures.draw(3, -1), lambda: RandomFeatures.draw(3, 3, heads=0),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match="must be"):
            make()


def test_grids_of_more_tokens_than_an_index_holds_are_refused():
    q = torch.zeros(1, 1, 1, 1).expand(1, 2**31, 1, 1)
    with pytest.raises(ValueError, match="at most 2147483647 tokens"):
        linear_attend(q, q, q)
