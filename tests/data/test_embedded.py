"""The embedded photographs and the task made from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from regard.data import PHOTOGRAPHS, photo_crops, photograph
from regard.data.embedded import cells, is_held_out


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photograph_is_in_the_installed_package(name: str) -> None:
    picture = photograph(name)
    assert picture.dtype == torch.uint8
    assert picture.shape[0] == 3
    assert min(picture.shape[1:]) >= 150
    assert picture.float().std() > 10


def test_photograph_equals_what_the_package_itself_loads() -> None:
    import skimage

    assert np.array_equal(photograph("astronaut").permute(1, 2, 0).numpy(), skimage.data.astronaut())


def test_unknown_photograph_names_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"unknown photograph 'lena'; there are astronaut, .*rocket"):
        photograph("lena")


@pytest.mark.parametrize(("height", "width", "across"), [(512, 512, 4), (191, 384, 4), (427, 640, 5), (7, 11, 3)])
def test_cells_cover_each_pixel_once(height: int, width: int, across: int) -> None:
    covered = np.zeros((height, width), int)
    for top, left, bottom, right in cells(height, width, across):
        covered[top:bottom, left:right] += 1
    assert (covered == 1).all()


def test_held_out_cells_of_a_photograph_depend_on_no_training_pixel() -> None:
    """Painting all training cells of a photograph white leaves every validation sample bit for bit as it was."""
    name, across = "coffee", 4
    before = photo_crops(32, names=(name, "china"), across=across, least_contrast=0.0)
    picture = photograph(name)
    kept = picture.clone()
    boxes = cells(*picture.shape[1:], across)
    columns = sum(box[0] == 0 for box in boxes)
    held = [is_held_out(i, columns) for i in range(len(boxes))]
    assert 0 < sum(held) < len(boxes) / 3
    try:
        for (top, left, bottom, right), out in zip(boxes, held, strict=True):
            if not out:
                picture[:, top:bottom, left:right] = 255
        after = photo_crops(32, names=(name, "china"), across=across, least_contrast=0.0)
    finally:
        picture.copy_(kept)
    assert len(before.val) == len(after.val) == 9 * len(before.val.images)
    for index in range(len(before.val)):
        assert torch.equal(before.val[index][0], after.val[index][0])
    changed = [not torch.equal(before.train[(0, i)][0], after.train[(0, i)][0]) for i in range(len(before.train))]
    assert any(changed)


def test_every_photograph_is_in_both_splits() -> None:
    data = photo_crops(32)
    for samples in (data.train, data.val):
        assert samples.images.labels.bincount(minlength=len(PHOTOGRAPHS)).min() >= 1


def test_brightness_and_contrast_say_nothing() -> None:
    data = photo_crops(32, names=("moon", "brick"))
    for samples in (data.train, data.val):
        x = torch.stack([samples[i][0] for i in range(len(samples))])
        assert x.mean((1, 2, 3)).abs().max() < 1e-4
        assert (x.std((1, 2, 3)) - 1).abs().max() < 0.3  # flat crops keep less
        assert torch.equal(x[:, 0], x[:, 1])
