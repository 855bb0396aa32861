"""VOLO (29): outlook attention equals weighing windows one by one, the network equals its definition and timm."""

import itertools
import math

import peers
import pytest
import torch
import torch.nn.functional as F
from naive_backbones import (
    batch_norm,
    conv,
    dense_attention,
    layer_norm,
    linear,
    mlp,
    multiply_adds,
    patches,
    randomise,
    tiny,
)

from regard import create_mixer, create_model, list_models, load_checkpoint
from regard.layers.blocks import DropPath
from regard.layers.conv_norm import fuse
from regard.losses import token_labeling_loss
from regard.models import count_parameters, export_state_dict, model_card
from regard.models.backbones.volo import Box, mix_tokens, random_box

SIZES = {  # dim, depths, heads, stem, ratio, published parameters
    "volo_d1": (192, (4, 4, 8, 2), (6, 12), 64, 3, 26_632_040),
    "volo_d2": (256, (6, 4, 10, 4), (8, 16), 64, 3, 58_678_336),
    "volo_d3": (256, (8, 8, 16, 4), (8, 16), 64, 3, 86_325_072),
    "volo_d4": (384, (8, 8, 16, 4), (12, 16), 64, 3, 192_961_520),
    "volo_d5": (384, (12, 12, 20, 4), (12, 16), 128, 4, 295_455_584),
}
RESOLUTIONS = {"volo_d1": (384,), "volo_d2": (384,), "volo_d3": (448,), "volo_d4": (448,), "volo_d5": (448, 512)}
NAMES = [f"{size}_{pixels}" for size in SIZES for pixels in (224, *RESOLUTIONS[size])]
NARROW = {"dim": 8, "head_dim": 4, "depths": (2, 1, 1, 1), "stem_dim": 6, "grid": (3, 4)}


# --------------------------------------------------------------------------------------------------------------------
# the definition


def outlook(x, weights, name, heads, size=3, stride=2):
    """One window at a time: its middle tokens decide, its values are mixed and added to where they stand."""
    rows, columns, dim = x.shape[1:]
    width, taps = dim // heads, list(itertools.product(range(size), repeat=2))
    v = linear(x, weights, f"{name}.v")
    out = torch.zeros_like(v)
    for top, left in itertools.product(range(0, rows, stride), range(0, columns, stride)):
        middle = x[:, top : top + stride, left : left + stride].mean((1, 2))
        logits = linear(middle, weights, f"{name}.attn").reshape(-1, heads, len(taps), len(taps))
        kernel = (logits / math.sqrt(width)).softmax(-1)
        places = [(top + i - size // 2, left + j - size // 2) for i, j in taps]
        inside = [(at, p) for at, p in enumerate(places) if 0 <= p[0] < rows and 0 <= p[1] < columns]
        for (target, to), (source, at) in itertools.product(inside, inside):
            share = kernel[:, :, target, source].repeat_interleave(width, 1)
            out[:, to[0], to[1]] += share * v[:, at[0], at[1]]
    return linear(out, weights, f"{name}.proj")


def class_block(x, weights, name, heads):
    dim = x.shape[-1]
    normed = layer_norm(x, weights, f"{name}.norm1")
    q = linear(normed[:, 0], weights, f"{name}.attn.q").reshape(len(x), heads, -1)
    k, v = linear(normed, weights, f"{name}.attn.kv").reshape(*x.shape[:2], 2, heads, dim // heads).unbind(2)
    share = (torch.einsum("bhd,bnhd->bhn", q, k) / math.sqrt(dim // heads)).softmax(-1)
    first = x[:, 0] + linear(torch.einsum("bhn,bnhd->bhd", share, v).flatten(1), weights, f"{name}.attn.proj")
    first = first + mlp(layer_norm(first, weights, f"{name}.norm2"), weights, f"{name}.mlp.fc1", f"{name}.mlp.fc2")
    return torch.cat([first[:, None], x[:, 1:]], 1)


def naive_volo(image, weights, depths, heads):
    x = image.permute(0, 2, 3, 1)
    for layer in (0, 3, 6):
        x = conv(x, weights, f"patch_embed.conv.{layer}", stride=1 if layer else 2)
        x = batch_norm(x, weights, f"patch_embed.conv.{layer + 1}").relu()
    x = patches(x.permute(0, 3, 1, 2), weights, "patch_embed.proj", 4)
    for stage, depth in zip((0, 2, 3, 4), depths, strict=True):
        if stage == 2:
            x = F.pad(x, [0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2])
            x = conv(x, weights, "network.1.proj", stride=2)
            places = weights["pos_embed"]
            if places.shape[1:3] != x.shape[1:3]:
                places = F.interpolate(places.permute(0, 3, 1, 2), x.shape[1:3], mode="bicubic").permute(0, 2, 3, 1)
            x = x + places
        for block in range(depth):
            name = f"network.{stage}.{block}"
            normed = layer_norm(x, weights, f"{name}.norm1")
            if stage:
                everything = torch.ones(x[0, ..., 0].numel(), x[0, ..., 0].numel(), dtype=torch.bool)
                x = x + dense_attention(normed, weights, f"{name}.attn", heads[1], everything, lambda c: 0.0)
            else:
                x = x + outlook(normed, weights, f"{name}.attn", heads[0])
            x = x + mlp(layer_norm(x, weights, f"{name}.norm2"), weights, f"{name}.mlp.fc1", f"{name}.mlp.fc2")
    x = torch.cat([weights["cls_token"].expand(len(x), -1, -1), x.flatten(1, 2)], 1)
    for block in range(2):
        x = class_block(x, weights, f"post_network.{block}", heads[1])
    x = layer_norm(x, weights, "norm")
    return linear(x[:, 0], weights, "head") + linear(x[:, 1:], weights, "aux_head").max(1).values / 2


@pytest.mark.parametrize("size", [(48, 64), (61, 83)])  # 6 x 8 fine tokens; 8 x 11 at positions learned for 3 x 4
def test_equals_the_definition_window_by_window(size):
    model, weights = tiny("volo_d1_224", **NARROW)
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = naive_volo(image, weights, NARROW["depths"], (2, 4))
    torch.testing.assert_close(model(image), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("size", "stride", "grid"), [(3, 2, (7, 5)), (3, 1, (4, 6)), (5, 3, (8, 7)), (3, 3, (1, 2))])
def test_outlook_equals_loops_over_windows(size, stride, grid):
    mixer = randomise(create_mixer("outlook", dim=8, heads=2, kernel_size=size, stride=stride, dtype=torch.float64))
    weights = {f"a.{name}": value for name, value in mixer.state_dict().items()}
    x = torch.randn(2, *grid, 8, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), outlook(x, weights, "a", 2, size, stride), rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------------------------------------------------
# mechanism


def test_identity_weights_give_the_values_times_the_number_of_windows_that_hold_them():
    mixer = randomise(create_mixer("outlook", dim=8, heads=2, dtype=torch.float64))
    torch.nn.init.zeros_(mixer.attn.weight)
    mixer.attn.bias.data = 1e4 * torch.eye(9, dtype=torch.float64).flatten().repeat(2)
    x = torch.randn(1, 7, 6, 8, dtype=torch.float64)

    def windows(length):  # odd places lie between two windows, except the last where there is no next one
        return torch.tensor([1 + (i % 2 and i + 1 < length) for i in range(length)], dtype=torch.float64)

    counts = windows(7)[:, None] * windows(6)
    torch.testing.assert_close(mixer(x), mixer.proj(mixer.v(x) * counts[..., None]), rtol=1e-12, atol=1e-12)


def test_zeros_outside_the_grid_take_weight():
    mixer = randomise(create_mixer("outlook", dim=8, heads=2, dtype=torch.float64))
    torch.nn.init.zeros_(mixer.attn.weight)
    torch.nn.init.zeros_(mixer.attn.bias)
    x = torch.ones(1, 1, 1, 8, dtype=torch.float64)  # one token: one of nine values, each with weight 1/9
    torch.testing.assert_close(mixer(x), mixer.proj(mixer.v(x) / 9), rtol=1e-12, atol=1e-12)


def test_what_a_token_sees_lies_within_the_windows_that_hold_it():
    mixer = randomise(create_mixer("outlook", dim=8, heads=2, dtype=torch.float64))
    x = torch.randn(1, 11, 11, 8, dtype=torch.float64, requires_grad=True)
    y = mixer(x)
    for row, column in ((4, 4), (5, 5), (5, 8)):
        seen = torch.autograd.grad(y[0, row, column].sum(), x, retain_graph=True)[0][0].abs().sum(-1) > 0

        def span(at):  # windows start one before even places; their weights are made of two tokens from there on
            return (at - 1, at + 1) if at % 2 == 0 else (at - 2, at + 2)

        expected = torch.zeros(11, 11, dtype=torch.bool)
        (top, bottom), (left, right) = span(row), span(column)
        expected[top : bottom + 1, left : right + 1] = True
        assert torch.equal(seen, expected)


def test_no_two_tokens_are_compared_doubling_a_token_leaves_the_weights_of_other_windows():
    mixer = randomise(create_mixer("outlook", dim=8, heads=2, dtype=torch.float64))
    x = torch.randn(1, 6, 6, 8, dtype=torch.float64)
    other = x.clone()
    other[0, 0, 0] *= 2
    changed = (mixer.weights(x) != mixer.weights(other)).flatten(3).any(-1)[0]
    assert changed[0, 0]
    assert changed.sum() == 1


def test_stochastic_depth_spares_the_outlookers_and_grows_over_the_transformers():
    model = create_model("volo_d1_224", device="meta", drop_path_rate=0.17)
    rates = [[m.p for m in stage.modules() if isinstance(m, DropPath)][::2] for stage in model.stages]
    assert rates[0] == [0.0] * 4
    assert [rate for stage in rates[1:] for rate in stage] == pytest.approx([0.17 * i / 17 for i in range(4, 18)])


def test_fused_equals_plain():
    model, _ = tiny("volo_d1_224", **NARROW)
    image = torch.randn(1, 3, 61, 44, dtype=torch.float64)
    expected = model(image)
    fuse(model)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    torch.testing.assert_close(model(image), expected, rtol=1e-11, atol=1e-11)


# --------------------------------------------------------------------------------------------------------------------
# token labels


def test_logits_are_those_of_the_class_token_and_half_of_the_best_token():
    model, _ = tiny("volo_d1_224", **NARROW)
    image = torch.randn(2, 3, 61, 83, dtype=torch.float64)
    whole, dense = model.forward_dense(image)
    assert dense.shape == (2, 4, 6, 5)
    torch.testing.assert_close(model(image), whole + dense.flatten(1, 2).max(1).values / 2)


def test_dense_logits_of_mixed_tokens_return_to_their_images():
    model, weights = tiny("volo_d1_224", **NARROW)
    image = torch.randn(3, 3, 48, 64, dtype=torch.float64)
    plain_whole, plain = model.forward_dense(image)
    whole, dense = model.forward_dense(image, Box(0, 0, 3, 4))  # all tokens: the whole batch is reversed
    torch.testing.assert_close(whole, plain_whole.flip(0))
    torch.testing.assert_close(dense, plain)
    box = Box(1, 0, 3, 2)
    x = model.stem(image)
    for image_index in range(3):
        x[image_index, 2:6, 0:4] = model.stem(image)[2 - image_index, 2:6, 0:4]
    for stage in model.stages:
        x = stage(x)
    x = model.norm(model.class_blocks(torch.cat([model.cls_token.expand(3, -1, -1), x.flatten(1, 2)], 1)))
    whole, dense = model.forward_dense(image, box)
    torch.testing.assert_close(whole, linear(x[:, 0], weights, "head"))
    mixed = linear(x[:, 1:], weights, "aux_head").reshape(3, 3, 4, 5)
    for index, row, column in itertools.product(range(3), range(3), range(4)):
        owner = 2 - index if row >= 1 and column < 2 else index
        torch.testing.assert_close(dense[owner, row, column], mixed[index, row, column])


def test_mixing_twice_is_nothing_and_boxes_cover_a_share_of_the_grid():
    x = torch.randn(4, 14, 14, 3)
    generator = torch.Generator().manual_seed(0)
    boxes = [random_box((14, 14), generator) for _ in range(2000)]
    assert all(0 <= b.top <= b.bottom <= 14 and 0 <= b.left <= b.right <= 14 for b in boxes)
    assert torch.equal(mix_tokens(mix_tokens(x, boxes[0]), boxes[0]), x)
    assert sum(abs(b.bottom - b.top - 7) < 7 for b in boxes) > 1000  # cut at the border, seldom all or nothing
    # a box of side s around a uniform centre keeps on average s - s^2 / 4 of an axis; s^2 is uniform
    sides = torch.linspace(0, 1, 10001).sqrt()
    expected = ((sides - sides.square() / 4).square()).mean().item()
    assert sum(b.area for b in boxes) / len(boxes) / 196 == pytest.approx(expected, abs=0.03)


def test_the_loss_is_the_mean_of_cross_entropies_image_by_image_and_token_by_token():
    logits, token_logits = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 2, 4, 5, dtype=torch.float64)
    targets = torch.rand(3, 5, dtype=torch.float64).softmax(-1)
    token_targets = torch.rand(3, 2, 4, 5, dtype=torch.float64).softmax(-1)
    expected = 0.0
    for i in range(3):
        mixed = 0.7 * targets[i] + 0.3 * targets[2 - i]
        expected -= (mixed * logits[i].log_softmax(-1)).sum() / 3
        for row, column in itertools.product(range(2), range(4)):
            each = token_targets[i, row, column] * token_logits[i, row, column].log_softmax(-1)
            expected -= 0.5 * each.sum() / 24
    torch.testing.assert_close(token_labeling_loss(logits, token_logits, targets, token_targets, share=0.3), expected)
    copied = targets[:, None, None].expand(3, 2, 4, 5)
    without = token_labeling_loss(logits, token_logits, targets, share=0.3)
    torch.testing.assert_close(without, token_labeling_loss(logits, token_logits, targets, copied, share=0.3))
    with pytest.raises(ValueError, match=r"got \(3, 2, 4, 5\), \(3, 5\), \(3, 2, 2, 5\)"):
        token_labeling_loss(logits, token_logits, targets, token_targets[:, :, :2])
    with pytest.raises(ValueError, match="from 0 to 1; got 2"):
        token_labeling_loss(logits, token_logits, targets, share=2)


# --------------------------------------------------------------------------------------------------------------------
# published facts


def test_every_published_name_is_here():
    assert sorted(NAMES) == list_models("volo_*")


@pytest.mark.parametrize("name", NAMES)
def test_parameter_counts_equal_the_closed_form_and_the_published(name):
    size, pixels = name.rsplit("_", 1)
    dim, depths, heads, stem, ratio, published = SIZES[size]
    wide, side = 2 * dim, int(pixels) // 16
    total = 3 * 49 * stem + 2 * 9 * stem**2 + 6 * stem + 16 * stem * dim + dim

    def channels(width):
        return 2 * ratio * width**2 + (ratio + 1) * width + 4 * width

    total += depths[0] * (2 * dim**2 + dim + 81 * heads[0] * (dim + 1) + channels(dim))
    total += 4 * dim * wide + wide + side**2 * wide
    total += (sum(depths[1:]) + 2) * (4 * wide**2 + wide + channels(wide))
    total += wide + 2 * wide + 2 * (wide * 1000 + 1000)
    assert count_parameters(create_model(name, device="meta")) == total == model_card(name).params
    if pixels == "224":
        assert total == published


@pytest.mark.parametrize("name", NAMES)
def test_multiply_adds_are_the_published_ones(name):
    card = model_card(name)
    model = create_model(name, device="meta")
    windows = (card.input_size // 16) ** 2
    mixing = len(model.stages[0].blocks) * windows * 81 * model.spec.stages[0].dim / 1e9
    assert multiply_adds(model, card.input_size) + mixing == pytest.approx(card.gmacs, rel=5e-3)


def test_positions_and_the_class_token_are_kept_from_weight_decay():
    model = create_model("volo_d1_224", device="meta")
    assert model.no_weight_decay() == {"cls_token", "stages.1.downsample.position.table"}
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()


def test_weights_of_1000_classes_load_with_new_classifiers_and_without_any():
    _, weights = tiny("volo_d1_224", **NARROW)
    fewer = create_model("volo_d1_224", num_classes=3, dtype=torch.float64, **NARROW)
    before = fewer.aux_head.weight.clone()
    assert load_checkpoint(fewer, weights, new_head=True) == "official"
    assert torch.equal(fewer.aux_head.weight, before)
    assert torch.equal(fewer.cls_token, weights["cls_token"])
    none = create_model("volo_d1_224", num_classes=0, dtype=torch.float64, **NARROW).eval()
    load_checkpoint(none, weights)
    assert none(torch.randn(1, 3, 32, 32, dtype=torch.float64)).shape == (1, 16)


# --------------------------------------------------------------------------------------------------------------------
# peers


@pytest.mark.peer
def test_equals_timm_under_its_weights():
    timm = peers.timm()
    options = {"embed_dims": (16, 32, 32, 32), "num_heads": (2, 4, 4, 4), "stem_hidden_dim": 8, "num_classes": 7}
    theirs = timm.models.volo.VOLO((2, 1, 2, 1), img_size=(224, 160), **options).double()
    randomise(theirs)
    narrow = {"dim": 16, "head_dim": 8, "depths": (2, 1, 2, 1), "stem_dim": 8, "grid": (14, 10), "num_classes": 7}
    ours = create_model("volo_d1_224", dtype=torch.float64, **narrow).eval()
    load_checkpoint(ours, theirs.state_dict())
    for layout in ("official", "timm"):
        exported = export_state_dict(ours, layout)
        assert exported.keys() == theirs.state_dict().keys()
        assert all(torch.equal(value, exported[key]) for key, value in theirs.state_dict().items())
    image = torch.randn(2, 3, 224, 160, dtype=torch.float64)
    torch.testing.assert_close(ours(image), theirs(image), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(ours.forward_features(image), theirs.forward_features(image), rtol=1e-11, atol=1e-11)


@pytest.mark.peer
def test_published_size_equals_timm_with_its_own_initial_weights():
    timm = peers.timm()
    theirs = timm.create_model("volo_d1_224").eval()
    ours = create_model("volo_d1_224").eval()
    load_checkpoint(ours, theirs.state_dict())
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs(image), rtol=1e-5, atol=1e-5)
