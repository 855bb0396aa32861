"""Let ``import natten`` find regard's functions where NATTEN itself is not installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

VERSIONS = {"0.21": "0.21.7", "0.17": "0.17.5", "0.14": "0.14.6"}
"""The versions whose interface there is, and what ``natten.__version__`` then says."""

_OURS: dict[str, ModuleType] = {}
_HIDDEN: dict[str, ModuleType] = {}


def install(version: str = "0.21", *, force: bool = False) -> None:
    """Let ``import natten``, ``from natten import ...`` and ``from natten.functional import ...`` resolve to regard.

    Call it before anything imports NATTEN: a library that found none has made up its mind. A second call with another version
    replaces the first.

    Args:
        version: whose names and signatures: ``"0.21"``; ``"0.17"``, where the fused functions take relative biases and no
            stride; ``"0.14"``, whose modules have relative biases by default. The halves (``na2d_qk``, ``natten2dav``, ...) are
            there in all of them.
        force: also where the real NATTEN can be imported, which is then hidden until :func:`uninstall`.

    Raises:
        RuntimeError: the real NATTEN can be imported, and ``force`` is not set.
        ValueError: an unknown version.
    """
    if version not in VERSIONS:
        raise ValueError(f"version must be one of {', '.join(VERSIONS)}; got {version!r}")
    uninstall()
    if not force and (place := _real()) is not None:
        raise RuntimeError(f"NATTEN itself is installed ({place}): use it, or hide it with install(force=True)")
    _HIDDEN.update({name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "natten"})
    for name, contents in _contents(version).items():
        _OURS[name] = _module(name, contents)
    for name, module in _OURS.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(_OURS[parent], child, module)
    sys.modules.update(_OURS)


def uninstall() -> None:
    """Undo :func:`install`: ``import natten`` finds what it found before. Without one before, it changes nothing."""
    for name, module in _OURS.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]
    sys.modules.update(_HIDDEN)
    _OURS.clear()
    _HIDDEN.clear()


def _real() -> str | None:
    """Where the real NATTEN is, None where there is none."""
    if "natten" in sys.modules:
        return getattr(sys.modules["natten"], "__file__", None) or "imported already"
    spec = importlib.util.find_spec("natten")
    return None if spec is None else spec.origin or "without a file"


def _module(name: str, contents: dict[str, Any]) -> ModuleType:
    module = ModuleType(name, f"NATTEN's interface, computed by regard; see {__package__}.")
    module.__spec__ = ModuleSpec(name, None, origin=__file__, is_package=True)
    module.__package__, module.__file__ = name, __file__
    module.__path__ = []  # so that a module that is not here is reported missing
    module.__dict__.update(contents, __all__=[entry for entry in contents if not entry.startswith("_")], computed_by="regard")
    return module


def _contents(version: str) -> dict[str, dict[str, Any]]:
    """What each module of NATTEN holds, by its name."""
    package, context, functional, legacy, modules, types, unfused, checks, log, varlen = (
        importlib.import_module(f"{__package__}{name}")
        for name in (
            "", ".context", ".functional", ".legacy", ".modules", ".types", ".unfused", ".utils.checks", ".utils.log",
            ".utils.varlen",
        )
    )  # fmt: skip
    switches = {name: entry for name, entry in vars(context).items() if name.startswith(_SWITCHES)}
    if version == "0.21":
        return {
            "natten": _chosen(package, [*context.CONFIGS, *(name for name in package.__all__ if name not in _OWN)]),
            "natten.functional": _chosen(functional, functional.__all__),
            "natten.modules": _chosen(modules, modules.__all__),
            "natten.context": switches,
            "natten.types": _chosen(types, types.__all__),
            "natten.utils": {},
            "natten.utils.checks": _chosen(checks, checks.__all__),
            "natten.utils.log": _chosen(log, log.__all__),
            "natten.utils.varlen": _chosen(varlen, varlen.__all__),
        }
    halves = _chosen(unfused, unfused.__all__)
    ranks, prefix, file = ((1, 2, 3), "", "na") if version == "0.17" else ((1, 2), "Padded", "natten")
    classes = {f"NeighborhoodAttention{n}D": getattr(legacy, f"{prefix}NeighborhoodAttention{n}D") for n in ranks}
    contents = {
        "natten": {"__version__": VERSIONS[version], **classes},
        "natten.functional": halves,
        **{f"natten.{file}{name[-2]}d": {name: found} for name, found in classes.items()},
    }
    if version == "0.17":
        contents["natten"] |= switches
        contents["natten.functional"] |= _chosen(legacy, [f"na{n}d" for n in ranks])
        check = _chosen(legacy, ["check_all_args"])
        contents |= {
            "natten.context": switches,
            "natten.types": _chosen(types, types.__all__),
            "natten.utils": check,
            "natten.utils.checks": check,
            "natten.utils.log": _chosen(log, log.__all__),
        }
    return contents


def _chosen(module: ModuleType, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(module, name) for name in names}


_OWN = ("context", "functional", "install", "modules", "uninstall")
"""What regard's package has in its place or on top."""

_SWITCHES = ("allow_", "are_", "disable_", "enable_", "force_", "get_", "has_", "is_", "set_", "use_")
"""How the functions of NATTEN's context begin."""
