"""EViT (27): tokens are dropped and fused as published, a rate of 1 is DeiT, and every DeiT checkpoint fits."""

import math

import pytest
import torch
from naive_backbones import linear, multiply_adds
from naive_transformer import attention_map, embed, feed_forward, norm, project, small

from regard import create_model, load_checkpoint
from regard.models import count_parameters, export_state_dict, model_card
from regard.models.backbones.evit import EViT

HOSTS = {"evit_deit_tiny": "tiny", "evit_deit_small": "small", "evit_deit_base": "base"}
PUBLISHED_GMACS = {0.9: 4.0, 0.8: 3.5, 0.7: 3.0, 0.6: 2.6, 0.5: 2.3}  # DeiT-S with fusion


def images(size=128, batch=2):
    return torch.randn(batch, 3, size, size, dtype=torch.float64)


def narrow(**options):
    return small("evit_deit_small", **{"image_size": 128} | options)


def naive_evit(image, weights, rate, fuse, reduce_at, depth=4, heads=2):
    """One image at a time, lists of tokens, no sorting library: the text of the paper."""
    prefix = 2 if "dist_token" in weights else 1
    outputs, traces = [], []
    for one in image:
        x, trace = embed(one[None], weights), []
        for i in range(depth):
            block = f"blocks.{i}"
            maps, v = attention_map(norm(x, weights, f"{block}.norm1"), weights, f"{block}.attn", heads)
            x = x + project(maps, v, weights, f"{block}.attn")
            if i in reduce_at:
                attentiveness = maps[0, :, 0, prefix:].mean(0)
                n = len(attentiveness)
                ranked = sorted(range(n), key=lambda j: -attentiveness[j].item())
                kept, dropped = ranked[: math.ceil(rate * n)], ranked[math.ceil(rate * n) :]
                tokens = [x[0, j] for j in range(prefix)] + [x[0, prefix + j] for j in kept]
                if fuse and dropped:
                    fused = torch.zeros_like(tokens[0])
                    for j in dropped:
                        fused = fused + attentiveness[j] * x[0, prefix + j]
                    tokens.append(fused)
                x = torch.stack(tokens)[None]
                trace.append(x.shape[1] - prefix)
            x = feed_forward(x, weights, block)
        x = norm(x, weights, "norm")
        logits = [linear(x[:, i], weights, name) for i, name in enumerate(("head", "head_dist")[:prefix])]
        outputs.append(sum(logits) / len(logits))
        traces.append(trace)
    return torch.cat(outputs), traces


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("rate", [0.7, 0.31])
def test_equals_the_definition(rate, fuse, distilled):
    model, weights = narrow(rate=rate, fuse=fuse, distilled=distilled)
    image = images()
    expected, traces = naive_evit(image, weights, rate, fuse, (1, 2, 3))
    torch.testing.assert_close(model(image), expected, rtol=1e-11, atol=1e-11)
    states = model.run_blocks(image, range(4))
    assert [state.x.shape[1] - 1 - distilled for state in states] == [64, *traces[0]]


def test_gradients_equal_those_of_the_definition():
    """The scores of dropped tokens carry gradient into queries and keys; the choice carries none."""
    model, weights = narrow(rate=0.6)
    image = images()
    wanted = naive_evit(image, export_state_dict(model, "official"), 0.6, True, (1, 2, 3))[0]
    model.zero_grad()
    leaves = {key: value.detach().clone().requires_grad_() for key, value in weights.items()}
    naive_evit(image, leaves, 0.6, True, (1, 2, 3))[0].sin().sum().backward()
    model(image).sin().sum().backward()
    torch.testing.assert_close(model(image), wanted)
    block = model.blocks[1].mixer.op.qkv
    torch.testing.assert_close(block.weight.grad, leaves["blocks.1.attn.qkv.weight"].grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model.cls_token.grad, leaves["cls_token"].grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("distilled", [False, True])
def test_a_rate_of_one_is_the_host_exactly(distilled):
    model, weights = narrow(rate=1.0, distilled=distilled)
    host, _ = small("deit_small_patch16_224", image_size=128, distilled=distilled)
    assert load_checkpoint(host, weights) == "official"
    image = images()
    assert torch.equal(model(image), host(image))  # bitwise: the same operators on the same shapes
    reduced, _ = narrow(rate=0.5, distilled=distilled)
    load_checkpoint(reduced, weights)
    assert not torch.allclose(reduced(image), host(image))
    reduced.set_rate(1.0)
    assert torch.equal(reduced(image), host(image))  # bitwise: the same operators on the same shapes


def test_logits_of_plain_weights_move_towards_the_host_as_the_rate_grows():
    model = create_model("evit_deit_tiny", depth=6).eval()
    host = create_model("deit_tiny_patch16_224", depth=6).eval()
    load_checkpoint(host, model.state_dict())
    image = torch.randn(4, 3, 224, 224)
    away = []
    with torch.no_grad():
        expected = host(image)
        for rate in (0.3, 0.5, 0.7, 0.9, 0.99):
            model.set_rate(rate)
            away.append((model(image) - expected).norm().item() / expected.norm().item())
    assert away == sorted(away, reverse=True)
    assert away[-1] < 0.25 * away[0]


@pytest.mark.parametrize(("rate", "trace"), [(0.7, [138, 98, 70]), (0.5, [98, 50, 26])])
def test_tokens_at_224_follow_the_published_trace(rate, trace):
    model = create_model("evit_deit_small", rate=rate, device="meta").eval()
    states = model.run_blocks(torch.empty(1, 3, 224, 224, device="meta"), range(12))
    assert [state.x.shape[1] for state in states] == [
        *[197] * 3, *[1 + n + 1 for n in trace for _ in range(3)],
    ]  # fmt: skip
    plain = create_model("evit_deit_small", rate=rate, fuse=False, device="meta").eval()
    counts, n = [], 196
    for _ in range(3):
        n = math.ceil(round(rate * n, 6))
        counts.append(n + 1)
    states = plain.run_blocks(torch.empty(1, 3, 224, 224, device="meta"), (3, 6, 9))
    assert [state.x.shape[1] for state in states] == counts


@pytest.mark.parametrize(("rate", "gmacs"), PUBLISHED_GMACS.items())
def test_multiply_adds_are_the_published_ones(rate, gmacs):
    model = create_model("evit_deit_small", rate=rate, device="meta")
    assert multiply_adds(model, 224) == pytest.approx(gmacs, abs=0.06)


@pytest.mark.parametrize(("name", "host"), HOSTS.items())
def test_there_are_no_parameters_but_the_hosts(name, host):
    card, of_host = model_card(name), model_card(f"deit_{host}_patch16_224")
    model = create_model(name, device="meta")
    assert count_parameters(model) == card.params == of_host.params
    assert model.state_dict().keys() == create_model(of_host.name, device="meta").state_dict().keys()
    assert multiply_adds(model, 224) == pytest.approx(card.gmacs, rel=0.04)
    assert [i for i, block in enumerate(model.blocks) if block.reducer is not None] == [3, 6, 9]


def test_every_place_of_the_grid_is_shown_by_the_token_that_stands_for_it():
    """Kept places show themselves, all others the fused token, after three reductions with fused tokens among the dropped."""
    model, _ = narrow(rate=0.5, depth=8, image_size=64)
    image = images(64)
    maps = model.get_intermediate_layers(image, range(8), reshape=True)
    assert all(m.shape == (2, 16, 4, 4) for m in maps)
    states = model.run_blocks(image, range(8))
    assert [state.tokens is None for state in states] == [True, True, *[False] * 6]
    last, state = maps[-1].flatten(2), states[-1]
    for item in range(2):
        alive = state.tokens.alive[item]
        kept = {tuple(token.tolist()) for token in state.x[item, 1:]}
        shown = {tuple(place.tolist()) for place in last[item].T}
        assert shown == kept  # 16 places, each by a present token, and no token stands for nothing
        assert len({tuple(place.tolist()) for place in last[item].T[alive]}) == int(alive.sum())
    first = states[2]  # after one reduction: 8 kept and 1 fused
    fused = first.x[:, -1]
    for item in range(2):
        dead = ~first.tokens.alive[item]
        assert int(dead.sum()) == 8
        torch.testing.assert_close(maps[2].flatten(2)[item].T[dead], fused[item].expand(8, -1))


def test_the_rate_falls_by_a_half_cosine():
    model, _ = narrow(rate=0.7)
    assert isinstance(model, EViT)
    for epoch, expected in ((0, 1.0), (9, 1.0), (10, 1.0), (60, 0.85), (110, 0.7), (250, 0.7)):
        model.start_epoch(epoch, 0.7)
        rates = {block.reducer.rate for block in model.blocks if block.reducer is not None}
        assert list(rates) == pytest.approx([expected])
    model.start_epoch(35, 0.7)
    assert model.blocks[1].reducer.rate == pytest.approx(0.7 + 0.3 * (1 + math.cos(math.pi / 4)) / 2)


def test_wrong_tables_and_mixers_are_told():
    with pytest.raises(ValueError, match=r"EViT ranks tokens by the dense attention of the class token.*'window'"):
        create_model("evit_deit_tiny", mixer="window")
    with pytest.raises(ValueError, match=r"reduce_at must be blocks 0 to 11; got \[12\]"):
        create_model("evit_deit_tiny", reduce_at=(12,), device="meta")
    with pytest.raises(ValueError, match=r"rate must be in \(0, 1\]; got 0.0"):
        create_model("evit_deit_tiny", rate=0.0, device="meta")
