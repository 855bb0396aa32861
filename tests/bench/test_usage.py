"""FLOPs counted on tensors without values are those of a run, whatever backend multiplies in the open."""

import pytest
import torch

from regard import Source, attend, create_mixer, list_mixers
from regard import patterns as P
from regard.bench import count
from regard.bench.usage import flops
from regard.ops.calls.observe import OBSERVERS


@pytest.mark.parametrize("name", list_mixers())
def test_meta_tensors_count_like_those_with_values(name):
    options = {"grid": (14, 14)} if name == "sparsifiner" else {}
    mixer, x = create_mixer(name, dim=32, heads=2, **options).eval(), torch.randn(2, 14, 14, 32)
    found = flops(mixer, x)
    assert flops(mixer.to("meta"), x.to("meta")) == found
    assert not OBSERVERS


@pytest.mark.parametrize("backend", ["reference", "dense", "tiled"])
def test_attention_counts_once_on_every_backend(backend):
    n, dim, heads = 36, 16, 2
    mixer = create_mixer("multi_head", dim=dim, heads=heads, backend=backend)
    pairs = 4 * n * n * dim  # of all heads: logits and values
    for device in ("cpu", "meta"):
        found = flops(mixer.to(device), torch.empty(3, 6, 6, dim, device=device))
        assert found == {"flops": 2 * n * dim * 4 * dim + pairs, "attention_flops": pairs}


@pytest.mark.parametrize(("grid", "block"), [((8, 6), (4, 3)), ((7, 5), (3, 2)), ((5,), (2,))])
def test_tables_without_content_count_as_if_they_listed_all_blocks_alike(grid, block):
    """The mean over tables that list every block once for each query block's turn."""
    pattern_blocks = 1
    for n, b in zip(grid, block, strict=True):
        pattern_blocks *= -(-n // b)
    tokens = torch.Size(grid).numel()
    total = 0
    for turn in range(pattern_blocks):
        table = (torch.arange(2) + turn) % pattern_blocks
        pattern = P.Blocks(table.expand(1, pattern_blocks, 2), block)
        total += int(pattern.mask(grid).sum())
        assert int(pattern.degree(grid).sum()) == int(pattern.mask(grid).sum())
    even = P.Blocks(torch.empty(1, pattern_blocks, 2, dtype=torch.long, device="meta"), block)
    q = torch.empty(2, *grid, 3, 4, device="meta")
    with count() as cost:
        attend(q, [Source(q, q, even)])
    assert cost.pairs == 2 * 3 * (total // pattern_blocks)
    assert even.even_pairs(grid, grid) == tokens * 2 * tokens // pattern_blocks
