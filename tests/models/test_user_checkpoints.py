"""Checkpoints as users have them: wrapped, averaged, prefixed, of other sizes, damaged; each loads or is refused."""

import argparse
import collections
import enum
import os
import pathlib
import re
import struct

import numpy as np
import pytest
import torch
from torch import nn

from regard import create_mixer, create_model, load_checkpoint
from regard.models import export_state_dict, save_checkpoint
from regard.models.checkpoints import read_state_dict

VIT = {"depth": 2, "dim": 32, "head_dim": 16, "num_classes": 5, "image_size": 64}
NARROW = {"dim": 8, "head_dim": 4, "depths": (2, 1, 1, 1), "num_classes": 3}


def vit(seed=0, name="vit_tiny_patch16_224", **options):
    torch.manual_seed(seed)
    return create_model(name, **VIT | options)


def narrow(name, **options):
    torch.manual_seed(0)
    return create_model(name, **NARROW | options)


def official(model):
    return export_state_dict(model, "official")


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


def image(*shape):
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))


# ----- where the weights are

WEIGHTS, OLD = official(vit()), official(vit(1))
HEAD = {"weight": WEIGHTS["head.weight"], "bias": WEIGHTS["head.bias"]}


def under(prefix, weights):
    return {prefix + key: value for key, value in weights.items()}


@pytest.mark.parametrize(
    "content",
    [
        {"model_ema": WEIGHTS, "model": OLD, "epoch": 1},
        {"model": OLD, "state_dict_ema": WEIGHTS},
        {"params": OLD, "params_ema": WEIGHTS},
        {"ema": {"state_dict": WEIGHTS, "decay": 0.99}, "model": OLD},
        {"model_state_dict": WEIGHTS, "optimizer_state_dict": {"state": {0: {"exp_avg": torch.ones(2)}}}},
        {"net": WEIGHTS, "acc": 0.9},
        {"weights": WEIGHTS},
        {"backbone": WEIGHTS},
        {"anything": {"inside": WEIGHTS}, "epoch": 4, "optimizer": {"state": {}}},
        {"student": under("module.backbone.", OLD), "teacher": under("backbone.", WEIGHTS)},
        under("teacher.backbone.", WEIGHTS) | under("student.backbone.", OLD),
        under("student.backbone.", OLD) | under("teacher.backbone.", WEIGHTS),
        under("model.", OLD) | under("model_ema.", WEIGHTS),
        {"n_averaged": torch.tensor(3)} | under("module.", WEIGHTS),
        {"state_dict": under("m.", WEIGHTS), "hyper_parameters": {"lr": 0.1}, "pytorch-lightning_version": "2"},
        {"state_dict": under("encoder.backbone.net.", WEIGHTS)},
        {f"model.{k.replace('blocks.0.', 'blocks.0._orig_mod.')}": v for k, v in WEIGHTS.items()},
        {"model": {"backbone": {k: v for k, v in WEIGHTS.items() if "head" not in k}, "head": HEAD}},
    ],
    ids=lambda content: "+".join(list(content)[:2])[:40],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:left out")
def test_weights_are_found_wherever_training_programs_put_them(content):
    model = vit(2)
    assert load_checkpoint(model, content) == "official"
    assert same(model, vit())


def test_an_entry_or_a_prefix_can_be_named():
    nested = {"model": WEIGHTS, "model_ema": OLD, "nets": {"a": WEIGHTS, "b": OLD}}
    flat = {f"one.{k}": v for k, v in OLD.items()} | {f"two.net.{k}": v for k, v in WEIGHTS.items()}
    for content, key in ((nested, "model"), (nested, "nets.a"), (flat, "two"), (flat, "two.net")):
        model = vit(2)
        load_checkpoint(model, content, key=key)
        assert same(model, vit()), key
    with pytest.raises(ValueError, match=r"no entry 'c' that holds tensors; its keys are model"):
        load_checkpoint(vit(), nested, key="c")
    with pytest.raises(ValueError, match=r"several sets of tensors: a, b; name one, key='a'"):
        load_checkpoint(vit(), nested["nets"])
    with pytest.raises(ValueError, match=r"What begins with \w+ has no place in this model: .* name it by key="):
        load_checkpoint(vit(), flat)


def test_projection_heads_of_self_supervised_runs_are_left_out_and_said():
    source = vit(name="dino_vits16", num_classes=0)
    head = {"head.mlp.0.weight": torch.ones(3, 3), "head.last_layer.weight_v": torch.ones(3, 3)}
    model = vit(1, "dino_vits16", num_classes=0)
    with pytest.warns(UserWarning, match=r"left out of the checkpoint: head\.mlp\.0\.weight, head\.last_layer\.weight_v$"):
        load_checkpoint(model, {"teacher": {f"backbone.{k}": v for k, v in official(source).items()} | head})
    assert same(model, source)
    with pytest.raises(ValueError, match=r"unexpected: strange\.weight"):
        load_checkpoint(model, official(source) | {"strange.weight": torch.ones(1)})


class Config(dict):
    pass


class Things(list):
    pass


class Colour(enum.Enum):
    RED = 1


def ran(*_):
    raise SystemExit("a checkpoint ran code")


class Payload:
    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "beside",
    [
        argparse.Namespace(lr=1e-3, out=pathlib.Path("x")),
        [np.float64(3), np.arange(3), np.dtype("f4")],
        Config(a=Config(b=1)),
        Things([1, 2]),
        Colour.RED,
        collections.defaultdict(list, {"a": [1]}),
        Payload(ran, 1),
    ],
    ids=["namespace", "numpy", "dictionary", "list", "enumeration", "defaultdict", "function"],
)
def test_what_stands_beside_the_weights_is_passed_over_and_never_run(beside, zipped, tmp_path):
    torch.save({"model": WEIGHTS, "args": beside}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    before = set(torch.serialization.get_safe_globals())
    model = vit(1)
    load_checkpoint(model, tmp_path / "a.pth")
    assert same(model, vit())
    assert set(torch.serialization.get_safe_globals()) == before


def test_weights_in_a_dictionary_of_another_program_are_read(tmp_path):
    torch.save(Config(state_dict=Config(WEIGHTS)), tmp_path / "a.pth")
    assert read_state_dict(tmp_path / "a.pth").keys() == WEIGHTS.keys()


# ----- other sizes


def test_a_headless_checkpoint_goes_into_a_classifier_when_asked(tmp_path):
    headless = {key: value for key, value in WEIGHTS.items() if not key.startswith("head")}
    model = vit(1, num_classes=7)
    own = model.head.weight.clone()
    with pytest.raises(ValueError, match=r"missing: head\.weight, head\.bias\. .* new_head=True"):
        load_checkpoint(model, headless)
    load_checkpoint(model, headless, new_head=True)
    assert torch.equal(model.head.weight, own)
    assert torch.equal(model.positions.table, vit().positions.table)
    torch.save(headless, tmp_path / "a.pth")
    assert torch.equal(vit(1, pretrained=tmp_path / "a.pth", num_classes=7).norm.weight, vit().norm.weight)


@pytest.mark.parametrize("size", [32, 96])
def test_positions_of_another_image_size_are_resized_as_at_run_time(size, tmp_path):
    source = vit(num_classes=0).eval()
    save_checkpoint(source, tmp_path / "a.safetensors", layout="timm")
    model = vit(1, pretrained=tmp_path / "a.safetensors", image_size=size, num_classes=0).eval()
    assert model.positions.table.shape[1] == 1 + (size // 16) ** 2
    x = image(3, size, size)
    torch.testing.assert_close(model(x), source(x))


def test_positions_that_are_no_square_grid_are_refused():
    weights = WEIGHTS | {"pos_embed": torch.zeros(1, 1 + 15, 32)}
    with pytest.raises(
        ValueError, match=r"positions\.table \(1, 16, 32\) instead of \(1, 17, 32\) \(expected .* square grid\)"
    ):
        load_checkpoint(vit(), weights)


def test_grey_images_sum_the_kernels_of_the_first_convolution():
    source, model = vit().eval(), vit(1, in_chans=1).eval()
    load_checkpoint(model, official(source))
    x = image(1, 64, 64)
    torch.testing.assert_close(model(x), source(x.expand(1, 3, 64, 64)))


@pytest.mark.parametrize(("before", "after"), [(3, 4), (3, 6), (1, 3), (4, 3)])
def test_other_channels_repeat_the_kernels_and_keep_the_response(before, after):
    source, model = vit(in_chans=before), vit(1, in_chans=after)
    load_checkpoint(model, official(source))
    ours, theirs = model.stem.proj.weight, source.stem.proj.weight
    for channel in range(after):
        torch.testing.assert_close(ours[:, channel], theirs[:, channel % before] * before / after)


def test_a_bias_table_that_is_no_square_is_refused_by_name():
    model = narrow("swin_tiny_patch4_window7_224")
    key = "layers.0.blocks.0.attn.relative_position_bias_table"
    weights = official(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"unreadable: {re.escape(key)} \(117, 2\) \(its 117 entries are no square"):
        load_checkpoint(model, weights | {key: torch.zeros(117, 2)})
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# ----- padding

PADDED = ["swin_tiny_patch4_window7_224", "davit_tiny", "dinat_mini", "dinat_s_tiny", "biformer_tiny", "litv2_small"]


@pytest.mark.parametrize("name", PADDED)
def test_official_weights_bring_the_padding_of_the_official_code(name, tmp_path):
    small = {"head_dim": 8, "dim": 16} if name == "litv2_small" else {}
    source = narrow(name, **small)
    for parameter in source.parameters():
        nn.init.normal_(parameter, std=0.3)
    save_checkpoint(source, tmp_path / "ours.safetensors")
    token, mask = narrow(name, pad="token", **small).eval(), narrow(name, pad="mask", **small).eval()
    loaded, kept = narrow(name, **small).eval(), narrow(name, **small).eval()
    assert kept.pad == "mask"
    for model in (token, mask, loaded):
        load_checkpoint(model, official(source))
    load_checkpoint(kept, tmp_path / "ours.safetensors")
    differs = False
    for height, width in ((256, 320), (208, 176)):
        x = image(3, height, width)
        with torch.no_grad():
            outputs = [model(x) for model in (token, mask, loaded, kept)]
        # the same operators on the same numbers: bitwise by construction
        assert torch.equal(outputs[2], outputs[0])
        assert torch.equal(outputs[3], outputs[1])
        differs |= not torch.allclose(outputs[0], outputs[1], rtol=1e-3)
    assert differs


def test_padding_is_kept_in_files_of_save_checkpoint_and_the_callers_choice_stays(tmp_path):
    name = "swin_tiny_patch4_window7_224"
    for layout in ("regard", "official", "timm"):
        save_checkpoint(narrow(name, pad="mask"), tmp_path / "mask.safetensors", layout=layout)
        save_checkpoint(narrow(name, pad="token"), tmp_path / "token.safetensors", layout=layout)
        assert narrow(name, pretrained=tmp_path / "mask.safetensors").pad == "mask"
        assert narrow(name, pretrained=tmp_path / "token.safetensors").pad == "token"
        assert narrow(name, pretrained=tmp_path / "token.safetensors", pad="timm").pad == "timm"
        assert narrow(name, pretrained=tmp_path / "token.safetensors", features_only=True).pad == "token"
    model = narrow(name)
    load_checkpoint(model, export_state_dict(narrow(name), "timm"))
    assert model.pad == "timm"
    load_checkpoint(model, narrow(name).state_dict())  # bare tensors under our own names say nothing
    assert model.pad == "timm"
    mixed = narrow(name, mixer=[("window", {"window_size": 3, "pad": "token"}), "neighborhood"])
    save_checkpoint(mixed, tmp_path / "mixed.safetensors")
    load_checkpoint(mixed, tmp_path / "mixed.safetensors")
    assert [block.mixer.op.pad for block in mixed.stages[0].blocks] == ["token", "mask"]


# ----- what is refused


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda w: w.index_put((torch.tensor(0),), torch.tensor(float("nan"))), "not finite"),
        (lambda w: w.index_put((torch.tensor(0),), torch.tensor(float("-inf"))), "not finite"),
        (lambda w: w > 0, "bool where real numbers are needed"),
        (lambda w: w.long(), "int64 where real numbers are needed"),
        (lambda w: w.to(torch.complex64), "complex64 where real numbers are needed"),
        (lambda w: w.to_sparse(), "sparse_coo"),
        (lambda w: w.to("meta"), "on the meta device"),
    ],
)
def test_tensors_that_are_no_weights_are_named_and_nothing_is_loaded(change, why):
    model = vit(1)
    for key, ours in (("blocks.1.mlp.fc1.weight", "stages.0.blocks.1.mlp.op.fc1.weight"), ("pos_embed", "positions.table")):
        with pytest.raises(ValueError, match=rf"no weights: {re.escape(ours)} \({why}") as error:
            load_checkpoint(model, WEIGHTS | {key: change(WEIGHTS[key])})
        assert "\n" not in str(error.value)
    assert same(model, vit(1))


def test_real_numbers_for_whole_ones_are_refused_and_half_precision_loads():
    model = narrow("nat_base")
    load_checkpoint(model, {key: value.half() for key, value in official(model).items()})
    model = nn.BatchNorm1d(3)
    state = model.state_dict()
    with pytest.raises(ValueError, match=r"num_batches_tracked \(float32 where whole numbers are needed\)"):
        load_checkpoint(model, state | {"num_batches_tracked": torch.tensor(1.5)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_numbers_beyond_the_range_of_the_model_are_refused(dtype):
    model = nn.Linear(2, 2).to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    beyond = {"weight": torch.full((2, 2), 1e300, dtype=torch.float64), "bias": torch.zeros(2)}
    with pytest.raises(ValueError, match=rf"weight \(beyond the range of {str(dtype).removeprefix('torch.')}\)"):
        load_checkpoint(model, beyond)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    counter = nn.Module()
    counter.register_buffer("count", torch.zeros(1, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"count \(beyond the range of int8\)"):
        load_checkpoint(counter, {"count": torch.tensor([300])})


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_numbers_of_eight_bits_load_at_any_size(dtype):
    small = {key: value.to(getattr(torch, dtype)) for key, value in WEIGHTS.items()}
    for options in ({}, {"image_size": 96}, {"in_chans": 1}):
        model, same_values = vit(1, **options), vit(1, **options)
        load_checkpoint(model, small)
        load_checkpoint(same_values, {key: value.float() for key, value in small.items()})
        assert same(model, same_values)  # the same operators on the same numbers: bitwise by construction


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
        self.b.weight = self.a.weight
        self.register_buffer("rows", self.a.bias.detach()[:1])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_parameter_of_two_names_is_saved_loaded_and_stays_one(device, tmp_path):
    source = Tied()
    save_checkpoint(source, tmp_path / "a.safetensors")
    alone = {key: value for key, value in source.state_dict().items() if key != "b.weight"}
    for content in (tmp_path / "a.safetensors", alone):
        with torch.device(device):
            model = Tied()
        load_checkpoint(model, content)
        assert same(model, source)
        assert model.a.weight is model.b.weight
    with pytest.raises(ValueError, match=r"one parameter but not equal: a\.weight and b\.weight"):
        load_checkpoint(model, alone | {"b.weight": torch.zeros(2, 2)})


def test_a_model_on_the_meta_device_has_tensors_of_its_own():
    one = torch.ones(2)
    with torch.device("meta"):
        model = nn.Sequential(nn.LayerNorm(2), nn.LayerNorm(2), nn.Linear(2, 2))
    model.append(nn.Linear(2, 2))  # not on the meta device
    given = {key: one.expand(*value.shape) for key, value in model.state_dict().items()}
    load_checkpoint(model, given)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.mul_(3.0)
    assert all(torch.equal(value, torch.full_like(value, 3.0)) for value in model.state_dict().values())
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    load_checkpoint(model, {"weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "bias": one})
    assert model.weight.dtype == torch.float32


def test_two_tensors_of_one_name_are_refused_unless_equal():
    own = nn.Linear(2, 2).state_dict()
    for wrap in (lambda v: {"_orig_mod.weight": v}, lambda v: {"module._orig_mod.weight": v, "module.weight": own["weight"]}):
        with pytest.raises(ValueError, match=r"holds two tensors of the name (module\.)?weight"):
            load_checkpoint(nn.Linear(2, 2), own | wrap(own["weight"] + 1))
    load_checkpoint(nn.Linear(2, 2), own | {"_orig_mod.weight": own["weight"].clone()})


def test_dictionaries_that_hold_each_other_come_to_an_end():
    around: dict = {"a": {"w": torch.ones(1)}}
    around["model"] = around
    with pytest.raises(ValueError, match="entries within entries"):
        load_checkpoint(nn.Linear(2, 2), around)
    many: dict = {"x": 1}
    for _ in range(20):
        many = {str(i): many for i in range(30)}
    with pytest.raises(ValueError, match="holds no tensors"):
        load_checkpoint(nn.Linear(2, 2), {"model": many})


class Remembering(nn.Linear):
    def get_extra_state(self):
        return {"steps": 1}

    def set_extra_state(self, state):
        pass


def test_what_a_file_cannot_hold_is_named_before_it_is_written(tmp_path):
    path = tmp_path / "a.safetensors"
    for model, why in (
        (nn.Linear(2, 2, device="meta"), r"weight \(on the meta device"),
        (nn.LazyLinear(2), r"weight \(not initialised"),
        (Remembering(2, 2), r"_extra_state \(a dict\)"),
        (nn.ParameterDict({"z": nn.Parameter(torch.zeros(2, dtype=torch.complex128))}), r"z \(complex128\)"),
        (nn.ParameterDict({"z": nn.Parameter(torch.zeros(2).to_sparse())}), r"z \(sparse_coo\)"),
    ):
        with pytest.raises(ValueError, match=why):
            save_checkpoint(model, path)
        assert list(tmp_path.iterdir()) == []
    for model in (nn.LazyLinear(2), Remembering(2, 2)):
        with pytest.raises(ValueError, match="no tensor, or not initialised"):
            load_checkpoint(model, nn.Linear(2, 2).state_dict())
    for source in (None, {"weight": torch.ones(2)}):
        with pytest.raises(TypeError, match="model must be a module"):
            save_checkpoint(source, path)
    path.mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        save_checkpoint(nn.Linear(2, 2), path)


def test_conjugates_are_saved_as_they_read(tmp_path):
    model = nn.Module()
    model.register_buffer("z", torch.tensor([1 + 2j]).conj())
    save_checkpoint(model, tmp_path / "a.safetensors")
    assert read_state_dict(tmp_path / "a.safetensors")["z"].item() == 1 - 2j


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
        (b"<!DOCTYPE html><html>", "a page of the web"),
        (b'{"metadata": {}, "weight_map": {"weight": "model-00001-of-00002.safetensors"}}', "index of a checkpoint in several"),
        (b"\x1f\x8b\x08\0\0\0\0\0", "compressed by gzip"),
        (b"\x93NUMPY\x01\0v\0{'descr'", "an array of numpy"),
    ],
)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_files_that_are_taken_for_checkpoints_are_told(content, said, suffix, tmp_path):
    (tmp_path / f"a.{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        load_checkpoint(nn.Linear(2, 2), tmp_path / f"a.{suffix}")


def test_names_that_are_not_text_are_refused():
    for names in ({1: torch.ones(2)}, {"model": {b"weight": torch.ones(2)}}, {"weight": torch.ones(2, 2), 0: torch.ones(2)}):
        with pytest.raises(ValueError, match=r"names of tensors in the checkpoint must be text; got (int|bytes)"):
            load_checkpoint(nn.Linear(2, 2), names)
    for source in (None, 3, [torch.ones(2)]):
        with pytest.raises(TypeError, match="a checkpoint is a path or a dictionary"):
            load_checkpoint(nn.Linear(2, 2), source)


def damaged(folder):
    torch.save({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, folder / "whole.pt")
    whole = (folder / "whole.pt").read_bytes()
    at = whole.index(b"little")
    yield "order.pt", whole[:at] + b"mittle" + whole[at + 6 :]
    yield "cut.pt", whole[: len(whole) // 2]
    yield "empty.pt", b""
    yield "empty.safetensors", b""
    yield "short.safetensors", b"\x08"
    yield "huge.safetensors", struct.pack("<Q", 2**62) + b"{}"
    yield "list.safetensors", struct.pack("<Q", 2) + b"[]"
    yield "letters.safetensors", struct.pack("<Q", 4) + b'{"\xff\xfe'
    yield "text.ckpt", b"hello"


def test_damaged_files_are_one_sentence_with_the_name_of_the_file(tmp_path):
    model = nn.Linear(2, 2)
    before = model.weight.clone()
    paths = [pathlib.Path("/dev/null"), tmp_path]
    for name, content in damaged(tmp_path):
        (tmp_path / name).write_bytes(content)
        paths.append(tmp_path / name)
    os.mkfifo(tmp_path / "fifo.pt")
    for path in [*paths, tmp_path / "fifo.pt"]:
        with pytest.raises(ValueError, match=re.escape(str(path))) as error:
            load_checkpoint(model, path)
        said = str(error.value)
        assert said.isprintable(), said
        assert "two options" not in said
    with pytest.raises(FileNotFoundError, match="none"):
        load_checkpoint(model, tmp_path / "none.pt")
    with pytest.raises(ValueError, match="too long"):
        load_checkpoint(model, tmp_path / ("a" * 300))
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("function", [exec, eval, os.system, print, getattr(os, "popen")])  # noqa: B009  # as a value
def test_a_file_made_to_run_code_runs_none(function, tmp_path):
    flag = tmp_path / "ran"
    torch.save({"model": {}, "x": Payload(function, f"open({str(flag)!r}, 'w')")}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth"):
        load_checkpoint(nn.Linear(2, 2), tmp_path / "evil.pth")
    assert not flag.exists()


def test_safetensors_under_another_suffix_and_whole_models(tmp_path):
    model = nn.Linear(2, 2)
    save_checkpoint(model, tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").rename(tmp_path / "a.bin")
    other = nn.Linear(2, 2)
    load_checkpoint(other, tmp_path / "a.bin")
    assert same(model, other)
    torch.save(create_mixer("window", dim=8, heads=2), tmp_path / "mixer.pt")
    with pytest.raises(ValueError, match=r"holds a regard\.layers\.mixers\.window\.WindowAttention, not a state dict: save"):
        load_checkpoint(other, tmp_path / "mixer.pt")
