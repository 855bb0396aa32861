"""BiFormer (12): routed regions equal gathering them one by one, and the published counts."""

import pytest
import torch
import torch.nn.functional as F
from naive_backbones import batch_norm, conv, heads_of, layer_norm, linear, mlp, multiply_adds, patches, tiny

from regard import attend, create_model, list_models
from regard.bench import count
from regard.compare.measure import memory
from regard.layers.mixers import BiLevelRoutingAttention
from regard.models import count_parameters, model_card
from regard.ops.patterns import Blocks

SIZES = {  # dim, depths
    "biformer_tiny": (64, (2, 2, 8, 2)),
    "biformer_small": (64, (4, 4, 18, 4)),
    "biformer_base": (96, (4, 4, 18, 4)),
}
PUBLISHED = {"biformer_tiny": 13_142_760, "biformer_small": 25_536_232, "biformer_base": 56_804_968}
NARROW = {"dim": 8, "head_dim": 4, "depths": (2, 1, 1, 1), "topks": (1, 2, 4, None), "regions": 3}


# --------------------------------------------------------------------------------------------------------------------
# the definition


def cuts(length, regions):
    size = -(-length // regions)
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def routed_attention(x, weights, name, heads, regions, topk, *, pad):
    """One image and one region at a time: find the regions most like it, gather their tokens, attend."""
    rows, columns, dim = x.shape[1:]
    if pad:
        x = F.pad(x, [0, 0, 0, -columns % regions, 0, -rows % regions])
    q, k, v = linear(x, weights, f"{name}.qkv.qkv").chunk(3, -1)
    cells = [(row, column) for row in cuts(x.shape[1], regions) for column in cuts(x.shape[2], regions)]
    out = torch.empty_like(v)
    for image in range(len(x)):
        q_mean, k_mean = (torch.stack([t[image][cell].flatten(0, 1).mean(0) for cell in cells]) for t in (q, k))
        for index, cell in enumerate(cells):
            nearest = (q_mean[index] * dim**-0.5 @ k_mean.T).topk(topk).indices
            keys, values = (torch.cat([t[image][cells[n]].flatten(0, 1) for n in nearest]) for t in (k, v))
            here = q[image][cell]
            split = [t.reshape(-1, heads, dim // heads).transpose(0, 1) for t in (here, keys, values)]
            mixed = (split[0] @ split[1].transpose(1, 2) * dim**-0.5).softmax(-1) @ split[2]
            out[image][cell] = mixed.transpose(0, 1).reshape(here.shape)
    out = linear(out + conv(v, weights, f"{name}.lepe", groups=dim), weights, f"{name}.wo")
    return out[:, :rows, :columns]


def dense_attention(x, weights, name):
    """The last stage: 8 heads, the width of a head as scale, and the convolution of the input instead of the values."""
    q, k, v = heads_of(x, weights, f"{name}.qkv", 8)
    mixed = ((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    lepe = conv(x, weights, f"{name}.lepe", groups=x.shape[-1])
    return linear(mixed.unflatten(1, x.shape[1:3]) + lepe, weights, f"{name}.proj")


def blocks(x, weights, stage, prefix, depth, fc2, topk, *, position, pad, regions=3):
    for index in range(depth):
        name = f"stages.{stage}.{prefix}{index}"
        if position:
            x = x + conv(x, weights, f"{name}.pos_embed", groups=x.shape[-1])
        normed = layer_norm(x, weights, f"{name}.norm1", 1e-6)
        if topk is None:
            x = x + dense_attention(normed, weights, f"{name}.attn")
        else:
            x = x + routed_attention(normed, weights, f"{name}.attn", x.shape[-1] // 4, regions, topk, pad=pad)
        x = x + mlp(layer_norm(x, weights, f"{name}.norm2", 1e-6), weights, f"{name}.mlp.0", f"{name}.mlp.{fc2}")
    return x


def naive_biformer(image, weights, depths, topks, *, pad=False):
    x = batch_norm(conv(image.permute(0, 2, 3, 1), weights, "downsample_layers.0.0", 2), weights, "downsample_layers.0.1")
    x = batch_norm(conv(F.gelu(x), weights, "downsample_layers.0.3", 2), weights, "downsample_layers.0.4")
    for stage, (depth, topk) in enumerate(zip(depths, topks, strict=True)):
        if stage:
            name = f"downsample_layers.{stage}"
            x = batch_norm(conv(x, weights, f"{name}.0", 2), weights, f"{name}.1")
        x = blocks(x, weights, stage, "", depth, 3, topk, position=True, pad=pad)
    return linear(batch_norm(x, weights, "norm").mean((1, 2)), weights, "head")


@pytest.mark.parametrize(("pad", "size"), [("mask", (96, 144)), ("mask", (70, 101)), ("token", (70, 101))])
def test_equals_gathering_regions_one_by_one(pad, size):
    model, weights = tiny("biformer_tiny", **NARROW, pad=pad)
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = naive_biformer(image, weights, NARROW["depths"], NARROW["topks"], pad=pad == "token")
    torch.testing.assert_close(model(image), expected, rtol=1e-10, atol=1e-10)


def test_the_swin_like_layout_equals_its_definition():
    model, weights = tiny("biformer_stl", **NARROW)
    image = torch.randn(2, 3, 100, 144, dtype=torch.float64)  # 25 x 36: the next stage has an odd row to fill
    x = batch_norm(patches(image, weights, "downsample_layers.0.0", 4), weights, "downsample_layers.0.1")
    for stage, (depth, topk) in enumerate(zip(NARROW["depths"], NARROW["topks"], strict=True)):
        if stage:
            name = f"downsample_layers.{stage}"
            x = batch_norm(x, weights, f"{name}.0")
            x = F.pad(x, [0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2])
            x = conv(x, weights, f"{name}.1", stride=2)
        x = blocks(x, weights, stage, "blocks.", depth, 2, topk, position=False, pad=False)
    expected = linear(batch_norm(x, weights, "norm").mean((1, 2)), weights, "head")
    torch.testing.assert_close(model(image), expected, rtol=1e-10, atol=1e-10)


def test_all_regions_routed_is_full_attention_with_the_local_term():
    model, weights = tiny("biformer_tiny", **NARROW | {"topks": (9, 9, 9, None)})
    x = torch.randn(2, 10, 13, 8, dtype=torch.float64)
    name = "stages.0.0.attn"
    q, k, v = heads_of(x, weights, f"{name}.qkv.qkv", 2)
    mixed = ((q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2).unflatten(1, (10, 13))
    values = v.transpose(1, 2).flatten(2).unflatten(1, (10, 13))
    expected = linear(mixed + conv(values, weights, f"{name}.lepe", groups=8), weights, f"{name}.wo")
    torch.testing.assert_close(model.stages[0].blocks[0].mixer.op(x), expected, rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------------------------------------------------
# mechanism


def test_a_region_whose_keys_move_towards_a_query_region_becomes_routed():
    model, _ = tiny("biformer_tiny", **NARROW)
    mixer = model.stages[1].blocks[0].mixer.op  # top 2 of 9 regions
    q, k = torch.randn(2, 1, 9, 9, 4, 4, dtype=torch.float64)
    before = mixer.route(q, k).table4()[0, 0]
    target = next(region for region in range(9) if region not in before[0])
    cell = (slice(3 * (target // 3), 3 * (target // 3) + 3), slice(3 * (target % 3), 3 * (target % 3) + 3))
    k[0][cell] += 10 * q[0, :3, :3].mean((0, 1))
    after = mixer.route(q, k).table4()[0, 0]
    assert target in after[0]
    assert after.shape == before.shape == (9, 2)


def test_routing_carries_no_gradient_and_unrouted_regions_get_none():
    model, _ = tiny("biformer_tiny", **NARROW)
    mixer = model.stages[0].blocks[0].mixer.op  # top 1
    q, k, v = torch.randn(3, 1, 9, 9, 2, 4, dtype=torch.float64).requires_grad_().unbind(0)
    pattern = mixer.route(q, k)
    assert not pattern.table.requires_grad
    routed = int(pattern.table4()[0, 0, 4, 0])  # of the middle region
    out = mixer.mix(torch.empty(1, 9, 9, 8), q, k, v, [])
    gradient = torch.autograd.grad(out[:, 3:6, 3:6].square().sum(), k)[0][0].abs().sum((-1, -2)) > 0
    expected = torch.zeros(9, 9, dtype=torch.bool)
    expected[3 * (routed // 3) : 3 * (routed // 3) + 3, 3 * (routed % 3) : 3 * (routed % 3) + 3] = True
    assert torch.equal(gradient, expected)


def test_routed_attention_is_dense_attention_under_the_mask_of_the_table_in_whatever_order_it_lists():
    mixer = BiLevelRoutingAttention(8, 2, regions=3, topk=4, dtype=torch.float64)
    q, k, v = torch.randn(3, 2, 7, 10, 2, 4, dtype=torch.float64).unbind(0)  # regions of 3 x 4, the last ones cut
    pattern = mixer.route(q, k)
    region = torch.tensor([[row // 3 * 3 + column // 4 for column in range(10)] for row in range(7)]).flatten()
    listed = pattern.table4()[:, 0]
    seen = (listed[:, region].unsqueeze(2) == region[:, None]).any(-1)  # (batch, queries, keys)
    queries, keys, values = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
    logits = (queries @ keys.transpose(-1, -2) * mixer.scale).masked_fill(~seen[:, None], -torch.inf)
    expected = (logits.softmax(-1) @ values).transpose(1, 2).unflatten(1, (7, 10))
    torch.testing.assert_close(mixer.mix(q, q, k, v, []), expected, rtol=1e-12, atol=1e-12)
    other = Blocks(pattern.table[..., torch.tensor([2, 0, 3, 1])], pattern.block)
    torch.testing.assert_close(attend(q, k, v, other, scale=mixer.scale), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("regions", "topk"), [(3, 2), (4, 5), (6, 36)])
def test_attention_costs_what_the_paper_says(regions, topk):
    mixer = BiLevelRoutingAttention(8, 2, regions=regions, topk=topk)
    with count() as cost:
        mixer(torch.randn(1, 12, 12, 8))
    tokens = 12 * 12
    assert cost.flops / 2 == 2 * 8 * tokens**2 * topk / regions**2


@pytest.mark.parametrize(("regions", "topk"), [(4, 4), (8, 1)])
def test_memory_grows_with_the_tokens_and_not_with_their_square(regions, topk):
    def per_token(side, backend):
        mixer = BiLevelRoutingAttention(16, 2, regions=regions, topk=topk, backend=backend)
        taken = memory(mixer, torch.randn(1, side, side, 16))
        return torch.tensor([taken["inference_bytes"], taken["training_bytes"]]) / side**2

    small, large = per_token(24, "auto"), per_token(48, "auto")
    assert (large <= 1.02 * small).all()
    assert (per_token(32, "reference") > 3 * per_token(16, "reference")).all()  # all pairs, masked afterwards


# --------------------------------------------------------------------------------------------------------------------
# published facts


def test_every_published_name_is_here():
    assert sorted([*SIZES, "biformer_stl"]) == list_models("biformer_*")


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts_equal_the_closed_form_and_the_published(name):
    dim, depths = SIZES[name]
    half = dim // 2
    total = 27 * half + half + 2 * half + 9 * half * dim + dim + 2 * dim
    for stage, depth in enumerate(depths):
        width = dim * 2**stage
        position, norms, local, channels = 10 * width, 4 * width, 26 * width, 6 * width**2 + 4 * width
        projections = 4 * width**2 + (4 * width if stage < 3 else width)  # no bias of q, k, v in the last stage
        total += depth * (position + norms + projections + local + channels)
        total += 18 * width**2 + 2 * width + 4 * width if stage < 3 else 2 * width + 1000 * width + 1000
    assert count_parameters(create_model(name, device="meta")) == total == PUBLISHED[name] == model_card(name).params


def test_the_swin_like_layout_has_the_closed_form_and_the_published_number_of_parameters():
    total = 48 * 96 + 96 + 2 * 96
    for stage, depth in enumerate((2, 2, 6, 2)):
        width = 96 * 2**stage
        projections = 4 * width**2 + (4 * width if stage < 3 else width)
        total += depth * (4 * width + projections + 26 * width + 8 * width**2 + 5 * width)
        total += 2 * width + 8 * width**2 + 2 * width if stage < 3 else 2 * width + 1000 * width + 1000
    assert count_parameters(create_model("biformer_stl", device="meta")) == total == model_card("biformer_stl").params
    assert round(total / 1e6, 1) == 28.4


@pytest.mark.parametrize("name", [*SIZES, "biformer_stl"])
def test_multiply_adds_are_the_published_ones(name):
    assert multiply_adds(create_model(name), 224) == pytest.approx(model_card(name).gmacs, rel=0.02)


def test_official_names_are_those_of_the_release():
    _, weights = tiny("biformer_tiny", **NARROW)
    for name in (
        "downsample_layers.0.0.weight", "downsample_layers.0.4.running_mean", "downsample_layers.3.1.weight",
        "stages.0.0.pos_embed.weight", "stages.0.1.attn.qkv.qkv.weight", "stages.2.0.attn.wo.weight",
        "stages.2.0.attn.lepe.weight", "stages.3.0.attn.qkv.weight", "stages.3.0.attn.proj.bias", "stages.3.0.mlp.0.weight",
        "stages.3.0.mlp.3.weight", "norm.weight", "head.weight",
    ):  # fmt: skip
        assert name in weights
    assert "stages.3.0.attn.qkv.bias" not in weights
