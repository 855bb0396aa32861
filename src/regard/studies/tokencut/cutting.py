"""TokenCut: the object of an image is one side of the best normalised cut of its patches.

    E_ij = 1 where cos(f_i, f_j) > tau, else epsilon;   D = diag(row sums of E);   (D - E) y = lambda D y
The second smallest y is split at its mean. The side of the largest |y| is the object: its part connected to that patch.
Cost: cubic in patches, for the eigenvectors; quadratic beyond 1024 of them. Source: Wang et al., arXiv:2202.11539; the cut:
Shi & Malik, "Normalized Cuts and Image Segmentation", TPAMI 2000.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_tensor, checked
from ...lens.capture import capture
from ...tasks.common.refine.bilateral import bilateral_solver
from .components import connected_components, fill_holes, largest_component
from .lanczos import largest_eigenvector

THRESHOLD, WEAK = 0.2, 1e-5
_TIED = 1e-8
"""Relative difference up to which patches count as equally far out: which of them rounding favours must not matter."""
_EXACT, _ROWS = 1024, 512
"""Patches up to which the whole spectrum is computed; rows of edges that are at hand as float64 at once beyond."""


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


FUSIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda cosines: cosines.mean(0),
    "max": lambda cosines: cosines.amax(0),
    "min": lambda cosines: cosines.amin(0),
}
"""How the cosines of several kinds of features, ``(kinds, n, n)``, make one."""


def affinity(
    features: Tensor | Sequence[Tensor],
    *,
    threshold: float = THRESHOLD,
    weak: float = WEAK,
    binary: bool = True,
    fusion: str = "mean",
) -> Tensor:
    """How strongly patches belong together, ``(n, n)`` in float64.

    Args:
        features: ``(n, dim)``, one row a patch; or several kinds of them, each with a dim of its own.
        threshold: cosine above which patches are connected.
        weak: the edge between all others; positive, so that the graph holds together.
        binary: all strong edges are 1; otherwise they keep their cosine.
        fusion: which cosine several kinds of features make: their ``"mean"``, ``"max"`` or ``"min"``.

    Raises:
        ValueError: features of another rank, or kinds of different patches; a weak edge that is not positive; a negative
            threshold for edges that keep their cosine; an unknown fusion.
    """
    if weak <= 0.0 or (not binary and threshold < 0.0):
        raise ValueError(f"edges must be positive; got weak={weak}, threshold={threshold}, binary={binary}")
    kinds = _directions(features, fusion)
    cosines = _cosines(kinds, slice(None), fusion)
    strong = torch.ones_like(cosines) if binary else cosines
    return torch.where(cosines > threshold, strong, weak)


def strong_edges(features: Tensor | Sequence[Tensor], *, threshold: float = THRESHOLD, fusion: str = "mean") -> Tensor:
    """Which patches are connected, ``(n, n)`` of bool: :func:`affinity` with binary edges, in an eighth of the memory.

    Args:
        features, threshold, fusion: see :func:`affinity`.
    """
    kinds = _directions(features, fusion)
    count = len(kinds[0])
    strong = torch.empty(count, count, dtype=torch.bool, device=kinds[0].device)
    for start in range(0, count, _ROWS):
        part = slice(start, start + _ROWS)
        strong[part] = _cosines(kinds, part, fusion) > threshold
    return strong


def _directions(features: Tensor | Sequence[Tensor], fusion: str) -> list[Tensor]:
    """Rows of length one, in float64, of each kind of features."""
    kinds = [features] if isinstance(features, Tensor) else list(features)
    if fusion not in FUSIONS:
        raise ValueError(f"fusion is one of {', '.join(FUSIONS)}; got {fusion!r}")
    if not kinds or any(kind.ndim != 2 or len(kind) < 2 or len(kind) != len(kinds[0]) for kind in kinds):
        shapes = ", ".join(str(tuple(kind.shape)) for kind in kinds)
        raise ValueError(f"expected features (n, dim), the same n in every kind, of 2 or more patches; got {shapes or 'none'}")
    return [F.normalize(kind.double(), dim=-1) for kind in kinds]


def _cosines(kinds: Sequence[Tensor], rows: slice, fusion: str) -> Tensor:
    return FUSIONS[fusion](torch.stack([kind[rows] @ kind.T for kind in kinds]))


def normalised_cut(edges: Tensor, *, weak: float = WEAK) -> Tensor:
    """The second smallest y of (D - E) y = lambda D y, ``(n,)`` in float64 with y' D y = 1; its sign means nothing.

    With z = D^(1/2) y it is that of D^(-1/2) (D - E) D^(-1/2) z = lambda z, a symmetric problem. Where more than one y has the
    second smallest lambda, any of their combinations may come. More than 1024 patches are cut by Lanczos' method.

    Cost: cubic in patches; of Lanczos' method, quadratic for each of some tens of steps.

    Args:
        edges: E, ``(n, n)``, symmetric and positive; or bool, with True for 1 and False for a weak edge.
        weak: that edge.

    Raises:
        RuntimeError: Lanczos' method has found no vector.
    """
    if len(edges) <= _EXACT:
        edges = torch.where(edges, 1.0, weak) if edges.dtype == torch.bool else edges
        edges = edges.double()
        roots = edges.sum(-1).rsqrt()
        laplacian = torch.eye(len(edges), dtype=edges.dtype, device=edges.device) - roots[:, None] * edges * roots
        return roots * torch.linalg.eigh(laplacian).eigenvectors[:, 1]

    def product(x: Tensor) -> Tensor:
        found = torch.cat([part.double() @ x for part in edges.split(_ROWS)])
        return weak * x.sum() + (1.0 - weak) * found if edges.dtype == torch.bool else found

    degrees = product(torch.ones(len(edges), dtype=torch.float64, device=edges.device))
    roots = degrees.rsqrt()
    return roots * largest_eigenvector(lambda z: roots * product(roots * z), degrees.sqrt())[0]


@checked()
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
    check_tensor("features", features, what="(rows, columns, dim)")
    if image_size is not None and len(image_size) != 2:
        raise ValueError(f"image_size must be rows and columns; got {tuple(image_size)}")
    if features.ndim != 3 or 0 in features.shape:
        raise ValueError(f"expected features (rows, columns, dim) of one image; got {tuple(features.shape)}")
    y = normalised_cut(affinity(features.flatten(0, 1), threshold=threshold, weak=weak, binary=binary))
    return object_of(y.view(features.shape[:2]), patch_size=patch_size, image_size=image_size)


def object_side(eigenvector: Tensor) -> tuple[Tensor, Tensor, int]:
    """The eigenvector ``(*grid,)`` positive on the object's side of its mean, that side, and the index of the seed in a row."""
    y, size = eigenvector, eigenvector.abs().flatten()
    partition = y > y.mean()
    seed = int((size >= size.max() * (1.0 - _TIED)).nonzero()[0])
    return (y, partition, seed) if partition.flatten()[seed] else (-y, ~partition, seed)


def object_of(eigenvector: Tensor, *, patch_size: int = 1, image_size: Sequence[int] | None = None) -> FoundObject:
    """The object that a cut means.

    Args:
        eigenvector: ``(rows, columns)``, of any sign.
        patch_size, image_size: see :func:`tokencut`.
    """
    y, partition, index = object_side(eigenvector)
    seed = divmod(index, y.shape[1])
    parts = connected_components(partition)
    mask = parts == parts[seed]
    return FoundObject(y, partition, seed, mask, box_of(mask, patch_size, image_size))


def box_of(mask: Tensor, patch_size: int, image_size: Sequence[int] | None) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a mask ``(rows, columns)`` in pixels, inside the image; the last two are exclusive."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    height, width = image_size or (mask.shape[0] * patch_size, mask.shape[1] * patch_size)
    left, top = int(columns[0]) * patch_size, int(rows[0]) * patch_size
    return left, top, min((int(columns[-1]) + 1) * patch_size, width), min((int(rows[-1]) + 1) * patch_size, height)


def last_keys(model: nn.Module, images: Tensor) -> Tensor:
    """The keys of a model's last attention to patches, all heads side by side: ``(batch, rows, columns, heads * head_dim)``.

    They are what attention compares queries with: with their bias, not scaled. Class and register tokens are not among them.
    While the model runs, queries, keys and values of all its layers are kept.

    Args:
        model: such as a ViT of :func:`regard.create_model`, of timm or of transformers; see :func:`regard.lens.capture`.
        images: ``(batch, channels, height, width)``.

    Raises:
        ValueError: no attention from a grid of patches to itself.
    """
    return last_attention(model, images)[0]


def last_attention(model: nn.Module, images: Tensor) -> tuple[Tensor, int]:
    """The keys, see :func:`last_keys`, and pixels of a patch's side."""
    with torch.no_grad(), capture(model, kinds="attention", lazy=True, limit=sys.maxsize) as maps:
        model(images)
    for found in reversed(maps):
        if len(found.grid) == 2 and found.k_grids[0] == found.grid:
            return found.keys[0].flatten(-2), found.reduction or math.ceil(images.shape[-2] / found.grid[0])
    raise ValueError(f"{type(model).__name__} has no attention from a grid (rows, columns) of patches to itself")


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
    keys, side = last_attention(model, images)
    options: dict[str, Any] = {"threshold": threshold, "weak": weak, "binary": binary}
    return [tokencut(k, patch_size=side, image_size=images.shape[-2:], **options) for k in keys]


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
        spatial, luma, chroma, smoothness, confidence: see :func:`bilateral_solver`. The released scripts
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
