"""Train the tiny vision transformer whose keys find objects: ``src/regard/models/weights/tiny_dino.safetensors``.

    python benchmarks/train_tiny_dino.py src/regard/models/weights/tiny_dino.safetensors

Self-distillation with masked patches (:mod:`regard.train.self_distillation`) on crops of the photographs inside scikit-image
and scikit-learn, 400 steps of 8 images, seed 0, on one thread: a few minutes of one core. Needs the ``train`` extra.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from regard.data import PHOTOGRAPHS, photograph
from regard.models import create_model, save_checkpoint
from regard.models.pretrained import IMAGENET_MEAN, IMAGENET_STD, TINY_DINO
from regard.train.self_distillation import MaskedSelfDistillation

MEAN, STD = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
PATCH = 8
STEPS, BATCH, SEED = 400, 8, 0
LARGE, SMALL = (96, (0.2, 1.0)), (48, (0.04, 0.2))
"""Sides of crops in pixels, and shares of the photograph that they show."""


class Crops(Dataset):
    """Two large and four small crops of a photograph, with other colours each; they depend on the seed and the index alone.

    Args:
        names: the photographs.
        count: samples.
        seed: of the crops.
    """

    def __init__(self, names: Sequence[str], count: int, seed: int) -> None:
        self.photographs = [_resized(photograph(name), 256) for name in names]
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed * self.count + index)
        image = self.photographs[int(torch.randint(len(self.photographs), (), generator=generator))]
        return [_crop(image, side, shares, generator) for side, shares in (LARGE, LARGE, SMALL, SMALL, SMALL, SMALL)]


def _resized(image: Tensor, side: int) -> Tensor:
    """The shorter side ``side`` pixels long, values from 0 to 1."""
    factor = side / min(image.shape[1:])
    size = [round(n * factor) for n in image.shape[1:]]
    return F.interpolate(image[None].float() / 255, size, mode="bilinear", antialias=True)[0].clamp(0, 1)


def _crop(image: Tensor, side: int, shares: tuple[float, float], generator: torch.Generator) -> Tensor:
    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    height, width = image.shape[1:]
    area, ratio = between(*shares) * height * width, math.exp(between(-math.log(4 / 3), math.log(4 / 3)))
    rows, columns = min(height, round(math.sqrt(area / ratio))), min(width, round(math.sqrt(area * ratio)))
    top, left = round(between(0, height - rows)), round(between(0, width - columns))
    crop = F.interpolate(
        image[None, :, top : top + rows, left : left + columns], (side, side), mode="bilinear", antialias=True
    )[0]
    if between(0, 1) < 0.5:
        crop = crop.flip(-1)
    if between(0, 1) < 0.8:
        grey = crop.mean(0, keepdim=True)
        crop = grey + (crop - grey) * between(0.8, 1.2)
        crop = crop.mean() + (crop - crop.mean()) * between(0.6, 1.4)
        crop = crop * between(0.6, 1.4)
    if between(0, 1) < 0.2:
        crop = crop.mean(0, keepdim=True).expand(3, -1, -1)
    return (crop.clamp(0, 1) - MEAN) / STD


def train(steps: int = STEPS, seed: int = SEED, *, progress: bool = False) -> torch.nn.Module:
    """The teacher after ``steps`` steps."""
    torch.set_num_threads(1)
    L.seed_everything(seed, verbose=False)
    model = create_model("dino_vits8", **TINY_DINO)
    module = MaskedSelfDistillation(model, TINY_DINO["dim"], steps, patch_size=PATCH)
    loader = DataLoader(Crops(tuple(PHOTOGRAPHS), steps * BATCH, seed), BATCH)
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=progress,
        enable_model_summary=False, gradient_clip_val=3.0,
    )  # fmt: skip
    trainer.fit(module, loader)
    return module.teacher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="where to write the weights, ends in .safetensors")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    save_checkpoint(train(arguments.steps, arguments.seed, progress=True), arguments.path)


if __name__ == "__main__":
    main()
