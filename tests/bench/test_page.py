"""The page of benchmarks says what the files say, and the one in the repository is that of its files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from regard.bench.page import render, write_page

ROOT = Path(__file__).parents[2]


def _row(variant: str, ms: float, ratio: float, **further) -> dict:
    return {
        "variant": variant,
        "ms": ms,
        "q1": ms * 0.9,
        "q3": ms * 1.1,
        "repeats": 9,
        "ratio": ratio,
        "error": 2e-7,
        **further,
    }


def _file(folder: Path, name: str, cases: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    machine = {"processor": "Abacus 3000", "cores": 2, "vector": "AVX9", "python": "3.12.1", "torch": "2.99"}
    (folder / f"{name}.json").write_text(json.dumps({"machine": machine, "cases": cases}))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results" / "abacus"
    sizes = {"case": "window, forward", "grid": [56, 56], "dtype": "float32"}
    dated = {"versions": {"torch": "2.99", "natten": "0.1"}, "measured": "2026-01-02"}
    ours, theirs = {"peer": False}, {"peer": True}
    _file(folder, "operators", [
        {**sizes, "threads": 2, "rows": [_row("regard", 5.0, 1.0, **ours), _row("matmul", 4.0, 0.8, **theirs)], **dated},
        {**sizes, "threads": 1, "rows": [_row("regard", 9.0, 1.0, **ours), _row("matmul", 18.0, 2.0, **theirs),
                                         {"variant": "flex", "failed": "NoCompiler: a | b"}], **dated},
        {"case": "memory", "threads": 1, "rows": [{"variant": "regard", "extra_mb": 18.2}], **dated},
    ])  # fmt: skip
    _file(folder, "growth", [
        {"case": f"growth, {name}", "threads": 1, "budget": "9 s", "time_exponent": 1.25, "memory_exponent": None,
         "rows": [{"side": side, "tokens": side**2, "ms": side * 1.5, "q1": 1.0, "q3": 2.0, "peak_bytes": side * 10**6}
                  for side in (14, 56)],
         "left_out": [{"side": 112, "why": "would take up to 99 s"}], **dated}
        for name in ("window 7", "mixer window")
    ])  # fmt: skip
    _file(folder, "models", [
        {"case": "backbones, inference", "backbones": ["A", "B"], "batch": 2, "image": [224, 224], "threads": 1, **dated,
         "rows": [_row("A, regard", 80.0, 1.0, images=2, gflops=4.0, **ours),
                  _row("B, regard", 60.0, 1.0, images=2, gflops=2.0, **ours)]},
    ])  # fmt: skip
    return tmp_path / "results"


def test_threads_stand_side_by_side_and_failures_are_said(results: Path) -> None:
    page = render(results, results.parent / "docs")
    assert "| regard | 9 (8.1–9.9) | 1.00 | 5 (4.5–5.5) | 1.00 | 2e-07 | 1.80 |" in page
    assert "| matmul | 18 (16.2–19.8) | 2.00 | 4 (3.6–4.4) | 0.80 | 2e-07 | 4.50 |" in page
    assert r"| flex | NoCompiler: a / b | – | – | – | – | – |" in page
    assert "|  | ms, 1 thread | x | ms, 2 threads | x | error | 1 over 2 threads |" in page
    assert "**Window, forward** (56 x 56, float32)" in page
    assert "| regard | 18.2 |" in page


def test_every_loss_is_listed_and_no_gain(results: Path) -> None:
    page = render(results, results.parent)
    losses = page[page.index("### Where regard loses") : page.index("### Operators")]
    assert "| Window, forward | 56 x 56, float32, 2 threads | matmul | 0.80 |" in losses
    assert losses.count("\n|") == 3  # head, rule, one loss


def test_growth_has_exponents_costs_and_what_was_left_out(results: Path) -> None:
    page = render(results, results.parent)
    assert "| window 7 | 1.25 | – | 21 | 84 | 56.0 | from 112²: would take up to 99 s |" in page
    assert "Budget: 9 s" in page


def test_backbones_are_per_image_and_per_flop(results: Path) -> None:
    page = render(results, results.parent)
    assert "| A, regard | 40 (36–44) | 1.00 | 4.00 | 10 | 1.00 | 2e-07 |" in page
    assert "| B, regard | 30 (27–33) | 1.00 | 2.00 | 15 | 1.50 | 2e-07 |" in page


def test_page_names_machine_versions_days_and_files(results: Path) -> None:
    page = render(results, results.parent / "docs")
    assert "## Abacus 3000\n\n2 cores, vectors AVX9." in page
    versions = "python 3.12.1, torch 2.99, natten 0.1"
    assert f"Measured 2026-01-02 with {versions} ([operators.json](../results/abacus/operators.json))." in page


def test_plots_lie_beside_their_numbers_and_do_not_change(results: Path) -> None:
    pytest.importorskip("matplotlib")
    page = results.parent / "docs" / "benchmarks.md"
    written = write_page(results, page)
    text = page.read_text()
    pictures = [path for path in written if path.suffix == ".svg"]
    assert len(pictures) == 4
    for path in pictures:
        assert f"(../results/abacus/{path.name})" in text
        assert path.parent == results / "abacus"
    before = {path: path.read_bytes() for path in written}
    write_page(results, page)
    assert {path: path.read_bytes() for path in written} == before
    time_plot = (results / "abacus" / "growth-mixers-time.svg").read_text()
    assert "window  (1.25)" in time_plot


def test_no_results_are_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`regard bench ops` measures"):
        render(tmp_path, tmp_path)


def test_page_in_the_repository_is_that_of_its_results() -> None:
    page = ROOT / "docs" / "benchmarks.md"
    assert page.read_text() == render(ROOT / "benchmarks" / "results", page.parent), "`regard bench page` writes it anew"
    for target in re.findall(r"\]\((\.\./[^)]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
