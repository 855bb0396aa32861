"""Receptive fields of networks whose gradients are known."""

import math

import pytest
import torch
from torch import nn

import regard
from regard.lens import receptive_field


def test_field_of_a_convolution_is_its_kernel():
    convolution = nn.Conv2d(2, 3, 3, padding=1).double()
    field = receptive_field(convolution, torch.randn(2, 2, 7, 9, dtype=torch.float64), unit=(3, 5))
    kernel = convolution.weight.detach().sum(0).abs().sum(0)
    expected = torch.zeros(7, 9, dtype=torch.float64)
    expected[2:5, 4:7] = kernel / kernel.sum()
    torch.testing.assert_close(field.map, expected)
    assert field.centre == (3.5, 5.5)
    assert field.side(1.0) == 3
    assert math.isclose(field.share(1), float(expected[3, 5]))


def test_field_of_a_linear_network_of_images_is_the_mean_of_absolute_gradients():
    weights = torch.randn(2, 4, 4, dtype=torch.float64)

    def features(x):  # the gradient is the image's own
        return (x.square() * weights).sum((1, 2, 3)).reshape(-1, 1, 1, 1)

    images = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    expected = sum((2 * image * weights).abs().sum(0) for image in images)
    found = receptive_field(features, images)
    torch.testing.assert_close(found.map, expected / expected.sum())


def test_stacked_box_filters_have_the_spread_of_their_sum():
    box = nn.Conv2d(1, 1, 3, padding=1, bias=False).double()
    nn.init.constant_(box.weight, 1 / 9)
    field = receptive_field(nn.Sequential(*[box] * 6), torch.zeros(1, 1, 31, 31, dtype=torch.float64))
    assert all(math.isclose(s, math.sqrt(6 * 2 / 3), rel_tol=1e-9) for s in field.spread)  # variances add up
    assert field.side(1.0) == 13
    assert field.side(0.5) < field.side(0.9) < 13


def test_field_of_window_attention_is_its_window():
    model = regard.create_model("swin_tiny_patch4_window7_224", num_classes=0).eval()
    first = model.stages[0].blocks[0]
    field = receptive_field(lambda x: first(model.stem(x)).movedim(-1, 1), torch.randn(1, 3, 84, 84), unit=(8, 9))
    inside = torch.zeros(84, 84, dtype=torch.bool)
    inside[28:56, 28:56] = True  # the second window of 7 tokens of 4 pixels, on each axis
    assert bool((field.map[inside] > 0).all())
    assert float(field.map[~inside].sum()) == 0.0


def test_features_of_several_stages_are_chosen():
    model = regard.create_model("swin_tiny_patch4_window7_224", features_only=True).eval()
    images = torch.randn(1, 3, 64, 64)
    early, late = (receptive_field(model, images, output=output) for output in (0, -1))
    assert early.map.shape == late.map.shape == (64, 64)
    assert early.side(0.9) < late.side(0.9)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_errors_tell_what_is_allowed():
    image = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match=r"expected a feature map .* got \(1, 16\)"):
        receptive_field(lambda x: x.flatten(1), image)
    with pytest.raises(ValueError, match=r"row and a column of the map \(4, 4\); got \(4, 0\)"):
        receptive_field(lambda x: x, image, (4, 0))
    with pytest.raises(ValueError, match="no pixel moves this unit"):
        receptive_field(lambda x: 0 * x, image)
    field = receptive_field(lambda x: x, image)
    with pytest.raises(ValueError, match=r"side must be odd.*got 2"):
        field.share(2)
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\]; got 0"):
        field.side(0)
