"""Checkpoints of runs: tensors as safetensors, all else as json in the same file; whole or absent, and never unpickled.

A run's folder keeps the last checkpoint and the one before, so that a damaged one costs a few steps and not the run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins import CheckpointIO
from safetensors import safe_open
from torch import Tensor, nn

from ..files import clear_partials, one_line, set_aside, whole_file
from ..models.checkpoints.files import write_tensors

LAST, BEFORE = "last.ckpt", "before.ckpt"
_PARTS = frozenset(
    {"epoch", "global_step", "state_dict", "loops", "callbacks", "optimizer_states", "lr_schedulers", "history", "random"}
)
"""What every checkpoint of a run holds."""


class RunFiles(CheckpointIO):
    """Write and read the checkpoints of a run for Lightning; the checkpoint before the last one is kept.

    Args:
        settings: what the run depends on, in short; it is written into each.
    """

    def __init__(self, settings: str = "") -> None:
        self.settings = settings

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        path = Path(path)
        with whole_file(path) as partial:
            write_checkpoint({**checkpoint, "settings": self.settings} if self.settings else checkpoint, partial)
            with suppress(FileNotFoundError):
                path.replace(path.with_name(BEFORE))

    def load_checkpoint(self, path: Any, map_location: Any | None = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def resumable(folder: Path, module: nn.Module, tell: Callable[[str], None], settings: str = "") -> Path | None:
    """The checkpoint that a run goes on from: the last one that is whole and fits; None where there is none.

    Others are set aside and told of, and what killed writers left is removed.

    Args:
        folder: of the run.
        module: that is trained.
        tell: is given a sentence for each that is set aside.
        settings: that :class:`RunFiles` writes; a checkpoint with others is of another run.
    """
    clear_partials(folder / LAST)
    for path in (folder / LAST, folder / BEFORE):
        if not path.exists() and not path.is_symlink():
            continue
        try:
            _check_fit(read_checkpoint(path), module, path, settings)
        except ValueError as error:
            aside = set_aside(path)
            rest = "goes on from the checkpoint before" if (folder / BEFORE).exists() else "begins again"
            tell(f"{error}; it was set aside as {aside.name}, and training {rest}")
        else:
            return path
    return None


def _check_fit(checkpoint: Mapping[str, Any], module: nn.Module, path: Path, settings: str) -> None:
    missing = sorted(_PARTS - checkpoint.keys())
    if missing:
        raise ValueError(f"{path} is no checkpoint of a run: it has no {', '.join(missing)}")
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = checkpoint["state_dict"]
    if not isinstance(found, dict) or {k: tuple(getattr(v, "shape", ())) for k, v in found.items()} != shapes:
        raise ValueError(f"{path} is of another model")
    if checkpoint.get("settings", settings) != settings:
        raise ValueError(f"{path} is of a run with other data or another recipe")
    steps, history = getattr(module, "steps", None), checkpoint["history"]
    if steps is not None and checkpoint["global_step"] >= steps and history["count"]:  # Lightning would not validate any more
        raise ValueError(f"{path} was written between the last step and its validation")


def write_checkpoint(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write the content of a checkpoint: tensors, numbers, texts, and lists, tuples and dictionaries of these.

    Raises:
        TypeError: it holds something else; says where.
        OSError: the file cannot be written, such as on a full disk.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_pack(checkpoint, tensors, "checkpoint"))
    write_tensors(tensors, path, {"run": text, "digest": _digest(text, tensors)})


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What :func:`write_checkpoint` wrote.

    Raises:
        ValueError: the file is damaged or of another kind; names it.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    try:
        with safe_open(path, "pt") as opened:
            metadata = opened.metadata() or {}
            names = list(opened.keys())
            tensors = {name: opened.get_tensor(name) for name in names}
        text = metadata.get("run", "")
        if metadata.get("digest") != _digest(text, tensors):
            raise ValueError("its content is not what was written")
        found = _unpack(json.loads(text), tensors)
        if not isinstance(found, dict):
            raise ValueError("it holds no checkpoint")
    except Exception as error:  # what is damaged makes the readers raise anything
        raise ValueError(f"{path} cannot be read as a checkpoint of a run: {one_line(error)}") from None
    return found


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}:".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _pack(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    """Encode a value for json: other kinds become a list that begins with the kind, and tensors are collected."""
    if value is None or isinstance(value, (bool, str)) or type(value) in (int, float):
        return value
    if isinstance(value, (np.bool_, np.integer, np.floating)):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu()
        return ["tensor", name]
    if isinstance(value, np.ndarray):
        return ["array", value.dtype.str, list(value.shape), value.flatten().tolist()]
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return [kind, [_pack(each, tensors, f"{where}[{index}]") for index, each in enumerate(value)]]
    if isinstance(value, Mapping):
        pairs = [[_pack(key, tensors, where), _pack(each, tensors, f"{where}[{key!r}]")] for key, each in value.items()]
        return ["dict", pairs]
    raise TypeError(f"{where} is a {type(value).__name__}: a checkpoint of a run holds tensors, numbers and texts only")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, list):
        return value
    kind, content = value[0], value[1]
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return np.array(value[3], dtype=np.dtype(content)).reshape(value[2])
    if kind == "dict":
        return {_unpack(key, tensors): _unpack(each, tensors) for key, each in content}
    items = [_unpack(each, tensors) for each in content]
    return tuple(items) if kind == "tuple" else items
