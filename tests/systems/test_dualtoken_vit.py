"""DualToken-ViT (25): a grid of global tokens is carried beside the image, updated place by place, and looked at."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from naive_backbones import batch_norm, conv, layer_norm, linear, merge_patches, mlp, multiply_adds, randomise
from torch import nn

from regard import create_model, list_models
from regard.bench import count
from regard.layers.mixers import DualTokenAttention
from regard.models import count_parameters, model_card

SIZES = {  # widths, depths, mixing; parameters in 10^6 and multiply-adds in 10^9 as published
    "dualtoken_vit_tiny": ((48, 96, 192), (2, 5, 2), False, None, None),
    "dualtoken_vit_tiny_mix": ((48, 96, 192), (2, 5, 2), True, 5.8, 0.5),
    "dualtoken_vit_small": ((64, 128, 256), (2, 6, 3), False, 11.9, None),
    "dualtoken_vit_small_mix": ((64, 128, 256), (2, 6, 3), True, 11.4, 1.0),
}
DOUBLE = {"dtype": torch.float64}
NARROW = {"dims": (8, 12, 16), "heads": (2, 3, 4), "depths": (1, 2, 1), "size": 3, "neck": 20, "num_classes": 5}


def narrow(mix=False, **options):
    model = create_model("dualtoken_vit_tiny_mix" if mix else "dualtoken_vit_tiny", **NARROW | DOUBLE | options)
    return randomise(model)


def exchange(dim=8, heads=2, **options):
    return randomise(DualTokenAttention(dim, heads, **{"size": 3} | DOUBLE | options))


# --------------------------------------------------------------------------------------------------------------------
# the definition, on tokens (batch, rows, columns, channels) and dictionaries of weights


def naive_halved(x):
    """The mean of squares of 2 x 2, of as many tokens as there are at the end of an odd axis."""
    rows, columns = x.shape[1:3]
    lines = [[x[:, i : i + 2, j : j + 2].mean((1, 2)) for j in range(0, columns, 2)] for i in range(0, rows, 2)]
    return torch.stack([torch.stack(line, 1) for line in lines], 1)


def naive_averaged(x, size):
    """``size`` parts per axis, from the floor of their start to the ceiling of their end."""
    parts = [[(i * n // size, math.ceil((i + 1) * n / size)) for i in range(size)] for n in x.shape[1:3]]
    lines = [[x[:, a:b, c:d].mean((1, 2)) for c, d in parts[1]] for a, b in parts[0]]
    return torch.stack([torch.stack(line, 1) for line in lines], 1)


def naive_attention(q, k, v, heads):
    """Flat tokens, head by head, query by query."""
    out = torch.empty_like(q)
    width = q.shape[-1] // heads
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        for query in range(q.shape[1]):
            weights = torch.softmax((k[..., own] @ q[:, query, own, None])[..., 0] / width**0.5, -1)
            out[:, query, own] = (weights[..., None] * v[..., own]).sum(1)
    return out


def naive_exchange(x, tokens, weights, name, heads, steps, size):
    small = x
    for step in range(steps):
        part = f"{name}downsample.{step}.before"
        hidden = layer_norm(conv(small, weights, f"{part}.conv", groups=x.shape[-1]), weights, f"{part}.norm", 1e-6)
        small = naive_halved(small + F.gelu(linear(hidden, weights, f"{part}.fc")))
    small = layer_norm(naive_averaged(small, size), weights, f"{name}norm_map", 1e-6).flatten(1, 2)
    gathered = naive_attention(*linear(small, weights, f"{name}aggregate.qkv").chunk(3, -1), heads)
    gathered = linear(gathered, weights, f"{name}aggregate.proj")
    alpha = weights[f"{name}alpha"]
    tokens = alpha * gathered + (1 - alpha) * tokens.flatten(1, 2)
    if f"{name}mlp.tokens.fc1.weight" in weights:
        mixed = torch.empty_like(tokens)
        for channel in range(tokens.shape[-1]):
            mixed[..., channel] = mlp(tokens[..., channel], weights, f"{name}mlp.tokens.fc1", f"{name}mlp.tokens.fc2")
        tokens = tokens + mixed
    tokens = mlp(tokens, weights, f"{name}mlp.fc1", f"{name}mlp.fc2")
    q = linear(layer_norm(x, weights, f"{name}norm", 1e-6).flatten(1, 2), weights, f"{name}broadcast.q")
    y = naive_attention(q, *linear(tokens, weights, f"{name}broadcast.kv").chunk(2, -1), heads)
    y = linear(y, weights, f"{name}broadcast.proj").unflatten(1, x.shape[1:3])
    return y, tokens.unflatten(1, (size, size))


def naive_gate(x, weights, name):
    """LightViT's: what is normalised decides, what is gated is the input."""
    y = layer_norm(x, weights, f"{name}.norm")
    overall = F.gelu(linear(y.mean((1, 2)), weights, f"{name}.global_reduce"))
    channels = torch.sigmoid(linear(overall, weights, f"{name}.channel_select"))
    out = torch.empty_like(x)
    for row, column in itertools.product(*map(range, x.shape[1:3])):
        local = F.gelu(linear(y[:, row, column], weights, f"{name}.local_reduce"))
        place = torch.sigmoid(linear(torch.cat([local, overall], -1), weights, f"{name}.token_select"))
        out[:, row, column] = x[:, row, column] * channels * place
    return out


def naive_model(image, weights, depths, heads, size):
    x = image.movedim(1, -1)
    for i, stride in enumerate((2, 1, 1, 2)):
        name = f"stem.convs.{i}"
        groups = 1 if i == 0 else x.shape[-1]
        x = F.gelu(batch_norm(conv(x, weights, f"{name}.conv", stride, groups), weights, f"{name}.norm"))
    x = layer_norm(conv(x, weights, "stem.proj", 2), weights, "stem.norm")
    tokens, trace = weights["global_tokens"].expand(len(x), -1, -1, -1), []
    for i, depth in enumerate(depths):
        if i:
            name = f"stages.{i}.downsample"
            even = F.pad(x, [0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2])
            corners = torch.stack([even[:, a::2, b::2] for a in (0, 1) for b in (0, 1)])
            x = merge_patches(x, weights, f"{name}.merge") + linear(corners.amax(0), weights, f"{name}.shortcut")
            tokens = linear(layer_norm(tokens, weights, f"{name}.norm"), weights, f"{name}.widen")
        for j in range(depth):
            name = f"stages.{i}.blocks.{j}"
            local = layer_norm(conv(x, weights, f"{name}.local.conv", groups=x.shape[-1]), weights, f"{name}.local.norm", 1e-6)
            x = x + mlp(local, weights, f"{name}.local.mlp.fc1", f"{name}.local.mlp.fc2")
            y, tokens = naive_exchange(x, tokens, weights, f"{name}.mixer.", heads[i], len(depths) - 1 - i, size)
            x = x + y
            normed = layer_norm(x, weights, f"{name}.mlp.norm", 1e-6)
            hidden = mlp(normed, weights, f"{name}.mlp.op.0.fc1", f"{name}.mlp.op.0.fc2")
            x = x + naive_gate(hidden, weights, f"{name}.mlp.op.1")
        trace.append((x, tokens))
    x = F.gelu(layer_norm(linear(layer_norm(x, weights, "norm.0", 1e-6), weights, "norm.1"), weights, "norm.2"))
    return linear(x.mean((1, 2)), weights, "head"), trace


@pytest.mark.parametrize("size", [(96, 96), (75, 109)])
@pytest.mark.parametrize("mix", [False, True])
def test_equals_the_definition(mix, size):
    """Where the maps are 12, 6 and 3 tokens wide, and where no halving and no average comes out even."""
    model = narrow(mix)
    image = torch.randn(2, 3, *size, **DOUBLE)
    with torch.no_grad():
        expected, trace = naive_model(image, model.state_dict(), NARROW["depths"], NARROW["heads"], 3)
        torch.testing.assert_close(model(image), expected, rtol=1e-10, atol=1e-10)
        for streams, each in zip(model.run_streams(image), trace, strict=True):
            torch.testing.assert_close(tuple(streams), each, rtol=1e-10, atol=1e-10)
        maps = create_model("dualtoken_vit_tiny_mix" if mix else "dualtoken_vit_tiny", features_only=True, **NARROW | DOUBLE)
        maps.load_state_dict({k: v for k, v in model.state_dict().items() if k in maps.state_dict()})
        for found, (x, _) in zip(maps.eval()(image), trace, strict=True):
            torch.testing.assert_close(found, x.movedim(-1, 1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mix", [False, True])
def test_alpha_weighs_the_map_against_what_was_carried(mix):
    block = exchange(mix=mix, steps=1)
    x, first, second = (torch.randn(1, n, n, 8, **DOUBLE) for n in (6, 3, 3))
    with torch.no_grad():
        assert not torch.allclose(block(x, first)[1], block(x, second)[1])
        block.alpha.fill_(1.0)
        assert all(torch.equal(a, b) for a, b in zip(block(x, first), block(x, second), strict=True))
        block.alpha.zero_()
        assert torch.equal(block(x, first)[1], block(torch.randn_like(x), first)[1])
        block.mlp = nn.Identity()
        assert torch.equal(block(x, first)[1], first)
    assert create_model("dualtoken_vit_tiny", **NARROW).stages[0].blocks[0].mixer.alpha == 0.5


@pytest.mark.parametrize("mix", [False, True])
def test_global_tokens_have_positions(mix):
    """Tokens carried in another order meet other places of the map; keys and values alone would not know."""
    block = exchange(mix=mix)
    x, tokens = torch.randn(1, 3, 3, 8, **DOUBLE), torch.randn(1, 3, 3, 8, **DOUBLE)
    moved = tokens.flatten(1, 2).roll(1, 1).unflatten(1, (3, 3))
    with torch.no_grad():
        (y, after), (y_moved, after_moved) = block(x, tokens), block(x, moved)
        assert (after_moved.flatten(1, 2).roll(-1, 1) - after.flatten(1, 2)).norm() > 0.1 * after.norm()
        assert (y_moved - y).norm() > 0.01 * y.norm()
        again = block.broadcast(x, context=tokens)
        torch.testing.assert_close(block.broadcast(x, context=moved), again)  # as tokens without positions do


def test_tokens_are_carried_through_all_stages_and_reach_every_logit():
    model = narrow()
    image = torch.randn(1, 3, 96, 96, **DOUBLE, requires_grad=True)
    model.run_streams(image)[-1].x[0, 0, 0].sum().backward()
    assert bool((image.grad.abs().sum(1) > 0).all())  # a corner of the last map sees every pixel
    assert bool((model.global_tokens.grad != 0).all())
    for stage, streams in zip(NARROW["dims"], model.run_streams(torch.randn(2, 3, 70, 90, **DOUBLE)), strict=True):
        assert streams.tokens.shape == (2, 3, 3, stage)


@pytest.mark.parametrize(("grid", "steps"), [((28, 28), 2), ((13, 20), 1), ((4, 5), 0)])
def test_a_map_is_looked_at_by_49_tokens_and_looks_at_49(grid, steps):
    block = DualTokenAttention(8, 2, steps=steps)
    with count() as cost, torch.no_grad():
        block(torch.randn(1, *grid, 8), torch.randn(1, 7, 7, 8))
    assert cost.pairs == 2 * (49 * 49 + math.prod(grid) * 49)


def test_recomputed_blocks_hand_the_tokens_on():
    model = create_model("dualtoken_vit_tiny", drop_path_rate=0.0, **NARROW | DOUBLE)
    image, gradients = torch.randn(2, 3, 64, 64, **DOUBLE), []
    for enable in (False, True):
        model.train().set_grad_checkpointing(enable)
        model.zero_grad()
        model(image).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        assert all(bool(gradient.any()) for gradient in gradients[-1])
    torch.testing.assert_close(*gradients)


def test_every_size_is_here():
    assert sorted(SIZES) == list_models("dualtoken_vit*")


@pytest.mark.parametrize("name", SIZES)
def test_parameters_and_multiply_adds_are_near_the_published_ones(name):
    """Which are known to two or three digits only; the exact numbers are those of the reconstruction."""
    dims, depths, mix, params, gmacs = SIZES[name]
    card, model = model_card(name), create_model(name, device="meta")
    counted, cost = count_parameters(model), multiply_adds(model, 224)
    assert counted == card.params
    assert cost == pytest.approx(card.gmacs, abs=0.001)
    assert params is None or counted / 1e6 == pytest.approx(params, rel=0.025)
    assert gmacs is None or cost == pytest.approx(gmacs, rel=0.05)
    assert [(stage.dim, stage.depth) for stage in model.spec.stages] == list(zip(dims, depths, strict=True))
    streams = model.eval().run_streams(torch.empty(1, 3, 224, 224, device="meta"))
    assert [tuple(each.x.shape[1:3]) for each in streams] == [(28, 28), (14, 14), (7, 7)]
    blocks = [block.mixer for stage in model.stages for block in stage.blocks]
    assert [len(block.downsample) - 1 for block in blocks] == [2] * depths[0] + [1] * depths[1] + [0] * depths[2]
    assert all(hasattr(block.mlp, "tokens") == mix for block in blocks)


def test_the_ablations_of_the_paper_cost_what_it_says():
    """One average instead of steps: 0.1 M and 0.03 G less. Attention instead of the weighted sum and the steps: 1.1 M more."""
    whole = create_model("dualtoken_vit_small_mix", device="meta")
    parameters, cost = count_parameters(whole), multiply_adds(whole, 224)
    blocks = [block.mixer for stage in whole.stages for block in stage.blocks]
    for block in blocks:
        block.downsample = block.downsample[-1:]
    saved = parameters - count_parameters(whole)
    assert round(saved / 1e6, 1) == 0.1
    assert round(cost - multiply_adds(whole, 224), 2) == 0.03
    attention = sum(count_parameters(block.aggregate) for block in blocks)
    assert round((attention - len(blocks) - saved) / 1e6, 1) == 1.1


def test_wrong_tables_and_tokens_are_told():
    with pytest.raises(ValueError, match=r"carries global tokens.*it takes no other mixer; got 'window'"):
        create_model("dualtoken_vit_tiny", mixer="window")
    with pytest.raises(ValueError, match=r"one number per stage; got \(8, 12\), \(2, 5, 2\), \(2, 4, 8\) and"):
        create_model("dualtoken_vit_tiny", dims=(8, 12))
    with pytest.raises(ValueError, match=r"tokens \(batch, 3, 3, 8\); got \(1, 4, 4, 8\) and \(1, 7, 7, 8\)"):
        exchange()(torch.randn(1, 4, 4, 8), torch.randn(1, 7, 7, 8))
    with pytest.raises(ValueError, match=r"\(batch, \*grid, dim\) with 9 tokens; got \(1, 2, 4, 8\)"):
        exchange(mix=True).mlp(torch.randn(1, 2, 4, 8, **DOUBLE))
