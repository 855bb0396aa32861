"""Head importance: what changes when a head's output is set to zero before the projection that joins the heads.

Cost: a forward pass per head. Source: Li et al., "How Does
Attention Work in Vision Transformers? A Visual Analytics Attempt", arXiv:2303.13731.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...ops.calls.observe import in_this_thread


def heads_of(model: nn.Module) -> dict[str, int]:
    """The attentions of a model that join heads by a projection ``proj``: their paths, and how many heads each has."""
    found = {}
    for name, module in model.named_modules():
        heads = getattr(module, "heads", None) or getattr(module, "num_heads", None)
        proj = getattr(module, "proj", None)
        if isinstance(heads, int) and isinstance(proj, nn.Module) and getattr(proj, "in_features", 1) % heads == 0:
            found[name] = heads
    return found


@contextmanager
def without_heads(model: nn.Module, heads: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Set the outputs of some heads to zero while the context is entered, after the softmax and before the projection.

    Args:
        model: see :func:`heads_of`.
        heads: for paths of attentions, the heads that are silenced.

    Raises:
        ValueError: an unknown path, or a head that the attention does not have.
    """
    known = heads_of(model)
    handles = []
    for name, silenced in heads.items():
        if name not in known:
            raise ValueError(f"{name!r} is no attention with a projection of its heads; there are {', '.join(known) or 'none'}")
        if not all(0 <= head < known[name] for head in silenced):
            raise ValueError(f"heads of {name!r} are 0 to {known[name] - 1}; got {list(silenced)}")
    try:
        for name, silenced in heads.items():
            proj = model.get_submodule(f"{name}.proj" if name else "proj")
            handles.append(proj.register_forward_pre_hook(in_this_thread(_silence(known[name], silenced))))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _silence(heads: int, silenced: Sequence[int]) -> Callable:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        joined, *rest = args
        kept = torch.ones(heads, dtype=joined.dtype, device=joined.device)
        kept[list(silenced)] = 0.0
        return ((joined.unflatten(-1, (heads, -1)) * kept[:, None]).flatten(-2), *rest)

    return hook


@dataclass(frozen=True, eq=False)
class HeadImportance:
    """What is lost without a head, or with no other in its layer: one number per head, averaged over images, in float64.

    Attributes:
        heads: ``(path, head)`` of each.
        probability: how much less probable the class is.
        divergence: Jensen-Shannon divergence of the two answers, in nats.
        kl: Kullback-Leibler divergence of the answer without from that with it, in nats.
        representation: Euclidean distance of what is classified.
        accuracy: how much less accurate; None without labels.
        flips: share of images that are classified otherwise.
    """

    heads: tuple[tuple[str, int], ...]
    probability: Tensor
    divergence: Tensor
    kl: Tensor
    representation: Tensor
    accuracy: Tensor | None
    flips: Tensor

    def ranked(self, by: str = "divergence") -> list[tuple[str, int]]:
        """The heads, the most important first."""
        values = getattr(self, by, None)
        if not isinstance(values, Tensor):
            raise ValueError(f"by must name one of the measures that are there; got {by!r}")
        return [self.heads[i] for i in values.argsort(descending=True, stable=True).tolist()]


def head_importance(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    layers: Sequence[str] | None = None,
    alone: bool = False,
    batch_size: int = 64,
) -> HeadImportance:
    """Remove one head at a time.

    Args:
        model: a classifier; put it in evaluation mode first.
        images: ``(n, channels, height, width)``.
        labels: ``(n,)``; by default the class that the whole model answers.
        layers: paths of the attentions to look into, see :func:`heads_of`; all by default.
        alone: keep a head and remove all others of its layer, instead of the head.
        batch_size: images at once.

    Raises:
        ValueError: no attention of that path, see :func:`without_heads`; labels of another number.
    """
    known = heads_of(model)
    chosen = list(known) if layers is None else list(layers)
    if not chosen or not set(chosen) <= set(known):
        raise ValueError(f"layers must be among {', '.join(known) or 'none'}; got {chosen}")
    if labels is not None and labels.shape != images.shape[:1]:
        raise ValueError(f"expected labels ({len(images)},); got {tuple(labels.shape)}")
    logits, before = _answers(model, images, batch_size)
    whole = logits.log_softmax(-1)
    answered = whole.argmax(-1)
    target = answered if labels is None else labels
    heads, lines = [], []
    for name in chosen:
        for head in range(known[name]):
            silenced = [other for other in range(known[name]) if (other == head) != alone]
            with without_heads(model, {name: silenced}):
                logits, after = _answers(model, images, batch_size)
            lines.append(_changes(whole, logits.log_softmax(-1), target, (before - after).norm(dim=-1).mean()))
            heads.append((name, head))
    probability, divergence, kl, distance, accuracy, flips = torch.stack(lines, 1)
    return HeadImportance(tuple(heads), probability, divergence, kl, distance, None if labels is None else accuracy, flips)


def _answers(model: nn.Module, images: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Logits, and what they are made of (the logits themselves where the model does not tell), in float64."""
    logits, features = [], []
    head = getattr(model, "forward_head", None)
    with torch.no_grad():
        for part in images.split(batch_size):
            if head is None:
                answer = before = model(part)
            else:
                tokens = model.forward_features(part)  # type: ignore[operator]  # goes with forward_head
                answer, before = head(tokens), head(tokens, pre_logits=True)
            logits.append(answer.double())
            features.append(before.double())
    return torch.cat(logits), torch.cat(features)


def _changes(whole: Tensor, without: Tensor, target: Tensor, distance: Tensor) -> Tensor:
    middle = torch.logaddexp(whole, without) - math.log(2.0)
    js = 0.5 * (_kl(whole, middle) + _kl(without, middle))
    at = target[:, None]
    drop = (whole.exp().gather(1, at) - without.exp().gather(1, at)).mean()
    accuracy = (whole.argmax(-1) == target).double().mean() - (without.argmax(-1) == target).double().mean()
    flips = (whole.argmax(-1) != without.argmax(-1)).double().mean()
    return torch.stack([drop, js.mean(), _kl(whole, without).mean(), distance, accuracy, flips])


def _kl(first: Tensor, second: Tensor) -> Tensor:
    """Of log probabilities."""
    return (first.exp() * (first - second)).sum(-1)
