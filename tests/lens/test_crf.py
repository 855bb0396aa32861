"""The fully connected field: its mean field by loops over all pairs of pixels, and what it does to masks of patches."""

import math

import pytest
import torch
import torch.nn.functional as F

from regard.data import photograph
from regard.tasks.common.refine import dense_crf


def gaussian(points):
    """The normalised kernel of points, pair by pair, in double precision."""
    kernel = [[math.exp(-sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) / 2) for q in points] for p in points]
    sums = [sum(row) for row in kernel]
    return [[x / math.sqrt(sums[i] * sums[j]) for j, x in enumerate(row)] for i, row in enumerate(kernel)]


@pytest.mark.parametrize("iterations", [0, 1, 4])
def test_it_is_the_mean_field_of_a_potts_model_over_all_pairs(iterations):
    generator = torch.Generator().manual_seed(0)
    image = 40.0 * torch.rand(3, 4, 6, generator=generator)
    mask = torch.rand(2, 3, generator=generator)
    options = {"near": 1.5, "near_weight": 0.7, "spatial": 3.0, "colour": 9.0, "alike_weight": 1.3}
    got = dense_crf(image, mask, iterations=iterations, **options)
    target = F.interpolate(mask[None, None].double(), (4, 6), mode="bilinear")[0, 0].flatten().tolist()
    pixels = [(i, j, *image[:, i, j].tolist()) for i in range(4) for j in range(6)]
    kernels = [
        (0.7, gaussian([(i / 1.5, j / 1.5) for i, j, *_ in pixels])),
        (1.3, gaussian([(i / 3, j / 3, r / 9, g / 9, b / 9) for i, j, r, g, b in pixels])),
    ]
    unary = [(-math.log(math.exp(1 - m)), -math.log(math.exp(m))) for m in target]  # of background and object, up to a constant
    q = [[math.exp(-a) / (math.exp(-a) + math.exp(-b)), math.exp(-b) / (math.exp(-a) + math.exp(-b))] for a, b in unary]
    for _ in range(iterations):
        updated = []
        for i, costs in enumerate(unary):
            energies = []
            for label in (0, 1):
                other = sum(w * sum(k * q[j][1 - label] for j, k in enumerate(kernel[i])) for w, kernel in kernels)
                energies.append(costs[label] + other)  # what disagrees costs
            likely = [math.exp(-energy) for energy in energies]
            updated.append([x / sum(likely) for x in likely])
        q = updated
    expected = torch.tensor([pair[1] for pair in q]).view(4, 6)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_it_does_not_depend_on_how_many_pairs_are_computed_at_once(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    image, mask = 255.0 * torch.rand(3, 9, 11, generator=generator), torch.rand(3, 4, generator=generator)
    whole = dense_crf(image, mask)
    monkeypatch.setattr("regard.tasks.common.refine.crf._PAIRS", 200)
    torch.testing.assert_close(dense_crf(image, mask), whole)


def test_the_mask_follows_the_borders_of_the_image():
    image = torch.full((3, 48, 48), 30.0)
    image[:, 14:35, 16:38] = 220.0
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[2:5, 2:5] = True  # pixels 16 to 40
    assert torch.equal(dense_crf(image, mask) > 0.5, image[0] > 100)


def test_a_photographs_object_is_traced():
    """A dark man before a bright sky, from a mask of patches that is right up to whole patches."""
    picture = photograph("camera").float()
    small = F.interpolate(picture[None], (64, 64), mode="bilinear", antialias=True)[0]
    sky = small[:, 2:34, 16:44]  # head and shoulders
    true = sky.mean(0) < 60
    patches = F.avg_pool2d(true[None, None].float(), 4)[0, 0] > 0.5
    rough = patches.repeat_interleave(4, 0).repeat_interleave(4, 1)
    fine = dense_crf(sky, patches) > 0.5

    def overlap(mask):
        return float((mask & true).sum() / (mask | true).sum())

    assert overlap(fine) > overlap(rough) + 0.05


@pytest.mark.parametrize(
    ("image", "mask", "options", "message"),
    [
        ((1, 4, 4), (2, 2), {}, r"got \(1, 4, 4\), \(2, 2\)"),
        ((3, 4, 4), (1, 2, 2), {}, r"got \(3, 4, 4\), \(1, 2, 2\)"),
        ((3, 4, 4), (2, 2), {"colour": 0.0}, "deviations must be positive; got near=3.0, spatial=50.0, colour=0.0"),
    ],
)
def test_bad_input_is_told(image, mask, options, message):
    with pytest.raises(ValueError, match=message):
        dense_crf(torch.zeros(image), torch.zeros(mask), **options)
