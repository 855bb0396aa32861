"""The commands, on tiny sizes: every variant computes what it should, and files and page follow."""

from __future__ import annotations

import json
from pathlib import Path

import peers
import pytest
import torch

from regard.bench.backbones import ENTRIES, build, build_timm
from regard.bench.cases import Scope
from regard.cli import main


def called(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(left.value.code or 0), out, err


def cases_of(folder: Path, name: str) -> list[dict]:
    (file,) = folder.glob(f"*/{name}.json")
    return json.loads(file.read_text())["cases"]


SMOKE = ("--smoke", "--threads", "1", "--peers", "none")


def test_operators_equal_float64_in_every_variant_and_become_a_page(capsys, tmp_path) -> None:
    code, out, _ = called(capsys, "bench", "ops", *SMOKE, "--out", str(tmp_path / "results"))
    assert code == 0
    assert "results: " in out
    cases = cases_of(tmp_path / "results", "operators")
    assert {case["case"].partition(",")[0] for case in cases} == {
        "neighborhood", "window with bias", "criss-cross", "axial", "routed blocks", "causal linear", "linear over all keys",
        "neighborhood with bias by NATTEN's interface",
    }  # fmt: skip
    for case in cases:
        for row in case["rows"]:
            assert "failed" not in row, (case["case"], row)
            if "ms" in row and "softmax, SDPA" not in row["variant"]:
                assert row["error"] < 2e-6, (case["case"], row)
    grown = cases_of(tmp_path / "results", "growth")
    assert all([row["side"] for row in case["rows"]] == [8, 11, 16] for case in grown), "none failed or was left out"
    page = tmp_path / "docs" / "benchmarks.md"
    code, out, _ = called(capsys, "bench", "page", "--results", str(tmp_path / "results"), "--out", str(page))
    assert code == 0
    assert str(page) in out
    assert "### How cost grows" in page.read_text()


def test_backbones_equal_float64_in_inference_and_training(capsys, tmp_path) -> None:
    code, _, _ = called(capsys, "bench", "models", *SMOKE, "--out", str(tmp_path))
    assert code == 0
    inference, training = cases_of(tmp_path, "models")
    assert (inference["case"], training["case"]) == ("backbones, inference", "backbones, training step")
    for row in (*inference["rows"], *training["rows"]):
        assert row["error"] < 1e-5, row
        assert row["gflops"] > 0
    dense = {row["variant"]: row["gflops"] for row in inference["rows"]}
    assert dense["DiNAT-T, dense attention"] > dense["DiNAT-T, regard"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ops", "windoww"), "unknown cases 'windoww'; there are neighborhood, window,"),
        (("models", "swan-t"), "unknown backbones 'swan-t'; there are swin-t, dinat-t,"),
        (("ops", "--threads", "0"), "threads must be numbers from 1 to 999 joined by commas, such as 1,2; got '0'"),
        (("ops", "--minutes", "0"), "minutes must be a positive number; got 0"),
        (("ops", "--peers", "nattn"), "unknown peers 'nattn'; there are flex, timm, natten"),
        (("page", "--results", "/nowhere/at/all"), "no results under /nowhere/at/all"),
    ],
)
def test_what_the_user_got_wrong_is_one_line(capsys, arguments, message) -> None:
    code, out, err = called(capsys, "bench", *arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in out + err


def test_no_time_leaves_all_cases_out(capsys, tmp_path) -> None:
    code, out, _ = called(capsys, "bench", "ops", "axes", *SMOKE, "--minutes", "1e-9", "--out", str(tmp_path))
    assert code == 0
    assert out.count("a case was left out: no time is left") == 2
    assert not list(tmp_path.glob("*/*.json"))


@pytest.mark.peer
@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry.timm], ids=lambda entry: entry.label)
def test_backbones_of_timm_carry_our_weights(entry) -> None:
    peers.timm()
    ours = build(entry, Scope(), False)
    theirs = build_timm(entry, ours, False)
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs(image), rtol=1e-4, atol=1e-5)
