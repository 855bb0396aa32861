"""Token reduction: who stays, what stands for the others, and the way back to the grid."""

import itertools
import math
import random

import pytest
import torch

from regard.layers.reduce import (
    FusingReducer,
    MaskingReducer,
    ResizingReducer,
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
    second, later = MaskingReducer(0.3, prefix=PREFIX)(first, again, tokens)
    for item, row in enumerate(scores.tolist()):
        alive = set(ranking(row)[:7])
        assert tokens.alive[item].nonzero().flatten().tolist() == sorted(alive)
        left = sorted(sorted(alive, key=lambda i: row[i])[: math.ceil(0.3 * N)])
        assert later.alive[item].nonzero().flatten().tolist() == left
        for y, those in ((first, alive), (second, left)):
            for i in range(N):
                assert torch.equal(y[item, PREFIX + i], x[item, PREFIX + i] * (i in those))
    assert torch.equal(second[:, :PREFIX], x[:, :PREFIX])
    assert torch.equal(later.restore(second, PREFIX), second[:, PREFIX:])
    third, same = MaskingReducer(0.9, prefix=PREFIX)(second, scores, later)  # more than there are
    assert torch.equal(third, second)
    assert torch.equal(same.alive, later.alive)
    assert same.present == later.present == 4


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


def test_weights_between_tokens_go_to_the_places_whose_own_tokens_are_left():
    parents = torch.tensor([[0, 0, 0, 4, 4, 4]])
    _, tokens = TreeReducer(0.5, prefix=0)(
        torch.randn(1, 6, 2), torch.tensor([[9.0, 1, 7, 2, 8, 3]]), TokenMap.full(1, 6), parents
    )
    weights = torch.rand(1, 3, 3)  # the tokens of places 0, 4 and 2, in this order; 1, 3 and 5 are represented by others
    own, expected = [0, 4, 2], torch.zeros(1, 6, 6)
    for i, sender in enumerate(own):
        for j, receiver in enumerate(own):
            expected[0, sender, receiver] = weights[0, i, j]
    assert torch.equal(tokens.spread(weights), expected)
    assert torch.equal(TokenMap.full(1, 3).spread(weights), weights)


def test_a_long_chain_of_dropped_parents_is_followed_to_its_end():
    n = 33
    parents = torch.tensor([[max(0, i - 1) for i in range(n)]])
    scores = -torch.arange(float(n))[None]
    x = torch.arange(1.0, n + 1).reshape(1, n, 1)
    y, tokens = TreeReducer(0.5, prefix=0)(x, scores, TokenMap.full(1, n), parents, count=1)
    assert tokens.restore(y, 0).flatten().tolist() == [1.0] * n


@pytest.mark.parametrize(("grid", "size"), [((7,), 3), ((5, 6), 2), ((4, 6), (4, 3)), ((3, 4, 5), (2, 4, 3)), ((2, 3), 4)])
def test_a_resized_grid_is_interpolated_and_its_nearest_tokens_stand_for_places(grid, size):
    sizes = size if isinstance(size, tuple) else (size,) * len(grid)
    x = torch.randn(2, *grid, DIM, dtype=torch.float64)
    y, tokens = ResizingReducer(size)(x, TokenMap.full(2, math.prod(grid)))

    def weight(cell, count, place, length):
        """Of a place in a cell: hats of unit width around the cell's middle, in units of places, kept inside."""
        middle = min(max((cell + 0.5) * length / count - 0.5, 0), length - 1)
        return max(0.0, 1 - abs(middle - place))

    for cell in itertools.product(*map(range, sizes)):
        expected = torch.zeros(2, DIM, dtype=torch.float64)
        for place in itertools.product(*map(range, grid)):
            share = math.prod(weight(*each) for each in zip(cell, sizes, place, grid, strict=True))
            expected += share * x[:, *place]
        torch.testing.assert_close(y[:, *cell], expected)
    restored = tokens.restore(y.flatten(1, -2), 0).unflatten(1, grid)
    for place in itertools.product(*map(range, grid)):
        inside = [min(int((p + 0.5) * m / n), m - 1) for p, m, n in zip(place, sizes, grid, strict=True)]
        assert torch.equal(restored[:, *place], y[:, *inside])
    assert tokens.present == math.prod(sizes)
    assert not tokens.alive.any()


def test_resizing_comes_after_other_reductions_and_a_size_can_be_set():
    x = torch.randn(1, 12, DIM, dtype=torch.float64)
    kept, tokens = TokenReducer(0.5, prefix=0, order="position")(x, torch.arange(12.0)[None], TokenMap.full(1, 12))
    reducer = ResizingReducer(6)
    same, unchanged = reducer(kept, tokens)
    assert same is kept
    assert unchanged is tokens
    reducer.size = 2
    y, later = reducer(kept, tokens)
    assert later.place[0].tolist() == [-1] * 6 + [0, 0, 0, 1, 1, 1]
    torch.testing.assert_close(later.restore(y, 0)[0, 6:], y[0, [0, 0, 0, 1, 1, 1]])
    assert not later.restore(y, 0)[0, :6].any()
    with pytest.raises(ValueError, match=r"at least 1 on every axis; got \(2, 0\)"):
        reducer.size = (2, 0)
    with pytest.raises(ValueError, match=r"with 6 tokens; got \(1, 12, 3\)"):
        reducer(x, tokens)


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


def test_what_is_no_map_and_no_token_of_it_is_refused():
    tokens, x, scores = TokenMap.full(2, 6), torch.randn(2, 1 + 6, 3), torch.rand(2, 6)
    doors = [
        (TokenMap.full, {"batch": 2, "places": 6}),
        (
            tokens.then,
            {"moved": torch.zeros(2, 6, dtype=torch.long), "survives": torch.ones(2, 6, dtype=torch.bool), "present": 1},
        ),
        (tokens.restore, {"x": x, "prefix": 1}),
        (tokens.spread, {"weights": torch.rand(2, 6, 6)}),
        (tokens.silence, {"x": x[:, 1:]}),
        (split_by_score, {"scores": scores, "count": 2, "order": "score"}),
        (cosine_rate, {"epoch": 3, "rate": 0.5, "start": 1, "span": 9}),
        (TokenReducer(0.5), {"x": x, "scores": scores, "tokens": tokens, "count": 2}),
        (FusingReducer(0.5), {"x": x, "scores": scores, "tokens": tokens, "count": 2}),
        (MaskingReducer(0.5), {"x": x, "scores": scores, "tokens": tokens, "count": 2}),
        (TreeReducer(0.5), {"x": x, "scores": scores, "tokens": tokens, "parents": torch.zeros(2, 6, dtype=torch.long)}),
        (ResizingReducer(2), {"x": torch.randn(2, 2, 3, 4), "tokens": tokens}),
        (lambda rate: setattr(TokenReducer(0.5), "rate", rate), {"rate": 0.5}),
        (lambda size: setattr(ResizingReducer(2), "size", size), {"size": 2}),
    ]
    other = (x[:1], x.expand(2, 7, 3)[:, :, None], scores[:1], x.repeat(2, 1, 1))  # what broadcasting or gathering would take
    wrong = ("a", "", 1.5j, math.nan, {}, object(), [None], x.numpy(), x.to("meta"), x.to_sparse(), x.long().bool(), *other)
    for door, right in doors:
        door(**right)
        for name, value in itertools.product(right, wrong):
            if door is split_by_score and value is other[2]:
                continue  # scores of another batch are scores
            with pytest.raises((TypeError, ValueError)) as caught:
                door(**{**right, name: value})
            for inside in ("has no attribute", "unsupported operand", "not supported between", "ambiguous", "argument"):
                assert inside not in str(caught.value), (door, name, value)
    with pytest.raises(ValueError, match="parents must list tokens from 0 to 5; got 6"):
        TreeReducer(0.5)(x, scores, tokens, torch.full((2, 6), 6))
