"""TiC (2): attention within a kernel, where zeros outside the map count, and the convolution behind it."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from naive_backbones import randomise
from torch import nn

from regard import create_mixer, create_model, list_models
from regard.bench import count
from regard.layers.mixers.msa_conv import MSAConv
from regard.models import count_parameters, model_card

DOUBLE = {"dtype": torch.float64}
NARROW = {"dim": 8, "head_dim": 2, "depths": (2, 1), "kernel_size": 3, "shift": 2}
DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1))


def layer(dim=8, heads=1, kernel_size=3, *arguments, **options):
    """A layer whose every parameter is random."""
    return randomise(MSAConv(dim, heads, kernel_size, *arguments, **options, **DOUBLE))


def naive_attention(x, weight, bias, heads, size, dilation, shift, mask):
    """Head by head, pixel by pixel, on maps (batch, channels, rows, columns) with zeros around them."""
    qkv = F.conv2d(x, weight[..., None, None], bias).chunk(3, 1)
    channels, rows, columns = x.shape[1:]
    out = torch.empty_like(x)
    for head in range(heads):
        own = slice(head * channels // heads, (head + 1) * channels // heads)
        way = [steps * shift for steps in DIRECTIONS[head % 4]]
        q, k, v = (t[:, own].roll(way, (2, 3)) for t in qkv)
        mixed = torch.empty_like(q)
        for row, column in itertools.product(range(rows), range(columns)):
            logits, values = [], []
            for i, j in itertools.product(range(size), repeat=2):
                r, c = row + (i - size // 2) * dilation, column + (j - size // 2) * dilation
                inside = 0 <= r < rows and 0 <= c < columns
                if inside or not mask:
                    key, value = (t[:, :, r, c] if inside else torch.zeros_like(t[:, :, 0, 0]) for t in (k, v))
                    logits.append((q[:, :, row, column] * key).sum(1) * channels**-0.5)
                    values.append(value)
            share = torch.stack(logits, -1).softmax(-1)
            mixed[:, :, row, column] = (share[:, None] * torch.stack(values, -1)).sum(-1)
        out[:, own] = mixed.roll([-steps for steps in way], (2, 3))
    return out


@pytest.mark.parametrize(
    ("heads", "kernel_size", "dilation", "shift", "mask", "stride"),
    [(1, 3, 1, 0, False, 1), (1, 5, 2, 0, False, 2), (4, 3, 1, 2, False, 1), (2, 3, 2, 3, True, 2)],
)
def test_equals_a_loop_over_pixels(heads, kernel_size, dilation, shift, mask, stride):
    mixer = layer(8, heads, kernel_size, dilation, shift, mask_padding=mask, stride=stride, out=6)
    x = torch.randn(2, 7, 6, 8, **DOUBLE)
    maps = x.movedim(-1, 1)
    weights = mixer.state_dict()  # the release calls them qkv_conv and mlp
    assert {name: tuple(t.shape) for name, t in weights.items()} == {
        "qkv.weight": (24, 8), "qkv.bias": (24,), "proj.0.conv.weight": (6, 8, 3, 3),
    }  # fmt: skip
    attended = naive_attention(maps, weights["qkv.weight"], weights["qkv.bias"], heads, kernel_size, dilation, shift, mask)
    expected = F.conv2d(maps + attended, weights["proj.0.conv.weight"], None, stride, 1).clamp(min=0)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x).movedim(-1, 1), expected, rtol=1e-11, atol=1e-11)
    assert 0.1 < (expected > 0).double().mean() < 0.9


@pytest.mark.parametrize("mask", [False, True])
def test_queries_of_zero_average_with_the_zeros_outside_counted_unless_masked(mask):
    mixer = layer(8, 2, 5, mask_padding=mask)
    with torch.no_grad():
        mixer.qkv.weight[:8], mixer.qkv.bias[:8] = 0.0, 0.0
        x = torch.randn(1, 6, 7, 8, **DOUBLE)
        q, k, v = mixer.project(x, x)
        y = mixer.mix(x, q, k, v, []).flatten(-2)
        mean = F.avg_pool2d(v.flatten(-2).movedim(-1, 1), 5, 1, 2, count_include_pad=not mask).movedim(1, -1)
    torch.testing.assert_close(y, mean)


def test_the_interior_moves_with_the_image():
    mixer = layer(8, 2, 3, 2)
    x = torch.randn(1, 14, 13, 8, **DOUBLE)
    with torch.no_grad():
        y, moved = mixer(x), mixer(x.roll((1, 2), (1, 2)))
    torch.testing.assert_close(moved[:, 4:-3, 5:-3], y.roll((1, 2), (1, 2))[:, 4:-3, 5:-3])
    assert (moved - y.roll((1, 2), (1, 2))).abs().max() > 1e-3  # at the border zeros come in


def test_rolling_there_and_back_is_nothing_and_heads_go_four_ways():
    mixer = MSAConv(16, 4, shift=3, **DOUBLE)
    x = torch.randn(2, 7, 5, 4, 4, **DOUBLE)
    assert torch.equal(mixer.roll(mixer.roll(x, 1), -1), x)
    impulse = torch.zeros(1, 9, 9, 4, 1, **DOUBLE)
    impulse[:, 4, 4] = 1.0
    assert mixer.roll(impulse, 1)[0, ..., 0].nonzero().tolist() == [[1, 4, 1], [4, 1, 3], [4, 7, 2], [7, 4, 0]]


def test_rolled_heads_see_across_the_border():
    x = torch.randn(1, 12, 12, 4, **DOUBLE, requires_grad=True)
    seen = []
    for shift in (0, 2):
        y = layer(4, 4, 3, 1, shift)(x)
        seen.append(torch.autograd.grad(y[0, 0, 0].sum(), x)[0].abs().sum(-1)[0] > 0)
    plain, rolled = seen
    assert plain[:3, :3].any()
    assert not plain[3:].any()
    assert rolled[-2:].any()
    assert not (plain & ~rolled).any()


def test_attention_cost_is_linear_in_the_grid():
    mixer, pairs = layer(8, 1, 5), []
    for columns in (16, 32, 48):
        with count() as cost:
            mixer(torch.zeros(1, 16, columns, 8, **DOUBLE))
        pairs.append(cost.pairs)
    assert pairs[2] - pairs[1] == pairs[1] - pairs[0] > 0


def test_tokens_outside_the_grid_meet_the_middle_of_the_kernel():
    mixer = layer(8, 2)
    x, extra = torch.randn(1, 5, 4, 8, **DOUBLE), torch.randn(1, 3, 8, **DOUBLE)
    y, y_extra = mixer(x, extra)
    assert y.shape == x.shape
    q, k, v = (t.unflatten(-1, (2, 4)).movedim(-2, 1) for t in mixer.qkv(torch.cat([x.flatten(1, 2), extra], 1)).chunk(3, -1))
    attended = ((q[:, :, -3:] @ k.mT * 8**-0.5).softmax(-1) @ v).movedim(1, -2).flatten(-2)
    expected = ((extra + attended) @ mixer.proj[0].conv.weight[..., 1, 1].T).clamp(min=0)
    torch.testing.assert_close(y_extra, expected)


def test_even_kernels_and_other_ranks_are_refused():
    with pytest.raises(ValueError, match=r"the first two odd.*; got kernel_size=4, conv_size=3"):
        create_mixer("msa_conv", dim=8, heads=1, kernel_size=4)
    with pytest.raises(ValueError, match="2 or 3; got 1"):
        create_mixer("msa_conv", dim=8, heads=1, rank=1)
    volume = create_mixer("msa_conv", dim=8, heads=2, kernel_size=3, rank=3, shift=1)
    assert volume(torch.randn(1, 3, 4, 5, 8)).shape == (1, 3, 4, 5, 8)


# --------------------------------------------------------------------------------------------------------------------
# the reconstructed network


def test_the_network_is_norms_and_layers_with_every_other_one_rolled():
    model = randomise(create_model("tic_tiny", num_classes=5, **NARROW, **DOUBLE))
    image = torch.randn(2, 3, 29, 37, **DOUBLE)
    with torch.no_grad():
        x = model.stem(image).movedim(-1, 1)  # 8 x 10, then 4 x 5
        for stage, dims, heads in zip(model.stages, ((8, 8, 8), (8, 16)), (4, 8), strict=True):
            for index, block in enumerate(stage.blocks):
                norm, weights = block.norm, block.op.state_dict()
                x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
                options = (heads, 3, 1, 2 * (index % 2), False)
                attended = naive_attention(x, weights["qkv.weight"], weights["qkv.bias"], *options)
                stride = 2 if dims == (8, 16) else 1
                x = F.conv2d(x + attended, weights["proj.0.conv.weight"], None, stride, 1).relu()
                assert x.shape[1] == dims[index + 1]
        expected = model.head(model.norm(x.movedim(1, -1)).mean((1, 2)))
        torch.testing.assert_close(model(image), expected, rtol=1e-11, atol=1e-11)
    assert (expected[0] - expected[1]).abs().max() > 1e-4


@pytest.mark.parametrize(("name", "dim", "depths"), [
    ("tic_tiny", 96, (2, 2, 6, 2)), ("tic_small", 96, (2, 2, 18, 2)), ("tic_base", 128, (2, 2, 18, 2)),
])  # fmt: skip
def test_parameter_counts_equal_the_closed_form(name, dim, depths):
    total = 27 * dim // 2 + dim // 2 + dim + 9 * dim // 2 * dim + dim + 2 * dim
    width = dim
    for stage, depth in enumerate(depths):
        for _ in range(depth):
            out = dim * 2**stage
            total += 2 * width + 3 * width**2 + 3 * width + 9 * width * out
            width = out
    total += 2 * width + 1000 * width + 1000
    assert count_parameters(create_model(name, device="meta")) == total == model_card(name).params
    assert list_models("tic_*") == ["tic_base", "tic_small", "tic_tiny"]


def test_another_mixer_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="in one: it takes no other mixer; got 'window'"):
        create_model("tic_tiny", mixer="window")


def test_weights_are_dropped_in_training_only():
    model = create_model("tic_tiny", num_classes=5, **NARROW)
    assert all(m.attn_drop == 0.1 for m in model.modules() if isinstance(m, MSAConv))
    x = torch.randn(1, 8, 8, 8)
    block = model.stages[0].blocks[0]
    block.norm = nn.Identity()
    assert not torch.equal(block.train()(x), block(x))
    assert torch.equal(block.eval()(x), block(x))  # bitwise: the same operators on the same shapes
