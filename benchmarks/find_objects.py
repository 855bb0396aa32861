"""Which objects TokenCut finds in the embedded photographs, and how much of that is the features' merit.

    python benchmarks/find_objects.py

Compares the packaged tiny vision transformer with ten untrained ones (seeds 0 to 9) and with the mean colour of each patch. A
photograph counts as solved where the box overlaps a box drawn by hand by more than one half. Needs the ``train`` extra.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.data import photograph
from regard.models import create_model
from regard.models.pretrained import TINY_DINO, normalised, tiny_dino
from regard.studies.tokencut import tokencut
from regard.studies.tokencut.cutting import box_iou, last_keys

SIDE, PATCH = 128, 8
OBJECTS = {
    "astronaut": (20, 15, 360, 512),
    "camera": (0, 62, 335, 512),
    "cell": (360, 308, 495, 438),
    "chelsea": (15, 0, 380, 300),
    "china": (60, 28, 345, 395),
    "coffee": (78, 15, 478, 385),
    "flower": (170, 82, 438, 358),
    "motorcycle": (92, 95, 680, 450),
    "rocket": (306, 130, 335, 415),
}
"""Left, top, right and bottom of the main object, in pixels of the photograph; drawn before anything was measured."""


def overlap(name: str, model: torch.nn.Module | None) -> float:
    """Of the box found in a photograph, its shorter side resized to ``SIDE`` pixels, with that drawn by hand."""
    picture = photograph(name)
    scale = SIDE / min(picture.shape[1:])
    size = [round(n * scale) for n in picture.shape[1:]]
    image = normalised(F.interpolate(picture[None].float(), size, mode="bilinear", antialias=True).clamp(0, 255))
    with torch.no_grad():
        features = colours(image) if model is None else last_keys(model, image)
    found = tokencut(features[0], patch_size=PATCH, image_size=size)
    return box_iou([edge * scale for edge in OBJECTS[name]], found.box)


def colours(image: Tensor) -> Tensor:
    """The mean colour of each patch, ``(batch, rows, columns, 3)``."""
    rows, columns = (-n % PATCH for n in image.shape[-2:])
    return F.avg_pool2d(F.pad(image, (0, columns, 0, rows)), PATCH).movedim(1, -1)


def main() -> None:
    torch.set_num_threads(1)
    models: dict[str, torch.nn.Module | None] = {"tiny_dino": tiny_dino(), "colours": None}
    for seed in range(10):
        torch.manual_seed(seed)
        models[f"untrained, seed {seed}"] = create_model("dino_vits8", **TINY_DINO).eval()
    for label, model in models.items():
        found = {name: overlap(name, model) for name in OBJECTS}
        told = "  ".join(f"{name} {iou:.2f}" for name, iou in found.items())
        print(f"{label}: {sum(iou > 0.5 for iou in found.values())} of {len(found)}: {told}")


if __name__ == "__main__":
    main()
