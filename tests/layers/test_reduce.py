"""Token reduction: who stays, what stands for the others, and the way back to the grid."""

import math
import random

import pytest
import torch

from regard.layers.reduce import (
    FusingReducer,
    MaskingReducer,
    TokenMap,
    TokenReducer,
    TreeReducer,
    cosine_rate,
    kept_count,
    split_by_score,
)

N, PREFIX, DIM = 11, 2, 3


def tokens_and_scores(batch: int = 3, n: int = N):
    return torch.randn(batch, PREFIX + n, DIM, dtype=torch.float64), torch.rand(batch, n, dtype=torch.float64)


def ranking(scores: list[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: -scores[i])


@pytest.mark.parametrize("order", ["score", "position"])
def test_kept_and_dropped_are_all_tokens_once_and_the_kept_are_the_best(order):
    _, scores = tokens_and_scores()
    kept, dropped = split_by_score(scores, 4, order)
    for row, k, d in zip(scores.tolist(), kept.tolist(), dropped.tolist(), strict=True):
        assert sorted(k + d) == list(range(N))
        best = ranking(row)[:4]
        assert k == (best if order == "score" else sorted(best))


def test_counts_follow_the_ceiling_and_count_the_fused_token():
    assert [kept_count(0.7, n) for n in (196, 139, 99)] == [138, 98, 70]
    assert (kept_count(0.55, 100), kept_count(1.0, 9), kept_count(0.01, 9)) == (55, 9, 1)
    x, trace = torch.randn(1, 197, DIM), []
    tokens, reducer = TokenMap.full(1, 196), FusingReducer(0.7)
    for _ in range(3):
        x, tokens = reducer(x, torch.rand(1, x.shape[1] - 1), tokens)
        trace.append(x.shape[1] - 2)
        assert tokens.present == x.shape[1] - 1
    assert trace == [138, 98, 70]


@pytest.mark.parametrize("order", ["score", "position"])
def test_the_fused_token_is_the_sum_weighted_with_the_scores(order):
    x, scores = tokens_and_scores()
    y, tokens = FusingReducer(0.4, prefix=PREFIX, order=order)(x, scores, TokenMap.full(3, N))
    count = math.ceil(0.4 * N)
    assert y.shape == (3, PREFIX + count + 1, DIM)
    for item, row in enumerate(scores.tolist()):
        best = ranking(row)
        fused = sum(row[i] * x[item, PREFIX + i] for i in best[count:])
        kept = best[:count] if order == "score" else sorted(best[:count])
        expected = torch.stack([*x[item, :PREFIX], *(x[item, PREFIX + i] for i in kept), fused])
        torch.testing.assert_close(y[item], expected)
        restored = tokens.restore(y, PREFIX)[item]
        for i in range(N):
            torch.testing.assert_close(restored[i], x[item, PREFIX + i] if i in kept else fused)
            assert tokens.alive[item, i].item() == (i in kept)


def test_gradients_reach_tokens_and_the_scores_of_the_dropped():
    x, scores = (t.requires_grad_() for t in tokens_and_scores(1, 5))
    reducer = FusingReducer(0.5, prefix=PREFIX)

    def reduced(x, scores):
        y, tokens = reducer(x, scores, TokenMap.full(1, 5))
        return y, tokens.restore(y, PREFIX)

    assert torch.autograd.gradcheck(reduced, (x, scores))
    y, _ = reduced(x, scores)
    (gradient,) = torch.autograd.grad(y.sum(), scores)
    dropped = split_by_score(scores, 3).dropped
    assert (gradient != 0).sum() == 2
    assert (gradient.gather(1, dropped) != 0).all()


@pytest.mark.parametrize("kind", [TokenReducer, FusingReducer])
def test_maps_compose_over_reductions_of_any_number(kind):
    """Each token carries the set of places it stands for, followed by hand."""
    random.seed(0)
    x, tokens = torch.randn(2, PREFIX + 12, DIM, dtype=torch.float64), TokenMap.full(2, 12)
    owners = [[{i} for i in range(12)] for _ in range(2)]
    own = [list(range(12)) for _ in range(2)]  # the place whose own token it is, or None
    for rate in (0.7, 0.6, 0.5):
        scores = torch.rand(2, x.shape[1] - PREFIX, dtype=torch.float64)
        x, tokens = kind(rate, prefix=PREFIX)(x, scores, tokens)
        for item, row in enumerate(scores.tolist()):
            best = ranking(row)
            count = math.ceil(rate * len(row))
            sets, mine = ([things[item][i] for i in best[:count]] for things in (owners, own))
            if kind is FusingReducer:
                sets, mine = [*sets, set().union(*(owners[item][i] for i in best[count:]))], [*mine, None]
            owners[item], own[item] = sets, mine
    restored = tokens.restore(x, PREFIX)
    for item in range(2):
        stands = {place: i for i, places in enumerate(owners[item]) for place in places}
        for place in range(12):
            expected = x[item, PREFIX + stands[place]] if place in stands else torch.zeros(DIM, dtype=torch.float64)
            assert torch.equal(restored[item, place], expected)
            assert tokens.place[item, place].item() == stands.get(place, -1)
        assert tokens.alive[item].nonzero().flatten().tolist() == sorted(i for i in own[item] if i is not None)


@pytest.mark.parametrize("kind", [TokenReducer, FusingReducer, MaskingReducer])
def test_a_rate_of_one_changes_nothing(kind):
    x, scores = tokens_and_scores()
    before = TokenMap.full(3, N)
    y, tokens = kind(1.0, prefix=PREFIX)(x, scores, before)
    assert y is x
    assert tokens is before
    assert torch.equal(tokens.restore(x, PREFIX), x[:, PREFIX:])


def test_masked_tokens_stay_in_place_as_zeros_and_never_come_back():
    x, scores = tokens_and_scores()
    first, tokens = MaskingReducer(0.6, prefix=PREFIX)(x, scores, TokenMap.full(3, N))
    assert tokens.present == 7
    again = 1.0 - scores  # the dead have the largest scores now
    second, later = MaskingReducer(0.5, prefix=PREFIX)(first, again, tokens)
    for item, row in enumerate(scores.tolist()):
        alive = set(ranking(row)[:7])
        assert tokens.alive[item].nonzero().flatten().tolist() == sorted(alive)
        left = sorted(sorted(alive, key=lambda i: row[i])[: math.ceil(0.5 * 7)])
        assert later.alive[item].nonzero().flatten().tolist() == left
        for y, those in ((first, alive), (second, left)):
            for i in range(N):
                assert torch.equal(y[item, PREFIX + i], x[item, PREFIX + i] * (i in those))
    assert torch.equal(second[:, :PREFIX], x[:, :PREFIX])
    assert torch.equal(later.restore(second, PREFIX), second[:, PREFIX:])


def test_dropped_tokens_are_represented_by_the_nearest_kept_ancestor():
    #            0  1  2  3  4  5  6  7     kept: 0 3 6; 1 -> 0; 2 -> 1 -> 0; 4 -> 3; 5 and 7 point at each other
    parents = [[0, 0, 1, 0, 3, 7, 3, 5]]
    scores = torch.tensor([[9.0, 1, 2, 8, 3, 4, 7, 5]])
    x = torch.arange(1.0, 9).reshape(1, 8, 1)
    reducer = TreeReducer(0.3, prefix=0)
    y, tokens = reducer(x, scores, TokenMap.full(1, 8), torch.tensor(parents))
    assert y.flatten().tolist() == [1, 4, 7]
    assert tokens.restore(y, 0).flatten().tolist() == [1, 1, 1, 4, 4, 0, 7, 0]
    assert tokens.alive.nonzero()[:, 1].tolist() == [0, 3, 6]
    z, later = reducer(y, torch.tensor([[1.0, 2, 3]]), tokens, torch.tensor([[0, 2, 2]]), count=2)  # 1 (place 0) has no heir
    assert later.restore(z, 0).flatten().tolist() == [0, 0, 0, 4, 4, 0, 7, 0]
    whole, same = reducer(x, scores, tokens := TokenMap.full(1, 8), torch.tensor(parents), count=8)
    assert whole is x
    assert same is tokens


def test_a_long_chain_of_dropped_parents_is_followed_to_its_end():
    n = 33
    parents = torch.tensor([[max(0, i - 1) for i in range(n)]])
    scores = -torch.arange(float(n))[None]
    x = torch.arange(1.0, n + 1).reshape(1, n, 1)
    y, tokens = TreeReducer(0.5, prefix=0)(x, scores, TokenMap.full(1, n), parents, count=1)
    assert tokens.restore(y, 0).flatten().tolist() == [1.0] * n


def test_the_rate_falls_with_a_half_cosine():
    rates = [cosine_rate(e, 0.6, start=10, span=100) for e in (0, 10, 35, 60, 110, 300)]
    assert rates == pytest.approx([1.0, 1.0, 0.6 + 0.4 * (1 + math.sqrt(0.5)) / 2, 0.8, 0.6, 0.6])
    reducer = TokenReducer(1.0)
    reducer.rate = cosine_rate(60, 0.6)
    assert reducer.rate == pytest.approx(0.8)
    assert "rate=0.8" in repr(reducer)


def test_misfits_are_named():
    x, scores = tokens_and_scores()
    with pytest.raises(ValueError, match=r"\(0, 1\]; got 1.5"):
        TokenReducer(1.5)
    with pytest.raises(ValueError, match="'score' or 'position'; got 'size'"):
        TokenReducer(0.5, order="size")
    with pytest.raises(ValueError, match=r"\(batch, 1 \+ 11, dim\).*got \(3, 13, 3\) and \(3, 11\)"):
        TokenReducer(0.5)(x, scores, TokenMap.full(3, N))
    with pytest.raises(ValueError, match=r"1\.\.11; got 12"):
        TokenReducer(0.5, prefix=PREFIX)(x, scores, TokenMap.full(3, N), count=12)
    with pytest.raises(ValueError, match=r"parents must be indices.*got torch.float64"):
        TreeReducer(0.5, prefix=PREFIX)(x, scores, TokenMap.full(3, N), scores)
