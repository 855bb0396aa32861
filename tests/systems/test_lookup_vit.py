"""LookupViT (26): a few compressed tokens gather from all patches and give back along the same attention, at any budget."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from naive_backbones import layer_norm, linear, mlp, multiply_adds, patches, randomise
from sklearn.datasets import load_digits
from torch import nn

from regard import create_model, lens, list_models
from regard.bench import count
from regard.layers.mixers import MultiHeadAttention
from regard.layers.mixers.bidirectional import BidirectionalAttention
from regard.models import count_parameters, model_card
from regard.models.backbones.lookup_vit import lookup_vit

DOUBLE = {"dtype": torch.float64}
NARROW = {"dim": 16, "head_dim": 8, "depth": 3, "image_size": 80, "num_classes": 5}
EPS = 1e-6
VIDEO = "lookupvit_base_tubelet2x16_224.k400"


def narrow(name="lookupvit_base_patch16_224", **options):
    model = randomise(create_model(name, **NARROW | {"size": 2} | DOUBLE | options))
    return model, dict(model.state_dict())


# --------------------------------------------------------------------------------------------------------------------
# the definition, head by head and token by token


def resize_axis(x, axis, size):
    """Linear interpolation of one axis at the middles of its new cells; beyond the outer middles nothing changes."""
    length, out = x.shape[axis], []
    for i in range(size):
        at = max((i + 0.5) * length / size - 0.5, 0.0)
        low = int(at)
        high = min(low + 1, length - 1)
        out.append(x.select(axis, low) * (1 - (at - low)) + x.select(axis, high) * (at - low))
    return torch.stack(out, axis)


def resize(x, sizes):
    for axis, size in enumerate(sizes):
        x = resize_axis(x, 1 + axis, size)
    return x


def split(x, heads):
    return x.unflatten(-1, (heads, -1)).movedim(-2, 1)  # (batch, heads, tokens, width)


def logits_of(x, context, weights, name, heads):
    q = split(linear(x, weights, f"{name}.q"), heads)
    k, v = (split(t, heads) for t in linear(context, weights, f"{name}.kv").chunk(2, -1))
    return torch.einsum("bhmd,bhnd->bhmn", q, k) / math.sqrt(q.shape[-1]), v


def joined(maps, v, weights, name):
    return linear(torch.einsum("bhmn,bhnd->bmhd", maps, v).flatten(2), weights, name)


def naive_block(z, x, weights, block, heads, reuse):
    """Sequences of compressed tokens z and lookup tokens x."""

    def norm(tokens, name):
        return layer_norm(tokens, weights, f"{block}.{name}", EPS)

    exchange = f"{block}.exchange"
    logits, v = logits_of(norm(z, "compressed_norm"), norm(x, "lookup_norm"), weights, exchange, heads)
    z = z + joined(logits.softmax(-1), v, weights, f"{exchange}.proj")
    qkv = linear(norm(z, "mixer.norm"), weights, f"{block}.mixer.op.qkv").chunk(3, -1)
    q, k, v = (split(t, heads) for t in qkv)
    maps = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    z = z + joined(maps, v, weights, f"{block}.mixer.op.proj")
    z = z + mlp(norm(z, "mlp.norm"), weights, f"{block}.mlp.op.fc1", f"{block}.mlp.op.fc2")
    back = logits.softmax(-1).mT if reuse == "probs" else logits.mT.softmax(-1)
    x = x + joined(back, split(linear(z, weights, f"{exchange}.back_v"), heads), weights, f"{exchange}.back_proj")
    narrow = f"{block}.lookup_mlp"
    return z, x + mlp(norm(x, "lookup_mlp.norm"), weights, f"{narrow}.op.fc1", f"{narrow}.op.fc2")


def naive(tokens, weights, sizes, reuse, depth=3, heads=2):
    """From patches ``(batch, *grid, dim)`` to logits."""
    x = tokens + weights["positions.table"]
    z = resize(x, sizes).flatten(1, -2)
    x = x.flatten(1, -2)
    for i in range(depth):
        z, x = naive_block(z, x, weights, f"stages.0.blocks.{i}", heads, reuse)
    pooled = layer_norm(z, weights, "norm", EPS).mean(1) + layer_norm(x, weights, "lookup_norm", EPS).mean(1)
    return linear(pooled, weights, "head")


@pytest.mark.parametrize("reuse", ["probs", "logits"])
@pytest.mark.parametrize("size", [2, 3, (1, 4)])
def test_equals_the_definition_with_all_gradients(size, reuse):
    model, weights = narrow(size=size, reuse=reuse)
    image = torch.randn(2, 3, 80, 80, **DOUBLE)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    sizes = size if isinstance(size, tuple) else (size, size)
    expected = naive(patches(image, leaves, "stem.proj", 16), leaves, sizes, reuse)
    got = model(image)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    got.sin().sum().backward()
    expected.sin().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, leaves[name].grad, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("reuse", ["probs", "logits"])
def test_videos_are_tubelets_and_a_trilinear_resize(reuse):
    model, weights = narrow(VIDEO, image_size=(6, 48, 64), size=(2, 2, 3), reuse=reuse)
    video = torch.randn(2, 3, 6, 48, 64, **DOUBLE)
    kernel = weights["stem.proj.weight"].flatten(1)
    tokens = video.new_empty(2, 3, 3, 4, 16)
    for t, r, c in itertools.product(range(3), range(3), range(4)):
        tubelet = video[:, :, 2 * t : 2 * t + 2, 16 * r : 16 * r + 16, 16 * c : 16 * c + 16]
        tokens[:, t, r, c] = tubelet.flatten(1) @ kernel.T + weights["stem.proj.bias"]
    with torch.no_grad():
        torch.testing.assert_close(model(video), naive(tokens, weights, (2, 2, 3), reuse), rtol=1e-11, atol=1e-11)
        odd = video[:, :, :5]  # the last tubelet is not full
        maps = model.get_intermediate_layers(odd, reshape=True, compressed=True)
        assert [m.shape for m in maps] == [(2, 16, 3, 3, 4)]
        shorter = video[:, :, :4]
        held = resize_axis(weights["positions.table"], 1, 2)
        model.positions.table = nn.Parameter(held)
        direct = model(shorter)
        model.positions.table = nn.Parameter(weights["positions.table"])
        torch.testing.assert_close(model(shorter), direct)  # the table of positions is interpolated along time
    with pytest.raises(ValueError, match=r"expected images \(batch, 3, frames, height, width\); got \(2, 3, 48, 64\)"):
        model(video[:, :, 0])


# --------------------------------------------------------------------------------------------------------------------
# gathering and spreading


def test_gathering_by_all_tokens_from_themselves_is_self_attention():
    """M = N and nothing resized: the first step is an attention layer."""
    exchange = randomise(BidirectionalAttention(16, 4, **DOUBLE))
    attention = MultiHeadAttention(16, 4, **DOUBLE)
    attention.load_state_dict({
        "qkv.weight": torch.cat([exchange.q.weight, exchange.kv.weight]),
        "qkv.bias": torch.cat([exchange.q.bias, exchange.kv.bias]),
        "proj.weight": exchange.proj.weight,
        "proj.bias": exchange.proj.bias,
    })  # fmt: skip
    x = torch.randn(2, 3, 5, 16, **DOUBLE)
    y, _ = exchange.gather(x, x)
    torch.testing.assert_close(y, attention(x))
    model, _ = narrow(size=5)
    (state,) = model.run_blocks(torch.randn(1, 3, 80, 80, **DOUBLE), (0,))
    assert torch.equal(state.places(compressed=True), state.compressed)  # 5 x 5 patches: nothing is resized


def sent(exchange, values):
    """What reaches the context when the values are set by hand, without the projections around them."""
    width = exchange.dim
    for layer in (exchange.back_v, exchange.back_proj):
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    x, context = torch.randn(2, 2, 3, width, **DOUBLE), torch.randn(2, 4, 5, width, **DOUBLE)
    _, link = exchange.gather(x, context)
    return exchange.spread(values.expand(2, 2, 3, width), link)


def test_transposed_weights_hand_out_exactly_what_was_gathered():
    """Each of M compressed tokens gives itself away once per head; what one lookup token gets may be anything."""
    exchange = randomise(BidirectionalAttention(8, 2, reuse="probs", **DOUBLE))
    mass = sent(exchange, torch.ones(8, **DOUBLE)).unflatten(-1, (2, 4))[..., 0]  # (batch, 4, 5, heads)
    torch.testing.assert_close(mass.sum((1, 2)), torch.full((2, 2), 6.0, **DOUBLE))
    assert mass.max() > 2 * mass.min()


def test_transposed_logits_are_cross_attention_with_queries_and_keys_swapped():
    exchange = randomise(BidirectionalAttention(8, 2, reuse="logits", **DOUBLE))
    torch.testing.assert_close(sent(exchange, torch.ones(8, **DOUBLE)), torch.ones(2, 4, 5, 8, **DOUBLE))
    swapped = MultiHeadAttention(8, 2, **DOUBLE)
    x, context = torch.randn(2, 6, 8, **DOUBLE), torch.randn(2, 20, 8, **DOUBLE)
    parts = {"weight": [], "bias": []}
    for kind, rows in parts.items():
        q, k = getattr(exchange.kv, kind)[:8], getattr(exchange.q, kind)
        rows += [q, k, getattr(exchange.back_v, kind)]
    swapped.qkv.load_state_dict({kind: torch.cat(rows) for kind, rows in parts.items()})
    swapped.proj.load_state_dict(exchange.back_proj.state_dict())
    _, link = exchange.gather(x, context)
    torch.testing.assert_close(exchange.spread(x, link), swapped(context, context=x))


def test_the_two_readings_differ_and_others_are_refused():
    outputs = []
    for reuse in ("probs", "logits"):
        model, _ = narrow(reuse=reuse)
        torch.manual_seed(0)
        outputs.append(model(torch.randn(1, 3, 80, 80, **DOUBLE)))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"reuse must be one of probs, logits; got 'weights'"):
        create_model("lookupvit_base_patch16_224", reuse="weights", device="meta")
    with pytest.raises(ValueError, match=r"dim must be a multiple of heads; got dim=10, heads=4"):
        BidirectionalAttention(10, 4)
    with pytest.raises(ValueError, match=r"expected context \(batch, \*grid, 8\); got \(1, 4, 6\)"):
        BidirectionalAttention(8, 2).gather(torch.randn(1, 4, 8), torch.randn(1, 4, 6))


def test_a_permutation_of_the_lookup_tokens_goes_through_a_block():
    model, _ = narrow()
    (state,) = model.run_blocks(torch.randn(2, 3, 80, 80, **DOUBLE), (0,))
    order = torch.randperm(25)
    moved = state._replace(lookup=state.lookup.flatten(1, 2)[:, order])
    block = model.stages[0].blocks[1]
    plain, permuted = block(state), block(moved)
    torch.testing.assert_close(permuted.compressed, plain.compressed)
    torch.testing.assert_close(permuted.lookup, plain.lookup.flatten(1, 2)[:, order])


# --------------------------------------------------------------------------------------------------------------------
# budgets


def test_one_set_of_weights_serves_any_number_of_compressed_tokens():
    model, weights = narrow()
    image = torch.randn(2, 3, 80, 80, **DOUBLE)
    tokens = patches(image, weights, "stem.proj", 16)
    outputs = []
    for size in (3, 5, 7, 10):
        model.set_size(size)
        assert model.num_prefix_tokens == size * size
        assert model.forward_features(image).shape == (2, size * size + 25, 16)
        outputs.append(model(image))
        torch.testing.assert_close(outputs[-1], naive(tokens, weights, (size, size), "probs"), rtol=1e-11, atol=1e-11)
    assert all((a - b).abs().max() > 1e-4 for a, b in itertools.combinations(outputs, 2))
    with pytest.raises(ValueError, match=r"size must be at least 1; got int 0"):
        model.set_size(0)
    with pytest.raises(ValueError, match=r"a number, or 2 of them, one per axis; got tuple \(2, 2, 2\)"):
        model.set_size((2, 2, 2))


def test_sizes_are_drawn_uniformly_by_a_generator():
    model, _ = narrow()
    generator = torch.Generator().manual_seed(0)
    drawn = [model.draw_size((3, 5, (2, 4)), generator) for _ in range(300)]
    assert model.compress.size == drawn[-1]
    assert all(70 < drawn.count(size) < 130 for size in (3, 5, (2, 4)))
    again = torch.Generator().manual_seed(0)
    assert [model.draw_size((3, 5, (2, 4)), again) for _ in range(300)] == drawn


@pytest.mark.parametrize("size", [2, 4])
def test_cost_is_the_closed_form_and_linear_in_the_patches(size):
    dim, depth, heads, m = 32, 2, 4, size * size
    model = create_model(
        "lookupvit_base_patch16_224", dim=dim, depth=depth, head_dim=8, size=size, num_classes=7, device="meta"
    )
    totals = []
    for side in (96, 192, 288):
        n = (side // 16) ** 2
        layers = dim**2 * (4 * n + 15 * m)
        pairs = dim * (4 * n * m + 2 * m * m) + heads * n * m  # the log-sum-exp is one more channel on the way back
        expected = depth * (layers + pairs) + 768 * dim * n + 7 * dim
        assert multiply_adds(model, side) == pytest.approx(expected / 1e9, rel=1e-12)
        totals.append(expected)
    assert (totals[1] - totals[0]) * (18**2 - 12**2) == (totals[2] - totals[1]) * (12**2 - 6**2)
    with count() as cost:
        model(torch.empty(1, 3, 96, 96, device="meta"))
    assert cost.calls == 3 * depth  # gather, self-attention, spread: nothing is computed twice but the weights


def test_half_the_cost_of_the_host_at_five_by_five():
    host = multiply_adds(create_model("vit_base_patch16_224", device="meta"), 224)
    model = create_model("lookupvit_base_patch16_224", size=5, device="meta")
    assert multiply_adds(model, 224) < host / 2
    model.set_size(10)
    assert 0.9 * host < multiply_adds(model, 224) < host


SIZES = {  # of the reconstruction: dim, depth, volume of a patch, places, classes
    "lookupvit_base_patch16_224": (768, 12, 256, 196, 1000),
    "lookupvit_large_patch16_224": (1024, 24, 256, 196, 1000),
    "lookupvit_base_tubelet2x16_224.k400": (768, 12, 512, 3136, 400),
    "lookupvit_base_tubelet2x16_224.ssv2": (768, 12, 512, 3136, 174),
    "lookupvit_large_tubelet2x16_224.k400": (1024, 24, 512, 3136, 400),
}


@pytest.mark.parametrize(("name", "table"), SIZES.items())
def test_parameter_counts_equal_the_closed_form(name, table):
    dim, depth, volume, places, classes = table
    host = 12 * dim**2 + 13 * dim  # a transformer block
    exchange = 6 * dim**2 + 6 * dim + 4 * dim  # q, k, v, v', two projections, two norms
    narrow = dim**2 + dim // 2 + dim + 2 * dim  # to half the channels and back, and its norm
    total = 3 * volume * dim + dim + places * dim + depth * (host + exchange + narrow) + 4 * dim + (dim + 1) * classes
    assert count_parameters(create_model(name, device="meta")) == total == model_card(name).params
    assert set(list_models("lookupvit*")) == set(SIZES)


@pytest.mark.parametrize("name", [name for name in SIZES if "patch16" in name])
def test_multiply_adds_are_those_of_the_card(name):
    assert multiply_adds(create_model(name, device="meta"), 224) == pytest.approx(model_card(name).gmacs, rel=0.01)


def accuracies(sizes, seed):
    """Digits (8 x 8 pixels, 16 patches), 1400 to train on for 25 epochs, the other 397 at each of three budgets."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(digits.target)
    torch.manual_seed(seed)
    table = {"dim": 32, "head_dim": 16, "depth": 2, "patch_size": 2, "image_size": 8, "num_classes": 10}
    model = create_model("lookupvit_base_patch16_224", in_chans=1, **table)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=25 * 22)
    for _ in range(25):
        for batch in torch.randperm(1400, generator=generator).split(64):
            model.draw_size(sizes, generator)
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    found = {}
    with torch.no_grad():
        for size in (1, 2, 3):
            model.set_size(size)
            found[size] = (model(images[1400:]).argmax(1) == labels[1400:]).float().mean().item()
    return found


@pytest.mark.slow
def test_training_with_drawn_sizes_serves_every_budget():
    """Seed 1: 0.86, 0.85, 0.84 with 1, 4 and 9 tokens; trained with 9 alone the same weights give 0.40, 0.62, 0.84."""
    every, one = accuracies((1, 2, 3), seed=1), accuracies((3,), seed=1)
    assert min(every.values()) > 0.8
    assert every[1] > one[1] + 0.2
    assert every[2] > one[2] + 0.1
    assert every[3] > one[3] - 0.05


# --------------------------------------------------------------------------------------------------------------------
# maps


def test_both_sets_of_tokens_are_maps_of_the_grid():
    model, _ = narrow(size=2)
    image = torch.randn(2, 3, 61, 83, **DOUBLE)  # 4 x 6 patches
    (state,) = model.run_blocks(image)
    (lookup,) = model.get_intermediate_layers(image, reshape=True, norm=True)
    torch.testing.assert_close(lookup.movedim(1, -1), F.layer_norm(
        state.lookup, (16,), model.lookup_norm.weight, model.lookup_norm.bias, EPS
    ))  # fmt: skip
    (compressed,) = model.get_intermediate_layers(image, reshape=True, compressed=True)
    for row, column in itertools.product(range(4), range(6)):
        assert torch.equal(compressed[:, :, row, column], state.compressed[:, row // 2, column // 3])
    cut = create_model("lookupvit_base_patch16_224", features_only=True, out_indices=(2, 0), **NARROW, **DOUBLE, size=2)
    cut.load_state_dict({key: value for key, value in model.state_dict().items() if key in cut.state_dict()})
    wanted = model.get_intermediate_layers(image, (0, 2), reshape=True)
    assert all(torch.equal(a, b) for a, b in zip(cut.eval()(image), wanted, strict=True))  # bitwise: the same operators
    assert [info["module"] for info in cut.feature_info] == ["stages.0.blocks.0", "stages.0.blocks.2"]


def test_the_lens_sees_gathering_and_the_work_between():
    model, _ = narrow(size=2)
    image = torch.randn(1, 3, 80, 80, **DOUBLE)
    with lens.capture(model) as maps:
        model(image)
    shapes = [tuple(record.weights[0].shape) for record in maps]
    assert (1, 2, 4, 5, 5) in shapes  # what each compressed token gathers from, on the grid of patches
    assert (1, 2, 4, 2, 2) in shapes


def test_recomputed_blocks_change_no_gradient():
    model, _ = narrow()
    image, gradients = torch.randn(2, 3, 80, 80, **DOUBLE), []
    for enable in (False, True):
        model.train().zero_grad()
        model.set_grad_checkpointing(enable)
        model(image).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))  # bitwise: the same operators on the same shapes
    assert "positions.table" in model.no_weight_decay()


def test_wrong_tables_are_told():
    with pytest.raises(ValueError, match=r"one per axis of images \(2\) or videos \(3\); got \(16,\)"):
        lookup_vit(patch_size=(16,))
    with pytest.raises(ValueError, match=r"size must be a number, or 3 of them, one per axis; got tuple \(32, 224\)"):
        lookup_vit(patch_size=(2, 16, 16), image_size=(32, 224))
