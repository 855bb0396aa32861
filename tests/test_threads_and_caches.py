"""Several threads at once get what one thread gets, also while the caches are emptied under them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

import pytest
import torch

import regard
from regard import attend, plan
from regard import patterns as P

THREADS = 6
TEXTS = (
    "window(3)",
    "neighborhood(3)",
    "axis(0) | axis(1)",
    "window(2) | window(3, shift=1)",
    "halo(2, 1)",
    "causal",
    "grid(2)",
)


@pytest.fixture(autouse=True)
def _switch_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def run_all(work: Callable[[int], None], beside: Callable[[], object]) -> None:
    """Run the work in threads and call something beside it until all are done; raises the first error of any."""
    errors: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        beside()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_threads_attend_while_the_caches_are_emptied():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 5, 6, 2, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    expected = {text: attend(q, k, v, text, backend="reference") for text in TEXTS}

    def work(number: int) -> None:
        for turn in range(12):
            text = TEXTS[(number + turn) % len(TEXTS)]
            for backend in ("auto", "dense"):
                torch.testing.assert_close(attend(q, k, v, text, backend=backend), expected[text], atol=1e-11, rtol=1e-9)

    run_all(work, regard.clear_caches)


def test_threads_read_plan_and_mask_while_the_caches_are_emptied():
    grid = (5, 6)
    expected = {text: (repr(P.parse(text)), P.parse(text).mask(grid), plan(text, grid).as_dict()) for text in TEXTS}

    def work(number: int) -> None:
        for turn in range(10):
            text = TEXTS[(number + turn) % len(TEXTS)]
            shown, mask, planned = expected[text]
            pattern = P.parse(text)
            assert repr(pattern) == shown
            assert torch.equal(pattern.mask(grid), mask)
            assert int(pattern.degree(grid).sum()) == int(mask.sum())
            assert plan(text, grid).as_dict() == planned

    run_all(work, regard.clear_caches)
    assert all(held.size <= held.most for held in regard.cache_info().values())
