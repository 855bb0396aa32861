"""ULSAM (40): subspaces are modules of their own, and it takes the place of repeated layers of a small network as published."""

from collections import OrderedDict

import peers
import pytest
import torch
from naive_backbones import multiply_adds, randomise
from torch import nn

from regard.layers.gates import SubspaceGate
from regard.models import count_parameters, export_state_dict, load_checkpoint, ulsam_layout

DOUBLE = {"dtype": torch.float64}


def alone(gate, group):
    """The gate of one subspace, with its share of the parameters and statistics."""
    size = gate.dim // gate.groups
    single = SubspaceGate(size, 1, **DOUBLE)
    for name, value in gate.state_dict().items():
        if value.ndim:
            count = size if value.shape[0] == gate.dim else 1
            single.state_dict()[name].copy_(value[group * count : (group + 1) * count])
    return single


class Subspace(nn.Module):
    """One group, with the layers and names of the release."""

    def __init__(self, dim):
        super().__init__()
        self.conv_dws = nn.Conv2d(dim, dim, 1, groups=dim)
        self.bn_dws = nn.BatchNorm2d(dim, momentum=0.9)
        self.conv_point = nn.Conv2d(dim, 1, 1)
        self.bn_point = nn.BatchNorm2d(1, momentum=0.9)

    def forward(self, x):
        hidden = nn.functional.max_pool2d(self.bn_dws(self.conv_dws(x)).relu(), 3, 1, 1)
        logits = self.bn_point(self.conv_point(hidden)).relu()
        return x + x * logits.flatten(2).softmax(2).view_as(logits)


class Ulsam(nn.Module):
    def __init__(self, dim, groups):
        super().__init__()
        self.subspaces = nn.ModuleList(Subspace(dim // groups) for _ in range(groups))

    def forward(self, x):
        return torch.cat([part(each) for part, each in zip(self.subspaces, x.chunk(len(self.subspaces), 1), strict=True)], 1)


def network(gate):
    """With a layer of its own whose name is like those inside the gates."""
    return nn.Sequential(OrderedDict(norm1=nn.Conv2d(3, 12, 1), first=gate(12, 4), last=gate(12, 3))).double()


@pytest.mark.parametrize("training", [True, False])
def test_official_names_load_and_are_written_in_a_network_and_alone(training):
    theirs, ours = randomise(network(Ulsam)), network(SubspaceGate)
    official = theirs.state_dict()
    assert "first.subspaces.3.bn_dws.num_batches_tracked" in official
    assert load_checkpoint(ours, official, layouts=[ulsam_layout(ours)]) == "official"
    exported = export_state_dict(ours, ulsam_layout(ours))
    assert exported.keys() == official.keys()
    assert all(torch.equal(exported[key], value) for key, value in official.items())
    x = torch.randn(2, 3, 5, 7, **DOUBLE)
    torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x), rtol=1e-12, atol=1e-12)
    alone = SubspaceGate(12, 3, **DOUBLE)
    load_checkpoint(alone, theirs.last.state_dict(), layouts=[ulsam_layout(alone)])
    assert all(torch.equal(alone.state_dict()[key], value) for key, value in ours.last.state_dict().items())
    with pytest.raises(ValueError, match="Linear has none"):
        ulsam_layout(nn.Linear(2, 2))


@pytest.mark.parametrize("training", [True, False])
def test_groups_are_independent_modules(training):
    gate = randomise(SubspaceGate(12, 4, **DOUBLE)).train(training)
    x = torch.randn(3, 12, 5, 7, **DOUBLE)
    singles = [alone(gate, group).train(training) for group in range(4)]
    parts = [single(part) for single, part in zip(singles, x.chunk(4, 1), strict=True)]
    torch.testing.assert_close(gate(x), torch.cat(parts, 1), rtol=1e-12, atol=1e-12)
    for group, single in enumerate(singles):  # in training, the statistics too
        torch.testing.assert_close(single.norm1.running_var, gate.norm1.running_var[3 * group : 3 * group + 3])
        torch.testing.assert_close(single.norm2.running_mean, gate.norm2.running_mean[group : group + 1])


def test_statistics_follow_the_last_batch_as_released():
    gate = SubspaceGate(4, 2, **DOUBLE).train()
    x = 5 + torch.randn(8, 4, 6, 6, **DOUBLE)
    gate(x)
    hidden = x * gate.depthwise.weight[:, 0, 0, None, None] + gate.depthwise.bias[:, None, None]
    torch.testing.assert_close(gate.norm1.running_mean, 0.9 * hidden.mean((0, 2, 3)))
    torch.testing.assert_close(gate.norm1.running_var, 0.1 + 0.9 * hidden.var((0, 2, 3)))


def test_positions_below_zero_share_one_weight():
    gate = randomise(SubspaceGate(6, 2, **DOUBLE)).train()  # the statistics of the batch put half of the scores below zero
    nn.init.constant_(gate.norm2.weight, 3.0)
    nn.init.constant_(gate.norm2.bias, 0.0)
    logits = []
    handle = gate.norm2.register_forward_hook(lambda module, inputs, output: logits.append(output))
    maps = gate.maps(torch.randn(1, 6, 9, 9, **DOUBLE)).flatten(2)
    handle.remove()
    for weights, scores in zip(maps[0], logits[0][0], strict=True):
        below = scores <= 0
        assert 1 < below.sum() < scores.numel()
        assert weights[below].unique().numel() == 1
        assert weights[below][0] < weights[~below].min()
    nn.init.constant_(gate.norm2.weight, 0.0)
    nn.init.constant_(gate.norm2.bias, -4.0)
    torch.testing.assert_close(gate.maps(torch.randn(1, 6, 9, 9, **DOUBLE)), torch.full((1, 2, 9, 9), 1 / 81, **DOUBLE))


@pytest.mark.peer
@pytest.mark.parametrize(("repeats", "reduction"), [(1, 0.13), (2, 0.25)])
def test_in_place_of_repeated_layers_it_saves_what_is_published_of_mobilenet_v2(repeats, reduction):
    """Of the three layers of 96 channels and the three of 160, the first of each widens: the others can be replaced."""
    model = peers.timm().create_model("mobilenetv2_100").to("meta")
    params, cost = count_parameters(model), multiply_adds(model, 224)
    for stage, dim in ((4, 96), (5, 160)):
        for layer in range(3 - repeats, 3):
            replaced = model.blocks[stage][layer]
            assert replaced.conv_pw.in_channels == replaced.conv_pwl.out_channels == dim
            model.blocks[stage][layer] = SubspaceGate(dim, 4, device="meta")
    assert 1 - count_parameters(model) / params == pytest.approx(reduction, abs=0.01)
    assert 1 - multiply_adds(model, 224) / cost == pytest.approx(reduction, abs=0.01)
