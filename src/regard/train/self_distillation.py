"""Self-distillation without labels: a student answers on every crop of an image as its own slow average does on another one.

    loss = - mean over pairs of different crops (t, s) of  softmax((teacher(t) - centre) / 0.04) . log softmax(student(s) / 0.1)

with t one of the two large crops, s any crop, the teacher a moving average of the student, the centre that of its outputs.
Cost: a student pass on every crop and a teacher pass on the large ones. Source: Caron et al., DINO, arXiv:2104.14294; for
patches that the student does not see: Zhou et al., iBOT, arXiv:2111.07832.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, cast

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .classify import warmup_cosine


def self_distillation_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], centre: Tensor, *, sharp: float = 0.04, soft: float = 0.1
) -> Tensor:
    """Cross entropy between what a teacher and a student say about different crops of the same images.

    Args:
        student: logits ``(batch, prototypes)`` of every crop, those that the teacher saw first.
        teacher: logits of the first crops.
        centre: taken from the teacher's logits ``(prototypes,)``, so that no prototype wins everywhere.
        sharp, soft: temperatures of the teacher and of the student.

    Raises:
        ValueError: fewer crops for the student than for the teacher, or a single one, which has no other to agree with.
    """
    if len(student) < max(2, len(teacher)) or not teacher:
        raise ValueError(
            f"expected 1 or more crops of the teacher and 2 or more of the student; got {len(teacher)}, {len(student)}"
        )
    targets = [((logits.detach() - centre) / sharp).softmax(-1) for logits in teacher]
    answers = [(logits / soft).log_softmax(-1) for logits in student]
    pairs = [-(t * s).sum(-1).mean() for i, t in enumerate(targets) for j, s in enumerate(answers) if i != j]
    return torch.stack(pairs).mean()


def balanced_targets(logits: Tensor, *, temperature: float = 0.05, rounds: int = 3) -> Tensor:
    """Soft assignments ``(n, prototypes)`` of which all prototypes get nearly the same share.

    The columns of exp(logits / temperature), then its rows, are scaled to sum to one, in turns. Source: Sinkhorn & Knopp, 1967;
    for targets: Caron et al., SwAV, arXiv:2006.09882.

    Args:
        logits: of a teacher, ``(n, prototypes)``; cosines, so that no exponential vanishes.
        temperature: the lower, the harder.
        rounds: more of them share out more evenly.
    """
    logits = logits.detach()
    shares = ((logits - logits.max()) / temperature).exp()
    for _ in range(rounds):
        shares = shares / shares.sum(0)
        shares = shares / shares.sum(1, keepdim=True)
    return shares


def block_masks(count: int, grid: Sequence[int], shares: tuple[float, float]) -> Tensor:
    """Random rectangles of patches, ``(count, rows, columns)`` of bool, from the global generator.

    Args:
        count: of images.
        grid: rows and columns.
        shares: least and largest share of its patches that an image loses; rectangles, up to half as long as the grid, are
            added until the share drawn for it is reached.
    """
    masks = torch.zeros(count, *grid, dtype=torch.bool)
    for mask in masks:
        wanted = (shares[0] + (shares[1] - shares[0]) * float(torch.rand(()))) * mask.numel()
        while int(mask.sum()) < wanted:
            sides = [int(torch.randint(1, n // 2 + 1, ())) for n in grid]
            starts = [int(torch.randint(n - side + 1, ())) for n, side in zip(grid, sides, strict=True)]
            mask[starts[0] : starts[0] + sides[0], starts[1] : starts[1] + sides[1]] = True
    return masks


class PrototypeHead(nn.Module):
    """An MLP, a vector of length one, and its cosine with each prototype.

    Args:
        dim: channels of the features.
        hidden, bottleneck: of the MLP and of the vector.
        prototypes: outputs.
    """

    def __init__(self, dim: int, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(torch.randn(prototypes, bottleneck) / math.sqrt(bottleneck))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.mlp(x), dim=-1) @ F.normalize(self.prototypes, dim=-1).T


class SelfDistillation(L.LightningModule):
    """AdamW with a linear warm-up and a cosine to zero; the teacher's momentum rises from ``momentum`` to one by a cosine.

    Args:
        model: images in, features ``(batch, dim)`` out, at every size of crop; ``create_model(..., num_classes=0)``.
        dim: of its features.
        steps: of the whole training.
        prototypes, hidden, bottleneck: see :class:`PrototypeHead`.
        learning_rate: at the end of the warm-up.
        weight_decay: for matrices and kernels.
        momentum, centre_momentum: share of the old teacher, and of the old centre, that is kept at each step.
        warmup: share of the steps; the prototypes rest during it.

    Attributes:
        teacher: the model whose weights are worth keeping.
    """

    centre: Tensor

    def __init__(
        self,
        model: nn.Module,
        dim: int,
        steps: int,
        *,
        prototypes: int = 256,
        hidden: int = 256,
        bottleneck: int = 64,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.04,
        momentum: float = 0.99,
        centre_momentum: float = 0.9,
        warmup: float = 0.1,
    ) -> None:
        super().__init__()
        self.student = nn.Sequential(model, PrototypeHead(dim, hidden, bottleneck, prototypes))
        self.average = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(prototypes))
        self.steps, self.warmup = steps, warmup
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.momentum, self.centre_momentum = momentum, centre_momentum

    @property
    def teacher(self) -> nn.Module:
        return self.average[0]

    def training_step(self, crops: Sequence[Tensor], index: int) -> Tensor:
        """One step on crops ``(batch, channels, height, width)``: two large ones, then smaller ones of one size."""
        large, small = torch.cat(list(crops[:2])), list(crops[2:])
        student = list(self.student(large).chunk(2))
        if small:
            student += self.student(torch.cat(small)).chunk(len(small))
        with torch.no_grad():
            teacher = self.average(large)
        loss = self_distillation_loss(student, teacher.chunk(2), self.centre)
        self.centre.lerp_(teacher.mean(0), 1.0 - self.centre_momentum)
        self.log("loss", loss.detach(), prog_bar=True, logger=False)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.global_step < self.warmup * self.steps:
            self.student[1].prototypes.grad = None

    def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
        progress = min(1.0, self.global_step / self.steps)
        kept = 1.0 - (1.0 - self.momentum) * 0.5 * (1.0 + math.cos(math.pi * progress))
        with torch.no_grad():
            for slow_module, fast_module in self.followers():
                for slow, fast in zip(slow_module.parameters(), fast_module.parameters(), strict=True):
                    slow.lerp_(fast, 1.0 - kept)

    def followers(self) -> list[tuple[nn.Module, nn.Module]]:
        """What follows, and whom."""
        return [(self.average, self.student)]

    def configure_optimizers(self) -> Any:
        learned = [p for p in self.parameters() if p.requires_grad]
        decayed = [p for p in learned if p.ndim > 1]
        others = [p for p in learned if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, self.steps, self.warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class MaskedSelfDistillation(SelfDistillation):
    """Self-distillation of a vision transformer, whose student also guesses patches that only the teacher sees.

    Rectangles of the student's large crops are blank (zero, the mean colour of normalised images). For each blank patch a head
    of its own says what the teacher's says of the patch itself, as balanced targets: the loss grows by the mean cross entropy.
    iBOT puts a learned token in place of what is hidden; blank pixels make one, the bias of the stem, without touching the
    model.

    Args:
        model: of :func:`regard.create_model`, with a class token.
        dim, steps: see :class:`SelfDistillation`.
        patch_size: pixels of a patch's side; crops are whole patches.
        masked: least and largest share of hidden patches, see :func:`block_masks`.
        prototypes, hidden, bottleneck, **options: see :class:`SelfDistillation`; the first three also of the patches' head.
    """

    def __init__(
        self,
        model: nn.Module,
        dim: int,
        steps: int,
        *,
        patch_size: int,
        masked: tuple[float, float] = (0.1, 0.7),
        prototypes: int = 256,
        hidden: int = 256,
        bottleneck: int = 64,
        **options: Any,
    ) -> None:
        super().__init__(model, dim, steps, prototypes=prototypes, hidden=hidden, bottleneck=bottleneck, **options)
        self.patch_head = PrototypeHead(dim, hidden, bottleneck, prototypes)
        self.average_patch_head = copy.deepcopy(self.patch_head).requires_grad_(False)
        self.patch_size, self.masked = patch_size, masked

    def training_step(self, crops: Sequence[Tensor], index: int) -> Tensor:
        """One step on crops ``(batch, channels, height, width)``: two large ones, then smaller ones of one size."""
        large, small = torch.cat(list(crops[:2])), list(crops[2:])
        side = self.patch_size
        mask = block_masks(len(large), [n // side for n in large.shape[-2:]], self.masked).to(large.device)
        shown = large.masked_fill(mask.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, None], 0.0)
        hidden = mask.flatten(1)
        answers, guesses = self._answers(self.student, self.patch_head, shown, hidden)
        student = list(answers.chunk(2))
        if small:
            student += self.student(torch.cat(small)).chunk(len(small))
        with torch.no_grad():
            teacher, seen = self._answers(self.average, self.average_patch_head, large, torch.ones_like(hidden))
        targets = balanced_targets(seen).unflatten(0, hidden.shape)[hidden]
        guessed = -(targets * (guesses / 0.1).log_softmax(-1)).sum(-1).mean()
        loss = self_distillation_loss(student, teacher.chunk(2), self.centre) + guessed
        self.centre.lerp_(teacher.mean(0), 1.0 - self.centre_momentum)
        self.log("loss", loss.detach(), prog_bar=True, logger=False)
        return loss

    def followers(self) -> list[tuple[nn.Module, nn.Module]]:
        return [*super().followers(), (self.average_patch_head, self.patch_head)]

    @staticmethod
    def _answers(network: nn.Module, patch_head: nn.Module, images: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of class tokens, and of chosen patches ``(batch, patches)`` in a row."""
        model, head = cast(Any, network)
        tokens = model.forward_features(images)
        return head(model.forward_head(tokens, pre_logits=True)), patch_head(tokens[:, model.num_prefix_tokens :][chosen])
