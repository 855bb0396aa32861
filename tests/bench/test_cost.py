"""Counted costs equal counting by hand."""

import pytest
import torch
from torch import nn

import regard
from regard import Source, attend, create_mixer
from regard import patterns as P
from regard.bench import count

PATTERNS = [
    P.Dense(),
    P.Causal(),
    P.Window(3, shift=1),
    P.Window(3, pad="zero"),
    P.Neighborhood(3, dilation=2),
    P.Neighborhood(3, border="zero"),
    P.Neighborhood((3, 2), causal=(True, False)),
    P.Halo(2, 1),
    P.Grid(2),
    P.Axis(0) | P.Axis(1),
    P.Window(3) | P.Neighborhood(5) | P.Axis(0),
    P.Window(3) & P.Neighborhood(3),
    P.PerHead({P.Window(2): 1, P.Axis(1): 1, P.Dense(): 2}),
    P.Blocks(torch.tensor([[[0, 1], [2, -1], [3, 3], [1, 2]]]), (3, 3)),
    P.Blocks(torch.randint(-1, 4, (2, 4, 4, 2), generator=torch.Generator().manual_seed(0)), (3, 3)),
    P.Tokens(torch.randint(-1, 30, (2, 4, 30, 5), generator=torch.Generator().manual_seed(0))),
    P.Clusters(torch.arange(60).reshape(2, 30) % 7 % 4),
]


def by_hand(pattern, q_grid, k_grid, batch, heads, valid=None):
    """Visible pairs, from the mask, one batch item and head at a time."""
    mask = pattern.mask(q_grid, k_grid)
    total = 0
    for item in range(batch):
        for head in range(heads):
            seen = mask if mask.ndim == 2 else mask[item % mask.shape[0], head % mask.shape[1]]
            total += int((seen if valid is None else seen & valid[item].flatten()).sum())
    return total


@pytest.mark.parametrize("with_valid", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_count_equals_brute_force(pattern, with_valid):
    q, k = torch.randn(2, 5, 6, 4, 8), torch.randn(2, 5, 6, 2, 8)
    v = torch.randn(2, 5, 6, 2, 3)
    valid = torch.rand(2, 5, 6) > 0.4 if with_valid else None
    with count() as cost:
        attend(q, k, v, pattern, valid=valid)
    pairs = by_hand(pattern, (5, 6), (5, 6), 2, 4, valid)
    assert (cost.calls, cost.pairs, cost.flops) == (1, pairs, 2 * pairs * (8 + 3))


def test_queries_placed_on_the_key_grid_count_where_they_stand():
    q, k = torch.randn(1, 2, 3, 1, 8), torch.randn(1, 5, 6, 1, 8)
    pattern = P.Neighborhood(3, causal=True)
    with count() as cost:
        attend(q, k, k, pattern, q_start=(3, 2))
    assert cost.pairs == int(pattern.mask((2, 3), (5, 6), q_start=(3, 2)).sum())
    assert cost.pairs != int(pattern.mask((2, 3), (5, 6)).sum())


def test_a_mask_too_large_to_hold_is_counted_in_pieces(monkeypatch):
    monkeypatch.setattr("regard.bench.cost.CHUNK", 50)
    q, valid = torch.randn(2, 5, 6, 4, 8), torch.rand(2, 5, 6) > 0.4
    pattern = P.Window(3) | P.Axis(0)
    with count() as cost:
        attend(q, q, q, pattern, valid=valid)
    assert cost.pairs == by_hand(pattern, (5, 6), (5, 6), 2, 4, valid)


def test_sources_and_their_heads_add_up():
    q = torch.randn(1, 4, 4, 4, 8)
    k, few = torch.randn(1, 4, 4, 4, 8), torch.randn(1, 5, 2, 8)
    with count() as cost:
        attend(q, [Source(k, k, P.Window(2)), Source(few, few, heads=(1, 3))])
    assert cost.pairs == 4 * 16 * 4 + 2 * 16 * 5


def test_bytes_are_those_of_everything_read_and_written_once():
    q = torch.randn(2, 4, 4, 4, 8, dtype=torch.bfloat16)
    k = torch.randn(2, 4, 4, 2, 8, dtype=torch.bfloat16)
    v = torch.randn(2, 4, 4, 2, 6, dtype=torch.bfloat16)
    bias = torch.randn(4, 16, 16)
    with count() as cost:
        attend(q, k, v, bias=bias)
    assert cost.bytes == 2 * (q.numel() + k.numel() + v.numel() + 2 * 16 * 4 * 6) + 4 * bias.numel()


def test_offset_tables_and_routing_tables_are_traffic():
    plain, biased = (create_mixer("window", dim=16, heads=2, window_size=3, relative_bias=b) for b in (False, True))
    x = torch.randn(1, 6, 6, 16)
    costs = []
    for mixer in (plain, biased):
        with count() as cost:
            mixer(x)
        costs.append(cost.bytes)
    assert costs[0] == 4 * 4 * x.numel()
    assert costs[1] - costs[0] == 4 * biased.bias.table.numel()
    table = torch.zeros(1, 4, 1, dtype=torch.long)
    q = torch.randn(1, 6, 6, 2, 8)
    with count() as cost:
        attend(q, q, q, P.Blocks(table, 3))
    assert cost.bytes == 4 * 4 * q.numel() + 8 * 4


def test_costs_are_kept_per_layer_and_add_up():
    model = nn.Sequential(create_mixer("window", dim=16, heads=2, window_size=3), create_mixer("criss_cross", dim=16, heads=1))
    x = torch.randn(1, 6, 9, 16)
    with count() as cost:
        model(x)
    window, cross = cost.layers["0"], cost.layers["1"]
    assert (window.calls, window.pairs, window.flops) == (1, 2 * 54 * 9, 2 * 2 * 54 * 9 * 16)
    assert (cross.calls, cross.pairs, cross.flops) == (2, 2 * 54 * 14, 2 * 2 * 54 * 14 * (2 + 16))
    assert cost.flops == window.flops + cross.flops
    assert cost.bytes == window.bytes + cross.bytes
    assert cross.patterns == ["Axis(0) | Axis(1)"]


def test_attention_outside_of_modules_is_counted_too():
    q = torch.randn(1, 4, 2, 8)
    with count() as cost:
        attend(q, q, q)
    assert set(cost.layers) == {"attend"}


@pytest.mark.parametrize("backend", ["reference", "dense", "tiled"])
def test_the_count_does_not_depend_on_the_backend(backend):
    q = torch.randn(1, 7, 7, 2, 8)
    with count() as cost:
        attend(q, q, q, P.Neighborhood(3), backend=backend)
    assert cost.pairs == 2 * 49 * 9


def test_the_table_shows_layers_patterns_and_the_total():
    with count() as cost:
        create_mixer("window", dim=16, heads=2, window_size=3)(torch.randn(1, 6, 6, 16))
    head, layer, total = repr(cost).splitlines()
    assert head.split() == ["layer", "calls", "pairs", "FLOPs", "bytes", "pattern"]
    assert layer.split() == ["(root)", "1", "648", "20.7", "k", *total.split()[5:7], "Window(3)"]
    assert total.split()[:2] == ["total", "1"]


def test_nothing_is_observed_afterwards():
    from regard.ops.calls.observe import OBSERVERS

    with pytest.raises(RuntimeError), count() as cost:
        raise RuntimeError
    attend(*[torch.randn(1, 4, 2, 8)] * 3)
    assert not cost.layers
    assert not OBSERVERS
    assert regard.bench.count is count
