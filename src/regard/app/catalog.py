"""The catalog of the playground: search the systems, read what each computes and costs, copy what creates it."""

from __future__ import annotations

import csv
import importlib
import importlib.resources
import re
from dataclasses import dataclass
from functools import cache
from types import ModuleType

from ..models import model_card


@dataclass(frozen=True)
class System:
    """A published system.

    Attributes:
        slug, name, title, arxiv, year, area: of the catalog.
        formula: the header of its module, without the lines of cost and source.
        cost, source: those lines.
        code: what creates it.
        file: the module.
    """

    slug: str
    name: str
    title: str
    arxiv: str
    year: str
    area: str
    formula: str
    cost: str
    source: str
    code: str
    file: str

    @property
    def row(self) -> list[str]:
        return [self.name, self.title, self.year, self.area]


def search(words: str) -> list[System]:
    """The systems that contain all words, wherever; all without any."""
    wanted = words.lower().split()
    return [each for each in systems() if all(word in _text(each) for word in wanted)]


def _text(system: System) -> str:
    fields = (system.slug, system.name, system.title, system.arxiv, system.year, system.area, system.formula)
    return " ".join(fields).lower()


@cache
def systems() -> tuple[System, ...]:
    """All systems, newest first."""
    text = (importlib.resources.files("regard") / "systems.csv").read_text(encoding="utf-8")
    rows = sorted(csv.DictReader(text.splitlines()), key=lambda row: row["year"], reverse=True)
    return tuple(_system(row) for row in rows)


def _system(row: dict[str, str]) -> System:
    sizes = row["sizes"].split(" ")
    module = _module(row["entry"], sizes[0])
    header, cost, source = parts(module.__doc__ or "")
    return System(
        slug=row["slug"], name=row["name"], title=row["title"], arxiv=row["arxiv"], year=row["year"], area=row["area"],
        formula=header, cost=cost, source=source, code=_code(row["entry"], row["sizes"]), file=module.__name__,
    )  # fmt: skip


def _module(entry: str, size: str) -> ModuleType:
    """The module that a system is written in."""
    if entry == "regard.create_model":
        table = model_card(size).table
        return importlib.import_module(getattr(table, "func", table).__module__)
    home, _, name = entry.rpartition(".")
    return importlib.import_module(getattr(importlib.import_module(home), name).__module__)


def parts(header: str) -> tuple[str, str, str]:
    """The header of a module: what it computes, its cost and its source."""
    found = re.search(r"Cost: (.*?)(?=\s*Source:|\Z)", header, re.S)
    source = re.search(r"Source: (.*?)(?=\n\s*\n|\Z)", header, re.S)
    text = re.sub(r"(Cost|Source): .*?(?=\s*Source:|\n\s*\n|\Z)", "", header, flags=re.S)
    flat = [" ".join(each.group(1).split()) if each else "" for each in (found, source)]
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip(), flat[0], flat[1]


def _code(entry: str, sizes: str) -> str:
    home, _, name = entry.rpartition(".")
    if entry == "regard.create_model":
        return f'import regard\nmodel = regard.create_model("{sizes.split(" ")[0]}")'
    if entry == "regard.attend":
        return f"from regard import attend, patterns as P\ny = attend(q, k, v, P.{sizes})"
    return f"from {home} import {name}\nhelp({name})"
