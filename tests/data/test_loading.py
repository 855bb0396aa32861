"""The order of samples, and going on in the middle of it."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import Dataset

from regard.data import EpochSampler, ResumableLoader


class Keys(Dataset):
    def __len__(self) -> int:
        return 23

    def __getitem__(self, key: tuple[int, int]) -> torch.Tensor:
        return torch.tensor(key)


def loader(workers: int = 0) -> ResumableLoader:
    return ResumableLoader(Keys(), 4, EpochSampler(23, seed=1), num_workers=workers)


def epoch(chosen: ResumableLoader, number: int) -> list[list[list[int]]]:
    chosen.sampler.set_epoch(number)
    return [batch.tolist() for batch in chosen]


def test_order_depends_on_seed_and_epoch() -> None:
    assert epoch(loader(), 3) == epoch(loader(), 3)
    assert epoch(loader(), 3) != epoch(loader(), 4)
    other = ResumableLoader(Keys(), 4, EpochSampler(23, seed=2))
    assert epoch(loader(), 3) != epoch(other, 3)


def test_an_epoch_has_every_sample_once() -> None:
    assert sorted(EpochSampler(23, seed=5)) == [(0, i) for i in range(23)]


def test_shares_of_ranks_are_disjoint_and_equally_long() -> None:
    shares = [list(EpochSampler(23, seed=5, rank=rank, world=3)) for rank in range(3)]
    assert [len(share) for share in shares] == [7, 7, 7]
    assert len({key for share in shares for key in share}) == 21


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("given", [0, 1, 4])
def test_a_stopped_epoch_goes_on_with_the_next_batch(given: int, workers: int) -> None:
    whole = epoch(loader(), 2)
    first = loader(workers)
    first.sampler.set_epoch(2)
    batches = iter(first)
    seen = [next(batches).tolist() for _ in range(given)]
    second = loader(workers)
    second.load_state_dict(first.state_dict())
    assert seen + [batch.tolist() for batch in second] == whole
    assert epoch(second, 3) == epoch(loader(), 3)
    assert epoch(second, 2) == whole


def test_a_finished_epoch_starts_the_next_one_at_its_beginning() -> None:
    first = loader()
    epoch(first, 2)
    second = loader()
    second.load_state_dict(first.state_dict())
    assert epoch(second, 3) == epoch(loader(), 3)


def test_loading_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    epoch(loader(), 0)
    assert torch.equal(torch.get_rng_state(), before)
