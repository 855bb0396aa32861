"""TokenCut of a video: the object that moves is one side of the best normalised cut of the patches of all frames.

    E_ij = 1 where (cos(f_i, f_j) + cos(g_i, g_j)) / 2 > tau, else epsilon
with f the keys of a patch of the frame, g those of the picture of its optical flow. The second smallest y of the graph of all
frames is split at its mean; the side of the largest |y| is the object, in whatever frames it is.
Cost: quadratic in patches of a graph, in time for some tens of steps and in memory, a byte a pair. Source: Wang et al.,
arXiv:2209.00383.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .cutting import WEAK, box_of, last_attention, normalised_cut, object_side, strong_edges

VIDEO_THRESHOLD, GRAPH_FRAMES = 0.3, 90


@dataclass(frozen=True, eq=False)
class FoundVideo:
    """What cuts say about a video.

    Attributes:
        eigenvector: ``(frames, rows, columns)`` in float64, positive on the object's side of the mean of its graph.
        mask: ``(frames, rows, columns)``, that side: whole, since what the frames show of one object need not be connected.
        seeds: frame, row and column of the patch that is farthest out, one of each graph.
        boxes: for each frame left, top, right and bottom of its mask in pixels, see :class:`FoundObject`; None
            where nothing of the object is seen.
    """

    eigenvector: Tensor
    mask: Tensor
    seeds: tuple[tuple[int, int, int], ...]
    boxes: tuple[tuple[int, int, int, int] | None, ...]


def tokencut_video(
    features: Tensor | Sequence[Tensor],
    *,
    patch_size: int = 1,
    image_size: Sequence[int] | None = None,
    threshold: float = VIDEO_THRESHOLD,
    weak: float = WEAK,
    fusion: str = "mean",
    graph_frames: int = GRAPH_FRAMES,
) -> FoundVideo:
    """Find the object among the patches of a video.

    Args:
        features: ``(frames, rows, columns, dim)``, of patches alone; or several kinds of them, such as those of frames and
            those of pictures of their flow.
        patch_size: pixels of a patch's side.
        image_size: rows and columns that boxes are clipped to.
        threshold, weak, fusion: see :func:`cutting.affinity`. Published results take the mean; the maximum and the
            minimum were tried.
        graph_frames: frames of one graph at most; longer videos are cut in turns, 1 cuts each frame by itself.

    Raises:
        ValueError: features of another rank, or of different patches; see also :func:`cutting.affinity`.
    """
    kinds = [features] if isinstance(features, Tensor) else list(features)
    grids = {tuple(kind.shape[:-1]) for kind in kinds}
    if len(grids) != 1 or any(kind.ndim != 4 for kind in kinds):
        shapes = ", ".join(str(tuple(kind.shape)) for kind in kinds)
        raise ValueError(f"expected features (frames, rows, columns, dim), each kind on one grid; got {shapes or 'none'}")
    if graph_frames < 1 or weak <= 0.0:
        raise ValueError(f"expected 1 or more frames of a graph and a positive weak edge; got {graph_frames}, {weak}")
    frames, rows, columns = kinds[0].shape[:-1]
    vectors, masks, seeds = [], [], []
    for start in range(0, frames, graph_frames):
        parts = [kind[start : start + graph_frames] for kind in kinds]
        strong = strong_edges([part.flatten(0, 2) for part in parts], threshold=threshold, fusion=fusion)
        y, mask, seed = object_side(normalised_cut(strong, weak=weak).view(-1, rows, columns))
        frame, place = divmod(seed, rows * columns)
        vectors.append(y)
        masks.append(mask)
        seeds.append((start + frame, *divmod(place, columns)))
    whole = torch.cat(masks)
    boxes = tuple(box_of(mask, patch_size, image_size) if bool(mask.any()) else None for mask in whole)
    return FoundVideo(torch.cat(vectors), whole, tuple(seeds), boxes)


def find_video_object(
    model: nn.Module,
    frames: Tensor,
    flow: Tensor | None = None,
    *,
    threshold: float = VIDEO_THRESHOLD,
    weak: float = WEAK,
    fusion: str = "mean",
    graph_frames: int = GRAPH_FRAMES,
    batch: int = 8,
) -> FoundVideo:
    """TokenCut on the last keys of a model, of frames and of pictures of their optical flow.

    :func:`saliency` or :func:`dense_crf` refine the mask of a frame to pixels.

    Args:
        model: see :func:`cutting.last_keys`; put it in evaluation mode first.
        frames: ``(frames, channels, height, width)``, normalised as the model wants them.
        flow: pictures of the flow, see :func:`flow_colours`, normalised likewise; where the last frames have none,
            the last one stands for them. None looks at the frames alone.
        threshold, weak, fusion, graph_frames: see :func:`tokencut_video`.
        batch: pictures that the model sees at once.

    Raises:
        ValueError: flow of another size than the frames', of more of them or of none; see also :func:`tokencut_video`.
    """
    if flow is not None and (flow.ndim != 4 or flow.shape[1:] != frames.shape[1:] or not 1 <= len(flow) <= len(frames)):
        raise ValueError(f"expected pictures of flow for 1 or more of {tuple(frames.shape)}; got {tuple(flow.shape)}")
    kinds = []
    for pictures in [frames] if flow is None else [frames, flow]:
        found = [last_attention(model, part) for part in pictures.split(batch)]
        keys, side = torch.cat([k for k, _ in found]), found[0][1]
        kinds.append(torch.cat([keys, keys[-1:].expand(len(frames) - len(keys), -1, -1, -1)]))
    options = {"threshold": threshold, "weak": weak}
    return tokencut_video(
        kinds, patch_size=side, image_size=frames.shape[-2:], fusion=fusion, graph_frames=graph_frames, **options
    )
