"""Reading checkpoint files as data, and finding the weights among what training programs write beside them."""

from __future__ import annotations

import builtins
import itertools
import os
import pickle
import re
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ...files import one_line

AVERAGED = (
    "state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema_model", "ema", "params_ema", "ema_params",
    "averaged_model", "teacher",
)  # fmt: skip
"""Names of averaged weights and of the teachers of self-supervised training, which are what is evaluated and published."""
TRAINED = (
    "state_dict", "model_state_dict", "model_state", "model", "net", "network", "params", "weights", "module", "online_model",
    "student",
)  # fmt: skip
"""Names of the weights that were trained."""
WRAPPERS = AVERAGED + TRAINED
"""Both, the preferred ones first."""
_OTHER = re.compile(r"optim|sched|scaler|hyper_param|callbacks|loops|config|args|random|rng", re.IGNORECASE)
"""Of entries that hold other things than weights, even where there are tensors among them."""
_INFIXES = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PREFIXES = ("module.", "model.")
_UNKNOWN = re.compile(r"Unsupported global: GLOBAL (\S+) was not")
_FILLED = re.compile(r"Can only (SETITEM|append|extend).* but got <class 'foreign: ([^']+)'>")
_PLAIN = ("builtins.getattr",)
"""Functions that stand beside the arguments of runs, in enumerations."""
_ARCHIVES = re.compile(r"^Cannot use `+weights_only=True`+ with (files saved in the )?")
_ADVICE = (
    " passed to ``torch.load",
    " Please use ",
    " Please file ",
    " Check the documentation",
    "This file can still be loaded",
    " In PyTorch 2.6",
)
"""Where torch's advice to its users begins."""
_KINDS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "it is a pointer of Git LFS, not the file itself: fetch that with git lfs pull"),
    (b"<", "it is a page of the web, or xml: the download went wrong"),
    (
        b"{",
        "it is json, as the index of a checkpoint in several files: read these, and give all tensors as one dictionary",
    ),
    (b"GGUF", "it is of the format GGUF"),
    (b"\x89HDF", "it is of the format HDF5, as Keras writes: write its tensors by name with torch.save"),
    (b"\x93NUMPY", "it is an array of numpy: write tensors by name with torch.save"),
    (b"\x1f\x8b", "it is compressed by gzip: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "it is compressed by zstd: unpack it first"),
    (b"BZh", "it is compressed by bzip2: unpack it first"),
    (b"\xfd7zXZ", "it is compressed by xz: unpack it first"),
)
"""How files begin that are often taken for checkpoints, and what is said of them."""
_ROUNDS = 32
"""Of entries within entries that are opened: those of a file may hold themselves."""
_MOST = 1_000_000
"""Tensors of a checkpoint: entries that hold each other could go on for ever."""
_FOREIGN = 200
"""Names of other programs that a file may mention."""
_LETTERS = 120
"""Of a name that an error quotes."""
_ALLOWING = threading.Lock()

PADS = ("mask", "token", "timm")


@dataclass(frozen=True)
class Opened:
    """The tensors of a checkpoint by name, where they are from, and how its model padded, if the file says so."""

    tensors: dict[str, Tensor]
    where: str
    pad: str | None = None


def read_state_dict(source: str | os.PathLike[str] | Mapping[Any, object], key: str | None = None) -> dict[str, Tensor]:
    """The tensors of a file (safetensors, or a ``torch.save`` that holds only data) or of a dictionary.

    What training programs write around the weights is opened: ``model``, ``state_dict``, ``net``, ``params``... Where there
    are several, averaged weights (``model_ema``, ``state_dict_ema``, ...) and a ``teacher`` come before the others. Classes of
    other programs, such as the arguments of a run, are passed over; nothing of them is run. Prefixes that wrappers put before
    every name are removed.

    Args:
        source: a path or a state dict.
        key: the entry that holds the weights, ``"student"`` or ``"student.backbone"``, or the prefix of their names.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read as data, or holds no state dict; no or several entries that may be meant.
    """
    tensors = open_checkpoint(source, key).tensors
    while prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def open_checkpoint(source: str | os.PathLike[str] | Mapping[Any, object], key: str | None = None) -> Opened:
    """See :func:`read_state_dict`; prefixes stay."""
    where, pad = "the checkpoint", None
    content: object = source
    if isinstance(source, (str, os.PathLike)):
        where = os.fspath(source)
        if not where:
            raise ValueError("a checkpoint is a path or a dictionary of tensors; got str ''")
        content, pad = _read_file(Path(source))
    elif not isinstance(source, Mapping):
        raise TypeError(f"a checkpoint is a path or a dictionary of tensors; got {type(source).__name__}")
    if not isinstance(content, Mapping):
        kind = type(content).__name__.removeprefix("foreign: ")
        raise ValueError(
            f"{where} holds a {kind}, not a state dict: save tensors by name, torch.save(model.state_dict(), PATH), with the "
            "program that wrote it"
        )
    found = _weights(content, where) if key is None else _entry(content, key, where)
    tensors: dict[str, Tensor] = {}
    for name, value in itertools.islice(_flat(found, where), _MOST):
        name = _INFIXES.sub("", name)
        if name in tensors and not _equal(tensors[name], value):
            raise ValueError(f"{where} holds two tensors of the name {some([name])}")
        tensors[name] = value
    if len(tensors) >= _MOST:
        raise ValueError(f"{where} holds more than {_MOST:,} tensors")
    if not tensors:
        raise ValueError(
            f"{where} holds no tensors: save them by name, torch.save(model.state_dict(), PATH); "
            f"{f'its keys are {_keys(content)}' if content else 'it is empty'}"
        )
    return Opened(tensors, where, pad)


# --------------------------------------------------------------------------------------------------------------------
# which entry


def _weights(content: Mapping[Any, object], where: str) -> Mapping[Any, object]:
    """The entry that holds the weights: the first of the known names, again and again, or the only one there is.

    Under a known name several entries are the parts of one network.
    """
    sure = False
    for _ in range(_ROUNDS):
        held = [name for name, value in content.items() if isinstance(value, Mapping) and _holds_tensors(name, value)]
        known = next((name for name in WRAPPERS if name in held), None)
        if known is None and any(isinstance(value, Tensor) for value in content.values()):
            return content
        if known is None and len(held) > 1 and sure:
            return content
        if known is None and len(held) > 1:
            raise ValueError(
                f"{where} holds several sets of tensors: {some(map(str, held))}; name one, key={str(held[0])!r}, for "
                "load_checkpoint or read_state_dict"
            )
        if not held:
            return content
        inner = content[held[0] if known is None else known]
        assert isinstance(inner, Mapping)
        content, sure = inner, known is not None
    raise ValueError(f"{where} holds entries within entries, {_ROUNDS} times and more: name that of the weights, key=...")


def _entry(content: Mapping[Any, object], key: str, where: str) -> Mapping[Any, object]:
    """The entry of that name, or the tensors whose names begin with it."""
    if not isinstance(key, str) or not key:
        raise TypeError(f"key must be the name of an entry, or of the beginning of names; got {key!r}")
    name, rest = key, ""
    while name not in content and "." in name:  # the longest name that there is
        name, _, last = name.rpartition(".")
        rest = f"{last}.{rest}" if rest else last
    inner = content.get(name)
    if isinstance(inner, Mapping):
        return _entry(inner, rest, where) if rest else _weights(inner, where)
    below = _flat(content, where)
    chosen = {name.removeprefix(f"{key}."): value for name, value in below if name.startswith(f"{key}.")}
    if not chosen:
        raise ValueError(f"{where} has no entry {key!r} that holds tensors; its keys are {_keys(content)}")
    return chosen


def _holds_tensors(name: object, content: Mapping[Any, object], depth: int = 4) -> bool:
    level: list[tuple[object, Mapping[Any, object]]] = [(name, content)]
    seen: set[int] = set()
    for _ in range(depth + 1):  # level by level, each dictionary once: they may hold each other
        below: list[tuple[object, Mapping[Any, object]]] = []
        for key, inner in level:
            other = isinstance(key, str) and key not in WRAPPERS and _OTHER.search(key)
            if other or id(inner) in seen:
                continue
            seen.add(id(inner))
            if any(isinstance(value, Tensor) for value in inner.values()):
                return True
            below += [(key, value) for key, value in inner.items() if isinstance(value, Mapping)]
        level = below
    return False


def _equal(one: Tensor, other: Tensor) -> bool:
    same = one is other or (one.shape == other.shape and one.dtype == other.dtype and one.layout == other.layout)
    return same and (one is other or (not one.is_meta and not other.is_meta and torch.equal(one, other)))


def _keys(content: Mapping[Any, object]) -> str:
    """The keys of a dictionary for an error, with the kinds of what is neither a tensor nor a number."""
    kinds = {key: type(value).__name__.removeprefix("foreign: ") for key, value in content.items()}
    return some(f"{key} ({kind})" if kind not in ("Tensor", "int", "float") else str(key) for key, kind in kinds.items())


def _flat(content: Mapping[Any, object], where: str, prefix: str = "", depth: int = 8) -> Iterator[tuple[str, Tensor]]:
    """The tensors of dictionaries of dictionaries, by names joined with points."""
    for key, value in content.items():
        nested = isinstance(value, Mapping) and depth > 0 and _holds_tensors(key, value)
        if not nested and not isinstance(value, Tensor):
            continue
        if not isinstance(key, str):
            raise ValueError(f"the names of tensors in {where} must be text; got {type(key).__name__} {str(key)[:40]}")
        if isinstance(value, Tensor):
            yield prefix + key, value
        elif isinstance(value, Mapping):
            yield from _flat(value, where, f"{prefix}{key}.", depth - 1)


# --------------------------------------------------------------------------------------------------------------------
# files


def _read_file(path: Path) -> tuple[object, str | None]:
    """What a file holds, and the padding that its metadata names."""
    try:
        if not path.exists():
            raise FileNotFoundError(f"no checkpoint at {path}")
        if not path.is_file():
            raise ValueError(f"cannot read {path}: a checkpoint is a file, this is {'a folder' if path.is_dir() else 'none'}")
        with open(path, "rb") as file:
            beginning = file.read(32)
    except FileNotFoundError:
        raise
    except OSError as error:  # no permission, a name that is too long
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    if not beginning:
        raise ValueError(f"cannot read {path}: the file is empty")
    try:
        # by what is in it, not by its name: the length of the header, and the brace that it begins with
        if path.suffix == ".safetensors" or (beginning[8:9] == b"{" and not any(beginning[5:8])):
            with safe_open(path, "pt") as opened:
                pad = (opened.metadata() or {}).get("pad")
                names = list(opened.keys())
                return {name: opened.get_tensor(name) for name in names}, pad if pad in PADS else None
        return _read_torch(path), None
    except Exception as error:  # what is damaged makes the readers raise anything
        reason = next((said for start, said in _KINDS if beginning.startswith(start)), None) or _reason(error)
        raise ValueError(f"cannot read {path} as safetensors or as a torch file of plain data: {reason}") from None


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write tensors as safetensors, each of its own memory.

    Raises:
        ValueError: one that safetensors cannot hold; names it.
        OSError: the file cannot be written, such as on a full disk.
    """
    if unfit := [f"{name} ({why})" for name, value in tensors.items() if (why := _unwritable(value))]:
        raise ValueError(f"a checkpoint holds dense tensors of real and whole numbers; it cannot hold {some(unfit)}")
    copies: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, value in tensors.items():
        copy = value.detach().cpu().contiguous().resolve_conj().resolve_neg()
        if copy.untyped_storage().data_ptr() in memory:
            copy = copy.clone()
        memory.add(copy.untyped_storage().data_ptr())
        copies[name] = copy
    try:
        save_file(copies, path, metadata=dict(metadata))
    except SafetensorError as error:
        raise OSError(f"cannot write in {path.parent}: {one_line(error)}") from None


def _unwritable(value: object) -> str | None:
    """Why safetensors cannot hold a value; None where it can."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if nn.parameter.is_lazy(value):
        return "not initialised: call the model once"
    if value.is_meta:
        return "on the meta device, without values"
    if value.layout != torch.strided or value.is_nested:
        return "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
    kind = str(value.dtype).removeprefix("torch.")
    return (
        "quantized" if value.is_quantized else kind if kind in ("complex128", "complex32") or kind.startswith("bits") else None
    )


class _Foreign:
    """Stands for an object of another program, such as the arguments of a run: takes everything, keeps and does nothing."""

    def __new__(cls, *_: object, **__: object) -> _Foreign:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _ForeignItems:
    """The same for a dictionary, which keeps what is in it: weights may be."""

    def __new__(cls, *_: object, **__: object) -> Any:
        return OrderedDict()


class _ForeignList:
    """The same for a list."""

    def __new__(cls, *_: object, **__: object) -> Any:
        return []


def _read_torch(path: Path) -> object:
    """Read a ``torch.save`` as data: torch's own reader of plain data, with stand-ins for the names that it does not know.

    A stand-in is an empty class of this file, so nothing that a file names is ever imported or called.
    """
    known: dict[str, Any] = {}
    with suppress(Exception):  # files of the old format, whose names are found one by one below
        known = {name: _stand_in(name) for name in torch.serialization.get_unsafe_globals_in_checkpoint(path)}
    with _ALLOWING, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while True:
            _refuse_functions(known)
            try:
                with torch.serialization.safe_globals([(kind, name) for name, kind in known.items()]):
                    return torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:
                filled, unknown = _FILLED.search(str(error)), _UNKNOWN.search(str(error))
                if filled and filled[2] in known:  # a class of dictionaries or lists
                    known[filled[2]] = _ForeignItems if filled[1] == "SETITEM" else _ForeignList
                elif unknown and (name := unknown[1] if "." in unknown[1] else f"builtins.{unknown[1]}") not in known:
                    known[name] = _stand_in(name)
                else:
                    raise
                if len(known) > _FOREIGN:
                    raise


def _stand_in(name: str) -> type:
    """A class that is called ``foreign: NAME`` in errors."""
    return type(f"foreign: {name}", (_Foreign,), {"__module__": "builtins"})


def _refuse_functions(names: Iterable[str]) -> None:
    """Raise for names that no arguments of a run need: a file that has them was made to run code."""
    for name in names:
        module, _, function = name.partition(".")
        if module == "builtins" and name not in _PLAIN and not isinstance(getattr(builtins, function, None), type):
            raise ValueError(f"it would call {name}")


def _reason(error: Exception) -> str:
    """Why a reader failed, without its advice."""
    text = one_line(error, 100_000)
    for end in ("from a trusted source. ", "WeightsUnpickler error: "):
        text = text.rpartition(end)[2]
    for advice in _ADVICE:
        text = text.partition(advice)[0]
    if not text or text.startswith("Weights only load failed"):
        text = type(error).__name__
    text = _ARCHIVES.sub("it is of another kind: ", text)
    text = f"{text[:200].rstrip('. ')}"
    if isinstance(error, pickle.UnpicklingError) or text.startswith("it would call"):
        text += (
            ". If it is a checkpoint, save its tensors alone with the program that wrote it: "
            "torch.save(model.state_dict(), PATH), or as safetensors"
        )
    return text


def some(names: Iterable[str], limit: int = 40) -> str:
    """The first of some names, and how many more there are."""
    names = [one_line(Exception(name), _LETTERS) for name in names]
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
