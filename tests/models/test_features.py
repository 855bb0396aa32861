"""What a backbone says of its feature maps, in the words of timm."""

import copy
import pickle

import pytest
import torch
from families import families, image_of_ten_tokens, tiny


@pytest.mark.parametrize("family", families())
def test_feature_info_tells_channels_and_reduction_of_the_maps(family):
    model = tiny(family).eval()
    cut = model.cut()
    with torch.no_grad():
        image = image_of_ten_tokens(model)
        maps = cut(image)
    info = cut.feature_info
    assert info.channels() == [each.shape[1] for each in maps] == [line["num_chs"] for line in info]
    assert info.reduction() == [line["reduction"] for line in info]
    for each, reduction in zip(maps, info.reduction(), strict=True):
        assert abs(each.shape[-1] - image.shape[-1] / reduction) <= 1  # some round up, others down
    assert all(dict(model.named_modules())[name] is not None for name in info.module_name())


def test_feature_info_answers_for_some_maps_and_is_a_list_of_dicts():
    info = tiny("swin").cut((1, 3)).feature_info
    assert isinstance(info, list)
    assert info[0] == {"num_chs": 64, "reduction": 8, "module": "stages.1"}
    assert len(info) == 2
    assert info.out_indices == [0, 1]
    assert info.channels(-1) == 256
    assert info.channels([1]) == [256]
    assert info.get("reduction", (0, 1)) == [8, 32]
    assert info.module_name(0) == "stages.1"
    assert info.get_dicts() == list(info)
    assert info.get_dicts(["num_chs"], 0) == {"num_chs": 64}
    assert info.get_dicts(["num_chs"]) == [{"num_chs": 64}, {"num_chs": 256}]
    assert copy.deepcopy(info).channels() == pickle.loads(pickle.dumps(info)).channels() == [64, 256]


def test_the_classifier_can_be_asked_for():
    model = tiny("swin")
    assert model.get_classifier() is model.head
