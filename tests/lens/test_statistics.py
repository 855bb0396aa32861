"""Numbers of constructed maps, by hand; of random ones, by loops."""

import math
import sys

import pytest
import torch
from torch import nn

from regard import Source, attend, create_mixer
from regard import patterns as P
from regard.lens import capture, distance, effective_rank, entropy, head_similarity
from regard.ops.calls.footprint import Footprint

KIND = torch.float64


def map_of(bias, grid, k_grid=None, *, lazy=False, **options):
    """Attention whose weights are the softmax of a bias ``(heads, queries, keys)``."""
    heads = len(bias)

    class Attends(nn.Module):
        def forward(self, q):
            k = q.new_zeros(1, *(k_grid or grid), heads, 1)
            return attend(q, [Source(k, k, bias=bias, **options.get("source", {}))], sink=options.get("sink"))

    layer = Attends()
    with capture(layer, lazy=lazy, rows=options.get("rows")) as maps:
        layer(torch.zeros(1, *grid, heads, 1, dtype=KIND))
    return maps[0]


def logs(weights):
    return torch.tensor(weights, dtype=KIND).log()


@pytest.mark.parametrize("lazy", [False, True])
def test_entropy_is_that_of_each_row(lazy):
    bias = logs([[[1.0, 0.0, 0.0, 0.0], [0.25] * 4, [0.5, 0.5, 0.0, 0.0], [0.7, 0.1, 0.1, 0.1]]])
    found = entropy(map_of(bias, (2, 2), lazy=lazy))
    expected = [0.0, math.log(4), math.log(2), -0.7 * math.log(0.7) - 0.3 * math.log(0.1)]
    torch.testing.assert_close(found[0, 0], torch.tensor(expected, dtype=KIND), rtol=0, atol=1e-12)


def test_a_sink_is_one_more_key_and_an_empty_row_has_no_entropy():
    bias = torch.zeros(1, 4, 4, dtype=KIND)
    bias[:, 1] = -torch.inf
    found = entropy(map_of(bias, (2, 2), sink=0.0))
    torch.testing.assert_close(found[0, 0], torch.tensor([math.log(5), 0.0, math.log(5), math.log(5)], dtype=KIND))
    assert float(entropy(map_of(bias, (2, 2)))[0, 0, 1]) == 0.0


@pytest.mark.parametrize("lazy", [False, True])
def test_distance_is_in_cells_of_the_query_grid(lazy):
    weights = torch.zeros(2, 6, 6, dtype=KIND)
    weights[0] = torch.eye(6)  # every query looks at itself
    weights[1, :, 5] = 0.5  # and head 1 halfway at the last cell
    weights[1, :, 0] = 0.5
    found = distance(map_of(weights.log(), (2, 3), lazy=lazy))[0]
    places = [(y, x) for y in range(2) for x in range(3)]
    expected = [(math.dist(place, (1, 2)) + math.dist(place, (0, 0))) / 2 for place in places]
    torch.testing.assert_close(found[0], torch.zeros(6, dtype=KIND))
    torch.testing.assert_close(found[1], torch.tensor(expected, dtype=KIND))


def test_distance_to_a_pooled_key_is_the_mean_of_that_to_its_cells():
    weights = torch.tensor([[[0.25, 0.75]] * 4], dtype=KIND)
    options = {"source": {"footprint": Footprint((1, 4), "windows", (1, 3))}}
    found = distance(map_of(weights.log(), (1, 4), (1, 2), **options))[0, 0]
    expected = [0.25 * sum(abs(x - y) for y in range(3)) / 3 + 0.75 * abs(x - 3) for x in range(4)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=KIND))


def test_distance_leaves_out_tokens_without_a_place():
    mixer = create_mixer("multi_head", dim=8, heads=2).to(KIND)
    with capture(mixer) as maps:
        mixer(torch.randn(1, 3, 4, 8, dtype=KIND), torch.randn(1, 2, 8, dtype=KIND))
    cells = maps[0].weights[0][0].flatten(2)
    places = torch.tensor([(y, x) for y in range(3) for x in range(4)], dtype=KIND)
    away = (places[:, None] - places).norm(dim=-1)
    torch.testing.assert_close(distance(maps[0])[0], (cells * away).sum(-1) / cells.sum(-1))
    with pytest.raises(ValueError, match="queries and keys with places of their own"):
        distance(maps[1])


def test_strided_queries_measure_in_their_own_cells():
    layer = create_mixer("halo", dim=4, heads=1, block_size=4, halo_size=1, stride=2, border="mask", relative_embedding=False)
    with capture(layer) as maps:
        layer(torch.zeros(1, 4, 4, 4))  # equal weights over all 16 cells, which are half as wide
    expected = [
        sum(math.dist((y + 0.5, x + 0.5), ((i + 0.5) / 2, (j + 0.5) / 2)) for i in range(4) for j in range(4)) / 16
        for y in range(2)
        for x in range(2)
    ]
    torch.testing.assert_close(distance(maps[0])[0, 0].float(), torch.tensor(expected))


def test_equal_heads_are_alike_and_disjoint_heads_are_not():
    weights = torch.zeros(3, 4, 4, dtype=KIND)
    weights[0], weights[1], weights[2] = torch.eye(4), torch.eye(4), torch.eye(4).roll(1, 0)
    found = head_similarity(map_of(weights.log(), (2, 2)))[0]
    torch.testing.assert_close(
        found, torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=KIND), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("lazy", [False, True])
def test_similarities_equal_loops_over_pairs_of_heads(lazy):
    weights = torch.rand(3, 12, 12, dtype=KIND).softmax(-1)
    found = map_of(weights.log(), (3, 4), lazy=lazy)
    js, cka = head_similarity(found)[0], head_similarity(found, "cka")[0]
    centred = torch.eye(12, dtype=KIND) - 1 / 12
    for g in range(3):
        for h in range(3):
            total = 0.0
            for p, q in zip(weights[g].tolist(), weights[h].tolist(), strict=True):
                mixed = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
                total += sum(a * math.log(a / m) for a, m in zip(p, mixed, strict=True)) / 2
                total += sum(b * math.log(b / m) for b, m in zip(q, mixed, strict=True)) / 2
            assert abs(float(js[g, h]) - (1 - total / 12 / math.log(2))) < 1e-12
            k, m = (centred @ (weights[i] @ weights[i].T) @ centred for i in (g, h))
            expected = (k * m).sum() / ((k * k).sum() * (m * m).sum()).sqrt()
            torch.testing.assert_close(cka[g, h], expected, rtol=0, atol=1e-12)


def test_effective_rank_counts_directions():
    eye, flat, halves = torch.eye(4), torch.full((4, 4), 0.25), torch.block_diag(*[torch.full((2, 2), 0.5)] * 2)
    found = effective_rank(map_of(torch.stack([eye, flat, halves]).to(KIND).log(), (2, 2)))[0]
    torch.testing.assert_close(found, torch.tensor([4.0, 1.0, 2.0], dtype=KIND), rtol=0, atol=1e-9)


@pytest.mark.parametrize("k_grid", [(2, 3), (8, 9)])
def test_effective_rank_is_that_of_the_singular_values(k_grid):
    weights = torch.rand(2, 20, math.prod(k_grid), dtype=KIND).softmax(-1)
    found = effective_rank(map_of(weights.log(), (4, 5), k_grid))[0]
    for head in range(2):
        values = torch.linalg.svd(weights[head])[1]
        shares = values / values.sum()
        torch.testing.assert_close(found[head], torch.exp(-(shares * shares.log()).sum()), rtol=0, atol=1e-6)


def test_chunks_of_rows_change_no_number(monkeypatch):
    mixer = create_mixer("neighborhood", dim=8, heads=2, kernel_size=3).to(KIND)
    with capture(mixer, lazy=True) as maps:
        mixer(torch.randn(2, 5, 6, 8, dtype=KIND))
    measures = (entropy, distance, head_similarity, lambda m: head_similarity(m, "cka"), effective_rank)
    whole = [measure(maps[0]) for measure in measures]
    monkeypatch.setattr(sys.modules["regard.lens.captured"], "CHUNK", 2 * 2 * 30 * 7)
    assert [part for part, *_ in maps[0].stream()][1] == slice(7, 14)
    for measure, expected in zip(measures, whole, strict=True):
        torch.testing.assert_close(measure(maps[0]), expected, rtol=0, atol=1e-10)


def test_errors_tell_what_is_allowed():
    found = map_of(torch.zeros(1, 4, 4, dtype=KIND), (2, 2))
    with pytest.raises(ValueError, match=r"kind must be one of.*got 'cosine'"):
        head_similarity(found, "cosine")
    with pytest.raises(ValueError, match=r"the products of '' take 0.0 MiB, more than limit"):
        head_similarity(found, "cka", limit=8 * 16 - 1)
    with pytest.raises(ValueError, match=r"the maps of '' take"):
        effective_rank(found, limit=8 * 16 - 1)


def test_patterns_bound_what_the_numbers_can_be():
    layer = create_mixer("neighborhood", dim=8, heads=2, kernel_size=3)
    with capture(layer) as maps:
        layer(torch.randn(1, 6, 6, 8))
    assert maps[0].pattern == P.Neighborhood(3)
    assert float(entropy(maps[0]).max()) <= math.log(9) + 1e-6
    assert float(distance(maps[0]).max()) <= 2 * math.sqrt(2)


def test_chosen_rows_are_all_that_is_measured():
    """Five of twelve queries: as if the map had these rows alone."""
    torch.manual_seed(0)
    weights, rows = (4 * torch.rand(3, 12, 12, dtype=KIND)).softmax(-1), [1, 4, 5, 9, 11]
    found = map_of(weights.log(), (3, 4), rows=rows)
    chosen = weights[:, rows]
    torch.testing.assert_close(entropy(found)[0], -(chosen * chosen.log()).sum(-1), rtol=0, atol=1e-12)
    places = torch.tensor([(y, x) for y in range(3) for x in range(4)], dtype=KIND)
    away = (places[rows][:, None] - places).norm(dim=-1)
    torch.testing.assert_close(distance(found)[0], (chosen * away).sum(-1), rtol=0, atol=1e-12)
    js, cka = head_similarity(found)[0], head_similarity(found, "cka")[0]
    centred = torch.eye(5, dtype=KIND) - 1 / 5
    for g in range(3):
        for h in range(3):
            p, q = chosen[g], chosen[h]
            mixed = (p + q) / 2
            divergence = ((p * (p / mixed).log() + q * (q / mixed).log()).sum(-1) / 2).mean()
            torch.testing.assert_close(js[g, h], 1 - divergence / math.log(2), rtol=0, atol=1e-12)
            k, m = (centred @ (t @ t.T) @ centred for t in (p, q))
            torch.testing.assert_close(cka[g, h], (k * m).sum() / ((k * k).sum() * (m * m).sum()).sqrt(), rtol=0, atol=1e-12)
    values = torch.linalg.svdvals(chosen)
    shares = values / values.sum(-1, keepdim=True)
    torch.testing.assert_close(effective_rank(found)[0], torch.exp(-(shares * shares.log()).sum(-1)), rtol=0, atol=1e-9)


def test_heads_that_differ_in_what_their_sinks_take_are_not_alike():
    """Both look at each key alike; what is left for the sink is another share of the first head than of the second."""
    bias = torch.zeros(2, 4, 4, dtype=KIND)
    sink = torch.tensor([0.0, math.log(12.0)], dtype=KIND)
    found = head_similarity(map_of(bias, (2, 2), sink=sink))[0, 0, 1]
    p, q = [1 / 5] * 5, [1 / 16] * 4 + [3 / 4]
    mixed = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    divergence = sum(a * math.log(a / m) + b * math.log(b / m) for a, b, m in zip(p, q, mixed, strict=True)) / 2
    assert float(found) == pytest.approx(1 - divergence / math.log(2), abs=1e-12)


def test_rounding_is_no_direction():
    """Forty queries, nine keys, all rows mixtures of two: two directions however small the others' rounding."""
    torch.manual_seed(0)
    two = torch.rand(1, 2, 9, dtype=KIND).softmax(-1)
    mixture = torch.rand(1, 40, 2, dtype=KIND).softmax(-1)
    found = effective_rank(map_of((mixture @ two).log(), (5, 8), (3, 3)))
    values = torch.linalg.svdvals(mixture @ two)[..., :2]
    shares = values / values.sum(-1, keepdim=True)
    torch.testing.assert_close(found[0], torch.exp(-(shares * shares.log()).sum(-1)), rtol=0, atol=1e-9)


def test_the_products_of_all_pairs_of_heads_count_towards_the_limit():
    found = map_of(torch.zeros(3, 4, 4, dtype=KIND), (2, 2))
    assert head_similarity(found, "cka", limit=8 * 9 * 16).shape == (1, 3, 3)
    with pytest.raises(ValueError, match="the products of '' take"):
        head_similarity(found, "cka", limit=8 * 9 * 16 - 1)


def test_queries_that_pad_the_grid_lie_beyond_it_and_other_grids_in_one_frame():
    mixer = create_mixer("bi_level_routing", dim=8, heads=2, regions=2, topk=4, pad="token").to(KIND)
    with capture(mixer) as maps:
        mixer(torch.randn(1, 3, 5, 8, dtype=KIND))
    assert maps[0].grid == (4, 6)
    cells = maps[0].weights[0][0, ..., :3, :5].flatten(2)
    queries = torch.tensor([(y, x) for y in range(4) for x in range(6)], dtype=KIND)
    away = (queries[:, None] - torch.tensor([(y, x) for y in range(3) for x in range(5)], dtype=KIND)).norm(dim=-1)
    torch.testing.assert_close(distance(maps[0])[0], (cells * away).sum(-1) / cells.sum(-1), rtol=0, atol=1e-12)
    mixer = create_mixer("strip", dim=8, heads=2, ratio=1).to(KIND)
    with capture(mixer) as maps:  # seven queries on an axis, four keys of another grid
        mixer(torch.randn(1, 7, 7, 8, dtype=KIND), context=torch.randn(1, 4, 4, 8, dtype=KIND))
    queries = torch.tensor([(y + 0.5, x + 0.5) for y in range(7) for x in range(7)], dtype=KIND)
    spread = maps[0].places[0].spread(maps[0].weights[0])[0].flatten(2)  # each key on the queries' cells it covers
    inside = (queries[:, None] - queries).norm(dim=-1)
    torch.testing.assert_close(distance(maps[0])[0], (spread * inside).sum(-1), rtol=0, atol=1e-12)
