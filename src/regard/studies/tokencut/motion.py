"""Optical flow as pictures: the direction of a movement as a hue, its length as a saturation.

    colour = 255 (1 - r (1 - wheel(angle)));   r = |flow| / max |flow|,   angle of -flow
A network that has learned from photographs reads such pictures as it reads photographs. Source: Baker et al., "A Database and
Evaluation Methodology for Optical Flow", IJCV 2011, whose wheel of 55 hues this is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SPOKES = (
    ((1, 0, 0), 15), ((1, 1, 0), 6), ((0, 1, 0), 4), ((0, 1, 1), 11), ((0, 0, 1), 13), ((1, 0, 1), 6),
)  # fmt: skip
"""Hues from red to magenta, and the steps from each to the next one: more where the eye tells more apart."""
_STILL = 1e-5


def _wheel() -> Tensor:
    """The hues, ``(55, 3)`` in grey levels from 0 to 255, whole numbers."""
    rows = []
    for number, (hue, steps) in enumerate(_SPOKES):
        after = torch.tensor(_SPOKES[(number + 1) % len(_SPOKES)][0], dtype=torch.float64)
        way = torch.arange(steps, dtype=torch.float64)[:, None] / steps
        here = torch.tensor(hue, dtype=torch.float64)
        fading = (after < here).double()
        change = torch.floor(255 * way)
        rows.append(255 * here + change * (after > here) - change * fading)
    return torch.cat(rows)


def flow_colours(flow: Tensor) -> Tensor:
    """Pictures of optical flow; what does not move is white, what moves farthest in its picture has the purest colour.

    Args:
        flow: ``(*batch, 2, height, width)``, pixels to the right and pixels down.

    Returns:
        ``(*batch, 3, height, width)`` of uint8.

    Raises:
        ValueError: flow of another shape.
    """
    if flow.ndim < 3 or flow.shape[-3] != 2:
        raise ValueError(f"expected flow (..., 2, height, width); got {tuple(flow.shape)}")
    flow = flow.double()
    length = flow.square().sum(-3).sqrt()
    flow = flow / (length.amax((-2, -1), keepdim=True).unsqueeze(-3) + _STILL)
    length = flow.square().sum(-3).sqrt().unsqueeze(-1)
    wheel = (_wheel() / 255).to(flow.device)
    angle = torch.atan2(-flow.select(-3, 1), -flow.select(-3, 0)) / math.pi
    place = (angle + 1) / 2 * (len(wheel) - 1)
    before = place.floor().long()
    part = (place - before).unsqueeze(-1)
    hue = (1 - part) * wheel[before] + part * wheel[(before + 1) % len(wheel)]
    return (255 * (1 - length * (1 - hue))).floor().to(torch.uint8).movedim(-1, -3)


def optical_flow(frames: Tensor, gap: int = 1) -> Tensor:
    """Where the pixels of each frame are ``gap`` frames later, by the TV-L1 method of scikit-image.

    Any other estimate will do as well; published results of TokenCut use the networks RAFT and ARFlow. A larger gap shows
    slower movements. Needs scikit-image, which the ``train`` extra brings.

    Args:
        frames: ``(frames, 3, height, width)``, 0 to 255.
        gap: in frames.

    Returns:
        ``(frames - gap, 2, height, width)`` in float32: pixels to the right and pixels down.

    Raises:
        ValueError: too few frames, or another shape.
        ModuleNotFoundError: scikit-image is not installed.
    """
    if frames.ndim != 4 or frames.shape[1] != 3 or not 1 <= gap < len(frames):
        raise ValueError(f"expected frames (frames, 3, height, width), more than gap={gap} >= 1; got {tuple(frames.shape)}")
    try:
        from skimage.registration import optical_flow_tvl1
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('optical_flow needs scikit-image; pip install "regard[train]"') from error
    weights = frames.new_tensor([0.299, 0.587, 0.114], dtype=torch.float32)
    grey = (torch.einsum("tchw,c->thw", frames.float(), weights) / 255).cpu().numpy()
    pairs = zip(grey[:-gap], grey[gap:], strict=True)
    return torch.stack([torch.from_numpy(optical_flow_tvl1(*pair)).flip(0).float() for pair in pairs]).to(frames.device)
