"""The command line, as its user meets it: a process, its output and its exit code."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

import pytest

import regard
from regard.catalog import listing
from regard.cli import main
from regard.layers.mixers import list_mixers
from regard.listing import listed
from regard.listing import rows as all_rows


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "regard.cli", *arguments], capture_output=True, text=True, check=False)


def called(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(left.value.code or 0), out, err


def test_version_is_printed(capsys) -> None:
    assert called(capsys, "--version") == (0, f"regard {regard.__version__}\n", "")


@pytest.mark.parametrize("command", ["demo", "compare", "plan", "mixers", "explain"])
def test_help_leaves_out_bounds_that_nobody_meets(command: str, capsys) -> None:
    code, out, _ = called(capsys, command, "--help")
    assert code == 0
    assert "--" in out
    assert not any(str(most) in out for most in (2**31 - 1, 2**32 - 1, 65536, 2**24))


def test_process_says_an_error_in_one_line_and_exits_with_2() -> None:
    done = run("plan", "neighbourhod(7)")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("regard: ")
    assert done.stderr.count("\n") == 1


def test_closed_streams_and_narrow_encodings_change_no_answer() -> None:
    command = f"{sys.executable} -m regard.cli"
    for line, code in (("systems >&-", 0), ("models none >&- 2>&- <&-", 2), ("systems > /dev/null", 0)):
        narrow = os.environ | {"PYTHONIOENCODING": "ascii"}
        done = subprocess.run(["sh", "-c", f"{command} {line}"], capture_output=True, text=True, check=False, env=narrow)
        assert (done.returncode, done.stderr) == (code, ""), line
    done = subprocess.run([sys.executable, "-m", "regard.cli", "models", b"\xff"], capture_output=True, text=True, check=False)
    assert done.stderr.startswith("regard: no model matches '\\udcff'")


def test_no_arguments_show_the_commands(capsys) -> None:
    code, out, _ = called(capsys)
    assert code == 0
    for command in ("demo", "compare", "systems", "mixers", "models", "plan"):
        assert command in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bogus",), "No such command 'bogus'"),
        (("plan",), "Missing argument"),
        (("plan", "window(7)", "--grid", "5y5"), "grid must be positive numbers joined by x, such as 56x56; got '5y5'"),
        (("plan", "window(7)", "--dtype", "int3"), "unknown dtype 'int3'; there are float32"),
        (("plan", "window(7)", "--heads", "0"), "Invalid value for '--heads'"),
        (("mixers", "zzz*"), "no mixer matches 'zzz*'; there are"),
        (("models", "zzz*"), "no model matches 'zzz*'"),
        (("models", "swim"), "no model matches 'swim'; did you mean swin_"),
        (("mixers", "windw"), "no mixer matches 'windw'; did you mean window?"),
        (("mixers", "--dim", "-3"), "Invalid value for '--dim'"),
        (("mixers", "--dim", "5", "--heads", "2"), "dim"),
        (("plan", "window(7)", "--grid", "99999999999x99999999999"), "grid must have at most 16,777,216 tokens"),
        (("plan", "window(7)", "--grid", "9" * 5000), "grid must have at most"),
        (("plan", "window(7)", "--heads", "99999999999999999999"), "Invalid value for '--heads'"),
        (("plan", "window(7)", "--device", "abacus"), "unknown device 'abacus'"),
        (("plan", "window(7)", "--tiles", "0x4/4"), "tiles must be a query tile and a key tile"),
        (("demo", "--minutes", "nan"), "minutes must be a positive number; got nan"),
        (("demo", "--epochs", "-1"), "Invalid value for '--epochs'"),
        (("demo", "--seed", "-1"), "Invalid value for '--seed'"),
        (("demo", "--seed", "99999999999999999999"), "Invalid value for '--seed'"),
        (("demo", "--out", __file__), "--out must be a folder"),
        (("demo", "--runs", f"{__file__}/runs"), "--runs must be a folder"),
        (("compare", "--data", "embedded", "--mixers", "window", "--out", __file__), "--out must be a folder"),
        (("compare", "--data", "embedded", "--mixers", "window", "--learning-rate", "-1"), "learning rate must be a positive"),
        (("compare", "--data", "embedded", "--mixers", "window", "--learning-rate", "inf"), "learning rate must be a positive"),
        (("compare", "--data", "embedded", "--mixers", "window", "--batch-size", "0"), "Invalid value for '--batch-size'"),
        (("compare", "--data", "embedded", "--mixers", "window", "--workers", "100000"), "Invalid value for '--workers'"),
        (("compare", "--data", "embedded", "--mixers", "window", "--size", "7"), "Invalid value for '--size'"),
        (("compare", "--data", "embedded", "--mixers", "window", "--size", "1000000"), "Invalid value for '--size'"),
        (("compare", "--data", "embedded", "--mixers", "window", "--limit", "0"), "Invalid value for '--limit'"),
        (("compare", "--data", "embedded", "--mixers", ""), "expected mixers such as"),
        (("compare", "--data", "embedded", "--mixers", "window("), "brackets do not match"),
        (("compare", "--data", "embedded", "--mixers", "window,window"), "mixer window is listed twice"),
        (("compare", "--data", "embedded", "--mixers", "window(window_size=0)"), "window_size"),
        (("compare", "--data", "embedded", "--mixers", "window(window_size='a')"), "window_size"),
        (("compare", "--data", "embedded", "--mixers", "neighborhood(kernel_size=99999999999999999999)"), "kernel_size"),
        (("bench", "ops", "--threads", "0"), "threads must be numbers from 1 to 999"),
        (("bench", "ops", "--threads", "99999"), "threads must be numbers from 1 to 999"),
        (("bench", "ops", "--minutes", "-1"), "minutes must be a positive number; got -1"),
        (("bench", "ops", "--peers", "tim"), "unknown peers 'tim'"),
        (("bench", "ops", "windw"), "unknown cases 'windw'"),
        (("bench", "models", "swim"), "swim"),
        (("bench", "page", "--results", "/nowhere/at/all"), "/nowhere/at/all"),
        (("app", "--port", "0"), "Invalid value for '--port'"),
        (("systems", "--area", "nowhere"), "unknown area 'nowhere'; there are"),
        (("demo", "--epochs", "0"), "Invalid value for '--epochs'"),
        (("demo", "--minutes", "-1"), "minutes must be a positive number; got -1"),
        (("demo", "--device", "abacus"), "device 'abacus' cannot be used here"),
        (("compare", "--data", "/nowhere/at/all", "--mixers", "window"), "no data at /nowhere/at/all"),
        (("compare", "--data", "embedded", "--mixers", "windw"), "unknown mixer 'windw'; did you mean window"),
        (("compare", "--data", "embedded", "--mixers", "window", "--model", "swim_tiny"), "unknown model 'swim_tiny'"),
        (("compare", "--data", "embedded", "--mixers", "window(size=3)"), "mixer window has no option size"),
    ],
)
def test_what_the_user_got_wrong_is_one_line(capsys, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = called(capsys, *arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in out + err


LIGHT = """
import sys
from regard.cli import main
try:
    main({arguments})
except SystemExit as left:
    code = left.code
loaded = [name for name in ("torch", "numpy", "lightning") if name in sys.modules]
sys.exit(f"loaded {{loaded}}" if loaded else code)
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["compare", "--help"], 0),
        (["--version"], 0),
        (["models"], 0),
        (["models", "swim"], 2),
        (["mixers", "--json"], 0),
        (["systems"], 0),
        (["plan", "window(7)", "--grid", "x"], 2),
        (["demo", "--minutes", "0"], 2),
        (["nothing"], 2),
    ],
)
def test_what_needs_no_tensors_does_not_load_torch(arguments, code) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIGHT.format(arguments=arguments)], capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == code, done.stderr


def test_listing_is_what_the_registries_say() -> None:
    assert (resources.files("regard") / "listing.json").read_text(encoding="utf-8") == listing(), "run `make listing`"


@pytest.mark.parametrize("command", ["systems", "mixers", "models"])
def test_lists_on_a_terminal_break_no_words_and_fill_no_line_of_more_than_its_width(command, capsys, monkeypatch) -> None:
    rows = {"systems": all_rows, "mixers": lambda: listed("mixers"), "models": lambda: listed("models")}[command]()
    words = {word for row in rows for key in ("name", "title", "what", "cost") for word in str(row.get(key, "")).split()}
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = called(capsys, command)
    assert max(map(len, out.splitlines())) <= 80
    assert words <= set(out.split())


@pytest.mark.parametrize("command", ["systems", "mixers", "models"])
def test_lists_in_a_pipe_have_a_line_a_row_and_no_colours(command) -> None:
    done = run(command)
    rows = json.loads(run(command, "--json").stdout)
    lines = done.stdout.splitlines()
    assert len(lines) == 1 + len(rows)
    assert "\x1b" not in done.stdout
    for line, row in zip(lines[1:], rows, strict=True):
        assert row["name"] in line
        assert row.get("title", row.get("cost", "")) in line


def interrupted(arguments: Sequence[str], when: Callable[[str], bool], stream: str = "stderr") -> tuple[int, str, str]:
    """What is left of a process that gets Ctrl-C after a line that it prints, or that says what it imports."""
    shown = ["-v"] if stream == "stderr" else []
    process = subprocess.Popen(
        [sys.executable, *shown, "-u", "-m", "regard.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # the tests themselves may not listen to it
    )
    told = []
    for line in getattr(process, stream):
        told.append(line)
        if when(line):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    if stream == "stdout":
        return process.returncode, "".join(told) + out, err
    kept = [line for line in err.splitlines() if not re.match(r"import |# |extension module", line)]
    return process.returncode, out, "\n".join(kept)


@pytest.mark.parametrize("module", ["'typer'", "'regard.commands'", "'numpy'", "'torch._C'", "'torch.nn.modules.module'"])
def test_interrupt_while_modules_are_loaded_is_one_line(module, tmp_path) -> None:
    arguments = ["compare", "--data", "embedded", "--mixers", "window", "--out", str(tmp_path), "--runs", str(tmp_path)]
    code, out, err = interrupted(arguments, lambda line: line.startswith(f"import {module}"))
    assert code == 130
    assert out == ""
    assert err in ("stopped", "stopped; the same command goes on from here")


def test_plan_prints_what_plan_returns(capsys) -> None:
    code, out, _ = called(
        capsys, "plan", "neighborhood(7,dilation=2)", "--grid", "56x40", "--heads", "4", "--head-dim", "32"
    )  # fmt: skip
    assert code == 0
    assert out.strip() == str(regard.plan("neighborhood(7,dilation=2)", (56, 40), heads=4, head_dim=32))


def test_plan_as_json_has_the_exact_pairs(capsys) -> None:
    _, out, _ = called(capsys, "plan", "window(7)", "--grid", "14x14", "--heads", "2", "--json")
    assert json.loads(out)["attended_pairs"] == 2 * 196 * 49


def test_mixers_are_listed_with_parameters_and_paper(capsys) -> None:
    _, out, _ = called(capsys, "mixers", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert sorted(rows) == list_mixers()
    assert rows["multi_head"]["params"] == 4 * 64 * 64 + 4 * 64
    assert rows["window"]["arxiv"] == "2103.14030"
    assert all(row["what"] and row["cost"] for row in rows.values())


def test_models_are_listed_with_parameters_and_paper(capsys) -> None:
    _, out, _ = called(capsys, "models", "swin_tiny*", "--json")
    (row, *_) = json.loads(out)
    assert row == {"name": "swin_tiny_patch4_window7_224", "params": 28288354, "gmacs": 4.5, "size": 224, "arxiv": "2103.14030"}


def test_systems_are_listed_by_area(capsys) -> None:
    _, out, _ = called(capsys, "systems", "--json")
    rows = json.loads(out)
    assert rows
    assert {"id", "slug", "name", "title", "arxiv", "year", "kind", "area", "entry", "sizes", "exempt"} <= rows[0].keys()
    area = rows[0]["area"]
    _, out, _ = called(capsys, "systems", "--area", area, "--json")
    assert json.loads(out) == [row for row in rows if row["area"] == area]


def test_compare_on_an_image_folder_writes_a_report_and_does_not_repeat_it(capsys, tmp_path: Path) -> None:
    from PIL import Image

    from regard.data import photograph

    for name in ("chelsea", "coffee"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for n in range(8):
            pixels = photograph(name)[:, 20 * n : 20 * n + 16, 9 * n : 9 * n + 16].permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{n}.png")
    arguments = ["compare", "--data", str(tmp_path / "data"), "--mixers", "window(window_size=4),identity", "--epochs", "1",
                 "--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs"), "--batch-size", "4",
                 "--device", "cpu"]  # fmt: skip
    code, out, err = called(capsys, *arguments)
    assert code == 0, err
    assert out.splitlines()[-1] == f"report: {tmp_path / 'out' / 'index.html'}"
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [mixer["name"] for mixer in found["mixers"]] == ["window(window_size=4)", "identity"]
    assert found["data"]["classes"] == ["chelsea", "coffee"]
    trained = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("*.safetensors")}
    assert len(trained) == 2
    called(capsys, *arguments)
    assert {file: file.stat().st_mtime_ns for file in trained} == trained


def test_interrupted_comparison_keeps_what_it_has_and_the_same_command_goes_on(tmp_path: Path) -> None:
    arguments = ["compare", "--data", "embedded", "--size", "16", "--mixers", "identity,window(window_size=4)", "--epochs", "1",
                 "--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs"), "--device", "cpu"]  # fmt: skip
    code, out, err = interrupted(arguments, lambda line: "window" in line, stream="stdout")
    assert code == 130
    assert err.splitlines()[-1] == "stopped; the same command goes on from here"
    assert "Traceback" not in err
    assert "identity: accuracy" in out.replace("no mixing", "identity")
    assert "stopped before its first checkpoint; it will begin anew" in out or "window (window_size=4): kept after" in out
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert "no mixing: kept from an earlier run: accuracy" in done.stdout
    assert "window (window_size=4): accuracy" in done.stdout
