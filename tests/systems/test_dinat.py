"""NAT and DiNAT (18): dilated neighborhoods equal their definition, published counts, and what the old module did."""

import pytest
import torch
import torch.nn.functional as F
from naive_backbones import (
    conv,
    heads_of,
    layer_norm,
    linear,
    merge_patches,
    mlp,
    multiply_adds,
    patches,
    tiny,
)

from regard import create_model, list_models, load_checkpoint
from regard.models import count_parameters, export_state_dict, model_card

DEEP, SWIN_DEEP = (3, 4, 18, 5), (2, 2, 18, 2)
NAT = {  # dim, depths, mlp ratio, layer scale, kernel, classes
    "nat_mini": (64, (3, 4, 6, 5), 3, False, 7, 1000),
    "nat_tiny": (64, DEEP, 3, False, 7, 1000),
    "nat_small": (96, DEEP, 2, True, 7, 1000),
    "nat_base": (128, DEEP, 2, True, 7, 1000),
    "dinat_mini": (64, (3, 4, 6, 5), 3, False, 7, 1000),
    "dinat_tiny": (64, DEEP, 3, False, 7, 1000),
    "dinat_small": (96, DEEP, 2, False, 7, 1000),
    "dinat_base": (128, DEEP, 2, True, 7, 1000),
    "dinat_large": (192, DEEP, 2, False, 7, 1000),
    "dinat_large_384": (192, DEEP, 2, False, 7, 1000),
    "dinat_large_384_11x11": (192, DEEP, 2, False, 11, 1000),
    "dinat_large_21k": (192, DEEP, 2, False, 7, 21841),
    "dinat_large_21k_11x11": (192, DEEP, 2, False, 11, 21841),
}
LIKE_SWIN = {
    "dinat_s_tiny": "swin_tiny_patch4_window7_224",
    "dinat_s_small": "swin_small_patch4_window7_224",
    "dinat_s_base": "swin_base_patch4_window7_224",
    "dinat_s_large": "swin_large_patch4_window7_224",
    "dinat_s_large_384": "swin_large_patch4_window7_224",
    "dinat_s_large_21k": "swin_large_patch4_window7_224.ms_in22k",
}
ISOTROPIC = {
    "nat_isotropic_small": 384,
    "nat_isotropic_base": 768,
    "dinat_isotropic_small": 384,
    "dinat_isotropic_base": 768,
}
PUBLISHED = {
    "dinat_mini": 19_984_174,
    "dinat_tiny": 27_901_582,
    "dinat_small": 50_719_681,
    "dinat_base": 89_769_652,
    "dinat_large": 200_943_514,
    "dinat_s_tiny": 28_288_354,
    "dinat_s_small": 49_606_258,
    "dinat_s_base": 87_768_224,
    "dinat_s_large": 196_532_476,
}


# --------------------------------------------------------------------------------------------------------------------
# the definition


def neighbours(position, length, kernel, dilation):
    """Coordinates of the keys of one query on one axis, and their offsets in steps of its group."""
    group = list(range(position % dilation, length, dilation))
    inner = group.index(position)
    first = min(max(inner - kernel // 2, 0), max(len(group) - kernel, 0))
    chosen = range(first, min(first + kernel, len(group)))
    return [(group[i], i - inner) for i in chosen]


def neighborhood_attention(x, weights, name, heads, kernel, dilation):
    """One query at a time."""
    q, k, v = (t.unflatten(2, x.shape[1:3]) for t in heads_of(x, weights, f"{name}.qkv", heads))
    table = weights[f"{name}.rpb"]  # (heads, 2K-1, 2K-1) at key minus query
    out = torch.empty_like(q)
    for row in range(x.shape[1]):
        for column in range(x.shape[2]):
            keys = [
                (a, b, da, db)
                for a, da in neighbours(row, x.shape[1], kernel, dilation)
                for b, db in neighbours(column, x.shape[2], kernel, dilation)
            ]
            rows, columns, down, right = (list(axis) for axis in zip(*keys, strict=True))
            bias = table[:, [d + kernel - 1 for d in down], [r + kernel - 1 for r in right]]
            logits = torch.einsum("bhd,bhnd->bhn", q[:, :, row, column], k[:, :, rows, columns]) * q.shape[-1] ** -0.5
            out[:, :, row, column] = torch.einsum("bhn,bhnd->bhd", (logits + bias).softmax(-1), v[:, :, rows, columns])
    return linear(out.permute(0, 2, 3, 1, 4).flatten(3), weights, f"{name}.proj")


def padded_attention(x, weights, name, heads, kernel, dilation):
    """The published module: small maps are filled with zeros up to kernel times dilation, and cropped afterwards."""
    rows, columns = x.shape[1:3]
    x = F.pad(x, [0, 0, 0, max(0, kernel * dilation - columns), 0, max(0, kernel * dilation - rows)])
    return neighborhood_attention(x, weights, name, heads, kernel, dilation)[:, :rows, :columns]


def block(x, weights, name, attention, *arguments):
    gammas = [weights.get(f"{name}.gamma{i}", torch.ones(())) for i in (1, 2)]
    x = x + gammas[0] * attention(layer_norm(x, weights, f"{name}.norm1"), weights, f"{name}.attn", *arguments)
    return x + gammas[1] * mlp(layer_norm(x, weights, f"{name}.norm2"), weights, f"{name}.mlp.fc1", f"{name}.mlp.fc2")


def naive_nat(image, weights, dilations, heads, kernel, attention=neighborhood_attention):
    x = conv(image.permute(0, 2, 3, 1), weights, "patch_embed.proj.0", stride=2)
    x = layer_norm(conv(x, weights, "patch_embed.proj.1", stride=2), weights, "patch_embed.norm")
    for level, steps in enumerate(dilations):
        for index, dilation in enumerate(steps):
            x = block(x, weights, f"levels.{level}.blocks.{index}", attention, heads[level], kernel, dilation)
        if level < len(dilations) - 1:
            name = f"levels.{level}.downsample"
            x = layer_norm(conv(x, weights, f"{name}.reduction", stride=2), weights, f"{name}.norm")
    return linear(layer_norm(x, weights, "norm").mean((1, 2)), weights, "head")


NARROW = {"dim": 8, "head_dim": 4, "depths": (2, 3), "dilations": ((1, 3), (1, 2)), "kernel_size": 3}


@pytest.mark.parametrize("name", ["dinat_mini", "dinat_base"])  # without and with layer scale
def test_equals_the_definition_where_dilations_do_not_divide_the_grid(name):
    model, weights = tiny(name, **NARROW)
    assert any("gamma" in key for key in weights) == (name == "dinat_base")
    image = torch.randn(2, 3, 43, 50, dtype=torch.float64)  # maps of 11 x 13 and 6 x 7
    expected = naive_nat(image, weights, ((1, 3), (1, 2, 1)), (2, 4), 3)
    torch.testing.assert_close(model(image), expected, rtol=1e-12, atol=1e-12)


def test_token_padding_equals_the_published_module_on_small_maps():
    model, weights = tiny("dinat_mini", **NARROW, pad="token")
    image = torch.randn(2, 3, 30, 41, dtype=torch.float64)  # maps of 8 x 11 and 4 x 6: dilated rows are padded to 9 and 6
    expected = naive_nat(image, weights, ((1, 3), (1, 2, 1)), (2, 4), 3, padded_attention)
    torch.testing.assert_close(model(image), expected, rtol=1e-12, atol=1e-12)
    plain, _ = tiny("dinat_mini", **NARROW)
    torch.testing.assert_close(plain(image), naive_nat(image, weights, ((1, 3), (1, 2, 1)), (2, 4), 3), rtol=1e-12, atol=1e-12)
    assert (plain(image) - expected).abs().max() > 1e-3


def test_the_swin_like_variant_equals_the_definition():
    model, weights = tiny("dinat_s_tiny", **NARROW)
    image = torch.randn(2, 3, 38, 46, dtype=torch.float64)  # patches 10 x 12, merged 5 x 6
    x = layer_norm(patches(image, weights, "patch_embed.proj", 4), weights, "patch_embed.norm")
    for level, steps in enumerate(((1, 3), (1, 2, 1))):
        for index, dilation in enumerate(steps):
            name = f"layers.{level}.blocks.{index}"
            x = block(x, weights, name, neighborhood_attention, (2, 4)[level], 3, dilation)
        x = merge_patches(x, weights, "layers.0.downsample") if level == 0 else x
    expected = linear(layer_norm(x, weights, "norm").mean((1, 2)), weights, "head")
    torch.testing.assert_close(model(image), expected, rtol=1e-12, atol=1e-12)


def test_the_isotropic_variant_equals_the_definition():
    model, weights = tiny("dinat_isotropic_small", dim=8, head_dim=4, depth=3, kernel_size=3, patch_size=4)
    image = torch.randn(2, 3, 28, 36, dtype=torch.float64)
    x = layer_norm(patches(image, weights, "patch_embed.proj", 4), weights, "patch_embed.norm")
    for index, dilation in enumerate((1, 2, 1)):
        x = block(x, weights, f"layers.{index}", neighborhood_attention, 2, 3, dilation)
    expected = linear(layer_norm(x, weights, "norm").mean((1, 2)), weights, "head")
    torch.testing.assert_close(model(image), expected, rtol=1e-12, atol=1e-12)


def test_a_kernel_as_large_as_the_map_is_full_attention_with_bias():
    model, weights = tiny("nat_mini", dim=8, head_dim=4, depths=(2,), kernel_size=7, dilations=((1,),))
    x = torch.randn(2, 7, 7, 8, dtype=torch.float64)
    q, k, v = heads_of(x, weights, "levels.0.blocks.0.attn.qkv", 2)
    at = torch.cartesian_prod(torch.arange(7), torch.arange(7))
    step = at[None] - at[:, None] + 6
    table = weights["levels.0.blocks.0.attn.rpb"]
    assert table.shape == (2, 13, 13)
    logits = q @ k.transpose(-1, -2) / 2 + table[:, step[..., 0], step[..., 1]]
    mixed = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2).unflatten(1, (7, 7))
    expected = linear(mixed, weights, "levels.0.blocks.0.attn.proj")
    torch.testing.assert_close(model.stages[0].blocks[0].mixer.op(x), expected, rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------------------------------------------------
# mechanism


def test_the_first_stage_reaches_the_whole_map_from_any_token():
    """Blocks of dilation 1, 8, 1 at 56 x 56; 1 and 8 alone leave every eighth row and column out."""
    stage = create_model("dinat_mini", dim=4, head_dim=4, dtype=torch.float64).stages[0]
    seen_by_axis = [{k for k, _ in neighbours(k0, 56, 7, 8)} for k0 in range(56)]
    for token in ((0, 0), (55, 31), (20, 27)):
        x = torch.randn(1, 56, 56, 4, dtype=torch.float64, requires_grad=True)
        y = x
        for block_ in stage.blocks[:2]:
            y = block_(y)
        reached = torch.autograd.grad(y[0, token[0], token[1]].sum(), x)[0][0].abs().sum(-1) > 0
        expected = torch.zeros(56, 56, dtype=torch.bool)
        for row in seen_by_axis[token[0]]:
            for column in seen_by_axis[token[1]]:
                rows = [k for k, _ in neighbours(row, 56, 7, 1)]
                columns = [k for k, _ in neighbours(column, 56, 7, 1)]
                expected[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
        near = [[k for k, _ in neighbours(n, 56, 7, 1)] for n in token]
        expected[near[0][0] : near[0][-1] + 1, near[1][0] : near[1][-1] + 1] = True  # by the residual
        assert torch.equal(reached, expected)
        assert not reached.all()
        whole = torch.autograd.grad(stage(x)[0, token[0], token[1]].sum(), x)[0][0].abs().sum(-1) > 0
        assert whole.all()


@pytest.mark.parametrize("dilation", [1, 2])
def test_attention_is_translation_equivariant_in_the_interior_only(dilation):
    model, _ = tiny("dinat_mini", dim=8, head_dim=4, depths=(1,), dilations=((dilation,),), kernel_size=3)
    mixer = model.stages[0].blocks[0].mixer.op
    x = torch.randn(1, 16, 16, 8, dtype=torch.float64)
    moved = mixer(x.roll((2, 4), (1, 2))).roll((-2, -4), (1, 2))
    inside = slice(dilation, 16 - dilation - 4)
    torch.testing.assert_close(mixer(x)[:, inside, inside], moved[:, inside, inside], rtol=1e-12, atol=1e-12)
    assert (mixer(x)[:, 0] - moved[:, 0]).abs().max() > 1e-3


# --------------------------------------------------------------------------------------------------------------------
# published facts


def test_every_published_name_is_here():
    assert sorted([*NAT, *LIKE_SWIN, *ISOTROPIC]) == sorted([*list_models("nat_*"), *list_models("dinat_*")])


@pytest.mark.parametrize("name", NAT)
def test_parameter_counts_equal_the_closed_form_and_the_published(name):
    dim, depths, ratio, scaled, kernel, classes = NAT[name]
    total = 27 * dim // 2 + dim // 2 + 9 * dim // 2 * dim + dim + 2 * dim
    for stage, depth in enumerate(depths):
        width = dim * 2**stage
        each = 4 * width**2 + 4 * width + 2 * ratio * width**2 + (ratio + 1) * width + 4 * width + 2 * width * scaled
        total += depth * (each + (2 * kernel - 1) ** 2 * width // 32)
        total += 18 * width**2 + 4 * width if stage < 3 else 2 * width + width * classes + classes
    assert count_parameters(create_model(name, device="meta")) == total == model_card(name).params
    assert total == PUBLISHED.get(name, total)


@pytest.mark.parametrize("name", LIKE_SWIN)
def test_the_swin_like_variants_have_as_many_parameters_as_swin(name):
    total = count_parameters(create_model(name, device="meta"))
    assert total == model_card(name).params == model_card(LIKE_SWIN[name]).params == PUBLISHED.get(name, total)


@pytest.mark.parametrize("name", ISOTROPIC)
def test_isotropic_parameter_counts_equal_the_closed_form(name):
    dim = ISOTROPIC[name]
    total = 768 * dim + dim + 2 * dim + 12 * (12 * dim**2 + 13 * dim + 169 * dim // 32) + 2 * dim + 1000 * dim + 1000
    assert count_parameters(create_model(name, device="meta")) == total == model_card(name).params


@pytest.mark.parametrize("name", [n for n in [*NAT, *LIKE_SWIN, *ISOTROPIC] if n.startswith("dinat") and "21k" not in n])
def test_multiply_adds_are_the_published_ones(name):
    card = model_card(name)
    assert multiply_adds(create_model(name, device="meta"), card.input_size) == pytest.approx(card.gmacs, rel=0.02)


def dilations_of(name):
    model = create_model(name, device="meta")
    return [[block_.mixer.op.pattern.dilation for block_ in stage.blocks] for stage in model.stages]


def test_dilations_alternate_as_published():
    assert dilations_of("dinat_mini") == [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 3, [1] * 5]
    assert dilations_of("dinat_large") == [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 9, [1] * 5]
    assert dilations_of("dinat_large_384") == [[1, 13, 1], [1, 6, 1, 6], [1, 3] * 9, [1] * 5]
    assert dilations_of("dinat_s_small") == [[1, 8], [1, 4], [1, 2] * 9, [1, 1]]
    assert dilations_of("dinat_isotropic_base") == [[1, 2] * 6]
    assert all(set(stage) == {1} for name in ("nat_tiny", "nat_isotropic_small") for stage in dilations_of(name))


def test_layer_scale_starts_at_the_published_value_and_biases_are_kept_from_weight_decay():
    model = create_model("nat_small", dim=8, head_dim=4, depths=(1, 1, 1, 1))
    assert all((p == 1e-5).all() for n, p in model.named_parameters() if n.endswith("gamma"))
    assert {n for n, _ in model.named_parameters() if n.endswith("bias.table")} == model.no_weight_decay()


def test_an_eleven_wide_kernel_takes_the_tables_of_a_seven_wide_one_interpolated():
    options = {"dim": 8, "head_dim": 4, "depths": (1, 1, 1, 1)}
    _, weights = tiny("dinat_large", **options)
    wide = create_model("dinat_large_384_11x11", num_classes=5, dtype=torch.float64, **options)
    assert load_checkpoint(wide, weights) == "official"
    resized = F.interpolate(weights["levels.2.blocks.0.attn.rpb"][None], (21, 21), mode="bicubic")[0]
    torch.testing.assert_close(export_state_dict(wide, "official")["levels.2.blocks.0.attn.rpb"], resized)
