"""Weights that come with the package: one vision transformer, small enough to be kept beside the code."""

from __future__ import annotations

from importlib import resources
from typing import Any

import torch
from torch import Tensor

from ..models import create_model
from ..models.vit import VisionTransformer

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TINY_DINO: dict[str, Any] = {"dim": 64, "depth": 6, "head_dim": 16, "image_size": 64}
"""How the table of ``dino_vits8`` is changed."""


def tiny_dino() -> VisionTransformer:
    """A vision transformer of 0.3 million parameters and patches of 8 pixels, trained without labels.

    By self-distillation on crops of the photographs inside scikit-image and scikit-learn, see
    ``benchmarks/train_tiny_dino.py``. It is there to try things with. TokenCut finds the main object of three of nine of these
    photographs with its keys (the camera man, the cell, the flower: box overlap 0.95, 0.70 and 0.73), of two with the mean
    colours of patches, and of two to four, three on average, with the keys of ten such networks that were never trained: at
    this size the cut has more merit than the training, see ``benchmarks/find_objects.py``.
    """
    with resources.as_file(resources.files("regard.data") / "weights" / "tiny_dino.safetensors") as path:
        model = create_model("dino_vits8", path, **TINY_DINO)
    assert isinstance(model, VisionTransformer)  # no features were asked for
    return model.eval()


def normalised(picture: Tensor) -> Tensor:
    """A picture ``(..., 3, height, width)``, uint8, as DINO's models want it: the mean and deviation of ImageNet."""
    mean, std = (torch.tensor(values, device=picture.device)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (picture.float() / 255 - mean) / std
