"""Weakly supervised localisation: features of a frozen model, a linear classifier, TokenCut's box, and both together."""

import math

import pytest
import torch
import torch.nn.functional as F

from regard import create_model
from regard.data import photograph
from regard.models.pretrained import normalised, tiny_dino
from regard.studies.tokencut import class_features, find_labelled_objects, find_objects, localisation, train_classifier
from regard.studies.tokencut.cutting import box_iou, object_of
from regard.studies.tokencut.localising import LabelledObject

KIND = torch.float64


def dino(**options):
    torch.manual_seed(0)
    return create_model("dino_vits16", dim=24, depth=3, head_dim=8, image_size=64, **options).double().eval()


def naive_features(model, image, blocks, patches):
    """Block by block, token by token; channels of the class token and of the mean of patches take turns."""
    after = [state.x[0] for state in model.run_blocks(image[None], range(3))]
    rows = []
    for x in after[-blocks:]:
        normed = []
        for token in x:
            mean = sum(token.tolist()) / 24
            deviation = math.sqrt(sum((t - mean) ** 2 for t in token.tolist()) / 24 + 1e-6)
            normed.append([(t - mean) / deviation for t in token.tolist()])
        rows.append(normed)
    if not patches:
        return [value for normed in rows for value in normed[0]]
    means = [sum(token[channel] for token in rows[-1][1:]) / len(rows[-1][1:]) for channel in range(24)]
    return [value for pair in zip(rows[-1][0], means, strict=True) for value in pair]


@pytest.mark.parametrize(("blocks", "patches"), [(1, False), (1, True), (2, False), (3, False)])
def test_features_are_class_tokens_of_the_last_blocks_and_the_mean_of_patches(blocks, patches):
    model = dino()
    images = torch.randn(2, 3, 64, 90, dtype=KIND)
    got = class_features(model, images, blocks=blocks, patches=patches)
    for image, row in zip(images, got, strict=True):
        expected = torch.tensor(naive_features(model, image, blocks, patches), dtype=KIND)
        torch.testing.assert_close(row, expected)
    assert not got.requires_grad


@pytest.mark.parametrize(
    ("name", "options", "width"),
    [("dino_vits16", {"blocks": 4}, 1536), ("dino_vitb16", {"patches": True}, 1536)],  # of DINO's published classifiers
)
def test_published_classifiers_fit(name, options, width):
    model = create_model(name, device="meta")
    assert class_features(model, torch.zeros(1, 3, 224, 224, device="meta"), **options).shape == (1, width)


def test_the_classifier_is_trained_by_momentum_along_a_cosine():
    """Three epochs of two steps, by hand."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(6, 4, generator=generator, dtype=KIND)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    got = train_classifier(features, labels, 3, epochs=3, batch=4, learning_rate=8.0, weight_decay=0.01, seed=5)
    order = torch.Generator().manual_seed(5)
    weight, bias = 0.01 * torch.randn(3, 4, generator=order, dtype=KIND), torch.zeros(3, dtype=KIND)
    speeds = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for epoch in range(3):
        rate = 8.0 * 4 / 256 * (1 + math.cos(math.pi * epoch / 3)) / 2
        permuted = torch.randperm(6, generator=order).tolist()
        for rows in (permuted[:4], permuted[4:]):
            errors = (features[rows] @ weight.T + bias).softmax(-1) - F.one_hot(labels[rows], 3)
            gradients = [errors.T @ features[rows] / len(rows) + 0.01 * weight, errors.mean(0) + 0.01 * bias]
            speeds = [0.9 * speed + gradient for speed, gradient in zip(speeds, gradients, strict=True)]
            weight, bias = weight - rate * speeds[0], bias - rate * speeds[1]
    torch.testing.assert_close(got.weight.detach(), weight)
    torch.testing.assert_close(got.bias.detach(), bias)


def test_the_box_does_not_depend_on_the_label():
    model = dino()
    images = torch.randn(2, 3, 64, 64, dtype=KIND)
    classifier = torch.nn.Linear(24, 5, dtype=KIND)
    found = find_labelled_objects(model, classifier, images, threshold=0.3)
    plain = find_objects(model, images, threshold=0.3)
    for one, alone, features in zip(found, plain, class_features(model, images), strict=True):
        assert one.found.box == alone.box
        torch.testing.assert_close(one.logits, classifier(features).detach())
        assert one.label == int(one.logits.argmax())


def placed(box, logits):
    """An object of this box, on a grid of 10 x 10, and logits."""
    y = torch.zeros(10, 10)
    y[box[1] : box[3], box[0] : box[2]] = 1.0
    logits = torch.tensor(logits)
    return LabelledObject(logits, int(logits.argmax()), object_of(y - 0.1))


def test_shares_count_right_classes_right_boxes_and_both():
    logits = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0]
    found = [placed(box, logits) for box in ((0, 0, 4, 4), (0, 0, 4, 4), (2, 2, 6, 6), (0, 0, 4, 4))]
    labels = [0, 1, 0, 5]
    boxes = [[(0, 0, 4, 4)], [(5, 5, 9, 9), (0, 0, 4, 8)], [(3, 3, 7, 7)], [(0, 0, 4, 4)]]
    assert box_iou((0, 0, 4, 4), (0, 0, 4, 8)) == 0.5  # right: one half is enough, and the best of several boxes counts
    got = localisation(found, labels, boxes)
    assert (got.top1, got.top5, got.known) == (0.5, 0.75, 0.75)
    assert (got.top1_box, got.top5_box) == (0.25, 0.5)
    assert localisation(found, labels, boxes, overlap=0.6).known == 0.5


THINGS, BACKGROUNDS, SIDE = ("coffee", "chelsea", "flower"), ("grass", "gravel", "brick"), 96


def shrunk(name, side):
    picture = photograph(name).float()
    scale = side / min(picture.shape[1:])
    size = [round(n * scale) for n in picture.shape[1:]]
    return F.interpolate(picture[None], size, mode="bilinear", antialias=True)[0].clamp(0, 255)


def scenes(count, seed):
    """Rectangles out of one of three photographs, at random places on one of three textures: pictures, labels, boxes."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    things, behind = [shrunk(name, 96) for name in THINGS], [shrunk(name, 192) for name in BACKGROUNDS]
    pictures, labels, boxes = [], [], []
    for index in range(count):
        label = index % 3
        texture, thing = behind[drawn(0, 2)], things[label]
        y, x = drawn(0, texture.shape[1] - SIDE), drawn(0, texture.shape[2] - SIDE)
        picture = texture[:, y : y + SIDE, x : x + SIDE].clone()
        height, width = 8 * drawn(4, 7), 8 * drawn(4, 7)
        top, left = 8 * drawn(0, (SIDE - height) // 8), 8 * drawn(0, (SIDE - width) // 8)
        y, x = drawn(0, thing.shape[1] - height), drawn(0, thing.shape[2] - width)
        picture[:, top : top + height, left : left + width] = thing[:, y : y + height, x : x + width]
        pictures.append(picture)
        labels.append(label)
        boxes.append([(left, top, left + width, top + height)])
    return torch.stack(pictures), labels, boxes


def test_labels_of_images_alone_are_enough_to_name_and_place_what_they_show():
    """Seed 0, 90 images to learn from and 30 others; by chance a third is named, and a box of the middle half places few."""
    model = tiny_dino()
    pictures, labels, _ = scenes(90, 0)
    features = class_features(model, normalised(pictures), patches=True)
    classifier = train_classifier(features, torch.tensor(labels), 3, epochs=100, batch=32, learning_rate=1.0)
    pictures, labels, boxes = scenes(30, 1)
    found = find_labelled_objects(model, classifier, normalised(pictures), patches=True)
    got = localisation(found, labels, boxes)
    middle = sum(box_iou((SIDE / 4, SIDE / 4, 3 * SIDE / 4, 3 * SIDE / 4), box) >= 0.5 for (box,) in boxes) / len(boxes)
    assert got.top1 >= 0.7  # a third by chance
    assert got.known >= middle + 0.2
    assert got.top1_box >= middle / 3 + 0.2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: class_features(torch.nn.Identity(), torch.zeros(1, 3, 8, 8)), "with a class token; got Identity"),
        (lambda: class_features(dino(), torch.zeros(1, 3, 8, 8), blocks=4), "expected 1 to 3 blocks.*blocks=4, patches=False"),
        (lambda: class_features(dino(), torch.zeros(1, 3, 8, 8), blocks=2, patches=True), "got blocks=2, patches=True"),
        (lambda: train_classifier(torch.zeros(3, 2), torch.zeros(2).long(), 2), r"labels \(n,\); got \(3, 2\), \(2,\)"),
        (lambda: train_classifier(torch.zeros(2, 2), torch.tensor([0, 2]), 2), r"each from 0 to 1; got \[0, 2\]"),
        (lambda: localisation([], [], []), "got 0 images, 0 labels, boxes for 0"),
        (lambda: localisation([placed((0, 0, 2, 2), [1.0])], [0], [[]]), "got 1 images, 1 labels, boxes for 0"),
    ],
)
def test_bad_input_is_told(call, message):
    with pytest.raises(ValueError, match=message):
        call()
