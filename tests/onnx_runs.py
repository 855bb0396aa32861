"""Export to ONNX, and run the file in onnxruntime."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn


def run_exported(
    model: nn.Module, example: Tensor, others: list[Tensor], open_axes: tuple[int, ...], folder: Path
) -> list[Tensor]:
    """What the exported program gives for other inputs than the one it was traced with."""
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is an extra of the tests")
    pytest.importorskip("onnxscript", reason="onnxscript is an extra of the tests")
    shapes = (dict.fromkeys(open_axes, torch.export.Dim.DYNAMIC),)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        program = torch.onnx.export(model, (example,), dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert program is not None
    program.save(folder / "model.onnx")
    session = runtime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return [torch.from_numpy(np.asarray(session.run(None, {name: other.numpy()})[0])) for other in others]


def assert_near(got: Tensor, expected: Tensor) -> None:
    """Within 1e-4 of the largest number: float32 in another order."""
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
