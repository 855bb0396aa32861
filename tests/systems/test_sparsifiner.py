"""Sparsifiner (0): lists of keys as published, exact attention among them, and a predictor that learns dense maps."""

import math

import pytest
import torch
from naive_backbones import linear, multiply_adds
from naive_transformer import attention_map, embed, feed_forward, norm, small, split
from torch import nn

from regard import attend, create_mixer, create_model, load_checkpoint
from regard import patterns as P
from regard.bench import count
from regard.layers.mixers import distillation_loss, reconstruction_loss
from regard.layers.mixers.sparsifiner import attention_map as exact_map
from regard.models import count_parameters, export_state_dict, model_card

HOSTS = {"sparsifiner_deit_tiny": "tiny", "sparsifiner_deit_small": "small", "sparsifiner_deit_base": "base"}
DIM, HEADS, GRID = 24, 3, (5, 6)


def mixer(keep_rate=0.25, **options):
    made = create_mixer(
        "sparsifiner", dim=DIM, heads=HEADS, keep_rate=keep_rate, dtype=torch.float64, **{"grid": GRID} | options
    )
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def tokens(*grid, dim=DIM):
    return torch.randn(2, *(grid or GRID), dim, dtype=torch.float64)


def approximate(q, k, weights, name, heads, exact):
    """The low-rank map of patch queries, heads and rows one by one: (heads, queries, keys) for (heads, tokens, width)."""
    rows = []
    for head in range(heads):
        reduced_q = linear(q[head], weights, f"{name}.proj_c_q")
        reduced_k = linear(k[head], weights, f"{name}.proj_c_k")
        logits = reduced_q @ (reduced_k.T @ weights[f"{name}.proj_n"]) / math.sqrt(heads)
        coefficients, basis = logits.softmax(-1), weights[f"{name}.proj_back_n"].T
        if not exact:
            for row in coefficients:
                for column in sorted(range(len(row)), key=lambda i, row=row: -row[i].item())[8:]:
                    row[column] = 0.0
            basis = torch.where(basis.abs() > 2e-2, basis.abs(), 0.0)
        rows.append(coefficients @ basis)
    return torch.stack(rows)


def naive_sparsifiner(image, weights, keep_rate, depth=3, heads=2):
    """Dense maps with masks, as the text says; also the masks (batch, heads, tokens, tokens) of all layers."""
    x, masks = embed(image, weights), []
    for i in range(depth):
        block = f"blocks.{i}"
        normed = norm(x, weights, f"{block}.norm1")
        q, k, v = (split(part, heads) for part in linear(normed, weights, f"{block}.attn.qkv").chunk(3, -1))
        mask = torch.zeros(len(x), heads, x.shape[1], x.shape[1], dtype=torch.bool)
        mask[:, :, 0] = True
        budget = math.ceil(keep_rate * x.shape[1])
        for item in range(len(x)):
            scores = approximate(q[item, :, 1:], k[item], weights, f"{block}.attn.mask_predictor", heads, False)
            mask[item, :, 1:].scatter_(-1, scores.topk(budget).indices, True)
        logits = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~mask, -torch.inf)
        mixed = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = feed_forward(x + linear(mixed, weights, f"{block}.attn.proj"), weights, block)
        masks.append(mask)
    return linear(norm(x, weights, "norm")[:, 0], weights, "head"), masks


def naive_pruned(image, weights, keep_rate, rates, heads=2):
    """One image, from which dropped patches are really taken away, with their rows of the predictors; and who is left."""
    x, left = embed(image, weights), list(range(1, image.shape[-1] // 16 * (image.shape[-2] // 16) + 1))
    places = len(left)
    for i, rate in enumerate(rates):
        block, rows = f"blocks.{i}", [0, *left]
        normed = norm(x, weights, f"{block}.norm1")
        q, k, v = (split(part, heads)[0] for part in linear(normed, weights, f"{block}.attn.qkv").chunk(3, -1))
        of_left = {key: value[rows] if "proj_n" in key or "proj_back" in key else value for key, value in weights.items()}
        scores = approximate(q[:, 1:], k, of_left, f"{block}.attn.mask_predictor", heads, False)
        mask = torch.zeros(heads, len(rows), len(rows), dtype=torch.bool)
        mask[:, 0] = True
        budget = min(math.ceil(keep_rate * (1 + places)), len(left))
        mask[:, 1:].scatter_(-1, scores.topk(budget).indices, True)
        maps = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~mask, -torch.inf).softmax(-1)
        x = x + linear((maps @ v).transpose(0, 1).flatten(1)[None], weights, f"{block}.attn.proj")
        x = feed_forward(x, weights, block)
        if rate is not None:
            best = sorted(maps[:, 0, 1:].mean(0).topk(math.ceil(rate * places)).indices.tolist())
            x, left = x[:, [0, *(1 + i for i in best)]], [left[i] for i in best]
    return linear(norm(x, weights, "norm")[:, 0], weights, "head"), left


@pytest.mark.parametrize("keep_rate", [0.25, 0.6])
def test_equals_the_definition(keep_rate):
    model, weights = small("sparsifiner_deit_small", depth=3, image_size=96, keep_rate=keep_rate)
    image = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    expected, masks = naive_sparsifiner(image, weights, keep_rate)
    torch.testing.assert_close(model(image), expected, rtol=1e-11, atol=1e-11)
    assert all(m[:, :, 1:].sum(-1).eq(math.ceil(keep_rate * 37)).all() for m in masks)
    with count() as cost:
        model(image)
    assert cost.pairs == sum(int(m.sum()) for m in masks)  # nothing but the listed pairs is attended to


@pytest.mark.parametrize("prefix", [0, 2])
def test_keeping_everything_is_multi_head_attention(prefix):
    sparse = mixer(1.0, prefix=prefix)
    plain = create_mixer("multi_head", dim=DIM, heads=HEADS, dtype=torch.float64)
    plain.load_state_dict({k: v for k, v in sparse.state_dict().items() if not k.startswith("predictor")})
    x, extra = tokens(), tokens(2)
    for ours, expected in zip(sparse(x, extra), plain(x, extra), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("keep_rate", [0.03, 0.25, 0.5])
def test_every_query_has_as_many_keys_and_extra_tokens_all(keep_rate):
    sparse = mixer(keep_rate, prefix=1)
    x, extra = tokens(), tokens(1)
    q, k, _ = sparse.project(x, x)
    _, extra_k, _ = sparse.project(extra, extra)
    scores = sparse.predictor(q.flatten(1, 2), torch.cat([extra_k, k.flatten(1, 2)], 1), GRID)
    assert scores.shape == (2, HEADS, 30, 31)
    mask = sparse.connectivity(scores).mask((30,), (31,))
    assert mask.sum(-1).eq(math.ceil(keep_rate * 31)).all()
    assert not mask[0].equal(mask[1])
    assert not mask[:, 0].equal(mask[:, 1])
    with count() as cost:
        sparse(x, extra)
    assert cost.pairs == 2 * HEADS * (30 * math.ceil(keep_rate * 31) + 31)


def test_a_threshold_lists_what_lies_above_it_and_rows_without_any_give_zero():
    sparse = mixer(threshold=0.3)
    scores = torch.rand(2, HEADS, 30, 30, dtype=torch.float64)
    scores[0, :, 4] = 0.1
    mask = sparse.connectivity(scores).mask(GRID)
    assert torch.equal(mask, scores > 0.3)
    q = tokens(30, dim=HEADS * 8).unflatten(-1, (HEADS, 8))
    out = attend(q, q, q, sparse.connectivity(scores))
    assert out[0, 4].eq(0).all()
    assert out.isfinite().all()


@pytest.mark.parametrize("backend", ["tiled", "dense"])
def test_gathered_and_masked_attention_agree_with_gradients(backend):
    sparse = mixer(0.2, prefix=1)
    x, extra = tokens().requires_grad_(), tokens(1)
    results = []
    for each in ("reference", backend):
        sparse.backend = each
        y, y_extra = sparse(x, extra)
        leaves = [x, sparse.qkv.weight, sparse.proj.weight]
        results.append((y, y_extra, *torch.autograd.grad(y.sin().sum() + y_extra.sin().sum(), leaves)))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)


def test_the_choice_carries_no_gradient():
    sparse = mixer()
    sparse(tokens()).square().sum().backward()
    assert all(p.grad is None for p in sparse.predictor.parameters())
    assert all(p.grad is not None for n, p in sparse.named_parameters() if not n.startswith("predictor"))


def test_tables_of_another_grid_are_resized_and_those_of_the_prefix_are_not():
    sparse = mixer(prefix=2)
    resized = sparse.predictor._resized(sparse.predictor.down, (7, 9))
    assert resized.shape == (2 + 63, sparse.predictor.down.shape[1])
    assert torch.equal(resized[:2], sparse.predictor.down[:2])
    places = sparse.predictor.down[2:].T.unflatten(1, GRID)[None]
    expected = nn.functional.interpolate(places, (7, 9), mode="bicubic")[0].flatten(1).T
    torch.testing.assert_close(resized[2:], expected)
    assert sparse(tokens(7, 9), tokens(2))[0].shape == (2, 7, 9, DIM)


@pytest.mark.parametrize("keep_rate", [0.1, 0.5])
def test_pruned_patches_might_as_well_not_be_there(keep_rate):
    """Few keys of many, and more than there are patches in the end."""
    options = {"depth": 4, "image_size": 96, "keep_rate": keep_rate, "token_rate": 0.6, "prune_at": (0, 2)}
    model, weights = small("sparsifiner_deit_small", **options)
    images = torch.randn(3, 3, 96, 96, dtype=torch.float64)
    logits, state = model(images), model.run_blocks(images)[-1]
    for item, image in enumerate(images):
        expected, left = naive_pruned(image[None], weights, keep_rate, (0.6, None, 0.36, None))
        torch.testing.assert_close(logits[item : item + 1], expected, rtol=1e-11, atol=1e-11)
        assert len(left) == state.tokens.present == math.ceil(0.36 * 36)
        assert (state.tokens.alive[item].nonzero().flatten() + 1).tolist() == left
    features = model.get_intermediate_layers(images, 1, reshape=True)[0]
    assert torch.equal(features.flatten(2).transpose(1, 2).abs().sum(-1) > 0, state.tokens.alive)
    dead = model.forward_features(images)[:, 1:][~state.tokens.alive]
    assert torch.equal(dead, model.norm.bias.expand_as(dead))  # zeros, normalised
    cut = model.cut((0, 3)).eval()
    assert torch.equal(cut(images)[1], features)  # bitwise: the same operators on the same shapes


def test_dropped_places_get_no_gradient_and_the_predictors_are_trained_on_all():
    model, _ = small("sparsifiner_deit_small", depth=3, image_size=96, token_rate=0.5, prune_at=(0,))
    teacher, _ = small("deit_small_patch16_224", depth=3, image_size=96)
    images = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    states = model.run_blocks(images, (0, 1, 2))
    late = torch.autograd.grad(states[2].x[:, 0].square().sum(), states[0].x)[0][:, 1:].abs().sum(-1) > 0
    assert torch.equal(late, states[0].tokens.alive)
    assert late.sum(-1).eq(18).all()
    plain, _ = small("sparsifiner_deit_small", depth=3, image_size=96)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(reconstruction_loss(model, teacher, images), reconstruction_loss(plain, teacher, images))


def test_a_rate_per_pruning_is_a_power_and_other_mixers_are_refused_with_the_reason():
    model = create_model("sparsifiner_deit_tiny", device="meta", token_rate=0.7)
    rates = {i: block.reducer.rate for i, block in enumerate(model.blocks) if block.reducer is not None}
    assert rates == pytest.approx({3: 0.7, 6: 0.49, 9: 0.343})
    assert count_parameters(model) == model_card("sparsifiner_deit_tiny").params
    with pytest.raises(ValueError, match=r"ranks tokens by its own attention.*: it takes no other mixer; got 'window'"):
        create_model("sparsifiner_deit_tiny", token_rate=0.7, mixer="window")
    with pytest.raises(ValueError, match=r"prune_at must be blocks 0 to 11; got \[3, 12\]"):
        create_model("sparsifiner_deit_tiny", token_rate=0.7, prune_at=(12, 3), device="meta")
    with pytest.raises(ValueError, match=r"rate must be in \(0, 1\]; got 1.5"):
        create_model("sparsifiner_deit_tiny", token_rate=1.5, device="meta")


def test_pruning_is_one_graph():
    model, _ = small("sparsifiner_deit_small", depth=2, image_size=64, token_rate=0.5, prune_at=(0,))
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(image), model(image), rtol=1e-10, atol=1e-10)


# --------------------------------------------------------------------------------------------------------------------
# training


def pair(**options):
    student, weights = small("sparsifiner_deit_small", depth=2, image_size=96, **options)
    teacher, _ = small("deit_small_patch16_224", depth=2, image_size=96)
    teacher.load_state_dict({k: v for k, v in student.state_dict().items() if "predictor" not in k})
    return student, teacher, weights


def test_the_reconstruction_loss_is_the_published_sum_over_dense_signed_maps():
    student, teacher, weights = pair()
    with torch.no_grad():
        for name, parameter in student.named_parameters():  # the student has moved on, its teacher has not
            if "predictor" not in name:
                parameter.mul_(0.9)
    weights = export_state_dict(student, "official")
    image = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    loss = reconstruction_loss(student, teacher, image)
    of_teacher = export_state_dict(teacher, "official")
    total, x, theirs = 0.0, embed(image, weights), embed(image, of_teacher)
    for i in range(2):
        block = f"blocks.{i}"
        normed = norm(x, weights, f"{block}.norm1")
        q, k, v = (split(part, 2) for part in linear(normed, weights, f"{block}.attn.qkv").chunk(3, -1))
        maps, values = attention_map(norm(theirs, of_teacher, f"{block}.norm1"), of_teacher, f"{block}.attn", 2)
        for item in range(2):
            approximation = approximate(q[item, :, 1:], k[item], weights, f"{block}.attn.mask_predictor", 2, True)
            total = total + (approximation - maps[item, :, 1:]).square().sum()
        dense = (q @ k.transpose(-1, -2) / math.sqrt(8)).softmax(-1) @ v  # attention is not masked in this phase
        x = feed_forward(x + linear(dense.transpose(1, 2).flatten(2), weights, f"{block}.attn.proj"), weights, block)
        mixed = linear((maps @ values).transpose(1, 2).flatten(2), of_teacher, f"{block}.attn.proj")
        theirs = feed_forward(theirs + mixed, of_teacher, block)
    torch.testing.assert_close(loss, 0.01 * total / 2)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in student.named_parameters() if "predictor" in n)
    assert all(block.mixer.op.maps is None for block in student.blocks)


def test_after_reconstruction_the_lists_hold_more_of_the_true_keys_than_chance_or_a_window():
    """Keys are the places; queries prefer the places of their own column, which neither chance nor a window knows."""
    torch.manual_seed(0)
    sparse = create_mixer("sparsifiner", dim=16, heads=1, keep_rate=0.2, grid=(8, 8), token_ratio=4)
    column = nn.functional.one_hot(torch.arange(64) % 8, 8).float().unflatten(0, (8, 8))
    with torch.no_grad():
        sparse.qkv.weight.zero_()
        sparse.qkv.weight[:8, :8] = sparse.qkv.weight[16:24, :8] = 4 * torch.eye(8)
        sparse.qkv.bias.zero_()

    def images():
        return torch.cat([column.expand(4, -1, -1, -1), torch.zeros(4, 8, 8, 8)], -1) + 0.1 * torch.randn(4, 8, 8, 16)

    optimiser = torch.optim.Adam(sparse.predictor.parameters(), lr=2e-2)
    for _ in range(150):
        x = images()
        sparse.maps = []
        sparse(x)
        loss = (sparse.maps[0] - exact_map(sparse, x).detach()).square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    sparse.maps = None
    x = images()
    q, k, _ = sparse.project(x, x)
    listed = sparse.connectivity(sparse.predictor(q.flatten(1, 2), k.flatten(1, 2), (8, 8))).mask((8, 8))
    best = P.Tokens(exact_map(sparse, x).topk(13).indices).mask((8, 8))
    window = P.Tokens(torch.stack([
        ((torch.arange(64) % 8 - i % 8) ** 2 + (torch.arange(64) // 8 - i // 8) ** 2).topk(13, largest=False).indices
        for i in range(64)
    ])[None]).mask((8, 8))  # fmt: skip

    def overlap(mask):
        return (mask & best).sum().item() / best.sum().item()

    assert 13 / 64 < 0.25
    assert overlap(window.expand_as(best)) < 0.5
    assert overlap(listed) > 0.65


def test_the_second_phase_weighs_labels_logits_and_tokens_as_published():
    logits, of_teacher = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    x, y, labels = tokens(7), tokens(7), torch.tensor([1, 4, 0])
    p, q = logits.softmax(-1), of_teacher.softmax(-1)
    entropy = -sum(p[i, label].log() for i, label in enumerate(labels.tolist())) / 3
    divergence = (q * (q.log() - p.log())).sum() / 3
    expected = entropy + 0.5 * divergence + 0.5 * ((x - y) ** 2).mean()
    torch.testing.assert_close(distillation_loss(logits, x, of_teacher, y, labels), expected)


# --------------------------------------------------------------------------------------------------------------------
# published facts


@pytest.mark.parametrize(("name", "host"), HOSTS.items())
def test_parameters_are_the_hosts_and_the_predictors(name, host):
    card, of_host = model_card(name), model_card(f"deit_{host}_patch16_224")
    model = create_model(name, device="meta")
    each = 2 * (64 * 32 + 32) + 2 * 197 * 32  # one for all heads; 197 tokens in 32 columns
    assert count_parameters(model) == of_host.params + 12 * each == card.params


def test_multiply_adds_are_those_of_the_host_less_three_quarters_of_attention_plus_the_maps():
    name, heads = "sparsifiner_deit_tiny", 3
    found = multiply_adds(create_model(name, depth=1), 224) * 1e9
    host = multiply_adds(create_model("deit_tiny_patch16_224", depth=1, device="meta"), 224) * 1e9
    dense, listed = 2 * 197 * 197 * 192, 2 * (196 * 50 + 197) * 192
    reduced = (196 + 197) * heads * 64 * 32
    assert found == pytest.approx(host - dense + listed + reduced, abs=1)
    maps = heads * (32 * 197 * 32 + 196 * 32 * 32 + 196 * 32 * 197)  # keys in columns, coefficients, and times the basis
    total = multiply_adds(create_model("deit_tiny_patch16_224", device="meta"), 224) + 12 * (found - host + maps) / 1e9
    assert total == pytest.approx(model_card(name).gmacs, rel=0.02)


def test_the_weights_of_the_host_and_official_names_load():
    student, teacher, weights = pair()
    assert {k.split(".", 3)[3] for k in weights if "mask_predictor" in k} == {
        "mask_predictor.proj_c_q.weight", "mask_predictor.proj_c_q.bias", "mask_predictor.proj_c_k.weight",
        "mask_predictor.proj_c_k.bias", "mask_predictor.proj_n", "mask_predictor.proj_back_n",
    }  # fmt: skip
    other, _ = small("sparsifiner_deit_small", depth=2, image_size=96)
    assert load_checkpoint(other, weights) == "official"
    image = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    assert torch.equal(other(image), student(image))  # bitwise: the same operators on the same shapes
    missing, unexpected = other.load_state_dict(teacher.state_dict(), strict=False)
    assert unexpected == []
    assert all("predictor" in key for key in missing)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: mixer(0.0), r"keep_rate must be in \(0, 1\]; got 0.0"),
        (lambda: mixer(prefix=2)(tokens(), tokens(1)), "knows 2 tokens outside the grid; got 1"),
        (lambda: mixer()(tokens(4, 2, 2)), r"grid \(5, 6\), which has no size \(4, 2, 2\)"),
        (lambda: reconstruction_loss(nn.Identity(), mixer(), tokens()), "the student has 0 sparsifiner mixers"),
    ],
)
def test_what_does_not_fit_is_told(make, told):
    with pytest.raises(ValueError, match=told):
        make()
