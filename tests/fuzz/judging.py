"""What is a right result, and what is one clear error."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Wrong(Exception):
    """A case that does not hold; the first words say which kind it is."""


class Refused(Exception):
    """A valid call that was refused in one clear sentence: counted, not held against it."""


TOLERANCES = {torch.float64: 1e-9, torch.float32: 3e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}
MOST_LETTERS = 700
INTERNAL = re.compile(
    r"object has no attribute|unsupported operand|not supported between|ambiguous|not subscriptable|is not iterable|"
    r"values to unpack|positional argument|index out of range|out of bounds for dimension|invalid literal|"
    r"mat1 and mat2|size of tensor a|Expected all tensors|must match the size|shape '\[|Dimension out of range|"
    r"cannot be interpreted as an integer|argument '|invalid combination|expected scalar type|not implemented for '|"
    r"object is not callable|unhashable|has no len|can't convert|could not convert|math domain|__\w+__|internal assert|"
    r"INTERNAL|torchscript|miniz|Traceback|codec can't|\x1b\[",
    re.IGNORECASE,
)
"""Words of Python and torch about their own insides, which say nothing of what was given."""


def same(name: str, found: Tensor, right: Tensor, tolerance: float, where: Tensor | None = None) -> None:
    """Check that the largest error is within the tolerance, relative to the largest value; infinities agree exactly."""
    if found.shape != right.shape:
        raise Wrong(f"{name}: shape {tuple(found.shape)}, right is {tuple(right.shape)}")
    found, right = found.detach().double(), right.detach().double()
    if where is not None:
        where = where.expand(right.shape)
        found, right = found[where], right[where]
    if not right.numel():
        return
    both = right.isfinite()
    if not torch.equal(found.isfinite(), both):  # bitwise: both are booleans
        bad = int((found.isfinite() != both).sum())
        raise Wrong(f"{name}: {bad} of {both.numel()} values are {'not ' * bool(both.any())}finite")
    if not torch.equal(found[~both], right[~both]) and not right.isnan().any():  # infinities of one sign
        raise Wrong(f"{name}: infinities of another sign")
    if not both.any():
        return
    error = (found[both] - right[both]).abs().max().item() / max(1.0, right[both].abs().max().item())
    if not error <= tolerance:
        raise Wrong(f"{name}: differs by {error:.1e} (may {tolerance:.0e})")


FILES = re.compile(r"object has no attribute|Traceback|\x1b\[|weights_only|feel free to report|positional argument|unpack")
"""The same of files, where what their readers say may follow our own words."""


def clear(
    error: BaseException, words: list[str], kinds: tuple[type[BaseException], ...] = (ValueError, TypeError),
    internal: re.Pattern[str] = INTERNAL,
) -> None:  # fmt: skip
    """Check that an error is of the right kind, one short paragraph, in words of ours, and quotes one of some words."""
    said = str(error)
    label = f"{type(error).__name__}: {' '.join(said.split())[:160]}"
    if not isinstance(error, kinds) or isinstance(error, UnicodeError):
        raise Wrong(f"another error: {label}")
    if not said.strip():
        raise Wrong(f"an empty message: {type(error).__name__}")
    if len(said) > MOST_LETTERS or "\n\n" in said.strip():
        raise Wrong(f"more than a paragraph ({len(said)} letters): {label}")
    own = "unexpected keyword argument" in said or "required positional argument" in said  # Python names the argument itself
    if not own and (found := internal.search(said)) and not any(found.group() in word for word in words):
        raise Wrong(f"words of the inside ({found.group()!r}): {label}")
    if words and not any(word.lower() in said.lower() for word in words):
        raise Wrong(f"does not quote what was given ({' / '.join(words[:3])}): {label}")


def quotable(value: Any, depth: int = 0) -> Iterable[str]:
    """Texts one of which an error about this value should have."""
    if isinstance(value, Tensor) and value.is_nested:
        yield "nested"
        return
    if isinstance(value, Tensor):
        yield str(value.dtype).removeprefix("torch.")
        yield str(tuple(value.shape))
        yield from (f"{n} " for n in value.shape)
        if value.device.type != "cpu":
            yield value.device.type
        if value.layout != torch.strided:
            yield str(value.layout).removeprefix("torch.")
        if value.numel() <= 1 and value.device.type == "cpu" and value.layout == torch.strided and not value.is_quantized:
            yield str(value.reshape(-1).tolist()[0]) if value.numel() else str(value)
        return
    if value is None:
        yield from ("None", "missing", "needs")
        return
    yield type(value).__name__
    if hasattr(value, "table"):
        yield from quotable(value.table, depth + 1)
    if isinstance(value, str) and len(value) < 60:
        yield repr(value)[1:-1] or "''"
        yield value.split("(")[0].strip() or "''"
        yield from (word for word in re.findall(r"\w{3,}", value)[:4])
    try:
        text = repr(value)
    except Exception:
        text = ""
    if text:
        yield text[:24] if len(text) > 30 else text
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        yield str(int(value))
    if isinstance(value, os.PathLike):
        yield os.fspath(value)
    if isinstance(pattern := getattr(value, "pattern", None), object) and hasattr(value, "table"):
        yield from quotable(pattern, depth + 1)
    if isinstance(value, str) and len(value) >= 60:
        yield value[:24]
    if isinstance(value, (list, tuple, set, dict)) and depth < 2:
        yield from ("empty", "none", "no ", "at least one") if not value else (f"{len(value)} ",)
        for entry in list(value)[:4]:
            yield from quotable(entry, depth + 1)
