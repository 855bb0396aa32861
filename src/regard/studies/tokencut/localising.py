"""Weakly supervised localisation: a classifier says what is there, TokenCut says where.

    label = argmax W f + b,  f = class tokens of the last blocks (and the mean of the last patch tokens);   box = TokenCut
The vision transformer stays as self-supervision left it, only W and b learn from labels of images; no box is ever shown.
Cost: two passes of the model and the cut. Source: Wang et al., arXiv:2202.11539; the features: Caron et al., arXiv:2104.14294.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.backbones.vit import VisionTransformer
from .cutting import THRESHOLD, WEAK, FoundObject, box_iou, find_objects

Box = Sequence[float]


@dataclass(frozen=True, eq=False)
class LabelledObject:
    """What an image shows, and where.

    Attributes:
        logits: ``(classes,)``.
        label: the class of the largest of them.
        found: the object; it does not depend on the label.
    """

    logits: Tensor
    label: int
    found: FoundObject


@dataclass(frozen=True)
class Localisation:
    """Shares of images, see :func:`localisation`.

    Attributes:
        top1, top5: whose class is the first, or among the first five.
        known: whose box is right, as if the class were known.
        top1_box, top5_box: for which both are so.
    """

    top1: float
    top5: float
    known: float
    top1_box: float
    top5_box: float


def class_features(model: VisionTransformer, images: Tensor, *, blocks: int = 1, patches: bool = False) -> Tensor:
    """What a linear classifier on a frozen vision transformer sees, without a graph.

    DINO's published classifiers, whose weights fit, see the last four blocks of its small models, and the last one and the
    patches of its base ones.

    Args:
        model: of :func:`regard.create_model`; put it in evaluation mode first.
        images: ``(batch, channels, height, width)``.
        blocks: how many of the last, each with its first class token under the final norm.
        patches: beside each channel of the last class token, the mean of that channel over the patches.

    Returns:
        ``(batch, blocks * dim)``, or ``(batch, 2 * dim)`` with patches.

    Raises:
        ValueError: a model without a class token, more blocks than it has, or several of them with patches.
    """
    if not isinstance(model, VisionTransformer) or not model.spec.prefix:
        raise ValueError(f"expected a vision transformer of regard's with a class token; got {type(model).__name__}")
    if not 1 <= blocks <= len(model.blocks) or (patches and blocks != 1):
        raise ValueError(f"expected 1 to {len(model.blocks)} blocks, 1 with patches; got blocks={blocks}, patches={patches}")
    with torch.no_grad():
        states = model.run_blocks(images, range(len(model.blocks) - blocks, len(model.blocks)))
        tokens = [model.norm(state.x) for state in states]
    first = torch.cat([x[:, 0] for x in tokens], -1)
    if not patches:
        return first
    return torch.stack([first, tokens[-1][:, states[-1].prefix :].mean(1)], -1).flatten(1)


def train_classifier(
    features: Tensor,
    labels: Tensor,
    classes: int,
    *,
    epochs: int = 100,
    batch: int = 256,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> nn.Linear:
    """A linear classifier by stochastic gradient descent with momentum 0.9, its rate falling to zero along a cosine.

    Args:
        features: ``(n, dim)``, see :func:`class_features`.
        labels: ``(n,)``, from 0 to ``classes - 1``.
        classes: outputs.
        epochs: passes over the features.
        batch: features of a step.
        learning_rate: of the first step, for a batch of 256; others have theirs in proportion.
        weight_decay: of weights and biases.
        seed: of the order and of the first weights.

    Raises:
        ValueError: features and labels that do not fit, or labels out of range.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(f"expected features (n, dim) and labels (n,); got {tuple(features.shape)}, {tuple(labels.shape)}")
    if not len(labels) or int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(f"expected 1 or more labels, each from 0 to {classes - 1}; got {labels.unique().tolist()}")
    generator = torch.Generator().manual_seed(seed)
    classifier = nn.Linear(features.shape[1], classes, device=features.device, dtype=features.dtype)
    with torch.no_grad():
        drawn = torch.randn(classifier.weight.shape, generator=generator, dtype=features.dtype)
        classifier.weight.copy_(0.01 * drawn)
        classifier.bias.zero_()
    rate = learning_rate * batch / 256
    optimizer = torch.optim.SGD(classifier.parameters(), lr=rate, momentum=0.9, weight_decay=weight_decay)
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = rate * 0.5 * (1.0 + math.cos(math.pi * epoch / epochs))
        for part in torch.randperm(len(features), generator=generator).to(features.device).split(batch):
            loss = F.cross_entropy(classifier(features[part]), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return classifier


def find_labelled_objects(
    model: VisionTransformer,
    classifier: nn.Module,
    images: Tensor,
    *,
    blocks: int = 1,
    patches: bool = False,
    threshold: float = THRESHOLD,
    weak: float = WEAK,
    binary: bool = True,
) -> list[LabelledObject]:
    """Name the object of each image, and find it.

    Args:
        model, images, blocks, patches: see :func:`class_features`.
        classifier: of these features.
        threshold, weak, binary: see :func:`cutting.affinity`. Published results are for 0.2 on ImageNet and for
            0.05 on CUB.

    Raises:
        ValueError: see :func:`class_features` and :func:`find_objects`.
    """
    features = class_features(model, images, blocks=blocks, patches=patches)
    with torch.no_grad():
        logits = classifier(features)
    found = find_objects(model, images, threshold=threshold, weak=weak, binary=binary)
    return [LabelledObject(row, int(row.argmax()), one) for row, one in zip(logits, found, strict=True)]


def localisation(
    found: Sequence[LabelledObject], labels: Sequence[int], boxes: Sequence[Sequence[Box]], *, overlap: float = 0.5
) -> Localisation:
    """How often the class is right, the box is right, and both are.

    Args:
        found: of each image.
        labels: its true class.
        boxes: its true boxes (left, top, right, bottom), one or more; the best one counts.
        overlap: intersection over union of a right box at least.

    Raises:
        ValueError: not one label and one list of boxes for each image, or no image.
    """
    if not found or not len(found) == len(labels) == len(boxes) or not all(boxes):
        raise ValueError(
            f"expected a label and 1 or more boxes for each of 1 or more images; got {len(found)} images, "
            f"{len(labels)} labels, boxes for {sum(map(bool, boxes))}"
        )
    named, listed, placed = [], [], []
    for one, label, true in zip(found, labels, boxes, strict=True):
        named.append(one.label == label)
        listed.append(label in one.logits.topk(min(5, len(one.logits))).indices.tolist())
        placed.append(max(box_iou(one.found.box, box) for box in true) >= overlap)

    def share(*conditions: list[bool]) -> float:
        return sum(map(all, zip(*conditions, strict=True))) / len(found)

    return Localisation(share(named), share(listed), share(placed), share(named, placed), share(listed, placed))
