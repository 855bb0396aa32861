"""From sources to calls: checked, broken up by heads, and joined where several are one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import LARGEST, check_integer, check_number, check_tensor, check_tokens, shown
from ..patterns import Pattern, as_pattern, leaves
from .call import Call
from .footprint import Footprint
from .source import HeadTable, Source, TableBias

Group = list[tuple[tuple[int, ...] | None, Call]]
"""The calls that compute one source, each with the query heads it covers (None for all)."""


def starts(q: Tensor, q_start: int | Sequence[int]) -> tuple[int, ...]:
    """The coordinates of the first query; a number is meant for the first axis of the grid."""
    if isinstance(q_start, Sequence) and not isinstance(q_start, (str, bytes)):
        if len(q_start) != q.ndim - 3:
            raise ValueError(f"q_start must have one entry per grid axis, {q.ndim - 3}; got {shown(q_start)}")
        return tuple(check_integer(f"q_start[{axis}]", start, -LARGEST) for axis, start in enumerate(q_start))
    return (check_integer("q_start", q_start, -LARGEST),) + (0,) * (q.ndim - 4)


def check_scale(q: Tensor, scale: float | None) -> float:
    """The factor on the logits: what is given, or ``head_dim ** -0.5``."""
    if scale is not None:
        most = torch.finfo(torch.promote_types(q.dtype, torch.float32)).max  # what it is multiplied in
        return check_number("scale", scale, -most, most)
    if q.shape[-1] == 0:
        raise ValueError(f"no axis may be empty but the batch; got q {tuple(q.shape)}")
    return q.shape[-1] ** -0.5


def check_sink(q: Tensor, sink: Tensor | float | None) -> None:
    """Raise where the sink is neither a number nor one per head."""
    if sink is None:
        return
    if not isinstance(sink, Tensor):
        if not (isinstance(sink, float) and math.isinf(sink)):  # none at all, and one that takes everything
            most = torch.finfo(torch.promote_types(q.dtype, torch.float32)).max
            check_number("sink", sink, -most, most)
        return
    check_tensor("sink", sink, device=q.device, what="of one number per head")
    if tuple(sink.shape) not in ((), (1,), (q.shape[-2],)):
        raise ValueError(f"sink must be a number or one per head, ({q.shape[-2]},); got {shown(sink)}")


def break_up(
    q: Tensor, sources: Sequence[Source], *, scale: float | None, q_start: int | Sequence[int], dropout: float, need_lse: bool
) -> list[Group]:
    """For each source, the calls that compute it and the query heads each of them covers (None for all)."""
    check_tensor("q", q, what="(batch, *grid, heads, head_dim)")
    if q.ndim < 4:
        raise ValueError(f"q must be (batch, *grid, heads, head_dim) with at least one grid axis; got {tuple(q.shape)}")
    check_sources(sources)
    check_number("dropout", dropout, 0.0, below=1.0)
    scale = check_scale(q, scale)
    broken = [_calls_of(q, source, scale, q_start, dropout, need_lse) for source in sources]
    widths = [source.v.shape[-1] for source in sources]
    if any(width != widths[0] for width in widths):
        raise ValueError(f"the values of all sources must have one width; got {widths}")
    return broken


def check_sources(sources: Sequence[Source]) -> None:
    """Raise where what should be a list of sources is not one."""
    if isinstance(sources, (str, bytes)) or not isinstance(sources, Sequence):
        raise TypeError(f"expected a list of sources; got {shown(sources)}")
    if not sources:
        raise ValueError("attend needs at least one source")
    for source in sources:
        if not isinstance(source, Source):
            raise TypeError(f"expected a list of sources; got {shown(source)} in it")


def join_dense(broken: list[Group], sources: Sequence[Source], need_lse: bool) -> list[Group]:
    """Put the sources that every query sees whole, without a bias, together as one: their order does not matter.

    Args:
        broken: the calls of each source.
        sources: the sources.
        need_lse: whether the log-sum-exp is needed even of a single source.
    """
    dense = [g for g, s in zip(broken, sources, strict=True) if s.q is None and s.heads is None and _is_plain(g)]
    calls = [call for group in dense for _, call in group]
    if len(calls) < 2 or len({(c.k.shape[-2], c.v.shape[-1]) for c in calls}) > 1:
        return broken
    valid = None
    if any(c.valid is not None for c in calls):
        each = [c.k.new_ones(c.k.shape[:2], dtype=torch.bool) if c.valid is None else c.valid for c in calls]
        valid = torch.cat([v.expand(calls[0].batch, -1) for v in each], 1)
    k, v = torch.cat([c.k for c in calls], 1), torch.cat([c.v for c in calls], 1)
    others = [group for group in broken if group not in dense]
    joined = replace(calls[0], k=k, v=v, valid=valid, need_lse=need_lse or bool(others))
    return [[(None, joined)], *others]


def _is_plain(group: Group) -> bool:
    call = group[0][1]
    return len(group) == 1 and call.pattern.sees_all and call.bias is None and call.table is None


def _calls_of(q: Tensor, source: Source, scale: float, q_start, dropout: float, need_lse: bool):
    pattern = as_pattern(source.pattern)
    common = q
    q = q if source.q is None else check_tensor("a source's own q", source.q, device=q.device)
    if source.q is not None and (q.shape[:-2] != common.shape[:-2] or q.shape[-2:] != common.shape[-2:]):
        raise ValueError(f"a source's own q must have the shape of q, {tuple(common.shape)}; got {tuple(q.shape)}")
    k, v, heads = source.k, source.v, source.heads
    for name, tensor in (("k", k), ("v", v)):
        check_tensor(name, tensor, what="(batch, *grid, heads, dim)", device=q.device)
    if heads is not None:
        heads = _check_heads(heads, q.shape[-2])
        q = q[..., list(heads), :]
    q, k, v = common_dtype(q, k, v)
    _check_tensors(q, k, v)
    if source.footprint is not None and not isinstance(source.footprint, Footprint):
        raise TypeError(f"footprint must be a Footprint; got {shown(source.footprint)}")
    bias, table = source.bias, None
    if bias is not None and not isinstance(bias, Tensor):
        if not isinstance(bias, HeadTable) and not isinstance(bias, TableBias):  # a graph knows no protocols of its own objects
            raise TypeError(f"bias must be a tensor or have a table and a pattern; got {shown(bias)}")
        bias, table = None, bias
    valid = source.valid
    if valid is not None:
        valid = check_tensor("valid", valid, (torch.bool,), device=q.device, what=f"of shape {tuple(k.shape[:-2])}")
        if tuple(valid.shape) not in {tuple(k.shape[:-2]), (1, *k.shape[1:-2])}:
            raise ValueError(f"valid must be bool of shape {tuple(k.shape[:-2])}; got {shown(valid)}")
    start = starts(q, q_start)
    if pattern.ordered and q.ndim != k.ndim and not isinstance(q_start, int) and any(start[1:]):
        raise ValueError(f"{pattern!r} counts on grids of other ranks: q_start must be one number; got {start}")
    call = Call(
        q, k, v, pattern, scale, bias=bias, table=table, valid=valid, q_start=start, zeros=((0, 0),) * (k.ndim - 3),
        dropout=dropout, need_lse=need_lse, device=q.device,
    )  # fmt: skip
    if bias is not None:
        call = replace(call, bias=_check_bias(call, bias))
    groups = pattern.head_groups()
    if groups is None:
        return [(heads, _settle(call))]
    if (total := sum(count for _, count in groups)) != q.shape[-2]:
        raise ValueError(f"{pattern!r} is for {total} heads; q has {q.shape[-2]}")
    calls, first = [], 0
    for member, count in groups:
        covered = tuple(range(first, first + count))
        calls.append((tuple(heads[i] for i in covered) if heads else covered, _settle(_take_heads(call, member, first, count))))
        first += count
    return calls


def _check_heads(heads: Sequence[int], count: int) -> tuple[int, ...]:
    """The heads that see a source."""
    if isinstance(heads, (str, bytes, Tensor)) or not isinstance(heads, Sequence):
        raise TypeError(f"heads must be distinct indices below {count}; got {shown(heads)}")
    chosen = tuple(check_integer(f"heads[{index}]", head) for index, head in enumerate(heads))
    if not chosen or max(chosen) >= count or len(set(chosen)) != len(chosen):
        raise ValueError(f"heads must be distinct indices below {count}; got {chosen}")
    return chosen


def _take_heads(call: Call, pattern: Pattern, first: int, count: int) -> Call:
    """The call restricted to consecutive query heads, under one member of a PerHead."""
    group = call.heads // call.k.shape[-2]
    if count % group == 0 and first % group == 0:
        k, v = (t[..., first // group : (first + count) // group, :] for t in (call.k, call.v))
    else:
        each = torch.arange(first, first + count, device=call.k.device) // group
        k, v = (t.index_select(-2, each) for t in (call.k, call.v))
    bias, table = call.bias, call.table
    if bias is not None and bias.shape[1] > 1:
        bias = bias[:, first : first + count]
    if table is not None and table.table.shape[0] > 1:
        table = HeadTable(table.table[first : first + count], table.pattern)
    return replace(call, q=call.q[..., first : first + count, :], k=k, v=v, pattern=pattern, bias=bias, table=table)


def common_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    kinds = {t.dtype for t in tensors}
    if len(kinds) == 1:
        return tensors
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        return tuple(t.to(torch.get_autocast_dtype(device)) for t in tensors)
    raise ValueError(f"q, k and v must share a dtype; got {', '.join(str(t.dtype) for t in tensors)}")


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    def shapes() -> str:
        return f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"

    if k.ndim < 4 or k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"k and v must be (batch, *grid, heads, dim) and agree but in dim; {shapes()}")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q and k must have the same batch size; {shapes()}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must have the same head_dim; {shapes()}")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"the heads of q must be a multiple of the heads of k; {shapes()}")
    if any(0 in tensor.shape[1:] for tensor in (q, k, v)):
        raise ValueError(f"no axis may be empty but the batch; {shapes()}")
    check_tokens(q=q.shape[1:-2], k=k.shape[1:-2])


def _check_bias(call: Call, bias: Tensor) -> Tensor:
    full = (call.batch, call.heads, call.queries, call.keys)
    if isinstance(bias, Tensor) and bias.dtype == torch.bool:
        raise TypeError(
            f"bias is added to the logits and must be floating point; got {shown(bias)}: keys are hidden by "
            "valid=, by a pattern, or by a bias of -inf"
        )
    check_tensor("bias", bias, device=call.q.device)
    if bias.ndim > 4 or any(n not in (1, m) for n, m in zip(reversed(bias.shape), reversed(full), strict=False)):
        raise ValueError(f"bias must broadcast to (batch, heads, queries, keys) = {full}; got {tuple(bias.shape)}")
    bias = bias.reshape((1,) * (4 - bias.ndim) + tuple(bias.shape))
    return bias if bias.dtype != torch.float64 else saturated(bias, torch.promote_types(call.q.dtype, torch.float32))


def saturated(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another dtype, where its finite numbers stay finite; each takes its gradient as if it had kept its value."""
    most = torch.finfo(dtype).max
    if torch.finfo(tensor.dtype).max > most:
        nearest = tensor.detach().clamp(-most, most) + (tensor - tensor.detach())
        tensor = torch.where(tensor.isfinite(), nearest, tensor)
    return tensor.to(dtype)


def _settle(call: Call) -> Call:
    """Flatten grids where only the order counts, check the pattern against the grids, append zero keys."""
    pattern = call.pattern
    if pattern.flat and call.table is None and not (pattern.ordered and _is_part(call)):
        q, k, v = (t.flatten(1, -3) for t in (call.q, call.k, call.v))
        offset = call.q_start[0]
        if len(call.k_grid) == len(call.q_start):
            for start, n in zip(call.q_start[1:], call.k_grid[1:], strict=True):
                offset = offset * n + start
        valid = None if call.valid is None else call.valid.flatten(1)
        call = replace(call, q=q, k=k, v=v, valid=valid, q_start=(offset,), zeros=((0, 0),))
    if call.rank != call.k.ndim - 3:
        raise ValueError(f"{pattern!r} needs grids of one rank; got queries {call.q_grid}, keys {call.padded_grid}")
    if len(call.q_start) != call.rank:
        raise ValueError(f"q_start must have one entry per grid axis, {call.rank}; got {call.q_start}")
    pattern.check(call.q_grid, call.k_grid)
    if not pattern.static:
        _check_routed(call)
    for start, queries, keys in zip(call.q_start, call.q_grid, call.k_grid, strict=True):
        if pattern.places_queries and (start < 0 or pattern.place(start + queries - 1) >= keys):
            raise ValueError(
                f"{pattern!r} places queries on the key grid: q_start {call.q_start} with a query grid {call.q_grid} "
                f"leaves the key grid {call.k_grid}"
            )
    if call.table is not None:
        _check_table(call)
    zeros = tuple(pattern.zero_keys(axis, n, call.rank) for axis, n in enumerate(call.k_grid))
    return _with_zero_keys(call, zeros) if any(any(pair) for pair in zeros) else call


def _is_part(call: Call) -> bool:
    """Whether the queries lie on the grid of the keys, but not one after another in its raster order."""
    if len(call.q_grid) != len(call.k_grid) or len(call.q_start) != len(call.k_grid):
        return False
    ends = zip(call.q_start, call.q_grid, call.k_grid, strict=True)
    if any(start < 0 or start + n > keys for start, n, keys in ends):
        return True  # beyond the grid: refused as such
    first = next((axis for axis, n in enumerate(call.q_grid) if n > 1), call.rank)
    return call.q_grid[first + 1 :] != call.k_grid[first + 1 :]


def _check_routed(call: Call) -> None:
    if any(call.q_start):
        raise ValueError(f"{call.pattern!r} is indexed by the query grid itself: q_start must be 0; got {call.q_start}")
    for member in leaves(call.pattern):
        for batch, *heads in member.batch_shapes():
            if batch not in (1, call.batch) or heads not in ([], [1], [call.heads]):
                raise ValueError(f"{member!r} does not broadcast to a batch of {call.batch} with {call.heads} heads")


def _check_table(call: Call) -> None:
    table, pattern = call.table.table, call.table.pattern  # type: ignore[union-attr]  # the caller checked
    check_tensor("the bias table", table, device=call.q.device)
    if not isinstance(pattern, Pattern):
        raise TypeError(f"the pattern of a bias table must be a pattern; got {shown(pattern)}")
    needed = tuple(2 * pattern.extent(axis, n, call.rank) + 1 for axis, n in enumerate(call.k_grid))
    sizes = tuple(table.shape[1:])
    if table.ndim < 2 or table.shape[0] not in (1, call.heads) or len(sizes) != call.rank or any(n % 2 == 0 for n in sizes):
        raise ValueError(f"the bias table must be (heads={call.heads}, {call.rank} odd sizes); got {tuple(table.shape)}")
    if any(have < need for have, need in zip(sizes, needed, strict=True)):
        raise ValueError(f"{pattern!r} on keys {call.k_grid} needs a bias table over {needed} offsets; got {sizes}: resize it")


def _with_zero_keys(call: Call, zeros: tuple[tuple[int, int], ...]) -> Call:
    padded = math.prod([n + before + after for n, (before, after) in zip(call.k_grid, zeros, strict=True)])
    each = call.batch * max(call.k.shape[-1], call.v.shape[-1]) * call.k.shape[-2]
    if padded > 64 * call.keys and padded * max(each, 1) > LARGEST // 4:
        raise ValueError(f"{call.pattern!r} puts more zero keys around the key grid {call.k_grid} than memory holds: {padded}")
    widths = [n for before, after in reversed(zeros) for n in (before, after)]
    k, v = (F.pad(t, [0, 0, 0, 0, *widths]) for t in (call.k, call.v))
    valid = None if call.valid is None else F.pad(call.valid, widths, value=True)
    bias = call.bias
    if bias is not None:  # one column stands for the keys of the grid, not for zero keys
        bias = F.pad(bias.expand(*bias.shape[:3], call.keys).unflatten(-1, call.k_grid), widths).flatten(3)
    return replace(call, k=k, v=v, valid=valid, bias=bias, zeros=zeros)
