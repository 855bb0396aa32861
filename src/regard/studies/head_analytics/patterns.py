"""Patterns of heads: clusters of the codes that a convolutional autoencoder gives to their maps.

Cost: the weights once, and a few hundred steps of a small network. Source: Li et al., "How Does
Attention Work in Vision Transformers? A Visual Analytics Attempt", arXiv:2303.13731.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...lens.captured import Map
from ...lens.places import Cells
from .hops import hop_distance

NAMES = ("self", "local", "row", "column", "global")


class PatternAutoencoder(nn.Module):
    """Maps ``(n, 1, side, side)`` to codes ``(n, code)`` and back: two strided convolutions, a linear layer, and their mirror.

    Args:
        side: of the maps, a multiple of 4.
        code: length of the codes.
        width: channels of the first convolution.
    """

    def __init__(self, side: int = 32, code: int = 8, width: int = 8) -> None:
        super().__init__()
        if side % 4 or side < 4:
            raise ValueError(f"side must be a multiple of 4; got {side}")
        inner = (2 * width, side // 4, side // 4)
        self.encoder = nn.Sequential(
            nn.Conv2d(1, width, 3, 2, 1), nn.GELU(), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.GELU(), nn.Flatten(),
            nn.Linear(math.prod(inner), code),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(code, math.prod(inner)), nn.GELU(), nn.Unflatten(1, inner), nn.ConvTranspose2d(2 * width, width, 4, 2, 1),
            nn.GELU(), nn.ConvTranspose2d(width, 1, 4, 2, 1),
        )  # fmt: skip

    def forward(self, maps: Tensor) -> Tensor:
        return self.decoder(self.encoder(maps))


def pattern_maps(found: Map | Iterable[Map], side: int = 32) -> Tensor:
    """The patch-to-patch maps of all heads and images as pictures ``(maps, 1, side, side)`` of values from 0 to 1, float32.

    Rows and columns of the class tokens are left out, and rows sum to one over patches. A map is resized by area, and its
    square root divided by its maximum: what is compared is where attention goes and not how much there is.

    Args:
        found: captured attentions of all patches to all patches; maps come in the order of attentions, images, heads.
        side: of the pictures.
    """
    pictures = []
    for each in [found] if isinstance(found, Map) else found:
        whole = _patch_map(each)
        small = (
            F.adaptive_avg_pool2d(whole, side) if whole.shape[-1] > side else F.interpolate(whole, (side, side), mode="nearest")
        )
        roots = small.sqrt().flatten(0, 1)
        pictures.append(roots / roots.amax((-2, -1), keepdim=True).clamp(min=torch.finfo(roots.dtype).tiny))
    return torch.cat(pictures)[:, None].float()


def _patch_map(found: Map) -> Tensor:
    """``(batch, heads, patches, patches)`` in float64, rows sum to one."""
    at = next((i for i, where in enumerate(found.places) if isinstance(where, Cells) and where.grid == found.grid), None)
    if at is None or len(found.rows) != math.prod(found.grid):
        raise ValueError(f"patterns need the attention of all patches of a grid to themselves; got {found!r}")
    where = found.places[at]
    assert where is not None  # it was chosen so
    mass = where.spread(found.weights[at].double()).flatten(3)
    return mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)


def pattern_shares(found: Map) -> Tensor:
    """What share of attention goes where, beyond what even attention would, ``(batch, heads, 4)``.

    To the patch itself; to its neighbours; to the rest of its row; to the rest of its column, as in :data:`NAMES`. Each is
    scaled so that 0 is even attention and 1 is all of it.
    """
    whole = _patch_map(found)
    grid = found.grid
    rows, columns = torch.meshgrid(*(torch.arange(n, device=whole.device) for n in grid), indexing="ij")
    hop = hop_distance(grid, whole.device)
    same_row, same_column = (p.flatten()[:, None] == p.flatten() for p in (rows, columns))
    kinds = [hop == 0, hop == 1, same_row & (hop > 1), same_column & (hop > 1)]
    shares = []
    for kind in kinds:
        even = kind.double().mean(-1)
        shares.append((((whole * kind).sum(-1) - even) / (1.0 - even)).mean(-1))
    return torch.stack(shares, -1)


@dataclass(frozen=True, eq=False)
class Patterns:
    """The kinds of maps that heads make.

    Attributes:
        codes: ``(maps, code)`` of the autoencoder.
        labels: ``(maps,)``, the cluster of each.
        names: of the clusters: where their maps attend most, beyond even attention; ``global`` where nowhere in particular.
        heads: ``(attentions, heads, clusters)``: the share of the maps of each head in each cluster.
        loss: mean squared error of the maps at the end.
    """

    codes: Tensor
    labels: Tensor
    names: tuple[str, ...]
    heads: Tensor
    loss: float


def attention_patterns(
    found: Sequence[Map],
    clusters: int = 5,
    *,
    side: int = 32,
    code: int = 8,
    steps: int = 300,
    least: float = 0.15,
    seed: int = 0,
) -> Patterns:
    """Tell apart the kinds of maps that heads make: train the autoencoder on them, cluster their codes, name the clusters.

    Args:
        found: captured attentions, of as many heads each, see :func:`pattern_maps`.
        clusters: how many.
        side, code: see :class:`PatternAutoencoder`.
        steps: of training, on batches of up to 128 maps.
        least: excess share, see :func:`pattern_shares`, from which a cluster has a name of its own.
        seed: of everything that is random; the state of the global generator stays as it is.

    Raises:
        ValueError: fewer maps than clusters; attentions of different numbers of heads or images.
        ImportError: scikit-learn is missing: install ``regard[lens]``.
    """
    counts = {(each.batch, each.heads) for each in found}
    if len(counts) != 1:
        raise ValueError(f"attentions must have as many images and heads each; got {sorted(counts)}")
    ((batch, heads),) = counts
    pictures = pattern_maps(found, side)
    if not 1 <= clusters <= len(pictures):
        raise ValueError(f"clusters must be 1 to the number of maps, {len(pictures)}; got {clusters}")
    autoencoder, loss = fit_autoencoder(pictures, code, steps, seed)
    with torch.no_grad():
        codes = autoencoder.encoder(pictures)
    labels = _k_means(codes, clusters, seed)
    shares = torch.cat([pattern_shares(each).flatten(0, 1) for each in found])
    names = []
    for cluster in range(clusters):
        mean = shares[labels == cluster].mean(0)
        names.append(NAMES[int(mean.argmax())] if float(mean.max()) >= least else NAMES[-1])
    member = F.one_hot(labels, clusters).double().view(len(found), batch, heads, clusters)
    return Patterns(codes, labels, tuple(names), member.mean(1), loss)


def fit_autoencoder(pictures: Tensor, code: int = 8, steps: int = 300, seed: int = 0) -> tuple[PatternAutoencoder, float]:
    """Train a :class:`PatternAutoencoder` on maps ``(maps, 1, side, side)``; returns it with its final mean squared error."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        model = PatternAutoencoder(pictures.shape[-1], code).to(pictures.device)
        optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(steps):
            batch = pictures[torch.randperm(len(pictures))[:128].to(pictures.device)]
            optimiser.zero_grad()
            F.mse_loss(model(batch), batch).backward()
            optimiser.step()
    model.eval()
    with torch.no_grad():
        return model, float(F.mse_loss(model(pictures), pictures))


def plane(codes: Tensor, *, perplexity: float = 30.0, seed: int = 0) -> Tensor:
    """Codes ``(maps, code)`` as points of a plane ``(maps, 2)`` that keeps neighbours together, by t-SNE, to look at.

    Raises:
        ImportError: scikit-learn is missing: install ``regard[lens]``.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ImportError("t-SNE needs scikit-learn: pip install 'regard[lens]'") from error
    points = TSNE(2, perplexity=min(perplexity, (len(codes) - 1) / 3), init="pca", random_state=seed)
    return torch.from_numpy(points.fit_transform(codes.cpu().numpy()))


def _k_means(codes: Tensor, clusters: int, seed: int) -> Tensor:
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ImportError("clusters of patterns need scikit-learn: pip install 'regard[lens]'") from error
    found = KMeans(clusters, n_init=10, random_state=seed).fit_predict(codes.cpu().numpy())
    return torch.from_numpy(found).long().to(codes.device)
