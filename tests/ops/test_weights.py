"""The attention weights are those that the attention used."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from regard import Source, attend
from regard.ops import attend_weights
from regard.ops import patterns as P
from regard.ops.attention import weights
from regard.ops.calls.observe import OBSERVERS, Record
from regard.ops.calls.source import HeadTable

from .cases import cases


def applied(found: list[Tensor], sources: list[Source], heads: int) -> Tensor:
    """The weights times the values: ``(batch, queries, heads, value_dim)``."""
    total: Tensor | int = 0
    for weight, source in zip(found, sources, strict=True):
        covered = list(source.heads or range(heads))
        v = source.v.flatten(1, -3).repeat_interleave(len(covered) // source.v.shape[-2], 2)
        part = torch.einsum("bhqk,bkhd->bqhd", weight.flatten(3)[:, covered], v)
        everyone = part.new_zeros(*part.shape[:2], heads, part.shape[-1])
        total = total + everyone.index_copy(2, torch.tensor(covered), part)
    return total  # type: ignore[return-value]  # there is a source


@given(cases())
@settings(max_examples=100)
def test_weights_times_values_are_the_output(case):
    tensors = case.tensors(torch.float64)
    table = HeadTable(tensors["table"], case.pattern) if case.table else None
    sources = [Source(tensors["k"], tensors["v"], case.pattern, bias=table, valid=case.mask())]
    found = attend_weights(tensors["q"], sources, scale=case.scale, sink=case.sink)
    assert found[0].shape == (case.batch, case.heads, tensors["q"].shape[1:-2].numel(), *case.grid)
    out = applied(found, sources, case.heads)
    expected, lse = case.run(tensors, "reference")
    torch.testing.assert_close(out.view_as(expected), expected, rtol=1e-11, atol=1e-11)
    inputs = list(tensors.values())
    for left, right in zip(
        torch.autograd.grad(out.sin().sum(), inputs), torch.autograd.grad(expected.sin().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)
    assert lse.shape == expected.shape[:-1]


def several() -> tuple[Tensor, list[Source]]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(2, *shape, dtype=torch.float64)

    heads = P.PerHead({P.Neighborhood(3, border="zero"): 2, P.Dense(): 1, P.Window(4, pad="zero"): 1})
    sources = [
        Source(normal(5, 6, 4, 8), normal(5, 6, 4, 3), heads),
        Source(normal(7, 2, 8), normal(7, 2, 3), valid=torch.rand(2, 7) > 0.5),
        Source(normal(5, 6, 1, 8), normal(5, 6, 1, 3), P.Halo(2, 1), heads=(3, 1)),
    ]
    return normal(5, 6, 4, 8), sources


@pytest.mark.parametrize("sink", [None, 0.3, "per head"])
def test_weights_of_several_sources_compete_in_one_softmax(sink):
    q, sources = several()
    sink = torch.randn(4, dtype=torch.float64) if sink == "per head" else sink
    found = attend_weights(q, sources, scale=0.7, sink=sink)
    expected, lse = attend(q, sources, scale=0.7, sink=sink, return_lse=True)
    torch.testing.assert_close(applied(found, sources, 4).view_as(expected), expected, rtol=1e-11, atol=1e-11)
    assert [w.shape for w in found] == [(2, 4, 30, 5, 6), (2, 4, 30, 7), (2, 4, 30, 5, 6)]
    shown = sum(w.flatten(3).sum(-1) for w in found)
    logit = torch.as_tensor(-torch.inf if sink is None else sink, dtype=torch.float64)
    mass = torch.exp(logit.view(-1, 1) - lse.flatten(1, 2).mT)
    assert (shown + mass <= 1 + 1e-11).all()
    torch.testing.assert_close((shown + mass)[:, 2], torch.ones(2, 30, dtype=torch.float64))  # a head without zero keys


def test_rows_and_reductions_are_parts_of_the_whole(monkeypatch):
    q, sources = several()
    whole = attend_weights(q, sources)
    monkeypatch.setattr(weights, "CHUNK", 2000)  # a few rows at a time
    rows = [29, 3, 3]
    for left, right in zip(attend_weights(q, sources, rows=rows), whole, strict=True):
        torch.testing.assert_close(left, right[:, :, rows])
    for left, right in zip(attend_weights(q, sources, rows=torch.tensor(rows), reduce="heads"), whole, strict=True):
        torch.testing.assert_close(left, right[:, :, rows].mean(1))
    for left, right in zip(attend_weights(q, sources, reduce="rows"), whole, strict=True):
        torch.testing.assert_close(left, right.mean(2))


def test_weights_of_bfloat16_are_float32_and_sum_to_one():
    q = torch.randn(1, 9, 2, 8, dtype=torch.bfloat16)
    (found,) = attend_weights(q, [Source(q, q, "neighborhood(3)")])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(-1), torch.ones(1, 2, 9))
    assert found[0, 0].ne(0).equal(P.Neighborhood(3).mask((9,)))


def test_observers_get_the_record_and_its_weights():
    q, sources = several()
    records: list[Record] = []
    sink = torch.randn(4, dtype=torch.float64)
    expected = attend(q, sources, sink=sink)
    OBSERVERS.append(records.append)
    try:
        out = attend(q, sources, sink=sink)
        attend(q, q, q, "neighborhood(3)", q_start=0, scale=0.5)
    finally:
        OBSERVERS.remove(records.append)
    attend(q, q, q)
    assert out.equal(expected)  # watching changes nothing
    assert len(records) == 2
    assert records[0].q is q
    assert [len(r.calls) for r in records] == [5, 1]  # three patterns by head, and two sources more
    assert [s.k is t.k for s, t in zip(records[0].sources, sources, strict=True)] == [True] * 3
    assert records[1].scale == 0.5
    assert records[1].q_start == (0, 0)
    found = weights.weights_of(records[0], rows=[4])
    torch.testing.assert_close(applied(found, sources, 4)[:, 0], expected.flatten(1, 2)[:, 4], rtol=1e-10, atol=1e-10)
    assert not OBSERVERS
