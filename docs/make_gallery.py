"""Write docs/gallery.md and its pictures: what each pattern and each mixer sees of one photograph.

    python docs/make_gallery.py

Where docs/gallery holds the results of ``regard compare``, their table stands first. Needs the ``train`` extra.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from regard import Source, create_mixer, lens, list_mixers
from regard import patterns as P
from regard.compare import figures
from regard.compare.report import SMALL_COLUMNS
from regard.compare.study import Look
from regard.data import photograph
from regard.layers.mixers import mixer_class
from regard.ops import attend_weights
from regard.ops.patterns import Pattern
from regard.ops.tokens.route import affinity, summaries, top_k

DOCS = Path(__file__).parent
SIDE, PATCH, DIM, HEADS = 224, 8, 48, 4
GRID = SIDE // PATCH
QUERIES = ((9, 10), (20, 17))
"""Rows and columns of the tokens that look: an eye and the chin."""
ROWS = [row * GRID + column for row, column in QUERIES]
LIKENESS = 2.0
"""The logit of a patch with itself in the pictures of patterns."""


def face() -> Tensor:
    """A square of a photograph, ``(3, side, side)``, uint8."""
    square = photograph("chelsea")[None, :, :, 75:375].float()
    return F.interpolate(square, (SIDE, SIDE), mode="bicubic", antialias=True)[0].round().clamp(0, 255).to(torch.uint8)


def tokens(picture: Tensor) -> Tensor:
    """Patches by their first principal components, the strong ones damped: ``(1, grid, grid, dim)`` of mean square one."""
    patches = F.unfold(picture[None].float(), PATCH, stride=PATCH)[0].T
    found = torch.linalg.svd(patches - patches.mean(0), full_matrices=False)
    components = found.U[:, :DIM] * found.S[:DIM].sqrt()
    return (components / components.square().mean().sqrt()).view(1, GRID, GRID, DIM)


def patterns(x: Tensor) -> dict[str, tuple[str, Pattern]]:
    """The patterns by the names of their pictures, with how they are written; routed ones choose by likeness of ``x``."""
    written = {
        "dense": "Dense()",
        "causal": "Causal()",
        "window": "Window(7)",
        "window-shifted": "Window(7, shift=3)",
        "neighborhood": "Neighborhood(9)",
        "neighborhood-dilated": "Neighborhood(7, dilation=3)",
        "neighborhood-strided": "Neighborhood(9, stride=4)",
        "neighborhood-causal": "Neighborhood(9, causal=(True, False))",
        "halo": "Halo(7, 3)",
        "grid": "Grid(7)",
        "axis": "Axis(1)",
        "union": "Axis(0) | Axis(1)",
        "intersection": "Neighborhood(13) & Grid(14)",
    }
    unit = F.normalize(x, dim=-1)
    means, flat = summaries(unit, (7, 7)), unit.flatten(1, 2)
    nearest = (flat @ flat.mT).topk(40).indices
    labels = (flat[..., :3] > 0).long() @ torch.tensor([4, 2, 1])
    routed: dict[str, tuple[str, Pattern]] = {
        "blocks": ("`Blocks(table, (7, 7))`, the 4 blocks most alike", top_k(affinity(means, means), 4, (7, 7))),
        "tokens": ("`Tokens(table)`, the 40 tokens most alike", P.Tokens(nearest)),
        "clusters": ("`Clusters(labels)`, 8 clusters by three signs", P.Clusters(labels)),
    }
    return {name: (f"`{text}`", P.parse(text)) for name, text in written.items()} | routed


def pattern_maps(x: Tensor, pattern: Pattern) -> Tensor:
    """Weights by likeness of tokens, ``(queries, grid, grid)``."""
    unit = F.normalize(x, dim=-1)[..., None, :]
    return attend_weights(unit, [Source(unit, unit, pattern)], rows=ROWS, scale=LIKENESS, reduce="heads")[0][0]


def mixer_maps(x: Tensor, name: str) -> Tensor | None:
    """All that a mixer with random weights attends to, ``(queries, grid, grid)``; None where it does not weigh places."""
    torch.manual_seed(0)
    mixer = create_mixer(name, dim=DIM, heads=HEADS).eval()
    with torch.no_grad(), lens.capture(mixer) as maps:
        mixer(x)
    drawn = [_on_tokens(found) for found in maps if found.kind not in ("channel", "mixture")]  # those weigh no places
    return torch.stack(drawn).sum(0) if drawn else None


def _on_tokens(found: lens.Map) -> Tensor:
    if found.k_grids == ((GRID * GRID,),):  # the tokens as a sequence
        return found.weights[0][0].mean(0)[ROWS].unflatten(-1, (GRID, GRID))
    pixels = lens.image_map(found, image_size=(SIDE, SIDE)).map[0, ROWS]
    return F.avg_pool2d(pixels[None], PATCH, divisor_override=1)[0]


def draw(file: Path, picture: Tensor, maps: Tensor) -> None:
    """Draw the square roots of the sizes of weights, so that small ones are seen too."""
    places = [((row + 0.5) / GRID, (column + 0.5) / GRID) for row, column in QUERIES]
    label = file.stem.split("-", 1)[1].replace("-", "\n").replace("_", "\n")
    drawn = figures.attention(picture, [Look(label, ["weights"], [list(maps.abs().sqrt())])], places)
    with Image.open(io.BytesIO(drawn)) as image:
        image.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(file, optimize=True)


def cards(entries: list[tuple[str | None, str]]) -> str:
    """Pictures side by side, each with its words."""
    lines = ['<div class="cards" markdown>']
    for picture, words in entries:
        shown = f"![](gallery/{picture})\n\n" if picture else ""
        lines += ['<div class="card" markdown>', f"{shown}{words}", "</div>"]
    return "\n\n".join([*lines, "</div>"])


def comparison(folder: Path) -> list[str]:
    """The table of a comparison of trained mixers, where there is one."""
    if not (folder / "results.json").is_file():
        return []
    found: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    headings = ["mixer", "accuracy", *(column.heading for column in SMALL_COLUMNS)]
    rows = [f"| {' | '.join(headings)} |", f"|---|{'--:|' * (len(headings) - 1)}"]
    for mixer in sorted(found["mixers"], key=lambda mixer: -mixer["accuracy"]):
        cells = [mixer["label"], f"{mixer['accuracy']:.1%}", *(column.show(mixer[column.key]) for column in SMALL_COLUMNS)]
        rows.append(f"| {' | '.join(cells)} |")
    epochs, data = len(found["mixers"][0]["history"]), found["data"]
    parts = [
        "## Trained",
        f"`{found['model']}` with each mixer. {data['description']} {epochs} epochs, seed {found['recipe']['seed']}, "
        f"{found['environment']['threads']} thread(s), regard {found['environment']['regard']}, "
        f"torch {found['environment']['torch']}; one run each.",
        "\n".join(rows),
    ]
    for name, words in (("pareto", "accuracy against latency"), ("attention-maps", "attention of each mixer, by stage")):
        pictures = sorted(folder.glob(f"{name}.*"))
        parts += [f"![{words}](gallery/{picture.name})" for picture in pictures]
    if (folder / "index.html").is_file():
        parts.append("[The whole report](gallery/index.html).")
    return parts


def main() -> None:
    folder = DOCS / "gallery"
    folder.mkdir(exist_ok=True)
    picture = face()
    x = tokens(picture)
    drawn: list[tuple[str | None, str]] = []
    for name, (text, pattern) in patterns(x).items():
        draw(folder / f"pattern-{name}.png", picture, pattern_maps(x, pattern))
        drawn.append((f"pattern-{name}.png", text))
    mixers: list[tuple[str | None, str]] = []
    for name in list_mixers():
        maps = mixer_maps(x, name)
        where = mixer_class(name).__module__.removeprefix("regard.").replace(".", "/")
        words = f"[`{name}`](../src/regard/{where}.py)"
        if maps is None:
            mixers.append((None, f"{words}: no map, since it weighs no places"))
            continue
        draw(folder / f"mixer-{name}.png", picture, maps)
        mixers.append((f"mixer-{name}.png", words))
    page = [
        "# Gallery",
        "Written by `python docs/make_gallery.py`. The circle is the token that looks. Colour is the square root of a "
        "weight's size, over the largest of the map; what has no colour is not seen.",
        *comparison(folder),
        "## Patterns",
        f"A photograph as {GRID}×{GRID} patches. Queries and keys are the patches themselves (principal components, "
        "normalised), so that a patch attends to what is like it among what its pattern shows.",
        cards(drawn),
        "## Mixers",
        "The same patches through each mixer with random weights: what it can see and how it spreads its attention before it "
        "has learned anything. Where a mixer attends several times, its maps are added.",
        cards(mixers),
    ]
    (DOCS / "gallery.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
