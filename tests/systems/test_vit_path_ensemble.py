"""The path ensemble of a vision transformer: its members, what each is worth, and classifiers that read only some."""

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from regard import create_model
from regard.adapt import PathEnsemble, path_distillation_loss, path_influence, path_members, relative_log_amplitude
from regard.adapt.path_ensemble import path_names

KIND = torch.float64


def vit(name="deit_tiny_patch16_224", **options):
    torch.manual_seed(0)
    table = {"dim": 24, "depth": 3, "head_dim": 8, "patch_size": 8, "image_size": 32, "num_classes": 5}
    model = create_model(name, dtype=KIND, **table | options).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def images(n=3):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=KIND)


def norm(x, module):
    return F.layer_norm(x, x.shape[-1:], module.weight, module.bias, 1e-6)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_members_are_the_input_and_the_branches_of_the_blocks(name):
    model, x = vit(name), images()
    got = path_members(model, x)
    prefix = model.num_prefix_tokens
    patches = F.conv2d(x, model.stem.proj.weight, model.stem.proj.bias, stride=8).flatten(2).transpose(1, 2)
    tokens = [model.get_parameter(n).expand(3, -1, -1) for n in ("cls_token", "dist_token")[:prefix]]
    stream = torch.cat([*tokens, patches], 1) + model.positions.table
    torch.testing.assert_close(got[0], stream)
    for i, block in enumerate(model.blocks):
        normed = norm(stream, block.mixer.norm)
        q, k, v = (t.unflatten(-1, (3, 8)).transpose(1, 2) for t in block.mixer.op.qkv(normed).chunk(3, -1))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(8)).softmax(-1)
        attention = block.mixer.op.proj((weights @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(got[2 * i + 1], attention)
        stream = stream + attention
        mlp = block.mlp.op.fc2(F.gelu(block.mlp.op.fc1(norm(stream, block.mlp.norm))))
        torch.testing.assert_close(got[2 * i + 2], mlp)
        stream = stream + mlp
    assert len(got) == len(path_names(model)) == 7
    torch.testing.assert_close(model.norm(got.sum(0)), model.forward_features(x))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_with_all_weights_one_the_ensemble_is_the_model(name, per_channel):
    model = vit(name)
    torch.testing.assert_close(PathEnsemble(model, per_channel=per_channel)(images()), model(images()), rtol=1e-12, atol=1e-12)


def test_a_layer_scale_is_inside_of_its_member():
    model = vit()
    model.blocks[1].mixer.scale = scale = nn.Linear(24, 24, bias=False, dtype=KIND)
    with torch.no_grad():
        scale.weight.copy_(0.3 * torch.eye(24))
    got = path_members(model, images())
    scale.weight.data.copy_(torch.eye(24))
    torch.testing.assert_close(got[3], 0.3 * path_members(model, images())[3])


def test_without_pruned_paths_logits_change_by_the_heads_response_to_what_is_left():
    model, x = vit(), images()
    members = path_members(model, x)
    for number in range(7):
        left = sum(m for i, m in enumerate(members) if i != number)
        expected = norm(left, model.norm)[:, 0] @ model.head.weight.T + model.head.bias
        torch.testing.assert_close(PathEnsemble(model, pruned=[number])(x), expected)
        assert not torch.allclose(expected, model(x))
    torch.testing.assert_close(PathEnsemble(model, pruned=[])(x), model(x))


@pytest.mark.parametrize("per_channel", [False, True])
def test_weights_apply_to_the_ensemble_alone(per_channel):
    model, x = vit(), images()
    ensemble = PathEnsemble(model, per_channel=per_channel)
    nn.init.normal_(ensemble.ensemble_scale)
    members = path_members(model, x)  # of the whole stream: later members know nothing of the weights
    e = sum(w * m for w, m in zip(ensemble.ensemble_scale, members, strict=True))
    torch.testing.assert_close(ensemble.forward_features(x), norm(e, model.norm))
    assert ensemble.ensemble_scale.shape == (7, 24 if per_channel else 1)


def test_a_pruned_early_member_still_learns_through_later_ones():
    model = vit()
    ensemble = PathEnsemble(model, pruned=[0, 1, 2]).train()
    ensemble(images()).square().sum().backward()
    gradients = {name: p.grad for name, p in ensemble.named_parameters()}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    assert float(gradients["model.stages.0.blocks.0.mlp.op.fc1.weight"].abs().max()) > 0
    assert float(gradients["model.stem.proj.weight"].abs().max()) > 0
    assert torch.equal(gradients["ensemble_scale"][:3], torch.zeros(3, 1, dtype=KIND))
    assert float(gradients["ensemble_scale"][3:].abs().min()) > 0
    last = PathEnsemble(vit(), pruned=[6])  # nothing reads the last but the classifier
    last(images()).square().sum().backward()
    assert float(last.model.blocks[-1].mlp.op.fc1.weight.grad.abs().max()) == 0


def test_an_ensemble_keeps_the_names_of_the_model_and_travels_in_a_state_dict():
    first, second = PathEnsemble(vit(), pruned=[2]), PathEnsemble(vit())
    nn.init.normal_(first.ensemble_scale)
    assert set(first.state_dict()) == {f"model.{key}" for key in vit().state_dict()} | {"ensemble_scale", "kept"}
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(images()), second(images()))  # bitwise: the same operators on the same shapes


def test_influence_on_the_classifier_is_that_of_the_pruned_ensemble():
    model, x = vit(), images(6)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    got, whole = path_influence(model, x, labels, batch_size=4), model(x)
    assert got.names[:3] == ("input", "blocks.0.attention", "blocks.0.mlp")
    for number in range(7):
        without = PathEnsemble(model, pruned=[number])(x)
        check_influence(got, number, whole, without, labels)


def check_influence(got, number, whole, without, labels):
    lines = []
    for p, q, label in zip(whole.tolist(), without.tolist(), labels.tolist(), strict=True):
        shares = [math.exp(r[label]) / sum(map(math.exp, r)) for r in (p, q)]
        lines.append([(p.index(max(p)) == label) - (q.index(max(q)) == label), shares[0] - shares[1], math.dist(p, q)])
    expected = torch.tensor(lines, dtype=KIND).mean(0)
    torch.testing.assert_close(torch.stack([got.accuracy[number], got.probability[number], got.change[number]]), expected)


def test_influence_on_the_stream_is_that_of_a_model_without_the_branch():
    model, x = vit(), images(4)
    labels = torch.zeros(4, dtype=torch.long)
    got, whole = path_influence(model, x, labels, stream=True), model(x)
    for number in range(1, 7):
        other = vit()
        branch = (other.blocks[(number - 1) // 2].mixer.op.proj, other.blocks[(number - 1) // 2].mlp.op.fc2)[(number - 1) % 2]
        nn.init.zeros_(branch.weight)
        nn.init.zeros_(branch.bias)
        check_influence(got, number, whole, other(x), labels)
    empty = vit()
    for parameter in (empty.stem.proj.weight, empty.stem.proj.bias, empty.cls_token, empty.positions.table):
        nn.init.zeros_(parameter)
    check_influence(got, 0, whole, empty(x), labels)
    assert not torch.allclose(got.change, path_influence(model, x, labels).change)
    assert torch.equal(model(x), whole)  # nothing stays behind


def test_partial_ensembles_end_with_a_block_and_learn_from_the_whole():
    model, x = vit(), images()
    ensemble = PathEnsemble(model)
    whole, partial = ensemble.forward_partial(x, [0, 2])
    members = path_members(model, x)
    torch.testing.assert_close(whole, model(x))
    torch.testing.assert_close(partial[0], model.forward_head(model.norm(members[0] + members[1] + members[2])))
    torch.testing.assert_close(partial[1], whole)


def test_distillation_is_the_divergence_from_the_whole_which_gets_no_gradient():
    whole = torch.randn(3, 4, dtype=KIND, requires_grad=True)
    partial = [torch.randn(3, 4, dtype=KIND, requires_grad=True) for _ in range(2)]
    loss = path_distillation_loss(whole, partial, temperature=2.0)
    total = 0.0
    for logits in partial:
        for p, q in zip((whole / 2).softmax(-1).tolist(), (logits / 2).softmax(-1).tolist(), strict=True):
            total += 4 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 6
    assert float(loss.detach()) == pytest.approx(float(total))
    loss.backward()
    assert whole.grad is None
    assert all(float(p.grad.abs().max()) > 0 for p in partial)


def test_log_amplitudes_are_those_of_the_fourier_transform_by_rings():
    maps = torch.randn(2, 8, 8, 3, generator=torch.Generator().manual_seed(0), dtype=KIND)
    sums = {ring: [] for ring in range(4)}
    for u in range(8):
        for v in range(8):
            waves = [complex(0)] * 6
            for y in range(8):
                for x in range(8):
                    turn = complex(math.cos(-2 * math.pi * (u * y + v * x) / 8), math.sin(-2 * math.pi * (u * y + v * x) / 8))
                    for i in range(6):
                        waves[i] += float(maps[i // 3, y, x, i % 3]) * turn
            frequency = max(min(u, 8 - u), min(v, 8 - v))  # in quarters of pi
            sums[max(frequency - 1, 0)].append(sum(abs(w) for w in waves) / 6)
    logs = [math.log(sum(s) / len(s)) for s in sums.values()]
    torch.testing.assert_close(relative_log_amplitude(maps, 4), torch.tensor(logs, dtype=KIND) - logs[0])


def test_a_ring_without_frequencies_has_the_amplitude_of_the_one_before():
    maps = torch.randn(2, 4, 4, 3, generator=torch.Generator().manual_seed(0), dtype=KIND)
    got, coarse = relative_log_amplitude(maps, 8), relative_log_amplitude(maps, 2)  # frequencies 0, 1/2 and 1 of pi
    torch.testing.assert_close(got[4:7], got[3:4].expand(3))
    assert float((got[3] - got[0]).abs()) > 0
    torch.testing.assert_close(got[1:3], torch.zeros(2, dtype=KIND))
    assert got.shape == (8,)
    assert coarse.shape == (2,)


def test_taking_smooth_members_out_is_a_high_pass_filter():
    generator = torch.Generator().manual_seed(0)
    rough = torch.randn(2, 8, 8, 4, generator=generator, dtype=KIND)
    smooth = 8 * torch.cos(torch.arange(8, dtype=KIND) / 8 * 2 * math.pi)[:, None, None].expand(2, 8, 8, 4)
    assert (relative_log_amplitude(rough, 4)[1:] > relative_log_amplitude(rough + smooth, 4)[1:]).all()


def test_bad_input_is_told():
    model = vit()
    with pytest.raises(ValueError, match=r"members are 0 to 6; got \[7\]"):
        PathEnsemble(model, pruned=[7])
    with pytest.raises(ValueError, match=r"blocks are 0 to 2; got \[3\]"):
        PathEnsemble(model).forward_partial(images(), [3])
    with pytest.raises(ValueError, match=r"expected a vision transformer of regard\.create_model; got Linear"):
        path_members(nn.Linear(2, 2), images())
    with pytest.raises(ValueError, match="none is dropped, and none enters later"):
        path_members(create_model("evit_deit_tiny", dim=24, head_dim=8, depth=4), images())
    with pytest.raises(ValueError, match=r"expected labels \(3,\); got \(2,\)"):
        path_influence(vit(), images(), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="1 or more partial ensembles; got none"):
        path_distillation_loss(torch.zeros(2, 3), [])
    with pytest.raises(ValueError, match=r"expected maps \(batch, rows, columns, dim\); got \(2, 3, 4\)"):
        relative_log_amplitude(torch.zeros(2, 3, 4))


@pytest.mark.slow
def test_a_deep_transformer_with_ensemble_scale_learns_at_least_as_well():
    """Digits, 24 blocks of 32 channels, seed 0, 10 epochs of 1,200 images: the loss on the others is not above that of the
    same model without the scale, from the same weights and in the same order, by more than 0.05; it was 0.345 beside 0.323.
    """
    digits = load_digits()
    x = torch.from_numpy(digits.images).float()[:, None].expand(-1, 3, -1, -1) / 8 - 1
    y = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    table = {"dim": 32, "depth": 24, "head_dim": 8, "patch_size": 4, "image_size": 8, "num_classes": 10}
    losses = []
    for scaled in (False, True):
        torch.manual_seed(0)
        model = create_model("vit_tiny_patch16_224", **table)
        whole = PathEnsemble(model) if scaled else model
        optimiser = torch.optim.AdamW(whole.parameters(), lr=3e-3)
        generator = torch.Generator().manual_seed(0)
        for _ in range(10):
            for part in torch.randperm(1200, generator=generator).split(60):
                optimiser.zero_grad()
                F.cross_entropy(whole(x[part]), y[part]).backward()
                optimiser.step()
        with torch.no_grad():
            losses.append(float(F.cross_entropy(whole.eval()(x[1200:]), y[1200:])))
    assert losses[1] < losses[0] + 0.05
    assert max(losses) < 0.5
