"""Pooled tokens and readouts, written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regard.layers.pools import AttentionPool, ClassAttention, PoolKV, adaptive_pool, resize_tokens, weighted_mean

DOUBLE = {"dtype": torch.float64}


def test_mean_pooling_counts_the_tokens_of_partial_windows_only():
    x = torch.randn(2, 5, 7, 3, **DOUBLE)
    y = PoolKV("mean", 3)(x)
    assert y.shape == (2, 2, 3, 3)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(y[:, i, j], x[:, 3 * i : 3 * i + 3, 3 * j : 3 * j + 3].mean((1, 2)))
    assert PoolKV("mean", 1)(x) is x


def test_adaptive_pooling_means_over_parts_that_may_overlap():
    x = torch.randn(2, 5, 7, 3, **DOUBLE)
    for pool, size in ((PoolKV("adaptive", size=(2, 3)), (2, 3)), (PoolKV("adaptive", 2), (2, 3))):
        y = pool(x)
        assert y.shape == (2, *size, 3)
        for i in range(size[0]):
            for j in range(size[1]):
                rows = slice(5 * i // size[0], math.ceil(5 * (i + 1) / size[0]))
                columns = slice(7 * j // size[1], math.ceil(7 * (j + 1) / size[1]))
                torch.testing.assert_close(y[:, i, j], x[:, rows, columns].mean((1, 2)))
    assert PoolKV("adaptive", 9)(x).shape == (2, 1, 1, 3)
    torch.testing.assert_close(adaptive_pool(x[:, 0], 7), x[:, 0])


def test_resizing_interpolates_between_the_centres_of_tokens():
    line = torch.tensor([0.0, 1.0, 4.0, 9.0], **DOUBLE).reshape(1, 4, 1)
    assert resize_tokens(line, 2).flatten().tolist() == [0.5, 6.5]
    assert resize_tokens(line, 8).flatten().tolist() == [0, 0.25, 0.75, 1.75, 3.25, 5.25, 7.75, 9]
    grid = torch.randn(2, 6, 4, 3, **DOUBLE)
    assert torch.equal(PoolKV("resize", size=(6, 4))(grid), grid)
    separable = resize_tokens(
        resize_tokens(grid.movedim(2, 1).flatten(0, 1), 3).unflatten(0, (2, 4)).movedim(2, 1).flatten(0, 1), 5
    )
    torch.testing.assert_close(PoolKV("resize", size=(3, 5))(grid), separable.unflatten(0, (2, 3)))


@pytest.mark.parametrize("groups", [1, 4])
def test_strided_convolution_completes_the_last_window_with_zeros(groups):
    pool = PoolKV("conv", 2, dim=4, groups=groups, **DOUBLE)
    x = torch.randn(2, 5, 4, 4, **DOUBLE)
    padded = F.pad(x, [0, 0, 0, 0, 0, 1])
    expected = pool.conv.bias.expand(2, 3, 2, 4).clone()
    weight = pool.conv.weight  # (out, in / groups, 2, 2)
    for i in range(2):
        for j in range(2):
            tap = padded[:, i::2, j::2]
            expected = expected + (tap @ weight[..., i, j].T if groups == 1 else tap * weight[:, 0, i, j])
    torch.testing.assert_close(pool(x), expected)
    assert PoolKV("conv", 3, dim=4, rank=1)(torch.randn(2, 7, 4)).shape == (2, 3, 4)


def test_what_comes_before_and_after_pooling_keeps_its_order():
    x = torch.randn(2, 4, 4, 3, **DOUBLE)
    before, after = nn.Sequential(nn.Linear(3, 5, **DOUBLE), nn.GELU()), nn.LayerNorm(5, **DOUBLE)
    nn.init.normal_(after.weight)
    pooled = F.gelu(x @ before[0].weight.T + before[0].bias).unflatten(2, (2, 2)).unflatten(1, (2, 2)).mean((2, 4))
    torch.testing.assert_close(PoolKV("mean", 2, before=before, after=after)(x), after(pooled))


def test_only_class_tokens_ask_and_they_see_all_tokens():
    layer = ClassAttention(6, 2, prefix=2, **DOUBLE)
    x = torch.randn(3, 9, 6, **DOUBLE)
    outs = []
    for head in (slice(0, 3), slice(3, 6)):
        q = x[:, :2] @ layer.q.weight[head].T
        k = x @ layer.kv.weight[:6][head].T
        v = x @ layer.kv.weight[6:][head].T
        outs.append((q @ k.transpose(1, 2) / math.sqrt(3)).softmax(-1) @ v)
    torch.testing.assert_close(layer(x), layer.proj(torch.cat(outs, -1)))


def test_readouts_are_weighted_means_of_all_tokens():
    x, weights = torch.randn(2, 3, 4, 5, **DOUBLE), torch.rand(2, 3, 4, **DOUBLE)
    expected = sum(weights[:, i, j, None] * x[:, i, j] for i in range(3) for j in range(4)) / weights.sum((1, 2))[:, None]
    torch.testing.assert_close(weighted_mean(x, weights), expected)
    pool = AttentionPool(5, **DOUBLE)
    scores = (x @ pool.score.weight[0] + pool.score.bias).exp()
    torch.testing.assert_close(pool(x), weighted_mean(x, scores))


def test_misfits_are_named():
    for bad, message in (
        ({"kind": "max", "ratio": 2}, "mean, adaptive, resize, conv; got 'max'"),
        ({"kind": "mean"}, "either a ratio of at least 1 or a size; got ratio=None, size=None"),
        ({"kind": "adaptive", "ratio": 2, "size": 3}, "got ratio=2, size=3"),
        ({"kind": "mean", "size": 3}, "'mean' pooling needs a ratio"),
        ({"kind": "conv", "ratio": 2}, "needs dim; got kind='conv', dim=None"),
        ({"kind": "mean", "ratio": 2, "dim": 4}, "got kind='mean', dim=4"),
    ):
        with pytest.raises(ValueError, match=message):
            PoolKV(**bad)
    with pytest.raises(ValueError, match=r"size must be a number, or 2 of them, one per axis; got tuple \(2, 2, 2\)"):
        adaptive_pool(torch.randn(1, 4, 4, 3), (2, 2, 2))
    with pytest.raises(ValueError, match="dim=6, heads=4"):
        ClassAttention(6, 4)
    with pytest.raises(ValueError, match=r"\(batch, 1 \+ n, 6\); got \(2, 3, 5\)"):
        ClassAttention(6, 2)(torch.randn(2, 3, 5))
