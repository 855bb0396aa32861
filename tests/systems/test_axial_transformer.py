"""Axial Transformer (127): it equals masked dense transformers, no pixel sees itself or later ones, rows may be cached."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regard import attend
from regard.layers.mixers import AxialAttention
from regard.models import AxialTransformer, count_parameters
from regard.ops import patterns as P

TINY = {"dim": 8, "heads": 2, "outer": 1, "inner": 1, "encoder": 1}


def tiny(size=(3, 4), slices=2, values=5, **options):
    return AxialTransformer(size, slices, values, **(TINY | options), dtype=torch.float64).eval()


def images(model, count=2):
    return torch.randint(model.values, (count, model.slices, *model.size))


# --------------------------------------------------------------------------------------------------------------------
# the definition


def naive_block(x, weights, name, heads, seen):
    """A pre-norm transformer block on flat tokens ``(batch, tokens, dim)`` under a mask ``(tokens, tokens)``."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    qkv = linear(norm(x, f"{name}.norm"), f"{name}.attention.qkv").unflatten(-1, (3, heads, -1))
    q, k, v = qkv.unbind(2)
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    weighted = torch.einsum("bhqk,bkhd->bqhd", logits.masked_fill(~seen, -torch.inf).softmax(-1), v)
    x = x + linear(weighted.flatten(2), f"{name}.attention.proj")
    return x + linear(F.gelu(linear(norm(x, f"{name}.mlp.norm"), f"{name}.mlp.op.fc1")), f"{name}.mlp.op.fc2")


def naive_logits(model, image):
    """One slice after the other; shifts are spelled out pixel by pixel."""
    weights, (height, width), heads = model.state_dict(), model.size, 2
    place = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    row, column = place.T
    in_row, in_column = row[:, None] == row, column[:, None] == column
    masks = {"row": in_row, "column": in_column, "left": in_row & (column[:, None] >= column)}
    masks["above"] = in_column & (row[:, None] >= row)
    positions = weights["rows"].expand(height, width, -1).flatten(0, 1) + weights["columns"].repeat(height, 1)
    every = []
    for part in range(model.slices):
        context = torch.zeros(len(image), height * width, positions.shape[-1], dtype=torch.float64)
        if model.slices > 1:
            context = context + weights["order"][part, 0] + positions
            for before in range(part):
                context = context + weights["past.weight"][before * model.values + image[:, before].flatten(1)]
            for i, name in enumerate(("row", "column") * (len(model.encoder) // 2)):
                context = naive_block(context, weights, f"encoder.{i}", heads, masks[name])
        h = weights["embed.weight"][image[:, part].flatten(1)] + positions
        above = h + context
        for i, name in enumerate(("row", "above") * (len(model.outer) // 2)):
            above = naive_block(above, weights, f"outer.{i}", heads, masks[name])
        start = positions + context
        for at, (i, j) in enumerate(place.tolist()):
            if i > 0:
                start[:, at] += above[:, (i - 1) * width + j]
            if j > 0:
                start[:, at] += h[:, i * width + j - 1]
        for i in range(len(model.inner)):
            start = naive_block(start, weights, f"inner.{i}", heads, masks["left"])
        start = F.layer_norm(start, start.shape[-1:], weights["norm.weight"], weights["norm.bias"])
        every.append(F.linear(start, weights["head.weight"], weights["head.bias"]).unflatten(1, (height, width)))
    return torch.stack(every, 1)


@pytest.mark.parametrize("slices", [1, 3])
def test_equals_masked_dense_transformers(slices):
    model = tiny(slices=slices, outer=2, inner=2, encoder=2)
    x = images(model)
    torch.testing.assert_close(model(x), naive_logits(model, x), rtol=1e-11, atol=1e-11)


def test_two_axes_in_turn_are_not_one_softmax_over_both():
    """Row and column attention equal dense attention under their own masks only: criss-cross competes in one softmax."""
    q, k, v = (torch.randn(1, 4, 5, 2, 3, dtype=torch.float64) for _ in range(3))
    for axis, causal in itertools.product((0, 1), (False, True)):
        at = torch.cartesian_prod(torch.arange(4), torch.arange(5))
        same = at[:, None, 1 - axis] == at[:, 1 - axis]
        seen = same & (at[:, None, axis] >= at[:, axis]) if causal else same
        logits = torch.einsum("bqhd,bkhd->bhqk", q.flatten(1, 2), k.flatten(1, 2)) / 3**0.5
        expected = torch.einsum("bhqk,bkhd->bqhd", logits.masked_fill(~seen, -torch.inf).softmax(-1), v.flatten(1, 2))
        found = attend(q, k, v, P.Axis(axis, causal))
        torch.testing.assert_close(found.flatten(1, 2), expected, rtol=1e-12, atol=1e-12)
    apart = (attend(q, k, v, P.Axis(0)) + attend(q, k, v, P.Axis(1))) / 2
    assert (apart - attend(q, k, v, P.Axis(0) | P.Axis(1))).abs().max() > 1e-2


# --------------------------------------------------------------------------------------------------------------------
# causality and sampling


def test_every_pixel_sees_all_earlier_ones_and_no_other():
    """Replace one pixel at a time: logits up to it stay, all later ones change."""
    model = tiny()
    x = images(model, 1)
    pixels = x.numel()
    changed = x.repeat(pixels, 1, 1, 1).flatten(1)
    changed[range(pixels), range(pixels)] = (changed[range(pixels), range(pixels)] + 1) % model.values
    difference = (model(changed.reshape(-1, *x.shape[1:])) - model(x)).flatten(1, 3).abs().amax(-1)
    assert difference.triu(1).gt(1e-9).equal(torch.ones(pixels, pixels).triu(1).bool())
    assert difference.tril().lt(1e-14).all()


def test_gradients_reach_all_earlier_pixels_and_no_other():
    model = tiny(slices=1)
    x = images(model, 1)
    embedded = model.embed(x.flatten(0, 1)).detach().requires_grad_()
    model.embed.register_forward_hook(lambda *_: embedded)
    logits = model(x).flatten(0, 3)
    for at, row in enumerate(logits):
        (gradient,) = torch.autograd.grad(row.square().sum(), embedded, retain_graph=True, allow_unused=True)
        reached = gradient.flatten(0, 2).abs().amax(-1)
        assert reached[:at].gt(1e-12).all()
        assert reached[at:].eq(0).all()


@pytest.mark.parametrize("slices", [1, 2])
def test_writing_with_cached_rows_equals_the_full_forward(slices):
    model = tiny(slices=slices, outer=2, inner=2)
    x = images(model)
    order, seen = iter(x.flatten(1).T), []

    def choose(logits):
        seen.append(logits)
        return next(order)

    with torch.no_grad():
        assert torch.equal(model.write(2, choose), x)
        full = model(x).flatten(1, 3)
    torch.testing.assert_close(torch.stack(seen, 1), full, rtol=1e-11, atol=1e-11)


def test_the_likeliest_image_is_likeliest_pixel_by_pixel():
    model = tiny()
    x = model.sample(1, temperature=0)
    assert torch.equal(model(x).argmax(-1), x)


def test_a_seed_decides_what_is_drawn_and_frequencies_follow_the_model():
    model = tiny((1, 2), 1, 3)
    with torch.no_grad():
        model.head.weight.mul_(8)
    draws = [model.sample(4000, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    logits = model(pairs.reshape(9, 1, 1, 2)).log_softmax(-1).flatten(1, 3)
    probability = logits.gather(-1, pairs[..., None]).sum((1, 2)).exp()
    assert probability.sum().item() == pytest.approx(1.0, abs=1e-12)
    counts = torch.bincount(draws[2].flatten(1) @ torch.tensor([3, 1]), minlength=9) / 4000
    assert (counts - probability).abs().max() < 0.03


def test_a_causal_layer_continues_where_it_stopped():
    """Also several tokens at a time, along either axis, with rotated positions."""
    x = torch.randn(2, 5, 6, 16, dtype=torch.float64)
    for axis in (0, 1):
        layer = AxialAttention(16, 2, (axis,), causal=True, rope=True, dtype=torch.float64)
        cache: list = []
        parts = [layer.extend(part, cache) for part in x.split((2, 1, x.shape[1 + axis] - 3), 1 + axis)]
        torch.testing.assert_close(torch.cat(parts, 1 + axis), layer(x), rtol=1e-11, atol=1e-11)
    for refused in (AxialAttention(16, 2, (0,)), AxialAttention(16, 2, causal=True)):
        with pytest.raises(ValueError, match=r"only a causal layer of one axis can be continued; got causal="):
            refused.extend(x, [])


# --------------------------------------------------------------------------------------------------------------------
# size, cost, errors, learning


def test_parameters_follow_from_the_sizes():
    dim, values = 512, 256
    block = 12 * dim**2 + 13 * dim  # attention 4 d^2 + 4 d, MLP 8 d^2 + 5 d, two norms 4 d
    for slices in (1, 3):
        model = AxialTransformer((64, 64), slices, values, dim, outer=8, inner=4, encoder=4, device="meta")
        others = values * dim + 2 * 64 * dim + 2 * dim + dim * values + values
        past = (slices - 1) * values * dim + slices * dim + 8 * block if slices > 1 else 0
        assert count_parameters(model) == (2 * 8 + 4) * block + others + past


def test_cost_grows_with_pixels_times_side():
    from regard import plan

    pairs = [plan("axis(0, causal=True)", (n, n)).attended_pairs + plan("axis(1)", (n, n)).attended_pairs for n in (32, 64)]
    assert pairs[0] == 32**2 * (32 + 33 / 2)
    assert 7.9 < pairs[1] / pairs[0] < 8  # dense attention: 16


def test_errors_quote_what_was_given():
    model = tiny()
    with pytest.raises(ValueError, match=r"expected integers \(batch, 2, 3, 4\); got \(1, 2, 4, 4\) of torch.int64"):
        model(torch.zeros(1, 2, 4, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"got \(1, 2, 3, 4\) of torch.float32"):
        model(torch.zeros(1, 2, 3, 4))
    with pytest.raises(ValueError, match=r"must be positive; got \(3, 4\), 0, 2, 1 and 1"):
        AxialTransformer((3, 4), 0, 2, 8, 2, outer=1, inner=1)


def trained(model: nn.Module, data, steps):
    torch.manual_seed(0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = data(64)
        loss = model.bits_per_dim(batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


def stripes(count, side=8):
    """Noisy binary diagonals: each pixel is the one to its upper left, flipped one time in twenty."""
    image = torch.randint(2, (count, 1, side, side))
    for row in range(1, side):
        flips = (torch.rand(count, 1, side - 1) < 0.05).long()
        image[:, :, row, 1:] = image[:, :, row - 1, :-1] ^ flips
    return image


@pytest.mark.slow
def test_pixels_above_save_bits():
    """400 steps of 64 images: a row alone is noise (1 bit a pixel), its row above leaves 7 of 8 pixels 0.29 bits each."""
    torch.manual_seed(0)
    options = {"dim": 32, "heads": 2, "outer": 1, "inner": 1}
    whole = trained(AxialTransformer((8, 8), 1, 2, **options), stripes, 400)
    alone = trained(AxialTransformer((1, 8), 1, 2, **options), lambda n: stripes(n).reshape(-1, 1, 1, 8), 400)
    fresh = stripes(512)
    with torch.no_grad():
        with_above, without = whole.bits_per_dim(fresh).item(), alone.bits_per_dim(fresh.reshape(-1, 1, 1, 8)).item()
    flipped = (fresh[..., 1:, 1:] != fresh[..., :-1, :-1]).double().mean().item()
    best = (15 - 49 * (flipped * math.log2(0.05) + (1 - flipped) * math.log2(0.95))) / 64  # of who knows how they were made
    assert without == pytest.approx(1.0, abs=0.02)
    assert best - 0.01 < with_above < without - 0.5
