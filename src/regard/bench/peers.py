"""Other libraries to compare with; none is a dependency, and none is installed unless that is asked for."""

from __future__ import annotations

import importlib
import importlib.util
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch


@dataclass(frozen=True)
class Peer:
    """A library to compare with.

    Args:
        requirements: what pip installs, without dependencies; empty for what comes with torch.
        options: further ones of pip.
    """

    requirements: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


PEERS = {
    "flex": Peer(),  # FlexAttention is part of torch; compiling it takes seconds a case and needs a C++ compiler
    "timm": Peer(("timm==1.0.31", "torchvision==0.28.0")),
    "natten": Peer(("natten==0.21.7",), ("--no-build-isolation",)),
}
_KEPT: list[torch.library.Library] = []  # operators live as long as the library that defines them
_TORCHVISION_OPERATORS = (
    "nms", "qnms", "roi_align", "_roi_align_backward", "roi_pool", "_roi_pool_backward", "ps_roi_align",
    "_ps_roi_align_backward", "ps_roi_pool", "_ps_roi_pool_backward", "deform_conv2d", "_deform_conv2d_backward",
)  # fmt: skip


def peers_folder() -> Path:
    """Where peers are installed: a folder of their own, out of the way of everything else in the environment."""
    return Path(sys.prefix) / "peers"


def parse_peers(text: str) -> tuple[str, ...] | None:
    """The names in a list such as ``"timm,natten"``; ``"none"`` is no peer, ``"here"`` is None: those that are installed.

    Raises:
        ValueError: an unknown name.
    """
    if text in ("here", "none"):
        return None if text == "here" else ()
    names = tuple(name.strip() for name in text.split(","))
    if unknown := [name for name in names if name not in PEERS]:
        raise ValueError(f"unknown peers {', '.join(map(repr, unknown))}; there are {', '.join(PEERS)}, or 'here' or 'none'")
    return names


def is_here(name: str) -> bool:
    """Whether a peer can be imported, from the environment or the folder of peers."""
    _look_in_folder()
    return not PEERS[name].requirements or importlib.util.find_spec(name) is not None


def pip_command(names: Sequence[str]) -> list[str]:
    """The command that installs peers into their folder. They bring no dependencies: another torch would replace this one."""
    peers = [PEERS[name] for name in names]
    options = dict.fromkeys(option for peer in peers for option in peer.options)
    wanted = [requirement for peer in peers for requirement in peer.requirements]
    folder = str(peers_folder())
    return [sys.executable, "-m", "pip", "install", "--no-deps", *options, "--upgrade", "--target", folder, *wanted]


def choose_peers(names: Sequence[str] | None, install: bool = False) -> tuple[str, ...]:
    """The peers to compare with: those asked for, or those that are here.

    Args:
        names: of :data:`PEERS`; None for those that are here.
        install: whether to install what is asked for and not here; the command is printed and run.

    Raises:
        ModuleNotFoundError: a peer that was asked for is not here, with the command that installs it.
        ValueError: the installation failed.
    """
    if names is None:
        return tuple(name for name in PEERS if is_here(name))
    if absent := [name for name in names if not is_here(name)]:
        command = pip_command(absent)
        if not install:
            raise ModuleNotFoundError(
                f"{', '.join(absent)} not installed; --install runs, or run yourself: {shlex.join(command)}"
            )
        print(shlex.join(command), flush=True)
        if subprocess.run(command, check=False).returncode:
            raise ValueError(f"could not install {', '.join(absent)}: {shlex.join(command)}")
        importlib.invalidate_caches()
    return tuple(names)


def load_timm() -> ModuleType:
    """Import timm."""
    _look_in_folder()
    return importlib.import_module("timm")


def _look_in_folder() -> None:
    """Let imports find the folder of peers from now on.

    torchvision, which timm and other libraries import once they find it, registers shape functions for its compiled operators.
    Next to a torch build that those were not compiled for they are missing; no backbone needs them, so that empty schemas do.
    """
    if (folder := str(peers_folder())) not in sys.path:
        sys.path.append(folder)
    if importlib.util.find_spec("torchvision") and not _KEPT and not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        for name in _TORCHVISION_OPERATORS:
            library.define(f"{name}() -> ()")
        _KEPT.append(library)
