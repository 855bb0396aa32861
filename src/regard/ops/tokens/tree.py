"""Trees from dependencies: every token hangs on the one it sends most to, and all of them on the one that sends most.

    parent(s) = argmax over r != s of weights[s, r];  in a cycle, the token that sends most hangs elsewhere instead

Cost: two passes over the weights. Source: Ding et al., DependencyViT, arXiv:2304.03282, where a parent is the largest weight;
how cycles are broken is this library's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import check_range, check_tensor


def dependency_tree(weights: Tensor) -> Tensor:
    """Make one tree of all tokens from how much each sends to each.

    1. The root is the token that sends most, all receivers together. Every other token hangs on the one it sends most to.
    2. Where that closes a cycle, the member that sends most becomes the head of what hangs on the cycle.
    3. Each head hangs on the token it sends most to among those under heads (and the root) that send more than it does.

    So all parents but those of heads are the largest weights, and there are ``n - 1`` edges. Equal sums rank by position, a
    later one higher; of equal weights any may be chosen. The choice carries no gradient.

    Args:
        weights: ``(batch, senders, receivers)``, not negative; what a token sends to itself counts in the sums alone.

    Returns:
        ``(batch, n)``: index of each token's parent; the root's is its own.

    Raises:
        ValueError: weights that are no square matrices.
    """
    check_tensor("weights", weights, what="(batch, n, n)")
    if weights.ndim != 3 or weights.shape[1] != weights.shape[2] or not weights.shape[1]:
        raise ValueError(f"expected weights (batch, n, n) with n of at least 1; got {tuple(weights.shape)}")
    weights = weights.detach()
    batch, n, _ = weights.shape
    index = torch.arange(n, device=weights.device).expand(batch, n)
    order = weights.sum(-1).sort(dim=-1, stable=True).indices
    rank = torch.empty_like(order).scatter(1, order, index)
    root = rank == n - 1
    others = weights.masked_fill(torch.eye(n, dtype=torch.bool, device=weights.device), -torch.inf)
    parents = torch.where(root, index, others.argmax(-1))
    above, highest = parents, rank  # highest: the largest rank on the way up, the token itself included
    for _ in range(max(1, n.bit_length())):  # each step doubles how far up it reaches
        highest = torch.maximum(highest, highest.gather(1, above))
        above = above.gather(1, above)  # in the end on the cycle, or the root
    on_cycle = torch.zeros_like(root).scatter(1, above, True)
    head = on_cycle & (highest == rank) & ~root
    under = highest.gather(1, above)  # rank of the head, or the root, that a token ends up under
    allowed = under.unsqueeze(1) > rank.unsqueeze(2)  # (batch, heads, tokens they may hang on)
    return torch.where(head, others.masked_fill(~allowed, -torch.inf).argmax(-1), parents)


def subtrees(parents: Tensor) -> Tensor:
    """Which tokens each token's subtree holds, itself included: ``(batch, n, n)`` boolean, ``[:, i, j]`` for j under i.

    Args:
        parents: ``(batch, n)`` indices of a forest; a root is its own parent.

    Raises:
        TypeError, ValueError: no integers, or of another shape.
    """
    check_tensor("parents", parents, (torch.int64,), what="(batch, n)")
    if parents.ndim != 2:
        raise ValueError(f"parents must be (batch, n); got {tuple(parents.shape)}")
    check_range("parents", parents, 0, parents.shape[1], "tokens")
    n = parents.shape[1]
    index = torch.arange(n, device=parents.device)
    way = torch.zeros(*parents.shape, n, dtype=torch.bool, device=parents.device)
    way = way.scatter(2, parents.unsqueeze(2), True) | (index[:, None] == index)  # (batch, token, tokens on its way up)
    above = parents
    for _ in range(max(1, n - 1).bit_length()):
        way = way | way.gather(1, above.unsqueeze(2).expand_as(way))
        above = above.gather(1, above)
    return way.transpose(1, 2)
