"""Other libraries to compare with; none of them is a dependency."""

from __future__ import annotations

from types import ModuleType

import pytest

from regard.bench.peers import load_timm


def timm() -> ModuleType:
    """timm, or the reason to skip.

    It lies in a folder of its own: where torchvision can be found but not imported, torchmetrics and Lightning cannot either.
    """
    try:
        return load_timm()
    except ImportError as error:
        pytest.skip(f"timm cannot be imported: {error}")
