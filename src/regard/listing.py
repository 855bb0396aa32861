"""What the package holds, by name, to be read without torch: its systems, mixers and backbones.

``systems.csv`` is written by hand. ``listing.json`` is what the registries say, written by ``make listing``.
"""

from __future__ import annotations

import csv
import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from fnmatch import fnmatch
from importlib import resources
from typing import Any

from .names import nearest

WIDTH, HEADS = 64, 2
"""The size of a mixer whose parameters are listed."""


def rows() -> list[dict[str, str]]:
    """The lines of ``systems.csv`` as they stand there.

    Raises:
        FileNotFoundError: an installation without the catalog.
    """
    return list(csv.DictReader(_read("systems.csv").splitlines()))


def equal_to(row: dict[str, str]) -> str:
    """The code that a system was found equal to, by repository and commit or library and version; else ``formula``."""
    return ", ".join(dict.fromkeys(each.split(":")[0].strip() for each in row["verified"].split("|")))


def listed(kind: str, pattern: str = "*") -> list[dict[str, Any]]:
    """What is known of the ``"mixers"`` or ``"models"`` whose names match a shell-style pattern.

    Raises:
        ValueError: none matches, with those whose names are alike.
        FileNotFoundError: an installation without the listing.
    """
    known = json.loads(_read("listing.json"))[kind]
    found = [row for row in known if fnmatch(row["name"], pattern)]
    if not found:
        names = [row["name"] for row in known]
        near = nearest(pattern.strip("*?"), names)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        few = f"there are {', '.join(names)}" if len(names) <= 40 else f"`regard {kind}` lists all {len(names)}"
        raise ValueError(f"no {kind.removesuffix('s')} matches {pattern!r}; {hint}{few}")
    return found


def print_table(fixed: Sequence[str], words: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a line a row; on a terminal that is too narrow for that, what is in words stands under its row.

    Args:
        fixed: headings of the columns that are kept whole.
        words: headings of those that may be broken between words; they come last.
        rows: their cells.
    """
    columns = [*fixed, *words]
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    room = shutil.get_terminal_size().columns
    if not sys.stdout.isatty() or sum(widths) + 2 * len(widths) - 2 <= room:
        for row in (columns, *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    for row in (columns, *rows):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths[: len(fixed)], strict=False))
        print(textwrap.fill(line.rstrip(), room, subsequent_indent="    ", break_on_hyphens=False))
        for cell in filter(None, row[len(fixed) :]):
            print(textwrap.fill(cell, room, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False))


def _read(name: str) -> str:
    file = resources.files("regard") / name
    if not file.is_file():
        raise FileNotFoundError(f"the catalog {name} is missing from this installation of regard")
    return file.read_text(encoding="utf-8")
