"""EfficientViT (23): cascaded group attention equals its definition and timm; what is folded for inference changes nothing."""

import peers
import pytest
import torch
import torch.nn.functional as F
from naive_backbones import multiply_adds, randomise, tiny
from naive_conv_norm import classify, conv_norm, depthwise, feed_forward, naive_tokens
from torch import nn

from regard import create_mixer, create_model, lens, list_models, load_checkpoint
from regard.layers.conv_norm import ResidualConvNorm, fuse
from regard.layers.mixers import CascadedGroupAttention
from regard.models import count_parameters, export_state_dict, model_card

SIZES = {  # parameters, dims, depths, heads, query kernels
    "efficientvit_m0": (2_349_436, (64, 128, 192), (1, 2, 3), (4, 4, 4), (5, 5, 5, 5)),
    "efficientvit_m1": (2_980_560, (128, 144, 192), (1, 2, 3), (2, 3, 3), (7, 5, 3, 3)),
    "efficientvit_m2": (4_187_554, (128, 192, 224), (1, 2, 3), (4, 3, 2), (7, 5, 3, 3)),
    "efficientvit_m3": (6_900_722, (128, 240, 320), (1, 2, 3), (4, 3, 4), (5, 5, 5, 5)),
    "efficientvit_m4": (8_804_228, (128, 256, 384), (1, 2, 3), (4, 4, 4), (7, 5, 3, 3)),
    "efficientvit_m5": (12_473_772, (192, 288, 384), (1, 3, 4), (3, 3, 4), (7, 5, 3, 3)),
}
NARROW = {"dims": (16, 24, 20), "depths": (1, 2, 1), "heads": (2, 3, 1), "query_kernels": (5, 3, 3)}
WINDOWS = (3, 3, 2)
DOUBLE = {"dtype": torch.float64}


def cascade(x, weights, name, heads, size):
    """The heads of one window (batch, height, width, channels), one after another."""
    height, width, count = x.shape[1], x.shape[2], x.shape[1] * x.shape[2]
    place = [(row, column) for row in range(height) for column in range(width)]
    outputs = []
    for head, own in enumerate(x.chunk(heads, -1)):
        seen = own + outputs[-1] if head else own
        q, k, v = conv_norm(seen, weights, f"{name}.qkvs.{head}").split((16, 16, x.shape[-1] // heads), -1)
        q = conv_norm(q, weights, f"{name}.dws.{head}", groups=16)
        logits = q.flatten(1, 2) @ k.flatten(1, 2).transpose(1, 2) / 4
        for i in range(count):
            for j in range(count):
                down, across = abs(place[i][0] - place[j][0]), abs(place[i][1] - place[j][1])
                logits[:, i, j] += weights[f"{name}.attention_biases"][head, down * size + across]
        outputs.append((logits.softmax(-1) @ v.flatten(1, 2)).unflatten(1, (height, width)))
    return torch.cat(outputs, -1)


def windowed(x, weights, name, heads, size):
    """Zeros after the last tokens, and window after window."""
    rows, columns = x.shape[1:3]
    height, width = min(size, rows), min(size, columns)
    x = F.pad(x, [0, 0, 0, -columns % width, 0, -rows % height])
    out = torch.empty_like(x)
    for top in range(0, x.shape[1], height):
        for left in range(0, x.shape[2], width):
            cell = (slice(None), slice(top, top + height), slice(left, left + width))
            out[cell] = cascade(x[cell], weights, name, heads, size)
    return conv_norm(out[:, :rows, :columns].relu(), weights, f"{name}.proj.1")


def naive_block(x, weights, name, stage):
    x = feed_forward(depthwise(x, weights, f"{name}.dw0"), weights, f"{name}.ffn0")
    x = x + windowed(x, weights, f"{name}.mixer.m.attn", NARROW["heads"][stage], WINDOWS[stage])
    return feed_forward(depthwise(x, weights, f"{name}.dw1"), weights, f"{name}.ffn1")


def varied(model, size=(112, 96)):
    """The model with random weights and the statistics of random images, so that its logits depend on the image."""
    for module in randomise(model).train().modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.momentum = 1.0
    with torch.no_grad():
        model(torch.randn(8, 3, *size, dtype=next(model.parameters()).dtype))
    return model.eval()


@pytest.mark.parametrize("size", [(96, 96), (120, 75), (33, 150)])  # maps that divide, that do not, of less than a window
def test_equals_the_definition(size):
    model = varied(create_model("efficientvit_m0", num_classes=5, window_sizes=WINDOWS, **NARROW, **DOUBLE))
    weights = export_state_dict(model, "official")
    image = torch.randn(2, 3, *size, **DOUBLE)
    with torch.no_grad():
        expected = classify(naive_tokens(image, weights, NARROW["depths"], naive_block), weights)
        torch.testing.assert_close(model(image), expected, rtol=1e-11, atol=1e-11)
    assert (expected[0] - expected[1]).abs().max() > 0.1


# --------------------------------------------------------------------------------------------------------------------
# mechanism


def head_outputs(mixer, x):
    """What the heads find, before it is activated and projected: a tensor per head."""
    found = []
    handle = mixer.act.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    mixer(x)
    handle.remove()
    return found[0].movedim(1, -1).chunk(mixer.heads, -1)


def test_a_head_sees_its_own_channels_and_the_output_of_the_one_before():
    mixer = randomise(CascadedGroupAttention(12, 3, 3, **DOUBLE))
    x = torch.randn(2, 6, 3, 12, **DOUBLE)
    before = head_outputs(mixer, x)
    for changed in range(3):
        other = x.clone()
        other[..., 4 * changed : 4 * changed + 4] += torch.randn(2, 6, 3, 4, **DOUBLE)
        differ = [not torch.equal(a, b) for a, b in zip(head_outputs(mixer, other), before, strict=True)]
        assert differ == [head >= changed for head in range(3)]
    for head, found in enumerate(before):  # without the cascade, each head is a mixer of its own
        alone = CascadedGroupAttention(4, 1, 3, **DOUBLE).eval()
        alone.qkv[0], alone.query_conv[0] = mixer.qkv[head], mixer.query_conv[head]
        alone.bias.quadrant.data = mixer.bias.quadrant[head : head + 1]
        own = x[..., 4 * head : 4 * head + 4]
        assert torch.allclose(head_outputs(alone, own)[0], found) == (head == 0)
        if head:
            torch.testing.assert_close(head_outputs(alone, own + before[head - 1])[0], found)


def test_one_head_is_window_attention_of_all_channels():
    mixer = randomise(CascadedGroupAttention(8, 1, 3, query_kernels=(1,), **DOUBLE))
    for norm in (mixer.qkv[0].norm, mixer.query_conv[0].norm):
        norm.reset_running_stats()
        norm.eps = 0.0
        nn.init.ones_(norm.weight)
        nn.init.zeros_(norm.bias)
    nn.init.ones_(mixer.query_conv[0].conv.weight)
    plain = create_mixer("window", dim=8, heads=1, window_size=3, head_dim=16, value_dim=8, qkv_bias=False, **DOUBLE)
    with torch.no_grad():
        plain.qkv.weight.copy_(mixer.qkv[0].conv.weight[..., 0, 0])
        plain.bias.table.copy_(mixer.bias.table)
        plain.proj.weight.copy_(torch.eye(8))
        plain.proj.bias.zero_()
    x = torch.randn(2, 6, 9, 8, **DOUBLE)
    torch.testing.assert_close(head_outputs(mixer, x)[0], plain(x))


def test_the_bias_belongs_to_distances_and_is_read_anew_each_time():
    mixer = randomise(CascadedGroupAttention(8, 2, 4, **DOUBLE))
    table = mixer.bias.table
    assert table.shape == (2, 7, 7)
    for down in range(-3, 4):
        for across in range(-3, 4):
            assert torch.equal(table[:, 3 + down, 3 + across], mixer.bias.quadrant[:, abs(down), abs(across)])
    x = torch.randn(1, 4, 4, 8, **DOUBLE)
    before = mixer(x)
    with torch.no_grad():
        mixer.bias.quadrant[:, 1, 2] += 1.0
    assert (mixer(x) - before).abs().max() > 1e-6


def test_captured_maps_stay_inside_the_windows():
    model = varied(create_model("efficientvit_m0", window_sizes=WINDOWS, **NARROW))
    with lens.capture(model, layers="stages.0.*") as maps:
        model(torch.randn(1, 3, 96, 96))  # 6 x 6
    assert [m.call for m in maps] == [0, 1]  # heads, one by one
    weights = maps[1].weights[0][0, 0]
    assert weights.shape == (36, 6, 6)
    torch.testing.assert_close(weights[3 * 6 + 1, 3:, :3].sum(), torch.tensor(1.0))


# --------------------------------------------------------------------------------------------------------------------
# inference, other tables


def test_fusing_folds_every_batch_norm_and_changes_no_logit():
    image = torch.randn(2, 3, 120, 75)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        model = varied(create_model("efficientvit_m0", num_classes=5, window_sizes=WINDOWS, dtype=dtype, **NARROW))
        with torch.no_grad():
            expected = model(image.to(dtype))
            fused = fuse(model)
            torch.testing.assert_close(fused(image.to(dtype)), expected, rtol=tolerance, atol=tolerance)
        assert not any(isinstance(m, (nn.BatchNorm2d, nn.BatchNorm1d, ResidualConvNorm)) for m in fused.modules())


def test_blocks_start_as_the_identity():
    model = create_model("efficientvit_m0", **NARROW).train()
    for stage, dim in zip(model.stages, NARROW["dims"], strict=True):
        x = torch.randn(2, 6, 5, dim)
        assert torch.equal(stage.blocks(x), x)


def test_another_mixer_gets_a_norm():
    model = create_model("efficientvit_m0", num_classes=5, mixer="window", device="meta")
    assert all(isinstance(b.mixer.norm, nn.LayerNorm) for stage in model.stages for b in stage.blocks)


def test_misfits_are_named():
    with pytest.raises(ValueError, match=r"dim=8, heads=4, query_kernels=\(3, 3\)"):
        CascadedGroupAttention(8, 4, query_kernels=(3, 3))
    with pytest.raises(ValueError, match=r"expected x \(batch, rows, columns, 8\); got \(2, 3, 8\)"):
        CascadedGroupAttention(8, 2)(torch.randn(2, 3, 8))
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(7, 7, 4\)"):
        create_model("efficientvit_m0", heads=(2, 3))


# --------------------------------------------------------------------------------------------------------------------
# published facts


def test_every_published_size_is_here():
    assert sorted(SIZES) == list_models("efficientvit_m*")


@pytest.mark.parametrize("name", SIZES)
def test_parameters_and_multiply_adds_are_the_published_ones(name):
    params, dims, depths, heads, kernels = SIZES[name]
    card, model = model_card(name), create_model(name, device="meta")
    assert count_parameters(model) == params == card.params
    assert [tuple(x) for x in zip(*((s.dim, s.depth, s.heads) for s in model.spec.stages), strict=True)] == [
        dims,
        depths,
        heads,
    ]
    for stage in model.stages:
        mixer = stage.blocks[0].mixer.op
        assert [conv.conv.kernel_size[0] for conv in mixer.query_conv] == list(kernels[: mixer.heads])
        assert mixer.head_dim == 16
    assert multiply_adds(model, 224) == pytest.approx(card.gmacs, abs=0.0006)


def test_biases_are_kept_from_weight_decay_and_resized_to_other_windows():
    model, weights = tiny("efficientvit_m0", window_sizes=WINDOWS, **NARROW)
    assert model.no_weight_decay() == {
        f"stages.{i}.blocks.{j}.mixer.op.bias.quadrant" for i, j in ((0, 0), (1, 0), (1, 1), (2, 0))
    }
    assert weights["blocks1.0.mixer.m.attn.attention_biases"].shape == (2, 9)
    weights = weights | {"blocks1.0.mixer.m.attn.attention_bias_idxs": torch.zeros(9, 9, dtype=torch.long)}
    wider = create_model("efficientvit_m0", num_classes=5, window_sizes=(5, 3, 2), **NARROW, **DOUBLE)
    assert load_checkpoint(wider, {"model": weights}) == "official"
    small = weights["blocks1.0.mixer.m.attn.attention_biases"].reshape(1, 2, 3, 3)
    got = wider.state_dict()["stages.0.blocks.0.mixer.op.bias.quadrant"]
    torch.testing.assert_close(got, F.interpolate(small, (5, 5), mode="bicubic")[0])


# --------------------------------------------------------------------------------------------------------------------
# peers


@pytest.mark.peer
@pytest.mark.parametrize("size", [(224, 224), (290, 250)])  # 14, 7, 4; and maps that no window divides
def test_equals_timm_under_its_weights(size):
    timm = peers.timm()
    options = {"embed_dim": (16, 24, 20), "depth": (1, 2, 1), "num_heads": (2, 3, 1), "kernels": (5, 3, 3, 3)}
    theirs = timm.create_model("efficientvit_m0", num_classes=7, **options).double()
    varied(theirs, (224, 224))
    ours = create_model("efficientvit_m0", num_classes=7, **NARROW, **DOUBLE).eval()
    assert load_checkpoint(ours, theirs.state_dict()) == "timm"
    exported = export_state_dict(ours, "timm")
    assert exported.keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, exported[key]) for key, value in theirs.state_dict().items())
    image = torch.randn(2, 3, *size, **DOUBLE)
    torch.testing.assert_close(ours(image), theirs(image), rtol=1e-11, atol=1e-11)


@pytest.mark.peer
@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_equal_timm(name):
    timm = peers.timm()
    theirs = randomise(timm.create_model(name))
    ours = create_model(name).eval()
    assert load_checkpoint(ours, theirs.state_dict()) == "timm"
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = theirs(image)
        torch.testing.assert_close(ours(image), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
