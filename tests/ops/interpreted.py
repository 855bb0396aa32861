"""Tests of Triton kernels without a GPU: Triton reads TRITON_INTERPRET once, when first imported, so they get a process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this process runs kernels under the interpreter."""

TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run_interpreted(file: str, only: str) -> None:
    """Run the tests of a file whose names contain ``only`` in a process with the interpreter, and fail where they do."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", file, "-k", only, "-m", "not slow"]
    done = subprocess.run(command, cwd=root, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
