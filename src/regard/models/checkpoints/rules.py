"""The names of other implementations as data: ordered rules ``(pattern, target, transform)``.

In a pattern ``{i}`` and ``{j}`` stand for numbers, which may be scaled and shifted (``{i+1}``, ``{2j+1}``), any other
``{name}`` for the rest of a name; the same templates read in both directions, so a layout that loads also saves.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ...caches import cached

_FIELD = re.compile(r"\{(\d*)(\w+)(?:\+(\d+))?\}")


class Transform(NamedTuple):
    """How a foreign tensor becomes ours, and back."""

    read: Callable[[Tensor], Tensor]
    write: Callable[[Tensor], Tensor]


def _side(count: int) -> int:
    side = math.isqrt(count)
    if side * side != count:
        raise ValueError(f"its {count} entries are no square, as those of a square window would be")
    return side


def _read_query_minus_key(table: Tensor) -> Tensor:
    size = _side(table.shape[0])
    return table.unflatten(0, (size, size)).permute(2, 0, 1).flip(1, 2)


def _write_query_minus_key(table: Tensor) -> Tensor:
    return table.flip(1, 2).permute(1, 2, 0).flatten(0, 1)


def _read_flat_quadrant(quadrant: Tensor) -> Tensor:
    size = _side(quadrant.shape[1])
    return quadrant.unflatten(1, (size, size))


TRANSFORMS: dict[str, Transform] = {
    # [(2M-1)^2, heads] indexed by query minus key  <->  (heads, 2M-1, 2M-1) indexed by key minus query
    "query_minus_key_table": Transform(_read_query_minus_key, _write_query_minus_key),
    # the 1x1 convolution of a channels-first network  <->  a linear layer
    "conv1x1": Transform(lambda weight: weight[..., 0, 0], lambda weight: weight[..., None, None]),
    # a convolution, stored as a matrix by some releases where it is 1x1  <->  a convolution
    "convolution": Transform(lambda weight: weight if weight.ndim == 4 else weight[..., None, None], lambda weight: weight),
    # [out, in, 1, 2], a convolution across two stacked vectors  <->  a linear layer of both side by side
    "side_by_side": Transform(
        lambda weight: torch.cat([weight[..., 0, 0], weight[..., 0, 1]], 1),
        lambda weight: torch.stack(weight.chunk(2, 1), -1).unsqueeze(2),
    ),
    # the depthwise 1x1 convolution, or the (1, channels, 1, 1) map, of a channels-first network  <->  a vector
    "depthwise1x1": Transform(lambda weight: weight[:, 0, 0, 0], lambda factor: factor[:, None, None, None]),
    "channel_map": Transform(lambda values: values[0, :, 0, 0], lambda values: values[None, :, None, None]),
    # the 1x1 convolution of a map  <->  that of a sequence
    "conv1x1_of_sequence": Transform(lambda weight: weight[..., 0], lambda weight: weight[..., None]),
    # [heads, M^2] indexed by the distances down and across  <->  (heads, M, M)
    "flat_quadrant": Transform(_read_flat_quadrant, lambda quadrant: quadrant.flatten(1)),
}


class Part(NamedTuple):
    """Which of so many equal parts, along its first axis, a foreign tensor is of ours; numbers are the same in all parts."""

    number: int
    of: int


class Rule(NamedTuple):
    """One kind of tensor: its foreign name, ours, the name of a transform, and which part of ours it is if not all."""

    pattern: str
    target: str
    transform: str | None = None
    part: Part | None = None


def split_rules(count: int, pattern: str, target: str, transform: str | None = None) -> tuple[Rule, ...]:
    """The rules of a tensor of ours that others keep in ``count`` parts; ``{part}`` in the pattern is the number of a part."""
    return tuple(Rule(pattern.replace("{part}", str(index)), target, transform, Part(index, count)) for index in range(count))


def block_rules(theirs: str, ours: str, *special: Rule, attn: str | None = "attn", mlp: str | None = "mlp") -> tuple[Rule, ...]:
    """The rules of a transformer block: ``norm1``, attention, ``norm2`` and an MLP, with residual branches in ours.

    Args:
        theirs, ours: the names of the block.
        *special: rules inside the block for names that differ; they come before the others.
        attn, mlp: their names of the attention and of the MLP; None where ``special`` lists all that is in it.
    """
    inside = [*special, Rule("norm1.{name}", "mixer.norm.{name}"), Rule("norm2.{name}", "mlp.norm.{name}")]
    branches = ((attn, "mixer.op"), (mlp, "mlp.op"))
    inside += [Rule(f"{name}.{{name}}", f"{target}.{{name}}") for name, target in branches if name is not None]
    return tuple(rule._replace(pattern=f"{theirs}.{rule.pattern}", target=f"{ours}.{rule.target}") for rule in inside)


@dataclass(frozen=True)
class Layout:
    """The names of one foreign implementation.

    Args:
        name: such as ``"official"`` or ``"timm"``.
        rules: the first one that matches a key is used.
        ignore: regular expressions of foreign keys that hold nothing learned, such as index buffers.
        pad: how that implementation pads grids that do not divide, where the model leaves it to the checkpoint.
    """

    name: str
    rules: tuple[Rule, ...]
    ignore: tuple[str, ...] = field(default=())
    pad: str | None = None

    def read(self, key: str) -> tuple[str, Rule] | None:
        """Our name of a foreign key and its rule, or None for a key without one."""
        for rule in self.rules:
            if (name := _translate(key, rule.pattern, rule.target)) is not None:
                return name, rule
        return None

    def write(self, key: str) -> list[tuple[str, Rule]]:
        """The foreign names of our key, one for each part, and their rules; empty for a key without one."""
        names: list[tuple[str, Rule]] = []
        for rule in self.rules:
            if (name := _translate(key, rule.target, rule.pattern)) is None:
                continue
            names.append((name, rule))
            if rule.part is None or rule.part.number == rule.part.of - 1:
                break
        return names

    def ignores(self, key: str) -> bool:
        return any(re.search(pattern, key) for pattern in self.ignore)


@cached(1024)
def _compile(template: str) -> tuple[re.Pattern[str], dict[str, tuple[int, int]]]:
    """A template as a regular expression, and by how much each of its numbers is scaled and shifted."""
    numbers: dict[str, tuple[int, int]] = {}
    parts, end = [], 0
    for match in _FIELD.finditer(template):
        scale, name, shift = match.groups()
        parts += [
            re.escape(template[end : match.start()]),
            rf"(?P<{name}>[0-9]{{1,9}})" if name in ("i", "j") else rf"(?P<{name}>.+)",
        ]
        end = match.end()
        if name in ("i", "j"):
            numbers[name] = (int(scale or 1), int(shift or 0))
    return re.compile("".join([*parts, re.escape(template[end:])])), numbers


def _translate(key: str, pattern: str, target: str) -> str | None:
    expression, numbers = _compile(pattern)
    match = expression.fullmatch(key)
    if match is None:
        return None
    values: dict[str, str] = match.groupdict()
    for name, (scale, shift) in numbers.items():
        number, rest = divmod(int(values[name]) - shift, scale)
        if number < 0 or rest:
            return None
        values[name] = str(number)

    def fill(found: re.Match[str]) -> str:
        scale, name, shift = found.groups()
        return str(int(scale or 1) * int(values[name]) + int(shift or 0)) if name in ("i", "j") else values[name]

    return _FIELD.sub(fill, target)
