"""Files are whole or absent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from regard.train.files import read_json, write_atomically, write_json

KILLED = """
import os, signal, sys
from pathlib import Path
import regard.train.files as files
files.os.fsync = lambda number: os.kill(os.getpid(), signal.SIGKILL)
files.write_atomically(Path(sys.argv[1]), "new " * 1000)
"""


def test_json_comes_back(tmp_path: Path) -> None:
    assert read_json(tmp_path / "none.json") is None
    write_json(tmp_path / "deep" / "a.json", {"b": [1, 2.5, "ü"]})
    assert read_json(tmp_path / "deep" / "a.json") == {"b": [1, 2.5, "ü"]}


def test_a_writer_killed_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_atomically(tmp_path / "a.txt", "old")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert killed.returncode < 0
    assert path.read_text() == "old"


def test_a_failing_write_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", object())
    assert list(tmp_path.iterdir()) == []
