"""Token reduction: fewer tokens from here on, and the way back to the grid.

    x, tokens = reducer(x, scores, tokens)      keep the ceil(rate * n) tokens with the largest scores
    tokens.restore(x)                           every place of the grid gets the features of the token that stands for it

A reducer takes tokens ``(batch, prefix + n, dim)``, of which the prefix (class and distillation tokens) is never touched, and
scores ``(batch, n)`` that say how much each of the others matters: the attention it gets from the class token (EViT), the mass
it sends (DependencyViT). It returns the remaining tokens and a :class:`TokenMap`, which says for every place of the original
grid which of the present tokens stands for it. One that needs no scores, because it makes a smaller grid of the whole map
(LookupViT), returns the same. Maps compose, so that after any number of reductions of any kind a dense head
or a picture gets its grid back with one gather.

    tokens = TokenMap.full(batch, 14 * 14)
    for block, reducer in ...:
        x, tokens = reducer(x, scores, tokens)
    features = tokens.restore(x).unflatten(1, (14, 14))

Cost: one sort of the scores and one gather of the tokens. Source: each reducer states its own.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checks import (
    FLOATS,
    LARGEST,
    check_device,
    check_integer,
    check_number,
    check_range,
    check_sizes,
    check_tensor,
    checked,
    shown,
)
from ..ops.patterns import Ints
from .pools import resize_tokens, sizes_of


class TokenMap(NamedTuple):
    """Which of the present tokens stands for each place of the original grid."""

    place: Tensor
    """``(batch, places)``: index of a present token, not counting the prefix; -1 where none stands for it."""
    alive: Tensor
    """``(batch, places)`` boolean: whether the place's own token is still there, and stands for itself."""
    present: int
    """How many tokens there are now, not counting the prefix; those that were zeroed in place do not count either."""

    @classmethod
    def full(cls, batch: int, places: int, device: torch.device | str | None = None) -> TokenMap:
        """Every place stands for itself."""
        batch, places = check_integer("batch", batch), check_integer("places", places, 1)
        device = check_device("device", device)
        place = torch.arange(places, device=device).expand(batch, places)
        return cls(place, torch.ones_like(place, dtype=torch.bool), places)

    def then(self, moved: Tensor, survives: Tensor, present: int) -> TokenMap:
        """The map after one more reduction.

        Args:
            moved: ``(batch, n)``: for each present token the index of the one that stands for it afterwards, or -1.
            survives: ``(batch, n)`` boolean: whether it is that token itself.
            present: tokens there are afterwards.

        Raises:
            TypeError, ValueError: other dtypes, shapes or devices.
        """
        check_integer("present", present)
        for name, tensor, kind in (("moved", moved, torch.int64), ("survives", survives, torch.bool)):
            check_tensor(name, tensor, (kind,), device=self.place.device)
            if tuple(tensor.shape) != (self.place.shape[0], self.present):
                raise ValueError(f"{name} must be ({self.place.shape[0]}, {self.present}), (batch, n); got {shown(tensor)}")
        known = self.place >= 0
        at = self.place.clamp(min=0)
        place = moved.gather(1, at).masked_fill(~known, -1)
        return TokenMap(place, self.alive & survives.gather(1, at), present)

    def silence(self, x: Tensor) -> Tensor:
        """Zero the tokens ``(batch, places, ...)`` of places that are not alive, where dropped tokens stay in place."""
        check_tensor("x", x, device=self.alive.device, what="(batch, places, ...)")
        if x.shape[:2] != self.alive.shape:
            raise ValueError(f"expected tokens (batch, places, ...) = {(*self.alive.shape, ...)}; got {tuple(x.shape)}")
        return x.masked_fill(~self.alive.reshape(*self.alive.shape, *[1] * (x.ndim - 2)), 0.0)

    def restore(self, x: Tensor, prefix: int = 1) -> Tensor:
        """Put features back on their places.

        Args:
            x: the present tokens ``(batch, prefix + n, dim)``.
            prefix: leading tokens that have no place.

        Returns:
            ``(batch, places, dim)``: the features of the token that stands for each place, 0 where none does.

        Raises:
            TypeError, ValueError: no such tokens.
        """
        check_integer("prefix", prefix)
        check_tensor("x", x, device=self.place.device, what="(batch, prefix + n, dim)")
        counts = {self.present, self.place.shape[1]}  # or all of them, where dropped ones stay as zeros
        if x.ndim != 3 or x.shape[0] != self.place.shape[0] or x.shape[1] - prefix not in counts:
            expected = f"({self.place.shape[0]}, {prefix} + {self.present}, dim)"
            raise ValueError(f"expected tokens (batch, prefix + n, dim) = {expected}; got {tuple(x.shape)}")
        features = x[:, prefix:]
        index = self.place.clamp(min=0).unsqueeze(-1).expand(-1, -1, x.shape[-1])
        return features.gather(1, index).masked_fill((self.place < 0).unsqueeze(-1), 0.0)

    def spread(self, weights: Tensor) -> Tensor:
        """Put weights between tokens on the places of both.

        Args:
            weights: ``(batch, n, n)`` between the present tokens, without the prefix.

        Returns:
            ``(batch, places, places)``: those of the places' own tokens, 0 where one is gone.

        Raises:
            TypeError, ValueError: no such weights.
        """
        check_tensor("weights", weights, device=self.place.device, what="(batch, n, n)")
        batch, places = self.place.shape
        if tuple(weights.shape) not in ((batch, self.present, self.present), (batch, places, places)):
            expected = (batch, self.present, self.present)
            raise ValueError(f"expected weights (batch, n, n) = {expected}; got {tuple(weights.shape)}")
        index = self.place.clamp(min=0)
        rows = weights.gather(1, index.unsqueeze(2).expand(-1, -1, weights.shape[2]))
        both = rows.gather(2, index.unsqueeze(1).expand(-1, index.shape[1], -1))
        return both * (self.alive.unsqueeze(1) & self.alive.unsqueeze(2)).to(both.dtype)


class Split(NamedTuple):
    """Kept and dropped tokens: indices ``(batch, count)`` and ``(batch, n - count)``, together each token once."""

    kept: Tensor
    dropped: Tensor


def kept_count(rate: float, n: int) -> int:
    """``ceil(rate * n)``, of the product in decimals: 0.55 of 100 is 55."""
    return math.ceil(round(rate * n, 9))


def split_by_score(scores: Tensor, count: int, order: str = "score") -> Split:
    """Part tokens into the ``count`` with the largest scores and the others; the choice carries no gradient.

    Args:
        scores: ``(batch, n)``.
        count: tokens to keep, 1 to n.
        order: of both parts: ``"score"``, largest first, or ``"position"``.

    Raises:
        ValueError: a count out of range; an unknown order.
    """
    check_tensor("scores", scores, what="(batch, n)")
    if scores.ndim != 2:
        raise ValueError(f"scores must be (batch, n); got {tuple(scores.shape)}")
    n = scores.shape[-1]
    count = check_integer("count", count, None)
    if not 1 <= count <= n:
        raise ValueError(f"the number of tokens to keep must be in 1..{n}; got {count}")
    if not isinstance(order, str) or order not in ORDERS:
        given = repr(order) if isinstance(order, str) else shown(order)
        raise ValueError(f"order must be 'score' or 'position'; got {given}")
    ranked = scores.detach().sort(dim=-1, descending=True, stable=True).indices
    kept, dropped = ranked[:, :count], ranked[:, count:]
    return Split(kept, dropped) if order == "score" else Split(kept.sort(-1).values, dropped.sort(-1).values)


ORDERS = ("score", "position")


class TokenReducer(nn.Module):
    """Keep the tokens with the largest scores, drop the others; nothing stands for them afterwards.

    Args:
        rate: share of the present tokens to keep, ``ceil(rate * n)`` of them; it may be set later, by a schedule.
        prefix: leading tokens that always stay.
        order: of the kept tokens, see :func:`split_by_score`; ``"position"`` keeps them in the order of the grid.

    Raises:
        ValueError: a rate outside (0, 1].

    Source: Rao et al., DynamicViT, arXiv:2106.02034.
    """

    @checked(prefix=0)
    def __init__(self, rate: float, *, prefix: int = 1, order: str = "score") -> None:
        super().__init__()
        if order not in ORDERS:
            raise ValueError(f"order must be 'score' or 'position'; got {order!r}")
        self.rate, self.prefix, self.order = rate, prefix, order

    @property
    def rate(self) -> float:
        """The share of tokens to keep."""
        return self._rate

    @rate.setter
    def rate(self, value: float) -> None:
        if not 0.0 < check_number("rate", value) <= 1.0:
            raise ValueError(f"rate must be in (0, 1]; got {value}")
        self._rate = value

    def forward(self, x: Tensor, scores: Tensor, tokens: TokenMap, *, count: int | None = None) -> tuple[Tensor, TokenMap]:
        """Reduce.

        Args:
            x: ``(batch, prefix + n, dim)``.
            scores: ``(batch, n)``.
            tokens: the map so far.
            count: tokens to keep, instead of ``ceil(rate * n)``; all of them leaves everything as it is.

        Returns:
            The remaining tokens, prefix first, and the map after this reduction.
        """
        _check_map(tokens)
        check_tensor("x", x, device=tokens.place.device, what="(batch, prefix + n, dim)")
        check_tensor("scores", scores, device=x.device, what="(batch, n)")
        batch, n = tokens.place.shape[0], self.expected(tokens)
        if x.ndim != 3 or x.shape[:2] != (batch, self.prefix + n) or tuple(scores.shape) != (batch, n):
            raise ValueError(
                f"expected tokens (batch, {self.prefix} + {self.expected(tokens)}, dim) and a score for each but the prefix; "
                f"got {tuple(x.shape)} and {tuple(scores.shape)}"
            )
        count = kept_count(self.rate, n) if count is None else check_integer("count", count, None)
        if count == n:
            return x, tokens
        split = split_by_score(scores, count, self.order)
        return self.reduce(x, scores, tokens, split)

    def expected(self, tokens: TokenMap) -> int:
        """The number of tokens behind the prefix that come with a map."""
        return tokens.present

    def reduce(self, x: Tensor, scores: Tensor, tokens: TokenMap, split: Split) -> tuple[Tensor, TokenMap]:
        """What becomes of the kept and the dropped tokens."""
        return self._keep(x, split), tokens.then(*moves(split, -1), split.kept.shape[1])

    def _keep(self, x: Tensor, split: Split) -> Tensor:
        return torch.cat([x[:, : self.prefix], gather_tokens(x[:, self.prefix :], split.kept)], 1)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}, prefix={self.prefix}, order={self.order!r}"


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Tokens ``(batch, count, dim)`` at ``index`` ``(batch, count)`` of ``(batch, n, dim)``."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def moves(split: Split, dropped_to: int) -> tuple[Tensor, Tensor]:
    """Where each token went, all dropped ones to one index, and whether it was kept: both ``(batch, n)``."""
    batch, count = split.kept.shape
    moved = split.kept.new_full((batch, count + split.dropped.shape[1]), dropped_to)
    moved = moved.scatter(1, split.kept, torch.arange(count, device=moved.device).expand(batch, -1))
    survives = torch.zeros_like(moved, dtype=torch.bool).scatter(1, split.kept, True)
    return moved, survives


class FusingReducer(TokenReducer):
    """The dropped tokens become one: their sum weighted with their scores, not normalised, behind the kept ones.

        fused = sum over dropped i of score_i x_i

    The fused token is present from then on, is scored and may be kept or dropped by the next reduction. It stands for the
    places of all the tokens it took in. The scores of the dropped tokens get gradient.

    Args:
        rate, prefix, order: see :class:`TokenReducer`.

    Source: Liang et al., EViT, arXiv:2202.07800.
    """

    def reduce(self, x: Tensor, scores: Tensor, tokens: TokenMap, split: Split) -> tuple[Tensor, TokenMap]:
        weights = scores.gather(1, split.dropped).to(x.dtype)
        fused = torch.einsum("bn,bnc->bc", weights, gather_tokens(x[:, self.prefix :], split.dropped))
        y = torch.cat([self._keep(x, split), fused.unsqueeze(1)], 1)
        count = split.kept.shape[1]
        return y, tokens.then(*moves(split, count), count + 1)


def _check_map(tokens: object) -> None:
    if not isinstance(tokens, TokenMap):
        raise TypeError(f"tokens must be a TokenMap; got {shown(tokens)}")


class TreeReducer(TokenReducer):
    """The dropped tokens are represented by their parents: by the nearest kept token on the way up the tree.

    ``parents`` ``(batch, n)`` is an argument of the forward pass: the index of each present token's parent; a root is its own.
    A dropped token whose way up ends at a dropped root, or in a cycle of dropped tokens, is represented by none.

    Args:
        rate, prefix, order: see :class:`TokenReducer`.

    Source: Ding et al., DependencyViT, arXiv:2304.03282.
    """

    def forward(  # type: ignore[override]  # a tree takes one argument more
        self, x: Tensor, scores: Tensor, tokens: TokenMap, parents: Tensor, *, count: int | None = None
    ) -> tuple[Tensor, TokenMap]:
        _check_map(tokens)
        check_tensor("x", x, device=tokens.place.device, what="(batch, prefix + n, dim)")
        check_tensor("scores", scores, device=x.device, what="(batch, n)")
        check_tensor("parents", parents, (torch.int64, *FLOATS), device=x.device, what="(batch, n)")
        if parents.shape != scores.shape or parents.is_floating_point():
            raise ValueError(
                f"parents must be indices of the shape of scores, {tuple(scores.shape)}; "
                f"got {parents.dtype} {tuple(parents.shape)}"
            )
        check_range("parents", parents, 0, self.expected(tokens), "tokens")
        n = self.expected(tokens)
        x, (moved, survives, present) = super().forward(x, scores, TokenMap.full(len(x), n, x.device), count=count)
        if present == n:
            return x, tokens
        above = torch.where(survives, torch.arange(n, device=x.device), parents)
        for _ in range(max(1, n - 1).bit_length()):  # each step doubles how far up it reaches
            above = above.gather(1, above)
        return x, tokens.then(moved.gather(1, above), survives, present)


class MaskingReducer(TokenReducer):
    """The dropped tokens stay where they are, as zeros: for layers that are tied to the number of tokens.

    The share to keep is of all tokens, the zeros among them; only those still alive compete. ``tokens.alive`` is the mask of
    keys to see.

    Args:
        rate, prefix: see :class:`TokenReducer`; the order is always that of the grid.

    Source: Wei et al., Sparsifiner, arXiv:2303.13755.
    """

    @checked(prefix=0)
    def __init__(self, rate: float, *, prefix: int = 1) -> None:
        super().__init__(rate, prefix=prefix, order="position")

    def forward(self, x: Tensor, scores: Tensor, tokens: TokenMap, *, count: int | None = None) -> tuple[Tensor, TokenMap]:
        _check_map(tokens)
        check_tensor("scores", scores, device=tokens.place.device, what="(batch, n)")
        if scores.shape != tokens.alive.shape:
            raise ValueError(
                f"expected a score for each of (batch, n) = {tuple(tokens.alive.shape)}; got {tuple(scores.shape)}"
            )
        count = min(kept_count(self.rate, self.expected(tokens)), tokens.present) if count is None else count
        return super().forward(x, scores.masked_fill(~tokens.alive, -torch.inf), tokens, count=count)

    def expected(self, tokens: TokenMap) -> int:
        return tokens.place.shape[1]

    def reduce(self, x: Tensor, scores: Tensor, tokens: TokenMap, split: Split) -> tuple[Tensor, TokenMap]:
        _, survives = moves(split, -1)
        alive = tokens.alive & survives
        tokens = TokenMap(tokens.place.masked_fill(~alive, -1), alive, split.kept.shape[1])
        return torch.cat([x[:, : self.prefix], tokens.silence(x[:, self.prefix :])], 1), tokens


class ResizingReducer(nn.Module):
    """Tokens of a grid become those of another: their map, interpolated linearly; the nearest of them stands for a place.

    On two axes this is a bilinear resize, on three a trilinear one, corners not aligned, without a filter before it. No token
    stays itself unless the grid stays as it is.

    Args:
        size: tokens per axis afterwards, a number or one per axis; it may be set later, any size fits any grid.

    Raises:
        ValueError: a size below 1; a size per axis for a grid of another number of axes.

    Source: Koner et al., LookupViT, arXiv:2407.12753.
    """

    @checked()
    def __init__(self, size: Ints) -> None:
        super().__init__()
        self.size = size

    @property
    def size(self) -> Ints:
        """Tokens per axis after the reduction."""
        return self._size

    @size.setter
    def size(self, value: Ints) -> None:
        size = check_sizes("size", value, low=-LARGEST)
        if min(size if isinstance(size, tuple) else (size,)) < 1:
            raise ValueError(f"size must be at least 1 on every axis; got {value}")
        self._size = size

    def forward(self, x: Tensor, tokens: TokenMap) -> tuple[Tensor, TokenMap]:
        """Reduce.

        Args:
            x: ``(batch, *grid, dim)``.
            tokens: the map so far.

        Returns:
            ``(batch, *size, dim)`` and the map after this reduction, whose indices are row-major.
        """
        _check_map(tokens)
        check_tensor("x", x, device=tokens.place.device, what="(batch, *grid, dim)")
        grid = tuple(x.shape[1:-1])
        if x.ndim < 3 or not x.shape[-1] or x.shape[0] != tokens.place.shape[0] or math.prod(grid) != tokens.present:
            raise ValueError(f"expected (batch, *grid, dim) with {tokens.present} tokens; got {tuple(x.shape)}")
        sizes = sizes_of(grid, self.size)
        if sizes == grid:
            return x, tokens
        nearest = torch.zeros((), dtype=torch.long, device=x.device)
        for length, size in zip(grid, sizes, strict=True):  # the cell that the middle of a place lies in
            along = (2 * torch.arange(length, device=x.device) + 1) * size // (2 * length)
            nearest = nearest.unsqueeze(-1) * size + along
        moved = nearest.flatten().expand(x.shape[0], -1)
        return resize_tokens(x, sizes), tokens.then(moved, torch.zeros_like(moved, dtype=torch.bool), math.prod(sizes))

    def extra_repr(self) -> str:
        return f"size={self.size}"


def cosine_rate(epoch: float, rate: float, start: float = 10, span: float = 100) -> float:
    """The rate to keep at an epoch of training: 1 before ``start``, then a half cosine down to ``rate`` over ``span`` epochs.

        rate + (1 - rate) (1 + cos(pi (epoch - start) / span)) / 2

    Source: Liang et al., EViT, arXiv:2202.07800.
    """
    check_number("epoch", epoch)
    check_number("start", start)
    check_number("rate", rate, 0.0, 1.0)
    if not check_number("span", span) > 0.0:
        raise ValueError(f"span must be more than 0; got {span}")
    progress = min(max(epoch - start, 0.0) / span, 1.0)
    return rate + (1.0 - rate) * 0.5 * (1.0 + math.cos(math.pi * progress))
