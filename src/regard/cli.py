"""The ``regard`` command: ``demo``, ``compare``, ``plan``, ``explain``, ``app``, ``bench`` and lists of what there is."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from . import __version__

app = typer.Typer(
    help="Visual attention: every mechanism behind one front door.", add_completion=False, pretty_exceptions_enable=False
)

UsageError: Any = typer.BadParameter.__mro__[1]  # typer brings its own click, or uses the installed one

Out = Annotated[Path, typer.Option(help="Folder of the report.")]
Runs = Annotated[Path, typer.Option(help="Folder where runs are kept; the same settings go on where they stopped.")]
Seed = Annotated[int, typer.Option(help="Of the weights, the order and the augmentation.")]
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
    epochs: Annotated[int | None, typer.Option(help="Of each mixer; by default 16, or as many as fit.", min=1)] = None,
    minutes: Annotated[float, typer.Option(help="Training takes at most about this long, if no epochs are given.")] = 3.5,
    seed: Seed = 0,
    runs: Runs = Path("regard-runs"),
    fresh: Fresh = False,
    device: Device = None,
) -> None:
    """Train and compare four mixers on photographs that lie in installed packages; write a report."""
    from .train import demo as run_demo

    if minutes <= 0:
        raise ValueError(f"minutes must be positive; got {minutes:g}")
    console = Console(highlight=False)
    chosen = _device(device)
    report = run_demo(out, epochs=epochs, minutes=minutes, seed=seed, runs=runs, fresh=fresh, device=chosen,
                      progress=console.is_terminal, tell=_teller(console))  # fmt: skip
    _say_where(console, report)


@app.command()
def compare(
    data: Annotated[str, typer.Option(help="Image folder, parquet file or folder, name of a dataset, or 'embedded'.")],
    mixers: Annotated[str, typer.Option(help="Such as 'multi_head,window(window_size=7),neighborhood'.")],
    model: Annotated[str, typer.Option(help="The backbone; see `regard models`.")] = "compact_nano",
    epochs: Annotated[int, typer.Option(help="Of each mixer.", min=1)] = 10,
    batch_size: Annotated[int, typer.Option(help="Samples a step.", min=1)] = 64,
    learning_rate: Annotated[float, typer.Option(help="At the end of the warm-up.")] = 2e-3,
    limit: Annotated[int | None, typer.Option(help="Images of each split that are used.", min=1)] = None,
    size: Annotated[int | None, typer.Option(help="Side of the images; by default that of the first, at most 64.")] = None,
    bad_images: Annotated[
        str, typer.Option(help="What to do about images that cannot be read: error lists them, skip leaves them out.")
    ] = "error",
    seed: Seed = 0,
    out: Out = Path("regard-report"),
    runs: Runs = Path("regard-runs"),
    fresh: Fresh = False,
    workers: Annotated[int, typer.Option(help="Processes that load images.", min=0)] = 0,
    device: Device = None,
) -> None:
    """Train and compare mixers on your data; write a report."""
    from .train import compare_on

    console = Console(highlight=False)
    chosen = _device(device)
    report = compare_on(
        data, mixers, model=model, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, size=size, limit=limit,
        bad=bad_images, seed=seed, out=out, runs=runs, fresh=fresh, device=chosen, workers=workers,
        progress=console.is_terminal, tell=_teller(console),
    )  # fmt: skip
    _say_where(console, report)


def _teller(console: Console) -> Callable[[str], None]:
    return lambda line: console.print(line, soft_wrap=True, markup=False)


def _say_where(console: Console, report: Path) -> None:
    console.print(f"report: {report.resolve()}", soft_wrap=True)


def _device(name: str | None) -> str:
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
    """The catalog: published systems that work here; --json adds entry points and sizes."""
    from .catalog import rows as all_rows

    rows = all_rows()
    if area is not None:
        areas = sorted({row["area"] for row in rows})
        if area not in areas:
            raise ValueError(f"unknown area {area!r}; there are {', '.join(areas) or 'none yet'}")
        rows = [row for row in rows if row["area"] == area]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    _print_table(
        ["id", "name", "title", "paper", "year", "area"],
        [[row["id"], row["name"], row["title"], row["arxiv"], row["year"], row["area"]] for row in rows],
    )


@app.command()
def mixers(
    pattern: Annotated[str, typer.Argument(help="Shell-style, such as '*rout*'.")] = "*",
    dim: Annotated[int, typer.Option(help="Channels, for the number of parameters.", min=1)] = 64,
    heads: Annotated[int, typer.Option(help="Heads, for the number of parameters.", min=1)] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print json instead of a table.")] = False,
) -> None:
    """Token mixers: what `create_mixer` and `mixer=` take, with parameters, cost and paper."""
    from .layers.mixers import create_mixer, list_mixers, mixer_class
    from .models import count_parameters

    rows: list[dict[str, Any]] = []
    for name in list_mixers(pattern):
        text = sys.modules[mixer_class(name).__module__].__doc__ or ""
        flat = " ".join(text.split())
        cost = re.search(r"Cost: (.*?)\.(?: |$)", flat)
        papers = ", ".join(dict.fromkeys(re.findall(r"arXiv:(\d{4}\.\d{5})", flat)))
        params = count_parameters(create_mixer(name, dim=dim, heads=heads))
        rows.append(
            {"name": name, "params": params, "what": text.split(":")[0].strip(), "cost": cost.group(1) if cost else "",
             "arxiv": papers}
        )  # fmt: skip
    if not rows:
        raise ValueError(f"no mixer matches {pattern!r}; there are {', '.join(list_mixers())}")
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    _print_table(
        ["name", "params", "what", "cost", "paper"],
        [[r["name"], f"{r['params']:,}", r["what"], r["cost"], r["arxiv"]] for r in rows],
    )


@app.command()
def models(
    pattern: Annotated[str, typer.Argument(help="Shell-style, such as 'swin*'.")] = "*",
    as_json: Annotated[bool, typer.Option("--json", help="Print json instead of a table.")] = False,
) -> None:
    """Backbones: what `create_model` takes, with parameters, published multiply-adds and paper."""
    from .models import list_models, model_card

    cards = [model_card(name) for name in list_models(pattern)]
    if not cards:
        raise ValueError(f"no model matches {pattern!r}; `regard models` lists all")
    rows: list[dict[str, Any]] = [
        {"name": card.name, "params": card.params, "gmacs": card.gmacs, "size": card.input_size, "arxiv": card.arxiv}
        for card in cards
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    _print_table(
        ["name", "params", "GMACs", "at", "paper"],
        [[r["name"], f"{r['params'] / 1e6:.2f} M", f"{r['gmacs']:g}", str(r["size"]), r["arxiv"]] for r in rows],
    )


@app.command()
def plan(
    pattern: Annotated[str, typer.Argument(help="Such as 'neighborhood(7, dilation=2)' or 'axis(0) | axis(1)'.")],
    grid: Annotated[str, typer.Option(help="Tokens per axis, such as 56x56.")] = "56x56",
    batch: Annotated[int, typer.Option(min=1)] = 1,
    heads: Annotated[int, typer.Option(min=1)] = 4,
    head_dim: Annotated[int, typer.Option(min=1)] = 32,
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
    from .ops.planning import plan as make_plan

    made = make_plan(
        pattern, _grid(grid), batch=batch, heads=heads, head_dim=head_dim, dtype=_dtype(dtype), device=_device_named(device),
        bias=bias, training=training, tiles=_tiles(tiles),
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
    query: Annotated[str | None, typer.Option(help="A pixel y,x of the image, or fractions: what it attends to.")] = None,
    rollout: Annotated[bool, typer.Option("--rollout", help="From the answer, or the query, through all layers.")] = False,
    relevance: Annotated[bool, typer.Option("--relevance", help="What speaks for a class: gradients times attention.")] = False,
    target: Annotated[int | None, typer.Option(help="That class; the most probable by default.", min=0)] = None,
    layers: Annotated[str, typer.Option(help="Shell-style pattern of module paths.")] = "*",
    size: Annotated[int | None, typer.Option(help="Side of the square that the model sees.", min=16, max=1024)] = None,
    normalise: Annotated[
        str,
        typer.Option(help="imagenet, half (-1..1), clip, regard, or auto: as a folder of transformers says or imagenet."),
    ] = "auto",
    classes: Annotated[int | None, typer.Option(help="Of the checkpoint, where not the published number.", min=0)] = None,
    out: Annotated[Path, typer.Option(help="Two files are written: with .png and .html appended.")] = Path("regard-explain"),
) -> None:
    """Where a model looks on a photograph: a PNG, and a page with all heads."""
    from .files import check_folder, write_atomically
    from .lens.explain import explain as look
    from .lens.explain import inputs_of, open_model, square

    check_folder("--out", out.parent)
    built, title, side = open_model(model, classes)
    photo, place = square(image, size or side, query)
    found = look(
        built, photo, title=title, query=place, with_rollout=rollout, with_relevance=relevance, target=target, layers=layers,
        normalise=inputs_of(model) if normalise == "auto" else normalise,
    )  # fmt: skip
    for suffix, content in ((".png", found.png()), (".html", found.html())):
        print(write_atomically(out.with_name(out.name + suffix), content))


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
    return tuple(int(n) for n in text.split("x"))


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; there are {', '.join(DTYPES)}")
    return DTYPES[name]


def _device_named(name: str) -> torch.device:
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


@bench.command()
def ops(
    cases: Annotated[
        list[str] | None, typer.Argument(help="Of neighborhood, window, axes, routed, linear, natten, growth.")
    ] = None,
    threads: Threads = "1,2",
    peers: Peers = "here",
    install: Install = False,
    out: Results = RESULTS,
    minutes: Minutes = 120.0,
    fresh: Anew = False,
    smoke: Smoke = False,
) -> None:
    """Operators against their peers, and how their cost grows with the number of tokens."""
    from .bench import running

    _bench(running.bench_operators, cases, threads, peers, install, out, minutes, fresh, smoke)


@bench.command("models")
def bench_models(
    backbones: Annotated[list[str] | None, typer.Argument(help="Of swin-t, dinat-t, biformer-t, vit-s.")] = None,
    threads: Threads = "1,2",
    peers: Peers = "here",
    install: Install = False,
    out: Results = RESULTS,
    minutes: Minutes = 120.0,
    fresh: Anew = False,
    smoke: Smoke = False,
) -> None:
    """Inference and training step of backbones, against timm's and against dense attention, per image and per FLOP."""
    from .bench import running

    _bench(running.bench_backbones, backbones, threads, peers, install, out, minutes, fresh, smoke)


@bench.command()
def page(
    results: Results = RESULTS,
    out: Annotated[Path, typer.Option(help="The page, a markdown file.")] = Path("docs/benchmarks.md"),
) -> None:
    """Write the page of benchmarks and its plots from the results; nothing is measured."""
    from .bench.page import write_page

    for path in write_page(results, out):
        print(path)


def _bench(
    measure: Callable[..., Path], chosen: list[str] | None, threads: str, peers: str, install: bool, out: Path, minutes: float,
    fresh: bool, smoke: bool,
) -> None:  # fmt: skip
    from .bench.cases import Scope
    from .bench.peers import choose_peers, parse_peers

    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", threads):
        raise ValueError(f"threads must be positive numbers joined by commas, such as 1,2; got {threads!r}")
    if minutes <= 0:
        raise ValueError(f"minutes must be positive; got {minutes:g}")
    scope = Scope(smoke, choose_peers(parse_peers(peers), install))
    try:
        where = measure(
            chosen or [], out, scope=scope, threads_list=tuple(map(int, threads.split(","))), minutes=minutes, fresh=fresh,
            tell=_teller(Console(highlight=False)),
        )  # fmt: skip
    except KeyboardInterrupt:
        print(f"stopped; the cases that were measured are under {out}", file=sys.stderr)
        raise typer.Exit(130) from None
    print(f"results: {where}; `regard bench page` makes the page of them")


def _print_table(columns: list[str], rows: list[list[str]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=column not in ("title", "what", "cost"), overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; what the user got wrong is one line on stderr and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code = app(arguments or ["--help"], prog_name="regard", standalone_mode=False)
    except UsageError as error:
        _fail(error.format_message())
    except (ValueError, FileNotFoundError, NotADirectoryError, PermissionError, ModuleNotFoundError) as error:
        _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> None:
    print(f"regard: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
