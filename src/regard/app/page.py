"""The page of the playground: controls and pictures, wired to plain functions. Nothing is computed here."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch

from .. import catalog
from ..models import list_models
from ..models.opening import AUTO, NORMALISATIONS, TINY_DINO
from . import compare, trained, uploads
from .compare import Choice, Setting
from .mechanisms import fields_of, mechanisms, read

MIDDLE = (0.45, 0.55)
STARTS = ("neighborhood", "bi_level_routing")
MEAN = "mean"
LOCAL = ("127.0.0.1", "localhost", "::1")
"""Addresses that other machines do not reach."""

CSS = """
.gradio-container{max-width:1240px!important;margin:auto!important;padding:12px 20px!important}
footer{display:none!important}
.facts{display:flex;gap:1.6rem;flex-wrap:wrap;margin:.2rem 0 .5rem;font-size:.95rem}
.facts div{line-height:1.25}.facts b{display:block;font-size:1.15rem;font-weight:600}
.facts span{color:#6b7785;font-size:.8rem}
.keys{width:100%;font-size:.85rem;border-collapse:collapse}.keys td{padding:1px 6px 1px 0;border:0}
.keys i{display:block;height:9px;background:#d1603d;border-radius:2px}.keys td:nth-child(2){width:60%}
.wrong{color:#a61b1b;background:#fdecec;border-radius:6px;padding:.45rem .7rem;font-size:.9rem;overflow-wrap:anywhere}
.hint{color:#6b7785;font-size:.9rem}.scroll{overflow-x:auto;contain:inline-size}
.costs{width:100%;border-collapse:collapse;font-size:.92rem}.costs th{color:#6b7785;font-weight:500;text-align:right}
.costs td,.costs th{padding:.3rem .6rem;text-align:right;white-space:nowrap}
.keys,.costs{border:0!important}.keys td,.costs td,.costs th{border-width:0!important}
.costs td,.costs th{border-bottom:1px solid var(--border-color-primary)!important}
.keys td,.keys tr,.costs tr{border:0!important;background:none!important}
#controls-a .form,#controls-b .form{display:grid!important;grid-template-columns:repeat(4,1fr);
  background:var(--block-background-fill)}
.line:not(:has(.wrong,.hint)){display:none!important}
#send,#send-model{align-self:center;height:44px;flex-grow:0}
.costs td:first-child,.costs th:first-child{text-align:left}
.formula{white-space:pre-wrap;font:13px/1.5 ui-monospace,monospace;padding:.7rem 1rem;border-radius:8px;
  margin:.5rem 0;color:var(--body-text-color);background:var(--background-fill-secondary)}
@media (max-width:700px){
  .tab-container button{padding:0 .6rem!important;font-size:.9rem}
  #controls-a .form,#controls-b .form{grid-template-columns:repeat(2,1fr)}
}
"""
HEAD = "<style>@media (max-width:700px){.gradio-container .main{padding:8px!important}}</style>"
"""What lies around the page, out of reach of ``CSS``: on a phone its margins would push tabs into a menu."""
CLICK = "Click the picture: a ring marks the token that looks, colours show what it attends to."
COSTS = (
    "One photograph, float32, {threads}; a multiply-add is two FLOPs. Predicted speed-up: the pairs of dense attention for "
    "each that the pattern shows, which no exact method can beat, and for each that its tiles compute. A curve of "
    "time ends where a mechanism would take long."
)
OLD = "These costs are of earlier settings: measure again."
AWAY = "files of this machine are opened only where the page is served to this machine alone"
"""What a visitor of another machine is told."""


def wrong(error: Exception | None) -> str:
    """The line that says what is not right."""
    return "" if error is None else f'<div class="wrong">{html.escape(" ".join(str(error).split()))}</div>'


def hint(words: str) -> str:
    """A quiet line."""
    return f'<div class="hint">{html.escape(words)}</div>' if words else ""


def facts(view: compare.View) -> str:
    """The numbers of a query."""
    numbers = [(f"{view.keys:,}", "keys"), (f"{view.entropy:.2f} bit", "entropy")]
    if view.strongest:
        numbers.insert(1, (compare.number(view.strongest[0][2]), "largest weight"))
    if view.elsewhere > 5e-4:
        numbers.append((f"{view.elsewhere:.1%}", "nowhere"))
    cells = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for value, name in numbers)
    most = view.strongest[0][2] if view.strongest else 1.0
    rows = "".join(
        f'<tr><td>row {y}, column {x}</td><td><i style="width:{100 * w / most:.0f}%"></i></td><td>{compare.number(w)}</td></tr>'
        for y, x, w in view.strongest
    )
    return f'<div class="facts">{cells}</div><table class="keys">{rows}</table>'


def costs(entries: list[tuple[str, compare.Cost]]) -> str:
    """Costs as a table, a mechanism a row."""
    head = ("", "FLOPs", "of attention", "peak memory", "time", "predicted speed-up", "with tiles", "backend", "parameters")
    rows = []
    for name, each in entries:
        speed = ["-" if s is None else f"{s:.1f} x" for s in (each.speedup, each.tile_speedup)]
        cells = (
            name, compare.short(each.flops), compare.short(each.attention_flops), f"{compare.short(each.memory)}B",
            compare.duration(each.milliseconds / 1e3), *speed, each.backend, compare.short(each.params),
        )  # fmt: skip
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    table = f'<table class="costs"><tr>{"".join(f"<th>{h}</th>" for h in head)}</tr>{"".join(rows)}</table>'
    count = torch.get_num_threads()
    return f'<div class="scroll">{table}</div>' + hint(COSTS.format(threads=f"{count} thread{'s' if count > 1 else ''}"))


def choice_of(chosen: tuple[str, dict[str, object]], file: str, files: bool = True) -> Choice:
    """A mechanism from its name and what was typed; raises ``ValueError`` where that does not fit."""
    name, typed = chosen
    return Choice(name, tuple(read(name, typed).items()), path_of(file, files))


def path_of(typed: str | None, files: bool) -> str:
    """The path that was typed, if files may be opened; raises ``ValueError`` where they may not."""
    path = (typed or "").strip()
    if path and not files:
        raise ValueError(AWAY)
    return path


def place_of(event: gr.SelectData, shape: tuple[int, int] = (compare.SIDE, compare.SIDE)) -> tuple[float, float] | None:
    """The place of a click, as fractions of height and width; None beside the picture."""
    x, y = event.index
    place = (y + 0.5) / shape[0], (x + 0.5) / shape[1]
    return place if all(0.0 <= fraction < 1.0 for fraction in place) else None


def shown(setting: Setting, choice: Choice | Exception, place: tuple[float, float]) -> tuple[Any, str, str]:
    """Map, numbers and error line of a mechanism."""
    try:
        if isinstance(choice, Exception):
            raise choice
        view = compare.look(setting, choice, place)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        return gr.skip(), "", wrong(error)
    return view.drawn, facts(view), ""


def build(files: bool = True) -> gr.Blocks:
    """The page.

    Args:
        files: whether visitors may open checkpoints of this machine by their paths.
    """
    with gr.Blocks(title="regard", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        with gr.Tab("Compare"):
            _compare_tab(page, files)
        with gr.Tab("Trained model") as tab:
            _trained_tab(tab, files)
        with gr.Tab("Catalog"):
            _catalog_tab(page)
    return page


def _photo_row(suffix: str) -> tuple[gr.Dropdown, gr.UploadButton]:
    names = gr.Dropdown(uploads.names(), value="chelsea", label="Photograph", elem_id=f"photo{suffix}", min_width=150, scale=2)
    send = gr.UploadButton("Upload", file_types=["image"], type="binary", scale=0, min_width=90, elem_id=f"send{suffix}")
    return names, send


def _receive(data: bytes) -> tuple[Any, str]:
    try:
        name = uploads.receive(data)
    except ValueError as error:
        return gr.skip(), wrong(error)
    return gr.Dropdown(choices=[*uploads.names(), name], value=name), ""


def _compare_tab(page: gr.Blocks, files: bool) -> None:
    place = gr.State(MIDDLE)
    gr.HTML(hint(f"{CLICK} Its queries and keys are random projections of the photograph, unless weights are given below."))
    with gr.Row(equal_height=True):
        photo, send = _photo_row("")
        grid = gr.Dropdown([(f"{n}x{n}", n) for n in compare.GRIDS], value=56, label="Tokens", elem_id="grid", min_width=120)
        heads = gr.Dropdown([1, 2, 4, 8], value=4, label="Heads", elem_id="heads", min_width=120)
        dim = gr.Dropdown([32, 64, 96, 128, 192, 256, 384], value=64, label="Channels", min_width=120)
        head = gr.Dropdown([MEAN, *range(8)], value=MEAN, label="Show head", elem_id="head", min_width=120)
        kinds = [("pattern alone", "pattern"), ("weights", "random")]
        weights = gr.Dropdown(kinds, value="random", label="Show", elem_id="weights", min_width=130)
    trouble = gr.HTML("", elem_id="trouble", elem_classes="line")
    shared = [photo, grid, dim, heads, weights, head, place]
    sides = dict(zip("ab", STARTS, strict=True))
    panes: list[dict[str, Any]] = []
    with gr.Row():  # what belongs to both stands in rows, so that the maps are level
        for side, start in sides.items():
            with gr.Column():
                panes.append(_controls(side, start))
    with gr.Row():
        for side, pane in zip(sides, panes, strict=True):
            with gr.Column():
                pane |= _map(side, files)
    with gr.Row():
        measure = gr.Button("Measure cost", variant="primary", elem_id="measure", scale=0, min_width=160)
    old = gr.HTML("", elem_id="old", elem_classes="line")
    table = gr.HTML("", elem_id="costs")
    figure = gr.Image(visible=False, show_label=False, interactive=False, format="png", buttons=[], elem_id="growth")

    def setting(photo, grid, dim, heads, weights, head) -> Setting:
        return Setting(photo, int(grid), int(dim), int(heads), weights, None if head == MEAN else int(head))

    def draw(photo, grid, dim, heads, weights, head, place, chosen, file):
        try:
            choice: Choice | Exception = choice_of(chosen, file, files)
        except ValueError as error:
            choice = error
        return shown(setting(photo, grid, dim, heads, weights, head), choice, place)

    def count(photo, grid, dim, heads, weights, head, place, *panes):
        common = setting(photo, grid, dim, heads, "random", MEAN)
        try:
            choices = [choice_of(panes[i], panes[i + 1], files) for i in (0, 2)]
            dense = Choice("multi_head", tuple(read("multi_head", {}).items()))
            named = [(f"{side} {choice.name}", choice) for side, choice in zip("AB", choices, strict=True)] + [("dense", dense)]
            entries = [(name, compare.cost(common, choice)) for name, choice in named]
            curves = [
                (name, compare.growth(common, choice), compare.times(common, choice, each.milliseconds / 1e3))
                for (name, choice), (_, each) in zip(named, entries, strict=True)
            ]
        except (ValueError, FileNotFoundError) as error:
            return wrong(error), gr.Image(visible=False), ""
        return costs(entries), gr.Image(compare.growth_figure(curves), visible=True), ""

    all_panes = [pane[key] for pane in panes for key in ("chosen", "file")]
    drawn = [[pane["image"], pane["facts"], pane["wrong"]] for pane in panes]

    def draw_both(photo, grid, dim, heads, weights, head, place, *panes):
        common = photo, grid, dim, heads, weights, head, place
        return *draw(*common, *panes[:2]), *draw(*common, *panes[2:])

    # what both have in common changes both at once: at no time does one show the old photograph and one the new
    both = [*shared, *all_panes], [*drawn[0], *drawn[1]]
    gr.on([*(each.change for each in (photo, grid, dim, heads, weights, head)), page.load], draw_both, *both,
          show_progress="minimal", show_progress_on=[pane["image"] for pane in panes], trigger_mode="always_last")  # fmt: skip
    place.change(draw_both, *both, show_progress="hidden", trigger_mode="always_last")
    for pane, outputs in zip(panes, drawn, strict=True):
        inputs = [*shared, pane["chosen"], pane["file"]]
        gr.on([pane["chosen"].change, pane["file"].submit], draw, inputs, outputs, show_progress="minimal",
              show_progress_on=pane["image"], trigger_mode="always_last")  # fmt: skip
        pane["image"].select(_clicked, None, place, show_progress="hidden", trigger_mode="always_last")
    send.upload(_receive, send, [photo, trouble])
    counted = [photo, grid, dim, heads, *(pane["chosen"] for pane in panes)]
    gr.on([each.change for each in counted], lambda table: hint(OLD) if "<table" in (table or "") else "", table, old,
          show_progress="hidden")  # fmt: skip
    measure.click(count, [*shared, *all_panes], [table, figure, old], show_progress_on=table)


def _clicked(event: gr.SelectData) -> Any:
    place = place_of(event)
    return gr.skip() if place is None else place


def _controls(side: str, start: str) -> dict[str, Any]:
    """The choice of a mechanism and controls of its parameters, generated from its constructor."""
    name = gr.Dropdown(mechanisms(), value=start, label=f"Mechanism {side.upper()}", elem_id=f"mechanism-{side}")
    chosen = gr.State((start, {}))  # in one, so that it changes with the name even where no parameter does
    with gr.Row(elem_id=f"controls-{side}"):

        @gr.render(inputs=name, concurrency_limit=1, concurrency_id="controls")  # gradio renders one thing at a time
        def controls(name: str) -> None:
            fields = fields_of(name)
            made: list[Any] = []
            for field in fields:
                common: dict[str, Any] = {
                    "label": field.name.replace("_", " "), "elem_id": f"{side}-{field.name}", "min_width": 92,
                    "interactive": True,  # gradio does not see by itself that rendered controls are inputs
                }  # fmt: skip
                if field.kind == "flag":
                    made.append(gr.Checkbox(bool(field.shown), **common))
                elif field.words:
                    made.append(gr.Dropdown(list(field.words), value=str(field.shown), **common))
                else:
                    made.append(gr.Textbox(str(field.shown), max_lines=1, **common))

            if not made:
                gr.HTML("no parameters")

            def collect(*values: object) -> tuple[str, dict[str, object]]:
                return name, dict(zip([field.name for field in fields], values, strict=True))

            for control in made:
                change = control.submit if isinstance(control, gr.Textbox) else control.change
                change(collect, made, chosen, show_progress="hidden", trigger_mode="always_last")  # else lost while one runs
                if isinstance(control, gr.Textbox):
                    control.blur(collect, made, chosen, show_progress="hidden", trigger_mode="always_last")

    name.change(lambda name: (name, {}), name, chosen, show_progress="hidden")
    return {"chosen": chosen}


def _map(side: str, files: bool) -> dict[str, Any]:
    """The picture of a mechanism, its numbers, and where its weights come from."""
    error = gr.HTML("", elem_id=f"wrong-{side}", elem_classes="line")
    image = gr.Image(
        show_label=False, interactive=False, format="png", height=compare.SIDE + 34, buttons=[], elem_id=f"map-{side}"
    )
    numbers = gr.HTML("", elem_id=f"facts-{side}")
    file = gr.Textbox(
        label="Weights from a .safetensors file (path#part, Enter); random without", max_lines=1, elem_id=f"file-{side}",
        visible=files,
    )  # fmt: skip
    return {"file": file, "image": image, "facts": numbers, "wrong": error}


def _trained_tab(tab: gr.Tab, files: bool) -> None:
    place = gr.State(MIDDLE)
    opened = gr.State(None)  # what the maps are of, whatever has been typed since
    gr.HTML(hint(f"{CLICK} {TINY_DINO} is trained and comes with regard; other models are random without a checkpoint."))
    names: list[Any] = [(f"{TINY_DINO} (trained)", TINY_DINO), *list_models()]
    with gr.Row(equal_height=True):
        model = gr.Dropdown(names, value=TINY_DINO, label="Model", elem_id="model", scale=2)
        path = gr.Textbox(label="Checkpoint: .safetensors file or folder of transformers", max_lines=1,
                          elem_id="checkpoint", scale=3, visible=files)  # fmt: skip
        normalise = gr.Dropdown([AUTO, *NORMALISATIONS], value=AUTO, label="Normalised as", min_width=120)
        side = gr.Dropdown([("as trained", 0), *((f"{n}x{n}", n) for n in trained.SIDES)], value=224, label="Pixels",
                           elem_id="side", min_width=120)  # fmt: skip
        opens = gr.Button("Open", variant="primary", elem_id="open", scale=0, min_width=110)
    error = gr.HTML("", elem_id="model-wrong", elem_classes="line")
    title = gr.HTML("", elem_id="model-title")
    with gr.Row():
        with gr.Column(scale=2):
            with gr.Row(equal_height=True):
                photo, send = _photo_row("-model")
            image = gr.Image(show_label=False, interactive=False, format="png", buttons=[], elem_id="model-photo")
            what = gr.Dropdown([trained.ALL], value=trained.ALL, label="Show", elem_id="what")
        with gr.Column(scale=5):
            maps = gr.Image(show_label=False, interactive=False, format="png", buttons=[], elem_id="model-maps")

    def seen(name: str, place: tuple[float, float]) -> np.ndarray:
        return compare.photograph_with(name, place)

    def draw(opened, photo, what, place):
        if opened is None:
            return seen(photo, place), gr.skip(), gr.skip()
        try:
            name, path, normalise, side = opened
            return seen(photo, place), trained.show(name, path, photo, what, place, normalise, side), ""
        except (ValueError, FileNotFoundError, ModuleNotFoundError) as problem:
            return seen(photo, place), gr.skip(), wrong(problem)

    def start(model, path, normalise, side, photo, place):
        try:
            wanted = (model, path_of(path, files), normalise, int(side))
            found = trained.layers(model, wanted[1], photo, normalise, wanted[3])
            words = hint(trained.title(model, wanted[1], photo, normalise, wanted[3]))
            return wanted, gr.Dropdown(found, value=trained.ALL), words, *draw(wanted, photo, trained.ALL, place)
        except (ValueError, FileNotFoundError, ModuleNotFoundError) as problem:
            return *[gr.skip()] * 5, wrong(problem)

    shown = [image, maps, error]
    gr.on([opens.click, path.submit], start, [model, path, normalise, side, photo, place], [opened, what, title, *shown],
          show_progress_on=maps)  # fmt: skip
    changes = [photo.change, what.input, place.change]
    gr.on(changes, draw, [opened, photo, what, place], shown, show_progress_on=maps, show_progress="minimal",
          trigger_mode="always_last")  # fmt: skip

    def first(opened, *settings):
        return [gr.skip()] * 6 if opened is not None else start(*settings)

    tab.select(first, [opened, model, path, normalise, side, photo, place], [opened, what, title, *shown],
               show_progress_on=maps)  # fmt: skip
    image.select(_clicked, None, place, show_progress="hidden", trigger_mode="always_last")
    send.upload(_receive, send, [photo, error])


def _catalog_tab(page: gr.Blocks) -> None:
    found = gr.State([])
    words = gr.Textbox(label="Search", placeholder="window, 2023, token reduction, 2209.15001", max_lines=1, elem_id="search")
    with gr.Row():
        with gr.Column(scale=5):
            rows = gr.Dataframe(headers=["Name", "Title", "Year", "Area"], interactive=False, wrap=True, elem_id="systems",
                                column_widths=["22%", "48%", "10%", "20%"], max_height=560)  # fmt: skip
        with gr.Column(scale=4):
            about = gr.HTML("", elem_id="about")
            code = gr.Code(language="python", label="Create it", interactive=False, elem_id="code", visible=False)

    def look(words: str | None):
        systems = catalog.search(words or "")
        shown = [[each.name, each.title, str(each.year), each.area] for each in systems]
        return shown, systems, *_about(systems[0] if systems else None)

    def choose(systems: list[catalog.System], event: gr.SelectData):
        row = list(event.row_value[:2])  # not its number: the visitor may have sorted
        chosen = [each for each in systems if [each.name, each.title] == row]
        return _about(chosen[0] if chosen else None)

    listen: list[Callable] = [words.change, page.load]
    gr.on(listen, look, words, [rows, found, about, code], show_progress="hidden")
    rows.select(choose, found, [about, code], show_progress="hidden")


def _about(system: catalog.System | None) -> tuple[str, Any]:
    if system is None:
        return wrong(ValueError("nothing found")), gr.Code(visible=False)
    paper = f'<a href="https://arxiv.org/abs/{system.arxiv}" target="_blank">arXiv:{system.arxiv}</a>' if system.arxiv else ""
    account = system.account
    lines = [("Cost", account.cost), ("Source", account.source), ("Module", system.module)]
    rest = "".join(f"<p><b>{name}</b> {html.escape(text)}</p>" for name, text in lines if text)
    text = (
        f"<h3>{html.escape(system.name)}</h3><p>{html.escape(system.title)}, {system.year}. {paper}</p>"
        f"{_told(account.text)}{rest}"
    )
    return text, gr.Code(system.lines, visible=True)


def _told(text: str) -> str:
    """A docstring as paragraphs and indented formulas."""
    parts = []
    for block in re.split(r"\n\s*\n", text):
        for formula, lines in groupby(block.splitlines(), lambda line: line.startswith("    ")):
            words = [html.escape(line.strip()) for line in lines]
            parts.append(f'<div class="formula">{"<br>".join(words)}</div>' if formula else f"<p>{' '.join(words)}</p>")
    return "".join(parts)


def serve(host: str, port: int | None, wait: bool) -> str:
    """See :func:`regard.app.launch`."""
    sans, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    page = build(files=host in LOCAL).queue(default_concurrency_limit=1, max_size=64)
    _, local, _ = page.launch(
        server_name=host, server_port=port, share=False, prevent_thread_lock=True, quiet=True, show_error=False,
        max_file_size=uploads.BYTES, enable_monitoring=False, footer_links=[], css=CSS, head=HEAD, inbrowser=False,
        theme=gr.themes.Default(font=sans, font_mono=mono, primary_hue="slate"), blocked_paths=[str(Path.home())],
    )  # fmt: skip
    if wait:
        print(local, flush=True)
        page.block_thread()
    return local
