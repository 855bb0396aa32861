"""The documentation does what it says: its code runs, and the catalog's lines create what they name."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path

import pytest
import torch

import regard
from regard.catalog import System, read_account, system, systems

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs" / "design.md", *sorted((ROOT / "docs" / "guide").glob("*.md"))]
FENCED = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs_from_top_to_bottom(page):
    torch.manual_seed(0)
    names: dict = {}
    for block in FENCED.finditer(page.read_text(encoding="utf-8")):
        line = page.read_text(encoding="utf-8")[: block.start(1)].count("\n")
        exec(compile("\n" * line + block.group(1), str(page), "exec"), names)


@pytest.mark.parametrize("found", [each for each in systems() if each.kind != "backbone"], ids=lambda found: found.slug)
def test_the_lines_of_a_system_run(found: System):
    model = regard.create_model("deit_tiny_patch16_224", depth=2, num_classes=5).eval()
    q, k, v = torch.randn(3, 1, 14, 14, 2, 8)
    given = {"model": model, "images": torch.randn(1, 3, 48, 48), "q": q, "k": k, "v": v}
    names = dict(given)
    exec(found.lines, names)
    made = {name: names[name] for name in ("model", "found", "y") if names.get(name) is not given.get(name)}
    assert made, found.lines
    leaves = torch.utils._pytree.tree_leaves(list(made.values()))
    assert all(leaf.isfinite().all() for leaf in leaves if isinstance(leaf, torch.Tensor))
    assert "y" not in made or made["y"].shape == q.shape


@pytest.mark.parametrize("found", [each for each in systems() if each.kind == "backbone"], ids=lambda found: found.slug)
def test_the_lines_of_a_backbone_create_what_its_card_says(found: System):
    names: dict = {}
    with torch.device("meta"):
        exec(found.lines, names)
    assert sum(p.numel() for p in names["model"].parameters()) == found.cards[0].params


@pytest.mark.parametrize("found", systems(), ids=lambda found: found.slug)
def test_every_system_says_what_it_computes_and_whose_it_is(found: System):
    account = found.account
    assert account.text
    assert re.search(r"et al\.|&|[A-Z][a-z]+, ", account.source), account
    assert "Cost:" not in account.text + account.source
    assert "Source:" not in account.text + account.cost
    assert "Args:" not in account.text


def test_a_docstring_is_taken_apart():
    account = read_account("""Roots: r of x.

    r = sqrt(x)
They are positive.
Cost: linear in x,
and memory. Source: Heron, Metrica,
book 1.

Nothing was released.

Args:
    x: numbers.

Source of nothing.""")
    assert account.text == "Roots: r of x.\n\n    r = sqrt(x)\nThey are positive.\n\nNothing was released."
    assert (account.cost, account.source) == ("linear in x, and memory", "Heron, Metrica, book 1")


def test_an_unknown_system_is_told_its_neighbours():
    with pytest.raises(ValueError, match=r"'swim'.*swin"):
        system("swim")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_of_a_page_lead_to_files_of_the_repository(page):
    links = re.findall(r"\]\(([^)\s#]+)", page.read_text(encoding="utf-8"))
    local = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_the_gallery_shows_the_results_that_lie_beside_it():
    spec = importlib.util.spec_from_file_location("make_gallery", ROOT / "docs" / "make_gallery.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    shown = script.comparison(ROOT / "docs" / "gallery")
    assert shown
    text = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    assert all(part in text for part in shown), "run docs/make_gallery.py"


def test_pictures_of_the_gallery_are_there_and_small():
    text = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"\]\((gallery/(?:mixer|pattern)-[^)]+)\)", text))
    assert len(shown) > 20
    assert all((ROOT / "docs" / picture).stat().st_size < 60_000 for picture in shown)
    assert set(regard.list_mixers()) <= set(re.findall(r"\[`(\w+)`\]", text))


def test_the_site_shows_code_in_tables_without_the_backslashes_of_github(monkeypatch):
    pytest.importorskip("mkdocs")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    plain = importlib.import_module("hooks").plain_pipes
    assert plain("| `a \\| b`, `c` \\| d | `.*\\.(q\\|kv)` |") == "| `a | b`, `c` \\| d | `.*\\.(q|kv)` |"
    assert plain("a regular expression: `a\\|b`") == "a regular expression: `a\\|b`"
