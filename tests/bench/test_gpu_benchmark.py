"""The GPU benchmark runs on a CPU with tiny sizes: every variant, the errors, the files."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_gpu_benchmark_runs_on_tiny_sizes(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/gpu/run.py", "--smoke", "--out", tmp_path, "correctness", "11", "15"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    def rows(name: str) -> list[dict]:
        return json.loads((tmp_path / f"{name}.json").read_text())["cases"]

    right = {(row["case"], row["backend"]) for row in rows("correctness") if row.get("right")}
    backends = ("dense", "tiled", "triton", "triton, descriptors")
    assert right >= {(case, name) for case in ("neighborhood(3)", "blocks") for name in backends}
    assert not [row for row in rows("correctness") if "failed" in row or row.get("right") is False]
    (case,) = rows("case-11")
    found = {row["variant"]: row for row in case["rows"]}
    assert max(found[name]["error"] for name in ("triton", "triton, descriptors", "tiled")) < 1e-5
    assert "failed" in found["all pairs, cuDNN"]  # there is none on a CPU: recorded, and the run went on
    assert rows("case-15")[0]["rows"][0]["images_per_s"] > 0
