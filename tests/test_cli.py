"""The command line, as its user meets it: a process, its output and its exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import regard
from regard.cli import main
from regard.layers.mixers import list_mixers


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "regard.cli", *arguments], capture_output=True, text=True, check=False)


def called(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(left.value.code or 0), out, err


def test_version_is_printed(capsys) -> None:
    assert called(capsys, "--version") == (0, f"regard {regard.__version__}\n", "")


def test_process_says_an_error_in_one_line_and_exits_with_2() -> None:
    done = run("plan", "neighbourhod(7)")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("regard: ")
    assert done.stderr.count("\n") == 1


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
        (("systems", "--area", "nowhere"), "unknown area 'nowhere'; there are"),
        (("demo", "--epochs", "0"), "Invalid value for '--epochs'"),
        (("demo", "--minutes", "-1"), "minutes must be positive; got -1"),
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
