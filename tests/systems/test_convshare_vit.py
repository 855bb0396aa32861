"""ConvShareViT (11): tokens are convolved one by one with kernels they share, on maps, on optical planes, and in a network."""

import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from naive_backbones import multiply_adds, randomise
from torch import nn

from regard import create_mixer, create_model, list_models
from regard.layers.mlps import MLP
from regard.lens import capture
from regard.models import count_parameters, model_card
from regard.models.backbones.convshare_vit import ConvShareAttention, ConvShareMLP, TokenConv, optical_passes

DOUBLE = {"dtype": torch.float64}
STUDY = list(itertools.product(("valid", "same"), ("shared", "own"), ("qkv", "mlp", "both")))


def layer(dim, out, kernel_size, side, **options):
    return randomise(TokenConv(dim, out, kernel_size, side=side, **options, **DOUBLE))


def naive(x, weight, bias, side, same):
    """One token (channels) at a time, tap by tap; kernels (kernels, maps, k, k)."""
    kernels, maps, size, _ = weight.shape
    x = x.reshape(maps, side, side)
    reach, before = (side, size // 2) if same else (side - size + 1, 0)
    y = torch.zeros(kernels, reach, reach, dtype=x.dtype)
    for kernel, row, column in itertools.product(range(kernels), range(reach), range(reach)):
        y[kernel, row, column] = bias[kernel]
        for at, i, j in itertools.product(range(maps), range(size), range(size)):
            r, c = row + i - before, column + j - before
            if 0 <= r < side and 0 <= c < side:
                y[kernel, row, column] += weight[kernel, at, i, j] * x[at, r, c]
    return y.flatten()


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("dim", "out", "kernel", "padding"), [(16, 12, 3, "valid"), (32, 9, 2, "valid"), (32, 16, 3, "same")])
def test_equals_loops_over_tokens_maps_and_taps(dim, out, kernel, padding, own):
    conv = layer(dim, out, kernel, 4, padding=padding, tokens=6 if own else None)
    x = torch.randn(2, 2, 3, dim, **DOUBLE)
    weight = conv.conv.weight.unflatten(0, (-1, conv.kernels))  # (tokens or 1, kernels, maps, k, k)
    bias = conv.conv.bias.unflatten(0, (-1, conv.kernels))
    expected = torch.empty(2, 6, out, **DOUBLE)
    for item, token in itertools.product(range(2), range(6)):
        set_of = token if own else 0
        expected[item, token] = naive(x.flatten(1, 2)[item, token], weight[set_of], bias[set_of], 4, padding == "same")
    torch.testing.assert_close(conv(x).flatten(1, 2), expected, rtol=1e-12, atol=1e-12)


def test_kernels_as_large_as_the_map_are_a_linear_layer():
    conv, linear = layer(36, 10, 6, 6), nn.Linear(36, 10, **DOUBLE)
    linear.load_state_dict({"weight": conv.conv.weight.flatten(1), "bias": conv.conv.bias})
    x = torch.randn(3, 2, 5, 36, **DOUBLE)
    torch.testing.assert_close(conv(x), linear(x), rtol=1e-12, atol=1e-12)


def as_linear(weights):
    """Kernels as large as the map, as the weights of linear layers."""
    return {name.replace(".conv.", "."): t.flatten(1) if t.ndim == 4 else t for name, t in weights.items()}


def test_a_network_of_such_kernels_is_a_plain_transformer():
    make = partial(TokenConv, kernel_size=4, side=4)
    conv = randomise(ConvShareAttention(16, 4, make=make, **DOUBLE))
    plain = create_mixer("multi_head", dim=16, heads=4, **DOUBLE)
    weights = as_linear(conv.state_dict())
    qkv = {f"qkv.{kind}": torch.cat([weights[f"q.{kind}"], weights[f"kv.{kind}"]]) for kind in ("weight", "bias")}
    plain.load_state_dict(qkv | {name: value for name, value in weights.items() if name.startswith("proj")})
    x = torch.randn(2, 3, 4, 16, **DOUBLE)
    torch.testing.assert_close(conv(x), plain(x), rtol=1e-12, atol=1e-12)
    mlp, linear = randomise(ConvShareMLP(16, 32, make=make, **DOUBLE)), MLP(16, 32, **DOUBLE)
    linear.load_state_dict(as_linear(mlp.state_dict()))  # the second layer sums over the two maps that 32 channels are
    torch.testing.assert_close(mlp(x), linear(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("padding", ["valid", "same"])
def test_heads_attend_with_kernels_of_their_own(padding, other):
    heads, side, same = 2, 4, padding == "same"
    make = partial(TokenConv, kernel_size=3, side=side, padding=padding)
    mixer = randomise(ConvShareAttention(16, heads, make=make, padding=padding, **DOUBLE))
    x = torch.randn(2, 2, 3, 16, **DOUBLE)
    context = torch.randn(2, 5, 1, 16, **DOUBLE) if other else None
    weights = mixer.state_dict()

    def convolved(tokens, name):
        kernel, bias = weights[f"{name}.conv.weight"], weights[f"{name}.conv.bias"]
        return torch.stack([torch.stack([naive(t, kernel, bias, side, same) for t in item]) for item in tokens])

    def maps(tokens, name, kernels):
        """What each kernel makes of each token: (batch, tokens, kernels, channels of a map)."""
        return convolved(tokens.flatten(1, 2), name).unflatten(-1, (kernels, -1))

    each = 1 if same else 2  # kernels of a head: of one map of 4 x 4, or of two of 2 x 2
    q = maps(x, "q", heads * each)
    k, v = maps(x if context is None else context, "kv", 2 * heads * each).chunk(2, 2)
    joint = []
    for head in range(heads):
        own = slice(head * each, (head + 1) * each)
        a, b, c = (t[:, :, own].flatten(2) for t in (q, k, v))
        joint.append((a @ b.transpose(1, 2) / math.sqrt(16 if same else 8)).softmax(-1) @ c)
    expected = convolved(torch.cat(joint, -1), "proj")
    torch.testing.assert_close(mixer(x, context=context).flatten(1, 2), expected, rtol=1e-12, atol=1e-12)


def test_tokens_are_permuted_with_their_outputs_and_do_not_mix():
    conv, order = layer(16, 12, 3, 4), torch.randperm(10)
    x = torch.randn(2, 10, 16, **DOUBLE)
    torch.testing.assert_close(conv(x[:, order]), conv(x)[:, order], rtol=1e-12, atol=1e-12)
    changed = x.clone()
    changed[:, 3] += 1
    assert (conv(changed) != conv(x)).any(-1).nonzero()[:, 1].unique().tolist() == [3]
    own = layer(16, 12, 3, 4, tokens=10)
    assert not torch.allclose(own(x[:, order]), own(x)[:, order])


def test_nearly_whole_kernels_see_most_of_a_token_and_small_ones_a_neighbourhood():
    def seen(conv):
        """How many channels of the token each output channel depends on."""
        return (torch.autograd.functional.jacobian(conv, torch.zeros(1, 1, 64, **DOUBLE))[0, 0, :, 0, 0] != 0).sum(-1)

    assert set(seen(layer(64, 64, 7, 8)).tolist()) == {49}
    assert set(seen(layer(64, 64, 3, 8, padding="same")).tolist()) == {4, 6, 9}


def test_parameters_of_shared_kernels_do_not_know_the_number_of_tokens():
    shared = layer(64, 64, 7, 8, bias=False)
    assert count_parameters(shared) == 16 * 7**2  # 16 kernels whose maps of 2 x 2 make 64 channels
    assert shared(torch.randn(1, 9, 64, **DOUBLE)).shape == (1, 9, 64)
    assert shared(torch.randn(1, 2, 7, 64, **DOUBLE)).shape == (1, 2, 7, 64)
    assert count_parameters(layer(64, 64, 7, 8, tokens=9, bias=False)) == 9 * 16 * 7**2


# --------------------------------------------------------------------------------------------------------------------
# the study


@pytest.mark.parametrize(("padding", "kernels", "place"), STUDY)
def test_parameters_and_multiply_adds_are_those_of_the_table(padding, kernels, place):
    name = f"convshare_vit_{padding}_{kernels}_{place}"
    size, reach, heads_width = (13, 16, 256) if padding == "valid" else (3, 256, 1024)  # reach: channels a kernel makes
    sets = 1 if kernels == "shared" else 64

    def conv(maps, out):
        return sets * (out // reach) * (maps * size**2 + 1)

    if place == "mlp":
        attention = 4 * (256**2 + 256)
    else:
        attention = conv(1, 3 * heads_width)
        attention += conv(heads_width // 256, 256) if place == "both" else heads_width * 256 + 256
    mlp = 2 * 256 * 1024 + 1280 if place == "qkv" else conv(1, 1024) + conv(4, 256)
    total = 48 * 256 + 256 + 64 * 256 + 6 * (attention + mlp + 4 * 256) + 2 * 256 + 100 * 257
    model, card = create_model(name, device="meta"), model_card(name)
    assert count_parameters(model) == total == card.params
    assert multiply_adds(model, 32) == pytest.approx(card.gmacs, abs=5e-5)
    if place == "both":
        assert not any(isinstance(m, nn.Linear) for m in model.stages.modules())


def test_every_configuration_is_here():
    assert list_models("convshare_vit_*") == sorted("convshare_vit_" + "_".join(key) for key in STUDY)


def test_shared_kernels_take_images_of_any_size_and_own_ones_say_that_they_do_not():
    small = {"side": 4, "depth": 1, "kernel_size": 3, "num_classes": 3}
    image = torch.randn(1, 3, 37, 22)
    assert create_model("convshare_vit_valid_shared_both", **small)(image).shape == (1, 3)
    with pytest.raises(ValueError, match=r"expected \(batch, 64 tokens, 16\); got \(1, 10, 6, 16\)"):
        create_model("convshare_vit_same_own_mlp", **small)(image)


def duplicates(count, generator):
    """Nine tokens of 8 x 8: the first one's mirror image stands in another place; which of four tags does that one carry?"""
    x = torch.randn(count, 9, 8, 8, generator=generator)
    at = torch.randint(1, 9, (count,), generator=generator)
    tags = torch.randint(0, 4, (count, 9), generator=generator)
    each = torch.arange(count)
    x[each, at] = x[:, 0].flip(-1)
    x[:, :, 7] = 3.0 * F.one_hot(tags, 8)
    return x.reshape(count, 3, 3, 64), at, tags[each, at]


def trained(padding, kernel_size, steps=200):
    """Accuracy, and what the first token looks at, (images, tokens), of attention trained to find duplicates."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    make = partial(TokenConv, kernel_size=kernel_size, side=8, padding=padding)
    mixer, head = ConvShareAttention(64, 1, make=make, padding=padding), nn.Linear(64, 4)
    optimiser = torch.optim.Adam([*mixer.parameters(), *head.parameters()], lr=5e-3)
    for _ in range(steps):
        x, _, tags = duplicates(128, generator)
        optimiser.zero_grad()
        F.cross_entropy(head(mixer(x)[:, 0, 0]), tags).backward()
        optimiser.step()
    x, at, tags = duplicates(1024, torch.Generator().manual_seed(2))
    with torch.no_grad(), capture(mixer, rows=[(0, 0)]) as maps:
        accuracy = (head(mixer(x)[:, 0, 0]).argmax(-1) == tags).float().mean().item()
    looks = maps[0].weights[0][:, 0, 0].flatten(1)
    return accuracy, looks.gather(1, at[:, None]).mean().item(), looks


@pytest.mark.slow
def test_valid_padding_learns_to_attend_like_linear_layers_and_same_padding_does_not():
    """Seed 0, 200 steps of 128: matching mirrored tokens needs every channel to meet every other before the product.

    Two layers of "same" 3 x 3 kernels bring channels together that are at most two columns apart. Stated margins: 30 points of
    accuracy, and in what the first token looks at, half of its attention.
    """
    accuracy, found, looks = zip(*[trained("valid", 8), trained("valid", 7), trained("same", 3)], strict=True)
    assert min(accuracy[:2]) > 0.95
    assert accuracy[2] < accuracy[1] - 0.3
    assert min(found[:2]) > 0.9
    assert found[2] < 0.4
    likeness = [F.cosine_similarity(looks[0], other, dim=-1).mean().item() for other in looks[1:]]
    assert likeness[0] > 0.95
    assert likeness[1] < 0.65


# --------------------------------------------------------------------------------------------------------------------
# optics


def correlate(plane, kernel):
    """What a 4f correlator shows: the full correlation, whose place (i, j) has the kernel's corner at (i, j) minus its size."""
    pads = [kernel.shape[1] - 1] * 2 + [kernel.shape[0] - 1] * 2
    return F.conv2d(F.pad(plane, pads)[None, None], kernel[None, None])[0, 0]


def side_by_side(maps, tile):
    """Maps on a square plane, each in the upper left corner of its tile."""
    count = math.isqrt(len(maps))
    plane = torch.zeros(count * tile, count * tile, **DOUBLE)
    for at, each in enumerate(maps):
        row, column = divmod(at, count)
        plane[row * tile : row * tile + each.shape[0], column * tile : column * tile + each.shape[1]] = each
    return plane


@pytest.mark.parametrize(("size", "padding"), [(4, "valid"), (3, "same"), (5, "same")])
def test_one_pass_over_tokens_side_by_side_convolves_them_all(size, padding):
    """Tiles lie as close as ``tile`` says, and closer they would touch."""
    reach = 6 if padding == "same" else 6 - size + 1
    conv = layer(36, reach**2, size, 6, padding=padding, bias=False)
    x = torch.randn(1, 9, 36, **DOUBLE)
    first = size - 1 - (size // 2 if padding == "same" else 0)

    def read(tile):
        seen = correlate(side_by_side(x.reshape(9, 6, 6), tile), conv.conv.weight[0, 0])
        starts = [(first + i * tile, first + j * tile) for i in range(3) for j in range(3)]
        return torch.stack([seen[r : r + reach, c : c + reach].flatten() for r, c in starts])[None]

    torch.testing.assert_close(read(conv.tile), conv(x), rtol=1e-11, atol=1e-11)
    if padding == "same":
        assert not torch.allclose(read(conv.tile - 1), conv(x))
    assert conv.passes(9, (3 * conv.tile, 3 * conv.tile), "token") == 1
    assert conv.passes(10, (3 * conv.tile, 3 * conv.tile), "token") == 2


@pytest.mark.parametrize(("size", "padding"), [(4, "valid"), (3, "same")])
def test_one_pass_over_kernels_side_by_side_makes_all_maps(size, padding):
    reach = 6 if padding == "same" else 6 - size + 1
    conv = layer(36, 4 * reach**2, size, 6, padding=padding, bias=False)
    x = torch.randn(1, 1, 36, **DOUBLE)
    tile = conv.tile
    kernels = side_by_side(list(conv.conv.weight[:, 0].flip(0)), tile)  # a correlation shows the last kernel first
    seen = correlate(x.reshape(6, 6), kernels)
    before = size // 2 if padding == "same" else 0
    first = 2 * tile - 1 - tile - before
    starts = [(first + i * tile, first + j * tile) for i in range(2) for j in range(2)]
    maps = torch.stack([seen[r : r + reach, c : c + reach] for r, c in starts])
    torch.testing.assert_close(maps.flatten()[None, None], conv(x), rtol=1e-11, atol=1e-11)
    assert conv.passes(1, (2 * tile, 2 * tile), "kernel") == 1
    assert conv.passes(3, (2 * tile, tile), "kernel") == 6


def test_passes_are_pairs_of_map_and_kernel_over_the_tiles_of_a_plane():
    conv = TokenConv(512, 256, 13, side=16)  # two maps, 16 kernels, tiles of 16 x 16
    plane = (40, 70)  # 2 x 4 tiles
    assert conv.passes(64, plane, "mixed") == 128 * 16 // 8
    assert conv.passes(63, plane, "mixed") == math.ceil(126 * 16 / 8)
    assert conv.passes(63, plane, "token") == 16 * math.ceil(126 / 8)
    assert conv.passes(63, plane, "kernel") == 126 * 2
    own = TokenConv(512, 256, 13, side=16, tokens=63)  # no kernel serves two tokens
    assert own.passes(63, plane, "mixed") == own.passes(63, plane, "kernel") == 126 * 2
    assert own.passes(63, plane, "token") == 126 * 16
    padded = TokenConv(256, 256, 5, side=16, padding="same")  # tiles of 18 x 18: 2 x 3
    assert padded.passes(64, plane, "token") == math.ceil(64 / 6)
    model = create_model("convshare_vit_valid_shared_qkv", device="meta", depth=2)
    assert optical_passes(model, 64, plane) == 2 * 3 * 64 * 16 // 8
    assert (
        optical_passes(create_model("convshare_vit_valid_shared_mlp", device="meta", depth=2), 64, plane)
        == 2 * (64 + 64) * 64 // 8
    )


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"kernel_size": 5}, r"kernel_size must be in 1\.\.4, the side of a map; got 5"),
        ({"kernel_size": 2, "padding": "same"}, r"must be odd and in 1\.\.4.* got 2"),
        ({"padding": "full"}, "padding must be one of valid, same; got 'full'"),
        ({"dim": 20}, "dim must be a multiple of 16, the channels of a map; got 20"),
        ({"out": 18}, "out must be a multiple of 4, the channels of a map; got 18"),
    ],
)
def test_wrong_sizes_are_told(options, told):
    with pytest.raises(ValueError, match=told):
        TokenConv(**{"dim": 16, "out": 16, "kernel_size": 3, "side": 4} | options)


def test_wrong_places_planes_and_tilings_are_told():
    with pytest.raises(ValueError, match="any of qkv, proj, mlp; got 'k'"):
        create_model("convshare_vit_valid_shared_both", convolved=("qkv", "k"))
    conv = TokenConv(16, 16, 3, side=4)
    with pytest.raises(ValueError, match="a tile has 4 x 4 pixels; the plane has 3 x 100"):
        conv.passes(4, (3, 100))
    with pytest.raises(ValueError, match="tiling must be one of token, kernel, mixed; got 'channel'"):
        conv.passes(4, tiling="channel")
