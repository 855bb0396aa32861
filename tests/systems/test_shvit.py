"""SHViT (5): one head among some channels equals its definition and timm; what is folded for inference changes nothing."""

import peers
import pytest
import torch
from naive_backbones import multiply_adds, randomise, tiny
from naive_conv_norm import classify, conv_norm, depthwise, feed_forward, naive_tokens
from torch import nn

from regard import create_model, lens, list_models, load_checkpoint
from regard.bench import count
from regard.layers.conv_norm import ResidualConvNorm, fuse
from regard.layers.mixers import PartialChannelAttention
from regard.models import count_parameters, export_state_dict, model_card
from regard.models.backbones.conv_norm_trunk import DistilledHead

SIZES = {  # parameters, dims, depths, parts
    "shvit_s1": (6_330_808, (128, 224, 320), (2, 4, 5), (None, 48, 68)),
    "shvit_s2": (11_483_072, (128, 308, 448), (2, 4, 5), (None, 66, 96)),
    "shvit_s3": (14_245_273, (192, 352, 448), (3, 5, 5), (None, 75, 96)),
    "shvit_s4": (16_588_484, (224, 336, 448), (4, 7, 6), (None, 72, 96)),
}
NARROW = {"dims": (16, 24, 20), "depths": (1, 2, 1), "parts": (None, 7, 6)}
DOUBLE = {"dtype": torch.float64}


def single_head(x, weights, name, part):
    """The branch of a block, one query after another."""
    mixed, rest = x[..., :part], x[..., part:]
    mean, var = mixed.mean((1, 2, 3), keepdim=True), mixed.var((1, 2, 3), unbiased=False, keepdim=True)
    normed = (mixed - mean) / (var + 1e-5).sqrt() * weights[f"{name}.pre_norm.weight"] + weights[f"{name}.pre_norm.bias"]
    q, k, v = conv_norm(normed, weights, f"{name}.qkv").split((16, 16, part), -1)
    k, v = k.flatten(1, 2), v.flatten(1, 2)
    attended = torch.empty_like(mixed)
    for row in range(x.shape[1]):
        for column in range(x.shape[2]):
            share = ((k * q[:, row, column, None]).sum(-1) / 4).exp()
            attended[:, row, column] = (share[..., None] * v).sum(1) / share.sum(1, keepdim=True)
    return conv_norm(torch.cat([attended, rest], -1).relu(), weights, f"{name}.proj.1")


def naive_block(x, weights, name, stage):
    x = depthwise(x, weights, f"{name}.conv")
    if NARROW["parts"][stage] is not None:
        x = x + single_head(x, weights, f"{name}.mixer.m", NARROW["parts"][stage])
    return feed_forward(x, weights, f"{name}.ffn")


def varied(model, size=(64, 96)):
    """The model with random weights and the statistics of random images, so that its logits depend on the image."""
    for module in randomise(model).train().modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.momentum = 1.0
    with torch.no_grad():
        model(torch.randn(8, 3, *size, dtype=next(model.parameters()).dtype))
    return model.eval()


def test_equals_the_definition_on_odd_sizes():
    model = varied(create_model("shvit_s1", num_classes=5, **NARROW, **DOUBLE))
    weights = export_state_dict(model, "official")
    image = torch.randn(2, 3, 75, 101, **DOUBLE)  # maps of 5 x 7, 3 x 4, 2 x 2
    with torch.no_grad():
        expected = classify(naive_tokens(image, weights, NARROW["depths"], naive_block), weights)
        torch.testing.assert_close(model(image), expected, rtol=1e-11, atol=1e-11)
    assert (expected[0] - expected[1]).abs().max() > 0.1


def test_only_the_part_that_attends_is_normalised():
    mixer = randomise(PartialChannelAttention(12, part=5, **DOUBLE))
    x = torch.randn(1, 4, 5, 12, **DOUBLE)
    louder, other = x.clone(), x.clone()
    louder[..., :5] = 1e3 * x[..., :5] + 70
    other[..., 5:] = 3 * x[..., 5:]
    first = nn.functional.group_norm(x[..., :5].movedim(-1, 1), 1, eps=0.0)  # what the norm makes of either, but for its eps
    mixer.norm.eps = 0.0
    torch.testing.assert_close(mixer(louder), mixer(x), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(first, nn.functional.group_norm(louder[..., :5].movedim(-1, 1), 1, eps=0.0))
    assert (mixer(other) - mixer(x)).abs().max() > 1e-2


def test_branches_start_as_nothing():
    model = create_model("shvit_s1", **NARROW).train()
    for stage, dim in zip(model.stages, NARROW["dims"], strict=True):
        x = torch.randn(2, 6, 5, dim)
        for block in stage.blocks:
            for name, part in block.named_children():
                y = part(x) if name == "mixer" else part(x.movedim(-1, 1)).movedim(1, -1)
                assert torch.equal(y, x), name
    assert (model.stages[1].downsample.conv_before(torch.randn(2, 16, 6, 5)) != 0).any()


def test_one_head_of_16_channels_sees_the_whole_map_in_the_later_stages():
    model = varied(create_model("shvit_s1", **NARROW))
    with lens.capture(model) as maps, count() as cost:
        model(torch.randn(1, 3, 112, 80))  # maps of 7 x 5, 4 x 3, 2 x 2
    assert [m.name.rsplit(".", 2)[0] for m in maps] == ["stages.1.blocks.0", "stages.1.blocks.1", "stages.2.blocks.0"]
    for found, (rows, columns) in zip(maps, ((4, 3), (4, 3), (2, 2)), strict=True):
        assert found.weights[0].shape == (1, 1, rows * columns, rows, columns)
        assert (found.weights[0] > 0).all()
        torch.testing.assert_close(found.weights[0].sum((-1, -2)), torch.ones(1, 1, rows * columns))
    assert cost.pairs == 2 * 12**2 + 4**2
    assert all(m.head_dim == 16 for m in model.modules() if isinstance(m, PartialChannelAttention))


def test_fusing_folds_every_batch_norm_and_changes_no_logit():
    image = torch.randn(2, 3, 75, 101)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        model = varied(create_model("shvit_s1", num_classes=5, dtype=dtype, **NARROW))
        with torch.no_grad():
            expected = model(image.to(dtype))
            before = count_parameters(model)
            fused = fuse(model)
            torch.testing.assert_close(fused(image.to(dtype)), expected, rtol=tolerance, atol=tolerance)
        assert not any(isinstance(m, (nn.BatchNorm2d, nn.BatchNorm1d, ResidualConvNorm)) for m in fused.modules())
        assert count_parameters(fused) < before


def test_a_distilled_head_gives_both_logits_in_training_and_their_mean_after():
    model = varied(create_model("shvit_s1", num_classes=5, distilled=True, **NARROW, **DOUBLE))
    weights = export_state_dict(model, "official")
    assert {"head.bn.weight", "head.l.bias", "head_dist.bn.running_var", "head_dist.l.weight"} <= weights.keys()
    image = torch.randn(2, 3, 64, 64, **DOUBLE)
    with torch.no_grad():
        tokens = naive_tokens(image, weights, NARROW["depths"], naive_block)
        expected = (classify(tokens, weights) + classify(tokens, weights, "head_dist")) / 2
        torch.testing.assert_close(model(image), expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(fuse(model)(image), expected, rtol=1e-11, atol=1e-11)
    labels, teacher = DistilledHead(4, 3).train()(torch.randn(6, 4))
    assert labels.shape == teacher.shape == (6, 3)


def test_another_mixer_gets_a_norm_and_leaves_the_first_stage_without_one():
    model = create_model("shvit_s1", num_classes=5, mixer="window", **NARROW)
    assert not hasattr(model.stages[0].blocks[0], "mixer")
    assert isinstance(model.stages[1].blocks[1].mixer.norm, nn.LayerNorm)


def test_the_classifier_can_be_replaced_and_removed():
    model = create_model("shvit_s1", num_classes=0, **NARROW).eval()
    image = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(image), model.forward_features(image).mean((1, 2)))
    weights = create_model("shvit_s1", num_classes=5, **NARROW).state_dict()
    assert load_checkpoint(model, weights) == "regard"
    model.reset_classifier(3)
    assert model(image).shape == (1, 3)
    with pytest.raises(ValueError, match=r"\(16, 24\), \(1, 2, 1\) and"):
        create_model("shvit_s1", **NARROW | {"dims": (16, 24)})
    with pytest.raises(ValueError, match="part=9, heads=2, dim=12"):
        PartialChannelAttention(12, 2, part=9)


# --------------------------------------------------------------------------------------------------------------------
# published facts


def test_every_published_size_is_here():
    assert sorted(SIZES) == list_models("shvit_*")


@pytest.mark.parametrize("name", SIZES)
def test_parameters_and_multiply_adds_are_the_published_ones(name):
    params, dims, depths, parts = SIZES[name]
    card, model = model_card(name), create_model(name, device="meta")
    assert count_parameters(model) == params == card.params
    assert [tuple(x) for x in zip(*((s.dim, s.depth) for s in model.spec.stages), strict=True)] == [dims, depths]
    assert [s.period[0].options.get("part") for s in model.spec.stages] == list(parts)
    assert multiply_adds(model, card.input_size) == pytest.approx(card.gmacs, rel=0.002)


def test_official_checkpoints_load_also_where_convolutions_are_stored_as_matrices():
    model, weights = tiny("shvit_s1", **NARROW)
    flat = {k: v[..., 0, 0] if v.shape[2:] == (1, 1) and ".se." not in k else v for k, v in weights.items()}
    assert sum(v.ndim == 2 for v in flat.values()) > 20
    for source in (weights, flat):
        other = create_model("shvit_s1", num_classes=5, **NARROW, **DOUBLE)
        assert load_checkpoint(other, {"model": source}) == "official"
        assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.peer
@pytest.mark.parametrize("size", [(224, 224), (75, 101)])
def test_equals_timm_under_its_weights(size):
    timm = peers.timm()
    theirs = timm.create_model(
        "shvit_s1", embed_dim=NARROW["dims"], depth=NARROW["depths"], partial_dim=(4, 7, 6), num_classes=7
    ).double()
    varied(theirs)
    ours = create_model("shvit_s1", num_classes=7, **NARROW, **DOUBLE).eval()
    assert load_checkpoint(ours, theirs.state_dict()) == "timm"
    exported = export_state_dict(ours, "timm")
    assert exported.keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, exported[key]) for key, value in theirs.state_dict().items())
    image = torch.randn(2, 3, *size, **DOUBLE)
    torch.testing.assert_close(ours(image), theirs(image), rtol=1e-11, atol=1e-11)
