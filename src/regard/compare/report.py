"""The report: one self-contained html file."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import write_atomically, write_json
from ..train.telling import counted
from . import figures
from .measure import si
from .noise import fastest, more_accurate, most_accurate, standard_error
from .study import LARGE_SIZE, LATENCY_BATCH, Look, Outcome, Study, results

STYLE = """
:root { color: #1f2933; background: #fff; font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
body { max-width: 62rem; margin: 0 auto; padding: 3rem 1.5rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.02em; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .5rem; }
p { max-width: 46rem; margin: .4rem 0; }
.lead { font-size: 1.08rem; color: #3e4c59; }
.note { color: #6b7785; font-size: .9rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .95rem; margin-top: .6rem; }
th, td { text-align: right; padding: .5rem .55rem; border-bottom: 1px solid #e4e8ec; white-space: nowrap; }
th { color: #6b7785; font-weight: 500; font-size: .82rem; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead tr.groups th { border-bottom: 0; padding-bottom: 0; text-align: center; }
thead tr.groups th.of { border-bottom: 1px solid #cbd2d9; }
td.best { font-weight: 650; }
.dot { display: inline-block; width: .65rem; height: .65rem; border-radius: 50%; margin-right: .5rem; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 2rem; }
.pair svg { width: 100%; height: auto; }
.wide { overflow-x: auto; }
.hint { display: none; color: #6b7785; font-size: .85rem; margin: .6rem 0 0; }
img { max-width: 100%; height: auto; display: block; margin-top: .6rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; font-size: .9rem; margin: .6rem 0 0; }
dt { color: #6b7785; } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 48rem) {
  body { padding: 1.5rem 1rem 3rem; }
  .pair, dl { grid-template-columns: 1fr; } dd { margin-bottom: .5rem; }
  .hint { display: block; }
  .wide { box-shadow: inset -1.2rem 0 1rem -1.2rem #9aa5b1; }
  .wide th:first-child, .wide td:first-child { position: sticky; left: 0; background: #fff; }
  .wide img { max-width: none; width: 58rem; }
}
"""

SCROLLS = '<p class="hint">Wider than this screen: it scrolls sideways →</p>'


@dataclass(frozen=True)
class Column:
    """A column of the table: its heading, how a number is written, whether less is better, None if neither."""

    heading: str
    key: str
    show: Callable[[float], str]
    less: bool | None = True


SMALL_COLUMNS = (
    Column("params", "parameters", si, None),
    Column("MFLOPs<br>per image", "flops", lambda n: f"{n / 1e6:.1f}"),
    Column(f"latency, ms<br>batch {LATENCY_BATCH}", "latency_ms", lambda n: f"{n:.1f}"),
    Column(f"training<br>memory, MB<br>batch {LATENCY_BATCH}", "training_bytes", lambda n: f"{n / 1e6:.1f}"),
)
LARGE_COLUMNS = (
    Column("MFLOPs", "large_flops", lambda n: f"{n / 1e6:.0f}"),
    Column("latency, ms<br>batch 1", "large_latency_ms", lambda n: f"{n:.1f}"),
    Column("inference<br>memory, MB", "large_inference_bytes", lambda n: f"{n / 1e6:.1f}"),
)


def write_report(
    folder: Path,
    study: Study,
    outcomes: Sequence[Outcome],
    looks: Sequence[Look],
    photo: Tensor,
    queries: Sequence[tuple[float, float]],
    *,
    title: str,
    remark: str = "",
) -> Path:
    """Write ``index.html``, ``results.json`` and ``attention-maps.png`` into a folder.

    Args:
        folder: created if absent.
        study, outcomes: what was compared and what came out.
        looks, photo, queries: the attention maps, see :func:`regard.compare.figures.attention`.
        title: of the report.
        remark: a sentence under the title, such as why fewer epochs were run.

    Returns:
        The path of ``index.html``.
    """
    found = results(study, outcomes)
    write_json(folder / "results.json", found)
    picture = figures.attention(photo, looks, queries) if any(one.weights for one in looks) else None
    if picture is not None:
        write_atomically(folder / "attention-maps.png", picture)
    return write_atomically(folder / "index.html", _page(found, outcomes, picture, title, remark))


def _page(found: dict[str, Any], outcomes: Sequence[Outcome], picture: bytes | None, title: str, remark: str) -> str:
    data = found["data"]
    images, epochs = data["held_out_images"], found["recipe"]["epochs"]
    doubt = standard_error(max(o.accuracy for o in outcomes), images)
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="lead">{_in_words(len(outcomes))} backbones that differ only in their token mixer, trained the same way '
        f"from the same weights for {counted(epochs, 'epoch')}. {_accuracies(outcomes, images, epochs)} "
        f"{_latencies(outcomes)}</p>",
        f"<p>{html.escape(data['description'])}</p>",
        f'<p class="note">{html.escape(remark)}</p>' if remark else "",
        _over_identity(outcomes, images),
        "<h2>What each mixer costs and gives</h2>",
        _table(outcomes, data["size"], images, epochs),
        f'<p class="note">Accuracy on held-out images; always answering one class gives {data["chance"]:.1%}. One seed, '
        f"{images} held-out images: the standard error of an accuracy is about {100 * doubt:.1f} points. Bold is what is best "
        "beyond noise: accuracies more than two standard errors of their difference apart, latencies whose quartiles do not "
        "overlap. "
        "FLOPs count a multiply-add as two and, in attention, the pairs that the pattern shows. Latency: median, the models "
        "taking turns. Memory: the peak of all tensors allocated beyond the weights and the input.</p>",
        '<div class="pair"><div><h2>Accuracy and latency</h2>',
        figures.pareto(outcomes, images),
        "</div>",
        f"<div><h2>Learning curves</h2>{figures.curves(outcomes, data['chance'])}</div>" if epochs > 1 else "",
        "</div>",
    ]
    if picture is not None:
        encoded = base64.b64encode(picture).decode()
        parts += [
            "<h2>What each mixer looks at</h2>",
            "<p>The trained models on a photograph: where the token under the circle attends, in the last block of each "
            "stage, averaged over heads. Bright is most; what the mixer cannot see is left grey. These are the exact weights "
            "(<code>regard.lens.capture</code>), each map scaled to its own largest.</p>",
            SCROLLS,
            f'<div class="wide"><img alt="attention maps" src="data:image/png;base64,{encoded}"></div>',
        ]
    parts += ["<h2>How it was made</h2>", _facts(found)]
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
        f'<link rel="icon" href="data:,">\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n'
    )


def _accuracies(outcomes: Sequence[Outcome], images: int, epochs: int) -> str:
    """What may be said of the accuracies."""
    best = most_accurate(outcomes, images)
    if epochs == 1:
        return "After one epoch accuracies say nothing about the mixers."
    if len(best) == 1:
        return f"Most accurate: <b>{html.escape(best[0].label)}</b> ({best[0].accuracy:.1%})."
    span = f"{best[0].accuracy:.1%} to {best[-1].accuracy:.1%}"
    return f"Most accurate: no difference beyond noise between {_listed(best)} ({span})."


def _latencies(outcomes: Sequence[Outcome]) -> str:
    """What may be said of the latencies."""
    best = fastest(outcomes)
    if len(best) == 1:
        return f"Fastest: <b>{html.escape(best[0].label)}</b> ({best[0].numbers['latency_ms']:.1f} ms)."
    span = f"{best[0].numbers['latency_ms']:.1f} to {best[-1].numbers['latency_ms']:.1f} ms"
    return f"Fastest: no difference beyond noise between {_listed(best)} ({span})."


def _listed(outcomes: Sequence[Outcome]) -> str:
    *others, last = (html.escape(o.label) for o in outcomes)
    return f"{', '.join(others)} and {last}" if others else last


def _over_identity(outcomes: Sequence[Outcome], images: int) -> str:
    """What mixing tokens gains at all, where a backbone without mixing was trained too."""
    without = next((o for o in outcomes if o.name == "identity"), None)
    others = [o for o in outcomes if o is not without]
    if without is None or not others:
        return ""
    above = [o for o in others if more_accurate(o, without, images)]
    label = html.escape(without.label)
    if len(above) == len(others):
        gain = 100 * (min(o.accuracy for o in others) - without.accuracy)
        said = f"All others beat {label}, by at least {gain:.1f} points"
    else:
        said = f"Beyond noise, {_listed(above) if above else 'none'} beats {label}"
    return f"<p>{said} ({label} has {without.accuracy:.1%}).</p>"


def _in_words(number: int) -> str:
    words = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")
    return words[number] if number < len(words) else str(number)


def _table(outcomes: Sequence[Outcome], size: int, images: int, epochs: int) -> str:
    columns = (*SMALL_COLUMNS, *LARGE_COLUMNS)
    groups = (
        f'<tr class="groups"><th></th><th></th><th class="of" colspan="{len(SMALL_COLUMNS)}">at {size}×{size}, as trained</th>'
        f'<th class="of" colspan="{len(LARGE_COLUMNS)}">the same weights at {LARGE_SIZE}×{LARGE_SIZE}</th></tr>'
    )
    heading = "".join(f"<th>{column.heading}</th>" for column in columns)
    best = {c.key: min(o.numbers[c.key] for o in outcomes) for c in columns if c.less}
    for prefix in ("", "large_"):  # what is measured with a clock is best where noise lets it be
        first, *tied = fastest(outcomes, prefix)
        best[f"{prefix}latency_ms"] = -1.0 if tied else first.numbers[f"{prefix}latency_ms"]
    first, *tied = most_accurate(outcomes, images)
    top = -1.0 if tied or epochs == 1 else first.accuracy
    rows = []
    for index, outcome in enumerate(outcomes):
        dot = f'<span class="dot" style="background:{figures.COLOURS[index % len(figures.COLOURS)]}"></span>'
        cells = [f"<td>{dot}{html.escape(outcome.label)}</td>", _cell(f"{outcome.accuracy:.1%}", outcome.accuracy == top)]
        cells += [_cell(c.show(outcome.numbers[c.key]), outcome.numbers[c.key] == best.get(c.key)) for c in columns]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'{SCROLLS}<div class="wide"><table><thead>{groups}<tr><th>mixer</th><th>accuracy</th>{heading}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(text: str, best: bool) -> str:
    return f'<td class="best">{text}</td>' if best else f"<td>{text}</td>"


def _facts(found: dict[str, Any]) -> str:
    recipe, machine = found["recipe"], found["environment"]
    mixers = ", ".join(f"{m['label']} = {m['mixer']} ({m['train_seconds']:.0f} s)" for m in found["mixers"])
    facts = {
        "model": f"{found['model']} {found['table'] or ''}",
        "mixers (training time)": mixers,
        "training": f"{counted(recipe['epochs'], 'epoch')} of {found['data']['train']} samples, batch {recipe['batch_size']}, "
        f"AdamW {recipe['learning_rate']:g}, weight decay {recipe['weight_decay']:g}, cosine after {recipe['warmup']:.0%} "
        f"warm-up, label smoothing {recipe['label_smoothing']:g}, seed {recipe['seed']}",
        "data": f"{found['data']['name']}, fingerprint {found['data']['fingerprint']}",
        "versions": f"regard {machine['regard']}, torch {machine['torch']}, Python {machine['python']}, "
        f"{machine['system']} {machine['machine']}, {counted(int(machine['threads']), 'thread')}",
        "all numbers": "results.json beside this file",
    }
    return "<dl>" + "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v.strip())}</dd>" for k, v in facts.items()) + "</dl>"
