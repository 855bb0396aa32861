"""What a tensor, a number, a size and an option may be: the checks of every public door.

Each check returns the value, or raises one sentence that names the argument and quotes what was given and what is allowed:
``TypeError`` for another kind of thing, ``ValueError`` for one that is out of bounds. They read shapes and types, never the
values of a tensor but for :func:`check_range`, and they hold while a graph is traced. :func:`checked` reads what the arguments
of a constructor may be from its annotations.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import operator
import types
import typing
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .names import nearest

LARGEST = 2**31 - 1
"""The largest size, kernel, dilation, shift or index: what fits 32 bits."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
SHOWN = 80
"""Letters of a value that an error quotes."""
Function = TypeVar("Function", bound=Callable[..., Any])


def shown(value: object) -> str:
    """A value as an error quotes it: the dtype and shape of a tensor, the beginning of anything else, with its type."""
    if isinstance(value, Tensor):
        where = "" if value.device.type == "cpu" else f" on {value.device}"
        layout = "" if value.layout == torch.strided else f" {str(value.layout).removeprefix('torch.')}"
        kind = f"{layout} {str(value.dtype).removeprefix('torch.')}"
        return f"a nested{kind} tensor{where}" if value.is_nested else f"a{kind} tensor {tuple(value.shape)}{where}"
    try:
        text = " ".join(repr(value).split())  # arrays have line breaks
    except Exception:
        text = "an object without a repr"
    text = text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
    return text if value is None or isinstance(value, (bool, type)) else f"{type(value).__name__} {text}"


def check_tensor(
    name: str, value: Any, kinds: Sequence[torch.dtype] = FLOATS, *, device: torch.device | None = None, what: str = ""
) -> Tensor:
    """Check that a value is a dense tensor of one of some dtypes (and on a device).

    Args:
        name: of the argument.
        value: what was given.
        kinds: dtypes that are allowed.
        device: where it must be, if that matters.
        what: its shape or meaning in words, for the error.

    Raises:
        TypeError: no tensor, or one of another dtype or layout.
        ValueError: a tensor on another device.
    """
    about = f" {what}" if what else ""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor{about}; got {shown(value)}")
    if value.layout != torch.strided or value.is_nested or value.is_quantized:
        raise TypeError(f"{name} must be a dense (strided) tensor{about}; got {shown(value)}")
    if value.dtype not in kinds:
        allowed = ", ".join(str(kind).removeprefix("torch.") for kind in kinds)
        raise TypeError(f"{name} must be {allowed}{about}; got {shown(value)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device}, where the queries are; got {shown(value)}")
    return value


def check_tensors(*, mixed: bool = False, **tensors: Any) -> None:
    """Check that values are dense floating tensors on one device, of one dtype unless they may be ``mixed``.

    Raises:
        TypeError: no tensor, or one of another dtype.
        ValueError: tensors of several dtypes or devices.
    """
    for name, value in tensors.items():
        check_tensor(name, value)
    first = next(iter(tensors.values()))
    if any(t.device != first.device or (t.dtype != first.dtype and not mixed) for t in tensors.values()):
        told = "a device" if mixed else "a dtype and a device"
        raise ValueError(f"{', '.join(tensors)} must share {told}; got {', '.join(map(shown, tensors.values()))}")


def check_fit(x: Tensor, weight: Tensor) -> None:
    """Check that tokens have the dtype and the device of the weights they meet.

    Autocast casts both, and weights may be kept in other forms than floats.

    Raises:
        ValueError: another dtype or device.
    """
    kept = x.dtype in FLOATS and weight.dtype in FLOATS
    if x.dtype != weight.dtype and kept and (x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type)):
        raise ValueError(f"tokens must be {str(weight.dtype).removeprefix('torch.')}, as the weights are; got {shown(x)}")
    if x.device != weight.device:
        raise ValueError(f"tokens must be on {weight.device}, where the weights are; got {shown(x)}")


def check_range(name: str, table: Tensor, low: int, count: int, what: str) -> None:
    """Check that the entries of a table of indices are from ``low`` to ``count - 1``, where they can be read without waiting.

    They cannot while a graph is traced or under a transform, and meta tensors have none; on another device than the CPU the
    program would have to wait for them. Where a wrong entry would be a wrong address, the operator looks itself.

    Args:
        name: of the table.
        table: the indices.
        low: the least entry: 0, or -1 where that means none.
        count: how many there are of what it lists.
        what: that.

    Raises:
        ValueError: an entry out of range.
    """
    plain = table.device.type == "cpu" and type(table) in (Tensor, torch.nn.Parameter)
    if not plain or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or not table.numel():
        return
    least, most = map(int, table.aminmax())
    if least < low or most >= count:
        none = ", or -1 for none" if low < 0 else ""
        raise ValueError(f"{name} must list {what} from 0 to {count - 1}{none}; got {least if least < low else most}")


def check_integer(name: str, value: Any, low: int | None = 0, high: int = LARGEST) -> int:
    """Check that a value is a whole number within bounds, no bool; returns it as an int.

    Raises:
        TypeError: no whole number.
        ValueError: out of bounds.
    """
    if isinstance(value, torch.SymInt) or (torch.compiler.is_compiling() and type(value) is int):
        return value  # type: ignore[return-value]  # may stand for a size of any value: comparing would tie the graph to it
    if isinstance(value, (bool, Tensor)) or not hasattr(type(value), "__index__"):
        raise TypeError(f"{name} must be a whole number; got {shown(value)}")
    try:
        number = operator.index(value)
    except TypeError:  # such as arrays of more than one number
        raise TypeError(f"{name} must be a whole number; got {shown(value)}") from None
    if low is not None and number < low:
        raise ValueError(f"{name} must be at least {low}; got {shown(value)}")
    if number > high:
        raise ValueError(f"{name} must be at most {high}; got {shown(value)}")
    return number


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, below: float | None = None) -> float:
    """Check that a value is a finite real number with ``low <= value <= high`` (and under ``below``), no bool.

    Raises:
        TypeError: no real number.
        ValueError: not finite, or out of bounds.
    """
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return value  # type: ignore[return-value]  # stands for a number while a graph is traced
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number; got {shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not -math.inf < number < math.inf or not low <= number <= high or (below is not None and number >= below):
        upper = f" and below {below}" if below is not None else f" and at most {high}" if high != math.inf else ""
        bounds = f" of at least {low}{upper}" if low != -math.inf else upper
        raise ValueError(f"{name} must be a finite number{bounds}; got {shown(value)}")
    return number


def check_flag(name: str, value: Any) -> bool:
    """Check that a value is True or False.

    Raises:
        TypeError: anything else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {shown(value)}")
    return value


def check_choice(name: str, value: Any, allowed: Collection[str]) -> str:
    """Check that a value is one of some words.

    Raises:
        TypeError: no text.
        ValueError: another word; the error lists the allowed ones, and the nearest where there is one.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {', '.join(allowed)}; got {shown(value)}")
    if value not in allowed:
        near = nearest(value, allowed)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}{hint}")
    return value


def check_sizes(name: str, value: Any, rank: int | None = None, low: int = 1, high: int = LARGEST) -> int | tuple[int, ...]:
    """Check a whole number for all axes, or one per axis: an int, or a tuple of ``rank`` ints.

    Raises:
        TypeError: no whole numbers.
        ValueError: out of bounds, or another number of axes.
    """
    if isinstance(value, (str, bytes, Tensor)) or not isinstance(value, Sequence):
        return check_integer(name, value, low, high)
    if not value or (rank is not None and len(value) != rank):
        wanted = "one number per axis" if rank is None else f"a number, or {rank} of them, one per axis"
        raise ValueError(f"{name} must be {wanted}; got {shown(value)}")
    return tuple(check_integer(f"{name}[{axis}]", entry, low, high) for axis, entry in enumerate(value))


def check_per_axis(name: str, value: Any, rank: int, low: int = 1) -> tuple[int, ...]:
    """Check a whole number for all axes, or one per axis, and return one per axis.

    Raises:
        TypeError, ValueError: see :func:`check_sizes`.
    """
    sizes = check_sizes(name, value, rank, low)
    return sizes if isinstance(sizes, tuple) else (sizes,) * rank


def check_grid(name: str, value: Any, low: int = 1, high: int = LARGEST) -> tuple[int, ...]:
    """Check a sequence of whole numbers, one per axis, at least one; returns them as a tuple.

    Raises:
        TypeError: no sequence, or of something else.
        ValueError: empty, or out of bounds.
    """
    if isinstance(value, (str, bytes, Tensor)) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence of whole numbers, one per axis; got {shown(value)}")
    if not len(value):
        raise ValueError(f"{name} must have at least one axis; got {shown(value)}")
    return tuple(check_integer(f"{name}[{axis}]", entry, low, high) for axis, entry in enumerate(value))


def check_tokens(**grids: Sequence[int]) -> None:
    """Check that grids have no more tokens than can be numbered; those of a graph whose sizes are open are left alone.

    Raises:
        ValueError: one has more.
    """
    counts = [math.prod(grid) for grid in grids.values()]
    if any(type(count) is int and count > LARGEST for count in counts) and not torch.compiler.is_compiling():
        got = ", ".join(f"{name} {tuple(grid)}" for name, grid in grids.items())
        raise ValueError(f"a grid may have at most {LARGEST} tokens; got {got}")


def check_text(name: str, value: Any) -> str:
    """Check that a value is text.

    Raises:
        TypeError: anything else.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be text; got {shown(value)}")
    return value


def check_device(name: str, value: Any) -> torch.device | None:
    """Check that a value names a device: a ``torch.device``, its text form or number; None stays None.

    Raises:
        TypeError: no name of a device.
        ValueError: a device that torch does not know.
    """
    if value is None or isinstance(value, torch.device):
        return value
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise TypeError(f"{name} must be a device, such as 'cpu' or 'cuda:0'; got {shown(value)}")
    try:
        return torch.device(value)
    except RuntimeError as error:
        raise ValueError(f"{name} must be a device, such as 'cpu' or 'cuda:0'; got {shown(value)}") from error


def check_dtype(name: str, value: Any, kinds: Sequence[torch.dtype] = FLOATS) -> torch.dtype | None:
    """Check that a value is one of some dtypes; None stays None.

    Raises:
        TypeError: anything else.
    """
    if value is not None and (not isinstance(value, torch.dtype) or value not in kinds):
        allowed = ", ".join(map(str, kinds))
        raise TypeError(f"{name} must be {allowed}; got {shown(value)}")
    return value


def checked(**least: int) -> Callable[[Function], Function]:
    """Check the arguments of a constructor by their annotations, before it runs.

    ``int`` is a whole number of at least 1, or of the argument's default where that is 0 or less; ``float`` a finite number;
    ``bool`` a flag; ``str`` text; ``Literal`` one of its words; ``Sequence[int]`` and ``tuple[int, ...]`` whole numbers, one
    per axis. What else an annotation allows is left to the constructor. ``device`` and ``dtype`` are such, annotated or not.

    Args:
        **least: lower bounds of whole numbers that may be smaller, by the name of the argument.

    Raises:
        TypeError, ValueError: on calling the constructor, see :func:`check_integer` and its like.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)

        @functools.lru_cache(maxsize=1)
        def kinds() -> dict[str, tuple[set[Any], int]]:
            """What each argument may be, and the lower bound of whole numbers; read at the first call."""
            hints = typing.get_type_hints(getattr(function, "func", function))  # of what a partial calls
            found = {}
            for name, parameter in signature.parameters.items():
                hint = hints.get(name, Any)
                default = parameter.default if type(parameter.default) is int else 1
                union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
                found[name] = set(typing.get_args(hint)) if union else {hint}, least.get(name, min(1, default))
            return found

        @functools.wraps(function)
        def checking(*args: Any, **options: Any) -> Any:
            try:
                bound = signature.bind(*args, **options)
            except TypeError:
                return function(*args, **options)  # names the constructor in its own error
            for name, value in bound.arguments.items():
                parameter = signature.parameters[name]
                if name in ("device", "dtype"):
                    (check_device if name == "device" else check_dtype)(name, value)
                elif parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                    bound.arguments[name] = _check_kind(name, value, *kinds()[name])
            return function(*bound.args, **bound.kwargs)

        return checking  # type: ignore[return-value]  # called like the function

    return decorate


def _check_kind(name: str, value: Any, allowed: set[Any], low: int) -> Any:
    """The value, as one of the kinds that an annotation allows."""
    if value is None and types.NoneType in allowed:
        return None
    kinds = allowed - {types.NoneType}
    many = {kind for kind in kinds if typing.get_origin(kind) in (tuple, Sequence)}
    if many and kinds - many <= {int} and all(set(typing.get_args(kind)) <= {int, ...} for kind in many):
        (kind,) = many
        rank = None if ... in typing.get_args(kind) or typing.get_origin(kind) is Sequence else len(typing.get_args(kind))
        if int in kinds:
            return check_sizes(name, value, rank, low)
        sizes = check_grid(name, value, low)
        if rank is not None and len(sizes) != rank:
            raise ValueError(f"{name} must be {rank} numbers; got {shown(value)}")
        return sizes
    if kinds == {int}:
        return check_integer(name, value, low)
    if kinds in ({float}, {int, float}):
        return check_number(name, value)
    if kinds == {bool}:
        return check_flag(name, value)
    words = [word for kind in kinds if typing.get_origin(kind) is typing.Literal for word in typing.get_args(kind)]
    if words and all(isinstance(word, str) for word in words):
        return check_choice(name, value, words)
    return check_text(name, value) if kinds == {str} else value
