"""The pages that the site makes of the project itself: home, contributing, a page per system, the reference.

mkdocs calls the ``on_`` functions while it builds.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from docstrings import ARXIV, defined_at, to_markdown
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import regard
from regard.catalog import System, systems

ROOT = Path(__file__).parent.parent
COPIED = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md"}
"""Pages that are files of the repository."""
ROW, CODE = re.compile(r"^\|.*\|$", re.MULTILINE), re.compile(r"`[^`]+`")
LINK = re.compile(r"(!?)\[([^\]\n]*)\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made, and list them in the navigation."""
    pages = {name: (ROOT / source).read_text(encoding="utf-8") for name, source in COPIED.items()}
    pages["index.md"] = f"---\nhide: [navigation]\n---\n\n{pages['index.md']}"
    pages |= dict(system_pages()) | dict(reference_pages())
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    added = {"Systems": systems_navigation(), "Reference": reference_navigation(ROOT / "src" / "regard")}
    for section in config.nav or []:
        for title in section.keys() & added.keys():
            section[title] += added[title]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to files of the repository lead to their pages; those to files that have none become plain text."""
    here = page.file.src_uri
    source = COPIED.get(here, f"docs/{here}")

    def redirect(found: re.Match[str]) -> str:
        picture, label, path, anchor = found.groups(default="")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        target = page_of(path)
        if files.get_file_from_path(target) is None:
            return label if (ROOT / path).exists() else found.group()
        return f"{picture}[{label}]({posixpath.relpath(target, posixpath.dirname(here) or '.')}{anchor})"

    return plain_pipes(LINK.sub(redirect, markdown))


def plain_pipes(markdown: str) -> str:
    """Code in tables without the backslashes that GitHub wants before ``|``: the site would show them."""
    return ROW.sub(lambda row: CODE.sub(lambda code: code.group().replace("\\|", "|"), row.group()), markdown)


def page_of(path: str) -> str:
    """The page, or the asset, that a file of the repository is on the site."""
    named = {source: page for page, source in COPIED.items()}
    if path.startswith("src/regard/"):
        return f"reference/{path.removeprefix('src/regard/').removesuffix('.py')}.md"
    return named.get(path, path.removeprefix("docs/"))


# ----- systems


def by_area() -> list[tuple[str, list[System]]]:
    ordered = sorted(systems(), key=lambda system: (system.area, system.name.casefold()))
    return [(area, list(found)) for area, found in groupby(ordered, key=lambda system: system.area)]


def area_title(area: str) -> str:
    return area.replace("-", " ").capitalize()


def systems_navigation() -> list[dict[str, list[dict[str, str]]]]:
    return [{area_title(area): [{s.name: f"systems/{s.slug}.md"} for s in found]} for area, found in by_area()]


def system_pages() -> Iterator[tuple[str, str]]:
    yield "systems/index.md", catalog_page()
    for system in systems():
        yield f"systems/{system.slug}.md", system_page(system)


def catalog_page() -> str:
    """All systems by area, with a field that filters them."""
    parts = [
        "# Systems",
        f"{len(systems())} published systems. Each has a page with its formula, cost, source, sizes and the names of its "
        "tests; `regard systems` prints the same list.",
        '<input class="filter" type="search" placeholder="Filter: name, title, year, arXiv id, mechanism" aria-label="Filter">',
    ]
    for area, found in by_area():
        rows = ["| system | what it is | paper |", "|---|---|---|"]
        for system in found:
            summary = _cell(to_markdown(system.account.text).split("\n\n")[0])
            rows.append(
                f"| [{system.name}]({system.slug}.md) | {summary} | {_paper(system)}<br>{system.title}, {system.year} |"
            )
        parts += [f"## {area_title(area)}", "\n".join(rows)]
    return "\n\n".join(parts)


def system_page(system: System) -> str:
    account = system.account
    parts = [
        f"# {system.name}",
        f"*{system.title}*, {system.year}, {_paper(system)}. Area: {area_title(system.area).lower()}; kind: {system.kind}.",
        f"```python\n{system.lines}\n```",
        "## What it computes",
        to_markdown(account.text),
    ]
    if account.cost:
        parts.append(f"**Cost**: {account.cost}.")
    parts.append(f"**Source**: {to_markdown(account.source)}.")
    if system.cards:
        parts += ["## Sizes", _sizes(system)]
    parts += ["## Verified", _verified(system)]
    if system.exempt:
        parts += ["## What it lacks", "\n".join(f"- {name}: {reason}" for name, reason in system.exempt.items())]
    test = ROOT / "tests" / "systems" / f"test_{system.slug}.py"
    parts += ["## Tests", f"`tests/systems/{test.name}` and the shared contract, `tests/systems/test_contract.py`. The former:"]
    parts.append("\n".join(f"- {name}" for name in test_names(test)))
    return "\n\n".join(parts)


def _verified(system: System) -> str:
    if system.verified == "formula":
        return "Its tests restate the formula; there is no code to compare with that runs here."
    said = "In float64, under the same made-up weights; errors relative to the largest entry.\n\n"
    return said + "\n".join(f"- {each.strip()}" for each in system.verified.split("|"))


def test_names(path: Path) -> list[str]:
    """What the tests of a file prove: their names as words."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return [name.removeprefix("test_").replace("_", " ") for name in names]


def _sizes(system: System) -> str:
    rows = ["| name | parameters | GMACs | pixels |", "|---|--:|--:|--:|"]
    for card in system.cards:
        rows.append(f"| `{card.name}` | {card.params:,} | {card.gmacs:g} | {card.input_size}² |")
    return "\n".join(rows)


def _paper(system: System) -> str:
    return ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", f"arXiv:{system.arxiv}")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


# ----- reference


def reference_navigation(package: Path) -> list[dict[str, object]]:
    """The modules of a package, packages last."""
    entries: list[dict[str, object]] = []
    for module in modules(package):
        page = reference_page_of(module)
        entries.append({module.stem: [page, *reference_navigation(module)] if module.is_dir() else page})
    return entries


def modules(package: Path) -> list[Path]:
    """Public modules and packages inside a package."""
    found = [path for path in package.glob("*.py") if not path.stem.startswith("_")]
    packages = [path.parent for path in package.glob("*/__init__.py")]
    return sorted(found) + sorted(packages)


def reference_page_of(module: Path) -> str:
    path = module.relative_to(ROOT / "src" / "regard").with_suffix("").as_posix()
    return f"reference/{path}/index.md" if module.is_dir() else f"reference/{path}.md"


def reference_pages() -> Iterator[tuple[str, str]]:
    top = ROOT / "src" / "regard"
    names = ", ".join(f"[`{name}`][{defined_at(f'regard.{name}')}]" for name in regard.__all__)
    yield "reference/index.md", f"# Reference\n\nThe front door, `regard`: {names}.\n\n{_listing(top, 'reference')}"
    yield from _pages_below(top, top)


def _pages_below(package: Path, top: Path) -> Iterator[tuple[str, str]]:
    for module in modules(package):
        name = ".".join(module.relative_to(top.parent).with_suffix("").parts)
        page, text = reference_page_of(module), f"::: {name}"
        if module.is_dir():
            members = defined_in(module / "__init__.py")
            text += f"\n    options:\n      members: {members}\n\n{_listing(module, posixpath.dirname(page))}"
            yield from _pages_below(module, top)
        yield page, text


def defined_in(file: Path) -> list[str] | bool:
    """Public functions and classes that a file defines itself; False where there are none."""
    nodes = (
        node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef | ast.ClassDef)
    )
    return [node.name for node in nodes if not node.name.startswith("_")] or False


def _listing(package: Path, folder: str) -> str:
    """The modules of a package with the first lines of what they say, for a page in a folder."""
    rows = ["| module | |", "|---|---|"]
    for module in modules(package):
        file = module / "__init__.py" if module.is_dir() else module
        said = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        link = posixpath.relpath(reference_page_of(module), folder)
        rows.append(f"| [`{module.stem}`]({link}) | {_cell(to_markdown(said).split(chr(10) * 2)[0])} |")
    return "\n".join(rows)
