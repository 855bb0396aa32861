"""Softmax and linear attention in float64, all pairs at once, from formulas alone; gradients by torch's autograd."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .sets import Scene, Spec, offset


@dataclass
class Asked:
    """One source of an attention: what it shows, and the tensors in float64."""

    scene: Scene
    k: Tensor
    v: Tensor
    q: Tensor | None = None
    bias: Tensor | None = None
    table: Tensor | None = None
    table_spec: Spec | None = None
    valid: Tensor | None = None
    heads: tuple[int, ...] | None = None
    visible: Tensor = field(init=False)

    def __post_init__(self) -> None:
        seen = torch.from_numpy(np.ascontiguousarray(self.scene.seen()))
        if self.valid is not None:
            seen = seen & self.outer(self.valid.flatten(1)[..., None], True)[:, None, None, :, 0]
        self.visible = seen

    def outer(self, t: Tensor, fill: float) -> Tensor:
        """A tensor ``(batch, keys, n)`` of the grid with its margin."""
        full = t.new_full((t.shape[0], len(self.scene.k), t.shape[-1]), fill)
        full[:, torch.from_numpy(self.scene.inside)] = t
        return full

    def logits(self, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """``(batch, heads, queries, keys)`` and the values ``(batch, heads, keys, dim)``, for this source's heads."""
        q = self.q if self.q is not None else q
        q = q if self.heads is None else q[..., list(self.heads), :]
        q, k, v = (t.flatten(1, -3) for t in (q, self.k, self.v))
        heads, group = q.shape[-2], q.shape[-2] // k.shape[-2]
        k, v = (self.outer(t.flatten(2), 0.0).unflatten(-1, t.shape[2:]).repeat_interleave(group, 2) for t in (k, v))
        scores = scale * torch.einsum("bqhd,bkhd->bhqk", q, k)
        if self.table is not None:
            scores = scores + self.relative(heads)
        if self.bias is not None:
            inside = torch.from_numpy(self.scene.inside)
            full = scores.new_zeros(scores.shape)
            given = self.bias.expand(*scores.shape[:3], int(inside.sum()))
            scores = scores + full.index_copy(3, inside.nonzero().flatten(), given)
        return scores, v.transpose(1, 2)

    def relative(self, heads: int) -> Tensor:
        scene, table = self.scene, self.table
        assert table is not None
        assert self.table_spec is not None
        index = torch.zeros(len(scene.q), len(scene.k), dtype=torch.long)
        for axis, n in enumerate(scene.k_grid):
            size = table.shape[1 + axis]
            steps = {
                (q, k): offset(self.table_spec, axis, q, k, n)
                for q, k in itertools.product({q[axis] for q in scene.q}, {k[axis] for k in scene.k})
            }
            found = torch.tensor([[steps[q[axis], k[axis]] for k in scene.k] for q in scene.q]) + size // 2
            index = index * size + found.clamp(0, size - 1)  # beyond the table only where nothing is seen
        return table.flatten(1)[:, index].expand(heads, -1, -1)[None]


def attention(q: Tensor, sources: list[Asked], scale: float, sink: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Output ``(batch, *grid, heads, dim)`` and lse: one softmax over the keys of all sources, and a sink of value zero."""
    batch, *grid, heads, _ = q.shape
    scores, values, weights = [], [], []
    for source in sources:
        found, v = source.logits(q, scale)
        seen = source.visible.expand(found.shape)
        scores.append(torch.where(seen, found, -torch.inf))
        values.append(v)
    if any(source.heads is not None for source in sources):  # heads that a source does not have see none of its keys
        wide = []
        for source, found, v in zip(sources, scores, values, strict=True):
            at = torch.tensor(range(heads) if source.heads is None else source.heads)
            wide.append((
                found.new_full((batch, heads, *found.shape[2:]), -torch.inf).index_copy(1, at, found),
                v.new_zeros(batch, heads, *v.shape[2:]).index_copy(1, at, v),
            ))  # fmt: skip
        scores, values = [s for s, _ in wide], [v for _, v in wide]
    row = torch.cat(scores, -1)
    top = row.detach().amax(-1, keepdim=True)
    if sink is not None:
        logit = sink.reshape(1, -1, 1, 1)
        top = torch.maximum(top, logit.detach())
    top = top.masked_fill(top.isinf(), 0.0)
    weights = torch.exp(row - top)
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(logit - top)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    out = torch.einsum("bhqk,bhkd->bqhd", weights / total, torch.cat(values, 2))
    lse = (top + total.log()).masked_fill(empty, -torch.inf).squeeze(-1).transpose(1, 2)
    return out.unflatten(1, grid), lse.unflatten(1, grid)


# --------------------------------------------------------------------------------------------------------------------
# linear attention

FEATURES = {"none": lambda x: x, "relu": torch.relu, "elu_plus_one": lambda x: F.elu(x) + 1, "silu": F.silu}


@dataclass
class Linear:
    """Arguments of a linear attention on flat tokens ``(batch, tokens, heads, dim)``, in float64."""

    feature: str = "none"
    norm: str = "none"
    floor: float | None = None
    eps: float = 0.0
    causal: bool = False
    scale: float | Tensor = 1.0

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, logs: Tensor | None, valid: Tensor | None, state: list[Tensor | None]
    ) -> tuple[Tensor, list[Tensor | None], Tensor]:
        """The output, what all keys leave (memory, total, keys seen), and the least divisor that is not 0."""
        (batch, n, heads, _), tokens = q.shape, k.shape[1]
        fq, fk = FEATURES[self.feature](q), FEATURES[self.feature](k)
        there = torch.ones(batch, tokens) if valid is None else valid
        there = there.to(q.dtype).expand(batch, tokens)
        fk = fk * there[..., None, None]
        left = torch.ones(1, n, tokens, 1, 1, dtype=q.dtype)  # (batch, queries, keys, heads, width)
        entering = torch.ones(1, n, 1, 1, dtype=q.dtype)
        if logs is not None:
            decay = logs.exp()
            decay = decay.reshape(1, 1, heads, -1).expand(-1, n, -1, -1) if logs.ndim <= 2 else decay
            decay = decay.unsqueeze(-1) if decay.ndim == 3 else decay
            left, entering = remains(decay), decay.cumprod(1)
        if self.causal:
            left = left * torch.ones(n, tokens, dtype=q.dtype).tril()[None, :, :, None, None]
        weights = torch.einsum("bthd,bshd,btshd->bths", fq, fk, left.expand(batch, -1, -1, heads, fq.shape[-1]))
        y, mass = torch.einsum("bths,bshe->bthe", weights, v), weights.sum(-1)
        seen = there.cumsum(1) if self.causal else there.sum(1, keepdim=True).expand(batch, n)
        memory, total, keys = state
        if memory is not None:
            y = y + torch.einsum("bthd,bhde->bthe", fq * entering, memory)
        if total is not None:
            mass = mass + torch.einsum("bthd,bhd->bth", fq * entering, total)
        if keys is not None:
            seen = seen + keys[:, None]
        divisor = torch.ones_like(mass)
        if self.norm == "sum":
            divisor = (mass if self.floor is None else mass.clamp(min=self.floor)) + self.eps
            y = torch.where((divisor == 0)[..., None], 0.0, y / torch.where(divisor == 0, 1.0, divisor)[..., None])
        elif self.norm == "count":
            y = y / seen.clamp(min=1.0)[..., None, None]
        y = y * torch.as_tensor(self.scale, dtype=q.dtype).reshape(-1, 1)
        last = left[:, -1].expand(batch, -1, heads, fk.shape[-1]) if logs is not None else torch.ones_like(fk)
        past = entering[:, -1].expand(batch, heads, fk.shape[-1])
        leaves: list[Tensor | None] = [torch.einsum("bshd,bshe->bhde", fk * last, v), (fk * last).sum(1), there.sum(1)]
        if memory is not None:
            leaves[0] = leaves[0] + memory * past[..., None]
        if total is not None:
            leaves[1] = leaves[1] + total * past
        if keys is not None:
            leaves[2] = leaves[2] + keys
        return y, leaves, divisor


def remains(decay: Tensor) -> Tensor:
    """What is left between two tokens, in both directions: the product of the decays after the earlier, up to the later."""
    batch, n, heads, width = decay.shape
    rows = [decay.new_ones(batch, 1, heads, width)]
    for t in range(1, n):
        rows.append(torch.cat([rows[-1] * decay[:, t : t + 1], decay.new_ones(batch, 1, heads, width)], 1))
    lower = torch.stack([F.pad(row, (0, 0, 0, 0, 0, n - row.shape[1])) for row in rows], 1)  # (batch, later, earlier, ...)
    strict = lower * torch.ones(n, n).tril(-1)[None, :, :, None, None]
    return lower + strict.transpose(1, 2)
