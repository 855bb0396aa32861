"""From the tensors of a checkpoint to those of a model: which names they have, and what another size needs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...layers.positions import bias_parameters, resize_offset_table
from .files import AVERAGED, WRAPPERS, some
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
_COMPUTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes of real numbers that models run in."""
_PACKED = (torch.float4_e2m1fn_x2,) if hasattr(torch, "float4_e2m1fn_x2") else ()
"""Dtypes with several numbers in one element."""
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


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's state dict.

    Raises:
        ValueError: it holds something else than tensors with a shape; names it.
    """
    own = model.state_dict()
    other = [name for name, value in own.items() if not isinstance(value, Tensor) or nn.parameter.is_lazy(value)]
    if other:
        raise ValueError(
            f"{type(model).__name__} holds state that is no tensor, or not initialised by a first call: {some(other)}; a "
            "checkpoint holds tensors only"
        )
    return own


def share(model: nn.Module, found: dict[str, Tensor]) -> list[str]:
    """Fill in the other names of parameters that a model holds under several; returns those whose values differ."""
    differing = []
    for names in _shared(model):
        there = [name for name in names if name in found]
        for name in names:
            if there and name not in found:
                found[name] = found[there[0]]
        if any(not _same(found[there[0]], found[name]) for name in there[1:]):
            differing.append(" and ".join(there))
    return differing


def _shared(model: nn.Module) -> list[list[str]]:
    """The names of parameters and buffers that have several."""
    names: dict[int, list[str]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        names.setdefault(id(value), []).append(name)
    return [each for each in names.values() if len(each) > 1]


def _same(one: Tensor, other: Tensor) -> bool:
    plain = is_weight(one) and is_weight(other)
    return one is other or not plain or (one.shape == other.shape and torch.equal(one.double(), other.double()))


def assign(model: nn.Module, found: Mapping[str, Tensor]) -> None:
    """Give a model its tensors: copied into its own, or in place of those that are on the meta device."""
    own = model.state_dict(keep_vars=True)
    replaced = {name: found[name] for name, value in own.items() if value.is_meta}
    model.load_state_dict({name: found[name] for name in own if name not in replaced}, strict=False)
    if not replaced:
        return
    shared, memory = _shared(model), set()
    for name, value in replaced.items():
        value = (
            value.detach() if value.dtype in _COMPUTED or not value.is_floating_point() else value.detach().to(own[name].dtype)
        )
        pointer = value.untyped_storage().data_ptr()
        if pointer in memory or not value.is_contiguous():  # views of one memory would change with each other
            value = value.clone(memory_format=torch.contiguous_format)
        memory.add(pointer)
        replaced[name] = value
    model.load_state_dict(replaced, strict=False, assign=True)
    for first, *others in shared:
        for name in others:
            path, _, last = name.rpartition(".")
            setattr(model.get_submodule(path), last, _attribute(model, first))


def _attribute(model: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    return getattr(model.get_submodule(path), last)


def computable(value: Tensor) -> Tensor:
    """Real numbers of 8 bits in single precision, since nothing is computed with them as they are."""
    small = value.layout == torch.strided and value.is_floating_point() and value.dtype.itemsize == 1
    return value.float() if small and value.dtype not in _PACKED else value


def is_weight(value: Tensor) -> bool:
    """Whether a tensor holds real numbers that may be computed with."""
    return value.layout == torch.strided and not value.is_meta and value.is_floating_point() and value.dtype not in _PACKED


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
        return f"{named(value.dtype)} where {wanted} are needed"
    if value.dtype in _PACKED:
        return f"{named(value.dtype)}, which is not computed with here"
    if value.is_meta or kind == "booleans":
        return None
    if kind == "whole numbers":
        same = own.is_meta or torch.equal(value.to(own.dtype).to(value.dtype), value)
        return None if same else f"beyond the range of {named(own.dtype)}"
    if not _finite(value):
        return "not finite"
    return None if own.is_meta or _finite(value.to(own.dtype)) else f"beyond the range of {named(own.dtype)}"


def _finite(value: Tensor) -> bool:
    return bool(computable(value).isfinite().all())


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kind(value: Tensor) -> str:
    if value.dtype == torch.bool:
        return "booleans"
    if value.is_complex():
        return "complex numbers"
    return "real numbers" if value.is_floating_point() else "whole numbers"
