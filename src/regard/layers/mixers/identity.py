"""The identity: y = x. The baseline that mixes nothing.

Cost: none. Source: Yu et al., MetaFormer baselines, arXiv:2210.13452.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ...checks import checked
from .base import AttentionMixer, TokenMixer
from .registry import register_mixer


@register_mixer("identity", label="no mixing")
class IdentityMixer(TokenMixer):
    """Returns what it is given.

    Args:
        dim, heads: taken so that it may stand in for any mixer.
        **projections: likewise, those of :class:`AttentionMixer`.
    """

    joins_extra = False
    hands_to: ClassVar[type] = AttentionMixer

    @checked()
    def __init__(self, dim: int, heads: int = 1, **projections) -> None:
        super().__init__(dim, heads)

    def forward(self, x: Tensor, extra: Tensor | None = None, *, context: Tensor | None = None) -> Any:
        self.check_tokens(x, extra, context)
        return x if extra is None else (x, extra)
