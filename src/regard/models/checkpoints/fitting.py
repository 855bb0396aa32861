"""From the tensors of a checkpoint to those of a model: which names they have, and what another size needs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...layers.positions import bias_parameters, resize_offset_table
from .files import AVERAGED, WRAPPERS
from .rules import TRANSFORMS, Layout

HEADS = ("head.", "head_dist.", "aux_head.")
"""How the names of classifiers begin."""
_BOOKKEEPING = re.compile(r"(^|\.)(n_averaged|num_updates|initted|step|decay)$")
"""What averaging keeps beside the weights."""
_PROJECTIONS = re.compile(
    r"(^|\.)((dino_|ibot_)?head\.(mlp\d*|last_layer\d*)|projector|projection_head|prototypes|predictor|mask_token"
    r"|decoder_(embed|pos_embed|blocks|norm|pred))(\.|$)"
)
"""What self-supervised training adds to a backbone, and what is read from it leaves out."""
_DEEP = 3
"""Parts of the longest prefix that is looked for."""
_MANY = 12
"""Prefixes that are tried."""


@dataclass
class Reading:
    """A checkpoint under our names, as one layout and prefix read it.

    Attributes:
        layout, prefix: the name of the layout, and what stood before every name.
        pad: how the layout pads.
        found: tensors by our names.
        origins: the checkpoint's names of these.
        unexpected: the checkpoint's names that have no place.
        left_out: those that are known to be of other networks.
        misread: what a transform could not read, and why.
    """

    layout: str
    prefix: str
    pad: str | None = None
    found: dict[str, Tensor] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    misread: list[str] = field(default_factory=list)


def find_reading(
    tensors: Mapping[str, Tensor], expected: Mapping[str, object], unused: frozenset[str], layouts: Sequence[Layout]
) -> Reading:
    """The reading that explains most names: under every layout, without and with the prefixes that many names have.

    Of two that explain as many, the one whose prefix says that the weights are averaged, or a teacher's, then the first.
    """
    known = expected.keys() | unused

    def explained(reading: Reading) -> int:
        return len(reading.found.keys() & known)

    def best(prefix: str) -> Reading:
        named = {name.removeprefix(prefix): name for name in sorted(tensors, key=lambda name: name.startswith(prefix))}
        readings = [_read(tensors, named, prefix, layout) for layout in (None, *layouts)]
        return max(readings, key=explained)

    reading = best("")
    if reading.unexpected or not reading.found.keys() <= known or explained(reading) < len(expected):
        others = [best(prefix) for prefix in _prefixes(tensors)]
        reading = max([reading, *others], key=lambda each: (explained(each), _averaged(each.prefix)))
    for name in [name for name in reading.found if name not in known]:
        del reading.found[name]
        reading.unexpected.append(reading.origins[name])
    _sort_out(reading)
    return reading


def _prefixes(names: Iterable[str]) -> list[str]:
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        counts.update(".".join(parts[:depth]) + "." for depth in range(1, min(_DEEP, len(parts) - 1) + 1))
    total = len(list(names))
    return [prefix for prefix, count in counts.most_common(_MANY) if count * 8 >= total]


def _averaged(prefix: str) -> bool:
    return prefix.split(".")[0] in AVERAGED


def _sort_out(reading: Reading) -> None:
    """Of the names without a place, find those that are known to be of another network."""
    unexpected, reading.unexpected = reading.unexpected, []
    first = reading.prefix.split(".")[0]
    for name in unexpected:
        own = name.removeprefix(reading.prefix)
        of = name.split(".")[0]
        if _BOOKKEEPING.search(own):
            continue
        other = bool(reading.prefix) and of != first and of in WRAPPERS
        (reading.left_out if other or _PROJECTIONS.search(own) else reading.unexpected).append(name)


def _read(tensors: Mapping[str, Tensor], named: Mapping[str, str], prefix: str, layout: Layout | None) -> Reading:
    """Read under one layout.

    Args:
        tensors: of the checkpoint.
        named: names without the prefix, and the checkpoint's.
        prefix: for the reading.
        layout: None for our own names.
    """
    if layout is None:
        return Reading("regard", prefix, None, {own: tensors[name] for own, name in named.items()}, dict(named))
    reading = Reading(layout.name, prefix, layout.pad)
    parts: dict[str, dict[int, Tensor]] = {}
    for own, original in named.items():
        if layout.ignores(own):
            continue
        read = layout.read(own)
        if read is None:
            reading.unexpected.append(original)
            continue
        name, rule = read
        value = tensors[original]
        reading.origins[name] = original
        if rule.transform:
            try:
                value = TRANSFORMS[rule.transform].read(value)
            except (RuntimeError, IndexError, ValueError) as error:
                why = str(error) if isinstance(error, ValueError) else f"no {rule.transform}"
                reading.misread.append(f"{original} {tuple(value.shape)} ({why})")
                reading.found[name] = value
                continue
        if rule.part is None:
            reading.found[name] = value
            continue
        pieces = parts.setdefault(name, {})
        pieces[rule.part.number] = value
        if len(pieces) == rule.part.of:  # with parts missing, ours is missing
            if len({piece.shape[1:] for piece in pieces.values()}) > 1:
                reading.misread.append(f"{original} {tuple(value.shape)} (its parts differ)")
            else:
                joined = [pieces[i] for i in range(rule.part.of)]
                reading.found[name] = torch.cat(joined) if value.ndim else value
    return reading


# --------------------------------------------------------------------------------------------------------------------
# other sizes


def adapt(model: nn.Module, found: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, str]:
    """Resize what depends on the size of windows and images, and the first convolution to the channels of the images.

    Args:
        model: that the tensors are for; a module with ``adapted(name, tensor)`` resizes its own.
        found: tensors by the model's names, changed in place.
        expected: the model's own.

    Returns:
        Of tensors that cannot be resized, their names and why not.
    """
    refused: dict[str, str] = {}
    for key in bias_parameters(model) & found.keys():
        table, wanted = found[key], expected[key]
        if table.ndim == wanted.ndim == 3 and table.shape[0] == wanted.shape[0] and table.numel() and is_weight(table):
            found[key] = resize_offset_table(table, wanted.shape[1:])
    for path, module in model.named_modules():
        if not hasattr(module, "adapted"):
            continue
        for name in [name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]:
            key = f"{path}.{name}" if path else name
            if key in found and found[key].shape != expected[key].shape and is_weight(found[key]):
                try:
                    found[key] = module.adapted(name, found[key])
                except ValueError as error:
                    refused[key] = str(error)
    kernel = _first_convolution(model)
    if kernel is not None and kernel in found and is_weight(found[kernel]):
        found[kernel] = adapt_channels(found[kernel], expected[kernel].shape)
    return refused


def is_weight(value: Tensor) -> bool:
    """Whether a tensor holds real numbers that may be computed with."""
    return value.layout == torch.strided and not value.is_meta and value.is_floating_point()


def _first_convolution(model: nn.Module) -> str | None:
    """The name of the kernel that reads the image."""
    stem = getattr(model, "stem", None)
    if not isinstance(stem, nn.Module):
        return None
    for path, module in stem.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return f"stem.{path}.weight" if path else "stem.weight"
    return None


def adapt_channels(kernel: Tensor, shape: torch.Size) -> Tensor:
    """A kernel ``(out, channels, *extent)`` for images of another number of channels.

    For one channel those of the kernel are added up, as if the image were grey; for others they are repeated in turn and
    scaled by ``channels before / channels after``, so that the response keeps its size. Returns it as it is where anything
    else differs.
    """
    before, after = kernel.shape[1] if kernel.ndim > 1 else 0, shape[1]
    fits = kernel.ndim == len(shape) and kernel.shape[0] == shape[0] and kernel.shape[2:] == shape[2:]
    if before == after or not before or not fits:
        return kernel
    if after == 1:
        return kernel.sum(1, keepdim=True)
    return kernel[:, torch.arange(after) % before] * (before / after)


# --------------------------------------------------------------------------------------------------------------------
# what cannot be weights


def unfit(value: Tensor, own: Tensor) -> str | None:
    """Why a tensor cannot take the place of one of the model's; None where it can."""
    if value.is_meta and not own.is_meta:
        return "on the meta device, without values"
    if value.layout != torch.strided or value.is_quantized:
        return str(value.layout).removeprefix("torch.") if value.layout != torch.strided else "quantized"
    kind, wanted = _kind(value), _kind(own)
    if kind != wanted:
        return f"{str(value.dtype).removeprefix('torch.')} where {wanted} are needed"
    if value.is_meta or kind in ("whole numbers", "booleans"):
        return None
    numbers = value.float() if value.dtype.itemsize == 1 else value
    return None if bool(numbers.isfinite().all()) else "not finite"


def _kind(value: Tensor) -> str:
    if value.dtype == torch.bool:
        return "booleans"
    if value.is_complex():
        return "complex numbers"
    return "real numbers" if value.is_floating_point() else "whole numbers"
