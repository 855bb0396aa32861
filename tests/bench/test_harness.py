"""Timing: variants take turns, failures stay rows, files are whole whatever happens."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time

import pytest
import torch

from regard.bench import harness
from regard.bench.harness import Book, Contest, Effort, Variant, error, interleave, measure, summary, threads, worst_error
from regard.bench.peers import PEERS, choose_peers, parse_peers, peers_folder, pip_command


def test_variants_take_turns_and_a_slow_one_sits_out_after_its_least_rounds(monkeypatch) -> None:
    order: list[str] = []

    def slow() -> None:
        order.append("slow")
        time.sleep(0.02)

    monkeypatch.setattr(harness, "QUICK", 0.01)
    found = interleave({"slow": slow, "quick": lambda: order.append("quick")}, repeats=5, seconds=0.03, least=2)
    first, warm = ["slow", "quick"], ["slow", "quick", "quick"]  # the first round is not timed, and quick runs are warmed up
    assert order == first * 2 + warm + ["quick", "quick"] * 3
    assert found["slow"]["repeats"] == 2
    assert found["quick"]["repeats"] == 5
    assert found["slow"]["ms"] >= 20.0


def test_summary_has_the_quartiles_in_milliseconds() -> None:
    values = [0.004, 0.001, 0.002, 0.010, 0.003]
    found = summary(values)
    assert found == {"ms": 3.0, "q1": 2.0, "q3": 4.0, "repeats": 5}
    assert found["ms"] == 1e3 * statistics.median(values)
    assert summary([0.5]) == {"ms": 500.0, "q1": 500.0, "q3": 500.0, "repeats": 1}


def test_error_is_relative_and_that_of_the_worst() -> None:
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert error(torch.tensor([3.0, 4.5]), truth) == pytest.approx(0.1)
    assert worst_error([truth, 2 * truth], [truth, truth]) == pytest.approx(1.0)


def test_a_failing_variant_has_its_reason_and_the_others_their_numbers() -> None:
    def broken() -> None:
        raise RuntimeError("no\nsuch kernel")

    contest = Contest(
        "sum",
        {"size": 3},
        {
            "ours": Variant(lambda: time.sleep(0.002), peer=False),
            "broken": Variant(broken),
            "twice": Variant(lambda: time.sleep(0.02), error=lambda result: 0.5),
            "of twice": Variant(lambda: time.sleep(0.02), against="twice"),
        },
    )
    case = measure(contest, Effort(repeats=3, seconds=0.0))
    rows = {row["variant"]: row for row in case["rows"]}
    assert rows["broken"]["failed"] == "RuntimeError: no such kernel"
    assert "ms" not in rows["broken"]
    assert (rows["ours"]["ratio"], rows["ours"]["error"], rows["ours"]["peer"]) == (1.0, None, False)
    assert rows["twice"]["ratio"] == round(rows["twice"]["ms"] / rows["ours"]["ms"], 2)
    assert rows["twice"]["error"] == 0.5
    assert rows["of twice"]["ratio"] == round(rows["of twice"]["ms"] / rows["twice"]["ms"], 2)
    assert (case["case"], case["size"], case["threads"]) == ("sum", 3, torch.get_num_threads())


@pytest.mark.parametrize("training", [False, True])
def test_gradients_are_taken_only_in_training(training: bool) -> None:
    seen: list[bool] = []
    measure(Contest("c", {}, {"a": Variant(lambda: seen.append(torch.is_grad_enabled()))}, training), Effort(2, 0.0))
    assert seen == [training] * 4  # once before all, two that are timed, and one before the second of these


def test_threads_are_set_and_put_back() -> None:
    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_book_replaces_what_is_measured_anew_and_keeps_the_rest(tmp_path) -> None:
    path = tmp_path / "machine" / "operators.json"
    book = Book(path)
    book.put({"case": "a", "threads": 1, "rows": [1]})
    book.put({"case": "a", "threads": 2, "rows": [2]})
    again = Book(path)
    again.put({"case": "a", "threads": 1, "rows": [3], "left_out": ["x"], "time_exponent": 2.0})
    again.put({"case": "b", "threads": 1, "rows": [4]})
    content = json.loads(path.read_text())
    assert [(case["case"], case["threads"], case["rows"]) for case in content["cases"]] == [
        ("a", 1, [3]), ("a", 2, [2]), ("b", 1, [4]),
    ]  # fmt: skip
    assert all(case["versions"]["torch"] == torch.__version__ and case["measured"] for case in content["cases"])
    assert content["machine"]["cores"] == os.cpu_count()
    Book(path, fresh=True).put({"case": "c", "rows": []})
    assert [case["case"] for case in json.loads(path.read_text())["cases"]] == ["c"]


def test_a_killed_run_keeps_the_cases_it_has(tmp_path) -> None:
    command = [sys.executable, "-m", "regard.cli", "bench", "ops", "--smoke", "--threads", "1", "--peers", "none"]
    process = subprocess.Popen([*command, "--out", str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("neighborhood, forward: ")  # told once it is written
    process.send_signal(signal.SIGKILL)
    process.wait()
    (file,) = tmp_path.glob("*/operators.json")
    cases = json.loads(file.read_text())["cases"]
    assert cases[0]["case"] == "neighborhood, forward"
    assert all(row["error"] < 1e-6 for row in cases[0]["rows"])


def test_peers_are_named_or_those_that_are_here() -> None:
    assert parse_peers("here") is None
    assert parse_peers("none") == ()
    assert parse_peers("flex, timm") == ("flex", "timm")
    with pytest.raises(ValueError, match="unknown peers 'tim'; there are flex, timm, natten, or 'here' or 'none'"):
        parse_peers("tim,flex")
    assert "flex" in choose_peers(None)
    assert choose_peers(()) == ()


def test_an_absent_peer_is_not_installed_but_its_command_told(monkeypatch) -> None:
    monkeypatch.setitem(PEERS, "absent_library", type(PEERS["timm"])(("absent-library==1.0",), ("--some-option",)))
    with pytest.raises(ModuleNotFoundError) as told:
        choose_peers(("flex", "absent_library"))
    command = pip_command(["absent_library"])
    assert " ".join(command[1:]) in str(told.value)
    options = ["--no-deps", "--some-option", "--upgrade", "--target", str(peers_folder())]
    assert command[1:] == ["-m", "pip", "install", *options, "absent-library==1.0"]
