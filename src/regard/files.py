"""Files that are whole or absent: written under another name and renamed in one step; damaged files are set aside."""

from __future__ import annotations

import itertools
import json
import os
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_LETTERS = 200
"""Of a name that the name of its partial file repeats: file systems allow 255."""
_COUNT = itertools.count()
_WRITTEN: set[int] = set()
"""Numbers of the partial files that this process writes just now, in any of its threads."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to: it becomes ``path`` in one step at the end of the block, and vanishes if that fails.

    A reader, or a killed writer, never leaves half a file. Creates the folder, and removes what killed writers left there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_partials(path)
    number = next(_COUNT)
    partial = path.with_name(f"{_beginning(path)}{os.getpid()}-{number}")
    _WRITTEN.add(number)
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
        _WRITTEN.discard(number)


def write_atomically(path: Path, content: str | bytes) -> Path:
    """Write a file so that a reader, or a killed writer, never leaves half of it; creates its folder."""
    with whole_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_json(path: Path, value: Any) -> Path:
    return write_atomically(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """What :func:`write_json` wrote, or None if there is no such file.

    Raises:
        ValueError: it is no file, or not json; names it.
    """
    if not path.exists():
        return None
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {one_line(error)}") from None


def read_kept(path: Path, valid: Callable[[Any], bool], tell: Callable[[str], None]) -> Any:
    """Read what :func:`write_json` wrote, or None; a damaged file is set aside and reported.

    Args:
        path: of the file.
        valid: whether a value is what the file should hold.
        tell: is given the sentence.
    """
    try:
        found = read_json(path)
    except ValueError as error:
        found, reason = None, str(error)
    else:
        if found is None or valid(found):
            return found
        found, reason = None, f"{path} does not hold what was written there"
    tell(f"{reason}; it was set aside as {set_aside(path).name}")
    return found


def set_aside(path: Path) -> Path:
    """Rename a damaged file or folder to ``NAME.damaged``, or with a number where that is taken; returns the new path."""
    aside, count = path.with_name(f"{path.name}.damaged"), 2
    while os.path.lexists(aside):
        aside, count = path.with_name(f"{path.name}.damaged-{count}"), count + 1
    return path.rename(aside)


def clear_partials(path: Path) -> None:
    """Remove the partial files of ``path`` that processes left which are no more."""
    if os.name != "posix":  # asking whether a process lives would end it
        return
    for found in path.parent.glob(f"{_escaped(_beginning(path))}*"):
        numbers = _NUMBERS.fullmatch(found.name.removeprefix(_beginning(path)))
        if numbers and not _is_written(int(numbers[1]), int(numbers[2] or -1)) and found.is_file():
            found.unlink(missing_ok=True)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made where there is none, so that no other process does; a process that ends lets go.

    Raises:
        ValueError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".held", "a") as file:
        if os.name == "posix":
            import fcntl

            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise ValueError(f"another process works in {folder}: wait for it, or choose another folder") from None
            except OSError:  # a file system without locks
                pass
        yield


def check_folder(name: str, path: Path) -> Path:
    """Make sure that a folder is there and can be written to, before work is done whose results go there.

    Raises:
        ValueError: it is a file, or cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"{name} must be a folder; {path} is a file, or lies in one") from None
    except OSError as error:
        raise ValueError(f"{name}: the folder {path} cannot be made: {error.strerror or error}") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise ValueError(f"{name}: the folder {path} cannot be written to")
    return path


_INSIDE = (AttributeError, LookupError, RecursionError, struct.error)
"""What readers raise at damaged files in words of their insides."""


def one_line(error: BaseException, most: int = 200) -> str:
    """What an error says, in one line without control characters; its kind where it says nothing of the file."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    text = " ".join("".join(c if c.isprintable() else " " for c in plain).split())
    if not text or isinstance(error, _INSIDE):
        text = f"what is in it is damaged ({type(error).__name__})"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _beginning(path: Path) -> str:
    """Of the names of the partial files of a path; the number of the process that writes follows, and that of the file."""
    return f".{path.name[:_LETTERS]}."


def _escaped(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)


_NUMBERS = re.compile(r"([0-9]+)(?:-([0-9]+))?")
"""Of the process that writes a partial file, and which of its files it is."""


def _is_written(process: int, number: int) -> bool:
    """Whether somebody still writes a partial file; in a container the process before may have had this one's number."""
    return number in _WRITTEN if process == os.getpid() else _lives(process)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user
        return True
    return True
