"""Maps in image coordinates: every key's weight lies on the pixels it stands for, and none is lost or counted twice."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import regard
from regard import Source, attend, create_mixer
from regard import patterns as P
from regard.lens import capture, image_map
from regard.models.registry import model_card
from regard.ops.calls.footprint import Footprint
from regard.ops.calls.observe import OBSERVERS, within

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


def test_reductions_over_heads_are_of_whole_maps_and_whole_shares():
    """Two sources on the same cells: the maximum of their sum over heads is not the sum of their maxima."""
    q, pooled = torch.randn(1, 4, 6, 3, 4, dtype=torch.float64) * 3, torch.randn(1, 2, 3, 3, 4, dtype=torch.float64) * 3
    layer = Attends(lambda q: [Source(q, q), Source(pooled, pooled, footprint=Footprint((4, 6), "windows", 2))])
    with capture(layer) as maps:
        layer(q)
    apart = image_map(maps[0], None, image_size=(8, 12))
    for heads, reduced in (("max", torch.amax), ("min", torch.amin), ("mean", torch.mean)):
        found = image_map(maps[0], heads, image_size=(8, 12))
        torch.testing.assert_close(found.map, reduced(apart.map, 1), rtol=1e-12, atol=0)
        torch.testing.assert_close(found.shares, reduced(apart.shares, 1), rtol=0, atol=1e-14)


class Stage(nn.Module):
    """A mixer on every fourth pixel, as a model with one stage."""

    feature_info = [{"num_chs": 16, "reduction": 4, "module": "mixer"}]
    in_chans = 16

    def __init__(self, mixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, image):
        return self.mixer(image[:, :, ::4, ::4].movedim(1, -1))


def test_every_run_has_the_size_of_its_own_image_unless_another_is_given():
    model = Stage(create_mixer("multi_head", dim=16, heads=2))
    with capture(model) as maps:
        model(torch.randn(1, 16, 16, 24))
        model(torch.randn(1, 16, 20, 8))
    assert [found.image_size for found in maps] == [(16, 24), (20, 8)]
    assert [image_map(found).map.shape[-2:] for found in maps] == [(16, 24), (20, 8)]
    larger = image_map(maps[1], image_size=(40, 16)).map
    torch.testing.assert_close(larger[..., ::2, ::2] * 4, image_map(maps[1]).map, rtol=1e-6, atol=0)


def test_strips_lie_on_the_windows_they_were_made_of():
    mixer = create_mixer("strip", dim=16, heads=2, ratio=4).double()
    with torch.no_grad(), capture(mixer) as maps:
        mixer(torch.randn(1, 6, 9, 16, dtype=torch.float64))
    (weights,) = maps[0].weights
    assert weights.shape[3:] == (2, 3)
    found = image_map(maps[0], None, image_size=(6, 9)).map
    for y in range(6):
        for x in range(9):
            cells = (2 if y >= 4 else 4) * (1 if x >= 8 else 4)  # the last windows are partial
            torch.testing.assert_close(found[..., y, x], weights[..., y // 4, x // 4] / cells, rtol=1e-12, atol=0)


def test_tokens_of_a_grid_of_their_own_are_not_taken_for_a_padded_stage():
    """Seven by seven global tokens beside a stage of four by four cells: all of them lie on the image."""

    class Model(nn.Module):
        feature_info = [{"num_chs": 8, "reduction": 16, "module": "stage"}]

        def __init__(self):
            super().__init__()
            self.stage = nn.ModuleList(create_mixer("multi_head", dim=8, heads=2) for _ in range(2))

        def forward(self, image):
            own, look = self.stage
            tokens = own(image[:, 0, :49, :8].unflatten(1, (7, 7)))
            return look(image[:, :1, ::16, ::16].movedim(1, -1).expand(-1, -1, -1, 8), context=tokens)

    model = Model()
    with torch.no_grad(), capture(model) as maps:
        model(torch.randn(1, 3, 64, 64))
    assert [(found.grid, found.k_grids) for found in maps] == [((7, 7), ((7, 7),)), ((4, 4), ((7, 7),))]
    for found in maps:
        shown = image_map(found, image_size=(70, 70))
        cells = found.weights[0].mean(1)
        torch.testing.assert_close(shown.map[..., ::10, ::10] * 100, cells, rtol=1e-5, atol=0)
        torch.testing.assert_close(image_map(found).map.sum((-2, -1)), torch.ones(1, len(found.rows)), rtol=0, atol=1e-5)


def test_tokens_that_send_instead_of_gathering_lie_on_the_image():
    model = regard.create_model("dependency_vit_lite_tiny", depth=4, num_classes=3).eval()
    with torch.no_grad(), capture(model) as maps:
        model(torch.randn(1, 3, 64, 96))
    assert {found.kind for found in maps} == {"transposed"}
    assert (maps[0].grid, maps[0].k_grids) == ((4, 6), ((4, 6),))
    whole = image_map(maps[0])
    torch.testing.assert_close(whole.map[..., ::16, ::16] * 256, maps[0].weights[0].mean(1), rtol=1e-5, atol=0)
    left = maps[len(maps) - 1]  # some tokens are gone
    assert left.k_grids[0][0] < 24
    tokens = left.places[0].place[0]
    cells = image_map(left).map[0, :, ::16, ::16].flatten(1) * 256
    for place in range(24):
        weight = left.weights[0].mean(1)[0, :, tokens[place]] / (tokens == tokens[place]).sum() if tokens[place] >= 0 else 0.0
        torch.testing.assert_close(cells[:, place], torch.zeros(len(cells)) + weight, rtol=1e-5, atol=1e-9)
    mixer = create_mixer("reversed", dim=16, heads=2)
    with torch.no_grad(), capture(mixer) as maps:
        mixer(torch.randn(1, 3, 5, 16))
    assert (maps[0].grid, maps[0].k_grids) == ((3, 5), ((3, 5),))


@pytest.mark.parametrize("name", [name for name in regard.list_mixers() if name != "identity"])
def test_weights_times_values_are_what_every_mixer_gathers(name):
    """On the backend that runs it; and each row sums to one."""
    torch.manual_seed(0)
    options = {"grid": (9, 11)} if name == "sparsifiner" else {}
    mixer = create_mixer(name, dim=32, heads=2, **options).double().eval()
    told = []

    def observe(record):
        return lambda output: None if within() else told.append((record, output))

    with torch.no_grad(), capture(mixer, lazy=True) as maps:
        OBSERVERS.append(observe)
        try:
            mixer(torch.randn(2, 9, 11, 32, dtype=torch.float64))
        finally:
            OBSERVERS.remove(observe)
        attended = [found for found in maps if found.kind == "attention"]
        assert len(attended) == len(told) or name == "reversed"
        assert len(maps) > 0
        for found, (record, output) in zip(attended, told, strict=True):
            again = torch.zeros_like(output.flatten(1, -3))
            for weights, source in zip(found.weights, record.sources, strict=True):
                heads = list(range(output.shape[-2]) if source.heads is None else source.heads)
                values = source.v.flatten(1, -3).repeat_interleave(len(heads) // source.v.shape[-2], -2)
                again[:, :, heads] += torch.einsum("bhqk,bkhd->bqhd", weights.flatten(3)[:, heads], values)
            torch.testing.assert_close(again, output.flatten(1, -3), rtol=0, atol=1e-12)
            if not found.lossy:
                total = sum(weights.flatten(3).sum(-1) for weights in found.weights)
                torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)
            shown = image_map(found, image_size=(9, 11))
            on_image = [i for i, where in enumerate(found.places) if where is not None]
            torch.testing.assert_close(shown.map.sum((-2, -1)), shown.shares[..., on_image].sum(-1), rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(64, 64), (70, 90)])
def test_every_family_has_maps_that_keep_their_mass(size):
    """The first registered model of each family: rows sum to one, and all that keys on the grid got lies on the image."""
    families = {"regard.models.backbones.convshare_vit": "convshare_vit_same_shared_both"}  # the others take one size alone
    for name in regard.list_models():
        table = model_card(name).table
        families.setdefault(getattr(table, "func", table).__module__, name)
    for name in families.values():
        model = regard.create_model(name, num_classes=3).eval()
        with torch.no_grad(), capture(model, lazy=True) as maps:
            model(torch.randn(1, 3, *size))
        assert len(maps) > 0, name
        for found in maps:
            if found.kind in ("channel", "mixture"):
                continue
            _, weights, _ = next(found.stream(2))
            first = replace(found, rows=found.rows[:2])
            shown = image_map(first)
            on_image = [i for i, where in enumerate(found.places) if where is not None]
            drawn, shares = shown.map.sum((-2, -1)), shown.shares[..., on_image].sum(-1)
            torch.testing.assert_close(drawn, shares, rtol=1e-5, atol=1e-5)
            if found.kind == "attention" and not found.lossy:
                total = sum(w.flatten(3).sum(-1) for w in weights)
                torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)
