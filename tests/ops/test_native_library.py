"""The library of compiled kernels: made once, verified before it is loaded, and never in the way of an attention."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import regard
from regard import attend
from regard.ops.compiled import library

pytestmark = pytest.mark.skipif(
    library.why_not() is not None, reason=f"needs a C compiler that works here: {library.why_not()}"
)


def forget() -> None:
    for kept in (library.library, library.why_not, library.looked_for):
        kept.cache_clear()


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """As in a process that has not looked for the library yet, with an empty folder for it."""
    monkeypatch.setenv("REGARD_CACHE", str(tmp_path / "kernels"))
    forget()
    yield tmp_path / "kernels"
    forget()


def script(path: Path, *lines: str) -> str:
    """A compiler of these lines of shell; ``$out`` is what it should make."""
    begin = ["#!/bin/sh", 'out=""; for word in "$@"; do [ "$last" = -o ] && out="$word"; last="$word"; done']
    path.write_text("\n".join([*begin, *lines, ""]))
    path.chmod(0o755)
    return str(path)


def attention_is_right() -> None:
    q = torch.randn(1, 9, 9, 2, 8)
    torch.testing.assert_close(attend(q, q, q, "window(3)"), attend(q, q, q, "window(3)", backend="reference"))


def files(folder: Path) -> set[str]:
    return {path.suffix for path in folder.iterdir()}


def test_it_is_compiled_once_and_leaves_nothing_else(cache):
    assert library.why_not() is None
    assert cache.stat().st_mode & 0o077 == 0
    assert files(cache) == {".so", ".sha256"}
    (made,) = cache.glob("*.so")
    stamp = made.stat().st_mtime_ns
    forget()
    assert library.library().regard_lanes() in (4, 8, 16)
    assert made.stat().st_mtime_ns == stamp
    attention_is_right()


FAILURES = {
    "no such compiler": ("no-such-compiler", "there is no C compiler 'no-such-compiler'"),
    "no such wrapper": ("no-such-wrapper gcc", "there is no C compiler 'no-such-wrapper gcc'"),
    "half a quotation": ("'gcc", "CC is no command"),
    "fails": ("false", "failed"),
    "says that it did": ("true", "it made no library"),
    "makes a text": (['echo "not a library" > "$out"'], "does not work"),
    "makes a library without kernels": (['echo "int x;" | gcc -shared -fPIC -x c - -o "$out"'], "cannot be loaded"),
    "makes a library of other tasks": (
        ['for name in lanes task_size scan_size forward_scratch backward_scratch scan_scratch scan_backward_scratch',
         'do functions="$functions long regard_$name(void) { return 8; }"; done',
         'for name in memory_scratch read_scratch forward backward scan scan_backward memory read',
         'do functions="$functions long regard_$name(void) { return 8; }"; done',
         'echo "$functions" | gcc -shared -fPIC -x c - -o "$out"'],
        "is not compiled from these sources",
    ),
    "ends the process": (['echo "__attribute__((constructor)) void f(void) { *(volatile int *)0 = 1; }" | '
                          'gcc -shared -fPIC -x c - -o "$out"'], "ended with -11"),
    "computes another logarithm": (['exec gcc -Dlogf=expf "$@"'], "is off by"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILURES, ids=str)
def test_whatever_a_compiler_does_attention_runs_with_one_warning(case, cache, monkeypatch, tmp_path):
    compiler, reason = FAILURES[case]
    monkeypatch.setenv("CC", compiler if isinstance(compiler, str) else script(tmp_path / "compiler", *compiler))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        attention_is_right()
        attention_is_right()
    assert len(told) == 1
    assert reason in str(told[0].message)
    assert reason in regard.backends()["native"]
    with pytest.raises(library.Unavailable):
        library.library()
    assert not list(cache.glob("*"))


def test_plans_say_why_it_is_not_used(cache, monkeypatch):
    monkeypatch.setenv("CC", "false")
    with pytest.warns(UserWarning, match="false failed"):
        plan = regard.plan("neighborhood(7)", (56, 56))
    assert plan.backend == "tiled"
    assert "failed" in plan.others["native"]
    q = torch.randn(1, 9, 9, 2, 8)
    with pytest.raises(ValueError, match="backend 'native' cannot run this call"):
        attend(q, q, q, "window(3)", backend="native")


def test_switched_off_there_is_nothing_to_warn_of(cache, monkeypatch):
    monkeypatch.setenv("REGARD_NATIVE", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention_is_right()
    assert library.why_not() == "switched off by REGARD_NATIVE=0"
    assert not cache.exists()


def test_a_switch_that_is_neither_on_nor_off_is_named(cache, monkeypatch):
    monkeypatch.setenv("REGARD_NATIVE", "false")
    with pytest.warns(UserWarning, match="REGARD_NATIVE must be 0 or 1; got str 'false'"):
        attention_is_right()
    assert not cache.exists()


@pytest.mark.parametrize(("name", "value", "place"), [
    ("REGARD_CACHE", "~/kernels", "kernels"),
    ("XDG_CACHE_HOME", "relative", ".cache/regard"),
    ("XDG_CACHE_HOME", "", ".cache/regard"),
])  # fmt: skip
def test_it_lies_in_the_home_folder_wherever_the_program_runs(name, value, place, cache, monkeypatch, tmp_path):
    monkeypatch.delenv("REGARD_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    assert library._cache() == tmp_path / place
    assert not (tmp_path / "relative").exists()
    assert not (tmp_path / "~").exists()


def test_the_trial_imports_nothing_from_the_working_directory(cache, good, monkeypatch, tmp_path):
    for name in ("random", "torch", "regard"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    library._try(good)
    assert not (tmp_path / "ran").exists()


def test_a_compiler_that_hangs_is_ended_with_all_it_started(cache, monkeypatch, tmp_path):
    monkeypatch.setattr(library, "COMPILE", 0.5)
    monkeypatch.setenv("CC", script(tmp_path / "slow", f'sleep 600 & echo $! > "{tmp_path}/child"', "wait"))
    start = time.monotonic()
    with pytest.warns(UserWarning, match="longer than"):
        attention_is_right()
    assert time.monotonic() - start < 30
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child of the compiler lives")
    assert not list(cache.glob("*"))


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def forbidden(**_) -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


def full(*_) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("case", ["no home", "full disk", "folder that cannot be written", "home that is a file"])
def test_without_a_place_for_it_attention_runs_with_one_warning(case, cache, monkeypatch, tmp_path):
    if case == "no home":
        for name in ("REGARD_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(Path, "home", no_home)
    elif case == "full disk":
        monkeypatch.setattr(library, "_try", lambda made: None)
        monkeypatch.setenv("CC", script(tmp_path / "quick", 'echo > "$out"'))
        monkeypatch.setattr(os, "fsync", full)
    elif case == "home that is a file":
        (tmp_path / "file").touch()
        monkeypatch.setenv("REGARD_CACHE", str(tmp_path / "file" / "kernels"))
    else:  # a mode would not hold root back
        monkeypatch.setattr(library.tempfile, "TemporaryDirectory", forbidden)
    with pytest.warns(UserWarning, match="no compiled kernels") as told:
        attention_is_right()
    assert len(told) == 1


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722])
def test_a_folder_that_others_may_write_is_not_loaded_from(cache, mode):
    cache.mkdir()
    cache.chmod(mode)
    with pytest.warns(UserWarning, match="must be this user's alone"):
        attention_is_right()


@pytest.fixture(scope="module")
def good() -> Path:
    """A library that works, for compilers that copy it."""
    return Path(library.library()._name)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "header alone": lambda path: os.truncate(path, 64),
    "cut short": lambda path: os.truncate(path, 40_000),
    "last page missing": lambda path: os.truncate(path, path.stat().st_size - 4096),
    "text": lambda path: path.write_bytes(b"not a library"),
    "a bit that turned": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x55"),
    "another, of another digest": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "others may write it": lambda path: path.chmod(0o666),
    "gone": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir(), (path / "file").touch()),
    "a fifo": lambda path: (path.unlink(), os.mkfifo(path)),
    "a link": lambda path: (path.rename(path.with_suffix(".other")), path.symlink_to(path.with_suffix(".other"))),
    "a note that is gone": lambda path: path.with_suffix(".sha256").unlink(),
    "a note of nothing": lambda path: path.with_suffix(".sha256").write_bytes(b"\xff\xfe"),
    "a note that is a fifo": lambda path: (path.with_suffix(".sha256").unlink(), os.mkfifo(path.with_suffix(".sha256"))),
    "a note that is a folder": lambda path: (path.with_suffix(".sha256").unlink(), path.with_suffix(".sha256").mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES, ids=str)
def test_what_is_damaged_is_made_again(damage, cache, good, monkeypatch, tmp_path):
    monkeypatch.setattr(library, "_try", lambda made: None)  # the copy of one that works
    compiler = script(tmp_path / "copies", f'cp {good} "$out"', f'echo >> "{tmp_path}/calls"')
    monkeypatch.setenv("CC", f"{compiler} -with 'an argument'")
    assert library.why_not() is None
    (path,) = cache.glob("*.so")
    content = path.read_bytes()
    path.unlink()  # which this process has loaded
    path.write_bytes(content)
    path.chmod(0o600)
    DAMAGES[damage](path)
    forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert library.why_not() is None
    attention_is_right()
    assert (tmp_path / "calls").read_text() == "\n\n"
    assert path.read_bytes() == good.read_bytes()
    assert not path.is_symlink()
    assert path.stat().st_mode & 0o077 == 0
    forget()
    assert library.why_not() is None
    assert (tmp_path / "calls").read_text() == "\n\n"
    assert files(cache) <= {".so", ".sha256", ".other"}


def test_what_killed_compilations_left_is_cleaned(cache, good, monkeypatch, tmp_path):
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    cache.mkdir(mode=0o700)
    dead, alive = (cache / f"{library.PREFIX}{process}-abc" for process in (done.pid, os.getppid()))
    old, elsewhere, odd = (
        cache / f"compiling-{name}-abc" for name in ("another-machine-1", "another-machine-2", f"{library.PREFIX[10:]}²")
    )
    for folder in (dead, alive, old, elsewhere, odd):
        folder.mkdir()
        (folder / "kernels.so").touch()
    os.utime(old, (0, 0))
    monkeypatch.setattr(library, "_try", lambda made: None)
    monkeypatch.setenv("CC", script(tmp_path / "copies", f'cp {good} "$out"'))
    assert library.why_not() is None
    assert {path for path in cache.iterdir() if path.is_dir()} == {alive, elsewhere, odd}


def test_there_is_one_warning_in_a_process(tmp_path):
    """Of the default filters, from the first import to the last call."""
    lines = "import torch, regard; q = torch.randn(1, 6, 6, 1, 4)\nfor _ in range(3): regard.attend(q, q, q, 'window(3)')"
    environment = {**os.environ, "CC": "no-such-compiler", "REGARD_CACHE": str(tmp_path)}
    environment.pop("REGARD_NATIVE", None)
    done = subprocess.run([sys.executable, "-c", lines], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr.count("there is no C compiler 'no-such-compiler'") == 1
