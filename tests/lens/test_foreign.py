"""Models of other libraries: their weights are those they compute themselves, and nothing of theirs changes."""

import peers
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regard.hosts.transformers import INTERFACE
from regard.hosts.windows import window_index
from regard.lens import capture, image_map, relevance, rollout


def joined(maps, name):
    """The whole matrix ``(batch, heads, tokens, tokens)`` of a module, tokens without a place first."""
    grid, *outer = (found for found in maps if found.name == name)
    order = [grid] if not outer else [outer[0], grid]
    rows = []
    for found in order:
        sources = [w.flatten(3) for w in found.weights]
        rows.append(torch.cat(sources[::-1], -1))
    return torch.cat(rows, 2)


# --------------------------------------------------------------------------------------------------------------------
# transformers


def tiny_transformers():
    transformers = pytest.importorskip("transformers", reason="its models are looked into")
    common = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    return {
        "vit": transformers.ViTForImageClassification(transformers.ViTConfig(**common, intermediate_size=48, num_labels=5)),
        "dinov2": transformers.Dinov2Model(transformers.Dinov2Config(**common)),
        "registers": transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**common)),
        "clip": transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**common, intermediate_size=48)),
        "swin": transformers.SwinModel(
            transformers.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=3)
        ),
    }


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["vit", "dinov2", "registers", "clip"])
def test_weights_of_transformers_models_are_their_eager_attentions(name, implementation):
    model = tiny_transformers()[name].eval()
    model.set_attn_implementation(implementation)
    x = torch.randn(2, 3, 32, 32)
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    with torch.no_grad():
        plain = model(pixel_values=x)[0]
        with capture(model) as maps:
            watched = model(pixel_values=x)[0]
        assert torch.equal(plain, watched)  # bitwise: the same operators on the same shapes
        assert all(a is m.config for a, m in zip(configs, (m for m in model.modules() if hasattr(m, "config")), strict=True))
        model.set_attn_implementation("eager")
        expected = model(pixel_values=x, output_attentions=True).attentions
    names = list(dict.fromkeys(found.name for found in maps))
    assert len(names) == len(expected) == 2
    for layer, weights in zip(names, expected, strict=True):
        torch.testing.assert_close(joined(maps, layer), weights, rtol=0, atol=1e-6)
    assert maps[0].grid == (4, 4)
    assert maps[0].reduction == 8
    shown = image_map(maps[1])
    assert shown.map.shape[-2:] == (32, 32)
    torch.testing.assert_close(shown.map.sum((-2, -1)), shown.shares[..., 0])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_windows_of_a_transformers_swin_are_put_back_on_their_grid(implementation):
    model = tiny_transformers()["swin"].eval()
    model.set_attn_implementation(implementation)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = model(pixel_values=x)[0]
        with capture(model) as maps:
            watched = model(pixel_values=x)[0]
        model.set_attn_implementation("eager")
        windows = model(pixel_values=x, output_attentions=True)
    assert torch.equal(plain, watched)  # bitwise: the same operators on the same shapes
    assert [(found.grid, found.k_grids) for found in maps] == [((16, 16), ((16, 16),))] * 2 + [((8, 8), ((8, 8),))] * 2
    # of stage one, whose attentions are those of the last block, shifted by one, padded to 18 and cut into windows of 3
    weights = windows.attentions[0].unflatten(0, (2, 36))
    for y in range(16):
        for z in range(0, 16, 5):
            row, column = (y - 1) % 18, (z - 1) % 18
            window, token = row // 3 * 6 + column // 3, row % 3 * 3 + column % 3
            expected = torch.zeros(2, 2, 18, 18)
            for key in range(9):
                at = (window // 6 * 3 + key // 3 + 1) % 18, (window % 6 * 3 + key % 3 + 1) % 18
                expected[:, :, *at] = weights[:, window, :, token, key]
            found = maps[1].weights[0][:, :, y * 16 + z]
            torch.testing.assert_close(found, expected[:, :, :16, :16], rtol=0, atol=1e-6)


def test_transformers_models_are_left_as_they_were_after_an_error():
    transformers = pytest.importorskip("transformers", reason="its models are looked into")
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = list(ALL_ATTENTION_FUNCTIONS)
    model = transformers.ViTModel(
        transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8)
    )
    configs = [m.config for m in model.modules() if hasattr(m, "config")]
    with pytest.raises(ZeroDivisionError), capture(model):
        raise ZeroDivisionError
    assert set(ALL_ATTENTION_FUNCTIONS) - set(before) <= {INTERFACE}  # a name that no module asks for
    assert all(a is m.config for a, m in zip(configs, (m for m in model.modules() if hasattr(m, "config")), strict=True))


@pytest.mark.parametrize("name", ["vit", "clip"])
def test_gradients_by_the_weights_of_transformers_models_are_those_of_their_eager_graph(name):
    model = tiny_transformers()[name].eval()
    x = torch.randn(2, 3, 32, 32)
    with capture(model, gradients=True) as maps:
        model(pixel_values=x.clone().requires_grad_())[0].flatten(1)[:, 0].sum().backward()
    model.set_attn_implementation("eager")
    output = model(pixel_values=x, output_attentions=True)
    gradients = torch.autograd.grad(output[0].flatten(1)[:, 0].sum(), output.attentions, allow_unused=True)
    names = list(dict.fromkeys(found.name for found in maps))
    for layer, expected in zip(names, gradients, strict=True):
        grid, outer = (found for found in maps if found.name == layer)
        found = torch.cat([torch.cat([g.flatten(3) for g in m.gradients[::-1]], -1) for m in (outer, grid)], 2)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


# --------------------------------------------------------------------------------------------------------------------
# like timm


@pytest.mark.peer
@pytest.mark.parametrize("fused", [True, False])
def test_weights_of_a_timm_transformer_are_those_its_dropout_sees(fused):
    timm = peers.timm()
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=5, reg_tokens=2, qk_norm=True
    ).eval()
    x = torch.randn(2, 3, 32, 32)
    for block in model.blocks:
        block.attn.fused_attn = fused
    with torch.no_grad():
        plain = model(x)
        with capture(model) as maps:
            watched = model(x)
    assert torch.equal(plain, watched)  # bitwise: the same operators on the same shapes
    assert not any("forward" in vars(module) for module in model.modules())
    expected, hooks = [], []
    for block in model.blocks:
        block.attn.fused_attn = False
        hooks.append(block.attn.attn_drop.register_forward_hook(lambda _, inputs, output: expected.append(output)))
    with torch.no_grad():
        model(x)
    assert maps[0].grid == (4, 4)
    assert maps[0].k_grids == ((4, 4), (3,))
    for layer, weights in enumerate(expected):
        torch.testing.assert_close(joined(maps, f"blocks.{layer}.attn"), weights, rtol=0, atol=1e-6)
    shares = rollout(maps)
    torch.testing.assert_close(shares.cells.sum((1, 2, 3)) + shares.outside.sum((1, 2)), torch.ones(2))


@pytest.mark.peer
@pytest.mark.parametrize("fused", [True, False])
def test_gradients_by_the_weights_of_a_timm_transformer(fused):
    timm = peers.timm()
    model = timm.models.VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3).eval()
    for block in model.blocks:
        block.attn.fused_attn = fused
    x = torch.randn(2, 3, 16, 16)
    with capture(model, gradients=True) as maps:
        model(x)[:, 1].sum().backward()
    kept = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, inputs, output: kept.append(output))
    answer = model(x)[:, 1].sum()
    for layer, expected in enumerate(torch.autograd.grad(answer, kept)):
        grid, outer = (found for found in maps if found.name == f"blocks.{layer}.attn")
        found = torch.cat([torch.cat([g.flatten(3) for g in m.gradients[::-1]], -1) for m in (outer, grid)], 2)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert relevance(model, x, 1).cells.shape == (2, 1, 2, 2)


@pytest.mark.peer
@pytest.mark.parametrize("fused", [True, False])
def test_windows_of_a_timm_swin_are_put_back_on_their_grid(fused):
    timm = peers.timm()
    model = timm.models.SwinTransformer(
        img_size=40, patch_size=4, embed_dim=16, depths=(2,), num_heads=(2,), window_size=4, num_classes=3
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    blocks = model.layers[0].blocks
    for block in blocks:
        block.attn.fused_attn = fused
    x = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        plain = model(x)
        with capture(model) as maps:
            watched = model(x)
    assert torch.equal(plain, watched)  # bitwise: the same operators on the same shapes
    kept = []
    for block in blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, inputs, output: kept.append(output))
    with torch.no_grad():
        model(x)
    for found, windows, shift in zip(maps, kept, (0, 2), strict=True):
        assert found.grid == (10, 10)
        assert found.reduction == 4
        windows = windows.unflatten(0, (2, 9))
        expected = torch.zeros(2, 2, 100, 12, 12)
        for y in range(10):
            for z in range(10):
                row, column = (y - shift) % 10, (z - shift) % 10
                window, token = row // 4 * 3 + column // 4, row % 4 * 4 + column % 4
                for key in range(16):
                    at = window // 3 * 4 + key // 4, window % 3 * 4 + key % 4
                    if max(at) < 10:
                        place = (at[0] + shift) % 10, (at[1] + shift) % 10
                        expected[:, :, y * 10 + z, *place] = windows[:, window, :, token, key]
        torch.testing.assert_close(found.weights[0], expected[..., :10, :10], rtol=0, atol=1e-6)


def test_window_index_lists_cells_where_padding_comes_before_or_after_the_shift():
    image = torch.arange(1, 36).reshape(1, 5, 7)
    first = F.pad(image, (0, 2, 0, 1)).roll((-1, -1), (1, 2))
    second = F.pad(image.roll((-1, -1), (1, 2)), (0, 2, 0, 1))
    for pad_first, expected in ((True, first), (False, second)):
        windows = expected.reshape(2, 3, 3, 3).transpose(1, 2).reshape(6, 9)
        assert torch.equal(window_index((5, 7), (3, 3), (1, 1), pad_first=pad_first) + 1, windows)


# --------------------------------------------------------------------------------------------------------------------
# torch


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 10}, {"add_bias_kv": True, "add_zero_attn": True}])
def test_weights_of_torch_attention_are_those_it_returns(batch_first, options):
    attention = nn.MultiheadAttention(16, 4, batch_first=batch_first, **options).eval()
    q, k, v = torch.randn(2, 5, 16), torch.randn(2, 7, options.get("kdim", 16)), torch.randn(2, 7, options.get("vdim", 16))
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    mask = torch.randn(5, 7) > 1.0
    mask[:, 0] = False
    inputs = (q, k, v) if batch_first else tuple(t.transpose(0, 1) for t in (q, k, v))
    with capture(attention) as maps:
        _, expected = attention(*inputs, key_padding_mask=padding, attn_mask=mask, average_attn_weights=False)
    torch.testing.assert_close(maps[0].weights[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm_first", [True, False])
def test_fused_encoder_layers_of_torch_keep_their_bits_and_show_their_weights(norm_first):
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first).eval()
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 6, 16)
    with torch.no_grad():
        plain = encoder(x)
        with capture(encoder) as maps:
            watched = encoder(x)
        inner = encoder.layers[0]
        seen = inner.norm1(x) if norm_first else x
        _, expected = inner.self_attn(seen, seen, seen, average_attn_weights=False)
    assert torch.equal(plain, watched)  # bitwise: the same operators on the same shapes
    assert [found.name for found in maps] == ["layers.0.self_attn", "layers.1.self_attn"]
    torch.testing.assert_close(maps[0].weights[0], expected, rtol=0, atol=1e-6)
    assert not any("forward" in vars(module) for module in encoder.modules())


def test_tokens_of_an_oblong_image_lie_where_their_patches_do():
    """Patches are what a convolution of its own stride makes, not what an overlapping stem before it does."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 3, 3, stride=2, padding=1)
            self.patch = nn.Conv2d(3, 16, 4, stride=4)
            self.token = nn.Parameter(torch.randn(1, 1, 16))
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, image, stem):
            x = self.patch(self.stem(image) if stem else image).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
            return self.attention(x, x, x)[0]

    model = Model().eval()
    for stem, size in ((False, (12, 20)), (True, (24, 40))):
        with torch.no_grad(), capture(model) as maps:
            model(torch.randn(1, 3, *size), stem)
        grid, outer = maps
        assert (grid.grid, grid.k_grids, outer.grid) == ((3, 5), ((3, 5), (1,)), (1,))
        cell = size[0] // 3
        shown = image_map(grid).map[..., ::cell, ::cell] * cell**2
        torch.testing.assert_close(shown, grid.weights[0].mean(1), rtol=1e-5, atol=0)


def test_gradients_by_the_weights_of_torch_attention():
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double()
    x, direction = torch.randn(1, 4, 8, dtype=torch.float64), torch.randn(1, 4, 8, dtype=torch.float64)
    with capture(attention, gradients=True) as maps:
        (attention(x, x, x)[0] * direction).sum().backward()
    q, k, v = (
        t.unflatten(-1, (2, 4)).transpose(1, 2)
        for t in F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
    )
    weights = torch.softmax(q @ k.transpose(-1, -2) / 2.0, -1).detach().requires_grad_()
    y = attention.out_proj((weights @ v).transpose(1, 2).flatten(2))
    (expected,) = torch.autograd.grad((y * direction).sum(), weights)
    torch.testing.assert_close(maps[0].gradients[0], expected, rtol=0, atol=1e-12)
