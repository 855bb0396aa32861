"""Sparsifiner: a cheap low-rank map says which keys each query sees; attention is exact among those.

    A' = top8(softmax(s W_q q (W_k k)^T P_down)) |P_up|^T;   y = softmax(q k^T / sqrt(d)) v over the ceil(r N) largest of A'
Cost: N n for the map with n = N / 6 columns, r N keys per query. Source: Wei et al., Sparsifiner, arXiv:2303.13755.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import checked
from ...ops import Source
from ...ops import patterns as P
from ...ops.attention.weights import attend_weights
from ...ops.calls.heads import repeat_heads
from ..linear import linear
from ..positions import resize_offset_table
from ..reduce import TokenMap, kept_count
from .base import AttentionMixer
from .multi_head import MultiHeadAttention
from .registry import register_mixer


class ConnectivityPredictor(nn.Module):
    """A low-rank approximation of an attention map, from its queries and keys.

    ``down`` and ``up`` are ``(prefix + places, n)``: their rows for the places of a grid are resized bicubically to any other.

    Args:
        head_dim: width of queries and keys; the same layers serve all heads.
        heads: their number, whose ``-0.5``-th power scales the logits (as published).
        prefix: tokens outside the grid that take part.
        grid: rows and columns, or one number per axis.
        token_ratio, channel_ratio: by how much the numbers of keys and channels are reduced.
        coefficients: how many of a query's n coefficients count.
        basis_threshold: entries of ``up`` up to this size count as zero.
    """

    @checked(prefix=0)
    def __init__(
        self,
        head_dim: int,
        heads: int,
        *,
        prefix: int,
        grid: Sequence[int],
        token_ratio: int = 6,
        channel_ratio: int = 2,
        coefficients: int = 8,
        basis_threshold: float = 2e-2,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.scale, self.prefix, self.grid = heads**-0.5, prefix, tuple(grid)
        self.coefficients, self.basis_threshold = coefficients, basis_threshold
        factory = {"device": device, "dtype": dtype}
        tokens = prefix + math.prod(grid)
        columns, channels = max(1, tokens // token_ratio), max(1, head_dim // channel_ratio)
        self.q = nn.Linear(head_dim, channels, **factory)
        self.k = nn.Linear(head_dim, channels, **factory)
        self.down = nn.Parameter(torch.empty(tokens, columns, **factory))
        self.up = nn.Parameter(torch.empty(tokens, columns, **factory))
        for matrix in (self.down, self.up):
            nn.init.trunc_normal_(matrix, std=0.02)

    def forward(self, q: Tensor, k: Tensor, grid: Sequence[int], *, alive: Tensor | None = None, exact: bool = False) -> Tensor:
        """The approximate map ``(batch, heads, queries, keys)``.

        Args:
            q, k: ``(batch, tokens, heads, head_dim)``; the keys are the prefix and the places of ``grid``.
            grid: of the keys.
            alive: ``(batch, tokens)`` boolean, the keys that there are: others have no part in the map, and are -inf in it.
            exact: with all coefficients and the signed basis, as the reconstruction is trained.
        """
        down, up = (self._resized(matrix, grid) for matrix in (self.down, self.up))
        reduced = linear(self.k, k) if alive is None else linear(self.k, k).masked_fill(~alive[..., None, None], 0.0)
        keys = torch.einsum("bkhc,kn->bhnc", reduced, down)
        coefficients = (torch.einsum("bqhc,bhnc->bhqn", linear(self.q, q), keys) * self.scale).softmax(-1)
        if not exact:
            best = coefficients.topk(min(self.coefficients, coefficients.shape[-1]), sorted=False)
            coefficients = torch.zeros_like(coefficients).scatter(-1, best.indices, best.values)
            up = up.abs().masked_fill(up.abs() <= self.basis_threshold, 0.0)
        scores = coefficients @ up.T
        return scores if alive is None else scores.masked_fill(~alive[:, None, None], -torch.inf)

    def _resized(self, matrix: Tensor, grid: Sequence[int]) -> Tensor:
        if tuple(grid) == self.grid:
            return matrix
        if len(grid) != 2 or len(self.grid) != 2:
            raise ValueError(f"the connectivity is learned for the grid {self.grid}, which has no size {tuple(grid)}")
        outside, places = matrix.split([self.prefix, len(matrix) - self.prefix])
        maps = resize_offset_table(places.T.unflatten(1, self.grid), grid)
        return torch.cat([outside, maps.flatten(1).T])


@register_mixer(
    "sparsifiner",
    tiny={"keep_rate": 0.4},
    sized=lambda grid: {"grid": tuple(grid)},
    unseen=("prefix",),
    unlearned={"predictor.": "its choice is discrete: it learns from reconstruction_loss alone"},
)
class SparsifinerAttention(MultiHeadAttention):
    """Attention of every token of the grid to the keys that a predictor lists for it, other keys for every image and head.

    The choice carries no gradient: the predictor learns from :func:`reconstruction_loss` alone, while attention is dense.
    From any other loss it gets no gradient: distributed training then needs ``find_unused_parameters=True``.
    Tokens outside the grid see everything. With ``prefix`` they compete for the lists like any other key (the published
    class token); with 0 every query sees them.

    Args:
        dim, heads: channels and attention heads.
        keep_rate: share of the keys that a query sees, ``ceil(keep_rate * keys)`` of them.
        threshold: instead see the keys whose approximate attention is above this; None for the share.
        grid: that the predictor is made for.
        prefix: tokens outside the grid that the predictor knows; as many must come, or none where it is 0.
        token_ratio, channel_ratio, coefficients, basis_threshold: see :class:`ConnectivityPredictor`.
        **projections: see :class:`AttentionMixer`.

    Attributes:
        maps: a list that the approximate map of each forward pass goes to, and attention is dense; None otherwise.

    Raises:
        ValueError: a share outside (0, 1]; another number of tokens outside the grid; a context.
    """

    @checked()
    def __init__(
        self,
        dim: int,
        heads: int,
        keep_rate: float = 0.25,
        *,
        threshold: float | None = None,
        grid: Sequence[int] = (14, 14),
        prefix: int = 0,
        token_ratio: int = 6,
        channel_ratio: int = 2,
        coefficients: int = 8,
        basis_threshold: float = 2e-2,
        **projections,
    ) -> None:
        super().__init__(dim, heads, **projections)
        if not 0.0 < keep_rate <= 1.0:
            raise ValueError(f"keep_rate must be in (0, 1]; got {keep_rate}")
        self.keep_rate, self.threshold, self.prefix = keep_rate, threshold, prefix
        self.predictor = ConnectivityPredictor(
            self.head_dim, heads, prefix=prefix, grid=grid, token_ratio=token_ratio, channel_ratio=channel_ratio,
            coefficients=coefficients, basis_threshold=basis_threshold, **self.factory,
        )  # fmt: skip
        self.maps: list[Tensor] | None = None

    def connectivity(self, scores: Tensor, most: int | None = None) -> P.Tokens:
        """The keys each query sees, from the approximate map ``(batch, heads, queries, keys)``, ``most`` at most."""
        if self.threshold is None:
            count = kept_count(self.keep_rate, scores.shape[-1])
            return P.Tokens(scores.topk(count if most is None else min(count, most), sorted=False).indices)
        every = torch.arange(scores.shape[-1], device=scores.device)
        return P.Tokens(torch.where(scores > self.threshold, every, -1))

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, extra: Sequence[Source]) -> Tensor:
        return self._mix(q, k, v, extra)

    def forward_scored(self, x: Tensor, extra: Tensor, tokens: TokenMap | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Mix the tokens that are alive, and score them.

        Args:
            x: ``(batch, *grid, dim)``; places whose tokens were dropped hold anything.
            extra: tokens outside the grid ``(batch, n, dim)``; the first of them scores the others.
            tokens: which places are alive; all by default. Queries see at most as many keys as there are of them.

        Returns:
            Two tensors like ``x`` and ``extra``, and how much of the first extra token's attention, on average over heads,
            each place gets: ``(batch, places)``, with gradient.
        """
        self.check_tokens(x, extra)
        q, k, v = self.project(x, x)
        extra_q, extra_k, extra_v = self.project(extra, extra)
        seen = Source(extra_k, extra_v, P.Dense())
        y = self._mix(q, k, v, [seen], tokens)
        alive = None if tokens is None else tokens.alive.reshape(k.shape[:-2])
        sources = [Source(k, v, P.Dense(), valid=alive), seen]
        scores, _ = attend_weights(extra_q[:, :1], sources, scale=self.scale, reduce="heads")
        y_extra = self.attend(extra_q, sources)
        y, y_extra = (self.proj_drop(linear(self.proj, each.flatten(-2))) for each in (y, y_extra))
        return y, y_extra, scores.flatten(1)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, extra: Sequence[Source], tokens: TokenMap | None = None) -> Tensor:
        key_grid = tuple(k.shape[1:-2])
        outside = extra[0].k.shape[1] if extra else 0
        if self.prefix and outside != self.prefix:
            raise ValueError(f"the predictor knows {self.prefix} tokens outside the grid; got {outside}")
        if self.prefix:
            k, v = (torch.cat([first, rest.flatten(1, -3)], 1) for first, rest in ((extra[0].k, k), (extra[0].v, v)))
        competing = [] if self.prefix else list(extra)
        keys = repeat_heads(k.flatten(1, -3), self.heads)
        if self.maps is not None:
            self.maps.append(self.predictor(q.flatten(1, -3), keys, key_grid, exact=True))
            return self.attend(q, [Source(k, v, P.Dense()), *competing])
        alive = None if tokens is None else F.pad(tokens.alive, [self.prefix, 0], value=True)
        most = None if tokens is None else tokens.present
        with torch.no_grad():
            pattern = self.connectivity(self.predictor(q.flatten(1, -3), keys, key_grid, alive=alive), most)
        return self.attend(q, [Source(k, v, pattern), *competing])


def attention_map(mixer: AttentionMixer, x: Tensor, extra: Tensor | None = None) -> Tensor:
    """The exact dense map of the queries on the grid, ``(batch, heads, queries, keys)``; extra tokens are the first keys."""
    q, k, v = mixer.project(x, x)
    sources = [Source(k.flatten(1, -3), v.flatten(1, -3), P.Dense())]
    if extra is not None:
        _, extra_k, extra_v = mixer.project(extra, extra)
        sources.insert(0, Source(extra_k, extra_v, P.Dense()))
    return torch.cat(attend_weights(q.flatten(1, -3), sources, scale=mixer.scale), -1)


def reconstruction_loss(student: nn.Module, teacher: nn.Module, images: Tensor, weight: float = 0.01) -> Tensor:
    """The first phase of training: the predictors learn the maps of a dense model.

        weight * mean over layers of the sum of (A' - A)^2 over images, heads, queries and keys

    Args:
        student: a model with :class:`SparsifinerAttention` in some blocks.
        teacher: the dense model, with as many attention mixers, in the same order.
        images: both models' input.
        weight: the published one.

    Raises:
        ValueError: other numbers of mixers.
    """
    students = [module for module in student.modules() if isinstance(module, SparsifinerAttention)]
    teachers = [module for module in teacher.modules() if isinstance(module, AttentionMixer)]
    if not students or len(students) != len(teachers):
        raise ValueError(f"the student has {len(students)} sparsifiner mixers, the teacher {len(teachers)} attention mixers")
    wanted: list[Tensor] = []
    hooks = [
        each.register_forward_hook(lambda module, inputs, _: wanted.append(attention_map(module, *inputs))) for each in teachers
    ]
    found: list[Tensor] = []
    try:
        with torch.no_grad():
            teacher(images)
        for each in students:
            each.maps = found
        student(images)
    finally:
        for each in students:
            each.maps = None
        for hook in hooks:
            hook.remove()
    errors = [(ours - exact.to(ours.dtype)).square().sum() for ours, exact in zip(found, wanted, strict=True)]
    return weight * torch.stack(errors).mean()


def distillation_loss(
    logits: Tensor,
    tokens: Tensor,
    teacher_logits: Tensor,
    teacher_tokens: Tensor,
    labels: Tensor,
    *,
    logit_weight: float = 0.5,
    token_weight: float = 0.5,
) -> Tensor:
    """The second phase of training: labels, and the dense model's logits and patch tokens.

        CE(logits, labels) + logit_weight KL(teacher || student) + token_weight mean (tokens - teacher_tokens)^2

    Args:
        logits, teacher_logits: ``(batch, classes)``.
        tokens, teacher_tokens: of the grid after the last block, ``(batch, n, dim)``.
        labels: ``(batch,)`` class numbers.
        logit_weight, token_weight: the published ones.
    """
    divergence = F.kl_div(logits.log_softmax(-1), teacher_logits.log_softmax(-1), reduction="batchmean", log_target=True)
    return F.cross_entropy(logits, labels) + logit_weight * divergence + token_weight * F.mse_loss(tokens, teacher_tokens)
