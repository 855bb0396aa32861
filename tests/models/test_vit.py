"""Vision Transformer and DeiT: equal to their definition and to timm, on any size, with tokens outside the grid."""

import math

import peers
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regard import create_model, list_models, load_checkpoint
from regard.models import count_parameters, export_state_dict, model_card

NAME = "deit_tiny_patch16_224"
NARROW = {"dim": 16, "depth": 3, "head_dim": 8, "num_classes": 5}
SIZES = {"tiny": (192, 12), "small": (384, 12), "base": (768, 12), "large": (1024, 24)}
PUBLISHED = {
    "deit_tiny_patch16_224": 5_717_416,
    "deit_small_patch16_224": 22_050_664,
    "deit_base_patch16_224": 86_567_656,
    "vit_large_patch16_224": 304_326_632,
}


def make(name=NAME, **options):
    """A narrow float64 model whose every parameter matters."""
    model = create_model(name, dtype=torch.float64, **NARROW | options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def image(height=224, width=224, batch=2):
    return torch.randn(batch, 3, height, width, dtype=torch.float64)


def norm(x, w, name):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)


def attention(x, w, name, heads):
    q, k, v = (x @ w[f"{name}.qkv.weight"].T + w[f"{name}.qkv.bias"]).chunk(3, -1)
    width = q.shape[-1] // heads
    out = []
    for head in range(heads):
        at = slice(head * width, (head + 1) * width)
        out.append((q[..., at] @ k[..., at].transpose(1, 2) / math.sqrt(width)).softmax(-1) @ v[..., at])
    return torch.cat(out, -1) @ w[f"{name}.proj.weight"].T + w[f"{name}.proj.bias"]


def naive(x, w, heads=2, depth=3, patch=16):
    """The definition, on the official names; positions of a class token each, then of a square grid."""
    x = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=patch)
    grid, classes = x.shape[2:], [name for name in ("cls_token", "dist_token") if name in w]
    places = w["pos_embed"][:, len(classes) :].transpose(1, 2)
    side = math.isqrt(places.shape[-1])
    places = F.interpolate(places.unflatten(2, (side, side)), tuple(grid), mode="bicubic").flatten(2).transpose(1, 2)
    x = x.flatten(2).transpose(1, 2) + places
    outer = [w[name] + w["pos_embed"][:, i : i + 1] for i, name in enumerate(classes)]
    outer += [w["reg_token"]] if "reg_token" in w else []
    x = torch.cat([t.expand(len(x), -1, -1) for t in outer] + [x], 1)
    for i in range(depth):
        x = x + attention(norm(x, w, f"blocks.{i}.norm1"), w, f"blocks.{i}.attn", heads)
        hidden = norm(x, w, f"blocks.{i}.norm2") @ w[f"blocks.{i}.mlp.fc1.weight"].T + w[f"blocks.{i}.mlp.fc1.bias"]
        x = x + F.gelu(hidden) @ w[f"blocks.{i}.mlp.fc2.weight"].T + w[f"blocks.{i}.mlp.fc2.bias"]
    x = norm(x, w, "norm")
    heads = [
        x[:, i] @ w[f"{name}.weight"].T + w[f"{name}.bias"] for i, name in enumerate(("head", "head_dist")[: len(classes)])
    ]
    return sum(heads) / len(heads), x


@pytest.mark.parametrize("size", [(224, 224), (96, 160)])
@pytest.mark.parametrize("options", [{}, {"distilled": True}, {"registers": 3}, {"distilled": True, "registers": 2}], ids=repr)
def test_equals_the_definition_on_any_grid_with_tokens_of_any_kind(options, size):
    model, x = make(**options), image(*size)
    logits, tokens = naive(x, export_state_dict(model, "official"))
    torch.testing.assert_close(model(x), logits, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(model.forward_features(x), tokens, rtol=1e-11, atol=1e-11)
    prefix = 1 + options.get("distilled", 0) + options.get("registers", 0)
    assert model.num_prefix_tokens == prefix
    (maps,) = model.get_intermediate_layers(x, 1, reshape=True, norm=True)
    expected = tokens[:, prefix:].transpose(1, 2).unflatten(2, (size[0] // 16, size[1] // 16))
    torch.testing.assert_close(maps, expected, rtol=1e-11, atol=1e-11)


def test_sizes_that_do_not_divide_are_padded_at_the_bottom_and_on_the_right():
    model, x = make(), image(61, 83)
    assert torch.equal(model(x), model(F.pad(x, [0, 13, 0, 3])))  # bitwise: the same operators on the same shapes


@pytest.mark.parametrize("name", [name for family in ("vit_*", "deit_*") for name in list_models(family)])
def test_parameter_counts_equal_the_closed_form_and_the_published(name):
    family, size = name.split("_")[:2]
    dim, depth = SIZES[size]
    card, classes = model_card(name), 1 + ("distilled" in name)
    total = 768 * dim + dim + (classes + (card.input_size // 16) ** 2) * dim + classes * dim
    total += depth * (12 * dim**2 + 13 * dim) + 2 * dim + classes * 1000 * (dim + 1)
    assert count_parameters(create_model(name, device="meta")) == total == card.params
    assert total == PUBLISHED.get(name, total)
    assert create_model(name, device="meta").spec.drop_path == {"vit": 0.0, "deit": 0.1}[family]


def test_the_two_heads_of_a_distilled_model_are_averaged_and_stand_apart_for_training():
    model, x = make(distilled=True), image(48, 48)
    tokens = model.forward_features(x)
    apart = model.forward_heads(tokens)
    torch.testing.assert_close(apart[0], model.head(tokens[:, 0]))
    torch.testing.assert_close(apart[1], model.head_dist(tokens[:, 1]))
    torch.testing.assert_close(model(x), (apart[0] + apart[1]) / 2)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), tokens[:, :2].mean(1))
    bare = create_model(NAME, dtype=torch.float64, **NARROW | {"num_classes": 0, "distilled": True})
    load_checkpoint(bare, make(distilled=True).state_dict())
    model.reset_classifier(9)
    assert model(x).shape == (2, 9)


def test_maps_of_a_cut_transformer_are_those_of_the_whole():
    torch.manual_seed(3)
    whole = create_model(NAME, **NARROW).eval()
    torch.manual_seed(3)
    cut = create_model(NAME, features_only=True, out_indices=(1, -3), **NARROW).eval()
    x = torch.randn(1, 3, 61, 44)
    expected = whole.get_intermediate_layers(x, (0, 1), reshape=True)
    assert all(torch.equal(a, b) for a, b in zip(cut(x), expected, strict=True))  # bitwise: the same operators
    assert [(i["num_chs"], i["reduction"], i["module"]) for i in cut.feature_info] == [
        (16, 16, f"stages.0.blocks.{i}") for i in (0, 1)
    ]
    assert len(cut.blocks) == 2
    load_checkpoint(cut, export_state_dict(whole, "official"))


def test_recomputing_blocks_changes_no_gradient():
    model, x = make(drop_path_rate=0.0).train(), image(64, 48)
    gradients = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-12, atol=1e-12)


def test_tables_and_class_tokens_are_kept_from_weight_decay():
    model = create_model(NAME, device="meta", distilled=True, registers=2)
    assert model.no_weight_decay() == {"positions.table", "cls_token", "dist_token", "reg_token"}
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()


@pytest.mark.peer
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_equals_timm_under_its_weights(name):
    theirs = peers.timm().create_model(name, depth=3, num_classes=7).double().eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.1)
    ours = create_model(name, depth=3, num_classes=7, dtype=torch.float64).eval()
    load_checkpoint(ours, theirs.state_dict())
    exported = export_state_dict(ours, "timm")
    assert exported.keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, exported[key]) for key, value in theirs.state_dict().items())
    x = image(batch=1)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-11, atol=1e-11)


def test_bad_input_is_told():
    model = create_model(NAME, **NARROW)
    with pytest.raises(ValueError, match=r"expected images \(batch, 3, height, width\); got \(3, 61, 44\)"):
        model(torch.randn(3, 61, 44))
    with pytest.raises(ValueError, match="stages are 0 to 2"):
        model.get_intermediate_layers(torch.randn(1, 3, 32, 32), [3])
