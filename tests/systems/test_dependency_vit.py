"""DependencyViT (7): tokens send, fall silent and hang on each other; the Lite models drop what sends least."""

import pytest
import torch
from naive_backbones import linear, mlp, multiply_adds
from sklearn.cluster import KMeans
from torch import nn

from regard import create_model, list_models
from regard.layers.pools import weighted_mean
from regard.models import count_parameters, model_card
from regard.models.backbones.dependency_vit import DependencyViT
from regard.ops.tokens.tree import dependency_tree

SIZES = {  # width, whether patches are dropped
    "dependency_vit_tiny": (192, False),
    "dependency_vit_small": (384, False),
    "dependency_vit_lite_tiny": (192, True),
    "dependency_vit_lite_small": (384, True),
}
DOUBLE = {"dtype": torch.float64}


def narrow(depth=5, **options):
    """A small model with weights that matter; with patches of 16 pixels."""
    options = {"dim": 16, "heads": 2, "image_size": 96, "temperature": 0.5} | options
    model = create_model("dependency_vit_tiny", depth=depth, num_classes=5, **DOUBLE, **options).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def images(size=96, batch=2):
    return torch.randn(batch, 3, size, size, **DOUBLE)


def norm(x, weights, name):
    return nn.functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)


def naive_block(x, left, weights, block, heads, temperature):
    """Tokens (n, dim) of one image and what is left of their messages: (n, dim), (n,) and the matrix [sender][receiver]."""
    n = len(x)
    normed = norm(x, weights, f"{block}.mixer.norm")
    q, k, v = (t.unflatten(1, (heads, -1)) for t in linear(normed, weights, f"{block}.mixer.op.qkv").chunk(3, -1))
    chosen = torch.softmax(linear(normed, weights, f"{block}.mixer.op.selector") / temperature, -1)
    own = torch.sigmoid(mlp(normed, weights, f"{block}.mixer.op.controller.fc1", f"{block}.mixer.op.controller.fc2"))
    left = left * own[:, 0]
    received, sent = torch.zeros_like(v), torch.zeros(n, n, **DOUBLE)
    for s in range(n):
        for head in range(heads):
            share = torch.softmax(k[:, head] @ q[s, head] / q.shape[-1] ** 0.5, 0) * chosen[s, head] * left[s]
            received[:, head] = received[:, head] + share[:, None] * v[s, head]
            sent[s] += share.detach()
    return x + linear(received.flatten(1), weights, f"{block}.mixer.op.proj"), left, sent


def naive_model(image, weights, depth=5, heads=2, temperature=0.5, keep=()):
    """One image at a time: the text of the paper. ``keep`` lists blocks and how many tokens they leave."""
    logits, traces = [], []
    for one in image:
        x = nn.functional.conv2d(one[None], weights["stem.proj.weight"], weights["stem.proj.bias"], stride=16)[0]
        x = x.flatten(1).T + weights["positions.table"][0]
        left, trace = torch.ones(len(x), **DOUBLE), []
        for i in range(depth):
            block = f"stages.0.blocks.{i}"
            x, left, sent = naive_block(x, left, weights, block, heads, temperature)
            if i in dict(keep):
                best = sorted(range(len(x)), key=lambda s: -left[s].item())[: dict(keep)[i]]
                x, left = x[best], left[best]
            x = x + mlp(norm(x, weights, f"{block}.mlp.norm"), weights, f"{block}.mlp.op.fc1", f"{block}.mlp.op.fc2")
            trace.append((x, left, sent))
        x = norm(x, weights, "norm")
        logits.append(linear((left[:, None] * x).sum(0) / left.sum(), weights, "head"))
        traces.append(trace)
    return torch.stack(logits), traces


@pytest.mark.parametrize("keep", [(), ((1, 24), (4, 12))])
def test_equals_the_definition_with_gradients(keep):
    model = narrow(drop=1 / 3 if keep else 0.0)
    image, weights = images(), {k: v.detach().clone().requires_grad_() for k, v in model.state_dict().items()}
    expected, traces = naive_model(image, weights, keep=keep)
    torch.testing.assert_close(model(image), expected, rtol=1e-10, atol=1e-10)
    expected.sin().sum().backward()
    model(image).sin().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-8, atol=1e-10)
    for i, (state, found) in enumerate(zip(model.run_blocks(image, range(5)), model.dependencies(image), strict=True)):
        for item, trace in enumerate(traces):
            torch.testing.assert_close(state.x[item], trace[i][0])
            torch.testing.assert_close(state.messages[item].exp(), trace[i][1])
            if not keep:
                torch.testing.assert_close(found[item], trace[i][2])


def test_what_a_token_sends_sums_to_its_message_and_messages_never_grow():
    model = narrow(drop=0.3)
    image = images()
    before = torch.ones(2, 36, **DOUBLE)
    states = model.run_blocks(image, range(5))
    alive = torch.ones(2, 36, dtype=torch.bool)
    for state, found in zip(states, model.dependencies(image), strict=True):
        sent = found.sum(-1)
        assert bool((sent < before).all() if alive.all() else (sent <= before).all())
        assert bool((sent[alive] > 0).all())
        assert not found[~alive].any()
        assert not found.transpose(1, 2)[~alive].any()  # nor does what is gone receive
        if state.tokens is not None:
            alive = state.tokens.alive
            quiet, loud = sent.masked_fill(alive, -1.0).amax(-1), sent.masked_fill(~alive, 2.0).amin(-1)
            assert bool((quiet <= loud).all())  # those that are gone sent least
        before = sent
    assert [int(state.messages.shape[1]) for state in states] == [36, 26, 26, 26, 15]


def test_with_one_head_and_symmetric_logits_reversed_is_forward_attention_normalised_on_the_other_side():
    model = narrow(heads=1)
    mixer = model.blocks[0].mixer.op
    with torch.no_grad():
        mixer.qkv.weight[16:32] = mixer.qkv.weight[:16]
        mixer.qkv.bias[16:32] = mixer.qkv.bias[:16]
    x = torch.randn(1, 9, 16, **DOUBLE)
    sent = mixer.send(x, need_dependencies=True)
    reversed_map = (sent.dependencies / sent.messages.exp().unsqueeze(-1))[0].T  # [receiver, sender], columns sum to one
    q = mixer.project(x, x)[0][0, :, 0]
    pairs = (q @ q.T / 4).exp()
    totals = pairs.sum(-1)
    torch.testing.assert_close(reversed_map.sum(0), torch.ones(9, **DOUBLE))
    torch.testing.assert_close(reversed_map * totals[None, :], (pairs / totals[:, None]) * totals[:, None])


def test_quiet_tokens_do_not_come_back_in_the_average():
    model = narrow()
    image = images()
    state = model.run_blocks(image)[-1]
    pooled = weighted_mean(model.norm(state.x), state.messages.exp())
    torch.testing.assert_close(model(image), model.head(pooled))
    torch.testing.assert_close(model.forward_head(model.forward_features(image), pre_logits=True), pooled)
    torch.testing.assert_close(model.forward_heads(model.forward_features(image)), [model(image)])
    assert (pooled - model.norm(state.x).mean(1)).norm() > 0.1 * pooled.norm()


def test_messages_too_small_for_a_number_still_have_weights():
    model = narrow()
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.op.controller.fc2.weight.mul_(1e4)
        image = images()
        (state,) = model.run_blocks(image)
        assert not state.messages.exp().any()  # all of them are 0 as numbers
        weights = (state.messages - state.messages.amax(-1, keepdim=True)).exp()
        expected = model.head(weighted_mean(model.norm(state.x), weights))
        torch.testing.assert_close(model(image), expected)


def test_trees_have_one_root_that_sends_most_and_parents_that_most_is_sent_to():
    model = narrow()
    image = images()
    found = model.parse(image)
    torch.testing.assert_close(found.weights, torch.stack(model.dependencies(image)).sum(0))
    roots = found.parents == torch.arange(36)
    assert roots.sum(1).tolist() == [1, 1]
    sent = found.weights.sum(-1)
    assert torch.equal(roots.long().argmax(1), sent.argmax(1))
    largest = (found.weights - 9 * torch.eye(36)).argmax(-1)
    assert (found.parents == largest).double().mean() > 0.8
    inside = found.subtrees()
    assert inside[roots].all()
    children = torch.nn.functional.one_hot(found.parents, 36).bool() & ~torch.eye(36, dtype=torch.bool)
    for item in range(2):
        for place in range(36):  # a subtree is its place and the subtrees of its children
            below = [inside[item, child] for child in children[item, :, place].nonzero().flatten()]
            own = torch.arange(36) == place
            assert torch.equal(inside[item, place], torch.stack([own, *below]).any(0))
    last = model.parse(image, [4])
    assert torch.equal(last.weights, model.dependencies(image)[4])


def test_dropped_places_show_their_nearest_kept_ancestor():
    model = narrow(drop=0.3)
    image = images()
    maps = model.get_intermediate_layers(image, range(5), reshape=True)
    states, found = model.run_blocks(image, range(5)), model.dependencies(image)
    for item in range(2):
        stands, places = list(range(36)), list(range(36))
        for i, state in enumerate(states):
            if i in (1, 4):
                weights = found[i][item][places][:, places]
                parents = dependency_tree(weights[None])[0].tolist()
                order = weights.sum(-1).argsort(descending=True, stable=True).tolist()
                kept = order[: state.x.shape[1]]
                heirs = {}
                for token in range(len(places)):
                    heir = token
                    while heir not in kept:
                        heir = parents[heir]
                    heirs[places[token]] = places[heir]
                stands = [heirs[place] for place in stands]
                places = [places[token] for token in kept]
            shown = maps[i][item].flatten(1).T
            for place in range(36):
                torch.testing.assert_close(shown[place], state.x[item, places.index(stands[place])])


def test_without_dropping_lite_is_the_whole_model():
    lite, whole = narrow(drop=0.2), narrow()
    whole.load_state_dict(lite.state_dict())
    image = images()
    assert not torch.allclose(lite(image), whole(image))
    assert isinstance(lite, DependencyViT)
    lite.set_rates(0.0)
    assert torch.equal(lite(image), whole(image))  # bitwise: the same operators on the same shapes
    lite.set_rates(0.2)
    assert [state.x.shape[1] for state in lite.run_blocks(image, range(5))] == [36, 29, 29, 29, 22]


def test_recomputed_blocks_hand_the_same_messages_on():
    model = narrow(drop=0.2, drop_path_rate=0.0).train()
    image, gradients = images(), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(image).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_lite_compiles_and_exports_whole():
    model, image = narrow(2, drop=0.2), images()
    with torch.no_grad():
        expected = model(image)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(image), expected)
    torch.testing.assert_close(torch.export.export(model, (image,)).module()(image), expected)


def test_every_size_is_here():
    assert sorted(SIZES) == list_models("dependency_vit*")


@pytest.mark.parametrize(("name", "dim", "lite"), [(name, *size) for name, size in SIZES.items()])
def test_parameters_are_those_of_the_host_with_selector_and_controller(name, dim, lite):
    card, host = model_card(name), "tiny" if dim == 192 else "small"
    model = create_model(name, device="meta").eval()
    of_host = model_card(f"deit_{host}_patch16_224").params - 2 * dim  # no class token and no position of it
    assert count_parameters(model) == of_host + 12 * (12 * dim + dim * dim // 2 + dim // 2) == card.params
    assert multiply_adds(model, 224) == pytest.approx(card.gmacs, abs=0.005)
    states = model.run_blocks(torch.empty(1, 3, 224, 224, device="meta"), range(12))
    dropped = [1, 4, 7, 10] if lite else []
    assert [i for i, block in enumerate(model.blocks) if block.reducer is not None] == dropped
    assert [state.x.shape[1] for state in states] == [196 - 31 * sum(at <= i for at in dropped) for i in range(12)]  # 16 %


def test_wrong_tables_and_mixers_are_told():
    with pytest.raises(ValueError, match=r"hands the messages.*block: it takes no other mixer; got 'window'"):
        create_model("dependency_vit_tiny", mixer="window")
    with pytest.raises(ValueError, match=r"reduce_at must be blocks 0 to 11; got \[12\]"):
        create_model("dependency_vit_tiny", drop=0.1, reduce_at=(12,), device="meta")
    with pytest.raises(ValueError, match=r"4 reductions may each drop less than 1/4 of all tokens; got drop=0.3"):
        create_model("dependency_vit_tiny", drop=0.3, device="meta")


# --------------------------------------------------------------------------------------------------------------------
# trees on toy images: rectangles in rectangles, seen through noise

SIDE, PATCH, NOISE = 8, 6, 2.0


def nested_scenes(count, generator):
    """Noisy images, the true colour of every patch, and the masks of outer and inner rectangle, ``(count, 2, patches)``."""

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    masks = torch.zeros(count, 2, SIDE, SIDE, dtype=torch.bool)
    for outer, inner in masks:
        height, width = draw(4, 6), draw(4, 6)
        top, left = draw(0, SIDE - height), draw(0, SIDE - width)
        outer[top : top + height, left : left + width] = True
        rows, columns = draw(2, height - 2), draw(2, width - 2)
        top, left = top + draw(1, height - rows - 1), left + draw(1, width - columns - 1)
        inner[top : top + rows, left : left + columns] = True
    region = masks.long().sum(1).flatten(1)
    colours = 2 * torch.rand(count, 3, 3, generator=generator) - 1
    colours = colours.gather(1, region[..., None].expand(-1, -1, 3))
    image = colours.transpose(1, 2).unflatten(2, (SIDE, SIDE)).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    return image + NOISE * torch.randn(image.shape, generator=generator), colours, masks.flatten(2)


def overlap(candidates, masks):
    """The mean over images and masks of the best intersection over union among boolean candidates (images, many, patches)."""
    both = (candidates[:, None] & masks[:, :, None]).sum(-1)
    either = (candidates[:, None] | masks[:, :, None]).sum(-1)
    return float((both / either).amax(-1).mean())


@pytest.mark.slow
def test_subtrees_are_the_nested_shapes_and_beat_clusters_of_patches():
    """Nothing but the colour behind the noise is learned: 200 steps of 64 images, seed 0, 35 s on one core.

    Mean overlap: 0.54 of subtrees; 0.39 of k-means on patches, with the true number of regions; 0.32 of subtrees untrained.
    """
    torch.manual_seed(0)
    model = create_model(
        "dependency_vit_tiny", dim=48, heads=4, depth=4, patch_size=PATCH, image_size=SIDE * PATCH, num_classes=0, drop_path=0.0
    )
    colour = nn.Linear(48, 3)
    image, _, masks = nested_scenes(100, torch.Generator().manual_seed(1))
    untrained = overlap(model.eval().parse(image).subtrees(), masks)
    patches = nn.functional.unfold(image, PATCH, stride=PATCH).transpose(1, 2)
    labels = torch.stack([torch.from_numpy(KMeans(3, n_init=10, random_state=0).fit_predict(each)) for each in patches.numpy()])
    clusters = overlap(nn.functional.one_hot(labels.long(), 3).transpose(1, 2).bool(), masks)
    optimiser = torch.optim.AdamW([*model.parameters(), *colour.parameters()], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, 200)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(200):
        noisy, colours, _ = nested_scenes(64, generator)
        (features,) = model.get_intermediate_layers(noisy, norm=True)
        loss = nn.functional.mse_loss(colour(features), colours)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    found = overlap(model.eval().parse(image).subtrees(), masks)
    assert found > clusters + 0.1, (found, clusters)
    assert found > untrained + 0.15, (found, untrained)
