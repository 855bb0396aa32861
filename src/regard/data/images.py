"""Labelled images, decoded when first needed, and the samples a model sees of them.

What is random about a sample depends on ``(seed, epoch, index)`` and on nothing else, so a training run that was killed
sees the same samples when it goes on.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ..files import one_line

CACHE_BYTES = 2**30
MOST_PIXELS = 100_000_000
"""Of an image: a larger one is refused before it is decoded."""
MEAN, STD = 127.5, 64.0


class ImageSet:
    """Images of one size with their labels.

    Args:
        items: encoded images: paths, bytes, or decoded ``(3, size, size)`` uint8 tensors.
        labels: the class index of each.
        size: the shorter side is resized to it and the middle cut out.
        origin: where the images are from, for error messages.
    """

    def __init__(self, items: Sequence[Path | bytes | Tensor], labels: Sequence[int], size: int, origin: str) -> None:
        if len(items) != len(labels):
            raise ValueError(f"{origin}: {len(items)} images but {len(labels)} labels")
        self.items, self.size, self.origin = items, size, origin
        self.labels = torch.as_tensor(labels, dtype=torch.long)

    def __len__(self) -> int:
        return len(self.items)

    @cached_property
    def _cache(self) -> tuple[Tensor, Tensor] | None:
        """Decoded images and which of them are there; shared, so that worker processes fill one cache."""
        if len(self) * 3 * self.size**2 > CACHE_BYTES:
            return None
        pixels = torch.empty(len(self), 3, self.size, self.size, dtype=torch.uint8).share_memory_()
        return pixels, torch.zeros(len(self), dtype=torch.bool).share_memory_()

    def image(self, index: int) -> Tensor:
        """One image ``(3, size, size)``, uint8.

        Raises:
            ValueError: the image cannot be read; names it.
        """
        item = self.items[index]
        if isinstance(item, Tensor):
            return item
        if self._cache is None:
            return self._decode(index)
        pixels, there = self._cache
        if not there[index]:
            pixels[index] = self._decode(index)
            there[index] = True
        return pixels[index]

    def _decode(self, index: int) -> Tensor:
        item = self.items[index]
        assert not isinstance(item, Tensor)  # those are decoded
        name = str(item) if isinstance(item, Path) else f"{self.origin}, image {index}"
        return decode_image(item, name, self.size)

    def unreadable(self) -> dict[int, str]:
        """Decode every image: of those that cannot be read, their index and why not, with their names."""
        found: dict[int, str] = {}
        for index in range(len(self)):
            try:
                self.image(index)
            except (ValueError, FileNotFoundError) as error:
                found[index] = str(error)
        return found

    def subset(self, indices: Sequence[int]) -> ImageSet:
        return ImageSet([self.items[i] for i in indices], self.labels[list(indices)].tolist(), self.size, self.origin)


def decode_image(item: Path | bytes, name: str, size: int | None = None) -> Tensor:
    """Decode an image to uint8 RGB ``(3, height, width)``; with ``size`` cut to a square of that side.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an image that can be read, or has more than ``MOST_PIXELS``.
    """
    from PIL import Image

    if isinstance(item, Path) and not item.is_file():
        raise FileNotFoundError(f"no image file {name}")
    try:
        with Image.open(io.BytesIO(item) if isinstance(item, bytes) else item) as opened:
            width, height = opened.size
            if width * height > MOST_PIXELS:
                raise ValueError(f"it has {width} x {height} pixels, more than {MOST_PIXELS / 1e6:.0f} million")
            picture = as_seen(opened)
    except Exception as error:  # decoders of damaged files raise anything
        said = one_line(error)
        reason = "it is no image of a known format, or damaged" if said.startswith("cannot identify") else said
        raise ValueError(f"cannot read the image {name}: {reason}") from None
    if size is not None and picture.size != (size, size):
        width, height = picture.size
        if max(width, height) > 8 * min(width, height):  # what lies far from the middle is cut off anyway
            side = 4 * min(width, height)
            left, top = max(0, (width - side) // 2), max(0, (height - side) // 2)
            picture = picture.crop((left, top, width - left, height - top))
            width, height = picture.size
        scale = size / min(width, height)
        picture = picture.resize((max(size, round(width * scale)), max(size, round(height * scale))), Image.Resampling.BICUBIC)
        left, top = (picture.width - size) // 2, (picture.height - size) // 2
        picture = picture.crop((left, top, left + size, top + size))
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(picture.height, picture.width, 3).permute(2, 0, 1).contiguous()


def as_seen(opened: Any) -> Any:
    """A PIL image as a viewer shows it, in RGB: upright, on white where it is transparent, deep greys scaled to 0..255.

    Fractions of 0..1 are scaled to 0..255; fractions beyond 1 are taken for 0..255.

    Raises:
        ValueError: fractions that are not finite, below 0 or beyond 255.
    """
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(opened)
    if picture.mode == "F":
        fractions = np.asarray(picture, np.float64)
        least, most = float(fractions.min()), float(fractions.max())
        if not (least >= 0.0 and most <= 255.0):  # not finite ones neither
            raise ValueError(f"its pixels are fractions from {least:g} to {most:g}; they must be from 0 to 1, or from 0 to 255")
        picture = Image.fromarray((fractions * (255.0 if most <= 1.0 else 1.0)).round().astype(np.uint8))
    clear = picture.info.get("transparency")
    if picture.mode.startswith("I") and isinstance(clear, int):  # a grey of 16 bits that stands for nothing
        grey = np.asarray(picture).astype(np.int64)
        picture = Image.fromarray(np.where(grey == clear, 65535, grey).astype(np.int32))
    if picture.mode.startswith("I"):  # 16 or 32 bits, which Pillow would clip at 255
        grey = np.asarray(picture, np.float64)
        most = 65535.0 if 255.0 < grey.max() <= 65535.0 else max(255.0, float(grey.max()))
        picture = Image.fromarray((grey.clip(0.0) * (255.0 / most)).round().astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (255, 255, 255, 255)), picture)
    return picture.convert("RGB")


class Samples(Dataset):
    """What a model sees of an :class:`ImageSet`; indexed by ``(epoch, index)``.

    Args:
        images: the images.
        size: side of a sample; it is cut out of the image.
        pad: pixels the image is reflected by at its borders before a sample is cut out.
        train: cut at random positions and flip at random; otherwise cut at the positions ``views``.
        views: positions in ``[0, 1]``, row and column, of the samples of each image (the middle by default).
        repeats: random samples of each image in an epoch.
        normalise: ``"fixed"`` subtracts a common mean and divides by a common deviation; ``"sample"`` uses the sample's
            own, so that brightness and contrast say nothing.
        seed: what the random choices depend on, with the epoch and the index.
    """

    def __init__(
        self,
        images: ImageSet,
        size: int,
        *,
        pad: int = 0,
        train: bool = False,
        views: Sequence[tuple[float, float]] = ((0.5, 0.5),),
        repeats: int = 1,
        normalise: str = "fixed",
        seed: int = 0,
    ) -> None:
        if normalise not in ("fixed", "sample"):
            raise ValueError(f"normalise must be 'fixed' or 'sample'; got {normalise!r}")
        if size > images.size + 2 * pad or pad >= images.size:
            raise ValueError(f"samples of {size} pixels cannot be cut out of images of {images.size} padded by {pad}")
        self.images, self.size, self.pad, self.train = images, size, pad, train
        self.views, self.repeats = tuple(views), repeats
        self.normalise, self.seed = normalise, seed

    def __len__(self) -> int:
        return len(self.images) * (self.repeats if self.train else len(self.views))

    def crop(self, epoch: int, index: int) -> tuple[int, int, int, bool]:
        """Image, top, left and flip of a sample, in pixels of the padded image."""
        room = self.images.size + 2 * self.pad * self.train - self.size
        if not self.train:
            image, view = divmod(index, len(self.views))
            row, column = self.views[view]
            return image, round(row * room), round(column * room), False
        generator = torch.Generator().manual_seed(((self.seed * 1_000_003 + epoch) * 10_000_019 + index) % 2**63)
        top, left, flip = (int(n) for n in torch.randint(0, 2**31, (3,), generator=generator))
        return index // self.repeats, top % (room + 1), left % (room + 1), bool(flip % 2)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image, top, left, flip = self.crop(epoch, index)
        x = self.images.image(image).float()
        if self.train and self.pad:
            x = F.pad(x[None], [self.pad] * 4, mode="reflect")[0]
        x = x[:, top : top + self.size, left : left + self.size]
        if flip:
            x = x.flip(-1)
        return self.normalised(x), self.images.labels[image]

    def normalised(self, x: Tensor) -> Tensor:
        """Pixels ``(3, height, width)`` of 0..255 as the model sees them."""
        if self.normalise == "sample":
            x = x.float()
            return (x - x.mean()) / x.std().clamp_min(1.0)
        return (x.float() - MEAN) / STD


@dataclass(frozen=True)
class VisionData:
    """A classification task: training and validation samples, class names, and a sentence that says what it is."""

    name: str
    train: Samples
    val: Samples
    classes: tuple[str, ...]
    size: int
    description: str

    @property
    def chance(self) -> float:
        """Accuracy of always answering the most frequent class of the validation samples."""
        return float(self.val.images.labels.bincount(minlength=len(self.classes)).max()) / len(self.val.images)

    def fingerprint(self) -> str:
        """Changes when the images, the labels, the split or the sampling change."""
        digest = hashlib.sha256(repr((self.classes, self.size)).encode())
        for samples in (self.train, self.val):
            digest.update(repr((samples.pad, samples.views, samples.repeats, samples.normalise, samples.seed)).encode())
            digest.update(samples.images.labels.numpy().tobytes())
            for item in samples.images.items:
                if isinstance(item, Path):
                    digest.update(os.fsencode(f"{item.name}:{item.stat().st_size}"))  # a name need not be text
                else:
                    digest.update(item if isinstance(item, bytes) else item.numpy().tobytes())
        return digest.hexdigest()[:16]
