"""Checkpoints: regard's own names, the official ones and timm's, read and written.

A family states its foreign layouts as data: ordered rules ``(pattern, target, transform)``. In a pattern ``{i}`` and ``{j}``
stand for numbers, which may be scaled and shifted (``{i+1}``, ``{2j+1}``), any other ``{name}`` for the rest of a name; the
same templates read in both directions, so a layout that loads also saves.
"""

from __future__ import annotations

import math
import os
import pickle
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..caches import cached
from ..layers.positions import bias_parameters, resize_offset_table

_FIELD = re.compile(r"\{(\d*)(\w+)(?:\+(\d+))?\}")
_NESTED = ("model", "state_dict")
_PREFIXES = ("module.", "model.", "_orig_mod.")


# --------------------------------------------------------------------------------------------------------------------
# rules


class Transform(NamedTuple):
    """How a foreign tensor becomes ours, and back."""

    read: Callable[[Tensor], Tensor]
    write: Callable[[Tensor], Tensor]


def _read_query_minus_key(table: Tensor) -> Tensor:
    size = math.isqrt(table.shape[0])
    return table.unflatten(0, (size, size)).permute(2, 0, 1).flip(1, 2)


def _write_query_minus_key(table: Tensor) -> Tensor:
    return table.flip(1, 2).permute(1, 2, 0).flatten(0, 1)


def _read_flat_quadrant(quadrant: Tensor) -> Tensor:
    size = math.isqrt(quadrant.shape[1])
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


@dataclass(frozen=True)
class Layout:
    """The names of one foreign implementation.

    Args:
        name: such as ``"official"`` or ``"timm"``.
        rules: the first one that matches a key is used.
        ignore: regular expressions of foreign keys that hold nothing learned, such as index buffers.
    """

    name: str
    rules: tuple[Rule, ...]
    ignore: tuple[str, ...] = field(default=())

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
        parts += [re.escape(template[end : match.start()]), rf"(?P<{name}>\d+)" if name in ("i", "j") else rf"(?P<{name}>.+)"]
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


# --------------------------------------------------------------------------------------------------------------------
# files


def read_state_dict(source: str | os.PathLike[str] | Mapping[str, object]) -> dict[str, Tensor]:
    """The tensors of a file (safetensors, or a ``torch.save`` that holds only data) or of a dictionary.

    Dictionaries nested under ``model`` or ``state_dict`` are opened, and prefixes that wrappers put before every key removed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read as data, or holds no state dict.
    """
    where = "the checkpoint"
    content: object = source
    if isinstance(source, (str, os.PathLike)):
        where = str(source)
        content = _read_file(Path(source))
    while isinstance(content, Mapping):
        nested = next((content[name] for name in _NESTED if isinstance(content.get(name), Mapping)), None)
        if nested is None:
            break
        content = nested
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} holds a {type(content).__name__}, not a state dict")
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{where} holds no tensors; its keys are {_some(map(str, content))}")
    while prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in tensors)), None):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def _read_file(path: Path) -> object:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, safetensors.SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"cannot read {path} as safetensors or as a torch file of plain data: {reason}") from None


def save_checkpoint(model: nn.Module, path: str | os.PathLike[str], *, layout: str = "regard") -> None:
    """Write a model's tensors as safetensors; the file appears complete or not at all.

    Args:
        model: any module; foreign layouts need one of :func:`regard.create_model`.
        path: ends in ``.safetensors``.
        layout: whose names to use, see :func:`export_state_dict`.

    Raises:
        ValueError: another suffix, or a layout the model does not have.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"checkpoints are written as .safetensors; got {str(path)!r}")
    tensors = {key: value.detach().contiguous().cpu() for key, value in export_state_dict(model, layout).items()}
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(tensors, partial, metadata={"format": "pt", "layout": layout})
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


# --------------------------------------------------------------------------------------------------------------------
# models


def layouts_of(model: nn.Module) -> tuple[Layout, ...]:
    """The foreign layouts a model can be read from and written in."""
    spec = getattr(model, "spec", None)
    return () if spec is None else spec.layouts


def export_state_dict(model: nn.Module, layout: str | Layout = "regard") -> dict[str, Tensor]:
    """The state dict of a model under the names of ``layout``: ``"regard"``, one of the model's foreign layouts, or any other.

    Raises:
        ValueError: a layout the model does not have, or a tensor that it has no name for (a swapped mixer's).
    """
    tensors = dict(model.state_dict())
    if layout == "regard":
        return tensors
    chosen = layout if isinstance(layout, Layout) else next((each for each in layouts_of(model) if each.name == layout), None)
    if chosen is None:
        allowed = ", ".join(["regard", *(each.name for each in layouts_of(model))])
        raise ValueError(f"unknown layout {layout!r} for {type(model).__name__}; it has {allowed}")
    exported, unnamed = {}, []
    for key, value in tensors.items():
        names = chosen.write(key)
        if not names:
            unnamed.append(key)
        for name, rule in names:
            piece = value.chunk(rule.part.of)[rule.part.number] if rule.part and value.ndim else value
            exported[name] = TRANSFORMS[rule.transform].write(piece) if rule.transform else piece
    if unnamed:
        raise ValueError(f"layout {chosen.name!r} has no names for {_some(unnamed)}")
    return exported


def load_checkpoint(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, object],
    *,
    new_head: bool = False,
    layouts: Sequence[Layout] = (),
) -> str:
    """Load a checkpoint into a model, whatever names it uses.

    The layout is the one that explains most keys. Relative bias tables of another window size are resized bicubically.
    A model on the meta device takes over the checkpoint's tensors.

    Args:
        model: a model of :func:`regard.create_model`, or any module for its own names.
        source: a path (safetensors, or a ``torch.save`` of plain data) or a state dict.
        new_head: keep the model's classifier where the checkpoint's has another number of classes.
        layouts: further ones that the names may be of, for modules that have none themselves.

    Returns:
        The name of the layout: ``"regard"``, ``"official"``, ``"timm"``, ...

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unreadable file; missing, unexpected or misshapen tensors, which the error lists.
    """
    tensors = read_state_dict(source)
    expected = model.state_dict()
    unused: frozenset[str] = getattr(model, "unused_keys", frozenset())
    readings = {"regard": _read(tensors, None)} | {each.name: _read(tensors, each) for each in (*layouts_of(model), *layouts)}
    layout = max(readings, key=lambda name: sum(key in expected or key in unused for key in readings[name][0]))
    found, unexpected = readings[layout]
    for key in bias_parameters(model) & found.keys():
        found[key] = resize_offset_table(found[key], expected[key].shape[1:])
    if new_head:
        heads = [k for k in found if k.startswith(("head.", "aux_head.")) and k in expected]
        other = [k for k in heads if found[k].shape != expected[k].shape]
        found |= {key: expected[key] for key in other}
    unexpected += [key for key in found if key not in expected and key not in unused]
    missing = [key for key in expected if key not in found]
    misshapen = [
        f"{key} {tuple(found[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in found and found[key].shape != value.shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    if any(problems.values()):
        told = "; ".join(f"{kind}: {_some(keys)}" for kind, keys in problems.items() if keys)
        raise ValueError(f"the checkpoint does not fit {type(model).__name__} (read as {layout!r}). {told}")
    on_meta = any(value.is_meta for value in expected.values())
    model.load_state_dict({key: found[key] for key in expected}, assign=on_meta)
    return layout


def _read(tensors: Mapping[str, Tensor], layout: Layout | None) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors under our names, and the keys that have no rule."""
    if layout is None:
        return dict(tensors), []
    found: dict[str, Tensor] = {}
    unknown: list[str] = []
    parts: dict[str, dict[int, Tensor]] = {}
    for key, value in tensors.items():
        if layout.ignores(key):
            continue
        read = layout.read(key)
        if read is None:
            unknown.append(key)
            continue
        name, rule = read
        value = TRANSFORMS[rule.transform].read(value) if rule.transform else value
        if rule.part is None:
            found[name] = value
            continue
        pieces = parts.setdefault(name, {})
        pieces[rule.part.number] = value
        if len(pieces) == rule.part.of:  # with parts missing, ours is missing
            found[name] = torch.cat([pieces[i] for i in range(rule.part.of)]) if value.ndim else value
    return found, unknown


def _some(names: Iterable[str], limit: int = 40) -> str:
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
