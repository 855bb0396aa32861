"""Models by name: errors that help, and options that reach the table."""

import pytest
import torch

import regard
from regard import create_model, list_models
from regard.models import ModelCard, model_card, register_models

SWIN = "swin_tiny_patch4_window7_224"
NARROW = {"dim": 8, "head_dim": 4, "depths": (1, 1)}


def test_unknown_names_bring_the_nearest_ones():
    with pytest.raises(ValueError, match=r"unknown model 'dinat_tinny'; did you mean .*dinat_tiny"):
        create_model("dinat_tinny")


@pytest.mark.parametrize(
    ("name", "first"),
    [("swin", "swin_base_patch4_window7_224"), ("Swim-Tiny", SWIN), ("volo_d1", "volo_d1_224"), ("nat", "nat_base")],
)
def test_the_beginning_of_a_name_is_near_it_in_any_spelling(name, first):
    told = rf"unknown model '{name}'; did you mean {first}(, \w\S+){{1,3}}\? regard.list_models\(\) or `regard models` lists"
    with pytest.raises(ValueError, match=told):
        create_model(name)


@pytest.mark.parametrize("name", ["resnet50", "gpt", ""])
def test_a_name_like_no_other_brings_the_families_and_what_lists_all(name):
    with pytest.raises(ValueError, match=r"none is like it; names begin with biformer, .*, swin, .*, volo; ") as raised:
        create_model(name)
    told = str(raised.value)
    assert told.startswith(f"unknown model {name!r}; ")
    assert told.endswith(f"; regard.list_models() or `regard models` lists all {len(list_models())}")
    families = told.split("names begin with ")[1].split("; ")[0].split(", ")
    assert len(families) < len(list_models()) / 4
    assert sorted(model for family in families for model in list_models(f"{family}_*") or [family]) == list_models()


def test_unknown_options_bring_the_ones_that_exist():
    with pytest.raises(ValueError, match=r"has no option kernel; its table takes dim, depths, dilations, .*kernel_size"):
        create_model("nat_mini", kernel=3)
    with pytest.raises(ValueError, match=r"its table takes dim, .*; did you mean num_classes\?"):
        create_model("nat_mini", num_clases=3)


def test_patterns_select_names():
    assert list_models("swin_large*384") == ["swin_large_patch4_window12_384"]
    assert list_models("nothing*") == []
    assert list_models() == sorted(list_models())


def test_names_are_registered_once():
    card = model_card("nat_mini")
    with pytest.raises(ValueError, match="registered already"):
        register_models([ModelCard("nat_mini", card.table, card.arxiv, 0, 0.0)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pretrained": True}, "nothing is downloaded"),
        ({"out_indices": (0,)}, "out_indices goes with features_only"),
        ({"features_only": True, "out_indices": (5,)}, r"stages are 0 to 1.*got \[5\]"),
        ({"features_only": True, "out_indices": ()}, "stages are 0 to 1"),
        ({"mixer": torch.nn.Identity}, "Identity'>: register_mixer of regard.layers.mixers gives a class a name"),
        ({"mixer": regard.patterns.Axis(0)}, r"got Axis Axis\(0\): subclass PatternMixer"),
        ({"mixer": "windows"}, "unknown mixer 'windows'; did you mean window"),
        ({"mixer": ("window", {"dim": 4})}, "dim and heads are the model's"),
        ({"mixer": 7}, "mixer must be a name"),
        ({"mixer": []}, "at least one"),
        ({"pad": "reflect"}, "pad must be 'mask', 'token' or 'timm'; got 'reflect'"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be a finite number"),
        ({"drop_path": 3}, "drop_path must be a finite number of at least 0.0 and below 1.0; got int 3"),
        ({"mlp_ratio": -1.5}, "mlp_ratio must be a finite number of at least 0.0; got float -1.5"),
        ({"num_classes": -1}, "num_classes must be at least 0; got int -1"),
    ],
)
def test_wrong_options_are_refused_with_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        create_model(SWIN, **NARROW, **options)


def test_a_path_that_does_not_exist_is_told():
    with pytest.raises(FileNotFoundError, match="nowhere"):
        create_model(SWIN, **NARROW, pretrained="nowhere.safetensors")
