"""Attention modules of diffusers: a module with a ``processor`` that computes it, whichever that is.

Processors take what their signature names and drop the rest, positions among it; so none is replaced. They, and the dispatcher
that some of them ask, end in ``scaled_dot_product_attention`` or in a softmax and a product (see :mod:`.functional`). A backend
of the dispatcher that does not is refused where nothing may be missed.
"""

from __future__ import annotations

from torch import nn


def is_diffusers(module: nn.Module) -> bool:
    """Whether a module is attention of diffusers."""
    return (
        callable(getattr(module, "processor", None))
        and hasattr(module, "set_processor")
        and hasattr(module, "heads")
        and type(module).__module__.startswith("diffusers.")
    )
