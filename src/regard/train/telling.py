"""Messages of a training run: where it goes on, and how much is kept when it is stopped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L

Tell = Callable[[str], None]


class Telling(L.Callback):
    """Says where a run that was stopped goes on, and knows what of it has been kept.

    Args:
        label: of what is trained.
        epochs: of the whole training.
        tell: is given a line.
    """

    def __init__(self, label: str, epochs: int, tell: Tell) -> None:
        self.label, self.epochs, self.tell = label, epochs, tell
        self.steps = 0
        self.length = 1

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.steps, self.length = trainer.global_step, max(1, int(trainer.num_training_batches))
        if self.steps:
            self.tell(f"{self.label}: goes on from an earlier run, {self.place}")

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.steps = trainer.global_step

    @property
    def place(self) -> str:
        """Where the last checkpoint stands, in words."""
        epochs, steps = divmod(self.steps, self.length)
        within = f" and {steps} of {self.length} steps" if steps else ""
        return f"after {counted(epochs, 'epoch')} of {self.epochs}{within}"

    def stopped(self) -> str:
        """What is kept of a training that was stopped."""
        if not self.steps:
            return f"{self.label}: stopped before its first checkpoint; it will begin anew"
        return f"{self.label}: kept {self.place}"


def counted(number: int, word: str) -> str:
    """A number of things: ``1 epoch``, ``2 epochs``."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
