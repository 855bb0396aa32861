"""Many small pieces of work on a pool of threads, each piece on one thread.

torch splits every operator over its threads and waits at its end; for many small operators in a row the waiting costs much of
what the second thread brings. Here the pieces themselves are shared out, torch's operators leave Python's lock, and nothing
waits before the last piece. It pays for much work only: after each of its operators torch's own threads spin for about 10 ms,
waiting for more, and take a core from these.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from typing import TypeVar

import torch

T = TypeVar("T")


def run_all(work: Callable[[T], None], pieces: Iterable[T], parallel: bool) -> None:
    """Do all the work, in any order.

    Args:
        work: done for each piece, from several threads at once; it takes no gradients.
        pieces: made one after another, as they are needed.
        parallel: whether to share it out over as many threads as torch has, the caller's among them.

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

    def share() -> None:
        with torch.inference_mode(inference), torch.no_grad():
            while True:
                with making:
                    try:
                        piece = next(waiting)
                    except StopIteration:
                        return
                work(piece)

    others = [_executor(threads, os.getpid()).submit(share) for _ in range(threads - 1)]
    torch.set_num_threads(1)
    try:
        share()
    finally:
        torch.set_num_threads(threads)
        wait(others)
    for other in others:
        other.result()


@lru_cache(maxsize=4)
def _executor(threads: int, process: int) -> ThreadPoolExecutor:
    """The caller's helpers, on which torch runs operators on one thread. A forked process has none of its parent's."""
    ready = threading.Barrier(threads)

    def start() -> None:
        torch.get_num_threads()  # torch sets a thread up at its first question; what is set before would be lost
        torch.set_num_threads(1)
        ready.wait()

    executor = ThreadPoolExecutor(threads - 1, thread_name_prefix="regard", initializer=start)
    for _ in range(threads - 1):
        executor.submit(int)
    ready.wait()
    torch.set_num_threads(threads)  # the number that threads yet to come begin with, which the pool has set to one
    return executor
