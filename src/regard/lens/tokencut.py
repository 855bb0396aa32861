"""TokenCut: the object of an image is one side of the best normalised cut of its patches.

    E_ij = 1 where cos(f_i, f_j) > tau, else epsilon;   D = diag(row sums of E);   (D - E) y = lambda D y
The second smallest y is split at its mean. The side of the largest |y| is the object: its part connected to that patch.
Cost: cubic in patches, for the eigenvectors. Source: Wang et al., arXiv:2202.11539; the cut: Shi & Malik, "Normalized Cuts and
Image Segmentation", TPAMI 2000.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.observe import OBSERVERS, Record
from .bilateral import bilateral_solver
from .components import connected_components, fill_holes, largest_component

THRESHOLD, WEAK = 0.2, 1e-5
_TIED = 1e-8
"""Relative difference up to which patches count as equally far out: which of them rounding favours must not matter."""


@dataclass(frozen=True, eq=False)
class FoundObject:
    """What a cut says about one image.

    Attributes:
        eigenvector: ``(rows, columns)`` in float64, positive on the object's side of its mean.
        partition: ``(rows, columns)``, that side.
        seed: row and column of the patch that is farthest out.
        mask: ``(rows, columns)``, the part of the partition that is connected to the seed.
        box: left, top, right and bottom of the mask in pixels, inside the image; the last two are exclusive.
    """

    eigenvector: Tensor
    partition: Tensor
    seed: tuple[int, int]
    mask: Tensor
    box: tuple[int, int, int, int]


def affinity(features: Tensor, *, threshold: float = THRESHOLD, weak: float = WEAK, binary: bool = True) -> Tensor:
    """How strongly patches belong together, ``(n, n)`` in float64.

    Args:
        features: ``(n, dim)``, one row a patch.
        threshold: cosine above which patches are connected.
        weak: the edge between all others; positive, so that the graph holds together.
        binary: all strong edges are 1; otherwise they keep their cosine.

    Raises:
        ValueError: features of another rank; a weak edge that is not positive; a negative threshold for edges
            that keep their cosine.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"expected features (n, dim) of 2 or more patches; got {tuple(features.shape)}")
    if weak <= 0.0 or (not binary and threshold < 0.0):
        raise ValueError(f"edges must be positive; got weak={weak}, threshold={threshold}, binary={binary}")
    rows = F.normalize(features.double(), dim=-1)
    cosines = rows @ rows.T
    if binary:
        cosines = torch.where(cosines > threshold, torch.ones_like(cosines), cosines)
    return torch.where(cosines > threshold, cosines, weak)


def normalised_cut(edges: Tensor) -> Tensor:
    """The second smallest y of (D - E) y = lambda D y, ``(n,)`` in float64 with y' D y = 1; its sign means nothing.

    With z = D^(1/2) y it is that of D^(-1/2) (D - E) D^(-1/2) z = lambda z, a symmetric problem. Where more than one y has the
    second smallest lambda, any of their combinations may come.

    Args:
        edges: E, ``(n, n)``, symmetric and positive.
    """
    edges = edges.double()
    roots = edges.sum(-1).rsqrt()
    laplacian = torch.eye(len(edges), dtype=edges.dtype, device=edges.device) - roots[:, None] * edges * roots
    return roots * torch.linalg.eigh(laplacian).eigenvectors[:, 1]


def tokencut(
    features: Tensor,
    *,
    patch_size: int = 1,
    image_size: Sequence[int] | None = None,
    threshold: float = THRESHOLD,
    weak: float = WEAK,
    binary: bool = True,
) -> FoundObject:
    """Find the object among the patches of one image.

    Args:
        features: ``(rows, columns, dim)``, of patches alone.
        patch_size: pixels of a patch's side.
        image_size: rows and columns that the box is clipped to, where the patches reach beyond the image.
        threshold, weak, binary: see :func:`affinity`.

    Raises:
        ValueError: features of another rank, see also :func:`affinity`.
    """
    if features.ndim != 3:
        raise ValueError(f"expected features (rows, columns, dim) of one image; got {tuple(features.shape)}")
    y = normalised_cut(affinity(features.flatten(0, 1), threshold=threshold, weak=weak, binary=binary))
    return object_of(y.view(features.shape[:2]), patch_size=patch_size, image_size=image_size)


def object_of(eigenvector: Tensor, *, patch_size: int = 1, image_size: Sequence[int] | None = None) -> FoundObject:
    """The object that a cut means.

    Args:
        eigenvector: ``(rows, columns)``, of any sign.
        patch_size, image_size: see :func:`tokencut`.
    """
    y, size = eigenvector, eigenvector.abs().flatten()
    partition = y > y.mean()
    seed = divmod(int((size >= size.max() * (1.0 - _TIED)).nonzero()[0]), y.shape[1])
    if not partition[seed]:
        y, partition = -y, ~partition
    parts = connected_components(partition)
    mask = parts == parts[seed]
    return FoundObject(y, partition, seed, mask, _box(mask, patch_size, image_size))


def _box(mask: Tensor, patch_size: int, image_size: Sequence[int] | None) -> tuple[int, int, int, int]:
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    height, width = image_size or (mask.shape[0] * patch_size, mask.shape[1] * patch_size)
    left, top = int(columns[0]) * patch_size, int(rows[0]) * patch_size
    return left, top, min((int(columns[-1]) + 1) * patch_size, width), min((int(rows[-1]) + 1) * patch_size, height)


def last_keys(model: nn.Module, images: Tensor) -> Tensor:
    """The keys of a model's last attention to patches, all heads side by side: ``(batch, rows, columns, heads * head_dim)``.

    They are what attention compares queries with: with their bias, not scaled. Class and register tokens are not among them.

    Args:
        model: built on :func:`regard.attend`; such as a ViT of :func:`regard.create_model`.
        images: ``(batch, channels, height, width)``.

    Raises:
        ValueError: no attention from a grid of patches to itself.
    """
    found: list[Tensor] = []

    def observe(record: Record) -> None:
        k = record.sources[0].k
        if k.ndim == 5 and record.q.shape[1:3] == k.shape[1:3]:
            found[:] = [k.flatten(-2)]

    OBSERVERS.append(observe)
    try:
        with torch.no_grad():
            model(images)
    finally:
        OBSERVERS.remove(observe)
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention of regard's from a grid (rows, columns) to itself")
    return found[0]


def find_objects(
    model: nn.Module, images: Tensor, *, threshold: float = THRESHOLD, weak: float = WEAK, binary: bool = True
) -> list[FoundObject]:
    """TokenCut on the last keys of a model, one :class:`FoundObject` per image.

    Meant for self-supervised vision transformers such as DINO's. Patches that reach beyond an image take part; the box ends
    with the image.

    Args:
        model: see :func:`last_keys`; put it in evaluation mode first.
        images: ``(batch, channels, height, width)``, normalised as the model wants them.
        threshold, weak, binary: see :func:`affinity`.

    Raises:
        ValueError: see :func:`last_keys` and :func:`affinity`.
    """
    keys = last_keys(model, images)
    height, width = images.shape[-2:]
    side = math.ceil(height / keys.shape[1])
    info = getattr(model, "feature_info", None)
    side = info[-1]["reduction"] if isinstance(info, list) else side
    options = {"threshold": threshold, "weak": weak, "binary": binary}
    return [tokencut(k, patch_size=side, image_size=(height, width), **options) for k in keys]  # type: ignore[arg-type]


def saliency(
    image: Tensor,
    mask: Tensor,
    *,
    spatial: float = 24.0,
    luma: float = 4.0,
    chroma: float = 4.0,
    smoothness: float = 256.0,
    confidence: float = 0.999,
) -> tuple[Tensor, Tensor]:
    """The mask of patches as one of pixels, with the borders of the image.

    It is enlarged to the nearest patch, smoothed by the bilateral solver and cut at 1/2; its holes are filled and its largest
    connected part is kept. Were nothing left, the whole image is.

    Args:
        image: ``(3, height, width)``, 0 to 255.
        mask: ``(rows, columns)``, from :func:`tokencut`.
        spatial, luma, chroma, smoothness, confidence: see :func:`regard.lens.bilateral.bilateral_solver`. The released scripts
            for saliency call it with 16, 16 and 8 for the first three.

    Returns:
        Saliency ``(height, width)`` in float64, and the mask.

    Raises:
        ValueError: an image or a mask of another shape.
    """
    if mask.ndim != 2:
        raise ValueError(f"expected a mask (rows, columns); got {tuple(mask.shape)}")
    target = F.interpolate(mask[None, None].double(), image.shape[1:], mode="nearest")[0, 0]
    options = {"spatial": spatial, "luma": luma, "chroma": chroma, "smoothness": smoothness}
    soft = bilateral_solver(image, target, confidence, **options)  # type: ignore[arg-type]
    kept = largest_component(fill_holes(soft > 0.5))
    return soft, kept if bool(kept.any()) else torch.ones_like(kept)


def box_iou(first: Sequence[float], second: Sequence[float]) -> float:
    """Intersection over union of two boxes (left, top, right, bottom)."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    both = max(0.0, width) * max(0.0, height)
    either = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)) - both
    return both / either if either else 0.0
