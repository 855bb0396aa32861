"""Every mixer against its formula written as loops, and what all mixers have in common."""

import math

import pytest
import torch
from naive_mixers import (
    attention,
    depthwise,
    offset_bias,
    positions,
    project_out,
    region_means,
    split_heads,
)
from peers import timm

import regard
from regard import create_mixer, list_mixers
from regard import patterns as P
from regard.layers.mixers import AttentionMixer
from regard.ops.tokens import route
from regard.ops.tokens.rope import rope

MIXERS = [
    ("aggregated", {"ratio": 2}),
    ("axial", {}),
    ("bi_level_routing", {"regions": 3, "topk": 2}),
    ("bi_level_routing", {"regions": 3, "topk": 2, "pad": "token"}),
    ("channel_group", {}),
    ("criss_cross", {}),
    ("gated_positional", {}),
    ("grid", {"grid_size": 3}),
    ("halo", {"block_size": 3, "halo_size": 1}),
    ("hilo", {"window_size": 3}),
    ("hilo", {"window_size": 3, "pad": "token"}),
    ("identity", {}),
    ("locally_enhanced", {}),
    ("mixture_of_heads", {"shared": 2, "routed": 0}),
    ("mixture_of_heads", {"shared": 0, "routed": 2}),
    ("msa_conv", {"kernel_size": 3, "shift": 1}),
    ("multi_head", {}),
    ("neighborhood", {"kernel_size": 3, "dilation": 2}),
    ("neighborhood", {"kernel_size": 5, "pad": "token"}),
    ("outlook", {}),
    ("reversed", {}),
    ("sparsifiner", {"keep_rate": 0.4}),
    ("strip", {"ratio": 2}),
    ("strip", {"ratio": 3, "strip": 2, "pool": "mean"}),
    ("window", {"window_size": 3, "shift": 1}),
    ("window", {"window_size": 3, "shift": 1, "pad": "token"}),
]
CONTINUOUS = {"topk": -1, "keep_rate": 1.0}  # routing is not
GRIDS = [(6, 6), (7, 5), (1, 4), (2, 3), (1, 1)]


def ids(value):
    return ",".join(f"{k}={v}" for k, v in value.items()) or "defaults" if isinstance(value, dict) else None


def learning(mixer):
    """The parameters that learn from the output: the predictor of a sparsifiner has a loss of its own."""
    return [parameter for name, parameter in mixer.named_parameters() if not name.startswith("predictor.")]


def random_mixer(name: str, dim: int = 16, heads: int = 2, **arguments):
    """A mixer in float64 whose every parameter is random, biases, tables and gates included."""
    torch.manual_seed(0)
    mixer = create_mixer(name, dim=dim, heads=heads, **arguments).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return mixer


def assert_same(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-11)


# the formulas ---------------------------------------------------------------------------------------------------------


def plain(mixer, x, sees, bias=None, zero_keys=None):
    q, k, v = split_heads(mixer, x)
    return project_out(mixer, attention(q, k, v, mixer.head_dim**-0.5, sees, bias, zero_keys))


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_multi_head_with_bias_equals_formula(kv_heads):
    mixer = random_mixer("multi_head", grid=(4, 5), kv_heads=kv_heads)
    x = torch.randn(2, 3, 5, 16, dtype=torch.float64)  # smaller than the table's grid: the middle of the table is read
    expected = [plain(mixer, image, lambda q, k: True, offset_bias(mixer)) for image in x]
    assert_same(mixer(x), torch.stack(expected))


@pytest.mark.parametrize("grid", [(6, 6), (7, 4), (2, 5)])
@pytest.mark.parametrize("shift", [0, 2])
def test_window_equals_formula(grid, shift):
    mixer = random_mixer("window", window_size=4, shift=shift)
    x = torch.randn(2, *grid, 16, dtype=torch.float64)

    def window(n, length):
        return 0 if length <= 4 else (n - shift) // 4

    def sees(q, k):
        return all(window(a, n) == window(b, n) for a, b, n in zip(q, k, grid, strict=True))

    assert_same(mixer(x), torch.stack([plain(mixer, image, sees, offset_bias(mixer)) for image in x]))


@pytest.mark.parametrize(("grid", "kernel", "dilation"), [((7, 6), 3, 1), ((9, 7), 3, 2), ((6, 8), 4, 1), ((2, 7), 3, 1)])
def test_neighborhood_equals_formula(grid, kernel, dilation):
    mixer = random_mixer("neighborhood", kernel_size=kernel, dilation=dilation)
    x = torch.randn(1, *grid, 16, dtype=torch.float64)

    def line(q, length):
        """The keys of a query on one axis: the nearest of its dilation group, moved inward at the ends."""
        group = list(range(q % dilation, length, dilation))
        start = min(max(q // dilation - kernel // 2, 0), max(len(group) - kernel, 0))
        return group[start : start + kernel]

    def sees(q, k):
        return all(b in line(a, n) for a, b, n in zip(q, k, grid, strict=True))

    bias = offset_bias(mixer, lambda q, k, axis: (k - q) // dilation)
    assert_same(mixer(x), torch.stack([plain(mixer, image, sees, bias) for image in x]))


def test_padded_neighborhood_attends_to_projected_zero_tokens():
    mixer = random_mixer("neighborhood", kernel_size=3, dilation=2, pad="token")
    whole = random_mixer("neighborhood", kernel_size=3, dilation=2)
    whole.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 4, 7, 16, dtype=torch.float64)
    padded = torch.cat([x, x.new_zeros(2, 2, 7, 16)], 1)  # up to kernel * dilation, on the short axis only
    assert_same(mixer(x), whole(padded)[:, :4])
    assert (mixer(x) - whole(x)).abs().max() > 1e-3


@pytest.mark.parametrize("border", ["zero", "mask", "shift"])
@pytest.mark.parametrize(("grid", "block", "halo"), [((5, 6), 3, 2), ((7, 3), 2, 1), ((4, 4), 2, 3)])
@pytest.mark.parametrize("stride", [1, 2])
def test_halo_equals_formula(border, grid, block, halo, stride):
    if block % stride:
        block += 1
    mixer = random_mixer("halo", block_size=block, halo_size=halo, border=border, stride=stride)
    x = torch.randn(1, *grid, 16, dtype=torch.float64)

    def reach(at, length):
        start = at // block * block - halo
        if border == "shift":
            start = min(max(start, 0), max(length - block - 2 * halo, 0))
        return range(start, start + block + 2 * halo)

    def sees(q, k):
        return all(b in reach(a, n) for a, b, n in zip(q, k, grid, strict=True))

    def outside(q):
        hung = [(y, c) for y in reach(q[0], grid[0]) for c in reach(q[1], grid[1])]
        return [at for at in hung if not all(0 <= i < n for i, n in zip(at, grid, strict=True))]

    q, k, v = split_heads(mixer, x[0])

    def relative(head, at, key):
        """The query times the embedding of the offset on each axis, not scaled; zero keys have it too."""
        total = 0
        for axis, table in enumerate(mixer.embedding.tables):
            first = at[axis] // block * block
            index = (at[axis] - first) // stride  # of the query, among those of its block
            total = total + q[at][head] @ table[key[axis] - first - index + len(table) // 2]
        return total

    zero_keys = outside if border == "zero" else None
    seen = attention(q, k, v, mixer.head_dim**-0.5, sees, relative, zero_keys)
    assert_same(mixer(x)[0], project_out(mixer, seen)[::stride, ::stride])
    extra = torch.randn(3, 16, dtype=torch.float64)  # has no place, so no relative term
    seen = attention(q, k, v, mixer.head_dim**-0.5, sees, relative, zero_keys, split_heads(mixer, extra)[1:])
    assert_same(mixer(x, extra[None])[0][0], project_out(mixer, seen)[::stride, ::stride])


@pytest.mark.parametrize("grid", [(6, 6), (8, 4), (7, 9), (2, 5)])
def test_grid_equals_formula(grid):
    mixer = random_mixer("grid", grid_size=3)
    x = torch.randn(1, *grid, 16, dtype=torch.float64)
    step = [math.ceil(n / 3) for n in grid]

    def sees(q, k):
        return all(a % s == b % s for a, b, s in zip(q, k, step, strict=True))

    bias = offset_bias(mixer, lambda q, k, axis: (k - q) // step[axis])
    assert_same(mixer(x)[0], plain(mixer, x[0], sees, bias))


@pytest.mark.parametrize("axes", [None, (0,), (1,)])
def test_axial_sums_one_softmax_per_axis(axes):
    mixer = random_mixer("axial", axes=axes)
    x = torch.randn(4, 5, 16, dtype=torch.float64)
    q, k, v = split_heads(mixer, x)
    gathered = [
        attention(q, k, v, mixer.head_dim**-0.5, lambda q, k, a=a: all(q[b] == k[b] for b in range(2) if b != a))
        for a in (axes or (0, 1))
    ]
    assert_same(mixer(x[None])[0], project_out(mixer, sum(gathered)))


@pytest.mark.parametrize("recurrence", [1, 2])
@pytest.mark.parametrize("heads", [1, 2])
def test_criss_cross_equals_formula(recurrence, heads):
    mixer = random_mixer("criss_cross", dim=32, heads=heads, recurrence=recurrence)
    x = torch.randn(4, 3, 32, dtype=torch.float64)
    expected = x
    for _ in range(recurrence):  # one softmax over row and column, the centre once, no scale
        q, k, v = split_heads(mixer, expected)
        seen = attention(q, k, v, 1.0, lambda q, k: q[0] == k[0] or q[1] == k[1])
        expected = expected + mixer.gamma * seen
    assert q.shape[-1] * heads == 32 // 8
    assert_same(mixer(x[None])[0], expected)


@pytest.mark.parametrize("count", [0, 2])
def test_channel_group_equals_formula(count):
    mixer = random_mixer("channel_group")
    x, extra = torch.randn(2, 3, 4, 16, dtype=torch.float64), torch.randn(2, count, 16, dtype=torch.float64)
    y, y_extra = mixer(x, extra)
    for image in range(2):
        tokens = torch.cat([x[image].reshape(12, 16), extra[image]])
        q, k, v = (tokens @ mixer.qkv.weight.T + mixer.qkv.bias).reshape(12 + count, 3, 2, 8).unbind(1)
        mixed = torch.zeros(12 + count, 2, 8, dtype=torch.float64)
        for head in range(2):
            for i in range(8):  # channel i of the keys asks the channels of the values and takes from those of the queries
                weights = torch.stack([(k[:, head, i] * v[:, head, j]).sum() / math.sqrt(8) for j in range(8)]).softmax(0)
                for j in range(8):
                    mixed[:, head, i] += weights[j] * q[:, head, j]
        expected = mixed.flatten(1) @ mixer.proj.weight.T + mixer.proj.bias
        assert_same(y[image].reshape(12, 16), expected[:12])
        assert_same(y_extra[image], expected[12:])


def test_locally_enhanced_convolves_the_input_not_the_values():
    mixer = random_mixer("locally_enhanced")
    assert mixer.qkv.bias is None
    x = torch.randn(4, 5, 16, dtype=torch.float64)
    seen = attention(*split_heads(mixer, x), mixer.head_dim**-0.5, lambda q, k: True)
    assert_same(mixer(x[None])[0], project_out(mixer, seen + depthwise(x, mixer.lepe.conv)))


@pytest.mark.parametrize(("grid", "regions", "topk"), [((6, 6), 3, 2), ((7, 5), 3, 2), ((4, 9), 2, 3), ((1, 5), 3, 1)])
def test_bi_level_routing_equals_formula(grid, regions, topk):
    mixer = random_mixer("bi_level_routing", regions=regions, topk=topk)
    x = torch.randn(*grid, 16, dtype=torch.float64)
    q, k, v = split_heads(mixer, x)
    scale = 16**-0.5  # of the whole query width, not of a head
    query_regions, region = region_means(q.flatten(-2), regions)
    key_regions, _ = region_means(k.flatten(-2), regions)
    routed = []
    for mean in query_regions:
        ranking = sorted(range(len(key_regions)), key=lambda r: -(scale * (mean @ key_regions[r])).item())
        routed.append(set(ranking[:topk]))
    seen = attention(q, k, v, scale, lambda a, b: region(b) in routed[region(a)])
    assert_same(mixer(x[None])[0], project_out(mixer, seen + depthwise(v.flatten(-2), mixer.lepe.conv)))


# what the papers say of them ------------------------------------------------------------------------------------------


def test_routing_to_all_regions_equals_full_attention():
    routed, full = (random_mixer("bi_level_routing", regions=3, topk=topk) for topk in (9, -1))
    full.load_state_dict(routed.state_dict())
    x = torch.randn(2, 7, 8, 16, dtype=torch.float64)
    assert_same(routed(x), full(x))


@pytest.mark.parametrize("pad", ["mask", "token"])
def test_gathered_regions_equal_dense_attention_under_their_mask(pad):
    mixer = random_mixer("bi_level_routing", regions=4, topk=3, pad=pad)
    x = torch.randn(2, 10, 7, 16, dtype=torch.float64)
    fast = mixer(x)
    mixer.backend = "reference"
    assert_same(fast, mixer(x))
    mixer.backend = "tiled"
    assert_same(fast, mixer(x))


def test_padded_routing_projects_and_routes_zero_tokens():
    mixer = random_mixer("bi_level_routing", regions=3, topk=2, pad="token")
    whole = random_mixer("bi_level_routing", regions=3, topk=2)
    whole.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 5, 7, 16, dtype=torch.float64)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 2, 0, 1))
    assert_same(mixer(x), whole(padded)[:, :5, :7])
    assert (mixer(x) - whole(x)).abs().max() > 1e-3


def test_routing_carries_no_gradient_and_keys_outside_the_routed_regions_get_none():
    mixer = random_mixer("bi_level_routing", regions=2, topk=1)
    q, k, v = (torch.randn(1, 6, 6, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    pattern = mixer.route(q, k)
    assert not pattern.table.requires_grad
    regard.attend(q, k, v, pattern).square().sum().backward()
    reached = k.grad.abs().sum((0, 3, 4)) > 0
    listed = set(pattern.table.flatten().tolist())
    for at in positions((6, 6)):
        assert bool(reached[at]) == ((at[0] // 3 * 2 + at[1] // 3) in listed)
    assert len(listed) < 4


def test_moving_a_regions_keys_towards_a_query_region_gets_it_routed():
    mixer = random_mixer("bi_level_routing", regions=2, topk=1)
    q, k = (torch.randn(1, 6, 6, 2, 8, dtype=torch.float64) for _ in range(2))
    chosen = int(mixer.route(q, k).table[0, 0, 0])
    other = (chosen + 1) % 4
    row, column = other // 2 * 3, other % 2 * 3
    k[:, row : row + 3, column : column + 3] += 100 * q[:, :3, :3].mean((1, 2), keepdim=True)
    assert int(mixer.route(q, k).table[0, 0, 0]) == other


def test_region_order_in_the_table_does_not_matter():
    q, k, v = (torch.randn(1, 6, 6, 2, 8, dtype=torch.float64) for _ in range(3))
    table = route.top_k(torch.randn(1, 9, 9, dtype=torch.float64), 4, (2, 2)).table
    flipped = P.Blocks(table.flip(-1), (2, 2))
    assert_same(regard.attend(q, k, v, P.Blocks(table, (2, 2))), regard.attend(q, k, v, flipped))


def test_criss_cross_parameters_are_those_of_the_paper():
    mixer = create_mixer("criss_cross", dim=512, heads=1)
    assert sum(p.numel() for p in mixer.parameters()) == 328_321
    assert set(mixer.state_dict()) == {"gamma", "qkv.weight", "qkv.bias"}


def test_criss_cross_starts_as_the_identity():
    x = torch.randn(1, 4, 5, 16)
    assert torch.equal(create_mixer("criss_cross", dim=16, heads=1)(x), x)


def naive_reversed(mixer, tokens, senders, messages=None):
    """What a sequence of tokens gets from a sequence of senders: each sends to all, by the heads it chooses."""
    q, _, v = split_heads(mixer, senders)
    _, k, _ = split_heads(mixer, tokens)
    group = mixer.heads // mixer.kv_heads
    received = torch.zeros(len(tokens), mixer.heads, mixer.value_dim, dtype=torch.float64)
    for s, token in enumerate(senders):
        share = torch.softmax(mixer.selector.weight @ token / mixer.temperature, 0)
        hidden = torch.nn.functional.gelu(mixer.controller.fc1.weight @ token)
        message = 1 / (1 + torch.exp(-(mixer.controller.fc2.weight @ hidden)))
        message = message if messages is None else message * messages[s]
        for head in range(mixer.heads):
            logits = torch.stack([q[s, head] @ key[head // group] for key in k]) * mixer.head_dim**-0.5
            for r, weight in enumerate(torch.softmax(logits, 0)):
                received[r, head] += weight * share[head] * message * v[s, head // group]
    return project_out(mixer, received.flatten(1))


@pytest.mark.parametrize("arguments", [{}, {"kv_heads": 1, "temperature": 2.0}, {"qkv_bias": False, "hidden": 5}], ids=ids)
def test_reversed_equals_formula_with_extra_tokens_and_context(arguments):
    mixer = random_mixer("reversed", **arguments)
    x, extra, context = (torch.randn(*shape, 16, dtype=torch.float64) for shape in ((2, 3), (2,), (5,)))
    flat = x.flatten(0, 1)
    assert_same(mixer(x[None])[0], naive_reversed(mixer, flat, flat).unflatten(0, (2, 3)))
    both = torch.cat([flat, extra])
    y, y_extra = mixer(x[None], extra[None])
    assert_same(torch.cat([y[0].flatten(0, 1), y_extra[0]]), naive_reversed(mixer, both, both))
    assert_same(mixer(x[None], context=context[None])[0].flatten(0, 1), naive_reversed(mixer, flat, context))
    y, y_extra = mixer(x[None], extra[None], context=context[None])
    expected = naive_reversed(mixer, both, torch.cat([context, extra]))
    assert_same(torch.cat([y[0].flatten(0, 1), y_extra[0]]), expected)


def test_reversed_rotates_senders_and_receivers_of_the_grid():
    mixer = random_mixer("reversed", rope=True, temperature=3.0)
    x, extra = torch.randn(1, 2, 3, 16, dtype=torch.float64), torch.randn(1, 2, 16, dtype=torch.float64)
    sides = [mixer.project(t, t) for t in (x, extra)]
    q, k = (torch.cat([rope(sides[0][i]).flatten(1, 2), sides[1][i]], 1) for i in (0, 1))
    weights = (torch.einsum("bshd,brhd->bhsr", q, k) * mixer.head_dim**-0.5).softmax(-1)
    both = torch.cat([x.flatten(1, 2), extra], 1)
    v = torch.cat([sides[0][2].flatten(1, 2), sides[1][2]], 1) * mixer.gates(both, mixer.message(both)).unsqueeze(-1)
    expected = mixer.proj(torch.einsum("bhsr,bshd->brhd", weights, v).flatten(2))
    y, y_extra = mixer(x, extra)
    assert_same(torch.cat([y.flatten(1, 2), y_extra], 1), expected)


def test_reversed_layers_hand_their_messages_on():
    mixer = random_mixer("reversed")
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    before = torch.rand(1, 6, dtype=torch.float64)
    y, messages, dependencies = mixer.send(x, before.log(), need_dependencies=True)
    assert_same(y[0], naive_reversed(mixer, x[0], x[0], before[0]))
    assert bool((messages <= before.log()).all())
    assert_same(dependencies.sum(-1), messages.exp())  # of each sender, over all receivers and heads
    fresh = mixer.send(x, need_dependencies=True)
    assert_same(fresh.dependencies * before.unsqueeze(-1), dependencies)
    assert mixer.send(x).dependencies is None
    assert_same(fresh.y, mixer(x))


@pytest.mark.parametrize("recurrence", [1, 2])
def test_criss_cross_sees_the_cross_once_and_everything_twice(recurrence):
    mixer = random_mixer("criss_cross", heads=1, recurrence=recurrence)
    x = torch.randn(1, 5, 6, 16, dtype=torch.float64, requires_grad=True)
    mixer(x)[0, 2, 3].sum().backward()
    reached = x.grad[0].abs().sum(-1) > 0
    for at in positions((5, 6)):
        assert bool(reached[at]) == (recurrence == 2 or at[0] == 2 or at[1] == 3)


def test_second_criss_cross_pass_carries_gradient_to_the_shared_weights():
    mixer = random_mixer("criss_cross", heads=1)
    x = torch.randn(1, 3, 4, 16, dtype=torch.float64)
    weight = mixer.qkv.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: torch.func.functional_call(mixer, {"qkv.weight": w}, x), weight)


@pytest.mark.parametrize("grid", [(6, 9), (7, 8)])
def test_halo_of_zero_equals_windows(grid):
    halo = random_mixer("halo", block_size=3, halo_size=0, border="mask")
    window = random_mixer("window", window_size=3, relative_bias=False)
    plain_halo = random_mixer("halo", block_size=3, halo_size=0, border="mask", relative_embedding=False)
    with torch.no_grad():
        for table in halo.embedding.tables:
            table.zero_()
    window.load_state_dict({k: v for k, v in halo.state_dict().items() if "tables" not in k})
    plain_halo.load_state_dict(window.state_dict())
    x = torch.randn(2, *grid, 16, dtype=torch.float64)
    assert_same(halo(x), window(x))
    assert_same(plain_halo(x), window(x))


@pytest.mark.parametrize(("block", "radius"), [(2, 1), (3, 2)])
def test_halo_equals_strided_neighborhood_away_from_the_border(block, radius):
    halo = random_mixer("halo", block_size=block, halo_size=radius, relative_embedding=False)
    strided = random_mixer("neighborhood", kernel_size=block + 2 * radius, stride=block, relative_bias=False)
    strided.load_state_dict(halo.state_dict())
    x = torch.randn(1, 5 * block, 5 * block, 16, dtype=torch.float64)
    difference = (halo(x) - strided(x)).detach()[0].abs().amax(-1)
    assert float(difference[block:-block, block:-block].max()) < 1e-11
    assert float(difference[0].min()) > 1e-6


@pytest.mark.peer
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("block", "radius"), [(4, 1), (2, 3)])
def test_halo_equals_timm_under_its_weights(block, radius, stride):
    timm()
    from timm.layers.halo_attn import HaloAttn

    theirs = HaloAttn(16, num_heads=2, block_size=block, halo_size=radius, qkv_bias=True, stride=stride).double()
    ours = random_mixer("halo", block_size=block, halo_size=radius, stride=stride)
    with torch.no_grad():
        kv = [t.flatten(1).unflatten(0, (2, 2, 8)) for t in (theirs.kv.weight, theirs.kv.bias[:, None])]  # (heads, k or v, dim)
        q = [t.flatten(1) for t in (theirs.q.weight, theirs.q.bias[:, None])]
        fused = [torch.cat([a, b[:, 0].flatten(0, 1), b[:, 1].flatten(0, 1)]) for a, b in zip(q, kv, strict=True)]
        ours.qkv.weight.copy_(fused[0])
        ours.qkv.bias.copy_(fused[1][:, 0])
        ours.proj.weight.copy_(torch.eye(16))
        ours.proj.bias.zero_()
        for table, peer in zip(ours.embedding.tables, (theirs.pos_embed.height_rel, theirs.pos_embed.width_rel), strict=True):
            table.copy_(peer[2 * radius :])  # the first offsets of theirs never occur
    x = torch.randn(2, 2 * block, 3 * block, 16, dtype=torch.float64)
    assert_same(ours(x), theirs(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def test_grid_groups_are_the_tokens_of_one_residue():
    mixer = random_mixer("grid", grid_size=3)
    x = torch.randn(1, 6, 9, 16, dtype=torch.float64, requires_grad=True)
    mixer(x)[0, 1, 5].sum().backward()
    reached = {tuple(at) for at in (x.grad[0].abs().sum(-1) > 0).nonzero().tolist()}
    assert reached == {(1 % 2 + i * 2, 5 % 3 + j * 3) for i in range(3) for j in range(3)}


@pytest.mark.parametrize("grid", [(8, 8), (9, 7)])
def test_window_then_grid_reaches_the_whole_map(grid):
    local, sparse = random_mixer("window", window_size=3), random_mixer("grid", grid_size=3)
    x = torch.randn(1, *grid, 16, dtype=torch.float64, requires_grad=True)
    sparse(local(x))[0, 4, 3].sum().backward()
    assert bool((x.grad.abs().sum(-1) > 0).all())


def test_identity_mixes_nothing():
    x, extra = torch.randn(1, 3, 4, 16), torch.randn(1, 2, 16)
    mixer = create_mixer("identity", dim=16, heads=2)
    assert mixer(x) is x
    assert mixer(x, extra) == (x, extra)
    assert not list(mixer.parameters())


def test_rotated_attention_depends_on_relative_positions_only():
    mixer = random_mixer("multi_head", dim=16, heads=2, rope=True)
    plain_mixer = random_mixer("multi_head", dim=16, heads=2)
    plain_mixer.load_state_dict(mixer.state_dict())
    x = torch.randn(1, 3, 4, 16, dtype=torch.float64)
    q, k, v = mixer.project(x, x)
    rotated_q, rotated_k = rope(q), rope(k)
    logits = torch.einsum("bijhd,bklhd->bhijkl", rotated_q, rotated_k)
    moved = [rope(t, torch.tensor(positions((3, 4))).reshape(3, 4, 2) + torch.tensor([5, 2])) for t in (q, k)]
    assert_same(torch.einsum("bijhd,bklhd->bhijkl", *moved), logits)
    seen = attention(rotated_q[0], rotated_k[0], v[0], mixer.head_dim**-0.5, lambda q, k: True)
    assert_same(mixer(x)[0], project_out(mixer, seen))
    assert (mixer(x) - plain_mixer(x)).abs().max() > 1e-4


# what they have in common ---------------------------------------------------------------------------------------------


def test_every_registered_mixer_is_tested_here():
    assert {name for name, _ in MIXERS} == set(list_mixers())


@pytest.mark.parametrize("name", list_mixers())
def test_mixers_are_created_by_name_with_dim_and_heads_alone(name):
    mixer = create_mixer(name, dim=64, heads=4)
    x = torch.randn(1, 9, 7, 64)
    assert mixer(x).shape == x.shape
    meta = create_mixer(name, dim=64, heads=4, device="meta", dtype=torch.bfloat16)
    assert all(p.device.type == "meta" and p.dtype == torch.bfloat16 for p in meta.parameters())


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("name", "arguments"), MIXERS, ids=ids)
def test_fast_backends_equal_the_reference_on_any_grid(name, arguments, grid):
    mixer = random_mixer(name, **arguments)
    x, extra = torch.randn(2, *grid, 16, dtype=torch.float64), torch.randn(2, 3, 16, dtype=torch.float64)
    alone, (y, y_extra) = mixer(x), mixer(x, extra)
    mixer.backend = "reference"
    slow_alone, (slow, slow_extra) = mixer(x), mixer(x, extra)
    assert_same(alone, slow_alone)
    assert_same(y, slow)
    assert_same(y_extra, slow_extra)


@pytest.mark.parametrize(("name", "arguments"), MIXERS, ids=ids)
def test_images_of_a_batch_do_not_mix(name, arguments):
    mixer = random_mixer(name, **arguments)
    x = torch.randn(3, 7, 5, 16, dtype=torch.float64)
    assert_same(mixer(x), torch.cat([mixer(image[None]) for image in x]))


@pytest.mark.parametrize(("name", "arguments"), MIXERS, ids=ids)
def test_all_parameters_get_finite_gradients(name, arguments):
    mixer = random_mixer(name, **arguments)
    x = torch.randn(2, 7, 5, 16, dtype=torch.float64, requires_grad=True)
    mixer(x).square().sum().backward()
    assert bool(x.grad.isfinite().all())
    for parameter in learning(mixer):
        assert bool(parameter.grad.isfinite().all())
        assert bool(parameter.grad.any())


@pytest.mark.parametrize(("name", "arguments"), MIXERS, ids=ids)
def test_bfloat16_stays_close_to_float64(name, arguments):
    mixer = random_mixer(name, **{**arguments, **{k: CONTINUOUS[k] for k in arguments if k in CONTINUOUS}})
    x = torch.randn(2, 7, 5, 16, dtype=torch.float64)
    expected = mixer(x)
    y = mixer.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert ((y.double() - expected).norm() / expected.norm()).item() < 2e-2


@pytest.mark.parametrize(("name", "arguments"), MIXERS, ids=ids)
def test_autocast_stays_close_to_float32(name, arguments):
    mixer = random_mixer(name, **{**arguments, **{k: CONTINUOUS[k] for k in arguments if k in CONTINUOUS}}).float()
    x, extra = torch.randn(2, 7, 5, 16), torch.randn(2, 3, 16)
    expected = mixer(x, extra)
    with torch.autocast("cpu", torch.bfloat16):
        results = mixer(x, extra)
    for ours, exact in zip(results, expected, strict=True):
        assert ((ours.float() - exact).norm() / exact.norm()).item() < 2e-2


@pytest.mark.parametrize("name", list_mixers())
def test_compiled_whole_equals_eager_with_gradients(name):
    mixer = random_mixer(name)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 9, 8, 16, dtype=torch.float64, requires_grad=True)
    y = mixer(x)
    wanted = torch.autograd.grad(y.square().sum(), [x, *learning(mixer)])
    z = compiled(x)
    assert_same(z, y)
    for ours, expected in zip(torch.autograd.grad(z.square().sum(), [x, *learning(mixer)]), wanted, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", list_mixers())
def test_exported_program_equals_the_module(name):
    mixer = random_mixer(name)
    x = torch.randn(2, 9, 8, 16, dtype=torch.float64)
    program = torch.export.export(mixer, (x,)).module()
    other = torch.randn_like(x)
    assert_same(program(other), mixer(other))


@pytest.mark.parametrize(("name", "arguments"), MIXERS, ids=ids)
def test_context_equal_to_the_input_changes_nothing(name, arguments):
    mixer = random_mixer(name, **{**arguments, **({"recurrence": 1} if name == "criss_cross" else {})})
    x = torch.randn(2, 7, 5, 16, dtype=torch.float64)
    assert_same(mixer(x, context=x.clone()), mixer(x))


def test_context_gives_keys_and_values():
    mixer = random_mixer("multi_head")
    x, context = torch.randn(4, 5, 16, dtype=torch.float64), torch.randn(3, 2, 16, dtype=torch.float64)
    q, _, _ = split_heads(mixer, x)
    _, k, v = split_heads(mixer, context)
    expected = project_out(mixer, attention(q, k, v, mixer.head_dim**-0.5, lambda q, k: True))
    assert_same(mixer(x[None], context=context[None])[0], expected)


@pytest.mark.parametrize("pad", ["mask", "token"])
def test_extra_tokens_see_and_are_seen_by_everything(pad):
    mixer = random_mixer("window", window_size=3, pad=pad)
    x, extra = torch.randn(4, 5, 16, dtype=torch.float64), torch.randn(2, 16, dtype=torch.float64)
    y, y_extra = mixer(x[None], extra[None])
    padded = torch.nn.functional.pad(x, (0, 0, 0, 1, 0, 2)) if pad == "token" else x
    q, k, v = split_heads(mixer, padded)
    extra_q, extra_k, extra_v = split_heads(mixer, extra)
    scale = mixer.head_dim**-0.5

    def sees(q, k):
        return all(a // 3 == b // 3 for a, b in zip(q, k, strict=True))

    seen = attention(q, k, v, scale, sees, offset_bias(mixer), extra=(extra_k, extra_v))
    assert_same(y[0], project_out(mixer, seen[:4, :5]))
    everything = (k[:4, :5], v[:4, :5])  # the padding is nothing that could be seen
    seen = attention(extra_q, *everything, scale, lambda q, k: True, extra=(extra_k, extra_v))
    assert_same(y_extra[0], project_out(mixer, seen))


@pytest.mark.parametrize(
    ("name", "grid", "arguments"),
    [
        ("multi_head", (7,), {}),
        ("neighborhood", (9,), {"rank": 1, "kernel_size": 3}),
        ("neighborhood", (3, 4, 5), {"rank": 3, "kernel_size": 3}),
        ("window", (3, 4, 5), {"rank": 3, "window_size": (2, 3, 3)}),
        ("halo", (7,), {"rank": 1, "block_size": 2, "halo_size": 1}),
        ("grid", (3, 4, 5), {"rank": 3, "grid_size": 2}),
        ("gated_positional", (3, 4, 5), {"rank": 3}),
        ("axial", (3, 4, 5), {}),
        ("criss_cross", (3, 4, 5), {}),
        ("reversed", (3, 4, 5), {}),
        ("bi_level_routing", (9,), {"rank": 1, "regions": 3, "topk": 2}),
        ("bi_level_routing", (3, 4, 5), {"rank": 3, "regions": (1, 2, 2), "topk": 2}),
        ("locally_enhanced", (3, 4, 5), {"rank": 3}),
    ],
    ids=lambda v: ids(v) if isinstance(v, dict) else None,
)
def test_mixers_work_on_grids_of_other_ranks(name, grid, arguments):
    mixer = random_mixer(name, **arguments)
    x = torch.randn(2, *grid, 16, dtype=torch.float64)
    fast = mixer(x)
    mixer.backend = "reference"
    assert_same(fast, mixer(x))


def test_attention_dropout_acts_in_training_only():
    mixer = create_mixer("multi_head", dim=16, heads=2, attn_drop=0.5)
    x = torch.randn(1, 5, 5, 16)
    assert not torch.equal(mixer(x), mixer(x))
    mixer.eval()
    assert torch.equal(mixer(x), mixer(x))  # bitwise: the same operators on the same shapes


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: create_mixer("neighbourhood", dim=16, heads=2), "did you mean neighborhood"),
        (lambda: create_mixer("xyz", dim=16, heads=2), "'xyz'; there are aggregated, axial, .*, strip, window$"),
        (lambda: create_mixer("window", 64, 3), r"options of a mixer are named, such as .*'window', dim=64.*got int 64, int 3"),
        (lambda: create_mixer("window", dim=10, heads=4), "dim=10, heads=4"),
        (lambda: create_mixer("window", dim=16, heads=2, pad="zero"), "mask, token; got 'zero'"),
        (lambda: create_mixer("neighborhood", dim=16, heads=2, kernel_size=0), "kernel_size must be at least 1; got int 0"),
        (lambda: create_mixer("bi_level_routing", dim=16, heads=2, regions=3, topk=10), "from 1 to 9 regions; got 10"),
        (lambda: create_mixer("bi_level_routing", dim=16, heads=2, topk=0), "topk must be -1 .* got 0"),
        (lambda: create_mixer("bi_level_routing", dim=16, heads=2, topk=1.5), "topk must be a whole number; got float 1.5"),
        (lambda: create_mixer("bi_level_routing", dim=16, heads=2, regions=0), "regions must be at least 1; got int 0"),
        (
            lambda: create_mixer("bi_level_routing", dim=16, heads=2, regions=(3,)),
            r"regions must be a number, or 2 of them, one per axis; got tuple \(3,\)",
        ),
        (
            lambda: create_mixer("bi_level_routing", dim=16, heads=2, regions=2.5),
            "regions must be a whole number; got float 2.5",
        ),
        (lambda: create_mixer("bi_level_routing", dim=16, heads=2, kernel_size=0), "kernel_size must be at least 1; got int 0"),
        (lambda: create_mixer("bi_level_routing", dim=16, heads=2, rank=0), "rank must be at least 1; got int 0"),
        (
            lambda: create_mixer("locally_enhanced", dim=16, heads=2, kernel_size=(3, 5)),
            r"kernel_size must be a whole number; got tuple \(3, 5\)",
        ),
        (lambda: create_mixer("locally_enhanced", dim=16, heads=2, rank=4), "grids of 1, 2 or 3 axes; got rank=4"),
        (lambda: create_mixer("locally_enhanced", dim=16, heads=2, head_dim=4), "dim=16 wide together; got 2 heads of 4"),
        (lambda: create_mixer("locally_enhanced", dim=0, heads=2), "dim must be at least 1; got int 0"),
        (lambda: create_mixer("msa_conv", dim=0, heads=2), "dim must be at least 1; got int 0"),
        (lambda: create_mixer("msa_conv", dim=16, heads=2, value_dim=4), "dim=16 wide together; got 2 heads of 4"),
        (lambda: create_mixer("msa_conv", dim=16, heads=2, conv_size=-1), "conv_size must be at least 1; got int -1"),
        (lambda: create_mixer("msa_conv", dim=16, heads=2, dilation=0), "dilation must be at least 1; got int 0"),
        (lambda: create_mixer("msa_conv", dim=16, heads=2, stride=0), "stride must be at least 1; got int 0"),
        (lambda: create_mixer("msa_conv", dim=16, heads=2, out=0), "out must be at least 1; got int 0"),
        (lambda: create_mixer("msa_conv", dim=16, heads=2, shift=1.5), "shift must be a whole number; got float 1.5"),
        (lambda: create_mixer("axial", dim=16, heads=2, axes=(0, 0)), r"distinct.* got \(0, 0\)"),
        (lambda: create_mixer("axial", dim=16, heads=2, axes=(2,))(torch.randn(1, 3, 3, 16)), "Axis.2. does not exist"),
        (lambda: create_mixer("reversed", dim=16, heads=2, temperature=0.0), "temperature must be positive; got 0.0"),
        (lambda: create_mixer("criss_cross", dim=16, heads=2, recurrence=0), "at least 1; got int 0"),
        (lambda: create_mixer("multi_head", dim=16, heads=4, kv_heads=3), "kv_heads=3"),
        (
            lambda: create_mixer("multi_head", dim=16, heads=2)(torch.randn(1, 3, 3, 8)),
            r"expected x .*16\); got \(1, 3, 3, 8\)",
        ),
        (
            lambda: create_mixer("multi_head", dim=16, heads=2)(torch.randn(1, 3, 3, 16), torch.randn(1, 2, 8)),
            r"expected extra .*got \(1, 2, 8\)",
        ),
        (
            lambda: create_mixer("bi_level_routing", dim=16, heads=2)(
                torch.randn(1, 3, 3, 16), context=torch.randn(1, 2, 3, 16)
            ),
            "routed on one grid",
        ),
    ],
)
def test_errors_say_what_was_given_and_what_is_allowed(make, told):
    with pytest.raises((TypeError, ValueError), match=told):
        make()


@pytest.mark.parametrize(
    "name",
    ["bi_level_routing", "locally_enhanced", "msa_conv", "gated_positional", "window", "neighborhood", "grid", "halo", "strip"],
)
@pytest.mark.parametrize("grid", [(9,), (3, 3, 3)])
def test_a_grid_of_another_rank_is_refused_by_mixers_made_for_one(name, grid):
    mixer = create_mixer(name, dim=16, heads=2, rank=2)
    with pytest.raises(ValueError, match=rf"expected x \(batch, 2 grid axes, 16\); got \(1, {', '.join(map(str, grid))}, 16\)"):
        mixer(torch.randn(1, *grid, 16))


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        ((2, 49, 16), r"got \(2, 49, 16\): give the tokens their grid, x.unflatten\(1, grid\)$"),
        ((2, 16, 7, 9), r"got \(2, 16, 7, 9\): channels come last, x.movedim\(1, -1\)$"),
        ((2, 7, 9, 8), r"got \(2, 7, 9, 8\)$"),
    ],
)
def test_tokens_of_other_layouts_bring_what_makes_them_fit(shape, told):
    with pytest.raises(ValueError, match=told):
        create_mixer("window", dim=16, heads=2)(torch.randn(shape))


def test_options_within_a_name_are_shown_where_they_belong():
    with pytest.raises(ValueError, match=r"mixer=\('window', {\.\.\.}\); got 'window\(shift=1\)'"):
        create_mixer("window(shift=1)", dim=16, heads=2)


def test_a_mechanism_is_a_subclass_with_sources():
    class Own(AttentionMixer):
        def sources(self, x, q, k, v):
            return [regard.Source(k, v, P.Axis(0))]

    mixer = Own(16, 2).double()
    axial = create_mixer("axial", dim=16, heads=2, axes=(0,)).double()
    axial.load_state_dict(mixer.state_dict())
    x = torch.randn(1, 4, 5, 16, dtype=torch.float64)
    assert_same(mixer(x), axial(x))
