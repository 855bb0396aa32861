"""Image folders: which files are samples, and which are leftovers of systems and programs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".avif", ".heic", ".heif"}
)
"""Of files that are images."""
_LEFTOVERS = frozenset(
    {"__macosx", "thumbs.db", "desktop.ini", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found",
     "__pycache__"}
)  # fmt: skip


def is_leftover(name: str) -> bool:
    """Whether a name is hidden (``.DS_Store``, ``._0.png``, ``.ipynb_checkpoints``), or one that a system leaves behind."""
    return name.startswith(".") or name.lower() in _LEFTOVERS


def folders_in(path: Path) -> list[Path]:
    """The folders in a folder, without what is left behind and links to what this folder lies in."""
    children = [child for child in sorted(path.iterdir()) if child.is_dir() and not is_leftover(child.name)]
    return [child for child in children if not _holds(os.path.realpath(child), os.path.realpath(path))]


def _holds(outer: str, inner: str) -> bool:
    """Whether one real path is the other or that of a folder above it."""
    return os.path.commonpath([outer, inner]) == outer


def class_names(path: Path) -> list[str]:
    """The folders in a folder, each a class; links to what this folder lies in are none.

    Raises:
        ValueError: there is none.
    """
    names = sorted(child.name for child in folders_in(path))
    if not names:
        raise ValueError(f"{path}: no classes; expected one folder of images per class, or parquet files")
    return names


def class_folders(
    path: Path, classes: Sequence[str], *, all_of_them: bool = True
) -> tuple[list[Path], list[int], Counter[str]]:
    """The images of each class.

    Args:
        path: of the folders.
        classes: their names.
        all_of_them: whether each class must have images.

    Returns:
        The files, the number of the class of each, and how many files of each suffix cannot be decoded here.

    Raises:
        ValueError: no images.
    """
    items: list[Path] = []
    labels: list[int] = []
    passed: Counter[str] = Counter()
    empty = []
    for label, name in enumerate(classes):
        found = []
        for file in sorted(_files(path / name)):
            suffix = file.suffix.lower()
            if suffix in _decoded():
                found.append(file)
            elif suffix in SUFFIXES:
                passed[suffix] += 1
        items += found
        labels += [label] * len(found)
        if not found:
            empty.append(name)
    if empty and (all_of_them or not items):
        folders = f"the folder{'s' if len(empty) > 1 else ''} {', '.join(empty)}"
        raise ValueError(f"{path}: no images in {folders}{said_of(passed)}; images end in {', '.join(sorted(_decoded()))}")
    return items, labels, passed


def said_of(passed: Counter[str]) -> str:
    """What is said of files that cannot be decoded here; nothing where there is none."""
    if not passed:
        return ""
    counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(passed.items()))
    return f" ({counts} passed over: this installation of Pillow cannot decode them)"


@cache
def _decoded() -> frozenset[str]:
    """The suffixes that the installed Pillow decodes."""
    from PIL import Image

    Image.init()
    return frozenset(suffix for suffix in SUFFIXES if Image.EXTENSION.get(suffix) in Image.OPEN)


def _files(path: Path) -> Iterator[Path]:
    """The files under a folder, through links but no folder twice or up again, without what is left behind."""
    seen: set[str] = set()
    above = os.path.dirname(os.path.realpath(path))
    for folder, inner, names in os.walk(path, followlinks=True):
        if (real := os.path.realpath(folder)) in seen or _holds(real, above):  # where the other classes are
            inner.clear()
            continue
        seen.add(real)
        inner[:] = [name for name in inner if not is_leftover(name)]
        yield from (file for name in names if not is_leftover(name) and (file := Path(folder, name)).is_file())
