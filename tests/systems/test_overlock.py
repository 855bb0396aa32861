"""OverLoCK (24): kernels made of a context, and three nets of which the last knows what the second saw."""

import pytest
import torch
import torch.nn.functional as F
from naive_backbones import multiply_adds, randomise, tiny
from torch import nn

from regard import create_model, list_models, load_checkpoint
from regard.bench import count
from regard.layers.blocks import DropPath
from regard.layers.context_mixing import ContextMixing
from regard.layers.conv_norm import ConvNorm, DilatedConvNorm, fuse
from regard.models import count_parameters, export_state_dict, model_card
from regard.ops.local.kernels import apply_kernel

DOUBLE = {"dtype": torch.float64}
SIZES = {  # parameters in training; merged and without the overview's classifier; dims, depths, focus depths, focus heads
    "overlock_xt": (17_307_272, 16_453_712, (56, 112, 256, 336), (2, 2, 3, 2), (6, 2), (4, 6)),
    "overlock_t": (34_990_472, 33_467_040, (64, 128, 256, 512), (4, 4, 6, 2), (12, 2), (4, 8)),
    "overlock_s": (58_309_772, 56_156_452, (64, 128, 320, 512), (6, 6, 8, 3), (16, 3), (8, 16)),
    "overlock_b": (98_012_968, 94_942_528, (80, 160, 384, 576), (8, 8, 10, 4), (20, 4), (6, 9)),
}
NARROW = {
    "dims": (8, 12, 16, 24),
    "depths": (1, 1, 2, 1),
    "focus_depths": (2, 2),
    "focus_heads": (2, 1),
    "kernel_sizes": (7, 5, 7, 5),
    "features": 20,
    "auxiliary": True,
}
BRANCHES = {5: ((3, 1), (3, 2)), 7: ((5, 1), (3, 1), (3, 2), (3, 3))}


# --------------------------------------------------------------------------------------------------------------------
# the definition, channels first, with the official names


class Naive:
    def __init__(self, weights):
        self.weights = weights

    def conv(self, x, name, stride=1, dilation=1, groups=1):
        kernel = self.weights[f"{name}.weight"]
        padding = (kernel.shape[-1] - 1) * dilation // 2
        return F.conv2d(x, kernel, self.weights.get(f"{name}.bias"), stride, padding, dilation, groups)

    def wise(self, x, name, dilation=1):
        return self.conv(x, name, dilation=dilation, groups=x.shape[1])

    def batch_norm(self, x, name):
        mean, var, gamma, beta = (
            self.weights[f"{name}.{own}"][:, None, None] for own in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * gamma + beta

    def layer_norm(self, x, name):
        centred = x - x.mean(1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()
        return scaled * self.weights[f"{name}.weight"][:, None, None] + self.weights[f"{name}.bias"][:, None, None]

    def response(self, x, name):
        norms = x.pow(2).sum((2, 3), keepdim=True).sqrt()
        relative = norms / (norms.mean(1, keepdim=True) + 1e-6)
        return x + self.weights[f"{name}.gamma"] * relative * x + self.weights[f"{name}.beta"]

    def affine(self, x, name):
        if f"{name}.weight" not in self.weights:
            return x
        return x * self.weights[f"{name}.weight"][:, 0] + self.weights[f"{name}.bias"][:, None, None]

    def large_kernel(self, x, name):
        y = self.batch_norm(self.wise(x, f"{name}.lk_origin"), f"{name}.origin_bn")
        for k, d in BRANCHES[self.weights[f"{name}.lk_origin.weight"].shape[-1]]:
            y = y + self.batch_norm(self.wise(x, f"{name}.dil_conv_k{k}_{d}", d), f"{name}.dil_bn_k{k}_{d}")
        return y

    def squeeze(self, x, name):
        inner = F.gelu(self.conv(x.mean((2, 3), keepdim=True), f"{name}.proj.1"))
        return x / (1 + torch.exp(-self.conv(inner, f"{name}.proj.3")))

    def mlp(self, x, name, first):
        x = F.gelu(self.conv(x, f"{name}.{first}"))
        x = self.response(x + self.wise(x, f"{name}.{first + 2}"), f"{name}.{first + 3}")
        return self.conv(x, f"{name}.{first + 4}")

    def block(self, x, name):
        x = x + self.wise(x, f"{name}.dwconv")
        y = self.large_kernel(self.layer_norm(x, f"{name}.proj.0"), f"{name}.proj.1")
        y = self.squeeze(self.batch_norm(y, f"{name}.proj.2"), f"{name}.proj.3")
        return self.affine(x, f"{name}.ls") + self.mlp(y, f"{name}.proj", 4)

    def context_mixing(self, tokens, context, values, name, heads):
        """Group by group, token by token, tap by tap."""
        tables = [self.weights[f"{name}.rpb1"], self.weights[f"{name}.rpb2"]]
        sizes = [(table.shape[-1] + 1) // 2 for table in tables]
        grid, largest = values.shape[2:], max(sizes)
        if min(grid) < largest:
            larger = [n * largest // min(grid) for n in grid]
            tokens, context, values = (F.interpolate(t, larger, mode="bilinear") for t in (tokens, context, values))
        channels, rows, columns = values.shape[1:]
        groups = 2 * heads
        scale = (channels // groups) ** -0.5
        q = self.batch_norm(self.conv(tokens, f"{name}.weight_query.0"), f"{name}.weight_query.1")
        pooled = F.adaptive_avg_pool2d(context, 7)
        k = self.batch_norm(self.conv(pooled, f"{name}.weight_key.1"), f"{name}.weight_key.2")
        width = channels // 2 // groups
        out = torch.empty_like(values)
        weight, bias = self.weights[f"{name}.weight_proj.weight"][..., 0, 0], self.weights[f"{name}.weight_proj.bias"]
        for group in range(groups):
            own = slice(group * width, (group + 1) * width)
            for row in range(rows):
                for column in range(columns):
                    affinity = (q[:, own, row, column, None, None] * k[:, own]).sum(1).flatten(1) * scale  # (batch, 49)
                    logits = affinity @ weight.T + bias
                    first_tap = 0
                    for half, (size, table) in enumerate(zip(sizes, tables, strict=True)):
                        top = min(max(row - size // 2, 0), rows - size)
                        left = min(max(column - size // 2, 0), columns - size)
                        scores, seen = [], []
                        at = slice(half * channels // 2 + own.start, half * channels // 2 + own.stop)
                        for i in range(size):
                            for j in range(size):
                                offset = (top + i - row + size - 1, left + j - column + size - 1)
                                scores.append(logits[:, first_tap + i * size + j] + table[(group, *offset)])
                                seen.append(values[:, at, top + i, left + j])
                        share = torch.stack(scores, -1).softmax(-1)
                        out[:, at, row, column] = (share[:, None] * torch.stack(seen, -1)).sum(-1)
                        first_tap += size**2
        return F.adaptive_avg_pool2d(out, grid) if min(grid) < largest else out

    def dynamic_block(self, x, hidden, context, name, heads):
        if f"{name}.x_scale.weight" in self.weights:
            hidden = self.affine(hidden, f"{name}.x_scale") + self.affine(context, f"{name}.h_scale")
        z = torch.cat([x, hidden], 1)
        z = z + self.wise(z, f"{name}.dwconv1")
        normed = self.layer_norm(z, f"{name}.norm1")
        fused = F.gelu(self.batch_norm(self.wise(normed, f"{name}.fusion.0"), f"{name}.fusion.1"))
        values = self.response(self.conv(fused, f"{name}.fusion.3"), f"{name}.fusion.4")
        gate = F.silu(self.batch_norm(self.conv(values, f"{name}.gate.0"), f"{name}.gate.1"))
        local = self.batch_norm(self.large_kernel(values, f"{name}.lepe.0"), f"{name}.lepe.1")
        y = self.context_mixing(*normed.split([x.shape[1], hidden.shape[1]], 1), values, name, heads)
        y = self.batch_norm(self.conv(y, f"{name}.dyconv_proj.0"), f"{name}.dyconv_proj.1") + local
        y = gate * self.squeeze(y, f"{name}.se_layer")
        y = self.conv(self.batch_norm(y, f"{name}.proj.0"), f"{name}.proj.1")
        z = self.affine(z, f"{name}.ls1") + y
        z = z + self.wise(z, f"{name}.dwconv2")
        z = self.affine(z, f"{name}.ls2") + self.mlp(self.layer_norm(z, f"{name}.norm2"), f"{name}.mlp", 0)
        return z.split([x.shape[1], hidden.shape[1]], 1)

    def halve(self, x, name):
        return self.batch_norm(self.conv(x, f"{name}.0", 2), f"{name}.1")

    def network(self, image, depths, focus_depths, focus_heads):
        x = image
        for n in range(4):
            x = self.batch_norm(self.conv(x, f"patch_embed1.{3 * n}", 2 - n % 2), f"patch_embed1.{3 * n + 1}")
            x = F.gelu(x) if n < 3 else x
        maps = []
        for stage, depth in enumerate(depths, start=1):
            x = self.halve(x, f"patch_embed{stage}") if stage > 1 else x
            for block in range(depth):
                x = self.block(x, f"blocks{stage}.{block}")
            maps.append(x)
        *_, x, overview = maps
        context = self.conv(overview, "high_level_proj")
        wide = F.interpolate(context, x.shape[2:], mode="bilinear")
        hidden = wide
        for block in range(focus_depths[0]):
            x, hidden = self.dynamic_block(x, hidden, wide, f"sub_blocks3.{block}", focus_heads[0])
        maps[2] = torch.cat([x, hidden], 1)
        x, hidden = self.halve(x, "patch_embedx.x_proj"), self.halve(hidden, "patch_embedx.h_proj")
        for block in range(focus_depths[1]):
            x, hidden = self.dynamic_block(x, hidden, context, f"sub_blocks4.{block}", focus_heads[1])
        maps[3] = torch.cat([x, hidden], 1)
        features = F.silu(self.batch_norm(self.conv(maps[3], "head.0"), "head.1"))
        logits = self.conv(features.mean((2, 3), keepdim=True), "head.4").flatten(1)
        both = self.batch_norm(overview, "aux_head.0").mean((2, 3), keepdim=True)
        return logits, self.conv(both, "aux_head.2").flatten(1), maps


@pytest.mark.parametrize("size", [(99, 161), (75, 101)])  # maps of 7 x 11 and 4 x 6; 5 x 7 and 3 x 4: enlarged
def test_equals_the_definition_on_odd_sizes(size):
    model, weights = tiny("overlock_xt", **NARROW)
    image = torch.randn(2, 3, *size, **DOUBLE)
    tables = [NARROW[name] for name in ("depths", "focus_depths", "focus_heads")]
    with torch.no_grad():
        logits, overview, maps = Naive(weights).network(image, *tables)
        torch.testing.assert_close(model(image), logits, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(model.forward_both(image), (logits, overview), rtol=1e-10, atol=1e-10)
        for got, expected in zip(model.get_intermediate_layers(image, 4, reshape=True), maps, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert (logits[0] - logits[1]).abs().max() > 0.01


# --------------------------------------------------------------------------------------------------------------------
# mechanism


def mixing(groups=2, kernel_size=7):
    return randomise(ContextMixing(8, 3, groups, kernel_size, **DOUBLE))


def test_a_constant_affinity_makes_a_depthwise_convolution_moved_inward_at_borders():
    mixer = mixing()
    with torch.no_grad():
        for value in (mixer.query.conv.weight, mixer.query.norm.bias, mixer.query.norm.running_mean):
            value.zero_()
        mixer.bias_small.table.zero_()
        mixer.bias_large.table.zero_()
        x, values = torch.randn(2, 9, 11, 8, **DOUBLE), torch.randn(2, 9, 11, 8, **DOUBLE)
        y = mixer(x, torch.randn(2, 9, 11, 3, **DOUBLE), values)
        parts = zip(y.chunk(2, -1), values.chunk(2, -1), mixer.taps.bias.split([25, 49]), (5, 7), strict=True)
        for got, half, bias, size in parts:
            kernel = bias.softmax(-1).reshape(1, 1, size, size).expand(4, 1, size, size)
            inside = F.conv2d(half.movedim(-1, 1), kernel, groups=4)  # what whole kernels give, repeated at the borders
            moved = F.pad(inside, [size // 2] * 4, mode="replicate").movedim(1, -1)
            torch.testing.assert_close(got, moved, rtol=1e-12, atol=1e-12)


def test_kernels_moved_inward_equal_unfolding_without_padding_and_repeating_the_border():
    values, weights = torch.randn(2, 8, 9, 2, 3, **DOUBLE), torch.randn(2, 8, 9, 2, 25, **DOUBLE)
    windows = F.unfold(values.flatten(3).movedim(-1, 1), 5).reshape(2, -1, 4, 5)
    windows = F.pad(windows, [2] * 4, mode="replicate").unflatten(1, (2, 3, 25))
    expected = torch.einsum("bhwgk,bgckhw->bhwgc", weights, windows)
    torch.testing.assert_close(apply_kernel(values, weights, 5, border="shift"), expected)


def test_kernels_are_shares_that_follow_the_context():
    mixer = mixing()
    tokens, context = torch.randn(1, 9, 8, 8, **DOUBLE), torch.randn(1, 9, 8, 3, **DOUBLE)
    small, large = mixer.kernels(tokens, context)
    assert small.shape == (1, 9, 8, 2, 25)
    assert large.shape == (1, 9, 8, 2, 49)
    for kernel in (small, large):
        torch.testing.assert_close(kernel.sum(-1), torch.ones(1, 9, 8, 2, **DOUBLE))
    far = context.clone()
    far[0, 8, 7] += 5.0  # all kernels change, that of the opposite corner too
    for before, after in zip((small, large), mixer.kernels(tokens, far), strict=True):
        assert ((before - after).abs().amax(-1) > 1e-9).all()


def test_small_maps_are_enlarged_until_the_short_side_fits_and_averaged_back():
    mixer = mixing()
    assert [mixer.working_grid(grid) for grid in ((3, 5), (6, 4), (2, 2), (7, 30))] == [(7, 11), (10, 7), (7, 7), (7, 30)]
    inputs = [torch.randn(1, 3, 5, width, **DOUBLE) for width in (8, 3, 8)]
    larger = [F.interpolate(t.movedim(-1, 1), (7, 11), mode="bilinear").movedim(1, -1) for t in inputs]
    expected = F.adaptive_avg_pool2d(mixer(*larger).movedim(-1, 1), (3, 5)).movedim(1, -1)
    torch.testing.assert_close(mixer(*inputs), expected)


def test_the_focus_learns_of_every_pixel_through_the_context():
    model, _ = tiny("overlock_xt", **NARROW)
    image = torch.randn(1, 3, 96, 128, **DOUBLE, requires_grad=True)
    *_, x, overview = model.run_base(image)
    y = model.focus(x.detach(), overview)[-1]
    (reached,) = torch.autograd.grad(y[0, 0, 0].sum(), image)
    assert (reached.abs().sum(1) > 0).all()


def test_heads_are_doubled_and_the_context_is_a_quarter_of_the_overview():
    model = create_model("overlock_xt", device="meta")
    for stage, groups, dim in zip(model.focus.stages, (8, 12), (256, 336), strict=True):
        for block in stage.blocks:
            assert (block.mixer.groups, block.mixer.dim, block.mixer.context_dim) == (groups, dim, 84)
            assert block.mixer.scale == (dim // groups) ** -0.5
    assert [block.hidden_scale is None for stage in model.focus.stages for block in stage.blocks] == [True] + [False] * 7


def test_only_the_coarser_half_scales_its_shortcuts_starting_from_1():
    model = create_model("overlock_xt", **NARROW)
    scaled = [[not isinstance(block.scale, nn.Identity) for block in stage.blocks] for stage in model.stages]
    assert scaled == [[False], [False], [True, True], [True]]
    block = model.focus.stages[0].blocks[1]
    for scale in (model.stages[2].blocks[0].scale, block.scale1, block.scale2, block.hidden_scale, block.context_scale):
        assert (scale.weight == 1).all()
        assert (scale.bias == 0).all()
    with torch.no_grad():  # the shortcut is what is scaled, not the branch
        block = model.stages[2].blocks[0].eval()
        x = torch.randn(1, 5, 6, 16)
        branch = block(x) - block.position(x)
        block.scale.weight.fill_(3.0)
        torch.testing.assert_close(block(x), 3 * block.position(x) + branch)


# --------------------------------------------------------------------------------------------------------------------
# merging


def test_fusing_folds_the_dilated_kernels_and_changes_no_logit():
    image = torch.randn(2, 3, 75, 101)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        model = randomise(create_model("overlock_xt", num_classes=5, dtype=dtype, **NARROW))
        with torch.no_grad():
            expected = model(image.to(dtype))
            fused = fuse(model)
            torch.testing.assert_close(fused(image.to(dtype)), expected, rtol=tolerance, atol=tolerance)
        assert not any(isinstance(m, (ConvNorm, DilatedConvNorm)) for m in fused.modules())


@pytest.mark.slow
def test_the_merged_table_holds_the_kernels_that_merging_gives():
    model, _ = tiny("overlock_xt", **NARROW)
    merged = create_model("overlock_xt_reparam", num_classes=5, **NARROW, **DOUBLE).eval()
    weights = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, DilatedConvNorm):
            weights = {key: value for key, value in weights.items() if not key.startswith(f"{name}.")}
            weights |= {f"{name}.{key}": value for key, value in module.fuse().state_dict().items()}
    merged.load_state_dict(weights)
    image = torch.randn(1, 3, 75, 101, **DOUBLE)
    torch.testing.assert_close(merged(image), model(image), rtol=1e-11, atol=1e-11)
    official = export_state_dict(merged, "official")
    assert {"blocks1.0.proj.1.lk_origin.bias", "sub_blocks4.1.lepe.0.lk_origin.weight"} <= official.keys()
    again = create_model("overlock_xt_reparam", num_classes=5, **NARROW, **DOUBLE)
    assert load_checkpoint(again, official) == "official"
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in weights.items())


# --------------------------------------------------------------------------------------------------------------------
# outside


def test_training_gives_the_overview_logits_of_its_own_and_every_parameter_a_gradient():
    model = create_model("overlock_xt", num_classes=5, drop_path_rate=0.0, **NARROW).train()
    logits, overview = model.forward_both(torch.randn(2, 3, 75, 101))
    labels = torch.tensor([1, 3])
    (F.cross_entropy(logits, labels) + 0.4 * F.cross_entropy(overview, labels)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    for without in (
        create_model("overlock_xt", **NARROW | {"auxiliary": False}),
        create_model("overlock_xt", num_classes=0, **NARROW),
    ):
        with pytest.raises(ValueError, match="auxiliary=True"):
            without.forward_both(torch.randn(1, 3, 64, 64))


def test_stochastic_depth_grows_along_base_overview_and_focus():
    model = create_model("overlock_xt", drop_path_rate=0.32, **NARROW)
    rates = [module.p for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.04 * i for i in range(9)])
    assert model.focus.stages[1].blocks[1].drop_path.p == pytest.approx(0.32)
    assert create_model("overlock_b", device="meta").focus.stages[1].blocks[3].drop_path.p == 0.5


def test_checkpointing_changes_no_gradient():
    image = torch.randn(2, 3, 64, 64, **DOUBLE)
    gradients = []
    for enable in (False, True):
        torch.manual_seed(3)
        model = create_model("overlock_xt", num_classes=5, drop_path_rate=0.0, **NARROW, **DOUBLE).train()
        model.set_grad_checkpointing(enable)
        assert all(stage.grad_checkpointing == enable for stage in (*model.stages, *model.focus.stages))
        model(image).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("indices", [(0, 1), (1, 2), (0, 1, 2, 3)])
def test_feature_maps_are_those_of_the_focus_with_their_context(indices):
    model, _ = tiny("overlock_xt", **NARROW)
    cut = create_model("overlock_xt", features_only=True, out_indices=indices, **NARROW, **DOUBLE).eval()
    assert load_checkpoint(cut, model.state_dict()) == "regard"
    image = torch.randn(1, 3, 75, 101, **DOUBLE)
    maps = cut(image)
    expected = model.get_intermediate_layers(image, indices, reshape=True)
    for got, whole, info in zip(maps, expected, cut.feature_info, strict=True):
        torch.testing.assert_close(got, whole, rtol=1e-12, atol=1e-12)
        assert got.shape[1] == info["num_chs"]
        assert got.shape[2:] == tuple(-(-side // info["reduction"]) for side in (75, 101))
    assert [info["num_chs"] for info in cut.feature_info] == [(8, 12, 16 + 6, 24 + 6)[i] for i in indices]
    unused = [name for name, value in cut.named_parameters() if not value.requires_grad]
    assert not unused
    sum(m.square().sum() for m in maps).backward()
    assert all(p.grad is not None for p in cut.parameters())


def test_another_mixer_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="it takes no other mixer; got 'window'"):
        create_model("overlock_xt", mixer="window")
    with pytest.raises(ValueError, match=r"must be four.*\(8, 16\)"):
        create_model("overlock_xt", dims=(8, 16))


def test_classifiers_can_be_replaced_and_removed():
    model, weights = tiny("overlock_xt", **NARROW)
    headless = create_model("overlock_xt", num_classes=0, **NARROW, **DOUBLE).eval()
    assert load_checkpoint(headless, weights) == "official"
    image = torch.randn(1, 3, 64, 64, **DOUBLE)
    torch.testing.assert_close(headless(image), model.forward_features(image).mean((1, 2)))
    assert headless(image).shape == (1, 20)
    headless.reset_classifier(3)
    assert [each.shape for each in headless.forward_both(image)] == [(1, 3), (1, 3)]
    single = create_model("overlock_xt", num_classes=5, **NARROW | {"auxiliary": False}, **DOUBLE).eval()
    load_checkpoint(single, weights)
    torch.testing.assert_close(single(image), model(image))
    other = create_model("overlock_xt", num_classes=4, **NARROW, **DOUBLE)
    load_checkpoint(other, weights, new_head=True)
    assert torch.equal(other.focus.context.weight, model.focus.context.weight)


# --------------------------------------------------------------------------------------------------------------------
# published facts


def test_every_published_size_is_here():
    assert sorted([*SIZES, *(f"{name}_reparam" for name in SIZES)]) == list_models("overlock_*")


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_the_published_ones_in_training_and_for_inference(name):
    training, inference, dims, depths, focus_depths, focus_heads = SIZES[name]
    model = create_model(name, auxiliary=True, device="meta")
    assert count_parameters(model) == training
    assert model_card(name).params == training - count_parameters(model.aux_head)
    assert count_parameters(create_model(name, merged=True, auxiliary=False, device="meta")) == inference
    reparam = f"{name}_reparam"
    published = count_parameters(create_model(reparam, auxiliary=True, device="meta"))
    assert published == inference + count_parameters(model.aux_head)
    assert model_card(reparam).params == count_parameters(create_model(reparam, device="meta")) == inference
    assert tuple(zip(*((s.dim, s.depth) for s in model.spec.stages), strict=True)) == (dims, depths)
    assert (model.spec.focus_depths, model.spec.focus_heads) == (focus_depths, focus_heads)
    assert [s.period[0].options["kernel_size"] for s in model.spec.stages] == [17, 15, 13, 7]


@pytest.mark.parametrize("name", ["overlock_xt", "overlock_b"])
def test_multiply_adds_are_near_the_published_ones(name):
    model = create_model(name, merged=True, auxiliary=False, device="meta")
    mixers = [(side, block.mixer) for stage, side in zip(model.focus.stages, (14, 7), strict=True) for block in stage.blocks]
    affinities = sum(side**2 * 49 * mixer.dim // 2 for side, mixer in mixers)
    with count() as kernels:  # the release's counter sees the affinities, but not the kernels that are made of them
        model.eval()(torch.empty(1, 3, 224, 224, device="meta"))
    assert multiply_adds(model, 224) + (affinities - kernels.flops / 2) / 1e9 == pytest.approx(model_card(name).gmacs, rel=0.03)


def test_official_names_are_those_of_the_release():
    model, weights = tiny("overlock_xt", **NARROW)
    shapes = {
        "patch_embed1.0.weight": (4, 3, 3, 3),
        "blocks1.0.proj.1.lk_origin.weight": (8, 1, 7, 7),
        "blocks1.0.proj.1.dil_conv_k5_1.weight": (8, 1, 5, 5),
        "blocks3.1.proj.7.gamma": (1, 64, 1, 1),
        "blocks4.0.ls.weight": (24, 1, 1, 1),
        "sub_blocks3.0.weight_query.0.weight": (8, 16, 1, 1),
        "sub_blocks3.0.weight_key.1.weight": (8, 6, 1, 1),
        "sub_blocks3.1.weight_proj.weight": (25 + 49, 49, 1, 1),
        "sub_blocks3.1.rpb1": (4, 9, 9),
        "sub_blocks4.0.rpb2": (2, 9, 9),
        "sub_blocks4.1.x_scale.bias": (6,),
        "sub_blocks4.1.lepe.0.dil_bn_k3_2.running_var": (24,),
        "high_level_proj.weight": (6, 24, 1, 1),
        "patch_embedx.x_proj.0.weight": (24, 16, 3, 3),
        "aux_head.2.weight": (5, 24, 1, 1),
        "head.0.weight": (20, 30, 1, 1),
        "head.4.weight": (5, 20, 1, 1),
    }
    assert {name: tuple(weights[name].shape) for name in shapes} == shapes
    assert "sub_blocks3.0.x_scale.weight" not in weights
    assert "blocks1.0.ls.weight" not in weights
    other = create_model("overlock_xt", num_classes=5, **NARROW, **DOUBLE)
    assert load_checkpoint(other, {"state_dict": weights}) == "official"
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


def test_tables_of_offsets_are_kept_from_weight_decay():
    model = create_model("overlock_xt", device="meta", **NARROW)
    names = {
        f"focus.stages.{i}.blocks.{j}.mixer.bias_{kind}.table" for i in (0, 1) for j in (0, 1) for kind in ("small", "large")
    }
    assert model.no_weight_decay() == names
    assert names <= dict(model.named_parameters()).keys()
