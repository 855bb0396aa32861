"""Damaged files of a comparison are set aside, told of, and what they held comes back."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from regard.compare import compare_on
from regard.compare.demo import demo


def histories(folder: Path) -> list:
    return [mixer["history"] for mixer in json.loads((folder / "report" / "results.json").read_text())["mixers"]]


def test_damaged_files_of_finished_runs_are_set_aside_and_come_back(miniature, tmp_path: Path) -> None:
    shutil.copytree(miniature.folder, tmp_path / "copy")
    copy = replace(miniature, folder=tmp_path / "copy")
    before = histories(copy.folder)
    runs = sorted(path.parent for path in copy.folder.rglob("result.json"))
    (runs[0] / "result.json").write_text('{"history": [')
    (runs[0] / "seconds.json").write_text("[]")
    (runs[1] / "result.json").write_text("3")
    (runs[2] / "model.safetensors").write_bytes(b"\0" * 20)
    damaged = [runs[0] / "result.json", runs[0] / "seconds.json", runs[1] / "result.json", runs[2] / "model.safetensors"]
    told = copy.again().told
    for path in damaged:
        assert [line for line in told if str(path) in line and f"set aside as {path.name}.damaged" in line], path
        assert path.with_name(f"{path.name}.damaged").is_file()
        assert path.is_file()
    assert histories(copy.folder) == before


def test_a_file_in_place_of_the_folder_of_the_report_is_found_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for options in ({"out": tmp_path / "file"}, {"out": tmp_path / "report", "runs": tmp_path / "file"}):
        with pytest.raises(ValueError, match=r"--(out|runs) must be a folder; .*file is a file"):
            demo(**options, epochs=1, progress=False)
        with pytest.raises(ValueError, match=r"--(out|runs) must be a folder; .*file is a file"):
            compare_on("embedded", "window", **options, epochs=1, progress=False)
