"""A vision transformer as an ensemble of paths: what its classifier reads is a sum of terms, one for each branch of each block.

    u_l = x_(l-1) + M_l(x_(l-1)),   x_l = u_l + F_l(u_l)    =>    x_L = x_0 + sum over l of  (M_l(x_(l-1)) + F_l(u_l))
    e = sum over p of  w_p * p;   logits = head(LN(e)),   while the stream x that later blocks read stays whole
Cost: that of the model. Source: Chang et al., "Revisiting Vision Transformer from the View of Path Ensemble", arXiv:2308.06548.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.backbones.vit import TokenBlock, VisionTransformer
from ..ops.calls.observe import in_this_thread


def path_names(model: VisionTransformer) -> tuple[str, ...]:
    """The members: ``input`` (patches, tokens and positions), then attention and MLP of each block."""
    return ("input", *(f"blocks.{i}.{branch}" for i in range(len(model.blocks)) for branch in ("attention", "mlp")))


def path_members(model: VisionTransformer, images: Tensor) -> Tensor:
    """What each member adds to the stream, ``(members, batch, tokens, dim)``; they sum to what the final norm reads.

    Layer scales and stochastic depth are part of a member. Members carry gradients.

    Args:
        model: a ViT or DeiT of :func:`regard.create_model`, whose tokens all stay.
        images: ``(batch, in_chans, height, width)``.

    Raises:
        ValueError: another model; one that drops tokens or lets class tokens enter later.
    """
    _check(model)
    state = model.enter_tokens(model.first_tokens(images))
    members = [state.x]
    for block in model.blocks:
        attention, _ = block.attention(state)
        middle = state.x + attention
        mlp = block.mlp.branch(middle)
        members += [attention, mlp]
        state = state._replace(x=middle + mlp)
    return torch.stack(members)


def _check(model: nn.Module) -> None:
    if not isinstance(model, VisionTransformer):
        raise ValueError(f"expected a vision transformer of regard.create_model; got {type(model).__name__}")
    if model.spec.enter or any(type(block) is not TokenBlock or block.reducer is not None for block in model.blocks):
        raise ValueError("members are of plain blocks that all tokens go through: none is dropped, and none enters later")


class PathEnsemble(nn.Module):
    """A vision transformer whose classifier reads a weighted ensemble of its paths.

    The weights ("EnsembleScale") are learned and apply to the ensemble alone, so that early paths need not serve the
    classifier; a path may be left out of it for good. With all weights 1 it is the model itself.

    Args:
        model: see :func:`path_members`; is held as ``model`` and trained with the rest.
        per_channel: a weight for each channel of each path, not one for each path.
        pruned: members that are left out, by their number in :func:`path_names`.

    Raises:
        ValueError: see :func:`path_members`; members that do not exist.
    """

    kept: Tensor

    def __init__(self, model: VisionTransformer, *, per_channel: bool = False, pruned: Sequence[int] = ()) -> None:
        super().__init__()
        _check(model)
        count = 2 * len(model.blocks) + 1
        if not all(0 <= member < count for member in pruned):
            raise ValueError(f"members are 0 to {count - 1}; got {list(pruned)}")
        like = model.positions.table
        self.model = model
        width = like.shape[-1] if per_channel else 1
        self.ensemble_scale = nn.Parameter(torch.ones(count, width, device=like.device, dtype=like.dtype))
        kept = torch.ones(count, dtype=torch.bool, device=like.device)
        kept[list(pruned)] = False
        self.register_buffer("kept", kept)

    def members(self, images: Tensor) -> Tensor:
        """The members with their weights, ``(members, batch, tokens, dim)``; those left out are 0."""
        weights = self.ensemble_scale * self.kept[:, None]
        return path_members(self.model, images) * weights[:, None, None]

    def forward_features(self, images: Tensor) -> Tensor:
        """The normalised ensemble, ``(batch, tokens, dim)``."""
        return self.model.norm(self.members(images).sum(0))

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(batch, num_classes)``."""
        return self.model.forward_head(self.forward_features(images))

    def forward_partial(self, images: Tensor, upto: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Logits of the whole ensemble, and of those of the members up to some blocks.

        Args:
            images: ``(batch, in_chans, height, width)``.
            upto: numbers of blocks, each ensemble ends with its MLP; from 0.

        Raises:
            ValueError: a block that does not exist.
        """
        if not all(0 <= block < len(self.model.blocks) for block in upto):
            raise ValueError(f"blocks are 0 to {len(self.model.blocks) - 1}; got {list(upto)}")
        sums = self.members(images).cumsum(0)
        whole, *partial = (
            self.model.forward_head(self.model.norm(sums[2 * block + 2])) for block in (len(self.model.blocks) - 1, *upto)
        )
        return whole, partial


def path_distillation_loss(whole: Tensor, partial: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
    """Short ensembles learn from the whole one: mean over them of T^2 KL(whole || partial), the whole without gradient.

    Args:
        whole: logits ``(batch, classes)``.
        partial: likewise, one or more.
        temperature: T of both.

    Raises:
        ValueError: no partial ensemble.
    """
    if not partial:
        raise ValueError("expected the logits of 1 or more partial ensembles; got none")
    target = (whole.detach() / temperature).log_softmax(-1)
    answers = [(logits / temperature).log_softmax(-1) for logits in partial]
    terms = [F.kl_div(answer, target, reduction="batchmean", log_target=True) for answer in answers]
    return temperature**2 * torch.stack(terms).mean()


@dataclass(frozen=True, eq=False)
class PathInfluence:
    """What is lost without a member: numbers for each, averaged over images, in float64.

    Attributes:
        names: of the members.
        accuracy: how much less accurate.
        probability: how much less probable the class is.
        change: Euclidean distance of the logits.
    """

    names: tuple[str, ...]
    accuracy: Tensor
    probability: Tensor
    change: Tensor


def path_influence(
    model: VisionTransformer, images: Tensor, labels: Tensor | None = None, *, stream: bool = False, batch_size: int = 64
) -> PathInfluence:
    """Remove one member at a time, and see what the classifier answers.

    Args:
        model: see :func:`path_members`; put it in evaluation mode first.
        images: ``(n, in_chans, height, width)``.
        labels: ``(n,)``; by default the class that the whole model answers.
        stream: remove the member from what later blocks read as well, which is another experiment: of ``input``, then, nothing
            is left but what biases make of zeros.
        batch_size: images at once.

    Raises:
        ValueError: see :func:`path_members`; labels of another number.
    """
    _check(model)
    if labels is not None and labels.shape != images.shape[:1]:
        raise ValueError(f"expected labels ({len(images)},); got {tuple(labels.shape)}")
    names = path_names(model)
    wholes, others = [], []
    with torch.no_grad():
        for part in images.split(batch_size):
            members = path_members(model, part)
            total = members.sum(0)
            wholes.append(model.forward_head(model.norm(total)))
            lines = []
            for number, member in enumerate(members):
                if stream:
                    with _without(model, number):
                        lines.append(model(part))
                else:
                    lines.append(model.forward_head(model.norm(total - member)))
            others.append(torch.stack(lines))
    whole, without = torch.cat(wholes).double(), torch.cat(others, 1).double()
    target = whole.argmax(-1) if labels is None else labels
    index = target[None, :, None].expand(len(names), -1, 1)
    drop = whole.softmax(-1).gather(1, target[:, None]) - without.softmax(-1).gather(2, index)
    right = (without.argmax(-1) == target).double().mean(-1)
    accuracy = (whole.argmax(-1) == target).double().mean() - right
    return PathInfluence(names, accuracy, drop.mean((1, 2)), (without - whole).norm(dim=-1).mean(-1))


@contextmanager
def _without(model: VisionTransformer, member: int) -> Iterator[None]:
    """Remove a member from the stream while the context is entered."""
    if member == 0:
        handle = model.blocks[0].register_forward_pre_hook(
            in_this_thread(lambda _, args: (args[0]._replace(x=torch.zeros_like(args[0].x)),))
        )
    else:
        block = model.blocks[(member - 1) // 2]
        branch = block.mixer if member % 2 else block.mlp
        handle = branch.drop_path.register_forward_hook(in_this_thread(lambda _, __, output: torch.zeros_like(output)))
    try:
        yield
    finally:
        handle.remove()


def relative_log_amplitude(maps: Tensor, bins: int = 8) -> Tensor:
    """How much of the higher frequencies there is: log amplitude at each frequency less that of the lowest, ``(bins,)``.

    The two-dimensional Fourier amplitudes are averaged over the batch and channels, then over the frequencies of a bin, which
    is a ring of equal width between 0 and pi, the larger of both axes. The first bin is 0 by definition.

    Args:
        maps: ``(batch, rows, columns, dim)``: the patches of an ensemble, with or without its early paths.
        bins: rings; one that holds no frequency of the grid has the value of the one before.

    Raises:
        ValueError: maps of another rank.
    """
    if maps.ndim != 4:
        raise ValueError(f"expected maps (batch, rows, columns, dim); got {tuple(maps.shape)}")
    amplitude = torch.fft.fft2(maps.double(), dim=(1, 2)).abs().mean((0, -1))
    axes = [torch.fft.fftfreq(n, device=maps.device, dtype=torch.float64).abs() * 2 for n in maps.shape[1:3]]  # 1 is pi
    highest = torch.maximum(axes[0][:, None], axes[1])
    ring = (highest * bins).ceil().long().sub(1).clamp(0, bins - 1)
    found: list[Tensor] = []
    for number in range(bins):
        inside = ring == number
        found.append(amplitude[inside].mean() if bool(inside.any()) else found[-1])
    logs = torch.stack(found).clamp(min=math.ulp(0.0)).log()
    return logs - logs[0]
