"""Work shared out over threads gives what one thread gives, and leaves torch's settings alone."""

from __future__ import annotations

import math
import multiprocessing
import threading
import time

import pytest
import torch

from regard import attend
from regard import patterns as P
from regard.layers.positions import OffsetBias
from regard.ops.tiles.threads import run_all


@pytest.fixture
def three_threads():
    usual = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(usual)


def test_every_piece_is_done_once_and_made_when_needed(three_threads):
    done, made, lock = [], [], threading.Lock()

    def pieces():
        for n in range(50):
            made.append(n)
            yield n

    def work(n):
        time.sleep(0.001)
        with lock:
            done.append(n)
            assert len(made) <= len(done) + 3  # what is not yet done is at most what is in work

    run_all(work, pieces(), parallel=True)
    assert sorted(done) == list(range(50))


def test_pieces_run_on_the_caller_and_its_helpers_with_one_torch_thread_each_and_no_gradients(three_threads):
    seen, together = set(), threading.Barrier(3, timeout=30)

    def work(n):
        together.wait()  # nobody passes unless three run at once
        seen.add((threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled()))

    run_all(work, range(3), parallel=True)
    assert len(seen) == 3
    assert {entry[1:] for entry in seen} == {(1, False)}
    assert threading.get_ident() in {entry[0] for entry in seen}
    assert torch.get_num_threads() == 3
    assert torch.is_grad_enabled()


def test_one_thread_works_in_place():
    idents = []
    run_all(lambda n: idents.append(threading.get_ident()), range(3), parallel=False)
    assert set(idents) == {threading.get_ident()}


@pytest.mark.parametrize("caller", [True, False], ids=["of the caller", "of a helper"])
def test_an_error_comes_out_and_the_pool_goes_on_working(caller, three_threads):
    main, met = threading.get_ident(), threading.Barrier(3, timeout=30)

    def work(n):
        if n < 3:
            met.wait()
            if (threading.get_ident() == main) == caller:
                raise ValueError("the one")

    with pytest.raises(ValueError, match="the one"):
        run_all(work, range(20), parallel=True)
    assert torch.get_num_threads() == 3
    done = []
    run_all(done.append, range(20), parallel=True)
    assert sorted(done) == list(range(20))


@pytest.mark.parametrize("shared", [True, False], ids=["on a pool", "by torch's threads"])
@pytest.mark.parametrize(
    "pattern", [P.Neighborhood(5), P.Neighborhood(3, dilation=2), P.Axis(0) | P.Axis(1), P.Halo(4, 2)], ids=repr
)
def test_attention_and_all_gradients_are_those_of_one_thread(pattern, shared, three_threads, monkeypatch):
    monkeypatch.setattr("regard.ops.tiles.chunks.BUFFER", 1 << 11)  # many pieces, whose keys overlap
    monkeypatch.setattr("regard.ops.backends.tiled.SHARED_FLOPS", 0 if shared else math.inf)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 19, 17, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = OffsetBias(2, pattern, 2, grid=(19, 17), dtype=torch.float64) if isinstance(pattern, P.Neighborhood) else None
    direction = torch.randn(2, 19, 17, 2, 8, dtype=torch.float64)
    leaves = [q, k, v, *(bias.parameters() if bias is not None else ())]

    def run(threads, backend):
        torch.set_num_threads(threads)
        y, lse = attend(q, k, v, pattern, bias=bias, backend=backend, return_lse=True)
        alone = attend(q, k, v, pattern, bias=bias, backend=backend)
        gradients = torch.autograd.grad((y * direction).sum() + lse.square().sum(), leaves)
        with torch.no_grad():
            unseen = attend(q, k, v, pattern, bias=bias, backend=backend)
        return y, lse, unseen, *gradients, *torch.autograd.grad((alone * direction).sum(), leaves)

    truth = run(1, "reference")
    for threads in (1, 3):
        for mine, right in zip(run(threads, "tiled"), truth, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-10)


def test_memory_kept_from_inference_serves_training_and_the_reverse():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 20, 20, 2, 8) for _ in range(3))

    def train():
        leaf = q.clone().requires_grad_()
        attend(leaf, k, v, P.Neighborhood(5), backend="tiled").square().sum().backward()
        return leaf.grad

    with torch.inference_mode():
        first = attend(q, k, v, P.Neighborhood(5), backend="tiled")
    grad = train()
    with torch.inference_mode():
        again = attend(q, k, v, P.Neighborhood(5), backend="tiled")
    assert torch.equal(first, again)  # bitwise: the same operators on the same shapes
    assert torch.equal(grad, train())
    result = attend(q, k, v, P.Neighborhood(5), backend="tiled")
    kept = result.clone()
    attend(q + 1, k, v, P.Neighborhood(5), backend="tiled")
    assert torch.equal(result, kept)  # results are never in the memory that is used again


def _child(connection, q):
    torch.set_num_threads(3)
    connection.send(float(attend(q, q, q, P.Neighborhood(5), backend="tiled").double().sum()))


def test_a_forked_process_has_threads_of_its_own(three_threads, monkeypatch):
    monkeypatch.setattr("regard.ops.tiles.chunks.BUFFER", 1 << 11)
    monkeypatch.setattr("regard.ops.backends.tiled.SHARED_FLOPS", 0)
    q = torch.randn(1, 20, 20, 2, 8)
    mine = float(attend(q, q, q, P.Neighborhood(5), backend="tiled").double().sum())  # the pool is there before the fork
    here, there = multiprocessing.get_context("fork").Pipe()
    child = multiprocessing.get_context("fork").Process(target=_child, args=(there, q))
    child.start()
    assert here.poll(60), "the child waits for threads that it does not have"
    assert here.recv() == pytest.approx(mine, rel=1e-6)
    child.join()
