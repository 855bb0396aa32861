"""The C sources of this folder as a library for this machine, compiled at first use and kept.

It needs a C compiler with OpenMP (the one ``CC`` names, else ``cc``, ``gcc`` or ``clang``), for two seconds, once; without one,
or with ``REGARD_NATIVE=0``, everything runs on torch's operators. The library lies in ``REGARD_CACHE``, else in the
user's cache folder, under a name made of the source, the compiler and the processor. Its threads are those of torch, where both
find the same OpenMP.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = (FOLDER / "attention.c", FOLDER / "linear.c")
FLAGS = ("-O3", "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-fPIC", "-shared")
KERNELS = ("forward", "backward", "scan", "scan_backward", "memory", "read")
"""Each with a function that says how many numbers of scratch memory a worker needs."""
MACHINE = (("-march=native",), ("-mcpu=native",), ())
"""What makes a compiler use all that the processor has, by compiler and processor; the first that works is taken."""


class Unavailable(Exception):
    """Why there is no compiled library here."""


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The library, compiled if it is not there yet.

    Raises:
        Unavailable: it is switched off, there is no compiler, or it failed.
    """
    if os.environ.get("REGARD_NATIVE", "1") == "0":
        raise Unavailable("switched off by REGARD_NATIVE=0")
    if sys.platform == "win32":
        raise Unavailable("compiled kernels are for Linux and macOS")
    compiler = _compiler()
    path = _cache() / f"kernels-{_fingerprint(compiler)}.so"
    if path.exists():
        try:
            return opened(path)
        except Unavailable:  # made elsewhere, or damaged
            pass
    _compile(compiler, path)
    return opened(path)


def opened(path: Path) -> ctypes.CDLL:
    """A compiled library, with the types of what its functions return."""
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"{path} cannot be loaded: {error}") from error
    for name in ("lanes", "task_size", "scan_size", *(f"{kernel}_scratch" for kernel in KERNELS)):
        getattr(loaded, f"regard_{name}").restype = ctypes.c_int64
    for name in KERNELS:
        getattr(loaded, f"regard_{name}").restype = None
    return loaded


@lru_cache(maxsize=1)
def why_not() -> str | None:
    """None where the library is there, else the reason why not."""
    try:
        library()
    except Unavailable as error:
        return str(error)
    return None


def _compiler() -> str:
    named = os.environ.get("CC")
    for name in [named] if named else ["cc", "gcc", "clang"]:
        found = shutil.which(name)
        if found:
            return found
    raise Unavailable(f"there is no C compiler {named!r}" if named else "there is no C compiler: none of cc, gcc, clang")


def _cache() -> Path:
    """A folder of this user's own: what is loaded from it runs."""
    chosen = os.environ.get("REGARD_CACHE")
    base = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "regard"
    try:
        base.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise Unavailable(f"the folder {base} for compiled kernels cannot be made: {error}") from error
    if base.stat().st_uid != os.getuid() or base.stat().st_mode & 0o022:
        raise Unavailable(f"the folder {base} for compiled kernels must be this user's alone; REGARD_CACHE names another")
    return base


def _fingerprint(compiler: str) -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
    about = {line for line in lines if line.split(":")[0].strip() in ("model name", "flags", "Features", "CPU part")}
    stat = Path(compiler).resolve().stat()
    told = [path.read_text() for path in (*SOURCES, FOLDER / "vectors.h")]
    told += [*FLAGS, compiler, str(stat.st_size), str(stat.st_mtime_ns), platform.machine(), *sorted(about)]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


def _compile(compiler: str, path: Path) -> None:
    """Compile for this processor; the file appears whole or not at all."""
    said = ""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        for extra in MACHINE:
            command = [compiler, *FLAGS, *extra, *map(str, SOURCES), "-o", str(made), "-lm"]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise Unavailable(f"{compiler} failed: {error}") from error
            if done.returncode == 0:
                os.replace(made, path)
                return
            said = said or done.stderr.strip()
    raise Unavailable(f"{compiler} failed: {said[:500]}")
