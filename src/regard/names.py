"""Names that nothing has: the ones that were perhaps meant."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from difflib import SequenceMatcher

FEW = 40
"""Names that an error gives in full."""
ALIKE = 0.7
"""The share of letters from which on a name is near."""


def nearest(name: str, known: Iterable[str], most: int = 4) -> list[str]:
    """Names that are alike, or whose beginning is, the most alike first; capitals do not count."""
    wanted = str(name).lower()
    found = []
    for each in known:
        whole = SequenceMatcher(None, wanted, each.lower()).ratio()
        start = SequenceMatcher(None, wanted, each.lower()[: len(wanted)]).ratio()
        if wanted and max(whole, start) >= ALIKE:
            found.append((-max(whole, start), -whole, each))
    return [each for *_, each in sorted(found)[:most]]


def unknown_name(kind: str, name: str, known: Collection[str], listing: str) -> ValueError:
    """The error for an unknown name: the nearest ones, or where none is near all of a few, or how those of many begin.

    Args:
        kind: what it should be the name of.
        name: what was given.
        known: the names there are.
        listing: what lists them.
    """
    near = nearest(name, known)
    lists = f"{listing} lists all {len(known)}"
    if near:
        told = f"did you mean {', '.join(near)}? {lists}"
    elif len(known) <= FEW:
        told = f"there are {', '.join(sorted(known))}"
    else:
        families = sorted({each.partition("_")[0] for each in known})
        told = f"none is like it; names begin with {', '.join(families)}; {lists}"
    return ValueError(f"unknown {kind} {name!r}; {told}")
