"""Routed blocks: each block of queries sees the few blocks of keys whose means suit its own best."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ...ops import attend
from ...ops import patterns as P
from ...ops.tokens import route
from ..harness import Contest, Run, Variant
from .scope import Case, Scope, against_definition, compiled_flex, gradients_against_definition, random, sdpa, with_gradients

HEADS, DIM = 4, 64


def cases(scope: Scope) -> list[Case]:
    sizes = (48, 8, 2) if scope.smoke else (4096, 64, 8)
    return [partial(_contest, scope, *sizes, backward) for backward in (False, True)]


def _contest(scope: Scope, tokens: int, block: int, listed: int, backward: bool) -> Contest:
    q, k, v = random(1, tokens, HEADS, DIM, grad=backward)
    (cotangent,) = random(1, tokens, HEADS, DIM, number=1, seed=1)

    def routed() -> P.Blocks:
        with torch.no_grad():
            means = [route.summaries(t.flatten(2), (block,)) for t in (q, k)]
            return route.top_k(route.affinity(*means), listed, (block,))

    pattern = routed()
    flat = [t.detach().transpose(1, 2).contiguous().requires_grad_(backward) for t in (q, k, v)]
    mask = torch.zeros(tokens, tokens).masked_fill_(~pattern.mask((tokens,))[0, 0], -math.inf)
    if backward:
        check: Callable = gradients_against_definition(q, k, v, pattern, cotangent)
        flat_check: Callable = gradients_against_definition(q, k, v, pattern, cotangent, lambda t: t.transpose(1, 2))
    else:
        check = flat_check = against_definition(q, k, v, pattern)

    def variant(run: Run, inputs: list[Tensor], error: Callable, peer: bool = True) -> Variant:
        return Variant(with_gradients(run, inputs, cotangent) if backward else run, error, peer)

    variants = {
        "regard, routing included": variant(lambda: attend(q, k, v, routed()), [q, k, v], check, False),
        "regard, routed before": variant(lambda: attend(q, k, v, pattern), [q, k, v], check, False),
        "SDPA, cached mask": variant(lambda: sdpa(flat, attn_mask=mask).transpose(1, 2), flat, flat_check),
    }
    if "flex" in scope.peers and not backward:
        flex = _flex(pattern, tokens, block)
        variants["FlexAttention, routed before"] = variant(lambda: flex(*flat).transpose(1, 2), flat, flat_check)
    about = {"tokens": tokens, "block": block, "listed": listed, "heads": HEADS, "head_dim": DIM, "dtype": "float32"}
    return Contest(f"routed blocks, {'forward and backward' if backward else 'forward'}", about, variants, backward)


def _flex(pattern: P.Blocks, tokens: int, block: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask

    blocks = tokens // block
    listed = torch.zeros(blocks, blocks, dtype=torch.bool).scatter_(1, pattern.table.reshape(blocks, -1), True)

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return listed[query // block, key // block]

    mask = create_block_mask(visible, None, None, tokens, tokens, device="cpu", BLOCK_SIZE=block)
    compiled = compiled_flex()
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)
