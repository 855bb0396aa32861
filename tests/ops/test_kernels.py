"""Kernels that differ from token to token, against loops over tokens and taps."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from regard.ops.local.kernels import apply_kernel, fold_windows, unfold_windows
from regard.ops.patterns import Neighborhood

CASES = [  # grid, size, dilation
    ((9,), 4, 2),
    ((7, 6), 3, 1),
    ((7, 9), (3, 4), 1),
    ((8, 11), 3, (1, 3)),
    ((11, 7), (4, 1), (2, 1)),
    ((3, 4, 5), 3, 1),
    ((5, 6, 7), (1, 2, 3), (1, 3, 2)),
]


def naive_kernel(v: Tensor, weights: Tensor, size, dilation, border: str) -> Tensor:
    grid = v.shape[1:-2]
    sizes = size if isinstance(size, tuple) else (size,) * len(grid)
    steps = dilation if isinstance(dilation, tuple) else (dilation,) * len(grid)
    out = torch.zeros_like(v)
    for token in itertools.product(*map(range, grid)):
        taps = []
        for p, n, k, d in zip(token, grid, sizes, steps, strict=True):
            window = [p + (i - k // 2) * d for i in range(k)]
            while border == "shift" and window[0] < 0:
                window = [x + d for x in window]
            while border == "shift" and window[-1] >= n:
                window = [x - d for x in window]
            taps.append(window)
        for tap, place in enumerate(itertools.product(*taps)):
            if all(0 <= x < n for x, n in zip(place, grid, strict=True)):
                out[(slice(None), *token)] += weights[(slice(None), *token)][..., tap, None] * v[(slice(None), *place)]
    return out


@pytest.mark.parametrize("border", ["zero", "shift"])
@pytest.mark.parametrize(("grid", "size", "dilation"), CASES)
def test_each_token_sums_its_own_weighted_neighbours(grid, size, dilation, border):
    taps = math.prod(size) if isinstance(size, tuple) else size ** len(grid)
    v = torch.randn(2, *grid, 2, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, *grid, 2, taps, dtype=torch.float64, requires_grad=True)
    ours = apply_kernel(v, weights, size, dilation=dilation, border=border)
    theirs = naive_kernel(v, weights, size, dilation, border)
    torch.testing.assert_close(ours, theirs)
    out = torch.randn_like(ours)
    for mine, its in zip(*(torch.autograd.grad(y, (v, weights), out) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, its)


def test_constant_weights_are_a_depthwise_convolution():
    kernel = torch.randn(6, 1, 5, 5, dtype=torch.float64)
    v = torch.randn(2, 8, 9, 6, 1, dtype=torch.float64)
    weights = kernel.flatten(1).expand(1, 8, 9, 6, 25)
    conv = torch.nn.functional.conv2d(v[..., 0].movedim(-1, 1), kernel, padding=2, groups=6).movedim(1, -1)
    torch.testing.assert_close(apply_kernel(v, weights, 5)[..., 0], conv)
    shifted = apply_kernel(v, weights, 5, border="shift")[..., 0]
    inside = torch.nn.functional.conv2d(v[..., 0].movedim(-1, 1), kernel, groups=6)
    replicated = torch.nn.functional.pad(inside, [2] * 4, mode="replicate").movedim(1, -1)
    torch.testing.assert_close(shifted, replicated)


@pytest.mark.parametrize("border", ["zero", "shift"])
def test_softmax_weights_are_neighborhood_attention(border):
    from regard import attend

    pattern = Neighborhood((3, 4), dilation=2, border=border)
    q, k, v = torch.randn(3, 2, 9, 8, 2, 4, dtype=torch.float64).unbind()
    logits = []
    for tap in range(12):  # the keys at one tap, fetched with a kernel that is 1 there
        one = torch.zeros(12, dtype=torch.float64)
        one[tap] = 1
        logits.append((q * apply_kernel(k, one.expand(2, 9, 8, 2, 12), (3, 4), dilation=2, border=border)).sum(-1) / 2)
    weights = torch.stack(logits, -1).softmax(-1)
    torch.testing.assert_close(apply_kernel(v, weights, (3, 4), dilation=2, border=border), attend(q, k, v, pattern))


@pytest.mark.parametrize(
    ("grid", "size", "stride"), [((7, 6), 3, 2), ((5, 5), 3, 1), ((9, 4), 2, 3), ((10,), 4, 2), ((3, 4, 5), 3, 2)]
)
def test_windows_are_listed_and_added_up_where_they_came_from(grid, size, stride):
    v = torch.randn(2, *grid, 2, 3, dtype=torch.float64)
    counts = [-(-n // stride) for n in grid]
    windows = unfold_windows(v, size, stride)
    assert windows.shape == (2, *counts, 2, size ** len(grid), 3)
    mixed = torch.randn_like(windows)
    listed, folded = torch.zeros_like(windows), torch.zeros_like(v)
    for window in itertools.product(*map(range, counts)):
        for tap, offset in enumerate(itertools.product(range(size), repeat=len(grid))):
            place = tuple(w * stride - size // 2 + o for w, o in zip(window, offset, strict=True))
            if all(0 <= x < n for x, n in zip(place, grid, strict=True)):
                listed[(slice(None), *window)][..., tap, :] = v[(slice(None), *place)]
                folded[(slice(None), *place)] += mixed[(slice(None), *window)][..., tap, :]
    assert torch.equal(windows, listed)
    torch.testing.assert_close(fold_windows(mixed, grid, size, stride), folded)


def test_outlook_weights_carry_exact_gradients():
    v = torch.randn(1, 5, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(1, 3, 2, 2, 9, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, w: fold_windows(w @ unfold_windows(v, 3, 2), (5, 4), 3, 2), (v, weights))


def test_odd_windows_are_those_of_torch():
    x = torch.randn(2, 7, 10, 1, 4)
    theirs = torch.nn.functional.unfold(x[..., 0, :].movedim(-1, 1), 3, padding=1, stride=2).unflatten(1, (4, 9))
    assert torch.equal(unfold_windows(x, 3, 2).flatten(1, 3), theirs.permute(0, 3, 2, 1))


def test_misfits_are_named():
    v = torch.randn(1, 4, 5, 2, 3)
    with pytest.raises(ValueError, match=r"\(1, 4, 5, 2, 9\).*got \(1, 4, 5, 2, 8\)"):
        apply_kernel(v, torch.randn(1, 4, 5, 2, 8), 3)
    with pytest.raises(ValueError, match="zero, shift; got 'wrap'"):
        apply_kernel(v, torch.randn(1, 4, 5, 2, 9), 3, border="wrap")
    with pytest.raises(ValueError, match=r"grid \(4, 5\), sizes=\(3, 3\), dilations=\(2, 2\)"):
        apply_kernel(v, torch.randn(1, 4, 5, 2, 9), 3, dilation=2, border="shift")
    with pytest.raises(ValueError, match="one per axis"):
        apply_kernel(v, torch.randn(1, 4, 5, 2, 9), (3, 3, 1))
    with pytest.raises(ValueError, match=r"windows \(2, 3\) of 9 taps.*got \(1, 2, 2, 2, 9, 3\)"):
        fold_windows(torch.randn(1, 2, 2, 2, 9, 3), (4, 5), 3, 2)
