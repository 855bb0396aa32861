"""A kernel that writes down which boxes the attention kernels walk; imported only where Triton is installed."""

import triton
import triton.language as tl

from regard.ops.backends.triton.kernels import _window_box


@triton.jit
def corners(out, n0, n1, n2, f0, f1, f2, m0, m1, m2, count, PARTIAL: tl.constexpr):
    """First places ``(count, 3)`` of boxes of one token: full ones, ``m`` of ``n`` from ``f`` on each axis, or the others."""
    for i in range(count):
        corner, _ = _window_box(i, (0, 0, 0), (0, 0, 0), (n0, n1, n2), (f0, f1, f2), (m0, m1, m2), 1, 1, 1, PARTIAL)
        tl.store(out + 3 * i, corner[0])
        tl.store(out + 3 * i + 1, corner[1])
        tl.store(out + 3 * i + 2, corner[2])
