"""Other libraries to compare with; none of them is a dependency."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

_KEPT: list[torch.library.Library] = []  # operators live as long as the library that defines them
_TORCHVISION_OPERATORS = (
    "nms",
    "qnms",
    "roi_align",
    "_roi_align_backward",
    "roi_pool",
    "_roi_pool_backward",
    "ps_roi_align",
    "_ps_roi_align_backward",
    "ps_roi_pool",
    "_ps_roi_pool_backward",
    "deform_conv2d",
    "_deform_conv2d_backward",
)


def timm() -> ModuleType:
    """timm, or the reason to skip.

    It lies in a folder of its own: where torchvision can be found but not imported, torchmetrics and Lightning cannot either.

    timm imports torchvision, which registers shape functions for its compiled operators; next to a torch build that they were
    not compiled for they are missing, and no model here needs them, so that empty schemas do.
    """
    if (folder := str(Path(sys.prefix) / "peers")) not in sys.path:
        sys.path.append(folder)
    if importlib.util.find_spec("torchvision") and not _KEPT and not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        for name in _TORCHVISION_OPERATORS:
            library.define(f"{name}() -> ()")
        _KEPT.append(library)
    return pytest.importorskip("timm", exc_type=ImportError)
