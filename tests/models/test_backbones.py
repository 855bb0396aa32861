"""What all backbones promise, whatever their table."""

import inspect
from dataclasses import replace

import pytest
import torch

from regard import create_model, list_mixers, list_models
from regard.layers.blocks import DropPath
from regard.layers.stems import ConvDownsample
from regard.models import Backbone, count_parameters, model_card

NARROW = {"dim": 16, "head_dim": 8, "depths": (2, 1, 1, 2), "num_classes": 5}
FAMILIES = {
    "swin": {"name": "swin_tiny_patch4_window7_224"},
    "swin, token": {"name": "swin_tiny_patch4_window7_224", "pad": "token"},
    "swin, timm": {"name": "swin_tiny_patch4_window7_224", "pad": "timm"},
    "dinat": {"name": "dinat_base"},
    "dinat_s": {"name": "dinat_s_tiny", "pad": "token"},
    "biformer": {"name": "biformer_tiny"},
    "biformer_stl": {"name": "biformer_stl", "pad": "token"},
    "davit": {"name": "davit_tiny"},
    "maxvit": {"name": "maxvit_tiny_tf_224", "stem_dim": 8},
    "litv2": {"name": "litv2_small"},
    "transnext": {"name": "transnext_micro"},
    "volo": {"name": "volo_d1_224"},
}
family = pytest.mark.parametrize("family", FAMILIES)


def make(family, **options):
    return create_model(**FAMILIES[family], **NARROW | options)


@family
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (33, 70), (97, 64)])
def test_any_size_gives_finite_logits_and_maps_of_the_stated_reduction(family, size):
    model = make(family).eval()
    image = torch.randn(2, 3, *size)
    assert model(image).isfinite().all()
    for x, info in zip(model.get_intermediate_layers(image, 4, reshape=True), model.feature_info, strict=True):
        assert x.shape == (2, info["num_chs"], *(-(-n // info["reduction"]) for n in size))
        assert x.shape[1] == model.get_submodule(info["module"]).blocks[0].mlp.norm.normalized_shape[0]


@family
def test_images_of_a_batch_do_not_see_each_other(family):
    model = make(family, dtype=torch.float64).eval()
    image = torch.randn(3, 3, 61, 44, dtype=torch.float64)
    torch.testing.assert_close(model(image)[1:2], model(image[1:2]), rtol=1e-12, atol=1e-12)


@family
def test_every_parameter_gets_a_finite_gradient(family):
    model = make(family, drop_path_rate=0.0)
    model(torch.randn(3, 3, 61, 44)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@family
def test_bfloat16_stays_close_to_float32(family):
    model = make(family, layer_scale=0.1) if family == "dinat" else make(family)
    model = model.eval()
    image = torch.randn(2, 3, 61, 44)
    with torch.no_grad():
        expected = model.get_intermediate_layers(image, 1, norm=True)[0]
        got = model.to(torch.bfloat16).get_intermediate_layers(image.bfloat16(), 1, norm=True)[0]
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).norm() < 2e-2 * expected.norm()


@family
def test_autocast_trains_in_bfloat16_and_keeps_float32_parameters(family):
    model = make(family, drop_path_rate=0.0)
    image = torch.randn(2, 3, 61, 44)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(image)
        loss = logits.float().square().sum()
    loss.backward()
    assert logits.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        expected = model.forward_features(image)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = model.forward_features(image)
    assert (got.float() - expected).norm() < 3e-2 * expected.norm()


@family
def test_maps_of_a_cut_backbone_are_those_of_the_whole(family):
    torch.manual_seed(3)
    whole = make(family).eval()
    torch.manual_seed(3)
    cut = make(family, features_only=True, out_indices=(2, -4)).eval()
    image = torch.randn(1, 3, 61, 44)
    maps = cut(image)
    expected = whole.get_intermediate_layers(image, (0, 2), reshape=True)
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))  # bitwise: the same operators on the same shapes
    assert [info["num_chs"] for info in cut.feature_info] == [m.shape[1] for m in maps] == [m.shape[1] for m in expected]
    assert count_parameters(cut) < count_parameters(whole)
    assert len(cut.stages) == 3


@family
def test_meta_models_hold_nothing_and_have_the_same_names(family):
    on_meta, real = make(family, device="meta"), make(family)
    assert all(t.is_meta for t in [*on_meta.parameters(), *on_meta.buffers()])
    assert [(k, v.shape) for k, v in on_meta.state_dict().items()] == [(k, v.shape) for k, v in real.state_dict().items()]


@family
def test_a_seed_decides_everything(family):
    outputs = []
    for _ in range(2):
        torch.manual_seed(5)
        outputs.append(make(family, drop_path_rate=0.5, drop_rate=0.5)(torch.ones(4, 3, 32, 40)))
    assert torch.equal(*outputs)  # bitwise: the same operators on the same shapes


@family
def test_recomputing_blocks_changes_no_gradient(family):
    image = torch.randn(2, 3, 61, 44, dtype=torch.float64)
    gradients = []
    model = make(family, dtype=torch.float64, drop_path_rate=0.0).train()
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(image).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-12, atol=1e-14)


def test_the_classifier_can_be_replaced_and_removed():
    model = make("swin").eval()
    image = torch.randn(1, 3, 40, 40)
    features = model.forward_features(image)
    assert features.shape[-1] == model.num_features == 128
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((1, 2)))
    torch.testing.assert_close(model(image), model.head(pooled))
    model.reset_classifier(11)
    assert model(image).shape == (1, 11)
    model.reset_classifier(0)
    torch.testing.assert_close(model(image), pooled)
    assert model.num_prefix_tokens == 0


def test_intermediate_layers_are_chosen_from_the_end_and_normed_on_request():
    model = make("swin").eval()
    image = torch.randn(1, 3, 40, 56)
    last_two = model.get_intermediate_layers(image, 2, norm=True)
    assert [tuple(x.shape) for x in last_two] == [(1, 12, 64), (1, 4, 128)]
    torch.testing.assert_close(last_two[1].unflatten(1, (2, 2)), model.forward_features(image))
    assert not torch.equal(last_two[1], model.get_intermediate_layers(image, [3])[0])


def test_a_block_that_nothing_stands_before_keeps_width_and_resolution():
    spec = model_card("swin_tiny_patch4_window7_224").table(**{k: v for k, v in NARROW.items() if k != "num_classes"})
    with pytest.raises(ValueError, match="keeps 16 channels and stride 1; got 8 and 1"):
        Backbone(replace(spec, stem_dim=8))
    with pytest.raises(ValueError, match="keeps 32 channels and stride 1; got 16 and 2"):
        Backbone(replace(spec, downsample=None))
    reduced = Backbone(replace(spec, stem_dim=8, first_stride=2, downsample=ConvDownsample))
    assert [info["reduction"] for info in reduced.feature_info] == [8, 16, 32, 64]
    assert [tuple(x.shape[1:3]) for x in reduced.run_stages(torch.randn(1, 3, 64, 40))] == [(8, 5), (4, 3), (2, 2), (1, 1)]


def test_pooling_first_and_a_layer_before_the_logits_are_what_they_say():
    spec = model_card("swin_tiny_patch4_window7_224").table(dim=16, head_dim=8, depths=(1, 1))
    model = Backbone(replace(spec, pool_first=True, pre_logits=6), num_classes=3).eval()
    image = torch.randn(2, 3, 40, 40)
    tokens = model.forward_features(image)
    assert torch.equal(tokens, model.run_stages(image)[-1])  # bitwise: the same operators on the same shapes
    hidden = torch.tanh(model.pre_logits.fc(model.norm(tokens.mean((1, 2)))))
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), hidden)
    torch.testing.assert_close(model(image), model.head(hidden))
    model.reset_classifier(4)
    assert model(image).shape == (2, 4)


def test_drop_path_grows_linearly_with_depth():
    model = make("swin", drop_path_rate=0.5)
    rates = [block.mixer.drop_path.p for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert create_model("swin_base_patch4_window7_224", device="meta").stages[-1].blocks[-1].mlp.drop_path.p == 0.5
    assert all(m.p == 0.0 for m in make("swin", drop_path_rate=0.0).modules() if isinstance(m, DropPath))


def test_linear_layers_start_as_published():
    model = create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1))
    for name, parameter in model.named_parameters():
        if name.endswith(("qkv.weight", "proj.weight", "fc1.weight", "table")) and "stem" not in name:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name
        if name.endswith(("qkv.bias", "fc2.bias", "head.bias")):
            assert not parameter.any(), name


def test_other_channels_and_wrong_images():
    model = make("swin", in_chans=5)
    assert model(torch.randn(1, 5, 32, 32)).shape == (1, 5)
    with pytest.raises(ValueError, match=r"expected images \(batch, 5, height, width\); got \(1, 3, 32, 32\)"):
        model(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="expected images"):
        model(torch.randn(5, 32, 32))


# --------------------------------------------------------------------------------------------------------------------
# mixer=


def test_a_swapped_mixer_is_what_its_options_say():
    model = make("swin", mixer=("neighborhood", {"kernel_size": 5, "dilation": 2}))
    patterns = {repr(block.mixer.op.pattern) for stage in model.stages for block in stage.blocks}
    assert patterns == {"Neighborhood(5, dilation=2)"}
    alternating = make("dinat", mixer=[("window", {"window_size": 4}), ("window", {"window_size": 4, "shift": 2})])
    patterns = [[repr(block.mixer.op.pattern) for block in stage.blocks] for stage in alternating.stages]
    assert patterns[0] == ["Window(4)", "Window(4, shift=2)"]
    assert patterns[1] == ["Window(4)"]


def test_swapping_the_own_mixer_in_changes_nothing():
    torch.manual_seed(1)
    plain = make("swin").eval()
    period = [("window", {"window_size": 7, "shift": 0}), ("window", {"window_size": 7, "shift": 3})]
    torch.manual_seed(1)
    swapped = make("swin", mixer=period).eval()
    image = torch.randn(1, 3, 61, 44)
    assert torch.equal(plain(image), swapped(image))  # bitwise: the same operators on the same shapes


def test_every_mixer_takes_the_device():
    for mixer in list_mixers():
        model = make("swin", mixer=mixer, device="meta")
        assert all(p.is_meta for p in model.parameters()), mixer


def test_the_table_options_of_every_family_are_keywords_with_defaults():
    for name in list_models():
        parameters = inspect.signature(model_card(name).table).parameters.values()
        assert all(p.default is not inspect.Parameter.empty for p in parameters), name
