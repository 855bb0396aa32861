"""MaxViT (10): convolution block, windows and dilated grids equal their definition and timm's TensorFlow variants."""

import peers
import pytest
import torch
import torch.nn.functional as F
from naive_backbones import dense_attention, layer_norm, linear, multiply_adds, randomise

from regard import create_model, list_models, load_checkpoint
from regard import patterns as P
from regard.bench import count
from regard.models import count_parameters, export_state_dict, model_card

TINY = "maxvit_tiny_tf_224"
NARROW = {"dim": 8, "head_dim": 4, "depths": (1, 2), "stem_dim": 6, "window_size": 3}
DEPTHS = {"tiny": (2, 2, 5, 2), "small": (2, 2, 5, 2), "base": (2, 6, 14, 2), "large": (2, 6, 14, 2), "xlarge": (2, 6, 14, 2)}
WIDTHS = {"tiny": (64, 64), "small": (64, 96), "base": (64, 96), "large": (128, 128), "xlarge": (192, 192)}  # stem, first stage
PUBLISHED = {
    "maxvit_tiny_tf_224": 30_916_528,
    "maxvit_small_tf_224": 68_927_956,
    "maxvit_base_tf_224": 119_467_708,
    "maxvit_large_tf_224": 211_785_560,
}
NAMES = [f"maxvit_{size}_tf_{image}" for size in WIDTHS for image in (224, 384, 512)]
NAMES += [f"maxvit_{size}_tf_224.in21k" for size in ("base", "large", "xlarge")]


def tiny(**options):
    """A narrow float64 MaxViT with random weights, and these under timm's names."""
    model = randomise(create_model(TINY, num_classes=5, dtype=torch.float64, **NARROW | options))
    return model, export_state_dict(model, "timm")


# --------------------------------------------------------------------------------------------------------------------
# the definition


def same_conv(x, weights, name, stride=1, groups=1):
    """A convolution padded as TensorFlow does: the output has ceil(n / stride) points, an odd zero comes after."""
    kernel = weights[f"{name}.weight"]
    pads = []
    for n in reversed(x.shape[2:]):
        total = max((-(-n // stride) - 1) * stride + kernel.shape[-1] - n, 0)
        pads += [total // 2, total - total // 2]
    return F.conv2d(F.pad(x, pads), kernel, weights.get(f"{name}.bias"), stride, groups=groups)


def norm(x, weights, name, eps=1e-3):
    mean, variance, scale, shift = (
        weights[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (variance + eps).sqrt() * scale + shift


def gelu(x):
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def conv_block(x, weights, name, stride):
    y = norm(x, weights, f"{name}.pre_norm")
    y = gelu(norm(same_conv(y, weights, f"{name}.conv1_1x1"), weights, f"{name}.norm1"))
    y = gelu(norm(same_conv(y, weights, f"{name}.conv2_kxk", stride, groups=y.shape[1]), weights, f"{name}.norm2"))
    squeezed = F.silu(same_conv(y.mean((2, 3), keepdim=True), weights, f"{name}.se.fc1"))
    y = same_conv(y * torch.sigmoid(same_conv(squeezed, weights, f"{name}.se.fc2")), weights, f"{name}.conv3_1x1")
    if stride == 2:  # the mean over squares, in which zeros beyond the edge count
        x = F.pad(x, [0, x.shape[3] % 2, 0, x.shape[2] % 2])
        x = sum(x[:, :, down::2, right::2] for down in (0, 1) for right in (0, 1)) / 4
    if f"{name}.shortcut.expand.weight" in weights:
        x = same_conv(x, weights, f"{name}.shortcut.expand")
    return x + y


def steps(kind, size, grid):
    """How far apart the tokens of a group are on each axis."""
    return [1, 1] if kind == "block" else [-(-n // size) for n in grid]


def groups(kind, size, grid):
    """A label per token; equal labels see each other."""
    rows, columns = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    down, right = steps(kind, size, grid)
    if kind == "block":
        return (rows // size * 10_000 + columns // size).flatten()
    return (rows % down * 10_000 + columns % right).flatten()


def attention_block(x, weights, name, kind, size, heads):
    grid = tuple(x.shape[1:3])
    label = groups(kind, size, grid)
    table = weights[f"{name}.attn.rel_pos.relative_position_bias_table"]

    def bias(coordinates):
        offset = (coordinates[None] - coordinates[:, None]) // torch.tensor(steps(kind, size, grid)) + size - 1
        down, right = offset.clamp(0, 2 * size - 2).unbind(-1)
        return table[:, down, right]

    normed = layer_norm(x, weights, f"{name}.norm1")
    x = x + dense_attention(normed, weights, f"{name}.attn", heads, label[:, None] == label, bias)
    hidden = linear(layer_norm(x, weights, f"{name}.norm2"), weights, f"{name}.mlp.fc1")
    return x + linear(gelu(hidden), weights, f"{name}.mlp.fc2")


def naive_maxvit(image, weights, depths, heads, size):
    x = gelu(norm(same_conv(image, weights, "stem.conv1", 2), weights, "stem.norm1"))
    x = same_conv(x, weights, "stem.conv2")
    for stage, depth in enumerate(depths):
        for block in range(depth):
            name = f"stages.{stage}.blocks.{block}"
            x = conv_block(x, weights, f"{name}.conv", stride=1 if block else 2).permute(0, 2, 3, 1)
            for kind in ("block", "grid"):
                x = attention_block(x, weights, f"{name}.attn_{kind}", kind, size, heads[stage])
            x = x.permute(0, 3, 1, 2)
    pooled = layer_norm(x.mean((2, 3)), weights, "head.norm")
    return linear(torch.tanh(linear(pooled, weights, "head.pre_logits.fc")), weights, "head.fc")


@pytest.mark.parametrize("size", [(48, 72), (37, 50), (70, 5)])  # divides; clipped windows; an axis shorter than a window
def test_equals_the_definition_on_any_size(size):
    model, weights = tiny()
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = naive_maxvit(image, weights, (1, 2), (2, 4), 3)
    torch.testing.assert_close(model(image), expected, rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------------------------------------------------
# mechanism


def influence(module, grid, dim):
    """Which input tokens change which output tokens: (outputs, inputs)."""
    x = torch.randn(1, *grid, dim, dtype=torch.float64, requires_grad=True)
    y = module(x).flatten(1, 2)
    rows = [torch.autograd.grad(y[0, i].sum(), x, retain_graph=True)[0][0].abs().sum(-1).flatten() for i in range(y.shape[1])]
    return torch.stack(rows) > 1e-13


def test_a_grid_group_is_spread_evenly_and_groups_part_the_map():
    mask = P.Grid(4).mask((12, 8))
    for y in range(12):
        for x in range(8):
            seen = mask[y * 8 + x].reshape(12, 8).nonzero().tolist()
            assert seen == [[y % 3 + 3 * i, x % 2 + 2 * j] for i in range(4) for j in range(4)]
    assert torch.equal(mask, mask.T)
    assert torch.equal(mask, (mask.float() @ mask.float()) > 0)


@pytest.mark.parametrize(("grid", "everywhere"), [((9, 6), True), ((12, 9), False), ((8, 7), False)])
def test_window_and_grid_together_reach_a_whole_map_that_divides_up_to_their_size_squared(grid, everywhere):
    first, second = tiny()[0].stages[0].blocks
    both = torch.nn.Sequential(first.mixer, second.mixer)
    window = groups("block", 3, grid)
    spread = groups("grid", 3, grid)
    window, spread = window[:, None] == window, spread[:, None] == spread
    assert torch.equal(influence(first.mixer, grid, 8), window)
    assert torch.equal(influence(second.mixer, grid, 8), spread)
    reached = influence(both, grid, 8)
    assert torch.equal(reached, (spread.float() @ window.float()) > 0)
    # every window must hold a token of every grid group: whole windows, no narrower than the spacing of the groups
    assert reached.all() == everywhere


@pytest.mark.slow
def test_attention_cost_is_linear_in_the_image():
    model = create_model(TINY, device="meta")
    pairs = []
    for width in (448, 896, 1792):
        with count() as cost:
            model(torch.empty(1, 3, 224, width, device="meta"))
        pairs.append(cost.pairs)
    assert pairs[2] - pairs[1] == 2 * (pairs[1] - pairs[0])


def test_stochastic_depth_grows_from_published_block_to_published_block():
    model = create_model(TINY, device="meta", depths=(1, 2), dim=32, drop_path_rate=0.5)
    blocks = [block for stage in model.stages for block in stage.blocks]
    assert [block.mixer.drop_path.p for block in blocks] == [0.0, 0.0, 0.25, 0.25, 0.5, 0.5]
    assert [block.mlp.drop_path.p for block in blocks] == [0.0, 0.0, 0.25, 0.25, 0.5, 0.5]
    assert [block.before.drop_path.p for block in blocks[::2]] == [0.0, 0.25, 0.5]
    assert not any(hasattr(block, "before") for block in blocks[1::2])


# --------------------------------------------------------------------------------------------------------------------
# published facts


def test_every_published_name_is_here():
    assert sorted(NAMES) == list_models("maxvit_*")


@pytest.mark.parametrize("name", NAMES)
def test_parameter_counts_equal_the_closed_form_and_the_published(name):
    size, image = name.split("_")[1], int(name.split("_")[3].split(".")[0])
    (stem, first), window, classes = WIDTHS[size], image // 32, 21843 if "21k" in name else 1000
    total = 27 * stem + stem + 2 * stem + 9 * stem**2 + stem
    entering = stem
    for stage, depth in enumerate(DEPTHS[size]):
        dim = first * 2**stage
        for _ in range(depth):
            hidden, squeezed = 4 * dim, dim // 4
            total += 2 * entering + entering * hidden + 2 * hidden + 9 * hidden + 2 * hidden
            total += 2 * hidden * squeezed + squeezed + hidden + hidden * dim + dim
            total += entering * dim + dim if entering != dim else 0
            total += 2 * (12 * dim**2 + 13 * dim + (2 * window - 1) ** 2 * dim // 32)
            entering = dim
    total += 2 * dim + dim**2 + dim + dim * classes + classes
    assert count_parameters(create_model(name, device="meta")) == total == model_card(name).params
    assert total == PUBLISHED.get(name, total)


@pytest.mark.parametrize("name", [f"maxvit_{size}_tf_224" for size in WIDTHS] + ["maxvit_tiny_tf_512"])
def test_multiply_adds_are_the_published_ones(name):
    card = model_card(name)  # the published numbers also count norms and activations
    assert multiply_adds(create_model(name, device="meta"), card.input_size) == pytest.approx(card.gmacs, rel=0.03)


def test_another_window_resizes_both_kinds_of_tables():
    _, weights = tiny()
    wider = create_model(TINY, num_classes=5, dtype=torch.float64, **NARROW | {"window_size": 5})
    assert load_checkpoint(wider, weights) == "timm"
    got = export_state_dict(wider, "timm")
    for kind in ("block", "grid"):
        key = f"stages.1.blocks.1.attn_{kind}.attn.rel_pos.relative_position_bias_table"
        resized = F.interpolate(weights[key][:, None], (9, 9), mode="bicubic")[:, 0]
        torch.testing.assert_close(got[key], resized)


def test_relative_bias_tables_are_kept_from_weight_decay():
    model = create_model(TINY, device="meta")
    assert len(model.no_weight_decay()) == 2 * sum(DEPTHS["tiny"])


# --------------------------------------------------------------------------------------------------------------------
# peers


@pytest.mark.peer
@pytest.mark.parametrize("size", [(48, 72), (46, 48)])  # the second has an odd map where the first stage halves
def test_equals_timm_under_its_weights(size):
    timm = peers.timm()
    theirs = timm.create_model(
        TINY, img_size=size, embed_dim=(16, 32), depths=(1, 2), block_type=("M", "M"), stem_width=8, head_hidden_size=32,
        transformer_dim_head=8, transformer_window_size=(3, 3), num_classes=7,
    ).double()  # fmt: skip
    randomise(theirs)
    ours = create_model(
        TINY, dim=16, head_dim=8, depths=(1, 2), stem_dim=8, window_size=3, num_classes=7, dtype=torch.float64
    ).eval()
    assert load_checkpoint(ours, theirs.state_dict()) == "timm"
    exported = export_state_dict(ours, "timm")
    assert exported.keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, exported[key]) for key, value in theirs.state_dict().items())
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(ours(image), theirs(image), rtol=1e-12, atol=1e-12)
    pooled = ours.forward_head(ours.forward_features(image), pre_logits=True)
    torch.testing.assert_close(pooled, theirs.forward_head(theirs.forward_features(image), pre_logits=True))


@pytest.mark.peer
def test_published_size_equals_timm_with_its_own_initial_weights():
    timm = peers.timm()
    theirs = timm.create_model(TINY).eval()
    ours = create_model(TINY).eval()
    assert load_checkpoint(ours, theirs.state_dict()) == "timm"
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs(image), rtol=1e-5, atol=1e-5)
