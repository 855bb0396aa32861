"""The commands of ``regard``: ``demo``, ``compare``, ``plan``, ``explain``, ``app``, ``bench`` and lists of what there is.

Torch is imported by the commands that compute: help and lists answer without it.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import __version__
from .listing import HEADS, WIDTH, equal_to, listed, print_table
from .listing import rows as all_rows

if TYPE_CHECKING:
    import torch

MOST = 2**31 - 1
"""The largest number of anything that is counted."""
SEEDS = 2**32 - 1

app = typer.Typer(
    help="Visual attention: every mechanism behind one front door.", add_completion=False, pretty_exceptions_enable=False
)

GOES_ON = ("demo", "compare")
"""Commands that keep what they have done."""


def _count(words: str | None = None, low: int = 1, high: int = MOST) -> Any:
    """An option that is a whole number; its help leaves out bounds that nobody meets."""

    def within(value: int | None) -> int | None:
        if value is not None and not low <= value <= high:
            raise typer.BadParameter(f"it must be from {low} to {high}; got {value}")
        return value

    return typer.Option(help=words, callback=within)


Out = Annotated[Path, typer.Option(help="Folder of the report.")]
Runs = Annotated[Path, typer.Option(help="Folder where runs are kept; the same settings go on where they stopped.")]
Seed = Annotated[int, _count("Of the weights, the order and the augmentation.", 0, SEEDS)]
Fresh = Annotated[bool, typer.Option("--fresh", help="Forget earlier runs with these settings.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; by default cuda where there is one.")]


def _show_version(asked: bool) -> None:
    if asked:
        print(f"regard {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Out = Path("regard-report"),
    epochs: Annotated[int | None, _count("Of each mixer; by default 16, or as many as fit.")] = None,
    minutes: Annotated[float, typer.Option(help="Training takes at most about this long, if no epochs are given.")] = 3.5,
    seed: Seed = 0,
    runs: Runs = Path("regard-runs"),
    fresh: Fresh = False,
    device: Device = None,
) -> None:
    """Train and compare four mixers on photographs that lie in installed packages; write a report."""
    _positive("minutes", minutes)
    _check_folders(out=out, runs=runs)
    from .compare.demo import demo as run_demo

    chosen = _device(device)
    report = run_demo(out, epochs=epochs, minutes=minutes, seed=seed, runs=runs, fresh=fresh, device=chosen,
                      progress=sys.stdout.isatty(), tell=_tell)  # fmt: skip
    _tell(f"report: {report.resolve()}")


@app.command()
def compare(
    data: Annotated[str, typer.Option(help="Image folder, parquet file or folder, name of a dataset, or 'embedded'.")],
    mixers: Annotated[str, typer.Option(help="Such as 'multi_head, window(window_size=7)'.")],
    model: Annotated[str, typer.Option(help="The backbone; see `regard models`.")] = "compact_nano",
    epochs: Annotated[int, _count("Of each mixer.")] = 10,
    batch_size: Annotated[int, _count("Samples a step.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="At the end of the warm-up.")] = 2e-3,
    limit: Annotated[int | None, _count("Images of each split that are used.")] = None,
    size: Annotated[
        int | None, typer.Option(help="Side of the images; by default that of the first, at most 64.", min=8, max=1024)
    ] = None,
    bad_images: Annotated[
        str, typer.Option(help="What to do about images that cannot be read: error lists them, skip leaves them out.")
    ] = "error",
    seed: Seed = 0,
    out: Out = Path("regard-report"),
    runs: Runs = Path("regard-runs"),
    fresh: Fresh = False,
    workers: Annotated[int, typer.Option(help="Processes that load images.", min=0, max=256)] = 0,
    device: Device = None,
) -> None:
    """Train and compare mixers on your data; write a report."""
    _positive("learning rate", learning_rate)
    _check_folders(out=out, runs=runs)
    from .checks import check_choice
    from .compare import compare_on

    check_choice("bad-images", bad_images, ("error", "skip"))
    chosen = _device(device)
    report = compare_on(
        data, mixers, model=model, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, size=size, limit=limit,
        bad=bad_images, seed=seed, out=out, runs=runs, fresh=fresh, device=chosen, workers=workers,
        progress=sys.stdout.isatty(), tell=_tell,
    )  # fmt: skip
    _tell(f"report: {report.resolve()}")


def _tell(line: str) -> None:
    print(line, flush=True)  # through a pipe too a line comes when it is true


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive number; got {value:g}")


def _check_folders(**folders: Path) -> None:
    """Before anything is computed: whether files can be written there."""
    for name, folder in folders.items():
        there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
        if not there.is_dir():
            raise ValueError(f"--{name} must be a folder; {there} is a file")
        if not os.access(there, os.W_OK | os.X_OK):
            raise ValueError(f"--{name} {folder} cannot be written: no permission to write in {there}")


def _device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return name


@app.command()
def systems(
    area: Annotated[str | None, typer.Option(help="Only those of this area.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print json instead of a table.")] = False,
) -> None:
    """The catalog: published systems that work here, and the code each was found equal to; --json adds the rest."""
    rows = all_rows()
    if area is not None:
        areas = sorted({row["area"] for row in rows})
        if area not in areas:
            raise ValueError(f"unknown area {area!r}; there are {', '.join(areas) or 'none yet'}")
        rows = [row for row in rows if row["area"] == area]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    print_table(
        ["id", "name", "paper", "year", "area"], ["title", "equal to"],
        [[row["id"], row["name"], row["arxiv"], row["year"], row["area"], row["title"], equal_to(row)] for row in rows],
    )  # fmt: skip


@app.command()
def mixers(
    pattern: Annotated[str, typer.Argument(help="Shell-style, such as '*rout*'.")] = "*",
    dim: Annotated[int, _count("Channels, for the number of parameters.", 1, 65536)] = WIDTH,
    heads: Annotated[int, _count("Heads, for the number of parameters.", 1, 65536)] = HEADS,
    as_json: Annotated[bool, typer.Option("--json", help="Print json instead of a table.")] = False,
) -> None:
    """Token mixers: what `create_mixer` and `mixer=` take, with parameters, cost and paper."""
    rows = listed("mixers", pattern)
    if (dim, heads) != (WIDTH, HEADS):
        from .catalog import mixer_rows

        rows = mixer_rows([row["name"] for row in rows], dim, heads)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    print_table(
        ["name", "params", "paper"], ["what", "cost"],
        [[r["name"], f"{r['params']:,}", r["arxiv"], r["what"], r["cost"]] for r in rows],
    )  # fmt: skip


@app.command()
def models(
    pattern: Annotated[str, typer.Argument(help="Shell-style, such as 'swin*'.")] = "*",
    as_json: Annotated[bool, typer.Option("--json", help="Print json instead of a table.")] = False,
) -> None:
    """Backbones: what `create_model` takes, with parameters, published multiply-adds and paper."""
    rows = listed("models", pattern)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    print_table(
        ["name", "params", "GMACs", "at", "paper"], [],
        [[r["name"], f"{r['params'] / 1e6:.2f} M", f"{r['gmacs']:g}", str(r["size"]), r["arxiv"]] for r in rows],
    )  # fmt: skip


@app.command()
def plan(
    pattern: Annotated[str, typer.Argument(help="Such as 'neighborhood(7, dilation=2)' or 'axis(0) | axis(1)'.")],
    grid: Annotated[str, typer.Option(help="Tokens per axis, such as 56x56.")] = "56x56",
    batch: Annotated[int, _count()] = 1,
    heads: Annotated[int, _count(None, 1, 65536)] = 4,
    head_dim: Annotated[int, _count(None, 1, 65536)] = 32,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    device: Annotated[str, typer.Option(help="Where it would run; it need not exist here.")] = "cpu",
    bias: Annotated[bool, typer.Option("--bias", help="With a relative bias table.")] = False,
    training: Annotated[bool, typer.Option("--training", help="With gradients.")] = False,
    tiles: Annotated[
        str | None, typer.Option(help="Query and key tile of a fused kernel to simulate: 16x16/16x8, or row-major 256/128.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print json instead of text.")] = False,
) -> None:
    """How an attention would run and what it would cost."""
    places, cut = _grid(grid), _tiles(tiles)
    from .ops.attention.planning import plan as make_plan

    made = make_plan(
        pattern, places, batch=batch, heads=heads, head_dim=head_dim, dtype=_dtype(dtype), device=_device_named(device),
        bias=bias, training=training, tiles=cut,
    )  # fmt: skip
    print(json.dumps(made.as_dict(), indent=2) if as_json else made)


@app.command()
def explain(
    image: Annotated[str, typer.Argument(help="File of a photograph, or the name of an embedded one, such as chelsea.")],
    model: Annotated[
        str,
        typer.Option(
            help="Name (random weights), checkpoint whose file name starts with it, NAME=PATH, folder of transformers, or "
            "tiny_dino, which is trained and comes along."
        ),
    ],
    query: Annotated[
        str | None,
        typer.Option(
            help="A pixel y,x of the image, or fractions: what it attends to. Where nothing else is asked for, the middle."
        ),
    ] = None,
    rollout: Annotated[
        bool, typer.Option("--rollout", help="Through all layers, from the class token or all places; with a query from there.")
    ] = False,
    relevance: Annotated[
        bool,
        typer.Option(
            "--relevance",
            help="What speaks for a class: gradients times attention. With a query, only what comes through that place: of a "
            "model that averages its tokens that is little beside the place itself.",
        ),
    ] = False,
    target: Annotated[int | None, _count("That class, with --relevance; the most probable by default.", 0)] = None,
    layers: Annotated[str, typer.Option(help="Shell-style pattern of module paths.")] = "*",
    size: Annotated[int | None, typer.Option(help="Side of the square that the model sees.", min=16, max=1024)] = None,
    normalise: Annotated[
        str,
        typer.Option(help="imagenet, half (-1..1), clip, regard, or auto: as a folder of transformers says or imagenet."),
    ] = "auto",
    classes: Annotated[int | None, _count("Of the checkpoint, where not the published number.", 0, 1 << 24)] = None,
    out: Annotated[Path, typer.Option(help="Two files are written: with .png and .html appended.")] = Path("regard-explain"),
) -> None:
    """Where a model looks on a photograph: a PNG, and a page with all heads."""
    if target is not None and not relevance:
        raise ValueError(f"--target is the class that --relevance speaks for: give both; got --target {target} alone")
    if query is None and not (rollout or relevance):
        query = "0.5,0.5"
    _check_folders(out=out.parent)
    from .data.photographs import cut_square, seen_at
    from .files import write_atomically
    from .lens.explain import explain as look
    from .models.opening import inputs_of, normalised, open_model

    cut, place = cut_square(image, query)  # what was typed is read before a model is built
    if normalise != "auto":
        normalised(cut[:, :1, :1], normalise)
    built, title, side = open_model(model, classes)
    photo = seen_at(cut, size or side)
    found = look(
        built, photo, title=title, query=place, with_rollout=rollout, with_relevance=relevance, target=target, layers=layers,
        normalise=inputs_of(model) if normalise == "auto" else normalise,
    )  # fmt: skip
    for suffix, content in ((".png", found.png()), (".html", found.html())):
        print(write_atomically(Path(f"{out}{suffix}"), content))


@app.command("app")
def playground(
    host: Annotated[str, typer.Option(help="Address to listen on; other machines reach it only if this is not 127.0.0.1.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 7860,
) -> None:
    """A playground in the browser: click a pixel, see what it attends to, compare mechanisms."""
    from .app import launch

    launch(host, port)


def _tiles(text: str | None) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    if text is None:
        return None
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*/[1-9]\d*(x[1-9]\d*)*", text):
        raise ValueError(f"tiles must be a query tile and a key tile joined by /, such as 16x16/16x8; got {text!r}")
    q_tile, k_tile = text.split("/")
    return _grid(q_tile), _grid(k_tile)


def _grid(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text):
        raise ValueError(f"grid must be positive numbers joined by x, such as 56x56; got {text!r}")
    if len(text) > 100 or math.prod(sizes := tuple(int(n) for n in text.split("x"))) > TOKENS:
        raise ValueError(f"grid must have at most {TOKENS:,} tokens; got {text[:40]!r}")
    return sizes


TOKENS = 1 << 24
"""Of a grid that is planned: some minutes."""
DTYPES = ("float32", "bfloat16", "float16", "float64")


def _dtype(name: str) -> torch.dtype:
    import torch

    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; there are {', '.join(DTYPES)}")
    return getattr(torch, name)


def _device_named(name: str) -> torch.device:
    import torch

    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}; such as cpu, cuda, mps") from error


bench = typer.Typer(
    help="Measure speed, memory and errors beside other libraries, and write the page of benchmarks.", no_args_is_help=True
)
app.add_typer(bench, name="bench")

Threads = Annotated[str, typer.Option(help="Numbers of threads to measure with, such as 1,2.")]
Peers = Annotated[
    str, typer.Option(help="Libraries to measure beside: of flex, timm, natten; 'here' for those installed, 'none' for none.")
]
Install = Annotated[bool, typer.Option("--install", help="Install the peers that are asked for, in a folder of their own.")]
Results = Annotated[Path, typer.Option(help="Folder of results, with one folder per kind of machine.")]
Minutes = Annotated[float, typer.Option(help="Cases not begun by then are left out.")]
Anew = Annotated[bool, typer.Option("--fresh", help="Forget what was measured before, not only what is measured anew.")]
Smoke = Annotated[bool, typer.Option("--smoke", help="Tiny sizes, to see that everything runs; the times mean nothing.")]
RESULTS = Path("benchmarks/results")


def _measuring(job: str) -> Callable[..., None]:
    """A command that runs a function of :mod:`regard.bench.running`."""

    def command(
        cases: Annotated[list[str] | None, typer.Argument(help="Some of them; all by default.", show_default=False)] = None,
        threads: Threads = "1,2",
        peers: Peers = "here",
        install: Install = False,
        out: Results = RESULTS,
        minutes: Minutes = 120.0,
        fresh: Anew = False,
        smoke: Smoke = False,
    ) -> None:
        from .bench import running
        from .bench.cases import Scope
        from .bench.peers import choose_peers, parse_peers

        if not re.fullmatch(r"[1-9]\d{0,2}(,[1-9]\d{0,2})*", threads):
            raise ValueError(f"threads must be numbers from 1 to 999 joined by commas, such as 1,2; got {threads!r}")
        _positive("minutes", minutes)
        _check_folders(out=out)
        scope = Scope(smoke, choose_peers(parse_peers(peers), install))
        where = getattr(running, job)(
            cases or [], out, scope=scope, threads_list=tuple(map(int, threads.split(","))), minutes=minutes, fresh=fresh,
            tell=_tell,
        )  # fmt: skip
        print(f"results: {where}; `regard bench page` makes the page of them")

    return command


bench.command(
    "ops",
    help="Operators against their peers, and how their cost grows with the number of tokens: neighborhood, window, axes, "
    "routed, linear, natten, growth.",
)(_measuring("bench_operators"))
bench.command(
    "models",
    help="Inference and training step of backbones, against timm's and against dense attention, per image and per FLOP: "
    "swin-t, dinat-t, biformer-t, vit-s.",
)(_measuring("bench_backbones"))


@bench.command()
def page(
    results: Results = RESULTS,
    out: Annotated[Path, typer.Option(help="The page, a markdown file.")] = Path("docs/benchmarks.md"),
) -> None:
    """Write the page of benchmarks and its plots from the results; nothing is measured."""
    from .bench.page import write_page

    for path in write_page(results, out):
        print(path)


def stopped(arguments: Sequence[str]) -> str:
    """What to say when a command is interrupted."""
    if arguments and arguments[0] in GOES_ON:
        return "stopped; the same command goes on from here"
    return "stopped; what was measured is kept" if arguments and arguments[0] == "bench" else "stopped"


def run(arguments: Sequence[str]) -> int:
    """Run a command; returns its exit code."""
    code = app(list(arguments) or ["--help"], prog_name="regard", standalone_mode=False)
    return code if isinstance(code, int) else 0
