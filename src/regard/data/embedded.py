"""Real photographs that lie inside installed packages, and a classification task made from them.

scikit-image and scikit-learn ship photographs with their code, so nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from .images import ImageSet, Samples, VisionData, decode_image

_SKIMAGE, _SKLEARN = ("skimage", "data"), ("sklearn", "datasets/images")

PHOTOGRAPHS: dict[str, tuple[tuple[str, str], str]] = {
    "astronaut": (_SKIMAGE, "astronaut.png"),
    "brick": (_SKIMAGE, "brick.png"),
    "camera": (_SKIMAGE, "camera.png"),
    "cell": (_SKIMAGE, "cell.png"),
    "chelsea": (_SKIMAGE, "chelsea.png"),
    "china": (_SKLEARN, "china.jpg"),
    "coffee": (_SKIMAGE, "coffee.png"),
    "coins": (_SKIMAGE, "coins.png"),
    "flower": (_SKLEARN, "flower.jpg"),
    "grass": (_SKIMAGE, "grass.png"),
    "gravel": (_SKIMAGE, "gravel.png"),
    "hubble": (_SKIMAGE, "hubble_deep_field.jpg"),
    "ihc": (_SKIMAGE, "ihc.png"),
    "moon": (_SKIMAGE, "moon.png"),
    "motorcycle": (_SKIMAGE, "motorcycle_left.png"),
    "page": (_SKIMAGE, "page.png"),
    "retina": (_SKIMAGE, "retina.jpg"),
    "rocket": (_SKIMAGE, "rocket.jpg"),
}
"""Names of the photographs: the package, the folder in it, the file."""

VIEWS = tuple((row, column) for row in (0.0, 0.5, 1.0) for column in (0.0, 0.5, 1.0))
"""Where validation crops are cut out of a cell: its corners, the middles of its sides, its middle."""


@lru_cache(maxsize=len(PHOTOGRAPHS))
def photograph(name: str) -> Tensor:
    """A photograph ``(3, height, width)``, uint8.

    Raises:
        ValueError: no photograph of that name.
        ModuleNotFoundError: the package that holds it is not installed.
        FileNotFoundError: the installed version of that package does not hold it.
    """
    if name not in PHOTOGRAPHS:
        raise ValueError(f"unknown photograph {name!r}; there are {', '.join(PHOTOGRAPHS)}")
    (package, folder), file = PHOTOGRAPHS[name]
    found = importlib.util.find_spec(package)  # finds the files without importing the package
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f'the photograph {name!r} lies in {package}; pip install "regard[train]"')
    return decode_image(Path(found.origin).parent / folder / file, f"{package}/{folder}/{file}")


def to_grey(picture: Tensor) -> Tensor:
    """Luma ``(height, width)`` of a picture ``(3, height, width)``."""
    return torch.einsum("chw,c->hw", picture, torch.tensor([0.299, 0.587, 0.114]))


def cells(height: int, width: int, across: int) -> list[tuple[int, int, int, int]]:
    """Cut an image into disjoint nearly square cells, ``across`` along its shorter side: top, left, bottom, right."""
    side = min(height, width) / across
    rows, columns = max(1, int(height / side)), max(1, int(width / side))
    edges = [[round(i * length / n) for i in range(n + 1)] for length, n in ((height, rows), (width, columns))]
    return [(top, left, bottom, right)
            for top, bottom in zip(edges[0], edges[0][1:], strict=False)
            for left, right in zip(edges[1], edges[1][1:], strict=False)]  # fmt: skip


def is_held_out(index: int, columns: int) -> bool:
    """Whether a cell is for validation: one in four, on diagonals, so that each photograph is covered evenly."""
    row, column = divmod(index, columns)
    return (row + 2 * column) % 4 == 1


def photo_crops(
    size: int = 64,
    *,
    names: Sequence[str] = tuple(PHOTOGRAPHS),
    repeats: int = 8,
    across: int = 4,
    seed: int = 0,
    least_contrast: float = 8.0,
) -> VisionData:
    """The task *from which photograph is this crop?*

    Each photograph is made grey and cut into disjoint cells, the cells are resized to ``3/2 size``, and a sample is a crop
    of one cell with its own mean and contrast removed: what is left is structure. A quarter of the cells is held out; no
    pixel of a held-out cell is ever trained on. Cells of one photograph are neighbours, so this measures how well a model
    recognises more of the same scene, not of new scenes.

    Args:
        size: side of a sample, in pixels.
        names: the photographs; each is a class.
        repeats: random crops of each training cell in an epoch; held-out cells are seen at nine fixed positions.
        across: cells along the shorter side of a photograph.
        seed: what the random crops depend on.
        least_contrast: cells whose standard deviation (in grey levels of 255) is lower are left out: black sky and empty
            background belong to no photograph in particular.
    """
    parts: dict[bool, tuple[list[Tensor], list[int]]] = {True: ([], []), False: ([], [])}
    for label, name in enumerate(names):
        grey = to_grey(photograph(name).float())
        boxes = cells(grey.shape[0], grey.shape[1], across)
        columns = sum(box[0] == 0 for box in boxes)
        for index, (top, left, bottom, right) in enumerate(boxes):
            cell = grey[top:bottom, left:right]  # cut first: resizing must not mix neighbouring cells
            if cell.std() < least_contrast:
                continue
            side = size * 3 // 2
            cell = torch.nn.functional.interpolate(cell[None, None], (side, side), mode="bicubic", antialias=True)[0, 0]
            images, labels = parts[is_held_out(index, columns)]
            images.append(cell.round().clamp(0, 255).to(torch.uint8).expand(3, -1, -1))
            labels.append(label)
    train, val = (ImageSet(*parts[held_out], size * 3 // 2, "embedded photographs") for held_out in (False, True))
    return VisionData(
        name="embedded",
        train=Samples(train, size, train=True, repeats=repeats, normalise="sample", seed=seed),
        val=Samples(val, size, views=VIEWS, normalise="sample"),
        classes=tuple(names),
        size=size,
        description=f"From which of {len(names)} photographs is this crop of {size}×{size} pixels, in grey, with its mean and "
        f"contrast removed? {len(train)} cells of the photographs are trained on, {len(val)} others are held out and seen at "
        f"{len(VIEWS)} positions each.",
    )
