"""Three measurements of the heads of a vision transformer: what each is worth, how far it looks, and what its maps look like.

    importance  = what changes when a head's output is set to zero before the projection that joins the heads
    strength_k  = mean over patches p of the attention from p to all patches at Chebyshev distance k from it
    patterns    = clusters of the codes that a convolutional autoencoder gives to the maps of heads
Cost: a forward pass per head; the maps once; a few hundred steps of a small network. Source: Li et al., "How Does Attention
Work in Vision Transformers? A Visual Analytics Attempt", arXiv:2303.13731.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.observe import in_this_thread
from .captured import Map, check_map
from .places import Cells

# --------------------------------------------------------------------------------------------------------------------
# head importance


def heads_of(model: nn.Module) -> dict[str, int]:
    """The attentions of a model that join heads by a projection ``proj``: their paths, and how many heads each has."""
    found = {}
    for name, module in model.named_modules():
        heads = getattr(module, "heads", None) or getattr(module, "num_heads", None)
        proj = getattr(module, "proj", None)
        if isinstance(heads, int) and isinstance(proj, nn.Module) and getattr(proj, "in_features", 1) % heads == 0:
            found[name] = heads
    return found


@contextmanager
def without_heads(model: nn.Module, heads: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Set the outputs of some heads to zero while the context is entered, after the softmax and before the projection.

    Args:
        model: see :func:`heads_of`.
        heads: for paths of attentions, the heads that are silenced.

    Raises:
        ValueError: an unknown path, or a head that the attention does not have.
    """
    known = heads_of(model)
    handles = []
    for name, silenced in heads.items():
        if name not in known:
            raise ValueError(f"{name!r} is no attention with a projection of its heads; there are {', '.join(known) or 'none'}")
        if not all(0 <= head < known[name] for head in silenced):
            raise ValueError(f"heads of {name!r} are 0 to {known[name] - 1}; got {list(silenced)}")
    try:
        for name, silenced in heads.items():
            proj = model.get_submodule(f"{name}.proj" if name else "proj")
            handles.append(proj.register_forward_pre_hook(in_this_thread(_silence(known[name], silenced))))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _silence(heads: int, silenced: Sequence[int]) -> Callable:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        joined, *rest = args
        kept = torch.ones(heads, dtype=joined.dtype, device=joined.device)
        kept[list(silenced)] = 0.0
        return ((joined.unflatten(-1, (heads, -1)) * kept[:, None]).flatten(-2), *rest)

    return hook


@dataclass(frozen=True, eq=False)
class HeadImportance:
    """What is lost without a head, or with no other in its layer: one number per head, averaged over images, in float64.

    Attributes:
        heads: ``(path, head)`` of each.
        probability: how much less probable the class is.
        divergence: Jensen-Shannon divergence of the two answers, in nats.
        kl: Kullback-Leibler divergence of the answer without from that with it, in nats.
        representation: Euclidean distance of what is classified.
        accuracy: how much less accurate; None without labels.
        flips: share of images that are classified otherwise.
    """

    heads: tuple[tuple[str, int], ...]
    probability: Tensor
    divergence: Tensor
    kl: Tensor
    representation: Tensor
    accuracy: Tensor | None
    flips: Tensor

    def ranked(self, by: str = "divergence") -> list[tuple[str, int]]:
        """The heads, the most important first."""
        values = getattr(self, by, None)
        if not isinstance(values, Tensor):
            raise ValueError(f"by must name one of the measures that are there; got {by!r}")
        return [self.heads[i] for i in values.argsort(descending=True, stable=True).tolist()]


def head_importance(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    layers: Sequence[str] | None = None,
    alone: bool = False,
    batch_size: int = 64,
) -> HeadImportance:
    """Remove one head at a time.

    Args:
        model: a classifier; put it in evaluation mode first.
        images: ``(n, channels, height, width)``.
        labels: ``(n,)``; by default the class that the whole model answers.
        layers: paths of the attentions to look into, see :func:`heads_of`; all by default.
        alone: keep a head and remove all others of its layer, instead of the head.
        batch_size: images at once.

    Raises:
        ValueError: no attention of that path, see :func:`without_heads`; labels of another number.
    """
    known = heads_of(model)
    chosen = list(known) if layers is None else list(layers)
    if not chosen or not set(chosen) <= set(known):
        raise ValueError(f"layers must be among {', '.join(known) or 'none'}; got {chosen}")
    if labels is not None and labels.shape != images.shape[:1]:
        raise ValueError(f"expected labels ({len(images)},); got {tuple(labels.shape)}")
    logits, before = _answers(model, images, batch_size)
    whole = logits.log_softmax(-1)
    answered = whole.argmax(-1)
    target = answered if labels is None else labels
    heads, lines = [], []
    for name in chosen:
        for head in range(known[name]):
            silenced = [other for other in range(known[name]) if (other == head) != alone]
            with without_heads(model, {name: silenced}):
                logits, after = _answers(model, images, batch_size)
            lines.append(_changes(whole, logits.log_softmax(-1), target, (before - after).norm(dim=-1).mean()))
            heads.append((name, head))
    probability, divergence, kl, distance, accuracy, flips = torch.stack(lines, 1)
    return HeadImportance(tuple(heads), probability, divergence, kl, distance, None if labels is None else accuracy, flips)


def _answers(model: nn.Module, images: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Logits, and what they are made of (the logits themselves where the model does not tell), in float64."""
    logits, features = [], []
    head = getattr(model, "forward_head", None)
    with torch.no_grad():
        for part in images.split(batch_size):
            if head is None:
                answer = before = model(part)
            else:
                tokens = model.forward_features(part)  # type: ignore[operator]  # goes with forward_head
                answer, before = head(tokens), head(tokens, pre_logits=True)
            logits.append(answer.double())
            features.append(before.double())
    return torch.cat(logits), torch.cat(features)


def _changes(whole: Tensor, without: Tensor, target: Tensor, distance: Tensor) -> Tensor:
    middle = torch.logaddexp(whole, without) - math.log(2.0)
    js = 0.5 * (_kl(whole, middle) + _kl(without, middle))
    at = target[:, None]
    drop = (whole.exp().gather(1, at) - without.exp().gather(1, at)).mean()
    accuracy = (whole.argmax(-1) == target).double().mean() - (without.argmax(-1) == target).double().mean()
    flips = (whole.argmax(-1) != without.argmax(-1)).double().mean()
    return torch.stack([drop, js.mean(), _kl(whole, without).mean(), distance, accuracy, flips])


def _kl(first: Tensor, second: Tensor) -> Tensor:
    """Of log probabilities."""
    return (first.exp() * (first - second)).sum(-1)


# --------------------------------------------------------------------------------------------------------------------
# spatial profiles


@dataclass(frozen=True, eq=False)
class HopProfile:
    """How much attention goes how far.

    Attributes:
        strength: ``(batch, heads, hops)`` in float64: the mean share of a patch's attention at each Chebyshev distance.
        per_neighbour: likewise, what one patch at that distance gets: the share over the number of neighbours that there are,
            averaged over the patches that have any.
        elsewhere: ``(batch, heads)``: the share of class tokens, sinks and whatever else has no place. With ``strength`` summed
            over hops it makes one, wherever a patch attends to anything.
    """

    strength: Tensor
    per_neighbour: Tensor
    elsewhere: Tensor

    @property
    def mean_hop(self) -> Tensor:
        """Distance averaged over the attention to patches, ``(batch, heads)``; 0 where there is none."""
        hops = torch.arange(self.strength.shape[-1], dtype=self.strength.dtype, device=self.strength.device)
        return (self._shares * hops).sum(-1)

    @property
    def entropy(self) -> Tensor:
        """Entropy of the attention to patches over distances, in nats, ``(batch, heads)``."""
        return -torch.xlogy(self._shares, self._shares).sum(-1)

    @property
    def _shares(self) -> Tensor:
        return self.strength / self.strength.sum(-1, keepdim=True).clamp(min=torch.finfo(self.strength.dtype).tiny)


def hop_distance(grid: Sequence[int], device=None) -> Tensor:
    """Chebyshev distances between the cells of a grid, ``(n, n)`` of int64."""
    axes = torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij")
    places = torch.stack([axis.flatten() for axis in axes], -1)
    return (places[:, None] - places).abs().amax(-1)


def hop_profile(found: Map) -> HopProfile:
    """Attention by distance on the patch grid.

    Args:
        found: from :func:`regard.lens.capture`; of a grid of patches to itself.

    Raises:
        ValueError: queries and keys that are not patches of one grid.
    """
    check_map(found)
    grid = found.grid
    cells = [where if isinstance(where, Cells) and where.grid == grid else None for where in found.places]
    if not isinstance(found.row_places, Cells) or not any(cells):
        raise ValueError(f"a profile needs attention from a grid of patches to itself; got {found!r}")
    hops = max(grid)
    totals: Tensor | float = 0.0
    shares: Tensor | float = 0.0
    existing = torch.zeros(hops, dtype=torch.float64)
    every = hop_distance(grid)[list(found.rows)]
    for part, weights, _ in found.stream():
        mass = sum(where.spread(w.double()).flatten(3) for w, where in zip(weights, cells, strict=True) if where is not None)
        assert isinstance(mass, Tensor)  # there is such a source
        member = F.one_hot(every[part].to(mass.device), hops).double()  # (rows, keys, hops)
        neighbours = member.sum(1)
        gathered = torch.einsum("bhrk,rkn->bhrn", mass, member)
        totals = totals + gathered.sum(2)
        shares = shares + (gathered / neighbours.clamp(min=1.0)).sum(2)
        existing = existing.to(mass.device) + (neighbours > 0).sum(0)
    assert isinstance(totals, Tensor)  # there are rows
    strength = totals / len(found.rows)
    elsewhere = (1.0 - strength.sum(-1)).clamp(min=0.0)
    return HopProfile(strength, shares / existing.clamp(min=1.0), elsewhere)


# --------------------------------------------------------------------------------------------------------------------
# attention patterns

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
