"""Files are whole or absent, and damaged ones are set aside."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from regard.files import check_folder, clear_partials, read_json, read_kept, set_aside, whole_file, write_atomically, write_json

KILLED = """
import os, signal, sys
from pathlib import Path
import regard.files as files
files.os.fsync = lambda number: os.kill(os.getpid(), signal.SIGKILL)
files.write_atomically(Path(sys.argv[1]), "new " * 1000)
"""


def test_json_comes_back(tmp_path: Path) -> None:
    assert read_json(tmp_path / "none.json") is None
    write_json(tmp_path / "deep" / "a.json", {"b": [1, 2.5, "ü"]})
    assert read_json(tmp_path / "deep" / "a.json") == {"b": [1, 2.5, "ü"]}


def test_a_writer_killed_in_the_middle_leaves_the_old_file_and_the_next_one_clears_up(tmp_path: Path) -> None:
    path = write_atomically(tmp_path / "a.txt", "old")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert killed.returncode < 0
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    write_atomically(path, "newest")
    assert [each.read_text() for each in tmp_path.iterdir()] == ["newest"]


def test_a_failing_write_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", object())
    assert list(tmp_path.iterdir()) == []


def test_threads_that_write_the_same_file_do_not_meet(tmp_path: Path) -> None:
    path, errors = tmp_path / "a.txt", []

    def write(letter: str) -> None:
        try:
            for _ in range(100):
                write_atomically(path, letter * 5000)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert path.read_text() in {letter * 5000 for letter in "abcd"}
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_of_the_same_number_left_is_cleared(tmp_path: Path) -> None:
    """In a container every run may be process 1."""
    (tmp_path / f".a.txt.{os.getpid()}-{10**9}").write_text("half")
    with whole_file(tmp_path / "a.txt") as partial:
        partial.write_text("mine")
        clear_partials(tmp_path / "a.txt")
        assert list(tmp_path.iterdir()) == [partial]


def test_a_file_is_replaced_in_one_step_or_not_at_all(tmp_path: Path) -> None:
    path = write_atomically(tmp_path / "a.txt", "old")
    with path.open() as reader:
        write_atomically(path, "new")
        assert reader.read() == "old"  # another file has taken its place; this one was not written to
    with pytest.raises(TypeError), whole_file(path) as partial:
        partial.write_text(b"half" if partial.write_text("half") else "")
    assert [each.read_text() for each in tmp_path.iterdir()] == ["new"]


def test_partial_files_of_living_processes_and_other_files_stay(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stay = {f".a[1].txt.{os.getppid()}", f".a[1].txt.{os.getppid()}-3", ".a[1].txt.old", ".a1.txt.1", "a[1].txt"}
    for name in (*stay, f".a[1].txt.{dead.pid}", f".a[1].txt.{dead.pid}-7", f".a[1].txt.{10**30}"):
        (tmp_path / name).write_text("")
    clear_partials(tmp_path / "a[1].txt")
    assert {each.name for each in tmp_path.iterdir()} == stay


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[1, 2]"])
def test_damaged_json_is_set_aside_and_named(content: bytes, tmp_path: Path) -> None:
    told: list[str] = []
    path = tmp_path / "seconds.json"
    for number in ("", "-2"):
        path.write_bytes(content)
        assert read_kept(path, lambda value: isinstance(value, float), told.append) is None
        assert str(path) in told[-1]
        assert told[-1].endswith(f"set aside as seconds.json.damaged{number}")
        assert "\n" not in told[-1]
        assert (tmp_path / f"seconds.json.damaged{number}").read_bytes() == content
    assert not path.exists()
    path.write_text("1.5")
    assert read_kept(path, lambda value: isinstance(value, float), told.append) == 1.5
    assert len(told) == 2


def test_a_folder_in_place_of_a_file_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(ValueError, match=r"a\.json is not a file"):
        read_json(tmp_path / "a.json")
    assert set_aside(tmp_path / "a.json").is_dir()


def test_a_file_is_no_folder_of_results(tmp_path: Path) -> None:
    (tmp_path / "report").write_text("")
    for path in (tmp_path / "report", tmp_path / "report" / "deep"):
        with pytest.raises(ValueError, match=r"--out must be a folder; .*report.* is a file"):
            check_folder("--out", path)
    assert check_folder("--out", tmp_path / "new" / "deep").is_dir()
