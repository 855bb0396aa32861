"""FIT (34): all variants equal masked dense transformers, groups know of each other through latents, memory is linear."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regard.compare.measure import peak_memory
from regard.models import FIT, FITAutoregressive, FITDenoiser, count_parameters
from regard.ops.tokens.permute import to_tiles

GROUPS, SIZE, LATENTS = 3, 4, 2
SIZES = {"groups": GROUPS, "group_size": SIZE, "latents": LATENTS, "dim": 8, "latent_dim": 16, "heads": 2, "latent_heads": 4}


def tiny(kind, layers="(1)2(2)1(1)", **options):
    """In float64, with norms, biases and positions that do something."""
    model = kind(layers, **(SIZES | options), dtype=torch.float64).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


# --------------------------------------------------------------------------------------------------------------------
# the definition: flat tokens (batch, tokens, dim) and masks over all of them

GROUP = torch.arange(GROUPS * SIZE) // SIZE
LATENT_GROUP = torch.arange(GROUPS * LATENTS) // LATENTS


def norm(x, weights, name):
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)


def linear(x, weights, name):
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def masked(q, k, v, heads, seen):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    logits = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


def blocks(x, weights, name, heads, seen):
    depth = len({key.split(".")[name.count(".") + 1] for key in weights if key.startswith(f"{name}.")}) // 2
    for i in range(depth):
        attention, mlp = f"{name}.{2 * i}", f"{name}.{2 * i + 1}"
        q, k, v = linear(norm(x, weights, f"{attention}.norm"), weights, f"{attention}.op.qkv").chunk(3, -1)
        x = x + linear(masked(q, k, v, heads, seen), weights, f"{attention}.op.proj")
        hidden = F.gelu(linear(norm(x, weights, f"{mlp}.norm"), weights, f"{mlp}.op.fc1"))
        x = x + linear(hidden, weights, f"{mlp}.op.fc2")
    return x


def cross(x, context, weights, name, heads, seen):
    q = linear(norm(x, weights, f"{name}.norm"), weights, f"{name}.q")
    k, v = linear(norm(context, weights, f"{name}.context_norm"), weights, f"{name}.kv").chunk(2, -1)
    x = x + linear(masked(q, k, v, heads, seen), weights, f"{name}.proj")
    if f"{name}.mlp.norm.weight" not in weights:
        return x
    hidden = F.gelu(linear(norm(x, weights, f"{name}.mlp.norm"), weights, f"{name}.mlp.op.fc1"))
    return x + linear(hidden, weights, f"{name}.mlp.op.fc2")


def naive_body(x, weights, segments, causal=False, condition=None, before=0, extra=None):
    """From embedded tokens ``(batch, groups, size, dim)`` to tokens and latents of the same layout."""
    count = 0 if extra is None else extra.shape[2]
    group = torch.arange(GROUPS * (count + SIZE)) // (count + SIZE)
    same = group[:, None] == group
    local = same & torch.ones_like(same).tril() if causal else same
    earlier = LATENT_GROUP[:, None] >= LATENT_GROUP
    wide = earlier if causal else torch.ones_like(earlier)
    reads = LATENT_GROUP[:, None] == group
    x = x + weights["body.positions"]
    x = (x if extra is None else torch.cat((extra, x), 2)).flatten(1, 2)
    z = (weights["body.latents"].expand(len(x), -1, -1, -1) + before).flatten(1, 2)
    for i in range(segments):
        name = f"body.segments.{i}"
        x = blocks(x, weights, f"{name}.local", 2, local)
        if f"{name}.read.q.weight" not in weights:
            continue
        z = cross(z, x, weights, f"{name}.read", 2, reads)
        if condition is not None:
            everything = torch.ones(z.shape[1], condition.shape[1], dtype=torch.bool)
            z = cross(z, condition, weights, f"{name}.condition", 4, everything)
        z = blocks(z, weights, f"{name}.wide", 4, wide)
        if i < segments - 1:
            late = z
            if causal:
                late = torch.cat((torch.zeros_like(z[:, :LATENTS]), z[:, :-LATENTS]), 1)
            x = cross(x, late, weights, f"{name}.write", 2, reads.T)
    return x.unflatten(1, (GROUPS, count + SIZE)), z.unflatten(1, (GROUPS, LATENTS))


@pytest.mark.parametrize("layers", ["(1)2(2)1(1)", "(1)1(0)2"])
def test_the_encoder_equals_masked_dense_transformers(layers):
    model = tiny(FIT, layers, in_dim=5)
    weights, x = model.state_dict(), torch.randn(2, GROUPS, SIZE, 5, dtype=torch.float64)
    embedded = norm(linear(x, weights, "stem.0"), weights, "stem.1")
    tokens, latents = naive_body(embedded, weights, layers.count("("))
    for found, expected in zip(
        model(x), (norm(tokens, weights, "norm"), norm(latents, weights, "latent_norm")), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_extra_tokens_of_a_group_come_before_it_without_positions():
    model = tiny(FIT, in_dim=5, extra_dim=3)
    weights, x = model.state_dict(), torch.randn(2, GROUPS, SIZE, 5, dtype=torch.float64)
    extra = torch.randn(2, GROUPS, 2, 3, dtype=torch.float64)
    embedded = norm(linear(x, weights, "stem.0"), weights, "stem.1")
    beside = norm(linear(extra, weights, "extra_stem.0"), weights, "extra_stem.1")
    tokens, latents = naive_body(embedded, weights, 3, extra=beside)
    for found, expected in zip(
        model(x, extra), (norm(tokens, weights, "norm"), norm(latents, weights, "latent_norm")), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    swapped = model(x, extra.flip(2))[0]  # they are a set
    torch.testing.assert_close(swapped[:, :, 2:], model(x, extra)[0][:, :, 2:], rtol=1e-11, atol=1e-11)
    plain = tiny(FIT, in_dim=5)
    plain.load_state_dict({key: value for key, value in weights.items() if not key.startswith("extra_stem")})
    torch.testing.assert_close(model(x)[0], plain(x)[0], rtol=0, atol=0)  # bitwise: the same operators on the same shapes


@pytest.mark.parametrize("cross_mlp", [False, True])
def test_the_denoiser_equals_masked_dense_transformers(cross_mlp):
    model = tiny(FITDenoiser, "(1)1(1)2", in_dim=5, out_dim=6, condition_dim=7, cross_mlp=cross_mlp)
    weights, x = model.state_dict(), torch.randn(2, GROUPS, SIZE, 5, dtype=torch.float64)
    followed = {key.split(".mlp.")[0] for key in weights if ".mlp." in key}  # not where latents read the condition
    assert followed == ({"body.segments.0.read", "body.segments.0.write", "body.segments.1.read"} if cross_mlp else set())
    time, condition = torch.tensor([0.1, 0.8], dtype=torch.float64), torch.randn(2, 4, 7, dtype=torch.float64)
    before = torch.randn(2, GROUPS, LATENTS, 16, dtype=torch.float64)
    angles = torch.stack((1000 * time, 10 * time), 1)
    waves = torch.cat((angles.sin(), angles.cos()), 1)
    waves = (waves - waves.mean(1, keepdim=True)) / waves.std(1, correction=0, keepdim=True)
    time_token = linear(F.silu(linear(waves, weights, "time.0")), weights, "time.2")[:, None]
    seen = torch.cat((time_token, linear(condition, weights, "condition")), 1)
    hidden = F.gelu(linear(norm(before, weights, "before.norm"), weights, "before.op.fc1"))
    estimate = norm(before + linear(hidden, weights, "before.op.fc2"), weights, "before_norm")
    embedded = norm(linear(x, weights, "stem.0"), weights, "stem.1")
    tokens, latents = naive_body(embedded, weights, 2, condition=seen, before=estimate)
    out, z = model(x, time, condition, before)
    torch.testing.assert_close(out, linear(norm(tokens, weights, "head.0"), weights, "head.1"), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(z, latents, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("tied", [True, False])
def test_the_decoder_equals_masked_dense_transformers(tied):
    model = tiny(FITAutoregressive, values=6, tied=tied)
    weights, x = model.state_dict(), torch.randint(6, (2, GROUPS, SIZE))
    tokens, _ = naive_body(weights["embed.weight"][x], weights, 3, causal=True)
    out = weights["embed.weight"] if tied else weights["head.weight"]
    expected = norm(tokens, weights, "norm") @ out.T + weights["head.bias"]
    torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)


def test_one_group_without_latents_is_a_plain_transformer():
    model = tiny(FIT, "(2)", groups=1, group_size=9, latents=0, in_dim=5)
    plain = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 32, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True, dtype=torch.float64), 2,
        enable_nested_tensor=False,
    )  # fmt: skip
    local = model.body.segments[0].local
    with torch.no_grad():
        for i, layer in enumerate(plain.layers):
            attention, mlp = local[2 * i], local[2 * i + 1]
            pairs = {
                "self_attn.in_proj_weight": attention.op.qkv.weight, "self_attn.in_proj_bias": attention.op.qkv.bias,
                "self_attn.out_proj.weight": attention.op.proj.weight, "self_attn.out_proj.bias": attention.op.proj.bias,
                "linear1.weight": mlp.op.fc1.weight, "linear1.bias": mlp.op.fc1.bias, "linear2.weight": mlp.op.fc2.weight,
                "linear2.bias": mlp.op.fc2.bias, "norm1.weight": attention.norm.weight, "norm1.bias": attention.norm.bias,
                "norm2.weight": mlp.norm.weight, "norm2.bias": mlp.norm.bias,
            }  # fmt: skip
            layer.load_state_dict(pairs)
    x = torch.randn(2, 1, 9, 5, dtype=torch.float64)
    expected = model.norm(plain.train()(model.stem(x)[:, 0] + model.body.positions))
    torch.testing.assert_close(model(x)[0][:, 0], expected, rtol=1e-11, atol=1e-11)


# --------------------------------------------------------------------------------------------------------------------
# who knows of whom


def test_logits_depend_on_all_tokens_so_far_of_the_group_and_on_all_earlier_groups():
    """Replace one token at a time: logits before it stay; its own and all later ones change, as latents carry it on."""
    model = tiny(FITAutoregressive, values=6)
    x = torch.randint(6, (1, GROUPS, SIZE))
    tokens = GROUPS * SIZE
    changed = x.repeat(tokens, 1, 1).flatten(1)
    changed[range(tokens), range(tokens)] = (changed[range(tokens), range(tokens)] + 1) % 6
    difference = (model(changed.unflatten(1, (GROUPS, SIZE))) - model(x)).flatten(1, 2).abs().amax(-1)
    assert difference.triu().gt(1e-12).equal(torch.ones(tokens, tokens).triu().bool())
    assert difference.tril(-1).lt(1e-14).all()


def test_groups_know_of_each_other_through_global_blocks_only():
    x = torch.randn(1, GROUPS, SIZE, 5, dtype=torch.float64)
    other = x.clone()
    other[:, 1, 2] += 1
    for layers, mixed in (("(2)", False), ("(2)1", False), ("(1)1(1)", True)):
        model = tiny(FIT, layers, in_dim=5)
        differs = (model(x)[0] - model(other)[0]).abs().amax((0, 2, 3)).gt(1e-12).tolist()
        assert differs == ([True] * 3 if mixed else [False, True, False])


def test_the_earlier_estimate_starts_without_effect():
    model = FITDenoiser("(1)1(1)", **SIZES, in_dim=5, condition_dim=7)
    x, time, condition = torch.randn(2, GROUPS, SIZE, 5), torch.rand(2), torch.randn(2, 1, 7)
    plain, latents = model(x, time, condition)
    torch.testing.assert_close(model(x, time, condition, latents)[0], plain)
    nn.init.ones_(model.before_norm.weight)
    assert (model(x, time, condition, latents)[0] - plain).abs().max() > 1e-4
    assert (model(x, 1 - time, condition)[0] - plain).abs().max() > 1e-4
    assert (model(x, time, condition + 1)[0] - plain).abs().max() > 1e-4


def test_groups_of_an_image_are_tiles():
    image = torch.arange(6 * 8).reshape(1, 6, 8)
    groups = to_tiles(image, (3, 4))[:, 0]
    assert groups.shape == (1, 4, 12)
    assert groups[0, 1].tolist() == image[0, :3, 4:].flatten().tolist()


# --------------------------------------------------------------------------------------------------------------------
# size, memory, errors


def test_memory_is_linear_in_groups_of_one_size_with_as_many_latents_in_all():
    peaks = []
    for groups in (32, 64, 128):
        model = FIT("(1)1(1)", groups, 64, 128 // groups, 8, 32, 32, 2, 2)
        x = torch.randn(1, groups, 64, 8)
        with torch.no_grad():
            model(x)  # plans are cached
            peaks.append(peak_memory(lambda model=model, x=x: model(x), x.device))
    assert (peaks[2] - peaks[1]) / (peaks[1] - peaks[0]) == pytest.approx(2, abs=0.3)
    assert peaks[2] < 4.3 * peaks[0]


def test_parameters_follow_from_the_sizes():
    groups, size, latents, dim, wide, values = 16, 64, 8, 256, 512, 1000
    model = FITAutoregressive("(2)4(2)4(2)", groups, size, latents, values, dim, wide, 4, 8, device="meta")

    def block(d):
        return 12 * d**2 + 13 * d

    norms = 2 * (dim + wide)  # of the query and of the context; all heads share the narrow width
    read = norms + (wide + 1) * dim + 2 * (dim + 1) * dim + (dim + 1) * wide
    write = norms + (dim + 1) * dim + 2 * (wide + 1) * dim + (dim + 1) * dim
    body = 6 * block(dim) + 8 * block(wide) + 2 * read + 2 * write + size * dim + groups * latents * wide
    assert count_parameters(model) == body + values * dim + values + 2 * dim


@pytest.mark.parametrize(("make", "message"), [
    (lambda: FIT("2(1)", **SIZES, in_dim=5), r"such as '\(2\)4\(2\)'; got '2\(1\)'"),
    (lambda: FIT("(1)0(1)", **SIZES, in_dim=5), r"only the last segment may have no global blocks; got '\(1\)0\(1\)'"),
    (lambda: FIT("(1)", **SIZES, in_dim=5)(torch.zeros(1, 3, 5, 5)), r"expected x \(batch, 3, 4, 5\); got \(1, 3, 5, 5\)"),
    (
        lambda: FIT("(1)", **SIZES, in_dim=5, extra_dim=3)(torch.zeros(1, 3, 4, 5), torch.zeros(1, 2, 4, 3)),
        r"expected extra \(batch, 3, n, 3\); got \(1, 2, 4, 3\)",
    ),
    (
        lambda: FIT("(1)", **SIZES, in_dim=5)(torch.zeros(1, 3, 4, 5), torch.zeros(1, 3, 2, 3)),
        r"expected extra none, as extra_dim is 0; got \(1, 3, 2, 3\)",
    ),
    (lambda: FITAutoregressive("(1)", **SIZES, values=5)(torch.zeros(3, 4).long()), r"expected x .*got \(3, 4\)"),
    (lambda: FITDenoiser("(1)", **SIZES, in_dim=5, condition_dim=3), r"layers need global blocks; got '\(1\)'"),
    (lambda: FITDenoiser("(1)1", **(SIZES | {"latent_dim": 12}), in_dim=5, condition_dim=3), r"multiple of 8.*got 12"),
    (lambda: FIT("(1)1", **(SIZES | {"heads": 8, "latent_heads": 3}), in_dim=5), r"multiple of heads; got 16, 8, heads=3"),
])  # fmt: skip
def test_errors_quote_what_was_given(make, message):
    with pytest.raises(ValueError, match=message):
        make()
