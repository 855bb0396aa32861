"""Classification: the loss, the metric and the schedule, as a Lightning module."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy


class Classifier(L.LightningModule):
    """Cross-entropy with label smoothing, AdamW, a linear warm-up and a cosine to zero.

    ``history`` has one entry per epoch (epoch, train_loss, val_loss, val_accuracy) and travels with checkpoints.

    Args:
        model: images in, logits out.
        num_classes: of the logits.
        steps: of the whole training. Not asked of the trainer: that sets up the loaders before a checkpoint is restored, and
            their position in the epoch would be lost.
        learning_rate: at the end of the warm-up.
        weight_decay: for matrices and kernels; norms, biases and what ``model.no_weight_decay()`` names have none.
        warmup: share of the steps.
        label_smoothing: share of the target spread over all classes.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        steps: int,
        *,
        learning_rate: float = 2e-3,
        weight_decay: float = 0.05,
        warmup: float = 0.1,
        label_smoothing: float = 0.1,
    ) -> None:
        super().__init__()
        self.model = model
        self.steps = steps
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.warmup, self.label_smoothing = warmup, label_smoothing
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.history: list[dict[str, float]] = []
        self._train_loss = self._val_loss = 0.0
        self._train_count = self._val_count = 0

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels, label_smoothing=self.label_smoothing)
        self._train_loss += float(loss.detach()) * len(labels)
        self._train_count += len(labels)
        self.log("loss", loss.detach(), prog_bar=True, logger=False)
        return loss

    def on_validation_epoch_start(self) -> None:
        self._val_loss, self._val_count = 0.0, 0
        self.accuracy.reset()

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        images, labels = batch
        logits = self.model(images)
        self._val_loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        self._val_count += len(labels)
        self.accuracy.update(logits, labels)

    def on_validation_epoch_end(self) -> None:
        accuracy = float(self.accuracy.compute())
        self.log("accuracy", accuracy, prog_bar=True, logger=False)
        if self.trainer.sanity_checking:
            return
        self.history.append(
            {
                "epoch": self.current_epoch + 1,
                "train_loss": self._train_loss / max(self._train_count, 1),
                "val_loss": self._val_loss / max(self._val_count, 1),
                "val_accuracy": accuracy,
            }
        )
        self._train_loss, self._train_count = 0.0, 0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["history"] = {"epochs": list(self.history), "loss": self._train_loss, "count": self._train_count}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["history"]
        self.history, self._train_loss, self._train_count = list(state["epochs"]), state["loss"], state["count"]

    def configure_optimizers(self) -> Any:
        exempt: set[str] = getattr(self.model, "no_weight_decay", set)()
        decayed = [p for name, p in self.model.named_parameters() if p.ndim > 1 and name not in exempt]
        others = [p for name, p in self.model.named_parameters() if p.ndim <= 1 or name in exempt]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, self.steps, self.warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def warmup_cosine(step: int, total: int, warmup: float) -> float:
    """Factor on the learning rate: linear from near 0 to 1 in the first ``warmup * total`` steps, then a cosine to 0."""
    rising = max(1, round(warmup * total))
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - rising) / max(1, total - rising))))
