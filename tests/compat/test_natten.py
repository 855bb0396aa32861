"""NATTEN's interface: equal to its definition in float64, to NATTEN itself where that runs, and found by `import natten`."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import naive
import pytest
import torch

from regard.compat import natten as ours
from regard.compat.natten import context, legacy, types
from regard.compat.natten.arguments import check_all_args
from regard.compat.natten.functional import neighborhood_attention_generic
from regard.compat.natten.utils.varlen import generate_varlen_parameters
from regard.ops.backends.natten import INSTALLED

PEER = pytest.mark.skipif(not INSTALLED, reason="natten is not installed")

FUSED = {1: ours.na1d, 2: ours.na2d, 3: ours.na3d}
BIASED = {1: legacy.na1d, 2: legacy.na2d, 3: legacy.na3d}
QK = {1: ours.functional.na1d_qk, 2: ours.functional.na2d_qk, 3: ours.functional.na3d_qk}
AV = {1: ours.functional.na1d_av, 2: ours.functional.na2d_av, 3: ours.functional.na3d_av}

CASES = [
    ((11,), {"kernel_size": 4}),
    ((13,), {"kernel_size": 3, "dilation": 3, "is_causal": True}),
    ((9,), {"kernel_size": 9, "is_causal": (True,)}),
    ((7, 9), {"kernel_size": 3, "stride": 2}),
    ((8, 9), {"kernel_size": (3, 4), "dilation": (2, 1)}),
    ((8, 7), {"kernel_size": (4, 3), "stride": (3, 1), "is_causal": (True, False)}),
    ((6, 6), {"kernel_size": (6, 6)}),
    ((9, 8), {"kernel_size": [2, 5], "stride": [1, 5], "dilation": (3, 1), "is_causal": [False, True]}),
    ((4, 5, 6), {"kernel_size": (2, 5, 3), "dilation": (2, 1, 2)}),
    ((3, 6, 5), {"kernel_size": (3, 3, 2), "stride": (1, 2, 2), "is_causal": (True, False, True)}),
]


def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def assert_equal_with_gradients(found, expected, inputs) -> None:
    """Compare outputs (a tensor or several) and the gradients of all inputs through all of them."""
    found, expected = ((x,) if isinstance(x, torch.Tensor) else tuple(x) for x in (found, expected))
    torch.testing.assert_close(found, expected)
    grads = [torch.randn_like(x) for x in found]
    found_grads = torch.autograd.grad(found, inputs, grads, retain_graph=True)
    torch.testing.assert_close(found_grads, torch.autograd.grad(expected, inputs, grads, retain_graph=True))


@pytest.mark.parametrize(("grid", "arguments"), CASES)
def test_fused_equals_the_definition_with_gradients_of_output_and_lse(grid, arguments):
    q, k, v = tensors((2, *grid, 4, 3), (2, *grid, 2, 3), (2, *grid, 2, 5))  # fewer key heads, wider values
    found = FUSED[len(grid)](q, k, v, **arguments, return_lse=True)
    assert_equal_with_gradients(found, naive.attention(q, k, v, **arguments), (q, k, v))
    torch.testing.assert_close(FUSED[len(grid)](q, k, v, **arguments), found[0])


@pytest.mark.parametrize(("grid", "arguments"), CASES[1:9:2])
def test_additional_tokens_share_the_softmax(grid, arguments):
    q, k, v, *more = tensors((2, *grid, 2, 4), (2, *grid, 2, 4), (2, *grid, 2, 4), (2, 3, 2, 4), (2, 3, 2, 4))
    found = FUSED[len(grid)](
        q, k, v, **arguments, scale=0.3, additional_keys=more[0], additional_values=more[1], return_lse=True
    )
    expected = naive.attention(q, k, v, **arguments, scale=0.3, more=more)
    assert_equal_with_gradients(found, expected, (q, k, v, *more))


def test_arguments_of_natten_kernels_change_nothing():
    q, k, v = tensors(*[(1, 8, 8, 2, 4)] * 3)
    plain = ours.na2d(q, k, v, 3, 1, 2, None, None)
    tuned = neighborhood_attention_generic(
        q, k, v, 3, None, 2, False, 0.0, attention_kwargs={"backend": "flex-fmha"}, backend="cutlass-fna",
        q_tile_shape=(8, 8), kv_tile_shape=(8, 8), backward_q_tile_shape=(8, 8), backward_kv_tile_shape=(8, 8),
        backward_kv_splits=(1, 1), backward_use_pt_reduction=True, run_persistent_kernel=False, kernel_schedule="pp",
        torch_compile=True,
    )  # fmt: skip
    assert tuned.equal(plain)  # bitwise: the same operators on the same shapes


@pytest.mark.parametrize(("queries", "keys"), [(6, 6), (4, 7), (7, 4)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_is_dense_or_causal_from_the_first_key_on(queries, keys, is_causal):
    q, k, v = tensors((2, queries, 4, 3), (2, keys, 2, 3), (2, keys, 2, 5))
    found = ours.attention(q, k, v, is_causal=is_causal, scale=0.7, return_lse=True)
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, 2)) * 0.7
    if is_causal:
        hidden = torch.arange(keys) > torch.arange(queries)[:, None]
        logits = logits.masked_fill(hidden, -torch.inf)
    out = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v.repeat_interleave(2, 2))
    assert_equal_with_gradients(found, (out, logits.logsumexp(-1).transpose(1, 2)), (q, k, v))


def test_packed_sequences_are_attended_one_by_one():
    lengths_q, lengths_k = torch.tensor([[3, 1, 4], [2, 5, 1]], dtype=torch.int32)
    q, k, v = tensors((1, 8, 2, 3), (1, 8, 2, 3), (1, 8, 2, 3))
    found = ours.attention(q, k, v, is_causal=True, seqlens_Q=lengths_q, seqlens_KV=lengths_k, return_lse=True)
    parts = zip(*(t.split(n.tolist(), 1) for t, n in ((q, lengths_q), (k, lengths_k), (v, lengths_k))), strict=True)
    expected = zip(*(ours.attention(*part, is_causal=True, return_lse=True) for part in parts), strict=True)
    assert_equal_with_gradients(found, [torch.cat(part, 1) for part in expected], (q, k, v))
    ends_q, ends_k, longest_q, longest_k = generate_varlen_parameters(q, k, v, lengths_q, lengths_k)
    assert (ends_q.tolist(), ends_k.tolist(), longest_q, longest_k) == ([0, 3, 4, 8], [0, 2, 7, 8], 4, 5)
    again = ours.attention(
        q, k, v, is_causal=True, cumulative_seqlen_Q=ends_q, cumulative_seqlen_KV=ends_k, max_seqlen_Q=4, max_seqlen_KV=5
    )
    assert again.equal(found[0])  # bitwise: the same operators on the same shapes
    with pytest.raises(ValueError, match=r"rising from 0 to the tokens; got \[0, 3, 4, 8\] for \(1, 7, 2, 3\)"):
        ours.attention(q[:, :7], k, v, cumulative_seqlen_Q=ends_q, cumulative_seqlen_KV=ends_k)


def test_merged_attentions_are_one_softmax_with_its_gradients():
    q, k, v = tensors((2, 5, 2, 3), (2, 9, 2, 3), (2, 9, 2, 4))
    parts = [ours.attention(q, k[:, a:b], v[:, a:b], return_lse=True) for a, b in ((0, 2), (2, 3), (3, 9))]
    found = ours.merge_attentions([out for out, _ in parts], [lse for _, lse in parts])
    assert_equal_with_gradients(found, ours.attention(q, k, v, return_lse=True), (q, k, v))
    with pytest.raises(ValueError, match="at least two outputs with their lse; got 1 and 1"):
        ours.merge_attentions([parts[0][0]], [parts[0][1]])
    with pytest.raises(ValueError, match=r"\(2, 5, 2, 4\) with \(2, 5, 2\), \(2, 4, 2, 4\) with \(2, 5, 2\)"):
        ours.merge_attentions([parts[0][0], parts[1][0][:, :4]], [parts[0][1], parts[1][1]])


HALVES = [
    ((11,), {"kernel_size": 5}),
    ((12,), {"kernel_size": 3, "dilation": 4, "is_causal": True}),
    ((7, 9), {"kernel_size": (3, 5), "dilation": (2, 1)}),
    ((7, 8), {"kernel_size": (5, 3), "is_causal": (False, True)}),
    ((3, 6, 4), {"kernel_size": (3, 5, 3)}),
    ((3, 6, 3), {"kernel_size": 3, "dilation": (1, 2, 1), "is_causal": (True, False, False)}),
]


@pytest.mark.parametrize(("grid", "arguments"), HALVES)
def test_halves_equal_the_definition_with_gradients(grid, arguments):
    kernels = naive.each(arguments["kernel_size"], len(grid))
    q, k, v, rpb = tensors(*[(2, 2, *grid, 3)] * 3, (2, *(2 * n - 1 for n in kernels)))
    scores = QK[len(grid)](q, k, **arguments, rpb=rpb)
    expected = naive.scores(q, k, **arguments, rpb=rpb)
    torch.testing.assert_close(scores, expected)
    assert_equal_with_gradients(scores.softmax(-1), expected.softmax(-1), (q, k, rpb))
    weights = torch.randn_like(scores).requires_grad_()
    assert_equal_with_gradients(AV[len(grid)](weights, v, **arguments), naive.sums(weights, v, **arguments), (weights, v))


@pytest.mark.parametrize(("grid", "arguments"), HALVES)
def test_halves_and_fused_are_the_same_attention(grid, arguments):
    rank = len(grid)
    kernels = naive.each(arguments["kernel_size"], rank)
    shapes = [*[(2, *grid, 2, 3)] * 3, (2, *(2 * n - 1 for n in kernels)), (2, 4, 2, 3), (2, 4, 2, 3)]
    q, k, v, rpb, keys, values = tensors(*shapes)
    fused = BIASED[rank](q, k, v, **arguments, rpb=rpb, scale=0.5, additional_keys=keys, additional_values=values)
    expected, _ = naive.attention(q, k, v, **arguments, rpb=rpb, scale=0.5, more=(keys, values))
    assert_equal_with_gradients(fused, expected, (q, k, v, rpb, keys, values))
    heads_first = [t.transpose(1, 2) if t.ndim == 4 and t.shape[1] == 4 else t.movedim(-2, 1) for t in (q, k, v, keys, values)]
    scores = QK[rank](heads_first[0] * 0.5, heads_first[1], **arguments, rpb=rpb)
    weights = QK[rank](heads_first[0] * 0.5, heads_first[1], **arguments, rpb=rpb, additional_keys=heads_first[3]).softmax(-1)
    assert weights.shape == (*scores.shape[:-1], scores.shape[-1] + 4)
    halves = AV[rank](weights, heads_first[2], **arguments, additional_values=heads_first[4])
    assert_equal_with_gradients(halves.movedim(1, -2), expected, (q, k, v, rpb, keys, values))


def test_oldest_names_take_their_arguments_in_their_order():
    q, k, v, rpb = tensors(*[(1, 2, 4, 3, 4, 3)] * 3, (2, 3, 5, 5))
    scores = naive.scores(q, k, (2, 3, 3), (2, 1, 1), rpb=rpb)
    f = ours.functional
    torch.testing.assert_close(f.natten3dqkrpb(q, k, rpb, 2, 3, 2, 1), scores)
    torch.testing.assert_close(f.natten3dqk(q, k, 2, 3, 2, 1), naive.scores(q, k, (2, 3, 3), (2, 1, 1)))
    torch.testing.assert_close(f.natten3dav(scores, v, 2, 3, 2, 1), naive.sums(scores, v, (2, 3, 3), (2, 1, 1)))
    q, k, v, rpb = tensors(*[(1, 2, 6, 7, 3)] * 3, (2, 5, 5))
    scores = naive.scores(q, k, 3, 2, rpb=rpb)
    torch.testing.assert_close(f.natten2dqkrpb(q, k, rpb, 3, 2), scores)
    torch.testing.assert_close(f.natten2dqk(q, k, 3, 2), naive.scores(q, k, 3, 2))
    torch.testing.assert_close(f.natten2dav(scores, v, 3, 2), naive.sums(scores, v, 3, 2))
    q, k, v, rpb = tensors(*[(1, 2, 9, 3)] * 3, (2, 9))
    scores = naive.scores(q, k, 5, 1, rpb=rpb)
    torch.testing.assert_close(f.natten1dqkrpb(q, k, rpb, 5, 1), scores)
    torch.testing.assert_close(f.natten1dqk(q, k, 5, 1), naive.scores(q, k, 5, 1))
    torch.testing.assert_close(f.natten1dav(scores, v, 5, 1), naive.sums(scores, v, 5, 1))


def projected(module: torch.nn.Module, x: torch.Tensor, **arguments) -> torch.Tensor:
    """What a module of NATTEN computes, from the weights in its state dict."""
    state, heads = module.state_dict(), module.num_heads
    q, k, v = (x @ state["qkv.weight"].T + state["qkv.bias"]).chunk(3, -1)
    q, k, v = (t.unflatten(-1, (heads, -1)) for t in (q, k, v))
    out, _ = naive.attention(q, k, v, rpb=state.get("rpb"), **arguments)
    return out.flatten(-2) @ state["proj.weight"].T + state["proj.bias"]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_modules_compute_from_the_weights_of_their_state_dict(rank):
    arguments = {"kernel_size": (3, 4, 2)[:rank], "dilation": (2, 1, 1)[:rank], "is_causal": (False, True, False)[:rank]}
    x = torch.randn(2, *(7, 5, 3)[:rank], 8, dtype=torch.float64)
    new = getattr(ours, f"NeighborhoodAttention{rank}D")(8, 2, stride=2, qk_scale=0.2, **arguments).double()
    assert sorted(new.state_dict()) == ["proj.bias", "proj.weight", "qkv.bias", "qkv.weight"]
    torch.testing.assert_close(new(x), projected(new, x, stride=2, scale=0.2, **arguments))
    arguments = {"kernel_size": (3, 5, 3)[:rank], "dilation": (2, 1, 1)[:rank]}
    old = getattr(legacy, f"NeighborhoodAttention{rank}D")(8, 2, rel_pos_bias=True, qk_scale=0.3, **arguments).double()
    assert sorted(old.state_dict()) == ["proj.bias", "proj.weight", "qkv.bias", "qkv.weight", "rpb"]
    assert old.rpb.shape == (2, 5, 9, 5)[: rank + 1]
    assert old.rpb.std() > 0
    torch.testing.assert_close(old(x), projected(old, x, scale=0.3, **arguments))
    old(x).square().sum().backward()
    assert old.rpb.grad.abs().sum() > 0


def test_modules_of_version_14_fill_small_maps_up_with_zeros_before_the_projection():
    module = legacy.PaddedNeighborhoodAttention2D(8, 2, 3, 2).double()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    filled = torch.cat([x, x.new_zeros(2, 2, 9, 8)], 1)  # 3 * 2 rows
    torch.testing.assert_close(module(x), projected(module, filled, kernel_size=3, dilation=2)[:, :4])
    with pytest.raises(ValueError, match=r"got kernel_size \(3, 3\) and dilation \(2, 2\) on the grid \(4, 9\)"):
        legacy.NeighborhoodAttention2D(8, 2, 3, 2).double()(x)


def test_attention_dropout_acts_in_training_unless_fused_attention_is_asked_for():
    module = legacy.NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True, attn_drop=0.5).double()
    x = torch.randn(1, 6, 6, 8, dtype=torch.float64)
    expected = projected(module, x, kernel_size=3).detach()
    torch.testing.assert_close(module.eval()(x), expected)
    module.train()
    with torch.no_grad():
        several = torch.stack([module(x) for _ in range(400)])
    assert several.std(0).min() > 0
    torch.testing.assert_close(several.mean(0), expected, rtol=0, atol=6 * float(several.std(0).max()) / 20)
    context.use_fna()
    try:
        assert context.is_fused_na_enabled()
        torch.testing.assert_close(module(x), expected)
    finally:
        context.use_fna(False)
    assert not context.is_fna_enabled()


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_generic_module_is_the_one_for_its_number_of_axes(rank):
    generic = ours.modules.NeighborhoodAttentionGeneric
    module = getattr(ours, f"NeighborhoodAttention{rank}D")(8, num_heads=2, kernel_size=3, stride=2, is_causal=True)
    assert isinstance(module, generic)
    assert module.na_dim == rank
    same = generic(rank, 8, 2, 3, 2, is_causal=True)
    same.load_state_dict(module.state_dict())
    x = torch.randn(2, *(7, 5, 3)[:rank], 8)
    torch.testing.assert_close(same(x), module(x))
    with pytest.raises(ValueError, match=rf"kernel_size must be an integer of at least 2, or {rank} of them"):
        generic(rank, 8, 2, (3,) * (rank + 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half_precision(dtype):
    q, k, v, keys, values = (t.detach().to(dtype) for t in tensors(*[(1, 6, 7, 2, 8)] * 3, *[(1, 3, 2, 8)] * 2))
    rpb = torch.randn(2, 5, 5, dtype=torch.float64)
    wide = [t.double() for t in (q, k, v, keys, values)]
    precision = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 2e-3, "atol": 2e-3}
    out, lse = ours.na2d(q, k, v, 3, dilation=2, additional_keys=keys, additional_values=values, return_lse=True)
    exact, exact_lse = naive.attention(*wide[:3], 3, dilation=2, more=wide[3:])
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(out.double(), exact, **precision)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    biased = legacy.na2d(q, k, v, 3, 2, rpb=rpb.float())  # a table in float32, as parameters are under autocast
    assert biased.dtype == dtype
    torch.testing.assert_close(biased.double(), naive.attention(*wide[:3], 3, dilation=2, rpb=rpb)[0], **precision)
    heads_first = [t.movedim(-2, 1) for t in (q, k, v)]
    scores = ours.functional.na2d_qk(*heads_first[:2], 3, 2, rpb=rpb.float())
    halves = ours.functional.na2d_av((scores.float() * 8**-0.5).softmax(-1), heads_first[2], 3, 2)
    assert (scores.dtype, halves.dtype) == (dtype, dtype)
    expected = naive.scores(*(t.movedim(-2, 1) for t in wide[:2]), 3, 2, rpb=rpb)
    torch.testing.assert_close(scores.double(), expected, **precision)


@pytest.mark.parametrize(
    "name", ["NeighborhoodAttention2D", "legacy.NeighborhoodAttention2D", "legacy.PaddedNeighborhoodAttention2D"]
)
def test_modules_under_autocast_and_in_one_graph(name):
    made = getattr(legacy, name.removeprefix("legacy.")) if "legacy" in name else getattr(ours, name)
    options = {"rel_pos_bias": True} if name == "legacy.NeighborhoodAttention2D" else {}
    module = made(16, 2, 3, dilation=2, **options)
    x = torch.randn(2, 7, 8, 16)
    expected = module(x)
    graph = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(graph(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = module(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.02)
    found.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


def test_functions_in_one_graph():
    q, k, v = tensors(*[(1, 9, 2, 3)] * 3)

    def both(q, k, v):
        local = ours.na1d(q, k, v, 3, stride=2, is_causal=True, return_lse=True)
        return ours.merge_attentions(*zip(local, ours.attention(q, k, v, is_causal=True, return_lse=True), strict=True))

    found = torch.compile(both, fullgraph=True, backend="aot_eager")(q, k, v)
    assert_equal_with_gradients(found, both(q, k, v), (q, k, v))


def test_packed_sequences_in_a_compiled_function():
    q, k, v = tensors(*[(1, 9, 2, 3)] * 3)
    ends, _, longest, _ = generate_varlen_parameters(q, k, v, *[torch.tensor([4, 5], dtype=torch.int32)] * 2)
    lengths = {"cumulative_seqlen_Q": ends, "cumulative_seqlen_KV": ends, "max_seqlen_Q": longest, "max_seqlen_KV": longest}

    def packed(q, k, v):
        return ours.attention(2 * q, k, v, **lengths, is_causal=True, return_lse=True)

    assert_equal_with_gradients(torch.compile(packed, backend="aot_eager")(q, k, v), packed(q, k, v), (q, k, v))


def test_sequences_without_keys_or_queries():
    q, k, v = tensors((1, 3, 2, 4), (1, 5, 2, 4), (1, 5, 2, 6))
    lengths = torch.tensor([[2, 0, 1], [0, 3, 2]], dtype=torch.int32)
    out, lse = ours.attention(q, k, v, seqlens_Q=lengths[0], seqlens_KV=lengths[1], return_lse=True)
    assert not out[:, :2].any()
    assert lse[:, :2].eq(-torch.inf).all()
    expected = ours.attention(q[:, 2:], k[:, 3:], v[:, 3:], return_lse=True)
    torch.testing.assert_close((out[:, 2:], lse[:, 2:]), expected)


def test_errors_say_what_was_given():
    q = torch.randn(1, 6, 8, 2, 4)
    with pytest.raises(ValueError, match=r"kernel_size must be an integer of at least 2, or 2 of them.*got \(3,\)"):
        ours.na2d(q, q, q, (3,))
    with pytest.raises(ValueError, match=r"kernel_size must be an integer of at least 2.*got 1"):
        ours.na2d(q, q, q, 1)
    with pytest.raises(ValueError, match=r"is_causal must be a boolean.*got 1"):
        ours.na2d(q, q, q, 3, is_causal=1)
    with pytest.raises(ValueError, match="stride must not exceed kernel_size; got stride 4, kernel_size 3"):
        ours.na2d(q, q, q, 3, stride=4)
    with pytest.raises(ValueError, match=r"must not exceed the grid on any axis.*on the grid \(6, 8\)"):
        ours.na2d(q, q, q, 3, dilation=3)
    with pytest.raises(ValueError, match=r"dilation \(2, 3\) on the grid \(6, 8\)"):
        ours.na2d(q, q, q, 3, dilation=(2, 3))  # seven columns from the first key to the last, but only eight of nine
    with pytest.raises(ValueError, match=r"na3d takes tensors with 6 axes.*got 5"):
        ours.na3d(q, q, q, 3)
    with pytest.raises(ValueError, match=r"on one grid of 1 to 3 axes; got query \(1, 6, 8, 2, 4\), key \(1, 5, 8, 2, 4\)"):
        ours.na2d(q, q[:, 1:], q[:, 1:], 3)
    with pytest.raises(ValueError, match=r"belong together.*got \(1, 3, 2, 4\) and None"):
        ours.na2d(q, q, q, 3, additional_keys=torch.randn(1, 3, 2, 4))
    with pytest.raises(ValueError, match=r"rpb is for 4 heads; query \(batch, heads, \*grid, dim\) is \(1, 6, 8, 2, 4\)"):
        ours.functional.natten2dqkrpb(q, q, torch.randn(4, 5, 5), 3, 1)
    with pytest.raises(ValueError, match="default, strict, unrestricted; got 'much'"):
        context.set_memory_usage_preference("much")


def test_switches_remember_and_questions_are_answered():
    assert context.has_fna()
    assert context.has_fna(0)
    assert context.has_half()
    assert not context.has_gemm()
    assert context.has_cuda() == torch.cuda.is_available()
    ours.use_deterministic_algorithms()
    assert ours.are_deterministic_algorithms_enabled()
    ours.use_deterministic_algorithms(False)
    assert not ours.are_deterministic_algorithms_enabled()
    ours.set_memory_usage_preference("strict")
    assert ours.is_memory_usage_strict()
    ours.set_memory_usage_preference()
    assert ours.is_memory_usage_default()
    assert ours.get_configs_for_cutlass_fna(None) == []
    with pytest.raises(AttributeError, match="no attribute 'na4d'"):
        _ = ours.na4d


@PEER
@pytest.mark.peer
@pytest.mark.parametrize(("grid", "arguments"), [case for case in CASES if case[0] != (9,)])  # it refuses causal attention
def test_peer_fused_equals_natten(grid, arguments):
    import natten

    q, k, v = (torch.randn(2, *grid, heads, 8) for heads in (4, 2, 2))
    keys, values = torch.randn(2, 2, 3, 2, 8)
    extra = {"additional_keys": keys, "additional_values": values, "attention_kwargs": {"backend": "flex-fmha"}}
    for options in ({}, {"scale": 0.2}, extra):
        found = FUSED[len(grid)](q, k, v, **arguments, **options, return_lse=True)
        expected = getattr(natten, f"na{len(grid)}d")(q, k, v, **arguments, **options, return_lse=True)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@PEER
@pytest.mark.peer
def test_peer_modules_load_natten_weights_and_equal_it():
    import natten

    for rank in (1, 2, 3):
        name = f"NeighborhoodAttention{rank}D"
        theirs, mine = (getattr(m, name)(16, 2, 3, stride=2, is_causal=True, qkv_bias=False) for m in (natten, ours))
        mine.load_state_dict(theirs.state_dict())
        x = torch.randn(2, *(7, 6, 5)[:rank], 16)
        with torch.no_grad():
            torch.testing.assert_close(mine(x), theirs(x), rtol=1e-5, atol=1e-5)
        assert repr(mine) == repr(theirs)


@PEER
@pytest.mark.peer
def test_peer_every_public_name_is_there_with_its_arguments_and_defaults():
    import natten
    import natten.functional
    import natten.modules
    import natten.types
    import natten.utils.checks
    import natten.utils.varlen

    def arguments(function):
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    assert [name for name in natten.__all__ if not hasattr(ours, name)] == []
    names = [
        "attention",
        "merge_attentions",
        *(f"na{n}d" for n in (1, 2, 3)),
        *(f"NeighborhoodAttention{n}D" for n in (1, 2, 3)),
    ]
    for name in names:
        assert arguments(getattr(ours, name)) == arguments(getattr(natten, name)), name
    assert arguments(neighborhood_attention_generic) == arguments(natten.functional.neighborhood_attention_generic)
    assert arguments(generate_varlen_parameters) == arguments(natten.utils.varlen.generate_varlen_parameters)
    assert arguments(check_all_args) == arguments(natten.utils.checks.check_all_args)
    generic = natten.modules.NeighborhoodAttentionGeneric
    assert arguments(ours.modules.NeighborhoodAttentionGeneric) == arguments(generic)
    assert {name for name in types.__all__ if not hasattr(natten.types, name)} == set()
    assert [each.value for each in types.KernelSchedule] == [each.value for each in natten.types.KernelSchedule]


HIDE = """
import sys
class Hiding:  # as if NATTEN were not installed
    def __init__(self, finder): self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] == "natten" else self.finder.find_spec(name, path, target)
    def __getattr__(self, name): return getattr(self.finder, name)
sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
import torch
torch.set_num_threads(1)
from regard.compat import natten as compat
"""


def run(code: str, **environment: str) -> str:
    """What a fresh Python prints: the table of modules of this one stays as it is."""
    here = os.environ | environment
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=here, check=False)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_import_natten_finds_regard_where_natten_is_absent():
    run(
        HIDE
        + """
import importlib, importlib.util, pickle
def missing(name):
    try: importlib.import_module(name)
    except ModuleNotFoundError as error: return str(error)
assert missing("natten") == "No module named 'natten'"
compat.install()
import natten
from natten import na2d, NeighborhoodAttention2D
from natten.functional import natten2dqkrpb, na3d_av, merge_attentions
from natten.utils.varlen import generate_varlen_parameters
from natten.utils.checks import check_all_args
from natten.utils import log
from natten.types import DimensionTypeOrDed, CausalArgTypeOrDed, KernelSchedule
from natten.modules import NeighborhoodAttentionGeneric
import natten.context
assert check_all_args(2, 3, None, (1, 2), True) == ((3, 3), (1, 1), (1, 2), (True, True))
assert log.get_logger("natten").name == "natten" and issubclass(NeighborhoodAttention2D, NeighborhoodAttentionGeneric)
assert na2d is compat.na2d and natten.functional.na2d is compat.na2d
assert natten.__version__ == "0.21.7" and not natten.HAS_LIBNATTEN and natten.get_configs_for_flex_fna() == []
assert importlib.util.find_spec("natten") is not None
assert missing("natten.libnatten") == "No module named 'natten.libnatten'"
kept = pickle.loads(pickle.dumps(NeighborhoodAttention2D(8, 2, 3)))
assert kept(torch.zeros(1, 4, 4, 8)).shape == (1, 4, 4, 8)
compat.install()
compat.install("0.17")
import natten as older
assert older is not natten and older.__version__ == "0.17.5" and older.has_fna() and hasattr(older, "context")
assert older.NeighborhoodAttention1D(8, 2, 3, 2, False, True).rpb.shape == (2, 5)
q = torch.randn(1, 8, 8, 2, 4)
expected = compat.na2d(q, q, q, 3, dilation=2, is_causal=(True, False))
assert older.functional.na2d(q, q, q, 3, 2, (True, False)).equal(expected)
from natten.types import CausalArg2DTypeOrDed, Dimension2DTypeOrDed
from natten.utils import check_all_args, log
from natten.utils.checks import check_all_args as same
from natten.context import is_fna_enabled
assert same is check_all_args and check_all_args(2, (3, 5), None, False) == ((3, 5), (1, 1), (False, False))
from natten.na2d import NeighborhoodAttention2D as second
assert second is older.NeighborhoodAttention2D and second is not NeighborhoodAttention2D
compat.install("0.14")
import natten as oldest
assert oldest.__version__ == "0.14.6" and not hasattr(oldest, "context")
assert oldest.NeighborhoodAttention2D(8, 2, 3).rpb.shape == (2, 5, 5)
from natten.natten2d import NeighborhoodAttention2D as third
from natten.functional import natten1dav
compat.uninstall()
compat.uninstall()
assert missing("natten") == "No module named 'natten'"
assert missing("natten.functional") == "No module named 'natten'"
assert not [name for name in sys.modules if name.partition(".")[0] == "natten"]
try: compat.install("0.18")
except ValueError as error: assert str(error) == "version must be one of 0.21, 0.17, 0.14; got '0.18'"
else: raise AssertionError
"""
    )


def test_a_real_natten_is_hidden_only_by_force_and_comes_back(tmp_path: Path):
    (tmp_path / "natten").mkdir()
    (tmp_path / "natten" / "__init__.py").write_text("__version__ = 'real'\nfrom . import functional\n")
    (tmp_path / "natten" / "functional.py").write_text("na2d = 'real'\n")
    run(
        """
import sys, torch
from regard import attend
from regard.compat import natten as compat
def refused():
    try: compat.install()
    except RuntimeError as error: return str(error)
assert "natten/__init__.py): use it, or hide it with install(force=True)" in refused().replace("\\\\", "/")
assert "natten" not in sys.modules
compat.install(force=True)
import natten
assert natten.na2d is compat.na2d
q = torch.randn(1, 8, 8, 2, 8)
try: attend(q, q, q, "neighborhood(3)", backend="natten")
except ValueError as error: assert "natten is regard itself" in str(error), error
else: raise AssertionError
compat.uninstall()
import natten as real, natten.functional as functional
assert real.__version__ == "real" and functional.na2d == "real"
assert refused() is not None
compat.install(force=True)
from natten.functional import na2d
assert na2d is compat.na2d
compat.uninstall()
assert sys.modules["natten"] is real and sys.modules["natten.functional"] is functional
""",
        PYTHONPATH=os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]),
    )


DINAT = (
    HIDE
    + """
import itertools, json
sys.path.insert(0, TESTS)
import naive
compat.install()
from transformers import DinatConfig, DinatForImageClassification
from transformers.models.dinat import modeling_dinat
from regard.compat import dinat

def by_hand(self, x, output_attentions=False):
    split = lambda t: t.unflatten(-1, (self.num_attention_heads, self.attention_head_size))
    q, k, v = (split(project(x)) for project in (self.query, self.key, self.value))
    out, _ = naive.attention(q, k, v, self.kernel_size, self.dilation, rpb=self.rpb)
    return (out.flatten(-2),)

def model():
    torch.manual_seed(0)
    config = DinatConfig(embed_dim=8, depths=[1, 2], num_heads=[2, 4], kernel_size=3, dilations=[[1], [1, 2]], num_labels=3,
                         drop_path_rate=0.0)
    made = DinatForImageClassification(config).double()
    with torch.no_grad():
        for parameter in made.parameters():  # biases and rpb too
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made

images, labels = torch.randn(3, 3, 28, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), torch.arange(3)
first = model()
try: before = str(first.eval()(images).logits.tolist())
except ValueError as error: before = str(error)
wrong = dinat.mend()
assert wrong == dinat.mend()
outputs = first.eval()(images, output_attentions=True)

def losses(trained):
    optimizer = torch.optim.Adam(trained.train().parameters(), lr=0.01)
    for _ in range(4):
        loss = trained(images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()

ours = list(losses(model()))
attentions = [[list(a.shape), a.sum(-1).sub(1).abs().max().item()] for a in outputs.attentions]
modeling_dinat.NeighborhoodAttention.forward = by_hand
by_hand_logits = first(images).logits
print(json.dumps({
    "wrong": wrong, "before": before, "logits": outputs.logits.tolist(), "by_hand": by_hand_logits.tolist(), "losses": ours,
    "losses_by_hand": list(losses(model())), "attentions": attentions,
}))
"""
)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_transformers_dinat_runs_and_trains_as_with_attention_written_out():
    code = DINAT.replace("TESTS", repr(str(Path(__file__).parent)))
    found = json.loads(run(code, TRANSFORMERS_VERBOSITY="error").splitlines()[-1])
    before = (
        "rpb is for 2 heads; query (batch, heads, *grid, dim) is (3, 6, 7, 2, 4)" if found["wrong"] else str(found["logits"])
    )
    assert found["before"] == before  # wrong from transformers 4.54 on
    torch.testing.assert_close(torch.tensor(found["logits"]), torch.tensor(found["by_hand"]), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found["losses"], found["losses_by_hand"], rtol=1e-10, atol=1e-10)
    assert found["losses"][-1] < 0.9 * found["losses"][0]
    shapes = [shape for shape, _ in found["attentions"]]
    assert shapes == [[3, 2, 7, 6, 9], [3, 4, 6, 6, 9]]  # of each stage the last: the second fills 4 x 3 up to its window
    assert max(error for _, error in found["attentions"]) < 1e-12


ROW, MAP, HALF = torch.randn(1, 5, 2, 4), torch.randn(1, 5, 6, 2, 4), torch.randn(1, 2, 5, 4)
LENGTH, END = torch.tensor([5], dtype=torch.int32), torch.tensor([0, 5])
DOORS = {
    "na2d": (ours.na2d, {"query": MAP, "key": MAP, "value": MAP, "kernel_size": 3, "scale": None, "return_lse": False}),
    "attention": (ours.attention, {"query": ROW, "key": ROW, "value": ROW, "is_causal": False, "scale": None}),
    "ends": (lambda **ends: ours.attention(ROW, ROW, ROW, **ends), {"cumulative_seqlen_Q": END, "cumulative_seqlen_KV": END}),
    "lengths": (lambda **lengths: ours.attention(ROW, ROW, ROW, **lengths), {"seqlens_Q": LENGTH, "seqlens_KV": LENGTH}),
    "merge": (ours.merge_attentions, {"outputs": [ROW, ROW], "lse_tensors": [ROW[..., 0], ROW[..., 0]]}),
    "qk": (ours.functional.na1d_qk, {"query": HALF, "key": HALF, "kernel_size": 3, "rpb": torch.zeros(2, 5)}),
    "av": (
        ours.functional.na1d_av,
        {"attn": torch.zeros(1, 2, 5, 5), "value": HALF, "kernel_size": 3, "additional_values": HALF[:, :, :2]},
    ),
    "old na2d": (legacy.na2d, {"query": MAP, "key": MAP, "value": MAP, "kernel_size": 3, "rpb": torch.zeros(2, 5, 5)}),
    "module": (ours.NeighborhoodAttention2D, {"embed_dim": 8, "num_heads": 2, "kernel_size": 3, "proj_drop": 0.1}),
    "any rank": (ours.modules.NeighborhoodAttentionGeneric, {"na_dim": 2, "embed_dim": 8, "num_heads": 2, "kernel_size": 3}),
    "old module": (
        legacy.NeighborhoodAttention2D,
        {"dim": 8, "num_heads": 2, "kernel_size": 3, "rel_pos_bias": True, "qk_scale": None, "attn_drop": 0.1},
    ),
    "tokens": (lambda x: ours.NeighborhoodAttention2D(8, 2, 3)(x), {"x": torch.zeros(1, 5, 6, 8)}),
    "old tokens": (lambda x: legacy.PaddedNeighborhoodAttention2D(8, 2, 3)(x), {"x": torch.zeros(1, 2, 6, 8)}),
}
WRONG = (
    "a", "", b"x", math.nan, math.inf, 1j, [1.5], {}, object(), int, -1,
    ROW.numpy(), ROW.to_sparse(), ROW.to("meta"), ROW.long(),
)  # fmt: skip


@pytest.mark.parametrize("name", DOORS)
def test_wrong_kinds_of_arguments_are_refused_in_one_sentence(name):
    door, right = DOORS[name]
    door(**right)
    for option, value in itertools.product(right, WRONG):
        if option in ("scale", "qk_scale") and isinstance(value, int):
            continue  # a negative scale is one
        with pytest.raises((TypeError, ValueError)) as caught:
            door(**{**right, option: value})
        for inside in ("has no attribute", "unsupported operand", "not supported between", "ambiguous"):
            assert inside not in str(caught.value), (option, value)
        assert str(caught.value)
