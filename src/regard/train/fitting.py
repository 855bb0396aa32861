"""Train one model in one folder; a run that was killed goes on exactly where it was."""

from __future__ import annotations

import hashlib
import logging
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from torch import nn
from torch.utils.data import DataLoader

from ..data import EpochSampler, ResumableLoader, VisionData
from ..files import alone_in
from .classify import Classifier
from .resume import RunFiles, resumable


@dataclass(frozen=True)
class Recipe:
    """How long and how fast a model is trained.

    Args:
        epochs: passes over the training samples.
        batch_size: samples a step.
        learning_rate, weight_decay, warmup, label_smoothing: see :class:`Classifier`.
        seed: of the weights, the order and the augmentation.
    """

    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    label_smoothing: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(f"epochs and batch_size must be at least 1; got {self.epochs} and {self.batch_size}")


class KeepRandomState(L.Callback):
    """Stores the global random states in checkpoints, for dropout and stochastic depth."""

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["random"] = {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "numpy": np.random.get_state(),  # noqa: NPY002  # the global state is what other code may draw from
            "python": random.getstate(),
        }

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._restored = checkpoint["random"]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._restored is None:
            return
        torch.set_rng_state(self._restored["torch"])
        if self._restored["cuda"]:
            torch.cuda.set_rng_state_all(self._restored["cuda"])
        np.random.set_state(self._restored["numpy"])  # noqa: NPY002  # see above
        random.setstate(self._restored["python"])
        self._restored = None


class NamedProgressBar(RichProgressBar):
    """A progress bar with the name of the model; it disappears when the model is done."""

    def __init__(self, name: str) -> None:
        super().__init__(leave=False)
        self.name = name

    def _get_train_description(self, current_epoch: int) -> str:
        return f"{self.name}: epoch {current_epoch + 1}/{self.trainer.max_epochs}"

    def get_metrics(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, module)
        metrics.pop("v_num", None)
        return metrics


def loaders(data: VisionData, recipe: Recipe, workers: int = 0) -> tuple[ResumableLoader, DataLoader]:
    """Training and validation loaders; the validation samples come in a fixed order, all of them."""
    sampler = EpochSampler(len(data.train), recipe.seed)
    train = ResumableLoader(data.train, recipe.batch_size, sampler, num_workers=workers)
    val = DataLoader(data.val, 2 * recipe.batch_size, num_workers=workers)
    return train, val


def fit(
    model: nn.Module,
    data: VisionData,
    recipe: Recipe,
    folder: Path,
    *,
    name: str = "model",
    progress: bool = True,
    checkpoint_every: int = 100,
    workers: int = 0,
    accelerator: str = "auto",
    callbacks: Sequence[L.Callback] = (),
    tell: Callable[[str], None] = print,
) -> Classifier:
    """Train a model, going on from ``folder/last.ckpt`` if that is there, or from the one before where it is damaged.

    After a kill the same weights come out, bit for bit, as without it. Checkpoints of other data or another recipe are set
    aside. One process at a time trains in a folder.

    Args:
        model: images in, logits out; built under ``recipe.seed`` by the caller.
        data: what to train on.
        recipe: how.
        folder: for checkpoints.
        name: shown beside the progress bar.
        progress: whether to show one.
        checkpoint_every: steps between checkpoints within an epoch; one is also written after each epoch.
        workers: processes that load images.
        accelerator: ``"cpu"``, ``"cuda"``, ... or ``"auto"``.
        callbacks: more Lightning callbacks.
        tell: is given a sentence about each checkpoint that is damaged and set aside.

    Returns:
        The trained module with its ``history``.

    Raises:
        ValueError: another process trains in that folder.
    """
    with alone_in(folder):
        return _fit(
            model, data, recipe, folder, name, progress, checkpoint_every, workers, accelerator, callbacks, tell
        )  # fmt: skip


def _fit(
    model: nn.Module,
    data: VisionData,
    recipe: Recipe,
    folder: Path,
    name: str,
    progress: bool,
    checkpoint_every: int,
    workers: int,
    accelerator: str,
    callbacks: Sequence[L.Callback],
    tell: Callable[[str], None],
) -> Classifier:
    settings = hashlib.sha256(repr((data.fingerprint(), asdict(recipe))).encode()).hexdigest()[:16]
    train, val = loaders(data, recipe, workers)
    module = Classifier(
        model,
        len(data.classes),
        recipe.epochs * len(train),
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        warmup=recipe.warmup,
        label_smoothing=recipe.label_smoothing,
    )
    every_step = ModelCheckpoint(folder, "last", every_n_train_steps=checkpoint_every, enable_version_counter=False)
    every_epoch = ModelCheckpoint(
        folder, "last", every_n_epochs=1, save_on_train_epoch_end=False, enable_version_counter=False
    )  # fmt: skip
    kept = [KeepRandomState(), *callbacks, every_step, every_epoch]
    if progress:
        kept.append(NamedProgressBar(name))
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*")  # Lightning's advice on workers, loggers and folders that exist
        trainer = L.Trainer(
            max_epochs=recipe.epochs,
            accelerator=accelerator,
            devices=1,
            logger=False,
            callbacks=kept,
            enable_progress_bar=progress,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            default_root_dir=folder,
            plugins=[RunFiles(settings)],
        )
        last = resumable(folder, module, tell, settings)
        try:
            trainer.fit(module, train, val, ckpt_path=None if last is None else str(last))
        except SystemExit as stop:  # what Lightning makes of a keyboard interrupt
            raise KeyboardInterrupt from stop
    module.eval()
    return module
