"""What the playground shows of a trained model, and weights from files, without a browser."""

from __future__ import annotations

import pickle
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from regard.app import trained
from regard.app.compare import Choice, Setting, look
from regard.app.mechanisms import build, load, read
from regard.app.uploads import photo
from regard.lens import capture, image_map, rollout
from regard.models.opening import inputs_of, normalised, open_model

VIT = "vit_tiny_patch16_224"
PLACE = (0.3, 0.7)
CLOSE = {"atol": 0.0, "rtol": 1e-4}
"""A pixel has a hundred-thousandth of a map: only what is relative tells two maps apart."""


@pytest.fixture(scope="module")
def maps(checkpoint):
    pixels = torch.nn.functional.interpolate(photo("chelsea")[None].float(), (224, 224), mode="bilinear", antialias=True)
    with torch.no_grad(), capture(checkpoint[0], kinds="attention", lazy=True) as maps:
        checkpoint[0](normalised(pixels[0], "half"))
    return [found for found in maps if len(found.grid) == 2]


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The heat maps that are drawn, with their tiles' titles."""
    seen = []
    original = trained.overlay

    def overlay(picture, heat, *arguments):
        seen.append(heat)
        return original(picture, heat, *arguments)

    monkeypatch.setattr(trained, "overlay", overlay)
    return seen


def row() -> int:
    return int(PLACE[0] * 14) * 14 + int(PLACE[1] * 14)


def test_heads_of_a_layer_are_those_of_the_checkpoint(checkpoint, maps, drawn) -> None:
    names = trained.layers(VIT, checkpoint[1], "chelsea", "half")
    assert names[:2] == [trained.ALL, trained.ROLLOUT]
    assert len(names) == 2 + len(maps) == 14
    trained.show(VIT, checkpoint[1], "chelsea", names[2 + 4], PLACE, "half")
    torch.testing.assert_close(torch.stack(drawn), image_map(maps[4], None).map[0, :, row()], **CLOSE)


def test_all_layers_are_means_over_heads_in_order(checkpoint, maps, drawn) -> None:
    trained.show(VIT, checkpoint[1], "chelsea", trained.ALL, PLACE, "half")
    torch.testing.assert_close(torch.stack(drawn), torch.stack([image_map(found).map[0, row()] for found in maps]), **CLOSE)


def test_rollout_is_that_of_the_lens_from_the_place(checkpoint, drawn) -> None:
    pixels = torch.nn.functional.interpolate(photo("chelsea")[None].float(), (224, 224), mode="bilinear", antialias=True)
    trained.show(VIT, checkpoint[1], "chelsea", trained.ROLLOUT, PLACE, "half")
    with torch.no_grad(), capture(checkpoint[0], lazy=True) as every:
        checkpoint[0](normalised(pixels[0], "half"))
    with torch.no_grad():
        torch.testing.assert_close(drawn[0], rollout(every, start=PLACE).on_image()[0, 0], **CLOSE)


def test_without_a_checkpoint_the_weights_are_others(checkpoint, drawn) -> None:
    for path in ("", checkpoint[1]):
        trained.show(VIT, path, "chelsea", trained.ALL, PLACE, "half")
    assert not torch.allclose(drawn[0], drawn[12], rtol=1e-2)


def test_trained_model_comes_along_and_its_title_says_what_is_seen(checkpoint, drawn) -> None:
    from regard.models.pretrained import tiny_dino

    assert trained.title("tiny_dino", "", "chelsea", side=128) == "tiny_dino, trained, 128x128 pixels: no classes"
    trained.show("tiny_dino", "", "chelsea", trained.ALL, PLACE, side=128)
    pixels = torch.nn.functional.interpolate(photo("chelsea")[None].float(), (128, 128), mode="bilinear", antialias=True)
    model = tiny_dino()
    with torch.no_grad(), capture(model, lazy=True) as own:
        model(normalised(pixels[0]))
    at = int(PLACE[0] * 16) * 16 + int(PLACE[1] * 16)
    found = [m for m in own if len(m.grid) == 2]
    torch.testing.assert_close(torch.stack(drawn), torch.stack([image_map(m).map[0, at] for m in found]), **CLOSE)
    assert len(drawn) == 6
    with pytest.raises(ValueError, match=r"tiny_dino has its own weights: choose the model that 'mine\.safetensors' is of"):
        trained.opened("tiny_dino", checkpoint[1])


def test_folder_of_transformers_is_opened_with_its_own_normalisation(tmp_path) -> None:
    transformers = pytest.importorskip("transformers", reason="folders of transformers are read by it")
    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                                    image_size=32, patch_size=8, num_labels=3, id2label={0: "a", 1: "b", 2: "c"})  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    assert inputs_of(str(tmp_path)) == "half"
    assert len(trained.layers("", str(tmp_path), "chelsea")) == 2 + 2
    assert re.search(r"32x32 pixels: class \d \([abc]\) of 3,", trained.title("", str(tmp_path), "chelsea"))
    shown, half, other = (
        trained.show("", str(tmp_path), "chelsea", trained.ALL, PLACE, how) for how in ("auto", "half", "clip")
    )
    assert np.array_equal(shown, half)
    assert not np.array_equal(shown, other)
    with pytest.raises(ValueError, match="the model does not take 64x64 pixels, it was made for 32x32"):
        trained.layers("", str(tmp_path), "chelsea", side=64)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        open_model(str(tmp_path))


def test_unknown_layer_names_those_there_are(checkpoint) -> None:
    with pytest.raises(ValueError, match=r"there is no layer 'blocks.99'; there are "):
        trained.show(VIT, checkpoint[1], "chelsea", "blocks.99", PLACE, "half")


def test_bad_checkpoints_are_one_readable_line(tmp_path) -> None:
    pickled, disguised = tmp_path / "model.pt", tmp_path / "model.safetensors"
    for path in (pickled, disguised):
        path.write_bytes(pickle.dumps({"weight": [1.0]}))
    cases = [
        (str(pickled), ValueError, "checkpoints are read from .safetensors files; got"),
        (str(disguised), ValueError, "cannot read"),
        (str(tmp_path / "none.safetensors"), FileNotFoundError, "no file"),
    ]
    for path, kind, message in cases:
        with pytest.raises(kind, match=message) as told:
            trained.layers(VIT, path, "chelsea")
        assert "\n" not in str(told.value)


def test_part_of_a_model_gives_a_mixer_its_weights(tmp_path) -> None:
    torch.manual_seed(1)
    donor = torch.nn.ModuleDict({f"{name}": build("multi_head", read("multi_head", {}), 32, 2, 14, seed) for name, seed in
                                 (("first", 5), ("second", 6))})  # fmt: skip
    path = tmp_path / "model.safetensors"
    save_file(donor.state_dict(), path)
    mixer = build("multi_head", read("multi_head", {}), 32, 2, 14)
    assert load(mixer, f"{path}#second") == "second"
    assert all(torch.equal(value, donor["second"].state_dict()[key]) for key, value in mixer.state_dict().items())
    assert load(mixer, str(path)) == "first"
    assert torch.equal(mixer.qkv.weight, donor["first"].qkv.weight)

    setting, values = Setting(grid=14, dim=32, heads=2), tuple(read("multi_head", {}).items())
    heats = [look(setting, Choice("multi_head", values, file), PLACE).heat for file in ("", f"{path}#first", f"{path}#second")]
    assert all(not torch.allclose(heats[i], heats[j], rtol=1e-2) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path) -> None:
    path, pickled = tmp_path / "model.safetensors", tmp_path / "model.pt"
    donor = build("multi_head", read("multi_head", {}), 64, 2, 14)
    save_file({f"a.{key}": value for key, value in donor.state_dict().items()}, path)
    pickled.write_bytes(pickle.dumps({}))
    mixer = build("multi_head", read("multi_head", {}), 32, 2, 14)
    for place, kind, message in (
        (str(path), ValueError, "no part of model.safetensors fits; qkv.weight 96x32"),
        (f"{path}#nowhere", ValueError, "no part of model.safetensors fits"),
        (str(pickled), ValueError, "weights are read from .safetensors files"),
        (str(tmp_path / "none.safetensors"), FileNotFoundError, "no file"),
    ):
        with pytest.raises(kind, match=message) as told:
            load(mixer, place)
        assert "\n" not in str(told.value)
