"""Convolutions with batch norm: what they compute, and that fusing them changes nothing."""

import math

import peers
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regard.layers.conv import convolve_tokens
from regard.layers.conv_norm import (
    DILATED_BRANCHES,
    ConvNorm,
    DilatedConvNorm,
    MBConv,
    NormLinear,
    ResidualConvNorm,
    SameConv2d,
    SqueezeMerging,
    fuse,
    round_channels,
    same_padding,
)

DOUBLE = {"dtype": torch.float64}


def scrambled(module: nn.Module) -> nn.Module:
    """The module in eval mode with arbitrary parameters and statistics."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 2.0) if name.endswith("running_var") else nn.init.normal_(tensor)
    return module.eval()


def convolutions(module: nn.Module) -> int:
    return sum(isinstance(m, nn.Conv2d) for m in module.modules())


FUSABLE = [
    lambda: ConvNorm(4, 6, 3, 2, act=nn.GELU, **DOUBLE),
    lambda: ConvNorm(4, 6, 3, 2, "same", groups=2, eps=1e-3, **DOUBLE),
    lambda: ConvNorm(4, 6, 3, dilation=2, **DOUBLE),
    lambda: ResidualConvNorm(4, 3, **DOUBLE),
    lambda: ResidualConvNorm(4, 5, groups=2, dilation=2, **DOUBLE),
    lambda: DilatedConvNorm(4, 17, **DOUBLE),
    lambda: DilatedConvNorm(4, 5, [(3, 2), (1, 1)], **DOUBLE),
]


@pytest.mark.parametrize("make", FUSABLE)
def test_a_fused_block_is_one_convolution_with_the_same_output(make):
    block = scrambled(make())
    x = torch.randn(2, 4, 19, 14, **DOUBLE)
    fused = fuse(block)
    torch.testing.assert_close(fused(x), block(x))
    assert convolutions(fused) == 1
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())


def test_fusing_a_model_replaces_everything_inside_and_keeps_outputs():
    shared = ConvNorm(8, 8, act=nn.ReLU)
    inner = nn.Sequential(ResidualConvNorm(8), DilatedConvNorm(8, 7))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), NormLinear(8, 5))
    first = ConvNorm(3, 8, 3, 2, act=nn.ReLU)
    model = scrambled(nn.Sequential(first, inner, shared, MBConv(8, 12, 2), ConvNorm(12, 8), shared, head))
    for p in model.parameters():
        p.data *= 0.3
    x = torch.randn(2, 3, 20, 18)
    expected = model(x)
    before = sum(p.numel() for p in model.parameters())
    assert fuse(model) is model
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in model.parameters()) < before
    assert sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()) == 1  # before MBConv's expansion
    assert model[2] is model[5]
    assert all(not m.training for m in model.modules())
    assert fuse(model)(x).equal(model(x))  # bitwise: the same operators on the same shapes


def test_models_in_training_are_not_fused():
    with pytest.raises(ValueError, match="call eval"):
        fuse(nn.Sequential(ConvNorm(3, 4)))


def test_a_classifier_folds_its_norm_forward():
    head = scrambled(NormLinear(6, 4, **DOUBLE))
    x = torch.randn(5, 6, **DOUBLE)
    normed = (x - head.norm.running_mean) / (head.norm.running_var + 1e-5).sqrt() * head.norm.weight + head.norm.bias
    torch.testing.assert_close(head(x), normed @ head.linear.weight.T + head.linear.bias)
    fused = fuse(head)
    assert isinstance(fused, nn.Linear)
    torch.testing.assert_close(fused(x), head(x))


def test_the_convolution_is_normalised_then_activated():
    block = scrambled(ConvNorm(3, 4, act=nn.SiLU, eps=0.1, **DOUBLE))
    x = torch.randn(2, 3, 5, 6, **DOUBLE)
    y = torch.einsum("oc,bchw->bohw", block.conv.weight[:, :, 0, 0], x)
    mean, var, weight, bias = (t[:, None, None] for t in (*list(block.norm.buffers())[:2], block.norm.weight, block.norm.bias))
    y = (y - mean) / (var + 0.1).sqrt() * weight + bias
    torch.testing.assert_close(block(x), y * y.sigmoid())
    tokens = x.movedim(1, -1)
    torch.testing.assert_close(convolve_tokens(block, tokens), block(x).movedim(1, -1))
    assert ConvNorm(3, 4, gamma=0.0)(torch.randn(2, 3, 5, 6)).eq(0).all()


@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 2, 1), (2, 2, 1), (3, 1, 1), (5, 2, 2), (1, 2, 1), (4, 3, 1)])
def test_same_padding_makes_the_ceiling_and_puts_the_odd_zero_last(kernel, stride, dilation):
    for length in range(1, 14):
        before, after = same_padding(length, kernel, stride, dilation)
        reach = (kernel - 1) * dilation + 1
        assert 0 <= after - before <= 1
        assert (length + before + after - reach) // stride + 1 == math.ceil(length / stride)
        assert before + after == 0 or length + before + after == (math.ceil(length / stride) - 1) * stride + reach
    conv = SameConv2d(1, 1, kernel, stride, dilation=dilation, bias=False, **DOUBLE)
    x = torch.randn(1, 1, 8, 11, **DOUBLE)
    rows, columns = (same_padding(n, kernel, stride, dilation) for n in (8, 11))
    expected = F.conv2d(F.pad(x, [*columns, *rows]), conv.weight, stride=stride, dilation=dilation)
    torch.testing.assert_close(conv(x), expected)
    assert expected.shape[2:] == (math.ceil(8 / stride), math.ceil(11 / stride))


@pytest.mark.parametrize("kernel", DILATED_BRANCHES)
def test_large_kernels_sum_their_branches(kernel):
    block = scrambled(DilatedConvNorm(2, kernel, **DOUBLE))
    x = torch.randn(1, 2, 6, 9, **DOUBLE)
    expected = 0
    for branch, (k, d) in zip([block.large, *block.dilated], [(kernel, 1), *DILATED_BRANCHES[kernel]], strict=True):
        y = torch.zeros_like(x)
        reach = (k - 1) * d // 2
        padded = F.pad(x, [reach] * 4)
        for i in range(k):
            for j in range(k):
                y = y + padded[:, :, i * d : i * d + 6, j * d : j * d + 9] * branch.conv.weight[:, 0, i, j, None, None]
        expected = expected + branch.norm(y)
    torch.testing.assert_close(block(x), expected)


def test_an_inverted_residual_block_is_its_formula():
    block = scrambled(MBConv(4, 6, 2, **DOUBLE))
    x = torch.randn(2, 4, 7, 6, **DOUBLE)
    hidden = F.gelu(block.expand.norm(F.conv2d(block.norm(x), block.expand.conv.weight)))
    hidden = F.gelu(block.depthwise.norm(F.conv2d(hidden, block.depthwise.conv.weight, None, 2, 1, 1, 24)))
    hidden = F.conv2d(block.gate(hidden), block.reduce.weight, block.reduce.bias)
    rows = [x[:, :, 2 * i : 2 * i + 2].mean(2) for i in range(4)]  # the last is a single row
    pooled = torch.stack(rows, 2).unflatten(3, (3, 2)).mean(4)
    torch.testing.assert_close(block(x), hidden + F.conv2d(pooled, block.expand_shortcut.weight, block.expand_shortcut.bias))
    assert block.gate.fc1.out_features == 1
    plain = scrambled(MBConv(4, 4, **DOUBLE))
    assert torch.equal(plain.shortcut(x), x)


def equal_weights(ours: nn.Module, theirs: nn.Module, names: dict[str, str]) -> None:
    """Load our module with the weights of another; ``names`` says what they call ours."""
    given = dict(theirs.state_dict())
    state = {}
    for key, value in ours.state_dict().items():
        module, _, leaf = key.rpartition(".")
        state[key] = given.pop(f"{names[module]}.{leaf}").reshape(value.shape)
    assert not given
    ours.load_state_dict(state)


@pytest.mark.peer
@pytest.mark.parametrize(("dim", "out", "stride"), [(8, 16, 2), (16, 16, 2), (16, 16, 1)])
@pytest.mark.parametrize("same", [False, True])
def test_an_inverted_residual_block_equals_that_of_timm(dim, out, stride, same):
    peers.timm()
    from timm.models.maxxvit import MaxxVitConvCfg, MbConvBlock

    kind, eps = ("gelu_tanh", 1e-3) if same else ("gelu", 1e-5)
    cfg = MaxxVitConvCfg(norm_eps=eps, act_layer=kind, padding="same" if same else "", norm_layer="batchnorm2d")
    theirs = scrambled(MbConvBlock(dim, out, stride, cfg=cfg)).double()
    act = (lambda: nn.GELU("tanh")) if same else nn.GELU
    ours = MBConv(dim, out, stride, padding="same" if same else None, act=act, eps=eps, **DOUBLE).eval()
    names = {
        "expand_shortcut": "shortcut.expand", "norm": "pre_norm", "expand.conv": "conv1_1x1", "expand.norm": "norm1",
        "depthwise.conv": "conv2_kxk", "depthwise.norm": "norm2", "gate.fc1": "se.fc1", "gate.fc2": "se.fc2",
        "reduce": "conv3_1x1",
    }  # fmt: skip
    equal_weights(ours, theirs, names)
    x = torch.randn(2, dim, 12, 10, **DOUBLE)
    torch.testing.assert_close(ours(x), theirs(x))
    if same and stride == 2:
        x = x[:, :, :11, :9]
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.peer
@pytest.mark.parametrize(("dim", "out"), [(8, 12), (20, 16)])
def test_squeeze_merging_equals_that_of_timm(dim, out):
    peers.timm()
    from timm.models.efficientvit_msra import PatchMerging

    theirs = scrambled(PatchMerging(dim, out)).double()
    ours = SqueezeMerging(dim, out, **DOUBLE).eval()
    names = {"gate.fc1": "se.fc1", "gate.fc2": "se.fc2"}
    for mine, its in (("expand", "conv1"), ("depthwise", "conv2"), ("reduce", "conv3")):
        names |= {f"{mine}.conv": f"{its}.conv", f"{mine}.norm": f"{its}.bn"}
    equal_weights(ours, theirs, names)
    x = torch.randn(2, dim, 7, 10, **DOUBLE)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(fuse(ours)(x), theirs(x))


def test_channels_round_to_the_nearest_multiple():
    assert [round_channels(c) for c in (1, 11.9, 12, 308, 128)] == [8, 8, 16, 312, 128]


def test_misfits_are_named():
    with pytest.raises(ValueError, match="number or 'same'; got 'valid'"):
        ConvNorm(3, 4, 3, padding="valid")
    with pytest.raises(ValueError, match="odd kernel_size; got 4"):
        ResidualConvNorm(3, 4)
    with pytest.raises(ValueError, match=r"\[5, 7, 9, 11, 13, 15, 17\].*got 6"):
        DilatedConvNorm(3, 6)
    with pytest.raises(ValueError, match=r"kernel_size 5; got \[\(3, 3\)\]"):
        DilatedConvNorm(3, 5, [(3, 1), (3, 3)])
    with pytest.raises(ValueError, match="stride=1, dim=3, out=4"):
        MBConv(3, 4)
