"""The expressions that the guide gives as targets of adapters name projections of attention, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from families import families, tiny
from torch import nn

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "models.md"
CONVOLUTIONAL = {"efficientvit_msra", "shvit", "convshare_vit", "overlock"}
OWN = {"halonet": "HaloNet"}
WITHOUT = {"tic": "its layers are no projections of a mixer by that name"}


def expression(beginning: str) -> str:
    (line,) = [line for line in GUIDE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {beginning}")]
    return re.search(r"`(.*)`", line).group(1).replace(r"\|", "|")


@pytest.mark.parametrize("family", [name for name in families() if name not in WITHOUT])
def test_the_guides_expression_names_projections_and_no_stem(family: str) -> None:
    kind, begin = (nn.Conv2d, "EfficientViT") if family in CONVOLUTIONAL else (nn.Linear, OWN.get(family, "all whose"))
    wanted = re.compile(expression(begin))
    found = {name: module for name, module in tiny(family).named_modules() if wanted.fullmatch(name)}
    assert found
    assert all(isinstance(module, kind) for module in found.values()), found
    assert not [name for name in found if "stem" in name or "head" in name.split(".")]
