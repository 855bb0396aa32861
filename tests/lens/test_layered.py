"""Rollout, flow and relevance equal naive loops over explicit matrices, through layers and stages."""

import itertools

import pytest
import torch
from torch import nn

import regard
from regard import create_mixer
from regard.lens import capture, flow, gradient_times_attention, relevance, relevance_of, rollout
from regard.lens.flow import maximum_flows
from regard.studies.head_analytics import hop_profile
from regard.studies.tokencut import tokencut

KIND = torch.float64


class Transformer(nn.Module):
    """Attention with class tokens, in residual layers; every layer's matrices can be asked for."""

    def __init__(self, depth=3, grid=(3, 4), extra=2, mixer="multi_head", **options):
        super().__init__()
        self.grid = grid
        self.patch = nn.Conv2d(1, 8, 2, 2)
        self.extra = nn.Parameter(torch.randn(1, extra, 8))
        self.layers = nn.ModuleList(create_mixer(mixer, dim=8, heads=2, **options) for _ in range(depth))
        self.head = nn.Linear(8, 3)

    def forward(self, image):
        x, extra = self.patch(image).movedim(1, -1), self.extra.expand(len(image), -1, -1)
        for layer in self.layers:
            y, y_extra = layer(x, extra)
            x, extra = x + y, extra + y_extra
        return self.head(extra[:, 0])

    def matrices(self, image):
        """``(batch, heads, tokens, tokens)`` of each layer in its graph, extra tokens first, and the logits made with them."""
        x, extra = self.patch(image).movedim(1, -1), self.extra.expand(len(image), -1, -1)
        tokens, found = torch.cat([extra, x.flatten(1, 2)], 1), []
        for layer in self.layers:
            q, k, v = layer.project(tokens, tokens)
            logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * 4**-0.5
            count = self.extra.shape[1]
            if hasattr(layer, "pattern"):
                mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool)
                mask[count:, count:] = layer.pattern.mask(self.grid)
                logits = logits.masked_fill(~mask, -torch.inf)
            weights = logits.softmax(-1)
            found.append(weights)
            tokens = tokens + layer.proj(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))
        return found, self.head(tokens[:, 0])


@pytest.fixture(params=["multi_head", "window"])
def model(request):
    options = {"window_size": 2, "relative_bias": False} if request.param == "window" else {}
    return Transformer(mixer=request.param, **options).to(KIND)


@pytest.fixture
def image():
    return torch.randn(2, 1, 6, 8, dtype=KIND)


def naive_rollout(matrices, heads, share):
    """One token after another, one path step after another."""
    batch, _, n, _ = matrices[0].shape
    rolled = torch.eye(n, dtype=KIND).expand(batch, -1, -1).clone()
    for matrix in matrices:
        fused = {"mean": matrix.mean(1), "max": matrix.amax(1), "min": matrix.amin(1)}[heads]
        new = torch.zeros_like(rolled)
        for b, i in itertools.product(range(batch), range(n)):
            row = (1 - share) * torch.eye(n, dtype=KIND)[i] + share * fused[b, i]
            row = row / row.sum()
            for j in range(n):
                new[b, i] += row[j] * rolled[b, j]
        rolled = new
    return rolled


@pytest.mark.parametrize("heads", ["mean", "max", "min"])
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_rollout_is_the_product_of_the_layers_with_their_residual(model, image, heads, share):
    with torch.no_grad(), capture(model, lazy=True) as maps:
        model(image)
    expected = naive_rollout([m.detach() for m in model.matrices(image)[0]], heads, share)
    for start, row in ((None, 0), ("class", 0), ((1, 2), 2 + 1 * 4 + 2), ((0.4, 0.6), 2 + 1 * 4 + 2)):
        found = rollout(maps, start, heads=heads, attention_share=share)
        torch.testing.assert_close(found.cells.flatten(2)[:, 0], expected[:, row, 2:], rtol=0, atol=1e-12)
        torch.testing.assert_close(found.outside[:, 0], expected[:, row, :2], rtol=0, atol=1e-12)
    found = rollout(maps, "mean", heads=heads, attention_share=share)
    torch.testing.assert_close(found.cells.flatten(2)[:, 0], expected[:, 2:].mean(1)[:, 2:], rtol=0, atol=1e-12)


def test_relevance_is_what_gradients_and_attention_agree_on(model, image):
    matrices, logits = model.matrices(image)
    gradients = torch.autograd.grad(logits[:, 1].sum(), matrices)
    n = matrices[0].shape[-1]
    expected = torch.eye(n, dtype=KIND).expand(2, -1, -1).clone()
    for matrix, gradient in zip(matrices, gradients, strict=True):
        new, products = expected.clone(), (matrix * gradient).detach()
        for b, i, j in itertools.product(range(2), range(n), range(n)):
            agreed = sum(max(0.0, float(products[b, h, i, j])) for h in range(2)) / 2
            new[b, i] += agreed * expected[b, j]
        expected = new
    found = relevance(model, image, 1)
    torch.testing.assert_close(found.cells.flatten(2)[:, 0], expected[:, 0, 2:], rtol=0, atol=1e-12)
    torch.testing.assert_close(found.outside[:, 0], expected[:, 0, :2], rtol=0, atol=1e-12)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not image.requires_grad
    torch.testing.assert_close(relevance(model, image, torch.tensor([1, 1])).cells, found.cells)
    torch.testing.assert_close(relevance(model, image, lambda output: output[:, 1]).cells, found.cells)


def test_gradient_times_attention_is_that_of_the_explicit_graph(model, image):
    matrices, logits = model.matrices(image)
    gradients = torch.autograd.grad(logits.amax(-1).sum(), matrices)
    with capture(model, gradients=True) as maps:
        model(image.requires_grad_()).amax(-1).sum().backward()
    for layer, (matrix, gradient) in enumerate(zip(matrices, gradients, strict=True)):
        grid, outer = (found for found in maps if found.name == f"layers.{layer}")
        products = (matrix * gradient).detach()
        for found, rows in ((grid, slice(2, None)), (outer, slice(0, 2))):
            torch.testing.assert_close(found.gradients[0].flatten(3), gradient[:, :, rows, 2:], rtol=0, atol=1e-12)
            cells, others = gradient_times_attention(found)
            torch.testing.assert_close(cells.flatten(2), products.mean(1)[:, rows, 2:], rtol=0, atol=1e-12)
            torch.testing.assert_close(others, products.mean(1)[:, rows, :2], rtol=0, atol=1e-12)
            cells, _ = gradient_times_attention(found, positive=True)
            torch.testing.assert_close(cells.flatten(2), products.clamp(min=0).mean(1)[:, rows, 2:], rtol=0, atol=1e-12)


def naive_flow(layers, target):
    """Augmenting paths, shortest first, in float64."""
    sizes = [layers[0].shape[0], *(layer.shape[1] for layer in layers)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    capacity = torch.zeros(sum(sizes), sum(sizes), dtype=KIND)
    for level, layer in enumerate(layers):
        rows = slice(starts[level], starts[level] + sizes[level])
        capacity[rows, starts[level + 1] : starts[level + 1] + sizes[level + 1]] = layer
    sink, total = starts[-1] + target, 0.0
    while True:
        came_from, queue = {0: None}, [0]
        for node in queue:
            for after in (capacity[node] > 1e-13).nonzero().flatten().tolist():
                if after not in came_from:
                    came_from[after] = node
                    queue.append(after)
        if sink not in came_from:
            return total
        path, node = [], sink
        while came_from[node] is not None:
            path.append((came_from[node], node))
            node = came_from[node]
        amount = min(float(capacity[edge]) for edge in path)
        for a, b in path:
            capacity[a, b] -= amount
            capacity[b, a] += amount
        total += amount


def test_flow_is_the_largest_on_the_layered_graph(model, image):
    with torch.no_grad(), capture(model, lazy=True) as maps:
        model(image)
    matrices = [m.detach()[1].mean(0) for m in model.matrices(image)[0]]
    n = len(matrices[0])
    layers = [(torch.eye(n, dtype=KIND) + matrix) / 2 for matrix in reversed(matrices)]
    expected = torch.tensor([naive_flow([torch.eye(n, dtype=KIND)[:1], *layers], target) for target in range(n)], dtype=KIND)
    found = flow(maps, "class", item=1)
    torch.testing.assert_close(found.cells.flatten(), expected[2:], rtol=0, atol=1e-7)
    torch.testing.assert_close(found.outside.flatten(), expected[:2], rtol=0, atol=1e-7)
    some = flow(maps, "class", item=1, targets=[3, 7]).cells.flatten()
    torch.testing.assert_close(some, expected[2:] * torch.tensor([i in (3, 7) for i in range(12)]), rtol=0, atol=1e-7)


def test_flow_through_a_narrow_layer_is_its_capacity():
    wide, narrow = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.1, 0.0], [0.2, 0.9]])
    torch.testing.assert_close(maximum_flows([wide, narrow], [0, 1]), torch.tensor([0.3, 0.5], dtype=KIND), rtol=0, atol=1e-8)


class Pyramid(nn.Module):
    """Two stages: the cells of the second are windows of those of the first, the last of them partial."""

    in_chans = 1

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 2, 2)
        self.first = create_mixer("window", dim=8, heads=2, window_size=3)
        self.down = nn.AvgPool2d(2, ceil_mode=True)
        self.second = create_mixer("multi_head", dim=8, heads=2)

    def forward(self, image):
        x = self.stem(image).movedim(1, -1)
        x = x + self.first(x)
        x = self.down(x.movedim(-1, 1)).movedim(1, -1)
        return (x + self.second(x)).mean((1, 2))


def test_rollout_goes_through_the_windows_of_a_pyramid():
    model = Pyramid().to(KIND)
    image = torch.randn(1, 1, 10, 12, dtype=KIND)  # 5 x 6 cells, then 3 x 3 windows of them, the last with one row
    with torch.no_grad(), capture(model, lazy=True) as maps:
        model(image)
    fine, coarse = (found.weights[0].mean(1)[0].flatten(1) for found in maps)
    down = torch.zeros(9, 30, dtype=KIND)
    for i, j in itertools.product(range(3), range(3)):
        cells = [(y, x) for y in range(2 * i, min(2 * i + 2, 5)) for x in range(2 * j, 2 * j + 2)]
        for y, x in cells:
            down[i * 3 + j, y * 6 + x] = 1 / len(cells)
    eye = torch.eye(30, dtype=KIND)
    expected = (torch.eye(9, dtype=KIND) + coarse) / 2 @ down @ (eye + fine) / 2
    torch.testing.assert_close(rollout(maps, (2, 1)).cells.flatten(), expected[7], rtol=0, atol=1e-12)
    torch.testing.assert_close(rollout(maps).cells.flatten(), expected.mean(0), rtol=0, atol=1e-12)
    shown = rollout(maps).on_image()
    torch.testing.assert_close(shown[0, 0, ::2, ::2].flatten() * 4, expected.mean(0), rtol=0, atol=1e-12)
    layers = [torch.eye(9, dtype=KIND)[7:8], (torch.eye(9, dtype=KIND) + coarse) / 2, down, (eye + fine) / 2]
    flows = flow(maps, (2, 1), targets=[0, 13, 29]).cells.flatten()
    for target in (0, 13, 29):
        assert abs(float(flows[target]) - naive_flow(layers, target)) < 1e-7


def test_rollout_of_a_pyramid_lies_on_the_pixels_of_its_finest_cells():
    class Model(Pyramid):
        feature_info = [{"reduction": 2, "module": "first"}, {"reduction": 4, "module": "second"}]

    model = Model().to(KIND)
    with torch.no_grad(), capture(model, lazy=True) as maps:
        model(torch.randn(1, 1, 9, 12, dtype=KIND))  # 4 x 6 cells: the last row of pixels belongs to none
    found = rollout(maps)
    assert (found.grid, found.reduction) == ((4, 6), 2)
    shown = found.on_image()
    torch.testing.assert_close(shown[..., :8:2, ::2] * 4, found.cells, rtol=1e-12, atol=0)
    assert float(shown[..., 8, :].abs().max()) == 0.0


def test_rollout_of_tokens_that_read_a_grid_starts_with_the_first_of_them():
    """Three tokens of no place look at cells, and not at each other."""
    mixer = create_mixer("multi_head", dim=8, heads=2).to(KIND)
    with torch.no_grad(), capture(mixer, lazy=True) as maps:
        mixer(torch.randn(1, 3, 8, dtype=KIND), context=torch.randn(1, 2, 5, 8, dtype=KIND))
    found, weights = rollout(maps), maps[0].weights[0].mean(1)
    torch.testing.assert_close(found.cells[0, 0], weights[0, 0] / 2, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.outside, torch.tensor([[[0.5, 0.0, 0.0]]], dtype=KIND), rtol=1e-12, atol=1e-12)
    of_a_cell = rollout(maps, (1, 3)).cells
    assert float(of_a_cell[0, 0, 1, 3]) == pytest.approx(1.0, abs=1e-12)  # no layer has moved it
    assert float(of_a_cell.sum()) == pytest.approx(1.0, abs=1e-12)


def test_rollout_starts_from_all_cells_where_other_tokens_only_are_seen():
    class Model(nn.Module):
        def forward(self, q, extra):
            return regard.attend(q, [regard.Source(q, q), regard.Source(extra, extra)])

    model = Model()
    with torch.no_grad(), capture(model, lazy=True) as maps:
        model(torch.randn(1, 2, 3, 2, 4, dtype=KIND), torch.randn(1, 2, 2, 4, dtype=KIND))
    cells, extra = (w.mean(1)[0].flatten(1) for w in maps[0].weights)
    found = rollout(maps)
    torch.testing.assert_close(found.cells.flatten(), (torch.eye(6, dtype=KIND) + cells).mean(0) / 2, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.outside.flatten(), extra.mean(0) / 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("mixer", "options"),
    [
        ("hilo", {"window_size": 2}),
        ("aggregated", {"ratio": 2}),
        ("axial", {}),
        ("criss_cross", {"recurrence": 2}),
        ("halo", {}),
    ],
)
def test_parts_of_one_layer_are_put_together_as_the_layer_does(mixer, options):
    layer = create_mixer(mixer, dim=16, heads=2, **options).to(KIND)
    x = torch.randn(1, 4, 6, 16, dtype=KIND)
    with torch.no_grad(), capture(layer, lazy=True, kinds="attention") as maps:
        layer(x)

    def on_cells(found):
        return sum(where.spread(w) for w, where in zip(found.weights, found.places, strict=True)).mean(1)[0].flatten(1)

    eye = torch.eye(24, dtype=KIND)
    matrices = [on_cells(found) for found in maps]
    if mixer in ("hilo", "axial"):  # side by side: half of the heads, or a sum of two softmaxes
        assert len(matrices) == 2
        matrices = [(matrices[0] + matrices[1]) / 2]
    expected = eye
    for matrix in matrices:
        mixed = eye + matrix
        expected = mixed / mixed.sum(-1, keepdim=True) @ expected
    for place in ((0, 0), (2, 5)):
        found = rollout(maps, place).cells.flatten()
        torch.testing.assert_close(found, expected[place[0] * 6 + place[1]], rtol=0, atol=1e-12)
        torch.testing.assert_close(found.sum(), torch.ones((), dtype=KIND))


def test_attentions_side_by_side_count_by_their_heads():
    """Two heads in windows, one over pooled tokens."""
    layer = create_mixer("hilo", dim=24, heads=3, window_size=2, alpha=0.34).to(KIND)
    with torch.no_grad(), capture(layer, lazy=True) as maps:
        layer(torch.randn(1, 4, 6, 24, dtype=KIND))
    assert [found.heads for found in maps] == [2, 1]
    each = [found.places[0].spread(found.weights[0])[0].flatten(2) for found in maps]
    expected = (torch.eye(24, dtype=KIND) + torch.cat(each).mean(0)) / 2
    torch.testing.assert_close(rollout(maps, (1, 2)).cells.flatten(), expected[8], rtol=0, atol=1e-12)


def test_strided_attention_leads_to_the_finer_grid():
    layer = create_mixer("halo", dim=16, heads=2, block_size=4, halo_size=1, stride=2).to(KIND)
    with torch.no_grad(), capture(layer, lazy=True) as maps:
        layer(torch.randn(1, 8, 8, 16, dtype=KIND))
    weights = maps[0].places[0].spread(maps[0].weights[0]).mean(1)[0].flatten(1)
    stays = torch.zeros(16, 64, dtype=KIND)
    for i, j, y, x in itertools.product(range(4), range(4), range(2), range(2)):
        stays[i * 4 + j, (2 * i + y) * 8 + 2 * j + x] = 0.25
    expected = stays + weights
    expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(rollout(maps, (1, 2)).cells.flatten(), expected[6], rtol=0, atol=1e-12)


def test_rollout_follows_the_tokens_that_reducers_left():
    model = regard.create_model("evit_deit_tiny", num_classes=3).eval().to(KIND)
    with torch.no_grad(), capture(model, lazy=True) as maps:
        model(torch.randn(1, 3, 64, 80, dtype=KIND))
    cells = 20
    blocks = [maps[i : i + 2] for i in range(0, len(maps), 2)]
    rolled = torch.eye(cells + 1, dtype=KIND)
    known = torch.arange(cells)
    for grid, outer in blocks:
        place = grid.places[0].place[0] if hasattr(grid.places[0], "place") else torch.arange(cells)
        n = grid.rows[-1] + 1
        if not torch.equal(place, known):  # tokens now are even mixtures of those before that stand for the same places
            old = int(known.max()) + 1
            moved = torch.zeros(n + 1, old + 1, dtype=KIND)
            moved[0, 0] = 1.0
            for at in range(cells):
                if place[at] >= 0:
                    moved[1 + place[at], 1 + known[at]] += 1 / float((place == place[at]).sum())
            rolled, known = moved @ rolled, place
        matrix = torch.cat([torch.cat([m.weights[1], m.weights[0].flatten(3)], -1) for m in (outer, grid)], 2).mean(1)[0]
        rolled = (torch.eye(n + 1, dtype=KIND) + matrix) / 2 @ rolled
    expected = rolled[0]
    found = rollout(maps)
    torch.testing.assert_close(found.cells.flatten(), expected[1:], rtol=0, atol=1e-10)
    torch.testing.assert_close(found.outside.flatten(), expected[:1], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "volo_d1_224", "transnext_micro", "halonet_h1", "litv2_small"]
)
def test_families_have_rollout_and_relevance(name):
    model = regard.create_model(name, num_classes=3).eval()
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad(), capture(model, lazy=True, kinds="attention") as maps:
        model(image)
    rolled, relevant = rollout(maps), relevance(model, image)
    assert rolled.on_image().shape == relevant.on_image().shape == (1, 1, 64, 96)
    torch.testing.assert_close(rolled.cells.sum() + rolled.outside.sum(), torch.ones(()), rtol=0, atol=1e-4)
    assert bool((relevant.cells >= 0).all())


def test_errors_tell_what_is_not_defined(model, image):
    with torch.no_grad(), capture(model, rows=[(1, 1)]) as some:
        model(image)
    with pytest.raises(ValueError, match=r"all 12 queries of 'layers.0' are needed; 1 were captured"):
        rollout(some)
    with torch.no_grad(), capture(model, lazy=True) as maps:
        model(image)
    for arguments, told in (
        ({"start": (3, 0)}, r"inside the last grid \(3, 4\); got \(3, 0\)"),
        ({"start": "cls"}, "start must be 'class', 'mean' or coordinates"),
        ({"heads": "sum"}, "heads must be one of.*got 'sum'"),
        ({"attention_share": 0.0}, r"attention_share must be in \(0, 1\]; got 0.0"),
    ):
        with pytest.raises(ValueError, match=told):
            rollout(maps, **arguments)
    with pytest.raises(ValueError, match=r"item must be one of the batch of 2; got 2"):
        flow(maps, item=2)
    with pytest.raises(ValueError, match=r"targets must be cells 0 to 11 .* got \[14\]"):
        flow(maps, targets=[14])
    with pytest.raises(ValueError, match=r"gradients of 'layers.2' were not asked for"):
        relevance_of(maps)
    with pytest.raises(ValueError, match=r"no attention was captured"):
        rollout([])
    with pytest.raises(ValueError, match=r"target must be classes 0 to 2; got 3"):
        relevance(model, image, 3)
    with torch.no_grad(), capture(model, gradients=True) as unseen:
        model(image)
    with pytest.raises(ValueError, match=r"no backward pass has reached the attention of 'layers.0'"):
        unseen[0].gradients  # noqa: B018  # the property raises


def test_other_operators_and_mixed_softmaxes_have_no_rollout():
    outlook = create_mixer("outlook", dim=8, heads=2)
    with capture(outlook) as maps:
        outlook(torch.randn(1, 4, 4, 8))
    with pytest.raises(ValueError, match=r"moves values by 'outlook'.*capture\(model, kinds='attention'\)"):
        rollout(maps)
    gated = create_mixer("gated_positional", dim=8, heads=2)
    with capture(gated) as maps:
        gated(torch.randn(1, 4, 4, 8))
    with pytest.raises(ValueError, match=r"attends 2 times with different queries"):
        rollout(maps)


@pytest.mark.parametrize(
    ("fine", "coarse", "told"), [((9, 8), (2, 4), "of an axis of 9"), ((4, 4), (8, 8), "no cells of an axis of 4")]
)
def test_grids_that_are_no_windows_of_each_other_have_no_way_back(fine, coarse, told):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (create_mixer("multi_head", dim=8, heads=2) for _ in range(2))

        def forward(self, x):
            return self.second(torch.ones(1, *coarse, 8) + self.first(x).mean())

    model = Model()
    with capture(model) as maps:
        model(torch.randn(1, *fine, 8))
    with pytest.raises(ValueError, match=told):
        rollout(maps)


def test_what_is_no_capture_row_share_or_class_is_refused():
    model = regard.create_model("vit_tiny_patch16_224", depth=2, dim=16, head_dim=8, num_classes=3).eval()
    images = torch.randn(1, 3, 32, 32)

    def record(**options):
        with capture(**{"model": model, **options}) as found:
            model(images)
        return found

    maps = record()
    doors = [
        (
            record,
            {"model": model, "rows": [0], "layers": "*", "kinds": "*", "lazy": False, "gradients": False, "limit": 1 << 33},
        ),
        (regard.lens.rollout, {"maps": maps, "start": (0.0, 0.9), "heads": "mean", "attention_share": 0.5}),
        (regard.lens.flow, {"maps": maps, "start": "mean", "item": 0, "targets": [0], "heads": "mean", "attention_share": 0.5}),
        (
            regard.lens.relevance,
            {"model": model, "images": images, "target": 1, "start": (0, 1), "layers": "*", "limit": 1 << 33},
        ),
        (regard.lens.entropy, {"found": maps[0]}),
        (regard.lens.distance, {"found": maps[0]}),
        (regard.lens.head_similarity, {"found": maps[0], "kind": "js", "limit": 1 << 33}),
        (regard.lens.effective_rank, {"found": maps[0], "limit": 1 << 33}),
        (regard.lens.image_map, {"found": maps[0], "heads": "mean", "image_size": (32, 32)}),
        (hop_profile, {"found": maps[0]}),
        (
            tokencut,
            {"features": torch.randn(4, 4, 8), "patch_size": 1, "image_size": (4, 4), "weak": 0.1},
        ),
    ]
    wrong = (
        b"x",
        1.5j,
        float("nan"),
        {},
        object(),
        int,
        [None],
        [(0.5, "a")],
        [1.5],
        -1,
        "what",
        torch.zeros(2, 2, 2).to_sparse(),
    )
    for door, right in doors:
        door(**right)
        for name, value in itertools.product(right, wrong):
            if (name == "target" and value is int) or (name in ("layers", "kinds") and value == "what"):
                continue  # what makes a number of the output; a pattern that nothing has
            with pytest.raises((TypeError, ValueError)) as caught:
                door(**{**right, name: value})
            for inside in ("has no attribute", "unsupported operand", "not supported between", "ambiguous", "not iterable"):
                assert inside not in str(caught.value), (door, name, value)
    with pytest.raises(ValueError, match=r"start must lie inside the last grid \(2, 2\)"):
        rollout(maps, (-0.2, 0.5))  # a fifth above the image is not its first row
    for wrong_row in (True, 2.5, "a"):
        with pytest.raises(TypeError, match="each of rows must be a whole number"):
            record(rows=[wrong_row])
