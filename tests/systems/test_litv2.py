"""LITv2 (19): HiLo equals windows and pooled tokens computed one by one, deformable merging its published sampling."""

import math
import time

import pytest
import torch
import torch.nn.functional as F
from naive_backbones import batch_norm, conv, layer_norm, linear, multiply_adds, patches, randomise, tiny

from regard import create_mixer, create_model, list_models
from regard.bench import count
from regard.models import count_parameters, load_checkpoint, model_card
from regard.models.backbones.lit import DeformableMerging

SIZES = {  # dim, depths, published parameters
    "litv2_small": (96, (2, 2, 6, 2), 27_844_000),
    "litv2_medium": (96, (2, 2, 18, 2), 48_830_368),
    "litv2_base": (128, (2, 2, 18, 2), 86_520_704),
    "litv2_base_384": (128, (2, 2, 18, 2), 86_520_704),
}
NARROW = {"dim": 8, "head_dim": 4, "depths": (2, 1, 2, 1), "window_sizes": (None, None, 3, 1)}


# --------------------------------------------------------------------------------------------------------------------
# the definition


def attend_rows(q, k, v):
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v


def heads(x, count):
    return x.unflatten(-1, (count, -1)).transpose(-2, -3)


def naive_hilo(x, weights, name, total, size, alpha, *, pad=False):
    """One image; windows are visited one by one, each pools to one token."""
    rows, columns, dim = x.shape
    width = dim // total
    low = total if size == 1 else int(total * alpha)
    if pad:
        x = F.pad(x, [0, 0, 0, -columns % size, 0, -rows % size])
    cells = [
        (slice(top, min(top + size, x.shape[0])), slice(left, min(left + size, x.shape[1])))
        for top in range(0, x.shape[0], size)
        for left in range(0, x.shape[1], size)
    ]
    parts = []
    if low < total:
        high = x.new_empty(*x.shape[:2], (total - low) * width)
        for cell in cells:
            q, k, v = (
                heads(part, total - low) for part in linear(x[cell].flatten(0, 1), weights, f"{name}.h_qkv").chunk(3, -1)
            )
            high[cell] = attend_rows(q, k, v).transpose(0, 1).reshape(high[cell].shape)
        parts.append(linear(high, weights, f"{name}.h_proj"))
    if low:
        q = heads(linear(x.flatten(0, 1), weights, f"{name}.l_q"), low)
        pooled = torch.stack([x[cell].flatten(0, 1).mean(0) for cell in cells])
        k, v = (heads(part, low) for part in linear(pooled, weights, f"{name}.l_kv").chunk(2, -1))
        y = attend_rows(q, k, v).transpose(0, 1).reshape(*x.shape[:2], low * width)
        parts.append(linear(y, weights, f"{name}.l_proj"))
    return torch.cat(parts, -1)[:rows, :columns]


def at(x, row, column):
    """The token at whole coordinates, zero outside."""
    inside = 0 <= row < x.shape[0] and 0 <= column < x.shape[1]
    return x[row, column] if inside else torch.zeros_like(x[0, 0])


def naive_merging(x, weights, name, *, drop=False):
    """The deformable convolution of one image, tap by tap; offsets come as (row, column) of each tap in row-major order.

    The last of an odd number of rows is filled up to a square, or none is made of it.
    """
    if not drop:
        x = F.pad(x, [0, 0, 0, x.shape[1] % 2, 0, x.shape[0] % 2])
    offsets = conv(x[None], weights, f"{name}.dconv.conv_offset", stride=2)[0]
    kernel, out = weights[f"{name}.dconv.weight"], []
    for row in range(x.shape[0] // 2):
        for column in range(x.shape[1] // 2):
            total = weights[f"{name}.dconv.bias"]
            for tap, (i, j) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
                y = 2 * row + i + offsets[row, column, 2 * tap].item()
                z = 2 * column + j + offsets[row, column, 2 * tap + 1].item()
                top, left = math.floor(y), math.floor(z)
                sample = sum(
                    (1 - abs(y - near_y)) * (1 - abs(z - near_z)) * at(x, near_y, near_z)
                    for near_y in (top, top + 1)
                    for near_z in (left, left + 1)
                )
                total = total + kernel[:, :, i, j] @ sample
            out.append(total)
    merged = torch.stack(out).reshape(x.shape[0] // 2, x.shape[1] // 2, -1)
    return F.gelu(batch_norm(merged, weights, f"{name}.norm_layer"))


def naive_litv2(image, weights, depths, sizes, *, alpha=0.9, pad=False):
    x = layer_norm(patches(image, weights, "patch_embed.proj", 4), weights, "patch_embed.norm")
    for stage, (depth, size) in enumerate(zip(depths, sizes, strict=True)):
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}"
            if size is not None:
                normed = layer_norm(x, weights, f"{name}.norm1")
                total = x.shape[-1] // 4
                x = x + torch.stack([naive_hilo(each, weights, f"{name}.attn", total, size, alpha, pad=pad) for each in normed])
            hidden = linear(layer_norm(x, weights, f"{name}.norm2"), weights, f"{name}.mlp.fc1")
            hidden = F.gelu(conv(hidden, weights, f"{name}.mlp.dwconv.dwconv", groups=hidden.shape[-1]))
            x = x + linear(hidden, weights, f"{name}.mlp.fc2")
        if stage < len(depths) - 1:
            x = torch.stack([naive_merging(each, weights, f"layers.{stage}.downsample", drop=pad) for each in x])
    return linear(layer_norm(x, weights, "norm").mean((1, 2)), weights, "head")


@pytest.mark.parametrize(("pad", "size"), [("mask", (96, 96)), ("mask", (61, 83)), ("token", (61, 83))])
def test_equals_the_definition_token_by_token(pad, size):
    model, weights = tiny("litv2_small", **NARROW, pad=pad, alpha=0.7)
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = naive_litv2(image, weights, NARROW["depths"], NARROW["window_sizes"], alpha=0.7, pad=pad == "token")
    torch.testing.assert_close(model(image), expected, rtol=1e-10, atol=1e-10)


# --------------------------------------------------------------------------------------------------------------------
# HiLo


def hilo(**options):
    return randomise(create_mixer("hilo", dim=16, heads=4, dtype=torch.float64, **options))


def official(mixer):
    names = {"high.": "h_", "low.": "l_"}
    return {f"a.{names[k[: k.index('.') + 1]]}{k.split('.', 1)[1]}": v for k, v in mixer.state_dict().items()}


@pytest.mark.parametrize("pad", ["mask", "token"])
@pytest.mark.parametrize(("grid", "size"), [((4, 6), 2), ((7, 5), 3), ((3, 9), 4)])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_mixer_equals_windows_and_pooled_tokens_one_by_one(alpha, grid, size, pad):
    mixer = hilo(alpha=alpha, window_size=size, pad=pad)
    x = torch.randn(2, *grid, 16, dtype=torch.float64)
    expected = [naive_hilo(each, official(mixer), "a", 4, size, alpha, pad=pad == "token") for each in x]
    torch.testing.assert_close(mixer(x), torch.stack(expected), rtol=1e-11, atol=1e-11)


def test_windows_of_one_token_are_multi_head_attention_with_all_heads():
    mixer, dense = hilo(window_size=1, alpha=0.5), create_mixer("multi_head", dim=16, heads=4, dtype=torch.float64)
    assert mixer.high is None
    low = mixer.low
    weight, bias = torch.cat([low.q.weight, low.kv.weight]), torch.cat([low.q.bias, low.kv.bias])
    dense.load_state_dict({"qkv.weight": weight, "qkv.bias": bias, "proj.weight": low.proj.weight, "proj.bias": low.proj.bias})
    x = torch.randn(2, 5, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), dense(x), rtol=1e-12, atol=1e-12)


def test_high_frequencies_are_local_and_low_ones_global():
    mixer = hilo(window_size=3, alpha=0.5)
    x = torch.randn(1, 7, 8, 16, dtype=torch.float64, requires_grad=True)
    y = mixer(x)
    for part, everywhere in ((y[0, 4, 4, :8], False), (y[0, 4, 4, 8:], True)):
        seen = torch.autograd.grad(part.sum(), x, retain_graph=True)[0][0].abs().sum(-1) > 0
        expected = torch.full((7, 8), everywhere)
        expected[3:6, 3:6] = True
        assert torch.equal(seen, expected)


@pytest.mark.parametrize(("total", "size", "low"), [(12, 2, 10), (24, 2, 21), (24, 1, 24), (16, 2, 14), (3, 2, 2)])
def test_heads_are_shared_out_as_published(total, size, low):
    mixer = create_mixer("hilo", dim=32 * total, heads=total, window_size=size, alpha=0.9, device="meta")
    assert mixer.low.heads == low
    assert (0 if mixer.high is None else mixer.high.heads) == total - low
    assert mixer.low.head_dim == 32


@pytest.mark.parametrize("size", [1, 2, 4])
def test_cost_is_the_closed_form_and_below_dense_attention(size):
    n, dim, total = 16, 48, 4
    mixer = create_mixer("hilo", dim=dim, heads=total, window_size=size, alpha=0.5)
    flops = 0
    for group in mixer.groups:
        share, keys = dim * group.heads // total, n * n // size**2
        layers = 3 * n * n * dim * share if group is mixer.high else n * n * dim * share + 2 * keys * dim * share
        flops += layers + n * n * share**2 + 2 * n * n * (size**2 if group is mixer.high else keys) * share
    measured = 0

    def add(module, inputs, output):
        nonlocal measured
        measured += output.numel() * module.in_features

    for layer in (m for m in mixer.modules() if isinstance(m, torch.nn.Linear)):
        layer.register_forward_hook(add)
    with count() as cost:
        mixer(torch.randn(1, n, n, dim))
    assert measured + cost.flops // 2 == flops
    dense = 4 * n * n * dim**2 + 2 * (n * n) ** 2 * dim
    assert flops == dense if size == 1 else flops < dense


@pytest.mark.slow
def test_hilo_is_faster_than_dense_attention_at_1024_tokens():
    x = torch.randn(1, 32, 32, 384)

    def best(mixer):
        times = []
        with torch.no_grad():
            for _ in range(8):
                start = time.perf_counter()
                mixer(x)
                times.append(time.perf_counter() - start)
        return min(times)

    fast = best(create_mixer("hilo", dim=384, heads=12, window_size=2, alpha=0.9))
    assert fast < best(create_mixer("multi_head", dim=384, heads=12))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"window_size": 0}, "window_size must be at least 1; got int 0"),
        ({"pad": "zero"}, "got 'zero'"),
        ({"heads": 3}, "dim=16, heads=3"),
    ],
)
def test_wrong_options_are_told(options, told):
    with pytest.raises(ValueError, match=told):
        create_mixer("hilo", **{"dim": 16, "heads": 4} | options)


# --------------------------------------------------------------------------------------------------------------------
# merging


def test_merging_starts_as_a_plain_convolution():
    torch.manual_seed(0)
    merging = DeformableMerging(6, 10, dtype=torch.float64).eval()
    assert not merging.offset.weight.any()
    x = torch.randn(2, 5, 8, 6, dtype=torch.float64)
    plain = merging.conv(F.pad(x, [0, 0, 0, 0, 0, 1]).movedim(-1, 1)).movedim(1, -1)
    torch.testing.assert_close(merging(x), F.gelu(merging.norm(plain)), rtol=1e-12, atol=1e-12)


def test_taps_may_be_moved_to_the_row_that_no_square_is_made_of():
    torch.manual_seed(0)
    merging = randomise(DeformableMerging(6, 10, pad="token", dtype=torch.float64)).eval()
    x = torch.randn(1, 5, 4, 6, dtype=torch.float64, requires_grad=True)
    merging.offset.weight.data.zero_()
    merging.offset.bias.data.zero_()
    assert merging(x).shape == (1, 2, 2, 10)
    torch.testing.assert_close(merging(x), F.gelu(merging.norm(merging.conv(x.movedim(-1, 1)).movedim(1, -1))))
    merging.offset.bias.data[::2] = 1.0  # all taps one row down
    (gradient,) = torch.autograd.grad(merging(x).sum(), x)
    assert gradient[:, 4].any()
    assert not gradient[:, 0].any()


@pytest.mark.parametrize("pad", ["mask", "token"])
def test_merging_leaves_something_of_a_single_row(pad):
    merging = DeformableMerging(6, 10, pad=pad)
    assert merging(torch.randn(2, 1, 8, 6)).shape == (2, 1, 4, 10)
    assert merging(torch.randn(2, 1, 1, 6)).shape == (2, 1, 1, 10)
    assert merging(torch.randn(2, 1, 5, 6)).shape == (2, 1, 3 if pad == "mask" else 2, 10)


def test_official_weights_bring_how_the_release_merges_odd_maps():
    model, weights = tiny("litv2_small", **NARROW)
    load_checkpoint(model, weights)
    assert {each.pad for each in model.modules() if isinstance(each, DeformableMerging)} == {"token"}


def test_offsets_learn_where_to_look():
    merging = randomise(DeformableMerging(6, 10, dtype=torch.float64))
    x = torch.randn(1, 8, 8, 6, dtype=torch.float64, requires_grad=True)
    merging.offset.weight.data.zero_()
    merging.offset.bias.data = torch.tensor([0.0, 3.0] * 4, dtype=torch.float64)  # all taps three columns to the right
    seen = torch.autograd.grad(merging(x)[0, 1, 1].sum(), x)[0][0].abs().sum(-1) > 0
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[2:4, 5:7] = True
    own = torch.zeros(8, 8, dtype=torch.bool)
    own[2:4, 2:4] = True
    assert torch.equal(seen & ~own, expected & ~own)


# --------------------------------------------------------------------------------------------------------------------
# published facts


def test_every_published_name_is_here():
    assert sorted(SIZES) == list_models("litv2_*")


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts_equal_the_closed_form_and_the_published(name):
    dim, depths, published = SIZES[name]
    total = 48 * dim + dim + 2 * dim
    for stage, depth in enumerate(depths):
        width = dim * 2**stage
        heads = width // 32
        low = {2: int(0.9 * heads), 3: heads}.get(stage, 0) * 32
        high = width - low
        attention = 3 * (width + 1) * width + high**2 + low**2 + width + 2 * width
        channels = 8 * width**2 + 4 * width + width + 40 * width + 2 * width
        total += depth * (channels + (attention if stage > 1 else 0))
        merging = 4 * width * 8 + 8 + 4 * width * 2 * width + 2 * width + 4 * width
        total += merging if stage < 3 else 2 * width + 1000 * width + 1000
    assert count_parameters(create_model(name, device="meta")) == total == published == model_card(name).params


@pytest.mark.parametrize("name", SIZES)
def test_multiply_adds_are_the_published_ones(name):
    card = model_card(name)
    model = create_model(name, device="meta")
    assert multiply_adds(model, card.input_size) == pytest.approx(card.gmacs, rel=0.02)


def test_official_names_are_those_of_the_release():
    _, weights = tiny("litv2_small", **NARROW)
    for name in (
        "patch_embed.proj.weight", "patch_embed.norm.bias", "layers.0.blocks.1.norm2.weight",
        "layers.0.blocks.0.mlp.dwconv.dwconv.weight", "layers.0.downsample.dconv.weight", "layers.0.downsample.dconv.bias",
        "layers.0.downsample.dconv.conv_offset.weight", "layers.0.downsample.norm_layer.running_mean",
        "layers.2.blocks.0.attn.h_qkv.weight", "layers.2.blocks.0.attn.h_proj.bias", "layers.2.blocks.1.attn.l_q.bias",
        "layers.2.blocks.0.attn.l_kv.weight", "layers.3.blocks.0.attn.l_proj.weight", "norm.weight", "head.bias",
    ):  # fmt: skip
        assert name in weights
    assert "layers.0.blocks.0.norm1.weight" not in weights
    assert "layers.3.blocks.0.attn.h_qkv.weight" not in weights
