"""The benchmark page, written from the json files of all machines and from nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import plots
from .harness import FOUND

Case = Mapping[str, Any]

HEADER = """# Benchmarks

Every number here was measured by `regard bench` (on GPUs by `benchmarks/gpu/run.py`) and is kept, with more digits, under
[benchmarks/results](../benchmarks/results); `regard bench page` writes this page from those files.

How it is measured: all variants of a case take turns in one process, so that a machine that slows down slows all of them down.
Times are medians, with quartiles in brackets. **x** is the time of a variant over that of regard: above 1 regard is faster,
below 1 it loses. Errors are relative, in the Frobenius norm, against the definition in float64, and with gradients the largest
of the output's and the gradients'; a dash stands where something else is computed. First runs, in which plans are made and
kernels compiled, are not part of the times; the files have them (`first_ms`). Runs shorter than 0.1 s are preceded by one that
is not timed, so that caches and threads are as in a loop; on several threads a rest of 20 ms ends what those before wait for.
"""

NOTES = {
    "operators": """
Softmax attention of regard runs in C compiled for the processor ([ops/backends/native](../src/regard/ops/backends/native));
whole tiles are shared out over the threads, and the last column shows what a second one brings. Matrix products of torch (MKL)
keep to 256-bit vectors on processors that are not Intel's: where the processor has 512, a good part of the lead lies there.
""",
    "growth": """
Time and peak memory (all tensors beyond the inputs, output included) from 14 x 14 to 224 x 224 tokens, batch 1, 4 heads of 32,
one forward pass. The exponent is the slope of log cost over log tokens by least squares over the larger half of the sizes: 1 is
linear in tokens, 2 quadratic. Operators attend to given queries, keys and values; mixers include their projections. Tiles work
in memory that threads keep between calls; it is counted at every size, a few megabytes that hide the growth of small maps.
""",
    "models": """
**x** is over regard's time of the same backbone. GFLOPs are those of a forward pass for one image, by the pairs that the
patterns show, a multiply-add as two; time per GFLOP is that of the whole pass or step over the GFLOPs of its forward pass.
timm's backbones carry the same weights; dense attention has no relative bias. On processors with 512-bit vectors that are not
Intel's, regard's linear layers run through oneDNN, torch's own through MKL at about half the rate
([ops/affine.py](../src/regard/ops/affine.py)): there a good part of the lead over timm lies in the layers around attention.
""",
}
ORDER = ("operators", "growth", "models", "correctness")
TITLES = {
    "operators": "Operators",
    "growth": "How cost grows",
    "models": "Backbones",
    "correctness": "Right on this device",
}
SHOWN_SIDES = (14, 56, 112, 224)


def write_page(results: Path, page: Path) -> list[Path]:
    """Write the page and its plots.

    Args:
        results: the folder with one folder per machine; the plots go beside their numbers.
        page: of the page, a markdown file.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: there are no results.
    """
    written = []
    for folder in _machines(results):
        for name, text in _plots(folder).items():
            (folder / name).write_text(text)
            written.append(folder / name)
    text = render(results, page.parent)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text)
    return [*written, page]


def render(results: Path, place: Path) -> str:
    """The page as markdown; ``place`` is the folder it will lie in, for its links."""
    machines = _machines(results)
    if not machines:
        raise FileNotFoundError(f"no results under {results}; `regard bench ops` measures")
    link = Path(os.path.relpath(results, place)).as_posix()
    return "\n".join([HEADER, *(_machine(folder, f"{link}/{folder.name}") for folder in machines)]).rstrip("\n") + "\n"


def _machines(results: Path) -> list[Path]:
    return sorted({file.parent for file in results.glob("*/*.json")})


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    """The files of a machine, in the order of the page."""
    files = {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}
    rank = {name: place for place, name in enumerate(ORDER)}
    return dict(sorted(files.items(), key=lambda item: (rank.get(item[0], len(ORDER)), _natural(item[0]))))


def _natural(name: str) -> tuple[str, int]:
    stem, _, number = name.rpartition("-")
    return (stem, int(number)) if number.isdecimal() else (name, 0)


def _machine(folder: Path, link: str) -> str:
    files = _read(folder)
    about: dict[str, Any] = {}
    for content in files.values():
        about |= content["machine"]
    cores = f"{about['cores']} cores, vectors {about['vector']}"
    name = about.get("device") or f"{about['processor']}"
    parts = [f"## {name}", "", f"{about['processor']}, {cores}." if about.get("device") else f"{cores}.", ""]
    parts += _losses(files)
    for stem, content in files.items():
        cases = content["cases"]
        body = {"growth": _growth, "models": _models, "correctness": _correctness}.get(stem, _operators)(cases)
        parts += [f"### {TITLES.get(stem) or _titled(stem)}", ""]
        on_several = any(case.get("threads", 1) > 1 for case in cases)
        if (note := NOTES.get(stem)) and (stem != "operators" or on_several):  # that note is about the second thread
            parts += [note.strip(), ""]
        if stem == "growth":
            parts += [f"![{alt}]({link}/{file})\n" for file, alt in _plot_names(cases).items()]
        parts += [*body, f"Measured {_when(content)} ([{stem}.json]({link}/{stem}.json)).", ""]
    return "\n".join(parts)


def _titled(stem: str) -> str:
    return stem.replace("-", " ").replace("_", " ").capitalize()


def _when(content: Mapping[str, Any]) -> str:
    """Days and versions of the measurements of a file."""
    days = sorted({case["measured"] for case in content["cases"] if "measured" in case})
    versions: dict[str, set[str]] = {}
    keys = ("python", "torch", "regard", "timm", "natten", "triton", "flash_attn", "cudnn", "cuda")
    for each in (content["machine"], *(case.get("versions", {}) for case in content["cases"])):
        for name in keys:
            if each.get(name):
                versions.setdefault(name, set()).add(str(each[name]))
    span = f"{days[0]} to {days[-1]} " if len(days) > 1 else f"{days[0]} " if days else ""
    return span + "with " + ", ".join(f"{name} {' and '.join(sorted(found))}" for name, found in versions.items())


# --------------------------------------------------------------------------------------------------------------------
# where we lose


def _losses(files: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Every peer that is faster than regard, in any file."""
    rows = []
    for content in files.values():
        for case in content["cases"]:
            for row in case.get("rows", ()):
                if row.get("ratio") and row["ratio"] < 1 and _is_peer(row):
                    rows.append([_name(case), _about(case, threads=True), row["variant"], f"{row['ratio']:.2f}"])
    if not rows:
        return ["### Where regard loses", "", "Nowhere in what was measured here.", ""]
    return ["### Where regard loses", "", *_table(["case", "sizes", "faster", "x"], sorted(rows, key=lambda row: row[3]))]


def _is_peer(row: Mapping[str, Any]) -> bool:
    """Whether a row is of something else than regard; files of GPUs name its backends."""
    named_ours = row["variant"].startswith("regard") or row["variant"] in ("tiled", "triton")
    return row.get("peer", not named_ours)


# --------------------------------------------------------------------------------------------------------------------
# operators


def _operators(cases: Sequence[Case]) -> Iterator[str]:
    for _, group in _grouped(cases):
        first = group[0]
        yield f"**{_name(first)}** ({_about(first)})"
        yield ""
        if len(group) == 1 and not any("ms" in row for row in first["rows"]):
            yield from _without_times(first)
            continue
        yield from _timed(group)


def _name(case: Case) -> str:
    return case["case"][:1].upper() + case["case"][1:]


def _grouped(cases: Sequence[Case]) -> Iterator[tuple[str, list[Case]]]:
    """Cases that differ in the number of threads only, together."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(f"{case['case']} {_about(case)}", []).append(case)
    for name, group in groups.items():
        yield name, sorted(group, key=lambda case: case.get("threads", 0))


def _about(case: Case, threads: bool = False) -> str:
    """The sizes of a case."""
    parts = []
    for key, value in case.items():
        if key in ("case", "threads", "backbones", "budget", "waste", "failed", *FOUND) or value is None:
            continue
        if key == "pattern":
            parts.append(f"`{value}`")
        elif key in ("grid", "image"):
            parts.append(" x ".join(map(str, value)))
        elif key == "dtype":
            parts.append(value.removeprefix("torch."))
        else:
            parts.append(f"{key.replace('_', ' ')} {value}")
    if threads and "threads" in case:
        parts.append(f"{case['threads']} thread{'s' * (case['threads'] > 1)}")
    return ", ".join(parts)


def _without_times(case: Case) -> Iterator[str]:
    if "failed" in case or "left_out" in case:
        yield f"Not measured: {case.get('failed') or case['left_out']}."
        yield ""
        return
    rows = [[row["variant"], _megabytes(row.get("extra_mb")), row.get("failed", "")] for row in case["rows"]]
    shown = 3 if any(row[2] for row in rows) else 2
    yield from _table(["", "MB", ""][:shown], [row[:shown] for row in rows])


def _timed(group: Sequence[Case]) -> Iterator[str]:
    """Variants as rows; a pair of columns per number of threads, then errors."""
    rows = [{row["variant"]: row for row in case["rows"]} for case in group]
    names = list(dict.fromkeys(name for each in rows for name in each))
    every = [row for each in rows for row in each.values()]
    further = [(key, head) for key, head in _FURTHER.items() if any(row.get(key) is not None for row in every)]
    columns = [""]
    for case in group:
        threads = case.get("threads")
        columns += [f"ms, {threads} thread{'s' * (threads > 1)}" if threads else "ms", "x"]
    columns += ["error", *(head for _, head in further)]
    compare = len(group) == 2 and [case.get("threads") for case in group] == [1, 2]
    if compare:
        columns.append("1 over 2 threads")
    body = []
    for name in names:
        cells = [name]
        for each in rows:
            cells += _time_cells(each.get(name, {}))
        errors = [each[name].get("error") for each in rows if name in each]
        found = [error for error in errors if error is not None]
        cells.append(f"{max(found):.0e}" if found else "–")
        cells += [_number(rows[0].get(name, {}).get(key)) for key, _ in further]
        if compare:
            one, two = (each.get(name, {}).get("ms") for each in rows)
            cells.append(f"{one / two:.2f}" if one and two else "–")
        body.append(cells)
    yield from _table(columns, body)


_FURTHER = {"kernel_ms": "kernels, ms", "extra_mb": "MB", "computed_tflops": "TFLOP/s", "images_per_s": "images/s"}
"""Further columns, where a file has them."""


def _time_cells(row: Mapping[str, Any]) -> list[str]:
    if "ms" not in row:
        return [_reason(row["failed"]) if "failed" in row else "–", "–"]
    ratio = row.get("ratio")
    return [f"{_number(row['ms'])} ({_number(row['q1'])}–{_number(row['q3'])})", "–" if ratio is None else f"{ratio:.2f}"]


def _reason(text: str) -> str:
    """The beginning of a reason, without characters that would end a table cell."""
    clean = " ".join(text.replace("|", "/").split())
    return clean if len(clean) <= 60 else clean[:57] + "..."


# --------------------------------------------------------------------------------------------------------------------
# growth


def _growth(cases: Sequence[Case]) -> Iterator[str]:
    sides = [side for side in SHOWN_SIDES if any(row["side"] == side for case in cases for row in case["rows"])]
    columns = ["", "time", "memory", *(f"ms, {side}²" for side in sides), *(f"MB, {side}²" for side in sides[-1:]), "left out"]
    body = []
    for case in cases:
        rows = {row["side"]: row for row in case["rows"]}
        last = rows.get(sides[-1], {}) if sides else {}
        body.append([
            case["case"].partition(", ")[2],
            *("–" if case[key] is None else f"{case[key]:.2f}" for key in ("time_exponent", "memory_exponent")),
            *(_number(rows.get(side, {}).get("ms")) for side in sides),
            *([_megabytes(last["peak_bytes"] / 1e6 if last else None)] if sides else []),
            _left_out(case["left_out"]),
        ])  # fmt: skip
    yield from _table(columns, body)
    budgets = sorted({case["budget"] for case in cases if "budget" in case})
    yield f"Exponents of time and memory first. Budget: {'; '.join(budgets)}; what might exceed it was left out."
    yield ""


def _left_out(entries: Sequence[Mapping[str, Any]]) -> str:
    if not entries:
        return ""
    return f"from {entries[0]['side']}²: {_reason(entries[0]['why'])}"


def _plot_names(cases: Sequence[Case]) -> dict[str, str]:
    """The plots of growth and their description."""
    kinds = [("operators", False), ("mixers", True)]
    return {
        f"growth-{kind}-{quantity}.svg": f"{quantity.capitalize()} of {kind} over tokens"
        for kind, mixers in kinds
        if any(_is_mixer(case) == mixers for case in cases)
        for quantity in ("time", "memory")
    }


def _is_mixer(case: Case) -> bool:
    return case["case"].startswith("growth, mixer ")


def _plots(folder: Path) -> dict[str, str]:
    file = folder / "growth.json"
    if not file.is_file():
        return {}
    cases = json.loads(file.read_text())["cases"]
    drawn = {}
    for name in _plot_names(cases):
        _, kind, quantity = name.removesuffix(".svg").split("-")
        drawn[name] = plots.growth([case for case in cases if _is_mixer(case) == (kind == "mixers")], quantity)
    return drawn


# --------------------------------------------------------------------------------------------------------------------
# backbones, correctness


def _models(cases: Sequence[Case]) -> Iterator[str]:
    for _, group in _grouped(cases):
        for case in group:
            yield f"**{_name(case)}** ({_about(case, threads=True)})"
            yield ""
            first = case["rows"][0]
            columns = ["", "ms per image", "x", "GFLOPs", "ms per GFLOP", f"that over {first['variant']}'s", "error"]
            yield from _table(columns, [_model_cells(row, first) for row in case["rows"]])


def _model_cells(row: Mapping[str, Any], first: Mapping[str, Any]) -> list[str]:
    scaled = {key: row[key] / row["images"] for key in ("ms", "q1", "q3") if key in row}
    cost = _per_gflop(row)
    over = f"{cost / base:.2f}" if cost and (base := _per_gflop(first)) else "–"
    error = "–" if row.get("error") is None else f"{row['error']:.0e}"
    return [row["variant"], *_time_cells({**row, **scaled}), f"{row['gflops']:.2f}", _number(cost), over, error]


def _per_gflop(row: Mapping[str, Any]) -> float | None:
    return row["ms"] / row["images"] / row["gflops"] if "ms" in row else None


def _correctness(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    body = []
    for name in backends:
        own = [row for row in rows if row["backend"] == name]
        wrong = [row for row in own if row.get("right") is False or "failed" in row]
        right = sum(row.get("right", False) for row in own)
        body.append([name, str(right), str(sum("refused" in row for row in own)), str(len(wrong))])
    yield from _table(["backend", "right", "does not take it", "wrong or failed"], body)


# --------------------------------------------------------------------------------------------------------------------
# markdown


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [*lines, ""]


def _number(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return "–"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _megabytes(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
