"""Attention between channels, against loops over channels."""

import math

import pytest
import torch

from regard.ops.channel import NORMALISERS, channel_attend


def normalise(row: list[float], kind: str) -> list[float]:
    if kind == "relu":
        return [max(s, 0.0) for s in row]
    if kind == "none":
        return row
    if kind == "reversed_softmax":
        row = [max(row) - s for s in row]
    total = sum(math.exp(s) for s in row) + (1.0 if kind == "softmax_plus_one" else 0.0)
    return [math.exp(s) / total for s in row]


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("l2", [False, True])
@pytest.mark.parametrize("kind", NORMALISERS)
def test_every_channel_attends_to_the_channels_of_its_head(kind, l2, dim):
    q, k, v = (torch.randn(1, 3, 2, 2, n, dtype=torch.float64) for n in (4, 3, 3))
    temperature = torch.tensor([0.5, 2.0], dtype=torch.float64)
    ours = channel_attend(q, k, v, normaliser=kind, l2=l2, temperature=temperature, dim=dim)
    for head in range(2):
        queries, keys, values = (t[0, :, :, head].flatten(0, 1).T.tolist() for t in (q, k, v))
        scores = []
        for a in queries:
            row = []
            for b in keys:
                size = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b)) if l2 else math.sqrt(len(queries))
                row.append(sum(x * y for x, y in zip(a, b, strict=True)) / size * temperature[head].item())
            scores.append(row)
        if dim == -2:
            weights = list(zip(*(normalise(list(column), kind) for column in zip(*scores, strict=True)), strict=True))
        else:
            weights = [normalise(row, kind) for row in scores]
        for i, row in enumerate(weights):
            expected = [sum(w * value[n] for w, value in zip(row, values, strict=True)) for n in range(6)]
            torch.testing.assert_close(ours[0, :, :, head, i].flatten(), torch.tensor(expected, dtype=torch.float64))


def test_gradients_are_exact_and_scale_is_a_factor():
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 2, 5, 2, 3, dtype=torch.float64).unbind())
    assert torch.autograd.gradcheck(lambda *t: channel_attend(*t, normaliser="softmax_plus_one", l2=True), (q, k, v))
    torch.testing.assert_close(channel_attend(q, k, v, scale=0.7), channel_attend(q * 0.7 * math.sqrt(3), k, v))
    torch.testing.assert_close(channel_attend(q, k, v, l2=True, scale=0.5), channel_attend(q * 3, k, v, l2=True, scale=0.5))


def test_permuting_tokens_permutes_the_output():
    q, k, v = torch.randn(3, 2, 6, 2, 4, dtype=torch.float64).unbind()
    order = torch.randperm(6)
    permuted = channel_attend(*(t[:, order] for t in (q, k, v)))
    torch.testing.assert_close(permuted, channel_attend(q, k, v)[:, order])


def test_values_may_lie_on_another_grid():
    q, k = torch.randn(2, 2, 6, 2, 4, dtype=torch.float64).unbind()
    v = torch.randn(2, 3, 5, 2, 4, dtype=torch.float64)
    ours = channel_attend(q, k, v)
    weights = (torch.einsum("bnhi,bnhj->bhij", q, k) / 2).softmax(-1)
    torch.testing.assert_close(ours, torch.einsum("bhij,bxyhj->bxyhi", weights, v), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"v \(2, 6, 2, 3\)"):
        channel_attend(q, k, torch.randn(2, 6, 2, 3, dtype=torch.float64))


def test_large_scores_stay_finite():
    q, k, v = (1e4 * torch.randn(3, 1, 4, 1, 3, dtype=torch.float64)).unbind()
    for kind in ("softmax", "softmax_plus_one", "reversed_softmax"):
        assert channel_attend(q, k, v, normaliser=kind).isfinite().all()


def test_misfits_are_named():
    q = torch.randn(1, 4, 2, 3)
    with pytest.raises(ValueError, match=r"k \(1, 5, 2, 3\)"):
        channel_attend(q, torch.randn(1, 5, 2, 3), q)
    with pytest.raises(ValueError, match="relu, none; got 'tanh'"):
        channel_attend(q, q, q, normaliser="tanh")
    with pytest.raises(ValueError, match="dim must be at most -1; got int 1"):
        channel_attend(q, q, q, dim=1)
