"""Checkpoints: regard's own names, the official ones and timm's, read and written.

``rules`` says how a family states the names of others as data, ``files`` reads files as data and finds the weights in them,
``fitting`` brings these under a model's names and to its sizes.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...checks import check_flag, check_text, shown
from ...files import whole_file
from .files import open_checkpoint, read_state_dict, some, write_tensors
from .fitting import HEADS, adapt, assign, computable, find_reading, own_tensors, share, unfit
from .rules import TRANSFORMS, Layout, Part, Rule, Transform, block_rules, split_rules

__all__ = [
    "TRANSFORMS",
    "Layout",
    "Part",
    "Rule",
    "Transform",
    "block_rules",
    "export_state_dict",
    "layouts_of",
    "load_checkpoint",
    "read_state_dict",
    "save_checkpoint",
    "split_rules",
]


def save_checkpoint(model: nn.Module, path: str | os.PathLike[str], *, layout: str | Layout = "regard") -> None:
    """Write a model's tensors as safetensors, with how it pads; the file appears complete or not at all.

    Args:
        model: any module; foreign layouts need one of :func:`regard.create_model`.
        path: ends in ``.safetensors``.
        layout: whose names to use, see :func:`export_state_dict`.

    Raises:
        ValueError: another suffix, a layout the model does not have, or a tensor without values or of a kind that safetensors
            does not hold.
        OSError: the file cannot be written.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module; got {shown(model)}")
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"checkpoints are written as .safetensors; got {str(path)!r}")
    if path.is_dir():
        raise ValueError(f"path must be that of a file; {path} is a folder")
    tensors = export_state_dict(model, layout)
    metadata = {"format": "pt", "layout": layout.name if isinstance(layout, Layout) else layout}
    if layouts_of(model) and (pad := getattr(model, "pad", None)) is not None:
        metadata["pad"] = pad
    with whole_file(path) as partial:
        write_tensors(tensors, partial, metadata)


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
        raise ValueError(f"layout {chosen.name!r} has no names for {some(unnamed)}")
    return exported


def load_checkpoint(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[Any, object],
    *,
    key: str | None = None,
    new_head: bool = False,
    layouts: Sequence[Layout] = (),
) -> str:
    """Load a checkpoint into a model, whatever names it uses; a model is loaded whole or not changed at all.

    - Where the weights are in the file is found as :func:`read_state_dict` says: averaged weights (``model_ema``, ...) and a
      ``teacher`` come before ``model``, ``state_dict`` and the like, unless ``key`` names another entry.
    - The layout and the prefix of the names (``module.``, ``backbone.``, ``m.``, ...) are those that explain most of them. What
      self-supervised training adds to a backbone (projection heads, decoders) and the other networks of a file are left out,
      with a warning that lists them; any other name without a place is an error.
    - Another image or window size: tables of positions and of relative biases are resized bicubically. Another number of image
      channels: the kernels of the first convolution are added up for one channel, else repeated in turn and scaled by
      ``channels before / channels after``.
    - Padding: off the sizes that divide, codes pad differently. A model whose ``pad`` was not chosen when it was created takes
      the one that the layout's code has (``"token"`` for the official Swin, DaViT, NAT and DiNAT, BiFormer and LITv2), or that
      a file of :func:`save_checkpoint` names.

    A model on the meta device takes over the checkpoint's tensors, in their dtype where that is one of half, single or double
    precision. Of a parameter that a model holds under several names one is enough.

    Args:
        model: a model of :func:`regard.create_model`, or any module for its own names.
        source: a path (safetensors, or a ``torch.save`` of plain data) or a state dict.
        key: the entry of the file that holds the weights, such as ``"student"``, or the prefix of their names.
        new_head: keep the model's classifier where the checkpoint has none, or one of another number of classes.
        layouts: further ones that the names may be of, for modules that have none themselves.

    Returns:
        The name of the layout: ``"regard"``, ``"official"``, ``"timm"``, ...

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unreadable file; missing, unexpected or misshapen tensors, or such that are not finite or not of the
            model's kind of number (booleans, complex or whole numbers for real ones); the error lists them.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module; got {shown(model)}")
    if key is not None:
        check_text("key", key)
    check_flag("new_head", new_head)
    if not isinstance(layouts, Sequence) or not all(isinstance(each, Layout) for each in layouts):
        raise TypeError(f"layouts must be a list of layouts; got {shown(layouts)}")
    opened = open_checkpoint(source, key)
    expected = own_tensors(model)
    unused: frozenset[str] = getattr(model, "unused_keys", frozenset())
    tensors = {name: computable(value) for name, value in opened.tensors.items()}
    reading = find_reading(tensors, expected, unused, (*layouts_of(model), *layouts))
    found = reading.found
    reasons = adapt(model, found, expected)
    if new_head:
        heads = [each for each in expected if each.startswith(HEADS)]
        found |= {each: expected[each] for each in heads if each not in found or found[each].shape != expected[each].shape}
    differing = share(model, found)
    problems = {
        "missing": [each for each in expected if each not in found],
        "unexpected": reading.unexpected,
        "of another shape": [
            f"{each} {tuple(found[each].shape)} instead of {tuple(value.shape)}"
            + (f" ({reasons[each]})" if each in reasons else "")
            for each, value in expected.items()
            if each in found and found[each].shape != value.shape
        ],
        "unreadable": reading.misread,
        "one parameter but not equal": differing,
        "no weights": [
            f"{each} ({why})" for each, value in expected.items() if each in found and (why := unfit(found[each], value))
        ],
    }
    if any(problems.values()):
        told = "; ".join(f"{kind}: {some(names)}" for kind, names in problems.items() if names)
        raise ValueError(
            f"{opened.where} does not fit {type(model).__name__} (read as {reading.layout!r}). {told}{_advice(problems)}"
        )
    if reading.left_out:
        warnings.warn(f"left out of {opened.where}: {some(reading.left_out, 8)}", stacklevel=2)
    assign(model, {each: found[each] for each in expected})
    _choose_padding(model, opened.pad or reading.pad)
    return reading.layout


def _advice(problems: Mapping[str, Sequence[str]]) -> str:
    """What else a checkpoint could be loaded with."""
    missing, misshapen = problems["missing"], problems["of another shape"]
    if any(problems[kind] for kind in ("unreadable", "one parameter but not equal", "no weights")):
        return ""
    if not problems["unexpected"] and all(each.startswith(HEADS) for each in (*missing, *misshapen)):
        return ". To keep the model's own classifier: load_checkpoint(..., new_head=True), or num_classes= of create_model"
    first = sorted({name.split(".")[0] for name in problems["unexpected"]})
    if problems["unexpected"] and not missing and not misshapen:
        return f". What begins with {some(first, 4)} has no place in this model: to load a part alone, name it by key="
    return ""


def _choose_padding(model: nn.Module, pad: str | None) -> None:
    """Pad as the weights were trained, unless the caller chose when the model was created, by ``pad=`` or other mixers."""
    change, spec = getattr(model, "set_pad", None), getattr(model, "spec", None)
    if pad is not None and change is not None and layouts_of(model) and getattr(spec, "pad", None) is None:
        change(pad)
