"""The largest eigenvector of a symmetric operator beside one that is known, from products with it alone.

Lanczos' method: on the space of v, A v, A A v, ... the operator is tridiagonal, and the ends of its spectrum show first.
Cost: a product per step and quadratic in the steps for keeping the basis orthogonal. Source: Lanczos, J. Res. Natl. Bur. Stand.
45 (1950); full reorthogonalisation: Parlett, "The Symmetric Eigenvalue Problem", 1980.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_EVERY = 10
"""Steps from one look at the spectrum to the next."""


def largest_eigenvector(
    product: Callable[[Tensor], Tensor], known: Tensor, *, tolerance: float = 1e-10, steps: int = 1000
) -> tuple[Tensor, float]:
    """The eigenvector of length one of the largest eigenvalue among those orthogonal to one that is known, and that eigenvalue.

    Where several have that eigenvalue, any of their combinations may come.

    Args:
        product: of the operator with a vector ``(n,)``, in float64.
        known: an eigenvector of it ``(n,)``, of any length.
        tolerance: length of ``A v - lambda v`` that is good enough.
        steps: to try at most.

    Raises:
        RuntimeError: the tolerance was not reached.
    """
    n = len(known)
    start = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(known.device)
    basis = [known.double() / known.double().norm()]
    vector = _beside(start, basis)
    basis.append(vector / vector.norm())
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    for step in range(1, min(steps, n - 1) + 1):
        moved = product(basis[-1])
        diagonal.append(basis[-1] @ moved)
        rest = _beside(moved, basis)
        length = rest.norm()
        exhausted = step == n - 1 or float(length) <= tolerance
        if exhausted or step % _EVERY == 0:
            small = torch.stack(diagonal).diag()
            if beside:
                small = small + torch.stack(beside).diag(1) + torch.stack(beside).diag(-1)
            values, vectors = torch.linalg.eigh(small)
            if exhausted or float(length * vectors[-1, -1].abs()) <= tolerance:
                return torch.stack(basis[1:], 1) @ vectors[:, -1], float(values[-1])
        beside.append(length)
        basis.append(rest / length)
    raise RuntimeError(f"no eigenvector to a tolerance of {tolerance} after {min(steps, n - 1)} steps")


def _beside(vector: Tensor, basis: list[Tensor]) -> Tensor:
    """What of a vector is orthogonal to a basis; taken twice, for the rounding of the first time."""
    span = torch.stack(basis)
    for _ in range(2):
        vector = vector - span.T @ (span @ vector)
    return vector
