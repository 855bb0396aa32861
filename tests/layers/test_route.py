"""Routing: summaries of blocks and the choice among them."""

import itertools
import math

import pytest
import torch

from regard.ops.tokens import route


@pytest.mark.parametrize(
    ("grid", "block"), [((6,), (3,)), ((7,), (3,)), ((6, 4), (3, 2)), ((7, 5), (3, 4)), ((3, 4, 5), (2, 9, 2))]
)
def test_summaries_are_means_over_the_tokens_a_block_holds(grid, block):
    x = torch.randn(2, *grid, 3, 4, dtype=torch.float64)
    counts = [math.ceil(n / size) for n, size in zip(grid, block, strict=True)]
    ours = route.summaries(x, block)
    assert ours.shape == (2, *counts, 3, 4)
    for at in itertools.product(*map(range, counts)):
        inside = tuple(slice(i * size, (i + 1) * size) for i, size in zip(at, block, strict=True))
        expected = x[(slice(None), *inside)].flatten(1, len(grid)).mean(1)
        torch.testing.assert_close(ours[(slice(None), *at)], expected)


def test_affinity_is_the_dot_product_of_summaries():
    q, k = torch.randn(2, 2, 3, 5, dtype=torch.float64), torch.randn(2, 1, 4, 5, dtype=torch.float64)
    scores = route.affinity(q, k)
    assert scores.shape == (2, 6, 4)
    for b, i, j in itertools.product(range(2), range(6), range(4)):
        assert float(scores[b, i, j]) == pytest.approx(float(q[b, i // 3, i % 3] @ k[b, 0, j]))
    assert route.affinity(q.bfloat16(), k.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("heads", [None, 3])
def test_top_k_lists_the_highest_scores(heads):
    scores = torch.randn(2, *([heads] if heads else []), 6, 8, requires_grad=True)
    pattern = route.top_k(scores, 3, (2, 2))
    assert not pattern.table.requires_grad
    order = scores.argsort(-1, descending=True)[..., :3]
    assert torch.equal(pattern.table.sort(-1).values, order.sort(-1).values)


def test_top_k_lists_all_where_there_are_fewer():
    assert route.top_k(torch.randn(1, 4, 2), 9, (3,)).table.shape == (1, 4, 2)
    with pytest.raises(ValueError, match="at least 1; got int 0"):
        route.top_k(torch.randn(1, 4, 2), 0, (3,))


def test_block_sizes_cover_the_grid_in_at_most_the_given_blocks():
    for n, count in itertools.product(range(1, 40), range(1, 9)):
        (size,) = route.block_sizes((n,), count)
        assert math.ceil(n / size) <= count
        assert size == 1 or math.ceil(n / (size - 1)) > count
    with pytest.raises(ValueError, match="one number of blocks per axis"):
        route.block_sizes((3, 4), (2, 2, 2))
