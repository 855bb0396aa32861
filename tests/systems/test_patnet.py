"""PATNet (30): a convolution of some channels beside attention of the others equals its definition, whatever is folded."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from naive_backbones import batch_norm, conv, layer_norm, linear, multiply_adds, randomise, tiny
from sklearn.datasets import load_digits
from torch import nn

from regard import create_model, lens, list_models, load_checkpoint
from regard.layers.conv_norm import ConvNorm, fuse
from regard.layers.positions import DistanceBias
from regard.models import Backbone, BlockSpec, count_parameters, export_state_dict, model_card
from regard.models.backbones.patnet import PartialChannelGate, PartialMixer, PartialSelfAttention, patnet

SIZES = {  # parameters, dim, depths, heads, activation, spatial gate
    "patnet_t0": (3_486_160, 32, (1, 2, 8, 2), 4, nn.GELU, False),
    "patnet_t1": (6_144_876, 48, (1, 2, 8, 2), 6, nn.GELU, True),
    "patnet_t2": (12_270_464, 64, (2, 2, 6, 4), 6, nn.ReLU, False),
    "patnet_s": (28_013_952, 96, (2, 2, 9, 4), 6, nn.ReLU, False),
    "patnet_m": (59_179_648, 128, (2, 3, 16, 4), 6, nn.ReLU, False),
    "patnet_l": (100_641_984, 160, (2, 3, 20, 4), 6, nn.ReLU, False),
}
NARROW = {"dim": 8, "depths": (1, 1, 2, 2), "heads": 4, "hidden_features": 24}
DOUBLE = {"dtype": torch.float64}


def channel_gate(x, weights, name):
    """PAT_ch: statistics of each channel, a full matrix for the means and one for the deviations."""
    points = x.flatten(1, 2)
    count = points.shape[1]
    mean = points.sum(1) / count
    deviation = ((points - mean[:, None]).square().sum(1) / max(1, count - 1)).sqrt()
    matrix = weights[f"{name}.attn.cfc1.weight"]
    logits = batch_norm(mean @ matrix[:, :, 0, 0].T + deviation @ matrix[:, :, 0, 1].T, weights, f"{name}.attn.bn")
    return batch_norm(x * ((logits + 3) / 6).clamp(0, 1)[:, None, None], weights, f"{name}.norm")


def bucket(distance):
    """The index of the bias, counted from that of distance zero."""
    distance = round(distance)
    if distance <= 20:
        return distance
    return min(40, round(20 + 20 * math.log(distance / 20) / math.log(160 / 20)))


def self_attention(x, weights, name, heads):
    """PAT_sf: every token sees every token, with a bias of the rounded distance."""
    rows, columns = x.shape[1:3]
    tokens = layer_norm(x, weights, f"{name}.norm", 1e-6).flatten(1, 2)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in linear(tokens, weights, f"{name}.attn.qkv").chunk(3, -1))
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    for i in range(rows * columns):
        for j in range(rows * columns):
            distance = math.hypot(i // columns - j // columns, i % columns - j % columns)
            logits[:, :, i, j] += weights[f"{name}.attn.rpe_k.lookup_table_bias"][:, 40 + bucket(distance)]
    mixed = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return linear(mixed, weights, f"{name}.attn.proj").unflatten(1, (rows, columns))


def naive_mlp(x, weights, name, act, spatial_gate):
    x = conv(act(batch_norm(conv(x, weights, f"{name}.0"), weights, f"{name}.1")), weights, f"{name}.3")
    if not spatial_gate:
        return x
    gated, projected = x.chunk(2, -1)
    factor = ((conv(gated, weights, f"{name}.4.conv_attn") + 3) / 6).clamp(0, 1)
    gated = batch_norm(gated * factor, weights, f"{name}.4.norm")
    return torch.cat([gated, conv(batch_norm(projected, weights, f"{name}.4.norm2"), weights, f"{name}.4.conv")], -1)


def squares(x, weights, conv_name, norm_name, size):
    """Non-overlapping squares of tokens, each projected by itself."""
    x = F.pad(x, [0, 0, 0, -x.shape[2] % size, 0, -x.shape[1] % size])
    x = x.unflatten(2, (-1, size)).unflatten(1, (-1, size)).permute(0, 1, 3, 5, 2, 4).flatten(3)
    return batch_norm(x @ weights[f"{conv_name}.weight"].flatten(1).T, weights, norm_name)


def naive_patnet(image, weights, depths, heads, act, spatial_gate):
    x = squares(image.permute(0, 2, 3, 1), weights, "patch_embed.proj", "patch_embed.norm", 4)
    for stage, depth in enumerate(depths):
        for block in range(depth):
            name = f"stages.{2 * stage}.blocks.{block}"
            mixing, quarter = f"{name}.spatial_mixing", x.shape[-1] // 4
            first = conv(x[..., :quarter], weights, f"{mixing}.partial_conv3")
            if stage < 3:
                y = torch.cat([first, channel_gate(x[..., quarter:], weights, mixing)], -1)
            else:
                x = y = x + torch.cat([first, self_attention(x[..., quarter:], weights, mixing, heads)], -1)
            x = x + naive_mlp(y, weights, f"{name}.mlp", act, spatial_gate)
        if stage < len(depths) - 1:
            x = squares(x, weights, f"stages.{2 * stage + 1}.reduction", f"stages.{2 * stage + 1}.norm", 2)
    pooled = x.mean((1, 2)) @ weights["avgpool_pre_head.1.weight"][..., 0, 0].T
    return linear(act(pooled), weights, "head")


@pytest.mark.parametrize(("name", "act"), [("patnet_t0", F.gelu), ("patnet_t1", F.gelu), ("patnet_t2", F.relu)])
def test_equals_the_definition_on_odd_sizes(name, act):
    model, weights = tiny(name, **NARROW)
    image = torch.randn(2, 3, 75, 101, **DOUBLE)  # maps of 19 x 26, 10 x 13, 5 x 7, 3 x 4
    expected = naive_patnet(image, weights, NARROW["depths"], 4, act, SIZES[name][-1])
    torch.testing.assert_close(model(image), expected, rtol=1e-11, atol=1e-11)
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    assert ("stages.6.blocks.1.mlp.4.norm2.weight" in weights) == SIZES[name][-1]


# --------------------------------------------------------------------------------------------------------------------
# mechanism


@pytest.mark.parametrize("kind", [PartialChannelGate, PartialSelfAttention])
def test_the_parts_do_not_see_each_other(kind):
    mixer = randomise(kind(16, heads=2, **DOUBLE))
    x, other = torch.randn(1, 5, 6, 16, **DOUBLE), torch.randn(1, 5, 6, 16, **DOUBLE)
    y = mixer(x)
    assert torch.equal(mixer(torch.cat([x[..., :4], other[..., 4:]], -1))[..., :4], y[..., :4])  # bitwise: the same operators
    assert torch.equal(mixer(torch.cat([other[..., :4], x[..., 4:]], -1))[..., 4:], y[..., 4:])
    expected = F.conv2d(x[..., :4].permute(0, 3, 1, 2), mixer.conv.weight, padding=1).permute(0, 2, 3, 1)
    torch.testing.assert_close(y[..., :4], expected)


def test_a_partial_convolution_costs_a_sixteenth_of_a_whole_one():
    mixer = PartialChannelGate(64)
    assert 16 * mixer.conv.weight.numel() == nn.Conv2d(64, 64, 3).weight.numel()


def test_the_gate_of_a_constant_map_depends_on_its_mean_alone():
    mixer = randomise(PartialChannelGate(16, **DOUBLE))
    x = torch.randn(1, 1, 1, 16, **DOUBLE).expand(1, 5, 6, 16)
    before = mixer(x)
    with torch.no_grad():
        mixer.gate.fc.weight[:, 12:] += 1.0  # those of the deviations
    torch.testing.assert_close(mixer(x), before)  # deviations of a constant are the roots of its rounding
    varied = x + torch.randn(1, 5, 6, 16, **DOUBLE)
    with_deviations = mixer(varied)
    with torch.no_grad():
        mixer.gate.fc.weight[:, 12:] -= 1.0
    assert not torch.allclose(mixer(varied), with_deviations)


@pytest.mark.parametrize("size", [(4, 4), (32, 32)])
def test_maps_of_one_place_train(size):
    model = create_model("patnet_t1", num_classes=5, **NARROW).train()
    model(torch.randn(4, 3, *size)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_distance_bias_rounds_and_shares_what_is_far():
    bias = DistanceBias(2, **DOUBLE)
    nn.init.normal_(bias.table)
    table = bias.over((1, 400)).table
    assert table.shape == (2, 1, 799)
    for offset in range(-399, 400):
        assert torch.equal(table[:, 0, 399 + offset], bias.table[:, 40 + bucket(abs(offset))])
    assert bucket(20) == 20
    assert [bucket(d) for d in (21, 40, 160, 399)] == [20, 27, 40, 40]
    table = bias.over((7, 5)).table
    for down in range(-6, 7):
        for across in range(-4, 5):
            assert torch.equal(table[:, 6 + down, 4 + across], bias.table[:, 40 + bucket(math.hypot(down, across))])


def test_captured_maps_of_the_last_stage_see_every_token():
    model = randomise(create_model("patnet_t0", **NARROW))
    with lens.capture(model) as maps:
        model(torch.randn(1, 3, 96, 128))
    assert [m.name for m in maps] == [f"stages.3.blocks.{j}.mixer.op.attention" for j in range(2)]
    assert maps[0].weights[0].shape == (1, 4, 12, 3, 4)
    torch.testing.assert_close(maps[0].weights[0].sum((-1, -2)), torch.ones(1, 4, 12))


def test_attention_drops_out_in_training_only():
    mixer = randomise(PartialSelfAttention(16, 2)).train()
    x = torch.randn(2, 5, 6, 16)
    assert not torch.equal(mixer(x), mixer(x))
    mixer.eval()
    assert torch.equal(mixer(x), mixer(x))


# --------------------------------------------------------------------------------------------------------------------
# inference, other tables


def test_fusing_folds_convolutions_and_changes_no_logit():
    image = torch.randn(2, 3, 75, 101)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        model = randomise(create_model("patnet_t1", num_classes=5, dtype=dtype, **NARROW))
        with torch.no_grad():
            expected = model(image.to(dtype))
            fused = fuse(model)
            torch.testing.assert_close(fused(image.to(dtype)), expected, rtol=tolerance, atol=tolerance)
        assert not any(isinstance(m, ConvNorm) for m in fused.modules())


def test_another_mixer_gets_a_norm_and_a_branch_of_its_own():
    model = create_model("patnet_t1", num_classes=5, mixer="window", device="meta")
    assert all(isinstance(b.mixer.norm, nn.LayerNorm) and not b.shared for stage in model.stages for b in stage.blocks)


def test_misfits_are_named():
    with pytest.raises(ValueError, match="dim must be a multiple of 4; got 10"):
        PartialChannelGate(10)
    with pytest.raises(ValueError, match=r"expected x \(batch, rows, columns, 8\); got \(2, 3, 8\)"):
        PartialChannelGate(8)(torch.randn(2, 3, 8))
    with pytest.raises(ValueError, match="dim=12, heads=5"):
        PartialSelfAttention(16, 5)


# --------------------------------------------------------------------------------------------------------------------
# published facts


def test_every_published_size_is_here():
    assert sorted(SIZES) == list_models("patnet_*")


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts_are_those_of_the_release(name):
    params, dim, depths, heads, act, spatial_gate = SIZES[name]
    card, model = model_card(name), create_model(name, device="meta")
    assert count_parameters(model) == params == card.params
    assert [(s.dim, s.depth) for s in model.spec.stages] == [(dim * 2**i, depth) for i, depth in enumerate(depths)]
    last = model.stages[-1].blocks[-1]
    assert last.mixer.op.attention.heads == heads
    assert isinstance(last.mlp.expand.act, act)
    assert isinstance(last.mlp.gate, nn.Identity) != spatial_gate
    assert multiply_adds(model, 224) == pytest.approx(card.gmacs, rel=0.002)


def test_official_checkpoints_load_and_save():
    model, weights = tiny("patnet_t1", **NARROW)
    assert weights["stages.2.blocks.0.spatial_mixing.attn.cfc1.weight"].shape == (12, 12, 1, 2)
    assert weights["avgpool_pre_head.1.weight"].shape == (24, 64, 1, 1)
    other = create_model("patnet_t1", num_classes=5, **NARROW, **DOUBLE)
    assert load_checkpoint(other, {"state_dict": weights}) == "official"
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())
    again = export_state_dict(other, "official")
    assert again.keys() == weights.keys()
    assert all(torch.equal(v, again[k]) for k, v in weights.items())
    assert load_checkpoint(create_model("patnet_t1", num_classes=0, **NARROW, **DOUBLE), weights) == "official"


class Untouched(PartialMixer):
    """FasterNet: the other channels stay as they are."""

    def __init__(self, dim, heads=1, **factory):
        super().__init__(dim, **factory)

    def mix_rest(self, x):
        return x


def digits():
    images, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return F.interpolate(images[order], (32, 32), mode="bilinear"), torch.from_numpy(labels)[order]


def accuracy(model, images, labels, epochs):
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(epochs):
        model.train()
        for chosen in torch.randperm(600).split(50):
            optimiser.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimiser.step()
    model.eval()
    with torch.no_grad():
        return (model(images[600:]).argmax(1) == labels[600:]).double().mean().item()


@pytest.mark.slow
def test_attention_of_the_other_channels_is_worth_it_at_the_same_width():
    images, labels = digits()
    found = {"patnet": [], "fasternet": []}
    for seed in range(3):
        for name, results in found.items():
            torch.manual_seed(seed)
            spec = patnet(16, (1, 1, 2, 1), hidden_features=64, num_classes=10)
            if name == "fasternet":
                spec = replace(spec, stages=tuple(replace(s, period=(BlockSpec(Untouched),)) for s in spec.stages))
            results.append(accuracy(Backbone(spec, in_chans=1), images, labels, epochs=4))
    mean = {name: sum(results) / 3 for name, results in found.items()}
    assert mean["patnet"] >= mean["fasternet"], found
    assert mean["patnet"] > 0.8
