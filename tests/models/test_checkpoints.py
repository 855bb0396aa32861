"""Checkpoints: every layout reads and writes, and what does not fit is said, not swallowed."""

import pickle
import re

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from regard import create_model, load_checkpoint
from regard.models import export_state_dict, save_checkpoint
from regard.models.checkpoints import TRANSFORMS, Layout, Rule, block_rules, split_rules

NARROW = {"dim": 8, "head_dim": 4, "depths": (2, 1, 1, 1), "num_classes": 3}
MODELS = {
    "swin_tiny_patch4_window7_224": ("official", "timm"),
    "nat_base": ("official",),
    "dinat_s_tiny": ("official",),
    "biformer_tiny": ("official",),
    "biformer_stl": ("official",),
    "maxvit_tiny_tf_224": ("timm",),
    "sehalonet33ts": ("timm",),
    "davit_tiny": ("official", "timm"),
}


def make(name, **options):
    return create_model(name, **NARROW | options)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(("name", "layout"), [(n, layout) for n, known in MODELS.items() for layout in ("regard", *known)])
def test_what_a_layout_writes_it_reads_back_exactly(name, layout):
    model, other = make(name), make(name)
    written = export_state_dict(model, layout)
    assert len(written) == len(model.state_dict())
    assert layout == "regard" or written.keys() != model.state_dict().keys()
    assert load_checkpoint(other, written) == layout
    assert same(model.state_dict(), other.state_dict())
    assert same(export_state_dict(other, layout), written)


def test_isotropic_names_round_trip():
    options = {"dim": 8, "head_dim": 4, "depth": 3, "num_classes": 3}
    model, other = create_model("nat_isotropic_small", **options), create_model("nat_isotropic_small", **options)
    written = export_state_dict(model, "official")
    assert "layers.2.attn.rpb" in written
    assert load_checkpoint(other, written) == "official"
    assert same(model.state_dict(), other.state_dict())


SHAPES = {
    "query_minus_key_table": (25, 3),
    "conv1x1": (6, 4, 1, 1),
    "convolution": (6, 4, 1, 1),
    "side_by_side": (6, 4, 1, 2),
    "depthwise1x1": (6, 1, 1, 1),
    "channel_map": (1, 6, 1, 1),
    "conv1x1_of_sequence": (6, 4, 1, 1),
    "flat_quadrant": (3, 16),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_invert(name):
    theirs = torch.randn(SHAPES[name])
    ours = TRANSFORMS[name].read(theirs)
    assert torch.equal(TRANSFORMS[name].write(ours), theirs)


def test_a_query_minus_key_table_is_mirrored():
    theirs = torch.randn(9, 2)
    ours = TRANSFORMS["query_minus_key_table"].read(theirs)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):  # key minus query
            assert torch.equal(ours[:, down + 1, right + 1], theirs[(1 - down) * 3 + (1 - right)])


def test_rules_shift_numbers_both_ways_and_the_first_match_wins():
    layout = Layout("x", (Rule("a.{i}.special", "b.{i}.own"), Rule("a.{i}.{name}", "b.{i+1}.{j}.{name}".replace("{j}.", ""))))
    special, deep = layout.rules
    assert layout.read("a.10.special") == ("b.10.own", special)
    assert layout.read("a.10.deep.weight") == ("b.11.deep.weight", deep)
    assert layout.write("b.11.deep.weight") == [("a.10.deep.weight", deep)]
    assert layout.write("b.10.own") == [("a.10.special", special)]
    assert layout.write("b.0.deep.weight") == []
    assert layout.read("ab.1.weight") is None


def test_rules_scale_numbers_both_ways_and_each_reads_its_own_residue():
    rules = (Rule("a.{i}.{j}.first.{name}", "b.{i}.{2j}.{name}"), Rule("a.{i}.{j}.second.{name}", "b.{i}.{2j+1}.{name}"))
    layout = Layout("x", rules)
    first, second = rules
    assert layout.read("a.3.10.first.weight") == ("b.3.20.weight", first)
    assert layout.read("a.3.10.second.weight") == ("b.3.21.weight", second)
    assert layout.write("b.3.20.weight") == [("a.3.10.first.weight", first)]
    assert layout.write("b.3.21.weight") == [("a.3.10.second.weight", second)]
    assert layout.write("b.0.1.weight") == [("a.0.0.second.weight", second)]


def test_rules_of_a_block_read_both_ways_and_its_special_names_come_first():
    special = Rule("attn.table", "mixer.op.bias.table", "query_minus_key_table")
    layout = Layout("theirs", block_rules("layers.{i}.blocks.{j}", "stages.{i}.blocks.{2j+1}", special, mlp="ffn"))
    names = {
        "norm1.weight": "mixer.norm.weight",
        "attn.table": "mixer.op.bias.table",
        "attn.qkv.weight": "mixer.op.qkv.weight",
        "norm2.bias": "mlp.norm.bias",
        "ffn.fc1.weight": "mlp.op.fc1.weight",
    }
    for theirs, ours in names.items():
        theirs, ours = f"layers.1.blocks.2.{theirs}", f"stages.1.blocks.5.{ours}"
        name, rule = layout.read(theirs)
        assert (name, [written for written, _ in layout.write(ours)]) == (ours, [theirs])
        assert rule.transform == ("query_minus_key_table" if theirs.endswith("table") else None)
    assert layout.read("layers.1.blocks.2.mlp.fc1.weight") is None
    without = Layout("theirs", block_rules("a", "b", special, attn=None, mlp=None))
    assert without.read("a.attn.qkv.weight") is None
    assert without.read("a.attn.table")[0] == "b.mixer.op.bias.table"
    assert without.write("b.mlp.op.fc1.weight") == []


def test_parts_of_a_tensor_join_and_split_in_order():
    rules = (*split_rules(3, "a.{part}.w", "b.w", "conv1x1_of_sequence"), *split_rules(3, "a.{part}.n", "b.n"))
    layout = Layout("parts", (*rules, Rule("{name}", "{name}")))
    module = nn.Module()
    module.b, module.own = nn.Module(), nn.Parameter(torch.zeros(2))
    module.b.w = nn.Parameter(torch.arange(12.0).view(6, 2, 1))
    module.b.register_buffer("n", torch.tensor(7))
    written = {key: value.clone() for key, value in export_state_dict(module, layout).items()}
    assert list(written) == ["own", "a.0.w", "a.1.w", "a.2.w", "a.0.n", "a.1.n", "a.2.n"]
    assert written["a.1.w"].flatten().tolist() == [4, 5, 6, 7]
    assert written["a.1.w"].shape == (2, 2, 1, 1)
    assert [written[f"a.{i}.n"].item() for i in range(3)] == [7, 7, 7]
    expected = {key: value.clone() for key, value in module.state_dict().items()}
    nn.init.zeros_(module.b.w)
    assert load_checkpoint(module, dict(reversed(written.items())), layouts=[layout]) == "parts"
    assert same(module.state_dict(), expected)
    with pytest.raises(ValueError, match=r"read as 'parts'\)\. missing: b\.w$"):
        load_checkpoint(module, {key: value for key, value in written.items() if key != "a.1.w"}, layouts=[layout])


@pytest.mark.parametrize("wrap", [lambda d: {"model": d}, lambda d: {"state_dict": {f"module.{k}": v for k, v in d.items()}}])
def test_nested_and_prefixed_dictionaries_are_opened(wrap):
    model, other = make("nat_base"), make("nat_base")
    load_checkpoint(other, wrap(export_state_dict(model, "official")) | {"epoch": 3})
    assert same(model.state_dict(), other.state_dict())


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_files_load_under_any_layout(tmp_path, suffix):
    model, path = make("swin_tiny_patch4_window7_224", pad="mask"), tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        save_checkpoint(model, path, layout="timm")
        assert load_file(path).keys() == export_state_dict(model, "timm").keys()
    else:
        torch.save({"model": export_state_dict(model, "timm"), "epoch": 1}, path)
    loaded = make("swin_tiny_patch4_window7_224", pretrained=path, pad="mask")
    assert same(model.state_dict(), loaded.state_dict())
    on_meta = make("swin_tiny_patch4_window7_224", device="meta", pad="mask")
    load_checkpoint(on_meta, str(path))
    image = torch.randn(1, 3, 40, 48)
    torch.testing.assert_close(on_meta.eval()(image), model.eval()(image))  # its weights lie elsewhere in a cache line


def test_saving_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"old")

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("regard.models.checkpoints.files.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(nn.Linear(2, 2), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_any_module_saves_and_loads_its_own_names(tmp_path):
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    save_checkpoint(first, tmp_path / "linear.safetensors")
    assert load_checkpoint(second, tmp_path / "linear.safetensors") == "regard"
    assert same(first.state_dict(), second.state_dict())


def test_missing_unexpected_and_misshapen_tensors_are_listed_and_nothing_is_loaded():
    model = make("nat_base")
    weights = export_state_dict(make("nat_base"), "official")
    weights["levels.9.strange"] = weights.pop("norm.bias")
    weights["head.weight"] = torch.zeros(7, 64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_checkpoint(model, weights)
    message = str(error.value)
    assert "missing: norm.bias" in message
    assert "unexpected: levels.9.strange" in message
    assert "head.weight (7, 64) instead of (3, 64)" in message
    assert "'official'" in message
    assert same(before, model.state_dict())


def test_a_checkpoint_of_another_family_does_not_load():
    with pytest.raises(ValueError, match=r"missing: .*unexpected: "):
        load_checkpoint(make("nat_base"), export_state_dict(make("biformer_tiny"), "official"))


def test_a_new_classifier_is_kept_only_when_asked_for(tmp_path):
    path = tmp_path / "weights.safetensors"
    published = make("nat_base")
    save_checkpoint(published, path, layout="official")
    model = make("nat_base", num_classes=9, pretrained=path)
    assert model.head.weight.shape == (9, 64)
    assert torch.equal(model.norm.weight, published.norm.weight)
    assert torch.equal(model.stages[3].blocks[0].mlp.op.fc1.weight, published.stages[3].blocks[0].mlp.op.fc1.weight)
    with pytest.raises(ValueError, match=re.escape("head.weight (3, 64) instead of (9, 64)")):
        load_checkpoint(make("nat_base", num_classes=9), path)
    headless = make("nat_base", num_classes=0, pretrained=path)
    assert torch.equal(headless.norm.weight, published.norm.weight)


@pytest.mark.parametrize("layout", ["regard", "official", "timm"])
def test_cut_backbones_load_whole_checkpoints(layout):
    model = make("swin_tiny_patch4_window7_224", pad="mask").eval()
    cut = make("swin_tiny_patch4_window7_224", pad="mask", features_only=True, out_indices=(1, 2)).eval()
    assert load_checkpoint(cut, export_state_dict(model, layout)) == layout
    image = torch.randn(1, 3, 56, 40)
    for ours, whole in zip(cut(image), model.get_intermediate_layers(image, (1, 2), reshape=True), strict=True):
        assert torch.equal(ours, whole)  # bitwise: the same operators on the same shapes


def test_unreadable_files_say_so(tmp_path):
    model = nn.Linear(2, 2)
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        load_checkpoint(model, tmp_path / "none.pth")
    for name in ("cut.safetensors", "cut.pth"):
        (tmp_path / name).write_bytes(b"not a checkpoint")
        with pytest.raises(ValueError, match=re.escape(name)):
            load_checkpoint(model, tmp_path / name)
    with pytest.raises(ValueError, match="no tensors"):
        load_checkpoint(model, {"epoch": 3})
    with pytest.raises(ValueError, match="safetensors"):
        save_checkpoint(model, tmp_path / "weights.pth")


class Payload:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a checkpoint ran code')",))


def test_pickles_that_run_code_are_refused(tmp_path):
    torch.save({"model": Payload()}, tmp_path / "evil.pth")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Payload(), protocol=2))
    for name in ("evil.pth", "evil.pkl"):
        with pytest.raises(ValueError, match="plain data"):
            load_checkpoint(nn.Linear(2, 2), tmp_path / name)


def test_layouts_a_model_does_not_have_are_refused():
    with pytest.raises(ValueError, match=r"'timm' for Backbone; it has regard, official$"):
        export_state_dict(make("nat_base"), "timm")
    with pytest.raises(ValueError, match=r"it has regard$"):
        export_state_dict(make("nat_base", mixer="criss_cross"), "official")
    unnamed = make("nat_base")
    unnamed.register_buffer("extra", torch.zeros(1))
    with pytest.raises(ValueError, match="layout 'official' has no names for extra"):
        export_state_dict(unnamed, "official")
