"""Mixers outside of torch's eager mode: ONNX files in onnxruntime at other sizes, and int8 linear layers."""

from __future__ import annotations

import copy

import pytest
import torch
from contract import randomise
from onnx_runs import assert_near, run_exported
from torch import nn

from regard import create_mixer, list_mixers

FIXED = {
    "bi_level_routing": "the blocks of its routes are numbers",
    "grid": "the spacing of its keys is a number",
    "hilo": "whether its windows divide the grid decides what is pooled",
    "outlook": "windows are unfolded by index tables of the grid",
    "sparsifiner": "how many keys a query keeps is a number",
}
"""Mixers that are exported for one grid, and why; the batch is open."""
QUICK = ["channel_group", "identity", "multi_head"]
GRID, OTHER = (8, 9), (11, 10)


def make(name: str) -> nn.Module:
    return randomise(create_mixer(name, dim=16, heads=2)).eval()


def mixers() -> list[object]:
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow, id=name) for name in list_mixers()]


@pytest.mark.parametrize("name", mixers())
def test_an_onnx_file_gives_the_same_at_another_batch_and_size(name: str, tmp_path) -> None:
    mixer = make(name)
    fixed = name in FIXED
    others = [torch.randn(3, *grid, 16) for grid in ((GRID,) if fixed else (GRID, OTHER, (9, 13)))]
    found = run_exported(mixer, torch.randn(2, *GRID, 16), others, (0,) if fixed else (0, 1, 2), tmp_path)
    with torch.no_grad():
        for got, other in zip(found, others, strict=True):
            assert_near(got, mixer(other))


@pytest.mark.parametrize("name", ["bi_level_routing", "hilo", "outlook"])
def test_an_open_grid_is_refused_where_the_mechanism_needs_its_numbers(name: str) -> None:
    axes = dict.fromkeys((0, 1, 2), torch.export.Dim.DYNAMIC)
    with pytest.raises(ValueError, match="export it with fixed sizes; the batch may be left open"):
        torch.export.export(make(name), (torch.randn(2, *GRID, 16),), dynamic_shapes=(axes,))


@pytest.mark.parametrize("name", list_mixers())
def test_dynamic_quantisation_finds_every_linear_layer(name: str) -> None:
    torch.manual_seed(0)
    mixer = create_mixer(name, dim=32, heads=4).eval()
    linear = [path for path, module in mixer.named_modules() if isinstance(module, nn.Linear)]
    small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(mixer), {nn.Linear}, dtype=torch.qint8)
    quantised = [path for path, module in small.named_modules() if isinstance(module, torch.ao.nn.quantized.dynamic.Linear)]
    assert quantised == linear
    x, extra, context = torch.randn(2, 8, 9, 32), torch.randn(2, 3, 32), torch.randn(2, 8, 9, 32)
    with torch.no_grad():
        for given, named in (((x,), {}), ((x, extra), {"context": context})):
            expected, got = mixer(*given, **named), small(*given, **named)
            expected, got = (y[0] if isinstance(y, tuple) else y for y in (expected, got))
            limit = 0.3 if name in ("sparsifiner", "bi_level_routing") else 0.1  # rounding may choose other keys
            assert (got - expected).norm() < limit * expected.norm()
