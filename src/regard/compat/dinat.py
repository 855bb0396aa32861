"""transformers' DiNAT, whose attention hands its tensors over with their axes in the wrong order from version 4.54 on.

NATTEN's functions take ``(batch, heads, rows, columns, head_dim)``. These versions give them
``(batch, columns, rows, heads, head_dim)``, with NATTEN as with regard, and fail or mix heads with places. Nothing in such a
tensor tells the two orders apart, so it has to be asked for: :func:`mend` puts the axes right inside transformers.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .natten.functional import natten2dav, natten2dqkrpb


def mend() -> bool:
    """Make transformers' DiNAT call regard's functions with the axes in the right order; for this process.

    ``regard.compat.natten.install()`` comes first, for transformers checks that there is a ``natten``.

    Returns:
        Whether the installed version had the axes wrong.

    Raises:
        ImportError: transformers is not installed.
        RuntimeError: a version that hands over neither of the two orders.
    """
    try:
        from transformers.models.dinat import modeling_dinat
    except ImportError as error:
        raise ImportError("mending transformers' DiNAT needs transformers: pip install transformers") from error
    wrong = _is_wrong(modeling_dinat)
    modeling_dinat.natten2dqkrpb = _scores if wrong else natten2dqkrpb
    modeling_dinat.natten2dav = _sums if wrong else natten2dav
    return wrong


def _exchanged(tensor: Tensor) -> Tensor:
    """``(batch, columns, rows, heads, dim)`` to ``(batch, heads, rows, columns, dim)``."""
    return tensor.transpose(1, 3)


def _scores(query: Tensor, key: Tensor, rpb: Tensor, kernel_size: int, dilation: int) -> Tensor:
    return natten2dqkrpb(_exchanged(query), _exchanged(key), rpb, kernel_size, dilation)


def _sums(attn: Tensor, value: Tensor, kernel_size: int, dilation: int) -> Tensor:
    return natten2dav(attn, _exchanged(value), kernel_size, dilation)


class _Seen(Exception):
    """Carries the shape that a query had."""


def _is_wrong(modeling: Any) -> bool:
    """Whether the attention of transformers hands over its axes in the wrong order, by asking it."""

    def look(query: Tensor, *_: object) -> Tensor:
        raise _Seen(tuple(query.shape))

    before = modeling.natten2dqkrpb
    config = SimpleNamespace(qkv_bias=True, attention_probs_dropout_prob=0.0)
    attention = modeling.NeighborhoodAttention(config, dim=4, num_heads=2, kernel_size=3, dilation=1)
    modeling.natten2dqkrpb = look
    try:
        attention(torch.zeros(1, 5, 7, 4))
    except _Seen as seen:
        shape = seen.args[0]
    finally:
        modeling.natten2dqkrpb = before
    if shape not in ((1, 2, 5, 7, 2), (1, 7, 5, 2, 2)):
        raise RuntimeError(f"transformers' DiNAT hands over a map of 5 x 7 tokens with 2 heads of 2 channels as {shape}")
    return shape == (1, 7, 5, 2, 2)
