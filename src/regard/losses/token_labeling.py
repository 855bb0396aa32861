"""Token labeling: every token of an image is classified, as well as the image.

    CE(logits, (1 - s) y + s y')  +  w mean over tokens of CE(token logits, token labels)
where a share s of the image was replaced by tokens of another one, whose labels are y'.
Cost: one classifier per token. Source: Jiang et al., arXiv:2104.10858; Yuan et al., VOLO, arXiv:2106.13112.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def token_labeling_loss(
    logits: Tensor,
    token_logits: Tensor,
    targets: Tensor,
    token_targets: Tensor | None = None,
    *,
    share: float = 0.0,
    token_weight: float = 0.5,
) -> Tensor:
    """Cross entropy of images and of their tokens, both against soft labels.

    Args:
        logits: ``(batch, classes)``.
        token_logits: ``(batch, rows, columns, classes)``.
        targets: ``(batch, classes)``, of the images before mixing.
        token_targets: ``(batch, rows, columns, classes)``; by default each token has the label of its image.
        share: of the tokens of each image that come from the batch in reverse order; only the logits of images know of it,
            those of tokens were put back.
        token_weight: of the second term.

    Raises:
        ValueError: shapes that do not go together, a share outside 0 to 1.
    """
    batch, classes = logits.shape
    if token_targets is None:
        token_targets = targets[:, None, None].expand(*token_logits.shape[:3], -1)
    dense = (batch, *token_logits.shape[1:3], classes)
    if targets.shape != logits.shape or token_logits.shape != dense or token_targets.shape != dense:
        told = ", ".join(str(tuple(t.shape)) for t in (token_logits, targets, token_targets))
        raise ValueError(f"logits {(batch, classes)} need token logits, targets and token targets of their sizes; got {told}")
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share must be from 0 to 1; got {share}")
    mixed = (1.0 - share) * targets + share * targets.flip(0)
    tokens = F.cross_entropy(token_logits.flatten(0, 2), token_targets.flatten(0, 2))
    return F.cross_entropy(logits, mixed) + token_weight * tokens
