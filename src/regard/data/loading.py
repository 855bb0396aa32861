"""Loading that can stop anywhere and go on exactly there.

The order of an epoch depends on ``(seed, epoch)`` only; the loader's state is how many batches of the epoch it has given.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler


class EpochSampler(Sampler):
    """Keys ``(epoch, index)`` in an order that depends on the seed and the epoch.

    Args:
        length: number of samples.
        seed: what the order depends on, with the epoch.
        rank, world: which share of each epoch, of how many; shares are equally long, a remainder is left out.
    """

    def __init__(self, length: int, seed: int = 0, rank: int = 0, world: int = 1) -> None:
        self.length, self.seed, self.rank, self.world = length, seed, rank, world
        self.epoch = self.skip = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length // self.world

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed * 100_003 + self.epoch))
        share = order[self.rank :: self.world][: len(self)].tolist()
        return ((self.epoch, index) for index in share[self.skip :])


class ResumableLoader(DataLoader):
    """A data loader that knows how many batches of the epoch it has given, and goes on after them.

    Args:
        dataset: indexed by ``(epoch, index)``.
        batch_size: samples a batch; an incomplete last batch is left out.
        sampler: gives the keys.
        **options: see :class:`torch.utils.data.DataLoader`.
    """

    def __init__(self, dataset: Dataset, batch_size: int, sampler: EpochSampler, **options: Any) -> None:
        # a generator of its own: drawing worker seeds must not move the global state that dropout uses
        super().__init__(
            dataset, batch_size, sampler=sampler, drop_last=len(sampler) >= batch_size, generator=torch.Generator(), **options
        )
        self.keys = sampler
        self._start = self._given = 0

    def __iter__(self) -> Iterator:  # type: ignore[override]  # a generator, where torch promises its own class
        # a generator: it begins at the first batch, after Lightning has told the sampler the epoch
        self._given, self._start = self._start, 0
        self.keys.skip = self._given * (self.batch_size or 1)
        for batch in super().__iter__():
            self._given += 1
            yield batch
        self.keys.skip = 0

    def state_dict(self) -> dict[str, int]:
        """The epoch and the batches given of it; Lightning stores this in its checkpoints."""
        return {"epoch": self.keys.epoch, "given": self._given % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.keys.epoch, self._start = state["epoch"], state["given"]
