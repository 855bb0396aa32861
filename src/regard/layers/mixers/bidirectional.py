"""Attention that is used in both directions: few tokens gather from many, and give back along the same attention.

    gather:  y = W_o A v(z),   A = softmax(q(x) k(z)^T / sqrt(d))           x: few tokens, z: many
    spread:  y' = W'_o A^T v'(x'),   or  W'_o softmax over x of the same logits, v'(x')

The columns of A do not sum to one: what a token gets back is as much as was taken of it.
Cost: linear in either number of tokens; going back takes no queries and keys of its own. Source: Koner et al., LookupViT,
arXiv:2407.12753.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from ...checks import check_choice, checked
from ...ops import attend
from ...ops.attention.transposed import attend_transposed
from ..linear import linear


class Link(NamedTuple):
    """What gathering leaves behind for the way back: queries, keys and the log-sum-exp of each query's row."""

    q: Tensor
    k: Tensor
    lse: Tensor


class BidirectionalAttention(nn.Module):
    """Gather from a context, and later spread to it along the same attention. Not a mixer: it has two sets of tokens.

    Args:
        dim: channels of both sets.
        heads: attention heads.
        reuse: ``"probs"`` goes back with the weights of the way there, transposed and not normalised again; ``"logits"`` with
            the softmax of the transposed logits, so that what each token of the context gets has weights that sum to one.
        qkv_bias: whether queries, keys and values have a bias.
        backend: see :func:`regard.attend`.

    Raises:
        ValueError: ``dim`` is not a multiple of ``heads``; an unknown ``reuse``; tokens of another width.
    """

    @checked()
    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        reuse: str = "probs",
        qkv_bias: bool = True,
        backend: str = "auto",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"dim must be a multiple of heads; got dim={dim}, heads={heads}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.heads, self.backend = dim, heads, backend
        self.reuse = check_choice("reuse", reuse, ("probs", "logits"))
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, **factory)
        self.back_v = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.back_proj = nn.Linear(dim, dim, **factory)

    def gather(self, x: Tensor, context: Tensor) -> tuple[Tensor, Link]:
        """What tokens ``(batch, *grid, dim)`` find in a context ``(batch, *context_grid, dim)``, and the way back."""
        for name, tokens in (("x", x), ("context", context)):
            if tokens.ndim < 3 or tokens.shape[-1] != self.dim:
                raise ValueError(f"expected {name} (batch, *grid, {self.dim}); got {tuple(tokens.shape)}")
        q = linear(self.q, x).unflatten(-1, (self.heads, -1))
        k, v = linear(self.kv, context).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        y, lse = attend(q, k, v, return_lse=True, backend=self.backend)
        return linear(self.proj, y.flatten(-2)), Link(q, k, lse)

    def spread(self, x: Tensor, link: Link) -> Tensor:
        """What tokens of the grid that gathered give back to the context, ``(batch, *context_grid, dim)``."""
        v = linear(self.back_v, x).unflatten(-1, (self.heads, -1))
        y = (
            attend_transposed(link.q, link.k, v, lse=link.lse, backend=self.backend)
            if self.reuse == "probs"
            else attend(link.k, link.q, v, backend=self.backend)
        )
        assert isinstance(y, Tensor)  # no lse was asked for
        return linear(self.back_proj, y.flatten(-2))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}, reuse={self.reuse!r}"
