"""Linear attention: a kernel of features instead of the softmax, so that keys can be summed before any query asks.

    y_t = scale sum_s w_ts v_s / norm_t,   w_ts = decay_ts f(q_t)^T f(k_s)
    norm_t = max(sum_s w_ts, floor) + eps,  the number of keys, or 1

s runs over all keys, or over those up to t in raster order; decay_ts is the product of the decays of all tokens after the
earlier one up to the later one, per head or per feature, fixed or given by the tokens.

Cost: linear in tokens. The floor is 4 N d e FLOPs per head (f(k)^T v once, f(q) times that once) and one reading of q, k
and v and one writing of y; :mod:`regard.ops.linear.chunks` says what the causal form computes beside that. Memory: a few
chunks; states are float32 (float64 for float64).

Source: Katharopoulos et al., linear transformers, arXiv:2006.16236; Qin et al., Lightning Attention, arXiv:2405.17381 and
arXiv:2401.04658; Yang et al., gated linear attention, arXiv:2312.06635; Choromanski et al., Performer, arXiv:2009.14794;
Qin et al., cosFormer, arXiv:2202.08791; Zheng, L2ViT, arXiv:2501.16182.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...checks import INTEGERS, check_integer, check_tensor, shown
from ..backends.base import choose
from ..calls.lower import common_dtype
from ..calls.observe import WATCHERS, Weighing, tell
from .backends import BACKENDS, by_definition
from .call import CHUNK, LinearCall, LinearState, check_inputs, pose
from .features import FeatureMap
from .naive import weights
from .spans import readable


def linear_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature: str | FeatureMap = "none",
    norm: str = "none",
    floor: float | None = None,
    eps: float = 0.0,
    causal: bool = False,
    log_decay: Tensor | None = None,
    scale: float | Tensor = 1.0,
    valid: Tensor | None = None,
    state: LinearState | None = None,
    start: int = 0,
    return_state: bool = False,
    chunk: int = CHUNK,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, LinearState]:
    """Attention whose weights are products of features; linear in tokens.

    Args:
        q: queries ``(batch, *grid, heads, dim)``.
        k: keys ``(batch, *k_grid, heads, dim)``; with ``causal`` or a decay on the grid of ``q``.
        v: values ``(batch, *k_grid, heads, value_dim)``.
        feature: ``"none"``, ``"relu"``, ``"elu_plus_one"``, ``"silu"``, or one of :mod:`regard.ops.linear.features`.
        norm: ``"none"``; ``"sum"`` divides by the sum of the weights, ``"count"`` by the number of keys seen (not decayed).
        floor: the least that the sum may be; None leaves it. A query whose divisor is 0 gives 0; one below the smallest normal
            number of the dtype of states counts as 0, see :mod:`regard.ops.linear.norms`.
        eps: added to the sum, after the floor. An epsilon relative to the mean weight is ``eps`` times the number of keys.
        causal: whether a query sees the keys up to itself in raster order, or all.
        log_decay: logarithm of the decay, 0 or less, also minus infinity: one per head ``(heads,)``, per feature
            ``(heads, features)``, per token ``(batch, *grid, heads)`` or both ``(batch, *grid, heads, features)``. Without
            ``causal``, weights decay with the distance in both directions. Values above 0 and NaN are refused where they can be
            looked at for nothing: on a CPU, outside of compiled graphs and transforms; elsewhere they are not looked for.
        scale: factor on the output, a number or one per head.
        valid: ``(batch, *k_grid)``, True where a key exists; the decay of a missing key's token still counts. What stands in k
            and v for a missing key reaches nothing, NaN and infinity included; its gradients are 0.
        state: what the keys of earlier calls left, in the dtype of states; every axis must fit.
        start: position of the first token, for feature maps that depend on positions.
        return_state: also return what all keys so far leave to later queries.
        chunk: tokens of a chunk of the causal form, a power of two; the result does not depend on it.
        backend: ``"auto"``, ``"chunked"`` (torch), ``"native"`` (compiled for the CPU) and ``"triton"`` (neither with
            decays per feature), or ``"naive"``, the definition, which computes all weights.

    Returns:
        ``(batch, *grid, heads, value_dim)`` in the dtype of ``q``, and the :class:`LinearState` if asked for. A number that is
        not finite reaches the outputs of its own head that see it, and no others; but on a GPU, with ``causal``, also those of
        the tokens before it in its chunk.

    Raises:
        TypeError: another kind of thing than an argument may be, or a tensor of another dtype.
        ValueError: shapes, devices or options that do not go together, with what was given and what is allowed.
    """
    check_inputs(q=q, k=k, v=v)
    q, k, v = common_dtype(q, k, v)
    call = pose(q, k, v, feature, norm, floor, eps, causal, log_decay, scale, valid, state, start, return_state, chunk)
    chosen = choose(BACKENDS, call, backend)
    if WATCHERS:
        tell(_weighing(q, k, v, call))
    y, final = (chosen.run if q.shape[0] else by_definition)(call)
    y = y.to(q.dtype).unflatten(1, q.shape[1:-2])
    if not return_state:
        return y
    assert final is not None  # it was checked that there is one
    return y, final


def linear_weights(
    q: Tensor,
    k: Tensor,
    *,
    rows: Tensor | Sequence[int] | None = None,
    feature: str | FeatureMap = "none",
    norm: str = "none",
    floor: float | None = None,
    eps: float = 0.0,
    causal: bool = False,
    log_decay: Tensor | None = None,
    scale: float | Tensor = 1.0,
    valid: Tensor | None = None,
    state: LinearState | None = None,
    start: int = 0,
) -> Tensor:
    """What :func:`linear_attend` multiplies the values with, by the definition; differentiable.

    Args:
        q, k, feature, norm, floor, eps, causal, log_decay, scale, valid, state, start: as in :func:`linear_attend`; a state
            takes part in the sum of the weights, its own keys are not shown.
        rows: row-major indices of the queries to look at; all by default.

    Returns:
        ``(batch, heads, rows, *k_grid)`` in float32 (float64 for float64). They may be negative and need not sum to 1.

    Raises:
        TypeError, ValueError: as in :func:`linear_attend`; rows that are no indices of queries.
    """
    check_inputs(q=q, k=k)
    q, k = common_dtype(q, k)
    call = pose(q, k, None, feature, norm, floor, eps, causal, log_decay, scale, valid, state, start)
    return weights(call, _chosen(rows, call)).unflatten(-1, k.shape[1:-2])


def _chosen(rows: Tensor | Sequence[int] | None, call: LinearCall) -> Tensor:
    queries = call.q.shape[1]
    if rows is None:
        return torch.arange(queries, device=call.q.device)
    if isinstance(rows, Tensor):
        check_tensor("rows", rows, INTEGERS, device=call.q.device)
    elif not isinstance(rows, Sequence) or isinstance(rows, str):
        raise TypeError(f"rows must be indices of queries; got {shown(rows)}")
    else:
        rows = torch.tensor([check_integer("rows", row) for row in rows], dtype=torch.long, device=call.q.device)
    if rows.ndim != 1 or not len(rows):
        raise ValueError(f"rows must be indices of queries, one axis and at least one; got {shown(rows)}")
    if readable(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < queries:
        raise ValueError(f"rows must be indices of queries in 0..{queries - 1}; got {int(rows.min())}..{int(rows.max())}")
    return rows.long()


def _weighing(q: Tensor, k: Tensor, v: Tensor, call: LinearCall) -> Weighing:
    """What watchers are told: the weights by the definition, and the least arithmetic and traffic."""
    grids = tuple(q.shape[1:-2]), tuple(k.shape[1:-2])
    call = replace(call, v=None)  # who keeps the weights keeps no values

    def of_rows(rows: Tensor) -> Tensor:
        return weights(call, rows).unflatten(-1, grids[1])

    products = (q.shape[:-1].numel() + k.shape[:-1].numel()) * call.q.shape[-1]
    flops = 2 * products * (v.shape[-1] + (call.norm == "sum"))
    moved = q.numel() + k.numel() + v.numel() + q.shape[:-1].numel() * v.shape[-1]
    return Weighing("linear", q.shape[0], q.shape[-2], *grids, of_rows, q.device, flops=flops, bytes=moved * q.element_size())
