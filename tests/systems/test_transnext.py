"""TransNeXt (28): aggregated attention equals loops over tokens and keys, the network its definition and counts."""

import math

import pytest
import torch
import torch.nn.functional as F
from naive_backbones import conv, layer_norm, linear, randomise, tiny

from regard import create_mixer, create_model, list_models, load_checkpoint
from regard import patterns as P
from regard.bench import count
from regard.layers.mixers import AggregatedAttention
from regard.layers.mlps import ConvGLU
from regard.layers.positions import PooledOffsetMLP
from regard.models import count_parameters, model_card
from regard.ops import Source, attend_weights
from regard.ops.calls.source import HeadTable

SIZES = {  # dim, depths, pooled stages, published parameters
    "transnext_micro": (48, (2, 2, 15, 2), 3, 12_809_304),
    "transnext_micro_aaaa": (48, (2, 2, 15, 2), 4, 13_114_008),
    "transnext_tiny": (72, (2, 2, 15, 2), 3, 28_258_960),
    "transnext_small": (72, (5, 5, 22, 5), 3, 49_741_564),
    "transnext_small_384": (72, (5, 5, 22, 5), 3, 49_741_564),
    "transnext_base": (96, (5, 5, 23, 5), 3, 89_721_496),
    "transnext_base_384": (96, (5, 5, 23, 5), 3, 89_721_496),
}
NARROW = {"dim": 8, "head_dim": 4, "depths": (1, 1, 2, 1), "mlp_ratios": (4, 3, 2, 2)}


# --------------------------------------------------------------------------------------------------------------------
# the definition


def unit(x):
    return x / x.pow(2).sum(-1, keepdim=True).sqrt()


def middles(length, pools):
    """Where adaptive pooling puts its averages."""
    bins = [range(i * length // pools, -(-(i + 1) * length // pools)) for i in range(pools)]
    return [sum(each) / len(each) for each in bins], bins


def spaced(offset, trained):
    scaled = offset / (trained - 1) * 8
    return math.copysign(math.log2(abs(scaled) + 1) / math.log2(8), scaled)


def cpb(offset, trained, weights, name):
    coordinates = torch.tensor([spaced(o, t) for o, t in zip(offset, trained, strict=True)], dtype=torch.float64)
    return linear(torch.relu(linear(coordinates, weights, f"{name}.cpb_fc1")), weights, f"{name}.cpb_fc2")  # of all heads


def split(x, weights, name, heads):
    return linear(x, weights, name).unflatten(-1, (heads, -1))


def scaled_query(q, weights, name, head, keys):
    temperature = F.softplus(weights[f"{name}.temperature"][head, 0, 0])
    return (q + weights[f"{name}.query_embedding"][head, 0]) * temperature * math.log(keys)


def naive_aggregated(x, weights, name, heads, ratio, trained):
    """One image: each token and head makes its own list of keys."""
    rows, columns = x.shape[:2]
    q = unit(split(x, weights, f"{name}.q", heads))
    k, v = linear(x, weights, f"{name}.kv").chunk(2, -1)
    k, v = unit(k.unflatten(-1, (heads, -1))), v.unflatten(-1, (heads, -1))
    (row_at, row_bins), (column_at, column_bins) = (middles(n, max(1, n // ratio)) for n in (rows, columns))
    kernel = weights[f"{name}.sr.weight"][..., 0, 0]
    activated = F.gelu(x @ kernel.T + weights[f"{name}.sr.bias"])
    far = {}
    for row, row_bin in zip(row_at, row_bins, strict=True):
        for column, column_bin in zip(column_at, column_bins, strict=True):
            mean = activated[list(row_bin)][:, list(column_bin)].mean((0, 1))
            key, value = linear(layer_norm(mean, weights, f"{name}.norm"), weights, f"{name}.kv").chunk(2, -1)
            far[row, column] = unit(key.unflatten(-1, (heads, -1))), value.unflatten(-1, (heads, -1))
    biases = {}
    out = torch.zeros_like(q)
    for row in range(rows):
        for column in range(columns):
            near = [
                (3 * i + j, row + i - 1, column + j - 1)
                for i in range(3)
                for j in range(3)
                if 0 <= row + i - 1 < rows and 0 <= column + j - 1 < columns
            ]
            for at in far:
                offset = (row - at[0], column - at[1])
                if offset not in biases:
                    biases[offset] = cpb(offset, trained, weights, name)
            for head in range(heads):
                query = scaled_query(q[row, column, head], weights, name, head, len(near) + len(far))
                slots = weights[f"{name}.relative_pos_bias_local"][head]
                logits = [query @ k[y, z, head] + slots[slot] for slot, y, z in near]
                logits += [query @ key[head] + biases[row - at[0], column - at[1]][head] for at, (key, _) in far.items()]
                share = torch.stack(logits).softmax(0)
                local = q[row, column, head] @ weights[f"{name}.learnable_tokens"][head]
                local = local + weights[f"{name}.learnable_bias"][head, 0]
                for weight, (slot, y, z) in zip(share, near, strict=False):
                    out[row, column, head] += (weight + local[slot]) * v[y, z, head]
                for weight, (_, value) in zip(share[len(near) :], far.values(), strict=True):
                    out[row, column, head] += weight * value[head]
    return linear(out.flatten(-2), weights, f"{name}.proj")


def naive_dense(x, weights, name, heads, trained):
    rows, columns = x.shape[:2]
    tokens = [(row, column) for row in range(rows) for column in range(columns)]
    q, k, v = (part.unflatten(-1, (heads, -1)) for part in linear(x.flatten(0, 1), weights, f"{name}.qkv").chunk(3, -1))
    q, k = unit(q), unit(k)
    bias = torch.stack([torch.stack([cpb((a[0] - b[0], a[1] - b[1]), trained, weights, name) for b in tokens]) for a in tokens])
    out = []
    for head in range(heads):
        query = torch.stack([scaled_query(each, weights, name, head, len(tokens)) for each in q[:, head]])
        out.append((query @ k[:, head].T + bias[..., head]).softmax(-1) @ v[:, head])
    return linear(torch.cat(out, -1), weights, f"{name}.proj").unflatten(0, (rows, columns))


def naive_transnext(image, weights, depths, ratios, pretrained):
    x = image.permute(0, 2, 3, 1)
    for stage, (depth, ratio) in enumerate(zip(depths, ratios, strict=True)):
        embed, trained = f"patch_embed{stage + 1}", (pretrained // 2 ** (stage + 2),) * 2
        x = layer_norm(conv(x, weights, f"{embed}.proj", stride=2 if stage else 4), weights, f"{embed}.norm")
        heads = x.shape[-1] // 4
        for block in range(depth):
            name = f"block{stage + 1}.{block}"
            mixed = []
            for each in layer_norm(x, weights, f"{name}.norm1", 1e-6):
                if ratio == 1:
                    mixed.append(naive_dense(each, weights, f"{name}.attn", heads, trained))
                else:
                    mixed.append(naive_aggregated(each, weights, f"{name}.attn", heads, ratio, trained))
            x = x + torch.stack(mixed)
            gate, value = linear(layer_norm(x, weights, f"{name}.norm2", 1e-6), weights, f"{name}.mlp.fc1").chunk(2, -1)
            gate = F.gelu(conv(gate, weights, f"{name}.mlp.dwconv.dwconv", groups=gate.shape[-1]))
            x = x + linear(gate * value, weights, f"{name}.mlp.fc2")
        x = layer_norm(x, weights, f"norm{stage + 1}", 1e-6)
    return linear(x.mean((1, 2)), weights, "head")


@pytest.mark.parametrize(("size", "options"), [((64, 64), {}), ((45, 70), {"ratios": (5, 3, 2, 1), "pretrain_size": 96})])
def test_equals_the_definition_token_by_token(size, options):
    model, weights = tiny("transnext_micro", **NARROW, **options)
    image = torch.randn(1, 3, *size, dtype=torch.float64)
    ratios, pretrained = options.get("ratios", (8, 4, 2, 1)), options.get("pretrain_size", 224)
    expected = naive_transnext(image, weights, NARROW["depths"], ratios, pretrained)
    torch.testing.assert_close(model(image), expected, rtol=1e-10, atol=1e-10)


# --------------------------------------------------------------------------------------------------------------------
# aggregated attention


def aggregated(**options):
    return randomise(create_mixer("aggregated", dim=16, heads=4, ratio=2, dtype=torch.float64, **options))


def official(mixer):
    names = {
        "length_scale.": "", "local_bias": "relative_pos_bias_local", "positional_bias": "learnable_bias",
        "positional": "learnable_tokens", "cpb.fc": "cpb_fc", "pool.before.0.": "sr.", "pool.after.": "norm.",
    }  # fmt: skip
    found = {}
    for key, value in mixer.state_dict().items():
        old = next((old for old in names if key.startswith(old)), None)
        name = key if old is None else names[old] + key.removeprefix(old)
        found[f"a.{name}"] = value[..., None, None] if name == "sr.weight" else value
    return found


@pytest.mark.parametrize("grid", [(5, 6), (7, 4), (1, 3)])
def test_mixer_equals_loops_over_tokens_and_keys(grid):
    mixer = aggregated(trained_grid=(6, 9))
    x = torch.randn(2, *grid, 16, dtype=torch.float64)
    expected = torch.stack([naive_aggregated(each, official(mixer), "a", 4, 2, (6, 9)) for each in x])
    torch.testing.assert_close(mixer(x), expected, rtol=1e-11, atol=1e-11)


def test_a_corner_shares_its_softmax_among_four_neighbours_and_the_pooled_map():
    mixer = aggregated()
    x = torch.randn(1, 6, 8, 16, dtype=torch.float64)
    q, k, v = mixer.project(x, x)
    pooled_k, pooled_v = mixer.project_keys(mixer.pool(x))
    sources = [Source(k, v, mixer.pattern, bias=mixer.slots()), Source(pooled_k, pooled_v)]
    local, far = attend_weights(
        mixer.length_scale(q, mixer.neighbours((6, 8), x.device) + 12), sources, rows=[0, 8, 9], scale=1.0
    )
    assert (local > 0).sum((-1, -2)).tolist() == [[[4, 6, 9]] * 4]
    assert (far > 0).all()
    torch.testing.assert_close(local.sum((-1, -2)) + far.sum((-1, -2)), torch.ones(1, 4, 3, dtype=torch.float64))


def test_lengths_are_the_keys_that_exist():
    mixer = aggregated()
    assert mixer.neighbours((4, 5), torch.device("cpu")).tolist() == P.Neighborhood(3, border="mask").degree((4, 5)).tolist()
    q = torch.nn.functional.normalize(torch.randn(1, 4, 5, 4, 4, dtype=torch.float64), dim=-1)
    scaled = mixer.length_scale(q, mixer.neighbours((4, 5), torch.device("cpu")) + 4)
    embedding, temperature = mixer.length_scale.query_embedding[:, 0], F.softplus(mixer.length_scale.temperature[:, 0])
    for place, keys in (((0, 0), 8), ((0, 2), 10), ((2, 2), 13)):
        torch.testing.assert_close(
            scaled[0][place], (q[0][place] + embedding) * temperature * math.log(keys), rtol=1e-12, atol=0
        )


def test_the_temperature_starts_where_softplus_is_1_over_0_24():
    scale = create_mixer("aggregated", dim=16, heads=4).length_scale
    torch.testing.assert_close(F.softplus(scale.temperature), torch.full((4, 1, 1), 1 / 0.24))


def test_without_local_term_and_pooled_keys_it_is_cosine_neighborhood_attention():
    mixer = aggregated()
    with torch.no_grad():
        mixer.positional.zero_()
        mixer.positional_bias.zero_()
        mixer.cpb.fc2.weight.zero_()
        mixer.cpb.fc2.bias.fill_(-1e9)
    x = torch.randn(1, 6, 5, 16, dtype=torch.float64)
    q, k, v = mixer.project(x, x)
    q = mixer.length_scale(q, mixer.neighbours((6, 5), x.device) + 6)
    table = torch.zeros(4, 5, 5, dtype=torch.float64)
    table[:, 1:4, 1:4] = mixer.local_bias.reshape(4, 3, 3)
    pattern = P.Neighborhood(3, border="mask")
    mask, bias = pattern.mask((6, 5), (6, 5)), torch.full((4, 30, 30), -torch.inf, dtype=torch.float64)
    for a in range(30):
        for b in range(30):
            if mask[a, b]:
                bias[:, a, b] = table[:, b // 5 - a // 5 + 2, b % 5 - a % 5 + 2]
    logits = torch.einsum("qhd,khd->hqk", q[0].flatten(0, 1), k[0].flatten(0, 1)) + bias
    y = torch.einsum("hqk,khd->qhd", logits.softmax(-1), v[0].flatten(0, 1)).flatten(1)
    torch.testing.assert_close(mixer(x)[0].flatten(0, 1), mixer.proj(y), rtol=1e-11, atol=1e-11)
    assert isinstance(mixer.slots(), HeadTable)


def test_the_local_term_is_not_shared_out():
    mixer = aggregated()
    x = torch.randn(1, 5, 5, 16, dtype=torch.float64)
    with torch.no_grad():
        plain = mixer(x)
        mixer.positional_bias += 5  # far more than a weight of a softmax could be
        moved = mixer(x)
    v = mixer.project(x, x)[2].flatten(-2)
    around = F.avg_pool2d(v.movedim(-1, 1), 3, 1, 1).movedim(1, -1) * 9  # sums with zeros outside
    torch.testing.assert_close(moved - plain, F.linear(5 * around, mixer.proj.weight), rtol=1e-10, atol=1e-10)


def test_extra_tokens_are_one_more_key_of_every_softmax_and_see_every_token():
    mixer = aggregated()
    with torch.no_grad():
        mixer.cpb.fc1.weight.zero_()
    x, extra = torch.randn(1, 4, 4, 16, dtype=torch.float64), torch.randn(1, 2, 16, dtype=torch.float64)
    y, y_extra = mixer(x, extra)
    _, k, v = mixer.project(x, x)
    extra_q, extra_k, extra_v = mixer.project(extra, extra)
    keys, values = torch.cat([k.flatten(1, 2), extra_k], 1)[0], torch.cat([v.flatten(1, 2), extra_v], 1)[0]
    logits = torch.einsum("qhd,khd->hqk", mixer.length_scale(extra_q, 18)[0], keys)
    expected = torch.einsum("hqk,khd->qhd", logits.softmax(-1), values).flatten(1)
    torch.testing.assert_close(y_extra[0], mixer.proj(expected), rtol=1e-11, atol=1e-11)
    moved, _ = mixer(x, extra + 1)
    assert ((moved - y).abs().amax(-1) > 1e-6).all()
    q, _, _ = mixer.project(x, x)
    pooled_k, pooled_v = (t[0].flatten(0, 1) for t in mixer.project_keys(mixer.pool(x)))
    bias = mixer.cpb((4, 4), mixer.pool(x).shape[1:3], None).unflatten(1, (4, 4))
    for row, column in ((0, 0), (1, 2), (3, 1)):
        unit, logits, values, local = q[0, row, column], [], [], 0.0
        near = [
            (i, j) for i in range(row - 1, row + 2) for j in range(column - 1, column + 2) if 0 <= min(i, j) <= max(i, j) < 4
        ]
        scale = F.softplus(mixer.length_scale.temperature[:, 0]) * math.log(len(near) + len(pooled_k) + 2)  # of all keys
        sharp = (unit + mixer.length_scale.query_embedding[:, 0]) * scale
        for i, j in near:
            slot = (i - row + 1) * 3 + j - column + 1
            logits.append((sharp * k[0, i, j]).sum(-1) + mixer.local_bias[:, slot])
            values.append(v[0, i, j])
            weight = (unit * mixer.positional[:, :, slot]).sum(-1) + mixer.positional_bias[:, 0, slot]
            local = local + weight[:, None] * v[0, i, j]
        for at in range(len(pooled_k)):
            logits.append((sharp * pooled_k[at]).sum(-1) + bias[:, row, column, at])
            values.append(pooled_v[at])
        for at in range(2):
            logits.append((sharp * extra_k[0, at]).sum(-1))
            values.append(extra_v[0, at])
        weights = torch.stack(logits).softmax(0)
        expected = torch.einsum("nh,nhd->hd", weights, torch.stack(values)) + local
        torch.testing.assert_close(y[0, row, column], mixer.proj(expected.flatten()), rtol=1e-11, atol=1e-11)


# --------------------------------------------------------------------------------------------------------------------
# positions and gates


@pytest.mark.parametrize(("q_grid", "k_grid"), [((6, 4), (3, 2)), ((7, 5), (3, 1)), ((5, 6), (5, 6)), ((1, 9), (1, 4))])
def test_the_pooled_bias_is_the_mlp_of_every_pair(q_grid, k_grid):
    bias = randomise(PooledOffsetMLP(3, 8, dtype=torch.float64))
    got = bias(q_grid, k_grid, (14, 20)).unflatten(2, k_grid).unflatten(1, q_grid)
    weights = {f"a.cpb_{name}": value for name, value in bias.state_dict().items()}
    rows, columns = middles(q_grid[0], k_grid[0])[0], middles(q_grid[1], k_grid[1])[0]
    for row in range(q_grid[0]):
        for column in range(q_grid[1]):
            for i, j in ((i, j) for i in range(k_grid[0]) for j in range(k_grid[1])):
                expected = cpb((row - rows[i], column - columns[j]), (14, 20), weights, "a")
                torch.testing.assert_close(got[:, row, column, i, j], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_gate_is_convolved_and_the_value_is_not(rank):
    glu = randomise(ConvGLU(4, 6, rank=rank, dtype=torch.float64))
    x = torch.randn(1, *(5, 4, 3)[:rank], 4, dtype=torch.float64, requires_grad=True)
    middle = (0, *(2, 2, 1)[:rank])
    gate, value = (glu.fc1(x)[middle] @ torch.eye(12, dtype=torch.float64)).chunk(2)
    convolved = glu.conv(glu.fc1(x)[..., :6].movedim(-1, 1)).movedim(1, -1)[middle]
    torch.testing.assert_close(glu(x)[middle], glu.fc2(F.gelu(convolved) * value), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(gate, convolved)


# --------------------------------------------------------------------------------------------------------------------
# published facts


def test_every_published_name_is_here():
    assert sorted(SIZES) == list_models("transnext_*")


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts_equal_the_closed_form_and_the_published(name):
    dim, depths, pooled, published = SIZES[name]
    total = 147 * dim + dim + 2 * dim
    for stage, depth in enumerate(depths):
        width = dim * 2**stage
        heads, hidden = width // 24, 2 * (8, 8, 4, 4)[stage] * width // 3
        attention = 4 * width**2 + 4 * width + heads + width + 2 * 512 + 512 + 513 * heads
        if stage < pooled:
            attention += width**2 + width + 2 * width + 9 * heads + 9 * width + 9 * heads
        gated = 2 * hidden * (width + 1) + 10 * hidden + (hidden + 1) * width
        total += depth * (attention + gated + 4 * width) + 2 * width
        total += 18 * width**2 + 2 * width + 4 * width if stage < 3 else 1000 * width + 1000
    assert count_parameters(create_model(name, device="meta")) == total == published == model_card(name).params


@pytest.mark.parametrize("name", SIZES)
def test_multiply_adds_are_the_published_ones(name):
    card, depths = model_card(name), SIZES[name][1]
    model = create_model(name, device="meta", depths=(1, 1, 1, 1)).eval()  # the blocks of a stage cost the same

    def times(path):
        parts = path.split(".")
        return depths[int(parts[1])] if parts[:1] == ["stages"] and "blocks" in parts else 1

    total = 0

    def add(each, repeats):
        def hook(module, inputs, output):
            nonlocal total
            total += output.numel() * each * repeats

        return hook

    for path, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            module.register_forward_hook(add(module.weight[0].numel(), times(path)))
        if isinstance(module, AggregatedAttention):  # the local term: 9 products of a query, and 9 values, per channel
            module.register_forward_hook(add(18, times(path)))
    with count() as cost:
        model(torch.empty(1, 3, card.input_size, card.input_size, device="meta"))
    total += sum(layer.flops // 2 * times(path) for path, layer in cost.layers.items())
    assert total / 1e9 == pytest.approx(card.gmacs, rel=0.02)


def test_what_the_release_keeps_from_weight_decay_is_kept():
    model = create_model("transnext_micro", device="meta")
    kept = {name.split("mixer.op.")[1] for name in model.no_weight_decay()}
    assert kept == {
        "length_scale.query_embedding", "length_scale.temperature", "local_bias",
        "cpb.fc1.weight", "cpb.fc1.bias", "cpb.fc2.weight", "cpb.fc2.bias",
    }  # fmt: skip
    assert sum("temperature" in name for name in model.no_weight_decay()) == 21


def test_official_names_are_those_of_the_release_and_load_with_its_buffers():
    _, weights = tiny("transnext_micro", **NARROW)
    for name in (
        "patch_embed1.proj.weight", "patch_embed4.norm.bias", "block1.0.norm1.weight", "block1.0.attn.q.weight",
        "block1.0.attn.kv.bias", "block2.0.attn.query_embedding", "block3.1.attn.temperature", "block1.0.attn.learnable_bias",
        "block1.0.attn.relative_pos_bias_local", "block1.0.attn.learnable_tokens", "block1.0.attn.norm.weight",
        "block1.0.attn.cpb_fc1.weight", "block4.0.attn.cpb_fc2.bias", "block4.0.attn.qkv.weight", "block4.0.attn.proj.bias",
        "block1.0.mlp.dwconv.dwconv.weight", "block1.0.mlp.fc1.weight", "norm1.weight", "norm4.bias", "head.weight",
    ):  # fmt: skip
        assert name in weights
    assert weights["block1.0.attn.sr.weight"].shape == (8, 8, 1, 1)
    assert weights["block1.0.attn.relative_pos_bias_local"].shape == (2, 9)
    whole = dict(weights) | {"relative_pos_index1": torch.zeros(3), "block1.0.attn.padding_mask": torch.zeros(3, 9)}
    model = create_model("transnext_micro", num_classes=5, dtype=torch.float64, **NARROW)
    assert load_checkpoint(model, {"model": whole}) == "official"
