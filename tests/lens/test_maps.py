"""Maps in image coordinates: every key's weight lies on the pixels it stands for, and none is lost or counted twice."""

import pytest
import torch
from torch import nn

import regard
from regard import Source, attend, create_mixer
from regard import patterns as P
from regard.lens import capture, image_map
from regard.ops.footprint import Footprint

PATTERNS = [
    P.Dense(), P.Causal(), P.Window(3, shift=1), P.Window(4), P.Neighborhood(3, dilation=2),
    P.Neighborhood((3, 2), causal=(True, False)),
    P.Halo(2, 1, border="mask"), P.Grid(2), P.Axis(0) | P.Axis(1), P.Window(3) & P.Neighborhood(3),
    P.PerHead({P.Window(2): 1, P.Dense(): 1}), P.Blocks(torch.tensor([[[0, 1], [2, -1], [3, 3], [1, 2]]]), (3, 3)),
    P.Clusters(torch.arange(30)[None] % 4),
]  # fmt: skip
BACKENDS = ["reference", "dense", "tiled"]


class Attends(nn.Module):
    """A layer that attends to sources made of what it is called with."""

    def __init__(self, make, backend="auto", **options):
        super().__init__()
        self.make, self.backend, self.options = make, backend, options

    def forward(self, q):
        return attend(q, self.make(q), backend=self.backend, **self.options)


def exact(q, keys, mask=None):
    """Softmax of one list of keys ``(batch, keys, heads, dim)``."""
    logits = torch.einsum("bqhd,bkhd->bhqk", q.flatten(1, -3), keys) * q.shape[-1] ** -0.5
    return torch.softmax(logits if mask is None else logits.masked_fill(~mask, -torch.inf), -1).nan_to_num(0.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_pixels_have_an_equal_part_of_the_reference_weight_of_their_cell(pattern, backend):
    q = torch.randn(2, 5, 6, 2, 8)
    layer = Attends(lambda q: [Source(q, q, pattern)], backend)
    try:
        with capture(layer) as maps:
            layer(q)
    except ValueError as error:
        pytest.skip(f"the backend does not take it: {error}")
    mask = pattern.mask((5, 6))
    expected = exact(q, q.flatten(1, 2), mask).unflatten(-1, (5, 6))
    found = image_map(maps[0], None, image_size=(10, 18))
    for y in range(10):
        for x in range(18):
            torch.testing.assert_close(found.map[..., y, x], expected[..., y // 2, x // 3] / 6, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.shares.sum(-1), torch.ones(2, 2, 30))
    torch.testing.assert_close(image_map(maps[0], image_size=(10, 18)).map, found.map.mean(1), rtol=0, atol=1e-7)
    torch.testing.assert_close(image_map(maps[0], "max", image_size=(10, 18)).map, found.map.amax(1), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("ratio", "kind"), [(2, "windows"), (4, "windows"), (3, "adaptive")])
def test_pooled_keys_lie_on_the_cells_they_were_made_of(ratio, kind):
    q = torch.randn(1, 7, 6, 2, 4, dtype=torch.float64)
    pooled = torch.randn(1, *((-(-7 // ratio), -(-6 // ratio)) if kind == "windows" else (3, 3)), 2, 4, dtype=torch.float64)
    footprint = Footprint((7, 6), kind, ratio if kind == "windows" else None)
    sources = lambda q: [Source(q, q, P.Neighborhood(3)), Source(pooled, pooled, footprint=footprint)]  # noqa: E731  # a layer wants one
    layer = Attends(sources)
    with capture(layer) as maps:
        layer(q)
    mask = torch.cat([P.Neighborhood(3).mask((7, 6)), torch.ones(42, pooled.shape[1:3].numel(), dtype=torch.bool)], 1)
    weights = exact(q, torch.cat([q.flatten(1, 2), pooled.flatten(1, 2)], 1), mask)
    near, far = weights[..., :42].unflatten(-1, (7, 6)), weights[..., 42:].unflatten(-1, pooled.shape[1:3])

    def made_of(i, length, count):
        if kind == "windows":
            return range(i * ratio, min((i + 1) * ratio, length))
        return range(i * length // count, -(-(i + 1) * length // count))

    expected = near.clone()
    for i in range(pooled.shape[1]):
        for j in range(pooled.shape[2]):
            rows, columns = made_of(i, 7, pooled.shape[1]), made_of(j, 6, pooled.shape[2])
            for y in rows:
                for x in columns:
                    expected[..., y, x] += far[..., i, j] / (len(rows) * len(columns))
    found = image_map(maps[0], None, image_size=(14, 12))
    torch.testing.assert_close(found.map[..., ::2, ::2] * 4, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.shares[..., 0], near.sum((-2, -1)), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.shares[..., 1], far.sum((-2, -1)), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.shares[..., 2], torch.zeros(1, 2, 42, dtype=torch.float64), rtol=0, atol=1e-12)


def test_shares_tell_what_extra_tokens_and_the_sink_got():
    q, extra = torch.randn(2, 4, 4, 2, 8), torch.randn(2, 3, 2, 8)
    layer = Attends(lambda q: [Source(q, q, P.Window(2)), Source(extra, extra)], sink=torch.tensor([0.5, -1.0]))
    with capture(layer) as maps:
        layer(q)
    found = image_map(maps[0], None, image_size=(8, 8))
    logits = torch.einsum("bqhd,bkhd->bhqk", q.flatten(1, 2), torch.cat([q.flatten(1, 2), extra], 1)) * 8**-0.5
    mask = torch.cat([P.Window(2).mask((4, 4)), torch.ones(16, 3, dtype=torch.bool)], 1)
    sink = torch.tensor([0.5, -1.0]).reshape(1, 2, 1, 1).expand(2, 2, 16, 1)
    weights = torch.softmax(torch.cat([logits.masked_fill(~mask, -torch.inf), sink], -1), -1)
    expected = torch.stack([weights[..., :16].sum(-1), weights[..., 16:19].sum(-1), weights[..., 19]], -1)
    torch.testing.assert_close(found.shares, expected, rtol=0, atol=1e-6)
    assert found.names == ("4x4 Window(2)", "3 tokens without a place", "nowhere")


@pytest.mark.parametrize("size", [(64, 96), (50, 70)])
@pytest.mark.parametrize(
    "mixer",
    ["window", "neighborhood", "halo", "grid", "axial", "criss_cross", "bi_level_routing", "hilo", "aggregated", "multi_head",
     "locally_enhanced", "gated_positional"],
)  # fmt: skip
def test_mass_is_kept_at_every_stage_of_a_pyramid(mixer, size):
    model = regard.create_model("swin_tiny_patch4_window7_224", mixer=mixer, num_classes=3).eval()
    with torch.no_grad(), capture(model, kinds="attention", rows=[(0.5, 0.25), (0.99, 0.99)]) as maps:
        model(torch.randn(1, 3, *size))
    assert {found.reduction for found in maps} == {4, 8, 16, 32}
    for found in maps:
        shown = image_map(found)
        assert shown.map.shape == (1, 2, *size)
        torch.testing.assert_close(shown.shares.sum(-1), torch.ones(1, 2), rtol=0, atol=1e-5)
        torch.testing.assert_close(shown.map.sum((-2, -1)), shown.shares[..., :-1].sum(-1), rtol=0, atol=1e-5)
        if not found.lossy and mixer not in ("halo", "bi_level_routing"):
            torch.testing.assert_close(shown.shares[..., -1], torch.zeros(1, 2), rtol=0, atol=1e-5)


def test_a_partial_cell_at_the_border_has_its_mass_on_the_pixels_it_covers():
    model = regard.create_model("swin_tiny_patch4_window7_224", mixer="multi_head", num_classes=3).eval()
    with torch.no_grad(), capture(model, layers="stages.1.blocks.0.*") as maps:
        model(torch.randn(1, 3, 50, 70))
    (found,) = maps
    assert found.grid == (7, 9)  # of 8 pixels: the last row has 2 of them, the last column 6
    cells, pixels = found.weights[0].mean(1), image_map(found).map
    torch.testing.assert_close(pixels[..., 48:, 64:], (cells[..., 6:, 8:] / 12).expand(1, 63, 2, 6), rtol=0, atol=1e-7)
    torch.testing.assert_close(
        pixels[..., 7:9, 3], torch.stack([cells[..., 0, 0], cells[..., 1, 0]], -1) / 64, rtol=0, atol=1e-7
    )


def test_padded_queries_and_keys_of_a_mixer_are_no_cells():
    mixer = create_mixer("bi_level_routing", dim=16, heads=2, regions=4, topk=2, pad="token")

    class Model(nn.Module):
        feature_info = [{"num_chs": 16, "reduction": 4, "module": "mixer"}]
        in_chans = 16

        def __init__(self):
            super().__init__()
            self.mixer = mixer

        def forward(self, image):
            return self.mixer(image[:, :, ::4, ::4].movedim(1, -1))

    model = Model()
    with capture(model) as maps:
        model(torch.randn(1, 16, 24, 28))
    assert maps[0].grid == (8, 8)
    shown = image_map(maps[0])
    weights = maps[0].weights[0].mean(1)
    torch.testing.assert_close(shown.map[..., ::4, ::4] * 16, weights[..., :6, :7], rtol=0, atol=1e-6)
    torch.testing.assert_close(shown.shares[..., 1], 1.0 - weights[..., :6, :7].sum((-2, -1)), rtol=0, atol=1e-6)


def test_strided_queries_of_a_halo_see_cells_of_the_finer_grid():
    mixer = create_mixer("halo", dim=16, heads=2, block_size=4, halo_size=1, stride=2)
    x = torch.randn(1, 8, 8, 16)
    with capture(mixer) as maps:
        mixer(x)
    assert maps[0].grid == (4, 4)
    shown = image_map(maps[0], image_size=(8, 8)).map[0]
    visible = P.Halo(4, 1, "mask").mask((8, 8)).reshape(8, 8, 8, 8)[::2, ::2].flatten(0, 1)
    assert torch.equal(shown > 0, visible)


def test_tokens_that_reducers_left_are_put_back_on_their_places():
    model = regard.create_model("evit_deit_tiny", num_classes=3).eval()
    with torch.no_grad(), capture(model, lazy=True) as maps:
        logits = model(torch.randn(2, 3, 96, 64))
    assert logits.shape == (2, 3)
    late = [found for found in maps if found.row_places is None][-1]
    assert late.k_grids[0] == (11,)  # 24 cells, then 17 + 1, 13 + 1 and 10 + 1 tokens
    tokens = late.places[0].place
    weights = late.weights[0]
    cells = image_map(late, None).map[..., ::16, ::16] * 256
    for item in range(2):
        for place in range(24):
            token = int(tokens[item, place])
            shared = int((tokens[item] == token).sum())
            torch.testing.assert_close(
                cells[item, ..., place // 4, place % 4], weights[item, ..., token] / shared, rtol=0, atol=1e-6
            )


def test_class_attention_over_a_row_of_tokens_is_seen_on_their_grid():
    model = regard.create_model("volo_d1_224", num_classes=3).eval()
    with torch.no_grad(), capture(model, layers="class_blocks.*") as maps:
        model(torch.randn(1, 3, 64, 96))
    assert [found.k_grids for found in maps] == [((1,), (4, 6))] * 2
    shown = image_map(maps[0])
    assert shown.map.shape == (1, 1, 64, 96)
    torch.testing.assert_close(shown.map[0, 0, ::16, ::16] * 256, maps[0].weights[1].mean(1)[0, 0], rtol=0, atol=1e-6)


def test_errors_tell_what_is_missing():
    mixer = create_mixer("channel_group", dim=16, heads=2)
    with capture(mixer) as maps:
        mixer(torch.randn(1, 4, 4, 16))
    with pytest.raises(ValueError, match=r"without an image: give image_size="):
        image_map(maps[0])
    with pytest.raises(ValueError, match=r"no key of '' \(channel\) has a place"):
        image_map(maps[0], image_size=(8, 8))
    with pytest.raises(ValueError, match=r"heads must be one of.*got 'sum'"):
        image_map(maps[0], "sum")
