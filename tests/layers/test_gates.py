"""Gates, written out."""

import math

import pytest
import torch
from torch import nn

from regard.layers.gates import EfficientChannelGate, SqueezeGate, StatisticsGate, SubspaceGate, TokenGate

DOUBLE = {"dtype": torch.float64}


@pytest.mark.parametrize("grid", [(5,), (4, 6), (2, 3, 4)])
def test_the_squeeze_gate_scales_channels_by_a_function_of_their_means(grid):
    gate = SqueezeGate(6, 2, act=nn.SiLU, gate=nn.Hardsigmoid, **DOUBLE)
    x = torch.randn(3, 6, *grid, **DOUBLE)
    means = torch.stack([x[:, c].flatten(1).mean(1) for c in range(6)], -1)
    hidden = means @ gate.fc1.weight.T + gate.fc1.bias
    logits = (hidden * hidden.sigmoid()) @ gate.fc2.weight.T + gate.fc2.bias
    factors = ((logits + 3) / 6).clamp(0, 1)
    expected = torch.stack([x[:, c] * factors[:, c].reshape(-1, *[1] * len(grid)) for c in range(6)], 1)
    torch.testing.assert_close(gate(x), expected)
    plain = SqueezeGate(6)
    assert isinstance(plain.act, nn.ReLU)
    assert isinstance(plain.gate, nn.Sigmoid)


@pytest.mark.parametrize("grid", [(5,), (4, 6)])
def test_the_efficient_channel_gate_looks_at_neighbouring_channels(grid):
    gate = EfficientChannelGate(6, 5, **DOUBLE)
    x = torch.randn(3, 6, *grid, **DOUBLE)
    means = x.flatten(2).mean(-1)
    for c in range(6):
        near = sum(gate.conv.weight[0, 0, t] * means[:, c + t - 2] for t in range(5) if 0 <= c + t - 2 < 6)
        torch.testing.assert_close(gate(x)[:, c], x[:, c] * near.sigmoid().reshape(-1, *[1] * len(grid)))


def test_the_efficient_channel_gate_grows_with_the_logarithm_of_the_channels():
    sizes = {dim: EfficientChannelGate(dim, device="meta").conv.weight.shape[-1] for dim in (16, 64, 128, 256, 512, 2048)}
    assert sizes == {16: 3, 64: 3, 128: 5, 256: 5, 512: 5, 2048: 7}
    with pytest.raises(ValueError, match="kernel_size must be odd; got 4"):
        EfficientChannelGate(8, 4)


def test_the_statistics_gate_uses_means_and_unbiased_deviations():
    gate = StatisticsGate(3, **DOUBLE).eval()
    nn.init.normal_(gate.norm.running_mean)
    x = torch.randn(2, 3, 4, 5, **DOUBLE)
    statistics = []
    for item in x:
        channels = [channel.flatten().tolist() for channel in item]
        means = [sum(c) / 20 for c in channels]
        stds = [math.sqrt(sum((v - m) ** 2 for v in c) / 19) for c, m in zip(channels, means, strict=True)]
        statistics.append(means + stds)
    logits = gate.norm(torch.tensor(statistics, **DOUBLE) @ gate.fc.weight.T)
    torch.testing.assert_close(gate(x), x * ((logits + 3) / 6).clamp(0, 1)[:, :, None, None])


def test_a_constant_map_has_no_deviation_and_finite_gradients():
    gate = StatisticsGate(3, **DOUBLE).eval()
    level = torch.randn(2, 3, 1, 1, **DOUBLE)
    for x in (level.expand(2, 3, 4, 5).clone(), level.clone()):
        x.requires_grad_()
        y = gate(x)
        logits = gate.norm(level.flatten(1) @ gate.fc.weight[:, :3].T)
        torch.testing.assert_close(y, x * ((logits + 3) / 6).clamp(0, 1)[:, :, None, None])
        y.sum().backward()
        assert x.grad.isfinite().all()


def naive_subspaces(gate: SubspaceGate, x: torch.Tensor) -> torch.Tensor:
    """One group at a time, with the statistics of the batch."""
    size = gate.dim // gate.groups
    out = []
    for g in range(gate.groups):
        c = slice(g * size, (g + 1) * size)
        part = x[:, c]
        hidden = part * gate.depthwise.weight[c, 0, 0, None, None] + gate.depthwise.bias[c, None, None]
        mean, var = hidden.mean((0, 2, 3), keepdim=True), hidden.var((0, 2, 3), unbiased=False, keepdim=True)
        hidden = (hidden - mean) / (var + 1e-5).sqrt() * gate.norm1.weight[c, None, None] + gate.norm1.bias[c, None, None]
        hidden = hidden.relu()
        rows, columns = hidden.shape[2:]
        pooled = torch.empty_like(hidden)
        for i in range(rows):
            for j in range(columns):
                pooled[:, :, i, j] = hidden[:, :, max(0, i - 1) : i + 2, max(0, j - 1) : j + 2].amax((2, 3))
        logits = (pooled * gate.pointwise.weight[g, :, 0, None, None]).sum(1) + gate.pointwise.bias[g]
        logits = (logits - logits.mean()) / (logits.var(unbiased=False) + 1e-5).sqrt()
        logits = (logits * gate.norm2.weight[g] + gate.norm2.bias[g]).relu().exp()
        out.append(part + part * (logits / logits.sum((1, 2), keepdim=True))[:, None])
    return torch.cat(out, 1)


@pytest.mark.parametrize("groups", [1, 3])
def test_each_subspace_has_its_own_map_that_sums_to_one(groups):
    gate = SubspaceGate(6, groups, **DOUBLE)
    for parameter in gate.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 6, 4, 5, **DOUBLE)
    torch.testing.assert_close(gate(x), naive_subspaces(gate, x))
    torch.testing.assert_close(gate.maps(x).sum((2, 3)), torch.ones(2, groups, **DOUBLE))
    assert gate.maps(x).unique().numel() > 2


@pytest.mark.parametrize(("dim", "groups"), [(6, 1), (32, 4), (512, 16)])
def test_subspace_gates_have_five_parameters_a_channel_and_three_a_group(dim, groups):
    assert sum(p.numel() for p in SubspaceGate(dim, groups).parameters()) == 5 * dim + 3 * groups


def test_a_subspace_gate_without_weights_adds_the_mean_share():
    gate = SubspaceGate(6, 2, **DOUBLE)
    nn.init.zeros_(gate.pointwise.weight)
    x = torch.randn(2, 6, 4, 5, **DOUBLE)
    torch.testing.assert_close(gate(x), x * (1 + 1 / 20))
    for grid in ((7,), (2, 3, 4)):
        x = torch.randn(2, 6, *grid, **DOUBLE)
        torch.testing.assert_close(gate(x), x * (1 + 1 / math.prod(grid)))


def test_the_token_gate_is_a_factor_per_channel_times_one_per_token():
    gate = TokenGate(4, 2, **DOUBLE)
    nn.init.normal_(gate.norm.weight)
    x = torch.randn(2, 3, 5, 4, **DOUBLE)
    y = gate.norm(x)
    overall = nn.functional.gelu(gate.global_reduce(y.flatten(1, 2).mean(1)))
    channels = gate.channel_select(overall).sigmoid()
    for i in range(3):
        for j in range(5):
            local = nn.functional.gelu(gate.local_reduce(y[:, i, j]))
            token = (torch.cat([local, overall], -1) @ gate.token_select.weight[0] + gate.token_select.bias).sigmoid()
            torch.testing.assert_close(gate(x)[:, i, j], x[:, i, j] * channels * token[:, None])


def test_misfits_are_named():
    with pytest.raises(ValueError, match="dim=6, groups=4"):
        SubspaceGate(6, 4)
    for gate in (SqueezeGate(4), StatisticsGate(4), SubspaceGate(4)):
        with pytest.raises(ValueError, match=r"\(batch, 4, \*grid\); got \(2, 3, 5\)"):
            gate(torch.randn(2, 3, 5))
    with pytest.raises(ValueError, match=r"\(batch, \*grid, 4\); got \(2, 3, 5\)"):
        TokenGate(4)(torch.randn(2, 3, 5))
