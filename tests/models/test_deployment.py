"""Backbones outside of torch's eager mode: ONNX files in onnxruntime, int8 linear layers, generated code."""

from __future__ import annotations

import copy

import pytest
import torch
from families import families, image_of_ten_tokens, tiny
from onnx_runs import assert_near, run_exported
from torch import nn

QUICK = ["vit"]


@pytest.mark.parametrize("family", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in families()])
def test_an_onnx_file_gives_the_same_at_another_batch(family: str, tmp_path) -> None:
    """For one size of images: stems and merging choose their padding by it."""
    model = tiny(family).eval()
    image = image_of_ten_tokens(model)
    others = [torch.cat([image, image.flip(-1), image.flip(-2)])]
    (got,) = run_exported(model, torch.cat([image, image]), others, (0,), tmp_path)
    with torch.no_grad():
        assert_near(got, model(others[0]))


@pytest.mark.parametrize("family", ["swin", "nat", "vit", "convit"])
def test_dynamic_quantisation_finds_every_linear_layer(family: str) -> None:
    model = tiny(family).eval()
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    quantised = [path for path, module in small.named_modules() if isinstance(module, torch.ao.nn.quantized.dynamic.Linear)]
    assert quantised == linear
    image = image_of_ten_tokens(model)
    with torch.no_grad():
        expected, got = model(image), small(image)
    assert (got - expected).norm() < 0.3 * expected.norm()  # random weights: eight bits in every layer of a deep model


@pytest.mark.slow
@pytest.mark.parametrize("family", ["swin", "nat", "biformer", "davit", "transnext"])
def test_generated_code_gives_the_same(family: str) -> None:
    """One of windows, neighborhoods, routes, channels and kernels each, through inductor."""
    model = tiny(family).eval()
    image = image_of_ten_tokens(model)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(image), model(image), rtol=1e-3, atol=1e-3)
