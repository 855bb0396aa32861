"""The catalog: the published systems that work here, with what their docstrings say of them.

A row of ``systems.csv`` is a system. Its formula, cost and source stand where it is defined: on top of the file of its entry,
or, where several share a file, in the docstring of its class.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pkgutil import resolve_name
from typing import Any

from .layers.mixers import create_mixer, list_mixers, mixer_card
from .listing import HEADS, WIDTH, rows
from .models import ModelCard, count_parameters, list_models, model_card
from .names import unknown_name
from .ops.patterns import parse

ARGUMENTS = {
    "mixer": "dim=64, heads=4",
    "gate": "64",
    "axial_transformer": "(32, 32), slices=3, dim=64",
    "fit": '"(4)2(4)", groups=4, group_size=64, latents=8, values=256, dim=128, latent_dim=256, heads=4, latent_heads=8',
}
"""What other entries than backbones are called with in an example, by slug or by kind; else the names of what they need."""


@dataclass(frozen=True)
class Account:
    """What a docstring says of a system.

    Attributes:
        text: what it computes and what there is to know, in paragraphs; formulas are indented.
        cost: one phrase; empty where none is stated.
        source: authors and papers.
    """

    text: str
    cost: str
    source: str


@dataclass(frozen=True)
class System:
    """A row of the catalog.

    Attributes:
        entry: dotted path of what creates it.
        sizes: names of its models, or text forms of its patterns.
        verified: what it was compared with in float64 under the same weights, several separated by ``|``: repository and
            commit, or library and version; variants; image sizes; modes; largest error of the output and of the gradient of
            the input, relative to their largest entries. ``"formula"`` where only its tests restate it.
        exempt: properties that it lacks, with reasons.
    """

    id: int
    slug: str
    name: str
    title: str
    arxiv: str
    year: int
    kind: str
    area: str
    entry: str
    sizes: tuple[str, ...]
    verified: str
    exempt: Mapping[str, str]

    @property
    def cards(self) -> list[ModelCard]:
        """What is known of its models; none where it is not a backbone."""
        return [model_card(size) for size in self.sizes] if self.kind == "backbone" else []

    @property
    def lines(self) -> str:
        """Two lines that create its first size, or use it, where it takes a ``model``, ``images``, ``q``, ``k`` and ``v``."""
        module, _, name = self.entry.rpartition(".")
        if self.kind == "backbone":
            return f'import regard\nmodel = regard.create_model("{self.sizes[0]}")'
        if self.kind == "operator":
            return f'from regard import attend\ny = attend(q, k, v, "{self.sizes[0]}")'
        entry = resolve_name(self.entry)
        parameters = inspect.signature(entry).parameters.values()
        needed = [p.name for p in parameters if p.default is p.empty and p.kind < p.VAR_POSITIONAL]
        arguments = ARGUMENTS.get(self.slug) or ARGUMENTS.get(self.kind) or ", ".join(needed)
        made = "model" if isinstance(entry, type) else "found"
        return f"from {module} import {name}\n{made} = {name}({arguments})"

    @property
    def module(self) -> str:
        """Dotted path of the file that it is written in."""
        return self._subject.__module__

    @property
    def account(self) -> Account:
        """Formula, cost and source."""
        above = inspect.getdoc(sys.modules[self.module]) or ""
        return read_account(above if self.arxiv in above else inspect.getdoc(self._subject) or "")

    @property
    def _subject(self) -> object:
        """The class or function whose docstring, or whose file's, tells of it."""
        if self.kind == "operator":
            return type(parse(self.sizes[0]))
        if self.kind == "backbone":
            table = self.cards[0].table
            return table.func if isinstance(table, partial) else table
        return resolve_name(self.entry)


def read_account(docstring: str) -> Account:
    """Take the docstring of a mechanism apart."""
    text = re.split(r"\n\n(?=(?:Args|Attributes|Returns|Raises):\n)", docstring)[0]
    source = _phrase(r"Source: (.*?)(?=\n\n|\Z)", docstring)
    cost = _phrase(r"Cost: (.*?)(?= Source: |\n\n|\nSource: |\Z)", docstring)
    text = re.sub(r"(?:Cost|Source): .*?(?=\n\n|\Z)", "", text, flags=re.DOTALL)
    return Account(re.sub(r"\n{3,}", "\n\n", text).strip(), cost.rstrip("."), source.rstrip("."))


def _phrase(pattern: str, docstring: str) -> str:
    found = re.search(pattern, docstring, re.DOTALL)
    return " ".join(found.group(1).split()) if found else ""


@cache
def systems() -> tuple[System, ...]:
    """The systems, in the order of their numbers.

    Raises:
        FileNotFoundError: an installation without the catalog.
    """
    return tuple(_system(row) for row in rows())


def search(words: str) -> list[System]:
    """The systems that contain all words, wherever they stand, newest first; all without any."""
    wanted = words.lower().split()
    found = [each for each in systems() if all(word in _said(each) for word in wanted)]
    return sorted(found, key=lambda each: -each.year)


def _said(each: System) -> str:
    return " ".join((each.slug, each.name, each.title, each.arxiv, str(each.year), each.area, each.account.text)).lower()


def system(slug: str) -> System:
    """One of them.

    Raises:
        ValueError: unknown slug, with the nearest matches.
    """
    known = {each.slug: each for each in systems()}
    if slug not in known:
        raise unknown_name("system", slug, known, "`regard systems`")
    return known[slug]


def _system(row: dict[str, str]) -> System:
    exempt = dict(part.strip().split(": ", 1) for part in row["exempt"].split(";") if part.strip())
    words = {name: row[name] for name in ("slug", "name", "title", "arxiv", "kind", "area", "entry", "verified")}
    return System(id=int(row["id"]), year=int(row["year"]), sizes=tuple(row["sizes"].split()), exempt=exempt, **words)


def mixer_rows(names: Sequence[str] | None = None, dim: int = WIDTH, heads: int = HEADS) -> list[dict[str, Any]]:
    """What there is to say of mixers in a line each: parameters, what it is, its cost and its paper."""
    return [
        {
            "name": card.name,
            "params": count_parameters(create_mixer(card.name, dim=dim, heads=heads)),
            "what": card.what,
            "cost": card.cost,
            "arxiv": ", ".join(card.papers),
        }
        for card in map(mixer_card, list_mixers() if names is None else names)
    ]


def model_rows() -> list[dict[str, Any]]:
    """Likewise of backbones: parameters, published multiply-adds, image size and paper."""
    cards = [model_card(name) for name in list_models()]
    return [
        {"name": card.name, "params": card.params, "gmacs": card.gmacs, "size": card.input_size, "arxiv": card.arxiv}
        for card in cards
    ]


def listing() -> str:
    """The text of ``listing.json``, see :mod:`regard.listing`: a line for each mixer and each backbone."""

    def lines(kind: Sequence[dict[str, Any]]) -> str:
        return ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in kind)

    return f'{{"mixers": [\n{lines(mixer_rows())}\n], "models": [\n{lines(model_rows())}\n]}}\n'


if __name__ == "__main__":  # `make listing`
    sys.stdout.write(listing())
