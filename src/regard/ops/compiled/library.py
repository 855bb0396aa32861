"""The C sources of this folder as a library for this machine, compiled at first use and kept.

It needs a C compiler with OpenMP (the command that ``CC`` gives, else ``cc``, ``gcc`` or ``clang``), for some seconds, once;
without one, or with ``REGARD_NATIVE=0``, everything runs on torch's operators. So it does after any failure at all, with one
warning that says why. The library lies in ``REGARD_CACHE``, else in the user's cache folder, under a name made of the
source, the compiler and the processor. Its threads are those of torch, where both find the same OpenMP.

What is loaded runs, and a damaged library ends the process: a file is loaded only if it is this user's own, nobody else may
write it, and its size and digest are those noted beside it when a freshly compiled library had passed its trial.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from functools import lru_cache
from pathlib import Path

from ...checks import shown

FOLDER = Path(__file__).parent
SOURCES = (FOLDER.parent / "backends" / "native" / "attention.c", FOLDER.parent / "linear" / "linear.c")
FLAGS = ("-O3", "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-fPIC", "-shared")
KERNELS = ("forward", "backward", "scan", "scan_backward", "memory", "read")
"""Each with a function that says how many numbers of scratch memory a worker needs."""
MACHINE = (("-march=native",), ("-mcpu=native",), ())
"""What makes a compiler use all that the processor has, by compiler and processor; the first that works is taken."""
COMPILE, TRY = 60.0, 60.0
"""Seconds that a compiler, and the trial of what it made, may take."""
LARGEST = 1 << 26
"""Bytes of a library at most."""
PREFIX = f"compiling-{platform.node()}-"
"""Of the folders in which compilers work, followed by the number of their process on this machine."""


class Unavailable(Exception):
    """Why there is no compiled library here."""


class SwitchedOff(Unavailable):
    """There is none by design: nothing to warn of."""


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The library, compiled if it is not there yet.

    Raises:
        Unavailable: it is switched off, there is no compiler, or anything failed.
    """
    if (why := why_not()) is not None:
        raise Unavailable(why)
    found = looked_for()
    assert isinstance(found, ctypes.CDLL)  # why_not is None
    return found


@lru_cache(maxsize=1)
def why_not() -> str | None:
    """None where the library is there, else the reason why not, with a warning the first time."""
    found = looked_for()
    if isinstance(found, ctypes.CDLL):
        return None
    if not isinstance(found, SwitchedOff):
        warnings.warn(f"regard runs on torch's operators, more slowly, as it has no compiled kernels: {found}", stacklevel=2)
    return str(found)


@lru_cache(maxsize=1)
def looked_for() -> ctypes.CDLL | Unavailable:
    """The library or what kept it away; this process asks once."""
    try:
        return _find()
    except Unavailable as error:
        return error
    except Exception as error:  # whatever it is, attention must run all the same
        return Unavailable(f"{type(error).__name__}: {error}")


def _find() -> ctypes.CDLL:
    switch = os.environ.get("REGARD_NATIVE", "")
    if switch == "0":
        raise SwitchedOff("switched off by REGARD_NATIVE=0")
    if switch not in ("", "1"):
        raise Unavailable(f"REGARD_NATIVE must be 0 or 1; got {shown(switch)}")
    if sys.platform == "win32":
        raise SwitchedOff("compiled kernels are for Linux and macOS")
    compiler = _compiler()
    path = _cache() / f"kernels-{_fingerprint(compiler)}.so"
    _clean(path.parent)
    if _is_whole(path):
        try:
            return opened(path)
        except Unavailable:  # made for another system
            pass
    _compile(compiler, path)
    return opened(path)


def opened(path: Path) -> ctypes.CDLL:
    """A compiled library, with the types of what its functions return.

    Raises:
        Unavailable: it cannot be loaded, lacks a function, or lays out its tasks in another way.
    """
    from ..backends.native.attention import Task
    from ..linear.native import Scan

    try:
        loaded = ctypes.CDLL(str(path))
        for name in ("lanes", "task_size", "scan_size", *(f"{kernel}_scratch" for kernel in KERNELS)):
            getattr(loaded, f"regard_{name}").restype = ctypes.c_int64
        for name in KERNELS:
            getattr(loaded, f"regard_{name}").restype = None
    except (OSError, AttributeError) as error:
        raise Unavailable(f"{path} cannot be loaded: {error}") from error
    sizes = loaded.regard_task_size(), loaded.regard_scan_size()
    if sizes != (ctypes.sizeof(Task), ctypes.sizeof(Scan)) or loaded.regard_lanes() not in (4, 8, 16):
        raise Unavailable(f"{path} is not compiled from these sources: it has tasks of {sizes} bytes")
    return loaded


# --------------------------------------------------------------------------------------------------------------------
# the kept file


def _is_whole(path: Path) -> bool:
    """Whether a file is this user's own, closed to others, and has the size and digest noted beside it. Never waits."""
    try:
        noted = _read_own(_note(path)).decode().split()
        content = _read_own(path)
    except (OSError, ValueError):
        return False
    return noted == _described(content)


def _note(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _described(content: bytes) -> list[str]:
    return [hashlib.sha256(content).hexdigest(), str(len(content))]


def _read_own(path: Path) -> bytes:
    """The content of a regular file of this user that nobody else may write, and that is no link.

    Raises:
        OSError: it is not there, or not like that.
    """
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        about = os.fstat(file)
        if not stat.S_ISREG(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o022 or about.st_size > LARGEST:
            raise PermissionError(f"{path} must be a regular file of this user alone")
        return os.read(file, about.st_size)
    finally:
        os.close(file)


def _keep(made: Path, path: Path) -> None:
    """Put a library and its note in their place, each whole or not at all; the note last, for it vouches for the library."""
    made.chmod(0o600)
    note = made.with_suffix(".sha256")
    note.write_text(" ".join(_described(made.read_bytes())))
    note.chmod(0o600)
    for source, target in ((made, path), (note, _note(path))):
        with source.open("rb") as file:
            os.fsync(file.fileno())
        if target.is_dir() and not target.is_symlink():
            target.rename(made.parent / f"{target.name}.aside")
        os.replace(source, target)


def _clean(folder: Path) -> None:
    """Remove what killed compilations left: folders of processes that are gone, or that are older than any compilation."""
    for left in folder.glob("compiling-*"):
        number = left.name.removeprefix(PREFIX).split("-")[0]  # of another machine: no number
        try:
            old = time.time() - left.lstat().st_mtime > 10 * (COMPILE + TRY)
        except OSError:  # another process was faster
            continue
        if old or (number.isdecimal() and not _lives(int(number))):
            shutil.rmtree(left, ignore_errors=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _cache() -> Path:
    """A folder of this user's own: what is loaded from it runs."""
    chosen = os.environ.get("REGARD_CACHE")
    try:
        base = Path(chosen).expanduser() if chosen else _caches_of_user() / "regard"
    except RuntimeError as error:
        raise Unavailable(f"there is no home folder for compiled kernels, REGARD_CACHE names another: {error}") from error
    try:
        base.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise Unavailable(f"the folder {base} for compiled kernels cannot be made: {error}") from error
    about = base.stat()
    if about.st_uid != os.getuid() or about.st_mode & 0o022:
        raise Unavailable(f"the folder {base} for compiled kernels must be this user's alone; REGARD_CACHE names another")
    return base


def _caches_of_user() -> Path:
    """Where programs keep what they can make again; by its definition a relative ``XDG_CACHE_HOME`` does not count."""
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return chosen if chosen.is_absolute() else Path.home() / ".cache"


# --------------------------------------------------------------------------------------------------------------------
# compiling


def _compiler() -> list[str]:
    """The command that compiles, its program by its whole path."""
    named = os.environ.get("CC", "").strip()
    try:
        commands = [shlex.split(named)] if named else [["cc"], ["gcc"], ["clang"]]
    except ValueError as error:
        raise Unavailable(f"CC is no command: {error}; got {shown(named)}") from error
    for command in commands:
        found = shutil.which(command[0]) if command else None
        if found:
            return [found, *command[1:]]
    raise Unavailable(f"there is no C compiler {named!r}" if named else "there is no C compiler: none of cc, gcc, clang")


def _fingerprint(compiler: list[str]) -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
    about = {line for line in lines if line.split(":")[0].strip() in ("model name", "flags", "Features", "CPU part")}
    told = [path.read_text() for path in (*SOURCES, FOLDER / "vectors.h")]
    told += [*FLAGS, *compiler, platform.machine(), *sorted(about)]
    for part in compiler:  # a wrapper, and the compiler that it is given
        if (found := shutil.which(part)) is not None:
            of_file = Path(found).resolve().stat()
            told += [str(of_file.st_size), str(of_file.st_mtime_ns)]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


def _compile(compiler: list[str], path: Path) -> None:
    """Compile for this processor and try what came of it; the file appears whole or not at all."""
    said = ""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{PREFIX}{os.getpid()}-", ignore_cleanup_errors=True) as folder:
        made = Path(folder) / path.name
        for extra in MACHINE:
            command = [*compiler, *FLAGS, *extra, *map(str, SOURCES), "-o", str(made), "-lm"]
            status, output = _run(command, COMPILE, {**os.environ, "TMPDIR": folder})
            if status == 0 and not made.is_file():
                output = "it made no library and said that it did"
            elif status == 0:
                _try(made)
                _keep(made, path)
                return
            said = said or output
    raise Unavailable(f"{shlex.join(compiler)} failed: {said[:500]}")


def _try(made: Path) -> None:
    """Try a library in a process of its own: one that is wrong ends it, or hangs, or computes something else.

    Raises:
        Unavailable: it failed.
    """
    if not sys.executable or getattr(sys, "frozen", False):
        raise Unavailable("a library is tried by a Python of its own, and this program has none")
    # of this program, so not the working directory unless it imports from there
    places = [str(FOLDER.parents[2]), *(place for place in sys.path if isinstance(place, str))]
    begin = f"import sys; sys.path[:] = {places!r}; from regard.ops.compiled.trial import run; run({str(made)!r})"
    environment = {**os.environ, "REGARD_NATIVE": "0", "OMP_NUM_THREADS": "1"}
    status, output = _run([sys.executable, "-c", begin], TRY, environment)
    if status != 0:
        last = output.splitlines()[-1] if output else f"its process ended with {status}"
        raise Unavailable(f"what the C compiler made does not work: {last[:500]}")


def _run(command: list[str], seconds: float, environment: dict[str, str]) -> tuple[int, str]:
    """Status and output of a command, which with all it started ends when its time is over.

    Raises:
        Unavailable: it cannot be started, or took too long.
    """
    with tempfile.TemporaryFile() as output:
        try:
            started = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
            )
        except (OSError, ValueError) as error:
            raise Unavailable(f"{command[0]} failed: {error}") from error
        try:
            status = started.wait(seconds)
        except BaseException as error:
            os.killpg(started.pid, 9)
            started.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise Unavailable(f"{command[0]} failed: it took longer than {seconds:.0f} seconds") from error
            raise
        output.seek(0)
        return status, output.read(1 << 16).decode(errors="replace").strip()
