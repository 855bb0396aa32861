"""HaloNet (4): haloed blocks in bottlenecks equal their definition and timm, with and without attention downsampling."""

import peers
import pytest
import torch
import torch.nn.functional as F
from naive_backbones import linear, randomise

from regard import create_model, list_models, load_checkpoint
from regard.layers.conv_norm import fuse
from regard.layers.mixers import NeighborhoodAttention, WindowAttention
from regard.models import count_parameters, export_state_dict, model_card
from regard.models.backbones.halonet import BareHaloAttention

INSIDE = (64, 128, 256, 512)
SIZES = {  # kinds, depths, channels out and inside, heads, halo, stem channels, parameters of the gates, final channels
    "halonet_h0": ("aaaa", (3, 3, 7, 3), (32, 64, 128, 256), INSIDE, (4, 8, 8, 8), 3, (64,), None, None),
    "halonet_h1": ("aaaa", (3, 3, 10, 3), INSIDE, INSIDE, 8, 3, (64,), None, None),
    "halonet_h2": ("aaaa", (3, 3, 11, 3), (80, 160, 320, 640), INSIDE, (4, 8, 8, 8), 3, (64,), None, None),
    "halonet_h3": ("aaaa", (3, 3, 12, 3), (96, 192, 384, 768), INSIDE, (4, 8, 8, 8), 3, (64,), None, 1024),
    "halonet_h4": ("aaaa", (3, 3, 12, 3), (192, 384, 768, 1536), INSIDE, (4, 8, 8, 8), 2, (64,), None, 1280),
    "halonet_h5": ("aaaa", (3, 3, 23, 3), (128, 256, 512, 1024), INSIDE, (4, 8, 8, 8), 2, (64,), None, 1536),
    "halonet_h6": ("aaaa", (3, 3, 24, 3), (176, 352, 704, 1408), INSIDE, (4, 8, 8, 8), 4, (64,), None, 1536),
    "halonet_h7": ("aaaa", (3, 3, 26, 3), (224, 448, 896, 1792), INSIDE, (4, 8, 8, 8), 3, (64,), None, 2048),
    "halonet26t": (
        ("c", "c", "ca", "a"), (2, 2, 2, 2), (256, 512, 1024, 2048), (64, 128, 256, 512), 8, 2, (24, 32, 64), None, None,
    ),
    "halonet50ts": (
        ("c", "ccca", "ca", "ca"), (3, 4, 6, 3), (256, 512, 1024, 2048), (64, 128, 256, 512), (8, 4, 8, 8), 3, (24, 32, 64),
        None, None,
    ),
    "sehalonet33ts": (
        ("c", "cca", "cca", "a"), (2, 3, 3, 2), (256, 512, 1024, 1536), (64, 128, 256, 512), 8, 3, (24, 32, 64),
        tuple(2 * inside * hidden + hidden + inside for inside, hidden in ((64, 8), (128, 8), (256, 16))), 1280,
    ),
    "eca_halonext26ts": (
        ("c", "c", "ca", "a"), (2, 2, 2, 2), (256, 512, 1024, 2048), (64, 128, 256, 512), 8, 2, (24, 32, 64), (3, 5, 5), None,
    ),
}  # fmt: skip
BLOCKS = {"halonet_h3": 10, "halonet_h4": 12, "halonet_h5": 14, "halonet_h7": 10}  # 8 elsewhere
VALUES = {"halonet_h5": 2.5, "halonet_h6": 3, "halonet_h7": 4}  # channels of the values over those inside; 1 elsewhere
TIMM = {
    "halonet_h1": 8_100_056, "halonet26t": 12_480_288, "halonet50ts": 22_733_280, "sehalonet33ts": 13_691_712,
    "eca_halonext26ts": 10_756_885,
}  # fmt: skip
PAPER = {"0": 5.5, "1": 8.1, "2": 9.4, "3": 11.8, "4": 19.1, "5": 30.7, "6": 43.4, "7": 67.4}  # millions
NARROW = {"dim": 32, "stem_dim": 16, "heads": (2, 2, 4, 4), "block_size": 4, "halo_size": 1, "num_classes": 5}


# --------------------------------------------------------------------------------------------------------------------
# the definition


def norm(x, weights, name):
    mean, variance, scale, shift = (
        weights[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (variance + 1e-5).sqrt() * scale + shift


def conv_norm(x, weights, name, stride=1):
    kernel = weights[f"{name}.conv.weight"]
    groups = x.shape[1] // kernel.shape[1]
    return norm(F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2, groups=groups), weights, f"{name}.bn")


def halo_attention(x, weights, name, heads, block, halo, stride):
    """Block by block on the map that zeros surround and fill up to whole blocks."""
    window = block + 2 * halo
    rows, columns = x.shape[2:]
    q = F.conv2d(x, weights[f"{name}.q.weight"], stride=stride).unflatten(1, (heads, -1))
    kv = F.conv2d(x, weights[f"{name}.kv.weight"])
    kv = F.pad(kv, [halo, -columns % block + halo, halo, -rows % block + halo]).unflatten(1, (heads, -1))
    k, v = kv[:, :, : q.shape[2]], kv[:, :, q.shape[2] :]
    down, right = (weights[f"{name}.pos_embed.{axis}_rel"] for axis in ("height", "width"))
    out = q.new_zeros(*q.shape[:2], v.shape[2], *q.shape[3:])
    steps = torch.arange(window)
    for y in range(q.shape[-2]):
        for z in range(q.shape[-1]):
            first = [at * stride // block * block for at in (y, z)]
            index = [(at * stride - start) // stride for at, start in zip((y, z), first, strict=True)]
            cell = (slice(first[0], first[0] + window), slice(first[1], first[1] + window))
            query = q[..., y, z]
            logits = torch.einsum("bhd,bhdyx->bhyx", query, k[..., *cell]) * query.shape[-1] ** -0.5
            logits = logits + torch.einsum("bhd,yd->bhy", query, down[steps - index[0] + window - 1])[..., None]
            logits = logits + torch.einsum("bhd,xd->bhx", query, right[steps - index[1] + window - 1])[..., None, :]
            shares = logits.flatten(2).softmax(-1).unflatten(2, (window, window))
            out[..., y, z] = torch.einsum("bhyx,bhdyx->bhd", shares, v[..., *cell])
    return out.flatten(1, 2)


def naive_halonet(image, weights, kinds, depths, act, heads, block, halo, pool):
    x = image
    stem = len({key for key in weights if key.startswith("stem.") and key.endswith("conv.weight")})
    for i in range(stem):
        x = act(conv_norm(x, weights, f"stem.conv{i + 1}", 2 if i == 0 or (i == stem - 1 and not pool) else 1))
    x = F.max_pool2d(x, 3, 2, 1) if pool else x
    for stage, depth in enumerate(depths):
        for j in range(depth):
            name, stride = f"stages.{stage}.{j}", 2 if stage and j == 0 else 1
            y = act(conv_norm(x, weights, f"{name}.conv1_1x1"))
            if kinds[stage][j % len(kinds[stage])] == "c":
                y = act(conv_norm(y, weights, f"{name}.conv2_kxk", stride))
                if f"{name}.attn.fc1.weight" in weights:
                    hidden = y.mean((2, 3), keepdim=True)
                    for layer, finish in (("fc1", torch.relu), ("fc2", torch.sigmoid)):
                        hidden = F.conv2d(hidden, weights[f"{name}.attn.{layer}.weight"], weights[f"{name}.attn.{layer}.bias"])
                        hidden = finish(hidden)
                    y = y * hidden
                if f"{name}.attn.conv.weight" in weights:
                    along, size = y.mean((2, 3))[:, None], weights[f"{name}.attn.conv.weight"].shape[-1]
                    y = (
                        y
                        * F.conv1d(along, weights[f"{name}.attn.conv.weight"], padding=size // 2)[:, 0, :, None, None].sigmoid()
                    )
            else:
                y = halo_attention(y, weights, f"{name}.self_attn", heads[stage], block, halo, stride)
                y = act(norm(y, weights, f"{name}.post_attn"))
            y = conv_norm(y, weights, f"{name}.conv3_1x1")
            x = act(y + (conv_norm(x, weights, f"{name}.shortcut", stride) if f"{name}.shortcut.conv.weight" in weights else x))
    if "final_conv.conv.weight" in weights:
        x = act(conv_norm(x, weights, "final_conv"))
    return linear(x.mean((2, 3)), weights, "head.fc")


@pytest.mark.parametrize("size", [(64, 32), (50, 37)])
@pytest.mark.parametrize(
    ("name", "kinds", "act", "pool"),
    [
        ("halonet_h1", ("a", "a", "a"), F.relu, True),
        ("halonet50ts", ("c", "ca", "a"), F.silu, True),
        ("sehalonet33ts", ("c", "ca", "ca"), F.silu, False),
        ("halonet_h5", ("a", "a", "a"), F.relu, True),
        ("eca_halonext26ts", ("c", "ca", "ca"), F.silu, True),
    ],
)
def test_equals_the_definition_on_any_size(name, kinds, act, pool, size):
    options = NARROW | {"depths": (1, 2, 2), "kinds": kinds, "ratios": (0.5, 0.5, 0.25)}
    if name.startswith("eca"):
        options |= {"group_size": 4, "query_dim": 3}
    if name.startswith("se"):
        options |= {"final_dim": 24}
    model = randomise(create_model(name, dtype=torch.float64, **options))
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    weights = export_state_dict(model, "timm")
    expected = naive_halonet(image, weights, kinds, (1, 2, 2), act, (2, 2, 4), 4, 1, pool)
    torch.testing.assert_close(model(image), expected, rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------------------------------------------------
# mechanism


def bare(**options):
    return randomise(BareHaloAttention(8, 2, dtype=torch.float64, **options))


def with_projections_of(other, mixer):
    """The windows or neighborhoods with the projections of a halo mixer, and no projection of the output."""
    k, v = mixer.kv.weight.unflatten(0, (2, 2, 4)).unbind(1)
    other.qkv.weight.data = torch.cat([mixer.q.weight, k.flatten(0, 1), v.flatten(0, 1)])
    other.proj = torch.nn.Identity()
    return other


def silence(mixer):
    for table in mixer.embedding.tables:
        table.data.zero_()
    return mixer


def test_without_halo_and_embedding_it_is_window_attention():
    mixer = silence(bare(block_size=3, halo_size=0))
    plain = WindowAttention(8, 2, 3, relative_bias=False, qkv_bias=False, dtype=torch.float64)
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), with_projections_of(plain, mixer)(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("block", "halo"), [(2, 1), (3, 2)])
def test_without_embedding_interior_blocks_are_strided_neighborhoods_and_border_blocks_are_not(block, halo):
    mixer = silence(bare(block_size=block, halo_size=halo))
    strided = NeighborhoodAttention(
        8, 2, block + 2 * halo, stride=block, relative_bias=False, qkv_bias=False, dtype=torch.float64
    )
    x = torch.randn(1, 4 * block, 5 * block, 8, dtype=torch.float64)
    difference = (mixer(x) - with_projections_of(strided, mixer)(x))[0].abs().amax(-1)
    inside = torch.zeros_like(difference, dtype=torch.bool)
    inside[block:-block, block:-block] = True
    assert difference[inside].max() < 1e-12
    assert difference[~inside].min() > 1e-8


def test_zero_keys_beyond_the_border_take_part_and_get_the_relative_term():
    mixer = bare(block_size=2, halo_size=1)
    x = torch.randn(1, 2, 2, 8, dtype=torch.float64)
    before = mixer(x)
    table = mixer.embedding.tables[0].data
    table[2] += torch.randn(4, dtype=torch.float64)  # the key above the block, seen from its second row: no token is there
    moved = (mixer(x) - before)[0].abs().amax(-1)
    assert moved[1].min() > 1e-6
    assert moved[0].max() == 0
    table[:2] += 1.0  # published tables hold offsets that no pair has
    assert torch.equal(mixer(x)[0, 0], before[0, 0])  # bitwise: the same operators on the same shapes


def test_only_every_second_token_asks_where_a_stage_begins_and_keys_stay_whole():
    model = create_model("halonet_h1", **NARROW, depths=(1, 2, 1), dtype=torch.float64)
    strides = [[block.mixer.pattern.stride for block in stage.blocks] for stage in model.stages]
    assert strides == [[1], [2, 1], [2]]
    mixer = bare(block_size=4, halo_size=1, stride=2)
    x = torch.randn(1, 8, 8, 8, dtype=torch.float64, requires_grad=True)
    y = mixer(x)
    assert y.shape == (1, 4, 4, 8)
    (gradient,) = torch.autograd.grad(y[0, 1, 3].sum(), x)  # the query at (2, 6), of the block at rows 0 to 3, columns 4 to 7
    reached = torch.zeros(8, 8, dtype=torch.bool)
    reached[0:5, 3:8] = True
    assert torch.equal(gradient[0].abs().sum(-1) > 0, reached)


@pytest.mark.parametrize("size", [(1, 1), (61, 44), (97, 64)])
def test_cut_backbones_give_maps_of_the_stated_reduction_and_recomputing_changes_no_gradient(size):
    options = NARROW | {"depths": (2, 1, 1, 2), "dtype": torch.float64}
    torch.manual_seed(3)
    whole = create_model("halonet26t", **options).eval()
    torch.manual_seed(3)
    cut = create_model("halonet26t", **options, features_only=True, out_indices=(0, 3)).eval()
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    for x, expected, info in zip(
        cut(image), whole.get_intermediate_layers(image, (0, 3), reshape=True), cut.feature_info, strict=True
    ):
        assert torch.equal(x, expected)
        assert x.shape == (2, info["num_chs"], *(-(-n // info["reduction"]) for n in size))
    assert [info["reduction"] for info in cut.feature_info] == [4, 32]
    if size != (1, 1):  # batch norm trains on more than two values
        gradients = []
        for enable in (False, True):
            randomise(whole).train().zero_grad()
            whole.set_grad_checkpointing(enable)
            whole(image).square().sum().backward()
            gradients.append([p.grad.clone() for p in whole.parameters()])
        assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(*gradients, strict=True))


def test_fusing_leaves_the_output():
    model = randomise(create_model("sehalonet33ts", dtype=torch.float64, **NARROW | {"dim": 64, "final_dim": 24}))
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expected = model(image)
    fuse(model)
    norms = [name for name, module in model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert all(name.endswith(".norm") for name in norms)  # those after attention
    torch.testing.assert_close(model(image), expected, rtol=1e-10, atol=1e-10)


# --------------------------------------------------------------------------------------------------------------------
# published facts


def test_every_published_name_is_here():
    assert sorted(SIZES) == list_models("*halone*t*")


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts_equal_the_closed_form_and_the_published(name):
    kinds, depths, outs, insides, heads, halo, stem, gates, final = SIZES[name]
    next_, span, group = name.startswith("eca"), BLOCKS.get(name, 8) + 2 * halo, 16
    total, entering = 0, 3
    for width in stem:
        total += (49 if len(stem) == 1 else 9) * entering * width + 2 * width
        entering = width
    for stage, (depth, out, inside) in enumerate(zip(depths, outs, insides, strict=True)):
        count = heads if isinstance(heads, int) else heads[stage]
        for j in range(depth):
            total += entering * inside + 2 * inside + inside * out + 2 * out
            if entering != out or (stage and j == 0):
                total += entering * out + 2 * out
            if kinds[stage][j % len(kinds[stage])] == "c":
                total += 9 * inside * (group if next_ else inside) + 2 * inside + (gates[stage] if gates else 0)
            else:
                values, queries = int(inside * VALUES.get(name, 1)), 16 * count if next_ else inside
                total += inside * (2 * queries + values) + 2 * (2 * span - 1) * queries // count + 2 * values
                total += (values - inside) * out
            entering = out
    if final:
        total += entering * final + 2 * final
        entering = final
    total += 1000 * entering + 1000
    assert count_parameters(create_model(name, device="meta")) == total == TIMM.get(name, total) == model_card(name).params
    if name.startswith("halonet_h"):
        assert total / 1e6 == pytest.approx(PAPER[name[-1]], abs=0.06)


@pytest.mark.parametrize("name", SIZES)
def test_multiply_adds_are_those_of_the_card(name):
    """Of whole blocks with their halos, zeros beyond the border included."""
    total = 0

    def add(layer, inputs, output):
        nonlocal total
        if not isinstance(layer, BareHaloAttention):
            each = layer.in_features if isinstance(layer, torch.nn.Linear) else layer.weight[0].numel()
            total += output.numel() * each
            return
        block, span = layer.block[0], layer.block[0] + 2 * layer.halo[0]
        blocks = -(-inputs[0].shape[1] // block) * -(-inputs[0].shape[2] // block)
        queries = blocks * (block // layer.pattern.stride) ** 2
        total += queries * (span**2 * (layer.widths[0] + layer.widths[2]) + 2 * span * layer.widths[0])

    card, model = model_card(name), create_model(name, device="meta").eval()
    for layer in model.modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d, BareHaloAttention)):
            layer.register_forward_hook(add)
    model(torch.empty(1, 3, card.input_size, card.input_size, device="meta"))
    assert total / 1e9 == pytest.approx(card.gmacs, rel=0.03)


# --------------------------------------------------------------------------------------------------------------------
# peers


@pytest.mark.peer
@pytest.mark.parametrize("name", TIMM)
def test_equals_timm_under_its_weights(name):
    timm = peers.timm()
    theirs = timm.create_model(name, width_factor=0.25, num_classes=7).double()
    randomise(theirs)
    options = {"final_dim": 320} if name.startswith("se") else {}
    dim = 16 if name == "halonet_h1" else 64
    ours = create_model(name, dim=dim, stem_dim=16, num_classes=7, dtype=torch.float64, **options).eval()
    assert load_checkpoint(ours, theirs.state_dict()) == "timm"
    exported = export_state_dict(ours, "timm")
    assert exported.keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, exported[key]) for key, value in theirs.state_dict().items())
    image = torch.randn(1, 3, 256, 256, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs(image), rtol=1e-11, atol=1e-11)
