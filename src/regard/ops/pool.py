"""Many small pieces of work on a pool of threads, each piece on one thread.

torch splits every operator over its threads and waits at its end; for many small operators in a row the waiting costs more
than the second thread brings. Here the pieces themselves are shared out, torch's operators leave Python's lock, and nothing
waits before the last piece.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch

T = TypeVar("T")


def run_all(work: Callable[[T], None], pieces: Iterable[T], parallel: bool) -> None:
    """Do all the work, in any order.

    Args:
        work: done for each piece, from several threads at once; it takes no gradients.
        pieces: made one after another, as they are needed.
        parallel: whether to use as many threads as torch does.

    Raises:
        Exception: the first one that ``work`` raised.
    """
    threads = torch.get_num_threads() if parallel else 1
    if threads == 1:
        for piece in pieces:
            work(piece)
        return
    waiting, making = iter(pieces), threading.Lock()
    inference = torch.is_inference_mode_enabled()

    def next_piece() -> Iterator[T]:
        while True:
            with making:
                try:
                    piece = next(waiting)
                except StopIteration:
                    return
            yield piece

    def worker(_: int) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            for piece in next_piece():
                work(piece)

    for _ in _executor(threads, os.getpid()).map(worker, range(threads)):
        pass


@lru_cache(maxsize=4)
def _executor(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads on which torch runs operators on one thread. A forked process has none of its parent's threads, so its own."""
    ready = threading.Barrier(threads + 1)

    def start() -> None:
        torch.get_num_threads()  # torch sets a thread up at its first question; what is set before would be lost
        torch.set_num_threads(1)
        ready.wait()

    executor = ThreadPoolExecutor(threads, thread_name_prefix="regard", initializer=start)
    for _ in range(threads):
        executor.submit(int)
    ready.wait()
    torch.set_num_threads(threads)  # the number that threads yet to come begin with, which the pool has set to one
    return executor
