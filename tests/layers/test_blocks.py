"""Blocks, MLPs and stems: what they compute, written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regard.layers.blocks import DropPath, LayerScale, Residual, TokenBatchNorm
from regard.layers.mlps import GLU, MLP, ConvMLP
from regard.layers.stems import ConvDownsample, ConvStem, ConvTokenizer, PatchEmbed, PatchMerging

DOUBLE = {"dtype": torch.float64}


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    x = torch.ones(20_000, 2, 3)
    drop = DropPath(0.3).train()
    y = drop(x)
    per_sample = y.flatten(1)
    assert ((per_sample == 0).all(1) | (per_sample == per_sample[:, :1]).all(1)).all()
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert (per_sample[:, 0] == 0).double().mean().item() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(drop.eval()(x), x)
    with pytest.raises(ValueError, match=r"in \[0, 1\); got 1.5"):
        DropPath(1.5)


def test_residual_is_norm_op_scale_in_order():
    norm, op, scale = nn.LayerNorm(4, **DOUBLE), nn.Linear(4, 4, **DOUBLE), LayerScale(4, 0.25, **DOUBLE)
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    expected = x + 0.25 * op(norm(x))
    torch.testing.assert_close(Residual(norm, op, scale)(x), expected)
    dropped = Residual(norm, op, scale, drop_path=0.5).train()(x)
    per_sample = (dropped - x).flatten(1)
    kept = 2 * (expected - x).flatten(1)
    assert all(not ours.any() or torch.allclose(ours, theirs) for ours, theirs in zip(per_sample, kept, strict=True))


def test_token_batch_norm_is_that_of_channels_first_maps():
    ours, theirs = TokenBatchNorm(4, **DOUBLE), nn.BatchNorm2d(4, **DOUBLE)
    x = torch.randn(3, 5, 7, 4, dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(ours(x), theirs(x.movedim(-1, 1)).movedim(1, -1))
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x.movedim(-1, 1)).movedim(1, -1))


def test_mlps_equal_their_formulas():
    x = torch.randn(2, 5, 6, 4, dtype=torch.float64)
    mlp = MLP(4, 10, 3, **DOUBLE)
    torch.testing.assert_close(mlp(x), F.linear(F.gelu(mlp.fc1(x)), mlp.fc2.weight, mlp.fc2.bias))
    assert MLP(4).fc1.out_features == 16
    glu = GLU(4, 10, act=nn.SiLU, bias=False, **DOUBLE)
    gate, value = x @ glu.fc1.weight[:10].T, x @ glu.fc1.weight[10:].T
    torch.testing.assert_close(glu(x), (gate * gate.sigmoid() * value) @ glu.fc2.weight.T)
    conv = ConvMLP(4, 10, **DOUBLE)
    hidden = conv.fc1(x)
    padded = F.pad(hidden, [0, 0, 1, 1, 1, 1])
    mixed = conv.conv.bias + sum(
        padded[:, a : a + 5, b : b + 6] * conv.conv.weight[:, 0, a, b] for a in range(3) for b in range(3)
    )
    torch.testing.assert_close(conv(x), conv.fc2(F.gelu(mixed)))


def test_a_convolutional_mlp_takes_volumes_and_sequences():
    for rank, grid in ((1, (7,)), (3, (2, 3, 4))):
        mlp = ConvMLP(4, rank=rank, **DOUBLE)
        x = torch.randn(2, *grid, 4, dtype=torch.float64)
        convolution = {1: F.conv1d, 3: F.conv3d}[rank]
        mixed = convolution(mlp.fc1(x).movedim(-1, 1), mlp.conv.weight, mlp.conv.bias, padding=1, groups=16).movedim(1, -1)
        torch.testing.assert_close(mlp(x), mlp.fc2(F.gelu(mixed)))


def test_patch_embedding_fills_incomplete_patches_with_zeros():
    stem = PatchEmbed(3, 8, patch_size=4, **DOUBLE)
    image = torch.randn(2, 3, 9, 6, dtype=torch.float64)
    whole = torch.zeros(2, 3, 12, 8, dtype=torch.float64)
    whole[..., :9, :6] = image
    assert torch.equal(stem(image), stem(whole))  # bitwise: the same operators on the same shapes
    patch = whole[:, :, 8:12, 4:8].flatten(1)
    expected = stem.norm(patch @ stem.proj.weight.flatten(1).T + stem.proj.bias)
    torch.testing.assert_close(stem(image)[:, 2, 1], expected)


def test_patch_merging_puts_the_square_side_by_side_rows_first():
    merge = PatchMerging(3, 5, norm=lambda n, **_: nn.Identity(), **DOUBLE)
    x = torch.randn(1, 3, 5, 3, dtype=torch.float64)
    y = merge(x)
    assert y.shape == (1, 2, 3, 5)
    square = torch.cat([x[0, 0, 2], x[0, 1, 2], x[0, 0, 3], x[0, 1, 3]])
    torch.testing.assert_close(y[0, 0, 1], merge.reduction.weight @ square)
    zero = torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(y[0, 1, 2], merge.reduction.weight @ torch.cat([x[0, 2, 4], zero, zero, zero]))


@pytest.mark.parametrize("size", [(1, 1), (7, 12), (8, 9)])
def test_convolutional_stems_halve_twice_and_downsampling_halves_rounding_up(size):
    image = torch.randn(2, 3, *size)
    halved = [-(-n // 2) for n in size]
    for stem in (ConvTokenizer(3, 8), ConvStem(3, 8).eval()):
        assert stem(image).shape == (2, *(-(-n // 2) for n in halved), 8)
        assert stem.reduction == 4
    tokens = torch.randn(2, *size, 8)
    for kernel, first in ((3, False), (2, True)):
        assert ConvDownsample(8, 6, kernel_size=kernel, norm_first=first)(tokens).shape == (2, *halved, 6)


def test_the_order_of_norm_and_convolution_is_the_one_asked_for():
    tokens = torch.randn(2, 6, 8, 4, dtype=torch.float64)
    for kernel, first in ((3, False), (2, True), (3, True)):
        layer = ConvDownsample(4, 6, kernel_size=kernel, norm_first=first, **DOUBLE)
        nn.init.normal_(layer.norm.weight)
        x = layer.norm(tokens) if first else tokens
        x = F.conv2d(x.movedim(-1, 1), layer.conv.weight, None, 2, kernel // 3).movedim(1, -1)
        torch.testing.assert_close(layer(tokens), x if first else layer.norm(x))
