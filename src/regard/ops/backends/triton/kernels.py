"""Attention of tiles of queries to boxes of keys, and its gradients in two passes: one by queries, one by keys.

    p = exp2(scale log2(e) q k^T + bias log2(e) - lse log2(e)),  out = p v
    dv = p^T do,  ds = p (do v^T - do . out + dlse),  dq = scale ds k,  dk = scale ds^T q,  dbias = ds

A program owns one tile and walks the boxes of the other side that :mod:`.boxes` counted: first the full ones, without a mask,
then the others, where a key is visible between the lower and the upper bound of each axis. Routed blocks walk a list of
blocks instead. Boxes of keys are read by pointers, or by tensor descriptors of what the tile needs, strided over its class of
tokens. Statistics and sums are float32; nothing of the size of queries times keys is stored.

Source: Dao, FlashAttention-2, arXiv:2307.08691; Hassani et al., arXiv:2504.16922; both passes follow them in the mathematics.
"""

from __future__ import annotations

import triton
import triton.language as tl

FIXED = ("bias_h", "valid_b", "list_b", "list_h")
"""Arguments whose values are no reason to compile again."""


@triton.jit
def _split(index, n1, n2):
    """Coordinates of a row-major index."""
    return index // (n1 * n2), index // n2 % n1, index % n2


@triton.jit
def _places(N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr):
    """Coordinates of the tokens of a tile or a box inside it."""
    return _split(tl.arange(0, N0 * N1 * N2), N1, N2)


@triton.jit
def _three(plan, first: tl.constexpr, LEAD: tl.constexpr, AXES: tl.constexpr):
    """Three numbers of the header, one for each axis; ``LEAD`` on leading axes that the grid does not have."""
    x0, x1, x2 = LEAD, LEAD, tl.load(plan + first + 2)
    if AXES > 1:
        x1 = tl.load(plan + first + 1)
    if AXES > 2:
        x0 = tl.load(plan + first)
    return x0, x1, x2


@triton.jit
def _field(plan, field: tl.constexpr, tile, LEAD: tl.constexpr, AXES: tl.constexpr):
    """A field of the tile on each axis, see :mod:`.boxes`."""
    row = plan + 32 + 3 * tl.load(plan + 16) + field * tl.load(plan + 17)
    n0, n1 = tl.load(plan), tl.load(plan + 1)
    x0, x1, x2 = LEAD, LEAD, tl.load(row + n0 + n1 + tile[2])
    if AXES > 1:
        x1 = tl.load(row + n0 + tile[1])
    if AXES > 2:
        x0 = tl.load(row + tile[0])
    return x0, x1, x2


@triton.jit
def _plus(a, b):
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


@triton.jit
def _minus(a, b):
    return a[0] - b[0], a[1] - b[1], a[2] - b[2]


@triton.jit
def _times(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@triton.jit
def _below(place, limit):
    return (place[0] < limit[0]) & (place[1] < limit[1]) & (place[2] < limit[2])


@triton.jit
def _at_most(place, limit):
    return tl.minimum(place[0], limit[0] - 1), tl.minimum(place[1], limit[1] - 1), tl.minimum(place[2], limit[2] - 1)


@triton.jit
def _tokens(place, step, WIDE: tl.constexpr):
    """Tokens from the first of a tile or a box to each of its places, wide where products with them leave 32 bits."""
    token = _times(place, step)
    if WIDE:
        token = token.to(tl.int64)
    return token


@triton.jit
def _window_box(i, lo, hi, n, f, m, B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, PARTIAL: tl.constexpr):
    """First place and limit of the ``i``-th box: of the full ones, ``m`` of ``n`` from ``f`` on each axis, or of the others.

    Of the others those not full on axis 0 come first, then those full there but not on axis 1, then those full on both.
    """
    if PARTIAL:
        first = (n[0] - m[0]) * n[1] * n[2]
        second = first + m[0] * (n[1] - m[1]) * n[2]
        on0, on1 = i < first, (i >= first) & (i < second)
        rest = tl.where(on0, i, tl.where(on1, i - first, i - second))
        x = _split(rest, tl.where(on0, n[1], tl.where(on1, n[1] - m[1], m[1])), tl.where(on0 | on1, n[2], n[2] - m[2]))
        x0 = x[0] + tl.where(on0, tl.where(x[0] >= f[0], m[0], 0), f[0])
        x1 = x[1] + tl.where(on0, 0, tl.where(on1, tl.where(x[1] >= f[1], m[1], 0), f[1]))
        x2 = x[2] + tl.where(on0 | on1, 0, tl.where(x[2] >= f[2], m[2], 0))
    else:
        x = _split(i, m[1], m[2])
        x0, x1, x2 = x[0] + f[0], x[1] + f[1], x[2] + f[2]
    return (lo[0] + x0 * B0, lo[1] + x1 * B1, lo[2] + x2 * B2), hi


@triton.jit
def _listed_box(i, plan, members, B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, AXES: tl.constexpr):
    """First place and limit of the ``i``-th box of the listed blocks."""
    size, length = _three(plan, 20, 1, AXES), _three(plan, 27, 1, AXES)
    n1, n2 = tl.cdiv(size[1], B1), tl.cdiv(size[2], B2)
    parts = tl.cdiv(size[0], B0) * n1 * n2
    block = _split(tl.load(members + i // parts), tl.load(plan + 23), tl.load(plan + 24))
    part = _split(i % parts, n1, n2)
    first = block[0] * size[0], block[1] * size[1], block[2] * size[2]
    last = (
        tl.minimum(first[0] + size[0], length[0]), tl.minimum(first[1] + size[1], length[1]),
        tl.minimum(first[2] + size[2], length[2]),
    )  # fmt: skip
    return (first[0] + part[0] * B0, first[1] + part[1] * B1, first[2] + part[2] * B2), last


@triton.jit
def _listed(plan, ranges, row, x, B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, AXES: tl.constexpr):
    """Where the list of the block at ``x`` begins, and the number of boxes in it."""
    size = _three(plan, 20, 1, AXES)
    block = (x[0] // size[0] * tl.load(plan + 25) + x[1] // size[1]) * tl.load(plan + 26) + x[2] // size[2]
    begin = tl.load(ranges + row + block)
    parts = tl.cdiv(size[0], B0) * tl.cdiv(size[1], B1) * tl.cdiv(size[2], B2)
    return begin, (tl.load(ranges + row + block + 1) - begin) * parts


@triton.jit
def _walk(plan, ranges, row, tile, start, B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, AXES: tl.constexpr,
          ROUTED: tl.constexpr):  # fmt: skip
    """The boxes of a tile: first place, limit, number, first full one and full ones on each axis; where a list of blocks begins
    and how many boxes it names; and the token that places are counted from."""
    if ROUTED:
        begin, listed = _listed(plan, ranges, row, start, B0, B1, B2, AXES)
        return (0, 0, 0), _three(plan, 27, 1, AXES), (0, 0, 0), (0, 0, 0), (0, 0, 0), begin, listed, 0
    else:
        lo, hi, some = _field(plan, 3, tile, 0, AXES), _field(plan, 4, tile, 1, AXES), _field(plan, 5, tile, 1, AXES)
        f, m, origin = _field(plan, 6, tile, 0, AXES), _field(plan, 7, tile, 1, AXES), _field(plan, 8, tile, 0, AXES)
        return lo, hi, some, f, m, 0, 0, origin[0] + origin[1] + origin[2]


@triton.jit
def _number(walk, PARTIAL: tl.constexpr, ROUTED: tl.constexpr):
    """How many boxes are walked: the listed ones, those that are not full, or the full ones."""
    full = walk[4][0] * walk[4][1] * walk[4][2]
    if ROUTED:
        return walk[6]
    elif PARTIAL:
        return walk[2][0] * walk[2][1] * walk[2][2] - full
    else:
        return full


@triton.jit
def _box(i, walk, plan, members, B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, AXES: tl.constexpr,
         PARTIAL: tl.constexpr, ROUTED: tl.constexpr):  # fmt: skip
    """First place and limit of the ``i``-th box of a :func:`_walk`."""
    if ROUTED:
        return _listed_box(i, plan, members + walk[5], B0, B1, B2, AXES)
    else:
        return _window_box(i, walk[0], walk[1], walk[2], walk[3], walk[4], B0, B1, B2, PARTIAL)


@triton.jit
def _rows(base, token, stride, real, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Rows ``(tokens, BLOCK)`` of which ``WIDTH`` numbers exist; zeros where a token is not real."""
    column = tl.arange(0, BLOCK)
    pointers = base + token[:, None] * stride + column[None, :]
    if MASKED:
        if WIDTH == BLOCK:
            return tl.load(pointers, mask=real[:, None], other=0.0)
        else:
            return tl.load(pointers, mask=real[:, None] & (column < WIDTH)[None, :], other=0.0)
    else:
        if WIDTH == BLOCK:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=(column < WIDTH)[None, :], other=0.0)


@triton.jit
def _view(base, limit, step, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
          B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, AXES: tl.constexpr, DESCRIBED: tl.constexpr):  # fmt: skip
    """What boxes are read from: a descriptor of the tokens below ``limit``, or where they are read by pointers, ``base``.

    ``step`` is in tokens, ``stride`` in numbers from token to token.
    """
    if DESCRIBED:
        n0, n1, n2 = tl.maximum(limit[0], 1), tl.maximum(limit[1], 1), tl.maximum(limit[2], 1)
        wide = tl.cast(stride, tl.int64)
        s0, s1, s2 = step[0] * wide, step[1] * wide, step[2] * wide
        if AXES == 1:
            return tl.make_tensor_descriptor(base, [n2, WIDTH], [s2, 1], [B2, BLOCK])
        elif AXES == 2:
            return tl.make_tensor_descriptor(base, [n1, n2, WIDTH], [s1, s2, 1], [B1, B2, BLOCK])
        else:
            return tl.make_tensor_descriptor(base, [n0, n1, n2, WIDTH], [s0, s1, s2, 1], [B0, B1, B2, BLOCK])
    else:
        return base


@triton.jit
def _box_rows(view, corner, box, token, stride, real, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
              B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, AXES: tl.constexpr,
              MASKED: tl.constexpr, DESCRIBED: tl.constexpr):  # fmt: skip
    """Rows ``(tokens, BLOCK)`` of the box at ``corner`` of a :func:`_view`, ``box`` tokens from its base; 0 past its limit."""
    if DESCRIBED:
        if AXES == 1:
            return view.load([corner[2], 0])
        elif AXES == 2:
            return view.load([corner[1], corner[2], 0]).reshape(B1 * B2, BLOCK)
        else:
            return view.load([corner[0], corner[1], corner[2], 0]).reshape(B0 * B1 * B2, BLOCK)
    else:
        return _rows(view + box * stride, token, stride, real, WIDTH, BLOCK, MASKED)


@triton.jit
def _put(base, token, stride, real, values, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    pointers = base + token[:, None] * stride + column[None, :]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=real[:, None] & (column < WIDTH)[None, :])


@triton.jit
def _of_slots(plan, row: tl.constexpr, slot, AXES: tl.constexpr):
    """Lower bounds (row 0), upper bounds (1) or entries in the bias table (2) of slots, on each axis."""
    base = plan + 32 + row * tl.load(plan + 16)
    x0, x1, x2 = row % 2, row % 2, tl.load(base + tl.load(plan + 22) + slot[2])
    if AXES > 1:
        x1 = tl.load(base + tl.load(plan + 21) + slot[1])
    if AXES > 2:
        x0 = tl.load(base + slot[0])
    return x0, x1, x2


@triton.jit
def _bias_rows(plan, slot, AXES: tl.constexpr):
    row = _of_slots(plan, 2, slot, AXES)
    return row[0] + row[1] + row[2]


@triton.jit
def _between(key, low, high, AXES: tl.constexpr):
    """Pairs ``(queries, keys)`` whose key lies between the bounds of its query, on every axis."""
    seen = (key[2][None, :] >= low[2][:, None]) & (key[2][None, :] < high[2][:, None])
    if AXES > 1:
        seen = seen & (key[1][None, :] >= low[1][:, None]) & (key[1][None, :] < high[1][:, None])
    if AXES > 2:
        seen = seen & (key[0][None, :] >= low[0][:, None]) & (key[0][None, :] < high[0][:, None])
    return seen


@triton.jit
def _sight(inside, there, corner, low, high, valid, AXES: tl.constexpr, VALID: tl.constexpr, ROUTED: tl.constexpr):
    """Which keys of a box exist, and the pairs ``(queries, keys)`` that are visible; ``valid`` points at its keys."""
    if VALID:
        there = there & (tl.load(valid, mask=there, other=0) != 0)
    if ROUTED:
        return there, there[None, :]
    else:
        seen = _between(inside, _minus(low, corner), _minus(high, corner), AXES)
        if VALID:
            seen = seen & there[None, :]
        return there, seen


@triton.jit
def _own(plan, heads, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, AXES: tl.constexpr):
    """The tile of this program, its batch item and head, first slot, places, and which of them are real.

    Places past the end of a tile repeat its last one.
    """
    n = _three(plan, 0, 1, AXES)
    pid = tl.program_id(0)
    tile = _split(pid % (n[0] * n[1] * n[2]), n[1], n[2])
    item = pid // (n[0] * n[1] * n[2])
    start, count = _field(plan, 0, tile, 0, AXES), _field(plan, 1, tile, 1, AXES)
    place = _places(T0, T1, T2)
    real = _below(place, count)
    return tile, (item // heads).to(tl.int64), (item % heads).to(tl.int64), start, _at_most(place, count), real


@triton.jit
def _own_queries(q, plan, tile, b, h, heads, place, real, q_b, q_t, q_h, D: tl.constexpr, BLOCK_D: tl.constexpr,
                 AXES: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Rows of a tile of queries, their tokens from its first one, and the row of that one in ``(batch, tokens, heads)``."""
    origin = _field(plan, 2, tile, 0, AXES)
    origin = origin[0] + origin[1] + origin[2]
    token = _tokens(place, _three(plan, 6, 0, AXES), WIDE)
    queries = _rows(q + b * q_b + h * q_h + origin.to(tl.int64) * q_t, token, q_t, real, D, BLOCK_D, False)
    return queries, token, (b * tl.load(plan + 18) + origin) * heads + h


@triton.jit
def _bounds(plan, slot, AXES: tl.constexpr, ROUTED: tl.constexpr):
    """Lower and upper bounds of slots; none where blocks are listed."""
    if ROUTED:
        return (0, 0, 0), (0, 0, 0)
    else:
        return _of_slots(plan, 0, slot, AXES), _of_slots(plan, 1, slot, AXES)


@triton.jit
def _bytes(low, high, first, there):
    """Bounds relative to the first key of a tile, which has at most 128 keys, in a byte each; none where not ``there``."""
    low, high = tl.minimum(tl.maximum(low - first, 0), 255), tl.minimum(tl.maximum(high - first, 0), 255)
    return tl.where(there, low | high << 8, 0)


@triton.jit
def _in_bytes(place, bounds):
    return (place >= (bounds & 255)) & (place < (bounds >> 8 & 255))


@triton.jit
def _between_by_key(place, first, low, high, there, AXES: tl.constexpr):
    """Pairs ``(keys, queries)`` as :func:`_between`, of queries that are ``there``.

    Every thread holds many queries and few keys: all bounds of a query on two axes travel in one word.
    """
    word = _bytes(low[2], high[2], first[2], there)
    if AXES > 1:
        word = word | _bytes(low[1], high[1], first[1], there) << 16
    seen = _in_bytes(place[2][:, None], word[None, :])
    if AXES > 1:
        seen = seen & _in_bytes(place[1][:, None], word[None, :] >> 16)
    if AXES > 2:
        seen = seen & _in_bytes(place[0][:, None], _bytes(low[0], high[0], first[0], there)[None, :])
    return seen


@triton.jit(do_not_specialize=FIXED)
def forward(
    q, k, v, out, lse, bias, valid, members, ranges, plan, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    heads, group, bias_h, valid_b, list_b, list_h,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
    AXES: tl.constexpr, BIAS: tl.constexpr, VALID: tl.constexpr, ROUTED: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of one tile of queries and one head.

    ``scale``, which is positive, and ``bias`` include log2(e). Full boxes are walked where ``FIRST`` is 0, the others where
    ``LAST`` is 2.
    """
    tile, b, h, start, place, real = _own(plan, heads, T0, T1, T2, AXES)
    queries, token, first = _own_queries(q, plan, tile, b, h, heads, place, real, q_b, q_t, q_h, D, BLOCK_D, AXES, WIDE)
    k += b * k_b + h // group * k_h
    v += b * v_b + h // group * v_h
    walk = _walk(plan, ranges, b * list_b + h * list_h, tile, start, B0, B1, B2, AXES, ROUTED)
    slot = _plus(start, place)
    low, high = _bounds(plan, slot, AXES, ROUTED)
    if BIAS:
        bias += h * bias_h
        slope = _three(plan, 9, 0, AXES)
        bias_row = _bias_rows(plan, slot, AXES)
    if VALID:
        valid += b * valid_b

    inside = _places(B0, B1, B2)
    step = _three(plan, 3, 0, AXES)
    key = _tokens(inside, step, WIDE)
    if DESCRIBED:
        k += tl.cast(walk[7], tl.int64) * k_t
        v += tl.cast(walk[7], tl.int64) * v_t
    k_view = _view(k, walk[1], step, k_t, D, BLOCK_D, B0, B1, B2, AXES, DESCRIBED)
    v_view = _view(v, walk[1], step, v_t, DV, BLOCK_V, B0, B1, B2, AXES, DESCRIBED)
    most = tl.full([T0 * T1 * T2], -float("inf"), tl.float32)
    total = tl.zeros([T0 * T1 * T2], tl.float32)
    sums = tl.zeros([T0 * T1 * T2, BLOCK_V], tl.float32)
    for PARTIAL in tl.static_range(FIRST, LAST):
        for i in range(_number(walk, PARTIAL, ROUTED)):
            corner, limit = _box(i, walk, plan, members, B0, B1, B2, AXES, PARTIAL, ROUTED)
            there = _below(inside, _minus(limit, corner))
            box = (walk[7] + _times(corner, step)).to(tl.int64)
            keys = _box_rows(k_view, corner, box, key, k_t, there, D, BLOCK_D, B0, B1, B2, AXES, PARTIAL, DESCRIBED)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            if PARTIAL:
                there, seen = _sight(inside, there, corner, low, high, valid + box + key, AXES, VALID, ROUTED)
            if BIAS:
                entry = (bias_row + _times(corner, slope))[:, None] + _times(inside, slope)[None, :]
                if PARTIAL:
                    scores = scores * scale + tl.load(bias + entry, mask=seen, other=0.0)
                else:
                    scores = scores * scale + tl.load(bias + entry)
            if PARTIAL:
                scores = tl.where(seen, scores, -float("inf"))
            # without a bias, scaling and subtracting the maximum are one fused operation
            rate = 1.0 if BIAS else scale
            higher = tl.maximum(most, tl.max(scores, 1) * rate)
            base = higher
            if PARTIAL:
                base = tl.where(higher == -float("inf"), 0.0, higher)
            weights = tl.exp2(scores * rate - base[:, None])
            shrink = tl.exp2(most - base)
            total = total * shrink + tl.sum(weights, 1)
            values = _box_rows(v_view, corner, box, key, v_t, there, DV, BLOCK_V, B0, B1, B2, AXES, PARTIAL, DESCRIBED)
            sums = tl.dot(weights.to(values.dtype), values, sums * shrink[:, None], input_precision=PRECISION)
            most = higher

    blind = total == 0.0
    sums = sums / tl.where(blind, 1.0, total)[:, None]
    found = tl.where(blind, -float("inf"), (most + tl.log2(tl.where(blind, 1.0, total))) * 0.6931471805599453)
    _put(out + first * DV, token, heads * DV, real, sums, DV, BLOCK_V)
    tl.store(lse + first + token * heads, found, mask=real)


@triton.jit(do_not_specialize=FIXED)
def backward_queries(
    q, k, v, out, lse, bias, valid, members, ranges, plan, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    heads, group, bias_h, valid_b, list_b, list_h,
    grad, grad_lse, delta, dq, dbias, copies, dbias_c, factor,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
    AXES: tl.constexpr, BIAS: tl.constexpr, VALID: tl.constexpr, ROUTED: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, DESCRIBED: tl.constexpr,
    GRAD_LSE: tl.constexpr, GRAD_BIAS: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries and one head, and of the bias; leaves ``delta`` for the other pass.

    ``factor`` is the scale of the logits; ``copies`` tables of ``dbias_c`` numbers take turns in summing the bias's gradient.
    """
    tile, b, h, start, place, real = _own(plan, heads, T0, T1, T2, AXES)
    queries, token, first = _own_queries(q, plan, tile, b, h, heads, place, real, q_b, q_t, q_h, D, BLOCK_D, AXES, WIDE)
    grads = _rows(grad + first * DV, token, heads * DV, real, DV, BLOCK_V, False)
    outs = _rows(out + first * DV, token, heads * DV, real, DV, BLOCK_V, False)
    drop = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), 1)
    if GRAD_LSE:
        drop -= tl.load(grad_lse + first + token * heads)
    tl.store(delta + first + token * heads, drop, mask=real)
    base = tl.load(lse + first + token * heads) * 1.4426950408889634
    base = tl.where(base == -float("inf"), 0.0, base)
    k += b * k_b + h // group * k_h
    v += b * v_b + h // group * v_h
    walk = _walk(plan, ranges, b * list_b + h * list_h, tile, start, B0, B1, B2, AXES, ROUTED)
    slot = _plus(start, place)
    low, high = _bounds(plan, slot, AXES, ROUTED)
    if BIAS:
        bias += h * bias_h
        slope = _three(plan, 9, 0, AXES)
        bias_row = _bias_rows(plan, slot, AXES)
    if VALID:
        valid += b * valid_b

    inside = _places(B0, B1, B2)
    step = _three(plan, 3, 0, AXES)
    key = _tokens(inside, step, WIDE)
    if DESCRIBED:
        k += tl.cast(walk[7], tl.int64) * k_t
        v += tl.cast(walk[7], tl.int64) * v_t
    k_view = _view(k, walk[1], step, k_t, D, BLOCK_D, B0, B1, B2, AXES, DESCRIBED)
    v_view = _view(v, walk[1], step, v_t, DV, BLOCK_V, B0, B1, B2, AXES, DESCRIBED)
    if GRAD_BIAS:
        dbias += (tl.program_id(0) % copies) * dbias_c + h * bias_h
    sums = tl.zeros([T0 * T1 * T2, BLOCK_D], tl.float32)
    for PARTIAL in tl.static_range(FIRST, LAST):
        for i in range(_number(walk, PARTIAL, ROUTED)):
            corner, limit = _box(i, walk, plan, members, B0, B1, B2, AXES, PARTIAL, ROUTED)
            there = _below(inside, _minus(limit, corner))
            box = (walk[7] + _times(corner, step)).to(tl.int64)
            keys = _box_rows(k_view, corner, box, key, k_t, there, D, BLOCK_D, B0, B1, B2, AXES, PARTIAL, DESCRIBED)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
            if PARTIAL:
                there, seen = _sight(inside, there, corner, low, high, valid + box + key, AXES, VALID, ROUTED)
            if BIAS:
                entry = (bias_row + _times(corner, slope))[:, None] + _times(inside, slope)[None, :]
                if PARTIAL:
                    scores += tl.load(bias + entry, mask=seen, other=0.0)
                else:
                    scores += tl.load(bias + entry)
            if PARTIAL:
                scores = tl.where(seen, scores, -float("inf"))
            weights = tl.exp2(scores - base[:, None])
            values = _box_rows(v_view, corner, box, key, v_t, there, DV, BLOCK_V, B0, B1, B2, AXES, PARTIAL, DESCRIBED)
            grad_weights = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
            grad_scores = weights * (grad_weights - drop[:, None])
            if GRAD_BIAS:
                summed = real[:, None]
                if PARTIAL:
                    summed = summed & seen
                tl.atomic_add(dbias + entry, grad_scores, mask=summed, sem="relaxed")
            sums = tl.dot(grad_scores.to(keys.dtype), keys, sums, input_precision=PRECISION)
    _put(dq + first * D, token, heads * D, real, sums * factor, D, BLOCK_D)


@triton.jit(do_not_specialize=FIXED)
def backward_keys(
    q, k, v, out, lse, bias, valid, members, ranges, plan, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    heads, group, bias_h, valid_b, list_b, list_h,
    grad, delta, dk, dv, factor,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
    AXES: tl.constexpr, BIAS: tl.constexpr, VALID: tl.constexpr, ROUTED: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values, over all query heads that share them."""
    shared = heads // group
    tile, b, kv, start, place, real = _own(plan, shared, T0, T1, T2, AXES)
    step, residue = _three(plan, 3, 0, AXES), _field(plan, 2, tile, 0, AXES)
    key = _tokens(place, step, WIDE)
    corner_key = (residue[0] + residue[1] + residue[2] + _times(start, step)).to(tl.int64)
    keys = _rows(k + b * k_b + kv * k_h + corner_key * k_t, key, k_t, real, D, BLOCK_D, False)
    values = _rows(v + b * v_b + kv * v_h + corner_key * v_t, key, v_t, real, DV, BLOCK_V, False)
    if VALID:
        exists = tl.load(valid + b * valid_b + corner_key + key) != 0
    if BIAS:
        bias_column = _times(_plus(start, place), _three(plan, 9, 0, AXES))
    stride = _three(plan, 6, 0, AXES)
    if not ROUTED:
        walk = _walk(plan, ranges, 0, tile, start, B0, B1, B2, AXES, ROUTED)
        base_token = walk[7] - _times(walk[0], stride)  # of slot 0, if the first one of the walk is where it would be
    inside = _places(B0, B1, B2)
    token = _tokens(inside, stride, WIDE)
    grad_keys = tl.zeros([T0 * T1 * T2, BLOCK_D], tl.float32)
    grad_values = tl.zeros([T0 * T1 * T2, BLOCK_V], tl.float32)
    for member in range(group):
        h = kv * group + member
        if ROUTED:
            walk = _walk(plan, ranges, b * list_b + h * list_h, tile, start, B0, B1, B2, AXES, ROUTED)
            base_token = 0
        for PARTIAL in tl.static_range(FIRST, LAST):
            for i in range(_number(walk, PARTIAL, ROUTED)):
                corner, limit = _box(i, walk, plan, members, B0, B1, B2, AXES, PARTIAL, ROUTED)
                there = _below(inside, _minus(limit, corner))
                box = (base_token + _times(corner, stride)).to(tl.int64)
                first = (b * tl.load(plan + 18) + box) * heads + h
                queries = _rows(q + b * q_b + h * q_h + box * q_t, token, q_t, there, D, BLOCK_D, PARTIAL)
                scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale
                slot = _plus(corner, _at_most(inside, _minus(limit, corner)))
                if PARTIAL:
                    base = tl.load(lse + first + token * heads, mask=there, other=0.0) * 1.4426950408889634
                    base = tl.where(base == -float("inf"), 0.0, base)
                    drop = tl.load(delta + first + token * heads, mask=there, other=0.0)
                    if ROUTED:
                        seen = there[None, :]
                    else:
                        low, high = _of_slots(plan, 0, slot, AXES), _of_slots(plan, 1, slot, AXES)
                        seen = _between_by_key(place, start, low, high, there, AXES)
                    if VALID:
                        seen = seen & exists[:, None]
                else:
                    base = tl.load(lse + first + token * heads) * 1.4426950408889634
                    drop = tl.load(delta + first + token * heads)
                if BIAS:
                    entry = bias_column[:, None] + _bias_rows(plan, slot, AXES)[None, :]
                    if PARTIAL:
                        scores += tl.load(bias + h * bias_h + entry, mask=seen, other=0.0)
                    else:
                        scores += tl.load(bias + h * bias_h + entry)
                if PARTIAL:
                    scores = tl.where(seen, scores, -float("inf"))
                weights = tl.exp2(scores - base[None, :])
                grads = _rows(grad + first * DV, token, heads * DV, there, DV, BLOCK_V, PARTIAL)
                grad_values = tl.dot(weights.to(grads.dtype), grads, grad_values, input_precision=PRECISION)
                grad_weights = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
                grad_scores = weights * (grad_weights - drop[None, :])
                grad_keys = tl.dot(grad_scores.to(queries.dtype), queries, grad_keys, input_precision=PRECISION)

    first = (b * tl.load(plan + 19) + corner_key) * shared + kv
    _put(dk + first * D, key, shared * D, real, grad_keys * factor, D, BLOCK_D)
    _put(dv + first * DV, key, shared * DV, real, grad_values, DV, BLOCK_V)
