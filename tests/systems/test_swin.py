"""Swin Transformer (101): shifted windows equal their definition, timm, and the official dense-task code."""

from functools import partial

import peers
import pytest
import torch
import torch.nn.functional as F
from naive_backbones import (
    dense_attention,
    heads_of,
    layer_norm,
    linear,
    merge_patches,
    mlp,
    multiply_adds,
    patches,
    randomise,
    tiny,
)

from regard import create_model, list_models, load_checkpoint
from regard.bench import count
from regard.models import count_parameters, export_state_dict, model_card
from regard.models.backbones.swin import RolledWindowAttention

TINY = "swin_tiny_patch4_window7_224"
SIZES = {  # dim, depths, window, classes
    "swin_tiny_patch4_window7_224": (96, (2, 2, 6, 2), 7, 1000),
    "swin_small_patch4_window7_224": (96, (2, 2, 18, 2), 7, 1000),
    "swin_base_patch4_window7_224": (128, (2, 2, 18, 2), 7, 1000),
    "swin_base_patch4_window12_384": (128, (2, 2, 18, 2), 12, 1000),
    "swin_large_patch4_window7_224": (192, (2, 2, 18, 2), 7, 1000),
    "swin_large_patch4_window12_384": (192, (2, 2, 18, 2), 12, 1000),
    "swin_tiny_patch4_window7_224.ms_in22k": (96, (2, 2, 6, 2), 7, 21841),
    "swin_small_patch4_window7_224.ms_in22k": (96, (2, 2, 18, 2), 7, 21841),
    "swin_base_patch4_window7_224.ms_in22k": (128, (2, 2, 18, 2), 7, 21841),
    "swin_base_patch4_window12_384.ms_in22k": (128, (2, 2, 18, 2), 12, 21841),
    "swin_large_patch4_window7_224.ms_in22k": (192, (2, 2, 18, 2), 7, 21841),
    "swin_large_patch4_window12_384.ms_in22k": (192, (2, 2, 18, 2), 12, 21841),
}
PUBLISHED = {
    "swin_tiny_patch4_window7_224": 28_288_354,
    "swin_small_patch4_window7_224": 49_606_258,
    "swin_base_patch4_window7_224": 87_768_224,
    "swin_large_patch4_window7_224": 196_532_476,
}


# --------------------------------------------------------------------------------------------------------------------
# the definition: a map is rolled, cut into windows, and pairs that the roll brought together are masked


def offsets(table, coordinates):
    """The official table ``[(2M-1)^2, heads]`` at query minus key."""
    size = round(table.shape[0] ** 0.5)
    step = coordinates[:, None] - coordinates[None] + size // 2
    return table[(step[..., 0] * size + step[..., 1]).clamp(0, size * size - 1)].permute(2, 0, 1)


def regions(length, window, shift):
    label = torch.zeros(length, dtype=torch.long)
    label[-window:-shift], label[-shift:] = 1, 2
    return label


def rolled_attention(x, weights, name, heads, window, shift, *, pad_first):
    """Window attention as published: roll, cut, mask with -100, put back; with or without padding before the roll."""
    rows, columns = x.shape[1:3]
    if pad_first:
        x = F.pad(x, [0, 0, 0, -columns % window, 0, -rows % window])
    height, width = x.shape[1:3]
    x = x.roll((-shift, -shift), (1, 2))
    out = torch.empty_like(x)
    inside = torch.cartesian_prod(torch.arange(window), torch.arange(window))
    bias = offsets(weights[f"{name}.relative_position_bias_table"], inside)
    label = 3 * regions(height, window, shift)[:, None] + regions(width, window, shift) if shift else x.new_zeros(height, width)
    for top in range(0, height, window):
        for left in range(0, width, window):
            cell = (slice(top, top + window), slice(left, left + window))
            q, k, v = heads_of(x[:, *cell], weights, f"{name}.qkv", heads)
            same = label[cell].flatten()[:, None] == label[cell].flatten()
            logits = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2) + bias + torch.where(same, 0.0, -100.0)
            mixed = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
            out[:, *cell] = linear(mixed, weights, f"{name}.proj").unflatten(1, (window, window))
    return out.roll((shift, shift), (1, 2))[:, :rows, :columns]


def clipped_attention(x, weights, name, heads, window, shift):
    """Window attention as meant: tokens see each other where their shifted windows on the true map are the same."""

    def index(length):
        return (torch.arange(length) - (shift if length > window else 0)).div(window, rounding_mode="floor")

    label = 1000 * index(x.shape[1])[:, None] + index(x.shape[2])
    visible = label.flatten()[:, None] == label.flatten()
    table = weights[f"{name}.relative_position_bias_table"]
    return dense_attention(x, weights, name, heads, visible, lambda c: offsets(table, c))


def naive_swin(image, weights, depths, heads, window, attention):
    x = layer_norm(patches(image, weights, "patch_embed.proj", 4), weights, "patch_embed.norm")
    for stage, depth in enumerate(depths):
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}"
            shift = window // 2 * (block % 2)
            normed = layer_norm(x, weights, f"{name}.norm1")
            x = x + attention(normed, weights, f"{name}.attn", heads[stage], window, shift)
            x = x + mlp(layer_norm(x, weights, f"{name}.norm2"), weights, f"{name}.mlp.fc1", f"{name}.mlp.fc2")
        if stage < len(depths) - 1:
            x = merge_patches(x, weights, f"layers.{stage}.downsample")
    return linear(layer_norm(x, weights, "norm").mean((1, 2)), weights, "head")


NARROW = {"dim": 8, "head_dim": 4, "depths": (2, 3), "window_size": 3}


def test_equals_the_published_roll_and_mask_where_windows_divide():
    model, weights = tiny(TINY, **NARROW)
    image = torch.randn(2, 3, 48, 72, dtype=torch.float64)  # maps of 12 x 18 and 6 x 9
    expected = naive_swin(image, weights, (2, 3), (2, 4), 3, partial(rolled_attention, pad_first=False))
    torch.testing.assert_close(model(image), expected, rtol=1e-12, atol=1e-12)


def test_equals_clipped_shifted_windows_on_odd_sizes():
    model, weights = tiny(TINY, **NARROW | {"depths": (2, 2, 2)})
    image = torch.randn(2, 3, 37, 50, dtype=torch.float64)  # maps of 10 x 13, 5 x 7, and 3 x 4: one axis within a window
    expected = naive_swin(image, weights, (2, 2, 2), (2, 4, 8), 3, clipped_attention)
    torch.testing.assert_close(model(image), expected, rtol=1e-12, atol=1e-12)


def test_token_padding_equals_the_official_dense_task_code():
    model, weights = tiny(TINY, **NARROW, pad="token")
    image = torch.randn(2, 3, 50, 61, dtype=torch.float64)  # maps of 13 x 16 and 7 x 8
    expected = naive_swin(image, weights, (2, 3), (2, 4), 3, partial(rolled_attention, pad_first=True))
    torch.testing.assert_close(model(image), expected, rtol=1e-12, atol=1e-12)
    clipped, _ = tiny(TINY, **NARROW)
    assert (clipped(image) - expected).abs().max() > 1e-3


def test_a_window_as_large_as_the_map_is_full_attention_with_bias():
    model, weights = tiny(TINY, **NARROW | {"window_size": 9})
    image = torch.randn(1, 3, 28, 36, dtype=torch.float64)  # 7 x 9

    def full(x, weights, name, heads, window, shift):
        everything = torch.ones(x[0, ..., 0].numel(), x[0, ..., 0].numel(), dtype=torch.bool)
        table = weights[f"{name}.relative_position_bias_table"]
        return dense_attention(x, weights, name, heads, everything, lambda c: offsets(table, c))

    expected = naive_swin(image, weights, (2, 3), (2, 4), 9, full)
    torch.testing.assert_close(model(image), expected, rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------------------------------------------------
# mechanism


def influence(stage, grid, dim):
    """Which input tokens change which output tokens: (tokens, tokens)."""
    x = torch.randn(1, *grid, dim, dtype=torch.float64, requires_grad=True)
    y = stage(x).flatten(1, 2)
    rows = [torch.autograd.grad(y[0, i].sum(), x, retain_graph=True)[0][0].abs().sum(-1).flatten() for i in range(y.shape[1])]
    return torch.stack(rows) > 1e-12


def test_two_blocks_connect_neighbouring_windows_and_one_does_not():
    model, _ = tiny(TINY, dim=8, head_dim=4, depths=(2,), window_size=4)
    stage, grid = model.stages[0], (8, 12)
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(12), indexing="ij")
    plain = (rows // 4 * 9 + columns // 4).flatten()
    shifted = ((rows + 2) // 4 * 9 + (columns + 2) // 4).flatten()
    plain, shifted = plain[:, None] == plain, shifted[:, None] == shifted
    assert torch.equal(influence(stage.blocks[0], grid, 8), plain)
    assert torch.equal(influence(stage.blocks[1], grid, 8), shifted)
    assert torch.equal(influence(stage, grid, 8), (shifted.float() @ plain.float()) > 0)


def test_attention_cost_is_linear_in_the_image():
    model = create_model(TINY, device="meta")
    pairs = []
    for width in (448, 896, 1792):
        with count() as cost:
            model(torch.empty(1, 3, 224, width, device="meta"))
        pairs.append(cost.pairs)
    # windows of shifted blocks that the left and right borders clip are as many on any width: compare the increments
    assert pairs[2] - pairs[1] == 2 * (pairs[1] - pairs[0])


# --------------------------------------------------------------------------------------------------------------------
# published facts


def test_every_published_name_is_here():
    assert sorted(SIZES) == list_models("swin_*")


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts_equal_the_closed_form_and_the_published(name):
    dim, depths, window, classes = SIZES[name]
    total = 48 * dim + dim + 2 * dim
    for stage, depth in enumerate(depths):
        width = dim * 2**stage
        total += depth * (12 * width**2 + 13 * width + (2 * window - 1) ** 2 * width // 32)
        total += 8 * width**2 + 8 * width if stage < 3 else 2 * width + width * classes + classes
    assert count_parameters(create_model(name, device="meta")) == total == model_card(name).params
    assert total == PUBLISHED.get(name, total)


@pytest.mark.parametrize("name", [n for n in SIZES if "22k" not in n])
def test_multiply_adds_are_the_published_ones(name):
    card = model_card(name)
    assert multiply_adds(create_model(name, device="meta"), card.input_size) == pytest.approx(card.gmacs, rel=0.02)


def test_relative_bias_tables_are_kept_from_weight_decay():
    model = create_model(TINY, device="meta")
    names = model.no_weight_decay()
    assert names == {f"stages.{i}.blocks.{j}.mixer.op.bias.table" for i, d in enumerate((2, 2, 6, 2)) for j in range(d)}
    assert names <= dict(model.named_parameters()).keys()


def test_official_checkpoints_with_buffers_load_and_another_window_resizes_the_tables():
    weights = dict(tiny(TINY, **NARROW)[1])
    weights["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 9, 9)
    weights["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(9, 9, dtype=torch.long)
    assert load_checkpoint(create_model(TINY, num_classes=5, dtype=torch.float64, **NARROW), {"model": weights}) == "official"
    wider = create_model(TINY, num_classes=5, dtype=torch.float64, **NARROW | {"window_size": 5})
    load_checkpoint(wider, weights)
    table = weights["layers.1.blocks.0.attn.relative_position_bias_table"]  # as the official fine-tuning code does
    image = table.T.reshape(1, 4, 5, 5)
    resized = F.interpolate(image, (9, 9), mode="bicubic").reshape(4, 81).T
    got = export_state_dict(wider, "official")["layers.1.blocks.0.attn.relative_position_bias_table"]
    torch.testing.assert_close(got, resized)


# --------------------------------------------------------------------------------------------------------------------
# peers


@pytest.mark.peer
@pytest.mark.parametrize("size", [(224, 224), (236, 260)])
def test_equals_timm_under_its_weights(size):
    timm = peers.timm()
    options = {"depths": (2, 2, 3, 2), "num_classes": 7}
    theirs = timm.create_model(TINY, img_size=size, embed_dim=16, num_heads=(1, 2, 4, 8), **options).double()
    randomise(theirs)
    ours = create_model(TINY, dim=16, head_dim=16, pad="timm", dtype=torch.float64, **options).eval()
    assert load_checkpoint(ours, theirs.state_dict()) == "timm"
    exported = export_state_dict(ours, "timm")
    assert exported.keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, exported[key]) for key, value in theirs.state_dict().items())
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(ours(image), theirs(image), rtol=1e-12, atol=1e-12)
    if size == (224, 224):  # every grid divides: all paddings are one
        for pad in ("mask", "token"):
            other = create_model(TINY, dim=16, head_dim=16, pad=pad, dtype=torch.float64, **options).eval()
            load_checkpoint(other, exported)
            torch.testing.assert_close(other(image), theirs(image), rtol=1e-12, atol=1e-12)


@pytest.mark.peer
def test_published_size_equals_timm_with_its_own_initial_weights():
    timm = peers.timm()
    theirs = timm.create_model(TINY).eval()
    ours = create_model(TINY).eval()
    load_checkpoint(ours, theirs.state_dict())
    image = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(ours(image), theirs(image), rtol=1e-5, atol=1e-5)


def test_rolled_windows_equal_roll_then_pad_with_masks_of_the_padded_map():
    mixer = randomise(RolledWindowAttention(8, 2, 3, 1, dtype=torch.float64))
    weights = {"a.relative_position_bias_table": mixer.bias.table.flip(1, 2).permute(1, 2, 0).flatten(0, 1)}
    weights |= {f"a.{name}": value for name, value in mixer.state_dict().items()}
    x = torch.randn(1, 7, 8, 8, dtype=torch.float64)
    rolled = F.pad(x.roll((-1, -1), (1, 2)), [0, 0, 0, 1, 0, 2])
    shifted_already = rolled.roll((1, 1), (1, 2))
    expected = rolled_attention(shifted_already, weights, "a", 2, 3, 1, pad_first=False).roll((-1, -1), (1, 2))
    torch.testing.assert_close(mixer(x), expected[:, :7, :8].roll((1, 1), (1, 2)), rtol=1e-12, atol=1e-12)
