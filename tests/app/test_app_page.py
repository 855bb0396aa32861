"""What the page shows of settings and clicks, without a browser."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import pytest

pytest.importorskip("gradio", reason="the playground needs regard[app]")

from regard.app import launch, page
from regard.app.compare import Choice, Cost, Setting, look

TYPED = ("neighborhood", {"kernel_size": "3"})


def test_click_is_row_and_column_of_the_picture() -> None:
    place = page.place_of(SimpleNamespace(index=[100, 7]))  # gradio gives x before y
    assert place == pytest.approx((7.5 / 448, 100.5 / 448))
    assert page.place_of(SimpleNamespace(index=[447, 0])) is not None
    assert page.place_of(SimpleNamespace(index=[3, 448])) is None  # on the legend
    assert page.place_of(SimpleNamespace(index=[448, 3])) is None


def test_an_address_that_cannot_be_listened_on_is_told() -> None:
    with pytest.raises(ValueError, match="no address 'no host' to listen on"):
        launch("no host", 7860)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"cannot listen on 127.0.0.1:{port}: it is taken .*--port"):
            launch("127.0.0.1", port)


def test_strongest_keys_are_named_by_row_then_column() -> None:
    view = look(Setting(grid=14, dim=32, heads=2), Choice("neighborhood", (("kernel_size", 3),)), (0.99, 0.01))
    shown = page.facts(view)
    y, x, weight = view.strongest[0]
    assert (y >= 11, x <= 2) == (True, True)
    assert f"row {y}, column {x}" in shown
    assert float(view.heat[y, x]) == pytest.approx(weight)


def test_costs_stand_in_the_row_of_their_mechanism() -> None:
    def costing(n: int) -> Cost:
        return Cost(
            flops=n * 1e6,
            attention_flops=n * 1e3,
            memory=n,
            milliseconds=n,
            speedup=n,
            tile_speedup=n / 2,
            backend="x",
            params=n,
        )

    rows = page.costs([("A first", costing(3)), ("B <b>", costing(5))]).split("<tr>")[2:]
    assert "<td>A first</td><td>3 M</td><td>3 k</td><td>3B</td><td>3 ms</td><td>3.0 x</td><td>1.5 x</td>" in rows[0]
    assert "<td>B &lt;b&gt;</td><td>5 M</td>" in rows[1]


@pytest.mark.parametrize("path", ["/etc/shadow.safetensors", "../x.safetensors", " x.safetensors#part", "folder"])
def test_visitors_of_other_machines_open_no_files(path) -> None:
    with pytest.raises(ValueError, match="only where the page is served to this machine alone"):
        page.choice_of(TYPED, path, files=False)
    assert page.choice_of(TYPED, path, files=True).file == path.strip()
    assert page.choice_of(TYPED, "", files=False).file == ""


def test_what_is_not_ours_is_escaped() -> None:
    bad = "<script>alert(1)</script>"
    for shown in (page.wrong(ValueError(bad)), page.hint(bad), page._told(f"{bad}\n\n    {bad}")):
        assert "<script" not in shown
        assert "&lt;script" in shown


def test_docstrings_become_paragraphs_and_formulas() -> None:
    told = page._told("One line\ngoes on.\n\n    y = a < b\n    z = 2\nAfter.")
    assert told == '<p>One line goes on.</p><div class="formula">y = a &lt; b<br>z = 2</div><p>After.</p>'
