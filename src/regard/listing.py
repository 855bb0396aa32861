"""What the package holds, by name, to be read without torch: its systems, mixers and backbones.

``systems.csv`` is written by hand. ``listing.json`` is what the registries say, written by ``make listing``.
"""

from __future__ import annotations

import csv
import json
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


def _read(name: str) -> str:
    file = resources.files("regard") / name
    if not file.is_file():
        raise FileNotFoundError(f"the catalog {name} is missing from this installation of regard")
    return file.read_text(encoding="utf-8")
