"""The arguments that all functions and modules share: checked as NATTEN checks them, one value per axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ...checks import LARGEST, check_number, check_tensor, shown
from ...ops.patterns import Neighborhood

Sizes = int | Sequence[int]
"""A number, or one per axis."""

Flags = bool | Sequence[bool]
"""A boolean, or one per axis."""

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


def sizes(name: str, value: Sizes | None, rank: int, low: int) -> tuple[int, ...]:
    """One integer per axis; None stands for ones.

    Raises:
        ValueError: another number of entries, entries that are no integers or below ``low``.
    """
    value = 1 if value is None else value
    entries = tuple(value) if isinstance(value, Sequence) else (value,) * rank
    if len(entries) != rank or not all(isinstance(n, int) and not isinstance(n, bool) and low <= n <= LARGEST for n in entries):
        allowed = f"an integer of at least {low}, or {rank} of them, one per axis, none above {LARGEST}"
        raise ValueError(f"{name} must be {allowed}; got {_given(value)}")
    return entries


def flags(value: Flags | None, rank: int) -> tuple[bool, ...]:
    """One boolean per axis; None stands for False.

    Raises:
        ValueError: another number of entries, or entries that are not boolean.
    """
    value = False if value is None else value
    entries = tuple(value) if isinstance(value, Sequence) else (value,) * rank
    if len(entries) != rank or not all(isinstance(flag, bool) for flag in entries):
        raise ValueError(f"is_causal must be a boolean, or {rank} of them, one per axis; got {_given(value)}")
    return entries


def _given(value: object) -> str:
    return shown(value).removeprefix(f"{type(value).__name__} ")


def check_scale(name: str, value: Any) -> float | None:
    """A factor on the logits; None and 0 stand for ``head_dim ** -0.5``, which None is returned for.

    Raises:
        TypeError, ValueError: no finite number.
    """
    return None if value is None else check_number(name, value) or None


def check_dropouts(**rates: Any) -> None:
    """Check rates of dropout: numbers from 0 to 1.

    Raises:
        TypeError, ValueError: anything else.
    """
    for name, rate in rates.items():
        check_number(name, rate, 0.0, 1.0)


def check_each(**tensors: Any) -> None:
    """Check that each is a dense floating tensor.

    Raises:
        TypeError: anything else.
    """
    for name, tensor in tensors.items():
        check_tensor(name, tensor)


def check_tokens(x: Any, rank: int, dim: int) -> None:
    """Check the tokens that a module takes.

    Raises:
        TypeError: no dense floating tensor.
        ValueError: another width or number of axes.
    """
    check_tensor("x", x, what=f"(batch, *grid, {dim}) with {rank} grid axes")
    if x.ndim != rank + 2 or x.shape[-1] != dim:
        raise ValueError(f"expected (batch, *grid, {dim}) with {rank} grid axes; got {tuple(x.shape)}")


def check_all_args(
    na_dim: int, kernel_size: Sizes, stride: Sizes | None, dilation: Sizes | None, is_causal: Flags | None
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
    """The arguments with one value for each of ``na_dim`` axes; None stands for ones, or for False.

    Raises:
        ValueError: another number of entries, or entries of the wrong kind or out of range.
    """
    kernels = sizes("kernel_size", kernel_size, na_dim, 2)
    return kernels, sizes("stride", stride, na_dim, 1), sizes("dilation", dilation, na_dim, 1), flags(is_causal, na_dim)


def neighborhood(
    grid: Sequence[int], kernel_size: Sizes, dilation: Sizes | None, is_causal: Flags | None, stride: Sizes | None = 1
) -> Neighborhood:
    """The pattern of these arguments on a grid.

    Raises:
        ValueError: arguments of the wrong kind, a stride larger than the kernel, or a dilated kernel larger than the grid.
    """
    kernels, strides, dilations, causal = check_all_args(len(grid), kernel_size, stride, dilation, is_causal)
    if any(k * d > n for k, d, n in zip(kernels, dilations, grid, strict=True)):
        raise ValueError(
            f"kernel_size * dilation must not exceed the grid on any axis; got kernel_size {kernels} and dilation {dilations} "
            f"on the grid {tuple(grid)}"
        )
    return Neighborhood(kernels, dilations, strides, causal)


def named(name: str, function: AnyFunction) -> AnyFunction:
    """Name a function that is made once per number of axes."""
    function.__name__ = function.__qualname__ = name
    return function
