"""ConViT (13): gated positional attention equals its formula and timm, and starts as a convolution."""

import math

import peers
import pytest
import torch
import torch.nn.functional as F
from naive_backbones import linear
from naive_transformer import attention_map, feed_forward, norm, project, small, split
from sklearn.datasets import load_digits
from torch import nn

from regard import create_mixer, create_model, list_models, load_checkpoint
from regard.models import count_parameters, export_state_dict, model_card

SIZES = {"convit_tiny": (4, 5_710_512), "convit_small": (9, 27_777_322), "convit_base": (16, 86_540_040)}
GRID = (5, 7)


def position_maps(weights, name, rows, columns):
    """Softmax over keys of w . (dx, dy, dx^2 + dy^2) + b, one pair of places at a time: (heads, places, places)."""
    places = [(row, column) for row in range(rows) for column in range(columns)]
    weight, bias = weights[f"{name}.pos_proj.weight"], weights[f"{name}.pos_proj.bias"]
    logits = torch.empty(len(weight), len(places), len(places), dtype=weight.dtype)
    for i, (row, column) in enumerate(places):
        for j, (key_row, key_column) in enumerate(places):
            dy, dx = key_row - row, key_column - column
            logits[:, i, j] = weight @ torch.tensor([dx, dy, dx**2 + dy**2], dtype=weight.dtype) + bias
    return logits.softmax(-1)


def gated_maps(x, weights, name, heads, grid):
    q, k = (split(part, heads) for part in linear(x, weights, f"{name}.qk").chunk(2, -1))
    content = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    gate = weights[f"{name}.gating_param"].sigmoid()[:, None, None]
    return (1 - gate) * content + gate * position_maps(weights, name, *grid)


def naive_convit(image, weights, heads=2, depth=4, plain=2):
    x = F.conv2d(image, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=16)
    grid = x.shape[2:]
    x = x.flatten(2).transpose(1, 2) + weights["pos_embed"]
    for i in range(depth):
        block = f"blocks.{i}"
        if i == depth - plain:
            x = torch.cat([weights["cls_token"].expand(len(x), -1, -1), x], 1)
        normed = norm(x, weights, f"{block}.norm1")
        if i < depth - plain:
            maps = gated_maps(normed, weights, f"{block}.attn", heads, grid)
            v = split(linear(normed, weights, f"{block}.attn.v"), heads)
        else:
            maps, v = attention_map(normed, weights, f"{block}.attn", heads)
        x = feed_forward(x + project(maps, v, weights, f"{block}.attn"), weights, block)
    return linear(norm(x, weights, "norm")[:, 0], weights, "head")


def mixer(heads=9, width=4, **options):
    return create_mixer("gated_positional", dim=heads * width, heads=heads, dtype=torch.float64, **options)


def tokens(dim, grid=GRID):
    return torch.randn(2, *grid, dim, dtype=torch.float64)


def maps_of(gpsa, x):
    """The whole mixture of attention maps, from the parameters: (batch, heads, places, places)."""
    names = {"position": "pos_proj", "gate": "gating_param"}
    weights = {}
    for key, value in gpsa.state_dict().items():
        head, _, tail = key.partition(".")
        weights[".".join(filter(None, ("a", names.get(head, head), tail)))] = value
    return gated_maps(x.flatten(1, 2), weights, "a", gpsa.heads, x.shape[1:3])


# --------------------------------------------------------------------------------------------------------------------
# mechanism


def test_equals_the_definition():
    model, weights = small("convit_tiny", image_size=64)
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(model(image), naive_convit(image, weights), rtol=1e-11, atol=1e-11)


def test_the_mixer_equals_the_definition_on_any_grid():
    gpsa = mixer(heads=3)
    for parameter in gpsa.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = tokens(12)
    v = split(F.linear(x.flatten(1, 2), gpsa.v.weight), 3)
    expected = gpsa.proj((maps_of(gpsa, x) @ v).transpose(1, 2).flatten(2)).unflatten(1, GRID)
    torch.testing.assert_close(gpsa(x), expected, rtol=1e-11, atol=1e-11)


def test_a_closed_gate_is_plain_attention():
    gpsa = mixer(heads=4)
    plain = create_mixer("multi_head", dim=16, heads=4, qkv_bias=False, dtype=torch.float64)
    plain.load_state_dict({
        "qkv.weight": torch.cat([gpsa.qk.weight, gpsa.v.weight]), "proj.weight": gpsa.proj.weight, "proj.bias": gpsa.proj.bias,
    })  # fmt: skip
    x, extra = tokens(16), torch.randn(2, 3, 16, dtype=torch.float64)
    nn.init.constant_(gpsa.gate, -60.0)
    for ours, expected in zip(gpsa(x, extra), plain(x, extra), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_an_open_gate_does_not_look_at_the_input():
    gpsa = mixer(heads=4)
    nn.init.constant_(gpsa.gate, 60.0)
    x, y = tokens(16), tokens(16)
    torch.testing.assert_close(gpsa(x + y), gpsa(x) + gpsa(y) - gpsa(torch.zeros_like(x)))  # linear in the input
    nn.init.normal_(gpsa.qk.weight)
    before = gpsa(x)
    nn.init.normal_(gpsa.qk.weight)
    torch.testing.assert_close(gpsa(x), before)
    extra = torch.randn(2, 3, 16, dtype=torch.float64)  # has no place: nothing of it arrives on the grid
    torch.testing.assert_close(gpsa(x, extra)[0], before)


def test_sharp_heads_are_a_convolution_over_their_stencil():
    """Values as the input and open gates: y = W_o of x shifted by the centre of each head, a 3 x 3 kernel."""
    gpsa = mixer(heads=9, strength=60.0)
    nn.init.constant_(gpsa.gate, 60.0)
    kernel = torch.zeros(36, 36, 3, 3, dtype=torch.float64)
    for head in range(9):
        dy, dx = head % 3 - 1, head // 3 - 1
        at = slice(4 * head, 4 * head + 4)
        kernel[:, at, dy + 1, dx + 1] = gpsa.proj.weight[:, at]
    x = tokens(36)
    expected = F.conv2d(x.movedim(-1, 1), kernel, gpsa.proj.bias).movedim(1, -1)
    torch.testing.assert_close(gpsa(x)[:, 1:-1, 1:-1], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("heads", "side"), [(4, 2), (9, 3), (16, 4), (12, 3), (2, 1)])
def test_heads_start_at_the_places_of_a_square(heads, side):
    torch.manual_seed(1)
    gpsa = mixer(heads=heads, strength=0.7)
    assert torch.equal(gpsa.gate, torch.ones(heads, dtype=torch.float64))
    assert torch.equal(gpsa.v.weight, torch.eye(4 * heads, dtype=torch.float64))
    table = gpsa.position_table((6, 6))  # offsets -5 .. 5
    for head in range(side**2):
        dy, dx = head % side - (side - 1) / 2, head // side - (side - 1) / 2
        for row in range(11):
            for column in range(11):
                away = (row - 5 - dy) ** 2 + (column - 5 - dx) ** 2
                expected = -0.7 * (away - dy**2 - dx**2)  # a constant is lost in the softmax
                assert table[head, row, column].item() == pytest.approx(expected, abs=1e-9)
    others = gpsa.position.weight[side**2 :]  # heads beyond the square: as drawn
    assert not (others == -0.7).any()


def test_models_start_local_although_they_draw_all_linear_layers():
    model = create_model("convit_small", depth=3)
    for block in model.blocks[:1]:
        assert torch.equal(block.mixer.op.v.weight, torch.eye(432))
        assert torch.equal(block.mixer.op.position.weight[5], torch.tensor([0.0, 2.0, -1.0]))  # 5 = 2 + 3 * 1
    assert block.mixer.op.qk.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_attention_is_about_a_patch_away_at_the_start_and_farther_without_positions():
    """The distance to the keys, weighted with attention, averaged over heads and queries."""
    gpsa = mixer(heads=9)
    x = tokens(36, (14, 14))
    places = torch.cartesian_prod(torch.arange(14.0), torch.arange(14.0)).double()
    distance = torch.cdist(places, places)
    inside = ((places > 1) & (places < 12)).all(-1)

    def non_locality(gate):
        nn.init.constant_(gpsa.gate, gate)
        return (maps_of(gpsa, x) * distance).sum(-1)[..., inside].mean().item()

    positions, start, content = non_locality(60.0), non_locality(1.0), non_locality(-60.0)
    assert 0.8 < positions < 1.6
    assert positions < start < 0.5 * content
    assert content > 5


# --------------------------------------------------------------------------------------------------------------------
# the model


def test_the_class_token_enters_behind_the_local_blocks():
    model, _ = small("convit_tiny", depth=5, plain=2)
    states = model.run_blocks(torch.randn(1, 3, 48, 80, dtype=torch.float64), range(5))
    assert [(state.x.shape[1], state.prefix) for state in states] == [(15, 0)] * 3 + [(16, 1)] * 2
    assert model.positions.table.shape == (1, 196, 16)
    assert model(torch.randn(2, 3, 61, 83, dtype=torch.float64)).shape == (2, 5)


def accuracy_on_few_digits(seed, **options):
    """Of a narrow network after 240 steps of 50 images, 60 times over 200 handwritten digits of 8 x 8 pixels, on 997 others."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images).float()[:, None] / 8 - 1, torch.tensor(digits.target)
    torch.manual_seed(seed)
    order = torch.randperm(len(images))
    few, others = order[:200], order[800:]
    model = create_model(
        "convit_tiny", dim=72, head_dim=8, depth=4, plain=1, patch_size=2, image_size=8, mlp_ratio=2.0, in_chans=1,
        num_classes=10, drop_path_rate=0.0, **options,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=240)
    for _ in range(60):
        for batch in few[torch.randperm(200)].split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return (model.eval()(images[others]).argmax(-1) == labels[others]).double().mean().item()


@pytest.mark.slow
def test_few_images_are_enough_for_gated_positions_where_plain_attention_needs_more():
    """Seeds 0 and 1, against the same table with plain attention in every block: at least 0.1 of accuracy apart, both times."""
    for seed in (0, 1):
        gated = accuracy_on_few_digits(seed)
        plain = accuracy_on_few_digits(seed, mixer=("multi_head", {"qkv_bias": False}))
        assert gated > 0.75
        assert gated > plain + 0.1


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts_are_the_published_ones(name):
    heads, published = SIZES[name]
    model = create_model(name, device="meta")
    assert count_parameters(model) == published == model_card(name).params
    assert {(block.mixer.op.heads, block.mixer.op.dim) for block in model.blocks} == {(heads, 48 * heads)}
    kinds = [type(block.mixer.op).__name__ for block in model.blocks]
    assert kinds == ["GatedPositionalAttention"] * 10 + ["MultiHeadAttention"] * 2
    assert sorted(SIZES) == list_models("convit_*")


@pytest.mark.peer
def test_equals_timm_under_its_weights():
    theirs = peers.timm().models.convit.ConVit(
        embed_dim=16, num_heads=4, depth=4, num_classes=7, local_up_to_layer=2, img_size=96
    ).double().eval()  # fmt: skip
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours = create_model(
        "convit_tiny", dim=64, head_dim=16, depth=4, plain=2, image_size=96, num_classes=7, dtype=torch.float64
    ).eval()
    load_checkpoint(ours, theirs.state_dict())
    exported = export_state_dict(ours, "timm")
    assert exported.keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, exported[key]) for key, value in theirs.state_dict().items())
    image = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    torch.testing.assert_close(ours(image), theirs(image), rtol=1e-11, atol=1e-11)


@pytest.mark.peer
def test_the_published_size_equals_timm_and_starts_alike():
    theirs = peers.timm().create_model("convit_tiny").eval()
    ours = create_model("convit_tiny").eval()
    fresh = export_state_dict(ours, "timm")
    for key, value in theirs.state_dict().items():
        if "pos_proj" in key or "gating_param" in key or ".attn.v." in key:
            assert torch.equal(fresh[key], value), key
    load_checkpoint(ours, theirs.state_dict())
    image = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(ours(image), theirs(image), rtol=1e-5, atol=1e-5)


def test_wrong_tables_and_grids_are_told():
    with pytest.raises(ValueError, match="of 12 blocks 1 to 11 may be plain; got 12"):
        create_model("convit_tiny", plain=12, device="meta")
    with pytest.raises(ValueError, match=r"one grid of 2 axes; got \(5, 7\) and \(3, 3\)"):
        mixer()(tokens(36), context=tokens(36, (3, 3)))
