"""Relevance: attention weighted by the gradient of what the model answers.

    A~ = mean over heads of max(0, dy/dA * A),   R <- R + A~ R   from the first layer to the last, R = I at the start

Cost: a forward and a backward pass, and the maps once. Source: Chefer et al., arXiv:2103.15679 (the rule for self-attention),
arXiv:2012.09838.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import INTEGERS, check_integer, check_tensor, shown
from .capture import capture
from .captured import Map, Maps
from .layered import Shares, beginning, steps_of, walk
from .rollout import kind_of

Target = int | Tensor | Callable[[Any], Tensor] | None


def relevance(
    model: nn.Module,
    images: Tensor,
    target: Target = None,
    start: object = None,
    *,
    layers: str | Sequence[str] = "*",
    limit: int = 2 << 30,
) -> Shares:
    """How much each cell of the image speaks for an answer.

    Args:
        model: a classifier; put it in evaluation mode first.
        images: ``(batch, channels, height, width)``.
        target: the class, one for each image or one for all; or what makes a number per image ``(batch,)`` of the model's
            output. The most probable class by default.
        start: the token that the answer is read from, see :func:`regard.lens.layered.beginning`.
        layers: whose attention counts, see :func:`regard.lens.capture`.
        limit: bytes of queries, keys and values to keep at most.

    Returns:
        :class:`Shares` ``(batch, 1, *grid)`` of the finest grid. What the start token has of itself is among them.

    Raises:
        ValueError: see :func:`regard.lens.capture` and :func:`regard.lens.layered.walk`; a class that does not exist.
    """
    maps = backward(model, images, target, layers=layers, limit=limit)
    return relevance_of(maps, start)


def backward(
    model: nn.Module, images: Tensor, target: Target = None, *, layers: str | Sequence[str] = "*", limit: int = 2 << 30
) -> Maps:
    """The attention of a model with the gradients of its answer; gradients of parameters are left alone.

    Args:
        model, images, target, layers, limit: see :func:`relevance`.
    """
    check_tensor("images", images, what="(batch, channels, height, width)")
    if 0 in images.shape:
        raise ValueError(f"expected images (batch, channels, height, width); got {tuple(images.shape)}")
    with torch.enable_grad(), capture(model, layers=layers, kinds="attention", gradients=True, limit=limit) as maps:
        images = images.detach().requires_grad_()
        answer = chosen_answer(model(images), target)
        torch.autograd.grad(answer.sum(), images)
    return maps


def chosen_answer(output: Any, target: Target) -> Tensor:
    """The number per image ``(batch,)`` that a target means."""
    if callable(target) and not isinstance(target, Tensor):
        return target(output)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise ValueError(f"expected logits (batch, classes), or a target that makes a number of the output; got {type(output)}")
    if target is None:
        return logits.amax(-1)
    if isinstance(target, Tensor):
        index = check_tensor("target", target, INTEGERS).to(logits.device, torch.int64)
    elif isinstance(target, Sequence) and not isinstance(target, (str, bytes)):
        index = torch.tensor([check_integer("each of target", each, None) for each in target], device=logits.device)
    else:
        index = torch.tensor(check_integer("target", target, None), device=logits.device)
    if tuple(index.shape) not in ((), (1,), (len(logits),)):
        raise ValueError(f"target must be one class, or one for each of {len(logits)} images; got {shown(target)}")
    index = index.expand(len(logits))
    if int(index.min()) < 0 or int(index.max()) >= logits.shape[1]:
        raise ValueError(f"target must be classes 0 to {logits.shape[1] - 1}; got {target}")
    return logits.gather(1, index[:, None]).squeeze(1)


def relevance_of(maps: Iterable[Map], start: object = None) -> Shares:
    """Relevance from attention whose gradients have arrived, see :func:`relevance`.

    Args:
        maps: from ``capture(model, gradients=True)``, after ``backward()`` of the answer.
        start: see :func:`relevance`.
    """
    steps = steps_of(maps)
    (first, *_) = (*steps[-1].inner, *steps[-1].outer)
    shares = beginning(steps, start, first.batch, *kind_of(first))
    return walk(steps, shares, _positive, stay=1.0, move=1.0, normalise=False, gradients=True)


def gradient_times_attention(found: Map, *, positive: bool = False) -> tuple[Tensor, ...]:
    """The gradient by each weight times the weight, averaged over heads.

    Args:
        found: from ``capture(model, gradients=True)``, after ``backward()``.
        positive: count only what speaks for the answer, before heads are averaged.

    Returns:
        For each source ``(batch, rows, *k_grid)``.
    """
    chunks = []
    for _, weights, gradients in found.stream(gradients=True):
        assert gradients is not None  # they were asked for
        products = [w * g for w, g in zip(weights, gradients, strict=True)]
        chunks.append([(p.clamp(min=0.0) if positive else p).mean(1) for p in products])
    return tuple(torch.cat(parts, 1) for parts in zip(*chunks, strict=True))


def _positive(weights: Tensor, gradients: Tensor | None) -> Tensor:
    assert gradients is not None  # they were asked for
    return (weights * gradients).clamp(min=0.0).mean(1)
