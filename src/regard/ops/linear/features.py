"""Feature maps of linear attention that look at more than one value: at a whole token, its position, or all tokens.

    exp(q^T k / sqrt(d)) = E f(q)^T f(k),   cos(pi (t - s) / 2M) q^T k = f(q_t)^T f(k_s)

Those of one value each are :data:`regard.ops.linear.spans.ACTIVATIONS`. Source: Choromanski et al., Performer,
arXiv:2009.14794; Qin et al., cosFormer, arXiv:2202.08791.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...checks import check_integer, check_number, check_tensor


class FeatureMap(Protocol):
    """What makes features of queries and of keys ``(batch, tokens, heads, dim)``, in the dtype it is given.

    ``streams`` tells whether the features of a token are the same whatever comes after it, which states rest on.
    """

    streams: bool

    def __call__(self, x: Tensor, start: int, keys: bool) -> Tensor:
        """The features of tokens from position ``start``, of keys or of queries."""
        ...


@dataclass(frozen=True, eq=False)
class RandomFeatures:
    """Positive random features, of which the product estimates exp(q^T k / sqrt(d)).

        f(x) = m^-1/2 (exp(omega^T x' - |x'|^2 / 2 - top) + eps),   x' = d^-1/4 x

    ``top`` is the largest omega^T x' of a query, or of all keys of a head; it cancels in a normalised attention but for
    ``eps``. Since it looks at all keys, these features do not stream.

    Attributes:
        omega: directions ``(m, d)`` or ``(heads, m, d)``, see :meth:`draw`.
        eps: added to every feature.

    Source: Choromanski et al., arXiv:2009.14794.
    """

    omega: Tensor
    eps: float = 1e-4
    streams = False

    def __post_init__(self) -> None:
        check_tensor("omega", self.omega, what="(features, dim) or (heads, features, dim)")
        check_number("eps", self.eps)

    @staticmethod
    def draw(features: int, dim: int, generator: torch.Generator | None = None, *, heads: int | None = None) -> Tensor:
        """Directions that are orthogonal in blocks of ``dim``, with the lengths of normal vectors; on the CPU.

        Args:
            features: number of directions.
            dim: of queries and keys.
            generator: of random numbers.
            heads: draw as many sets; None draws one for all heads.
        """
        check_integer("features", features, 1)
        check_integer("dim", dim, 1)
        if heads is not None:
            check_integer("heads", heads, 1)
        shape = (1 if heads is None else heads, -(-features // dim), dim, dim)
        blocks, triangle = torch.linalg.qr(torch.randn(shape, generator=generator))
        blocks = blocks * triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # else half of all directions is missing
        lengths = torch.randn(shape, generator=generator).norm(dim=-1, keepdim=True)
        omega = (blocks.transpose(-2, -1) * lengths).flatten(1, 2)[:, :features]
        return omega[0] if heads is None else omega

    def __call__(self, x: Tensor, start: int, keys: bool) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32)) * x.shape[-1] ** -0.25
        omega = self.omega.to(wide)
        fits = omega.ndim in (2, 3) and omega.shape[-1] == x.shape[-1] and omega.shape[-2] > 0
        if not fits or (omega.ndim == 3 and len(omega) != x.shape[-2]):
            raise ValueError(
                f"omega must be (features, dim) or (heads, features, dim) for (..., heads, dim) = {tuple(x.shape[-2:])}; "
                f"got {tuple(omega.shape)}"
            )
        along = torch.einsum("bnhd,hmd->bnhm" if omega.ndim == 3 else "bnhd,md->bnhm", wide, omega)
        top = along.detach().amax((1, 3) if keys else 3, keepdim=True)
        features = torch.exp(along - wide.square().sum(-1, keepdim=True) / 2 - top) + self.eps
        return (features * features.shape[-1] ** -0.5).to(x.dtype)


@dataclass(frozen=True)
class CosineFeatures:
    """Rectified features that are compared under cos(pi (t - s) / 2M): ``relu(x) cos a`` beside ``relu(x) sin a``.

    Attributes:
        length: M, at least the number of tokens on either side; the angle of token t is ``a = pi t / 2M``.

    Source: Qin et al., cosFormer, arXiv:2202.08791.
    """

    length: int
    streams = True

    def __post_init__(self) -> None:
        check_integer("length", self.length, 1)

    def __call__(self, x: Tensor, start: int, keys: bool) -> Tensor:
        if start + x.shape[1] > self.length:
            raise ValueError(
                f"features of positions below length={self.length} end before {start + x.shape[1]} tokens; got {start=}"
            )
        wide = torch.promote_types(x.dtype, torch.float32)
        angles = torch.arange(start, start + x.shape[1], device=x.device, dtype=wide) * (math.pi / 2 / self.length)
        angles = angles[:, None, None]
        return torch.cat([x.relu() * angles.cos().to(x.dtype), x.relu() * angles.sin().to(x.dtype)], -1)
