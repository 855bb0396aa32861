"""DaViT (1): windows and channel groups equal their definition, timm, and the published facts."""

import peers
import pytest
import torch
import torch.nn.functional as F
from naive_backbones import conv, dense_attention, layer_norm, linear, mlp, multiply_adds, randomise, tiny
from torch.utils.flop_counter import FlopCounterMode

from regard import create_mixer, create_model, list_models, load_checkpoint
from regard.bench import count
from regard.models import count_parameters, export_state_dict, model_card

TINY = "davit_tiny"
SIZES = {  # dim, depths
    "davit_tiny": (96, (1, 1, 3, 1)),
    "davit_small": (96, (1, 1, 9, 1)),
    "davit_base": (128, (1, 1, 9, 1)),
    "davit_large": (192, (1, 1, 9, 1)),
}
PUBLISHED = {"davit_tiny": 28_360_168, "davit_small": 49_745_896, "davit_base": 87_954_408}
NARROW = {"dim": 8, "head_dim": 4, "depths": (1, 2), "window_size": 3}


# --------------------------------------------------------------------------------------------------------------------
# the definition


def window_attention(x, weights, name, heads, size, *, padded):
    """Windows without positions; clipped, or of a map that zero tokens fill up."""
    rows, columns = x.shape[1:3]
    if padded:
        x = F.pad(x, [0, 0, 0, -columns % size, 0, -rows % size])
    down, right = torch.meshgrid(torch.arange(x.shape[1]), torch.arange(x.shape[2]), indexing="ij")
    label = (down // size * 1000 + right // size).flatten()
    mixed = dense_attention(x, weights, name, heads, label[:, None] == label, lambda _: 0.0)
    return mixed[:, :rows, :columns]


def channel_attention(x, weights, name, heads):
    """Channel i of a group's keys asks the channels of its values, and takes from those of its queries."""
    q, k, v = (t.unflatten(-1, (heads, -1)) for t in linear(x.flatten(1, 2), weights, f"{name}.qkv").chunk(3, -1))
    out = torch.zeros_like(q)
    for head in range(heads):
        for i in range(q.shape[-1]):
            scores = (k[:, :, head, i, None] * v[:, :, head]).sum(1) * q.shape[-1] ** -0.5
            out[:, :, head, i] = (scores.softmax(-1)[:, None] * q[:, :, head]).sum(-1)
    return linear(out.flatten(2), weights, f"{name}.proj").unflatten(1, x.shape[1:3])


def naive_davit(image, weights, depths, heads, size, *, padded):
    x = image.permute(0, 2, 3, 1)
    x = F.pad(x, [0, 0, 0, -x.shape[2] % 4, 0, -x.shape[1] % 4])
    x = layer_norm(conv(x, weights, "patch_embeds.0.proj", stride=4), weights, "patch_embeds.0.norm")
    for stage, depth in enumerate(depths):
        if stage:  # the norm comes before the convolution, and the zeros after the norm
            x = layer_norm(x, weights, f"patch_embeds.{stage}.norm")
            x = F.pad(x, [0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2])
            x = conv(x, weights, f"patch_embeds.{stage}.proj", stride=2)
        for block in range(depth):
            for kind in (0, 1):
                name = f"main_blocks.{stage}.{block}.{kind}"
                x = x + conv(x, weights, f"{name}.cpe.0.proj", groups=x.shape[-1])
                normed = layer_norm(x, weights, f"{name}.norm1")
                if kind == 0:
                    x = x + window_attention(normed, weights, f"{name}.attn", heads[stage], size, padded=padded)
                else:
                    x = x + channel_attention(normed, weights, f"{name}.attn", heads[stage])
                x = x + conv(x, weights, f"{name}.cpe.1.proj", groups=x.shape[-1])
                normed = layer_norm(x, weights, f"{name}.norm2")
                x = x + mlp(normed, weights, f"{name}.mlp.fc1", f"{name}.mlp.fc2")
    return linear(layer_norm(x.mean((1, 2)), weights, "norms"), weights, "head")


@pytest.mark.parametrize("size", [(48, 72), (37, 50), (70, 5)])
@pytest.mark.parametrize("pad", ["mask", "token"])
def test_equals_the_definition_on_any_size(size, pad):
    model, weights = tiny(TINY, **NARROW, pad=pad)
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = naive_davit(image, weights, (1, 2), (2, 4), 3, padded=pad == "token")
    torch.testing.assert_close(model(image), expected, rtol=1e-12, atol=1e-12)
    other = naive_davit(image, weights, (1, 2), (2, 4), 3, padded=pad == "mask")
    assert size == (48, 72) or (other - expected).abs().max() > 1e-4


# --------------------------------------------------------------------------------------------------------------------
# mechanism


def test_channel_attention_follows_any_permutation_of_tokens():
    mixer = randomise(create_mixer("channel_group", dim=12, heads=3, dtype=torch.float64))
    x = torch.randn(2, 30, 12, dtype=torch.float64)
    order = torch.randperm(30)
    torch.testing.assert_close(mixer(x[:, order]), mixer(x)[:, order], rtol=1e-12, atol=1e-12)
    # one token moves all: the affinities are sums over the image
    moved = x.clone()
    moved[:, 7] += 1.0
    assert (mixer(moved) - mixer(x)).abs().amax((0, 2)).min() > 1e-6


def test_without_position_convolutions_a_pixel_depends_on_its_window_alone():
    model, _ = tiny(TINY, **NARROW)
    spatial = model.stages[0].blocks[0]
    x = torch.randn(1, 9, 9, 8, dtype=torch.float64, requires_grad=True)
    for module, around in ((torch.nn.Sequential(spatial.mixer, spatial.mlp), 0), (spatial, 1)):
        (gradient,) = torch.autograd.grad(module(x)[0, 4, 4].sum(), x)
        touched = torch.zeros(9, 9, dtype=torch.bool)
        touched[3 - around : 6 + around, 3 - around : 6 + around] = True
        assert torch.equal(gradient[0].abs().sum(-1) > 1e-13, touched)


def test_costs_are_linear_in_tokens():
    model = create_model(TINY, device="meta")
    pairs = []
    for width in (224, 448, 896):
        with count() as cost:
            model(torch.empty(1, 3, 224, width, device="meta"))
        pairs.append(cost.pairs)
    assert pairs == [pairs[0] * factor for factor in (1, 2, 4)]
    mixer = create_mixer("channel_group", dim=32, heads=4, device="meta")
    for tokens in (10, 1000):
        with FlopCounterMode(display=False) as flops:
            mixer(torch.empty(1, tokens, 32, device="meta"))
        assert flops.get_total_flops() == 2 * tokens * (4 * 32**2 + 2 * 32 * 8)  # projections; affinities and mixing


def test_stochastic_depth_grows_over_windows_and_channels_alike():
    model = create_model(TINY, device="meta", depths=(1, 2), drop_path_rate=0.5)
    rates = [block.mixer.drop_path.p for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


# --------------------------------------------------------------------------------------------------------------------
# published facts


def test_every_published_name_is_here():
    assert sorted(SIZES) == list_models("davit_*")


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts_equal_the_closed_form_and_the_published(name):
    dim, depths = SIZES[name]
    total = 3 * 49 * dim + dim + 2 * dim
    for stage, depth in enumerate(depths):
        width = dim * 2**stage
        if stage:
            total += width + 4 * (width // 2) * width + width
        total += 2 * depth * (12 * width**2 + 13 * width + 2 * 10 * width)
    total += 2 * width + 1000 * width + 1000
    assert count_parameters(create_model(name, device="meta")) == total == model_card(name).params
    assert total == PUBLISHED.get(name, total)


@pytest.mark.parametrize("name", SIZES)
def test_multiply_adds_are_the_published_ones(name):
    card = model_card(name)
    assert multiply_adds(create_model(name, device="meta"), card.input_size) == pytest.approx(card.gmacs, rel=0.02)


# --------------------------------------------------------------------------------------------------------------------
# peers


@pytest.mark.peer
@pytest.mark.parametrize("size", [(96, 96), (70, 53)])
def test_equals_timm_under_its_weights(size):
    timm = peers.timm()
    theirs = timm.create_model(
        TINY, embed_dims=(16, 32), num_heads=(2, 4), depths=(1, 2), window_size=3, num_classes=7
    ).double()
    randomise(theirs)
    ours = create_model(
        TINY, dim=16, head_dim=8, depths=(1, 2), window_size=3, pad="token", num_classes=7, dtype=torch.float64
    ).eval()
    assert load_checkpoint(ours, theirs.state_dict()) == "timm"
    exported = export_state_dict(ours, "timm")
    assert exported.keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, exported[key]) for key, value in theirs.state_dict().items())
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(ours(image), theirs(image), rtol=1e-12, atol=1e-12)


@pytest.mark.peer
def test_official_names_are_those_that_timm_reads():
    timm = peers.timm()
    from timm.models.davit import checkpoint_filter_fn

    model, weights = tiny(TINY, **NARROW)
    converted = checkpoint_filter_fn(dict(weights), None)
    expected = export_state_dict(model, "timm")
    assert timm
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[key], value) for key, value in expected.items())


@pytest.mark.peer
def test_published_size_equals_timm_with_its_own_initial_weights():
    timm = peers.timm()
    theirs = timm.create_model(TINY).eval()
    ours = create_model(TINY).eval()
    assert load_checkpoint(ours, theirs.state_dict()) == "timm"
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs(image), rtol=1e-5, atol=1e-5)
