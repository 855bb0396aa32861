"""Keys for TokenCut out of models of other libraries: what their own projections give, and what the same weights give here."""

import peers
import pytest
import torch

from regard import create_model, load_checkpoint
from regard.lens import capture
from regard.studies.tokencut import find_objects
from regard.studies.tokencut.cutting import last_keys

COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}


def transformers_model(name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    models = {
        "vit": (transformers.ViTModel, transformers.ViTConfig, {"intermediate_size": 48}),
        "dinov2": (transformers.Dinov2Model, transformers.Dinov2Config, {}),
        "registers": (transformers.Dinov2WithRegistersModel, transformers.Dinov2WithRegistersConfig, {}),
        "clip": (transformers.CLIPVisionModel, transformers.CLIPVisionConfig, {"intermediate_size": 48}),
    }
    kind, config, options = models[name]
    return kind(config(**COMMON, **options)).double().eval()


def projected(model, images, suffixes, **options):
    """What the last of the linear layers with such a name gives, for all tokens: ``(batch, tokens, channels)``."""
    seen = {}
    layers = [layer for name, layer in model.named_modules() if name.endswith(suffixes)]
    handle = layers[-1].register_forward_hook(lambda module, given, output: seen.update(output=output))
    with torch.no_grad():
        model(images, **options)
    handle.remove()
    return seen["output"]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("name", "before"), [("vit", 1), ("dinov2", 1), ("registers", 5), ("clip", 1)])
def test_keys_of_transformers_models_are_what_their_last_key_layer_gives(name, before, implementation):
    model = transformers_model(name)
    model.set_attn_implementation(implementation)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = projected(model, images, (".key", ".k_proj"))[:, before:]
    torch.testing.assert_close(last_keys(model, images), expected.unflatten(1, (4, 4)))


def test_a_transformers_model_finds_objects_at_another_size_with_boxes_in_pixels():
    model = transformers_model("dinov2")
    images = torch.randn(2, 3, 45, 61, dtype=torch.float64)  # 5 x 7 whole patches of 8; the rest is cut off
    first, _ = find_objects(model, images)
    assert first.mask.shape == (5, 7)
    rows, columns = first.mask.nonzero().unbind(1)
    edges = (columns.min() * 8, rows.min() * 8, (columns.max() + 1) * 8, (rows.max() + 1) * 8)
    assert first.box == tuple(int(edge) for edge in edges)


@pytest.mark.peer
@pytest.mark.parametrize("fused", [True, False])
def test_timms_vit_gives_the_keys_of_the_same_weights_here(fused):
    timm = peers.timm()
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}
    theirs = timm.models.vision_transformer.VisionTransformer(**options).double().eval()
    for block in theirs.blocks:
        block.attn.fused_attn = fused
    ours = create_model("dino_vits8", dim=24, depth=2, head_dim=8, image_size=32).double().eval()
    load_checkpoint(ours, theirs.state_dict())
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    got = last_keys(theirs, images)
    expected = projected(theirs, images, ".qkv")[:, 1:, 24:48]
    torch.testing.assert_close(got, expected.unflatten(1, (4, 4)))
    torch.testing.assert_close(got, last_keys(ours, images))
    assert [found.box for found in find_objects(theirs, images)] == [found.box for found in find_objects(ours, images)]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_keys_inside_windows_are_put_back_on_their_grid(implementation):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.SwinConfig(
        image_size=36, patch_size=4, embed_dim=16, depths=[2], num_heads=[2], window_size=4
    )  # a grid of 9 x 9, which windows of 4 pad; the last block shifts them
    model = transformers.SwinModel(config).double().eval()
    model.set_attn_implementation(implementation)
    images = torch.randn(2, 3, 36, 36, dtype=torch.float64)
    seen = {}
    block = model.encoder.layers[0].blocks[-1]
    handle = block.layernorm_before.register_forward_hook(lambda module, given, output: seen.update(x=output))
    with torch.no_grad(), capture(model, lazy=True) as maps:
        model(images)
    handle.remove()
    (key,) = (layer for name, layer in block.named_modules() if name.endswith((".key", ".k_proj")))
    expected = (seen["x"] @ key.weight.T + key.bias).unflatten(1, (9, 9)).unflatten(-1, (2, 8))
    torch.testing.assert_close(maps[-1].keys[0], expected)
    torch.testing.assert_close(last_keys(model, images), expected.flatten(-2))


def test_keys_need_what_a_lazy_capture_keeps():
    model = create_model("dino_vits8", dim=16, depth=1, head_dim=8, image_size=32).eval()
    with torch.no_grad(), capture(model) as maps:
        model(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"keys of 'stages\..*op' were not kept: capture\(model, lazy=True\)"):
        _ = maps[0].keys
    with torch.no_grad(), capture(model, lazy=True) as maps:
        model(torch.randn(1, 3, 32, 32))
    grid, outer = maps
    assert [tuple(k.shape) for k in grid.keys] == [(1, *shape, 2, 8) for shape in grid.k_grids]
    assert outer.grid == (1,)
