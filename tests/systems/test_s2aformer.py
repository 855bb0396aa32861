"""S2AFormer (15): attention between strips of one channel per head and the keys of a smaller map, inside a block of four."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from naive_backbones import batch_norm, conv, layer_norm, linear, mlp, multiply_adds, randomise

from regard import create_mixer, create_model, list_models
from regard.bench import count
from regard.layers.mixers import MultiHeadAttention, StripAttention
from regard.models import count_parameters, model_card

DOUBLE = {"dtype": torch.float64}
NARROW = {"dim": 16, "head_dim": 8, "depths": (1, 2), "ratios": (3, 1), "num_classes": 5}


def naive_attention(x, weights, name, heads, ratio, strip, pool="conv"):
    """Tokens (batch, rows, columns, channels), query by query."""
    batch, rows, columns, channels = x.shape
    pooled = x
    if ratio > 1:
        down, across = -(-rows // ratio), -(-columns // ratio)
        pooled = x.new_zeros(batch, down, across, channels)
        for i, j in itertools.product(range(down), range(across)):
            square = x[:, i * ratio : (i + 1) * ratio, j * ratio : (j + 1) * ratio]
            if pool == "mean":  # of the tokens there are
                pooled[:, i, j] = square.mean((1, 2))
                continue
            kernel = weights[f"{name}.pool.conv.weight"][:, 0]  # (channels, ratio, ratio)
            for di, dj in itertools.product(range(square.shape[1]), range(square.shape[2])):  # zeros beyond
                pooled[:, i, j] = pooled[:, i, j] + square[:, di, dj] * kernel[:, di, dj]
            pooled[:, i, j] = pooled[:, i, j] + weights[f"{name}.pool.conv.bias"]
        pooled = layer_norm(pooled, weights, f"{name}.pool.after")
    q = linear(x.flatten(1, 2), weights, f"{name}.q")
    k, v = linear(pooled.flatten(1, 2), weights, f"{name}.kv").split((heads * strip, channels), -1)
    out = torch.empty_like(x).flatten(1, 2)
    for head in range(heads):
        thin = slice(head * strip, (head + 1) * strip)
        wide = slice(head * channels // heads, (head + 1) * channels // heads)
        for query in range(rows * columns):
            logits = (q[:, query, None, thin] * k[:, :, thin]).sum(-1) / math.sqrt(strip)
            out[:, query, wide] = (logits.softmax(-1)[..., None] * v[:, :, wide]).sum(1)
    return linear(out, weights, f"{name}.proj").unflatten(1, (rows, columns))


def naive_block(x, weights, name, heads, ratio, strip=1):
    def norm(x, part):
        return layer_norm(x, weights, f"{name}.{part}.norm", 1e-6)

    channels = x.shape[-1]
    x = x + conv(x, weights, f"{name}.position.conv", groups=channels)
    x = x + naive_attention(norm(x, "mixer"), weights, f"{name}.mixer.op", heads, ratio, strip)
    local = f"{name}.local.op"
    wide = linear(norm(x, "local"), weights, f"{local}.fc1")
    x = x + linear(F.gelu(conv(wide, weights, f"{local}.conv", groups=wide.shape[-1])), weights, f"{local}.fc2")
    return x + mlp(norm(x, "mlp"), weights, f"{name}.mlp.op.fc1", f"{name}.mlp.op.fc2")


def naive(image, weights, depths, heads, ratios, strip=1):
    x = image.movedim(1, -1)
    for i in range(3):
        x = conv(x, weights, f"stem.convs.{i}.conv", stride=2 if i == 0 else 1)
        x = F.gelu(batch_norm(x, weights, f"stem.convs.{i}.norm"))
    for stage, (depth, own, ratio) in enumerate(zip(depths, heads, ratios, strict=True)):
        x = conv(x, weights, f"stages.{stage}.downsample.conv", stride=2)
        x = batch_norm(x, weights, f"stages.{stage}.downsample.norm")
        for block in range(depth):
            x = naive_block(x, weights, f"stages.{stage}.blocks.{block}", own, ratio, strip)
    return linear(layer_norm(x, weights, "norm", 1e-6).mean((1, 2)), weights, "head")


@pytest.mark.parametrize("strip", [1, 2])
def test_equals_the_definition_with_all_gradients(strip):
    """Whole network; 7 x 10 tokens at ratio 3 leave part of the last squares to zeros."""
    model = randomise(create_model("s2aformer_t", strip=strip, **NARROW, **DOUBLE))
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    leaves = {key: value.requires_grad_() if value.is_floating_point() else value for key, value in weights.items()}
    image = torch.randn(2, 3, 27, 39, **DOUBLE)
    expected = naive(image, leaves, (1, 2), (2, 4), (3, 1), strip)
    got = model(image)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    got.sin().sum().backward()
    expected.sin().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, leaves[name].grad, rtol=1e-9, atol=1e-11, msg=name)


def test_the_gradient_of_the_whole_network_is_its_slope():
    model = randomise(create_model("s2aformer_mini", **NARROW | {"depths": (1, 1, 1, 1), "ratios": (8, 4, 2, 1)}, **DOUBLE))
    image = torch.randn(2, 3, 45, 70, **DOUBLE)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(model(image).sin().sum(), parameters)
    way = [torch.randn_like(p) for p in parameters]
    values, step = [], 1e-6
    with torch.no_grad():
        for sign in (1, -1):
            for parameter, along in zip(parameters, way, strict=True):
                parameter += sign * step * along
            values.append(model(image).sin().sum())
            for parameter, along in zip(parameters, way, strict=True):
                parameter -= sign * step * along
    slope = sum((g * along).sum() for g, along in zip(gradients, way, strict=True))
    torch.testing.assert_close((values[0] - values[1]) / (2 * step), slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("pool", ["conv", "mean"])
@pytest.mark.parametrize(("heads", "ratio", "strip"), [(4, 2, 1), (2, 3, 3), (1, 4, 2)])
def test_the_mixer_equals_a_loop_over_queries(heads, ratio, strip, pool):
    mixer = randomise(StripAttention(8, heads, ratio, strip=strip, pool=pool, **DOUBLE))
    x = torch.randn(2, 5, 7, 8, **DOUBLE)
    weights = {f"m.{key}": value for key, value in mixer.state_dict().items()}
    torch.testing.assert_close(mixer(x), naive_attention(x, weights, "m", heads, ratio, strip, pool), rtol=1e-11, atol=1e-11)


def test_without_pooling_and_with_whole_strips_it_is_ordinary_attention():
    strips = randomise(StripAttention(16, 4, 1, strip=4, **DOUBLE))
    whole = MultiHeadAttention(16, 4, **DOUBLE)
    whole.load_state_dict({
        "qkv.weight": torch.cat([strips.q.weight, strips.kv.weight]),
        "qkv.bias": torch.cat([strips.q.bias, strips.kv.bias]),
        "proj.weight": strips.proj.weight,
        "proj.bias": strips.proj.bias,
    })  # fmt: skip
    x = torch.randn(2, 5, 6, 16, **DOUBLE)
    torch.testing.assert_close(strips(x), whole(x))


@pytest.mark.parametrize(("side", "ratio", "strip"), [(8, 2, 1), (12, 4, 1), (8, 1, 3)])
def test_pairs_and_channels_are_those_of_the_formula(side, ratio, strip):
    """The matrix of scores costs N^2 C_s / r^2 multiply-adds with C_s = strip * heads, the weighted sum N^2 C / r^2."""
    dim, heads, n = 16, 4, side * side
    mixer = StripAttention(dim, heads, ratio, strip=strip)
    with count() as cost:
        mixer(torch.randn(1, side, side, dim))
    assert cost.pairs * strip == n * n * strip * heads // ratio**2
    assert cost.flops == 2 * (n * n // ratio**2) * (strip * heads + dim)


def test_strips_cost_less_than_whole_queries_and_keys_of_the_same_pooled_map():
    narrow, wide = (create_model("s2aformer_t", strip=strip, device="meta") for strip in (1, 16))
    assert multiply_adds(narrow, 224) < 0.9 * multiply_adds(wide, 224)
    for thin, thick in zip(narrow.modules(), wide.modules(), strict=True):
        if isinstance(thin, StripAttention):
            assert (thin.q.out_features, thick.q.out_features) == (thin.heads, thin.dim)
            assert thin.kv.out_features == thin.heads + thin.dim  # values keep their width


def test_tokens_outside_the_grid_see_the_pooled_map_and_themselves():
    mixer = randomise(StripAttention(8, 2, 2, **DOUBLE))
    x, extra = torch.randn(1, 4, 6, 8, **DOUBLE), torch.randn(1, 3, 8, **DOUBLE)
    y, y_extra = mixer(x, extra)
    seen = torch.cat([mixer.pool(x).flatten(1, 2), extra], 1)
    k, v = mixer.kv(seen).split((2, 8), -1)
    for queries, got in ((x.flatten(1, 2), y.flatten(1, 2)), (extra, y_extra)):
        logits = torch.einsum("bqh,bkh->bhqk", mixer.q(queries), k)  # one channel per head: a scale of 1
        expected = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v.unflatten(-1, (2, 4)))
        torch.testing.assert_close(got, mixer.proj(expected.flatten(2)))


SIZES = {  # of the reconstruction: channels, depths
    "s2aformer_mini": (32, (1, 1, 3, 1)),
    "s2aformer_t": (32, (2, 2, 6, 2)),
    "s2aformer_xs": (48, (2, 2, 6, 2)),
    "s2aformer_s": (64, (2, 2, 8, 2)),
    "s2aformer_m": (80, (3, 3, 12, 3)),
}


@pytest.mark.parametrize(("name", "table"), SIZES.items())
def test_parameter_counts_equal_the_closed_form(name, table):
    base, depths = table
    half = base // 2
    total = 27 * half + 2 * 9 * half**2 + 3 * 2 * half
    before = half
    for stage, (depth, ratio) in enumerate(zip(depths, (8, 4, 2, 1), strict=True)):
        c = base * 2**stage
        heads = c // 16
        total += 9 * before * c + 2 * c
        pooled = ratio**2 * c + c + 2 * c if ratio > 1 else 0
        attention = (c + 1) * heads + (c + 1) * (heads + c) + c * c + c + pooled
        local = 2 * (c * c + c) + 10 * c
        total += depth * (10 * c + attention + local + 8 * c * c + 5 * c + 3 * 2 * c)
        before = c
    total += 2 * before + 1000 * before + 1000
    model = create_model(name, device="meta")
    assert count_parameters(model) == total == model_card(name).params
    assert multiply_adds(model, 224) == pytest.approx(model_card(name).gmacs, rel=0.02)
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 16, 32]
    assert set(list_models("s2aformer*")) == set(SIZES)


def test_every_part_of_a_block_is_a_residual_branch_of_its_own():
    """Silencing one output layer takes one branch away and leaves the others."""
    model = randomise(create_model("s2aformer_t", **NARROW, **DOUBLE))
    block, x = model.stages[0].blocks[0], torch.randn(1, 6, 9, 16, **DOUBLE)
    assert list(block._modules) == ["position", "mixer", "local", "mlp"]
    ends = {"mixer": "mixer.op.proj", "local": "local.op.fc2", "mlp": "mlp.op.fc2"}
    with torch.no_grad():
        for silent in ends:
            layer = block.get_submodule(ends[silent])
            kept = [p.clone() for p in layer.parameters()]
            for parameter in layer.parameters():
                parameter.zero_()
            expected = block.position(x)
            for name in ends:
                if name != silent:
                    expected = block.get_submodule(name)(expected)
            torch.testing.assert_close(block(x), expected)
            for parameter, value in zip(layer.parameters(), kept, strict=True):
                parameter.copy_(value)


def test_wrong_tables_are_told():
    with pytest.raises(ValueError, match=r"dim must be a positive multiple of heads; got dim=10, heads=4"):
        create_mixer("strip", dim=10, heads=4)
    with pytest.raises(ValueError, match=r"pool must be one of conv, mean; got 'max'"):
        create_mixer("strip", dim=8, heads=4, pool="max")
    with pytest.raises(ValueError, match=r"ratios must be at least as many as stages; got \(2,\) for \(2, 2, 6, 2\)"):
        create_model("s2aformer_t", ratios=(2,), device="meta")
