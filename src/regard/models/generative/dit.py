"""DiT: a transformer that removes noise from latents; time and class shift, scale and gate every branch.

    b1, s1, g1, b2, s2, g2 = W SiLU(c),   c = time(t) + label(y)
    x + g1 mixer(LN(x) (1 + s1) + b1), x + g2 MLP(LN(x) (1 + s2) + b2);  W starts at 0, so each branch does
MoH-DiT is the same with mixtures of heads, and fewer heads in its first and more in its last blocks.
Cost: quadratic in tokens. Source: Peebles & Xie, DiT, arXiv:2212.09748; Jin et al., MoH, arXiv:2410.11842.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...layers.linear import linear, taken_by
from ...layers.mixers import MixtureOfHeadsAttention, MultiHeadAttention
from ...layers.mlps import MLP
from ...layers.positions import sincos
from ...layers.stems import PatchEmbed
from ...names import unknown_name
from ..backbone import make_mixer
from ..checkpoints import Layout, Rule, load_checkpoint
from ..spec import BlockSpec

# --------------------------------------------------------------------------------------------------------------------
# tables


@dataclass(frozen=True)
class DiTSpec:
    """A DiT as a table.

    Args:
        dim: channels.
        blocks: the mixer of each block; its options give ``heads``.
        patch_size: latents of a token's side.
        input_size: rows and columns of the latents that the stored positions are for; others are computed.
        mlp_ratio: hidden channels of the MLPs over ``dim``.
        num_classes: of the labels; one more, ``num_classes`` itself, stands for none where labels are dropped.
        label_drop: probability to drop a label in training.
        learn_sigma: whether a variance is predicted beside the noise, with as many channels.
        layouts: the names of published checkpoints.
    """

    dim: int
    blocks: tuple[BlockSpec, ...]
    patch_size: int = 2
    input_size: int = 32
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    label_drop: float = 0.1
    learn_sigma: bool = True
    layouts: tuple[Layout, ...] = ()


# --------------------------------------------------------------------------------------------------------------------
# modules


class TimeEmbedding(nn.Module):
    """Times ``(batch,)``, any numbers, as vectors ``(batch, dim)``: an MLP on cosines and sines of them.

    Args:
        dim: channels.
        waves: cosines, and as many sines; their periods grow from 2 pi to ``period`` times that.

    Source: Ho et al., DDPM, arXiv:2006.11239; Nichol et al., GLIDE, arXiv:2112.10741.
    """

    def __init__(self, dim: int, waves: int = 128, period: float = 10000.0, *, device=None, dtype=None) -> None:
        super().__init__()
        self.waves, self.period = waves, period
        factory = {"device": device, "dtype": dtype}
        self.mlp = nn.Sequential(nn.Linear(2 * waves, dim, **factory), nn.SiLU(), nn.Linear(dim, dim, **factory))
        for layer in (self.mlp[0], self.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)  # type: ignore[arg-type]  # of a linear layer
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, time: Tensor) -> Tensor:
        dtype = taken_by(self.mlp)[1]
        kind = torch.promote_types(dtype, torch.float32)
        steps = torch.arange(self.waves, device=time.device, dtype=kind) / self.waves
        angles = time.to(kind)[:, None] * torch.exp(-math.log(self.period) * steps)
        return self.mlp(torch.cat((angles.cos(), angles.sin()), -1).to(dtype))


class LabelEmbedding(nn.Module):
    """Labels ``(batch,)`` as vectors ``(batch, dim)``; in training some are dropped, so that a model also learns without.

    Args:
        num_classes: labels are ``0 .. num_classes - 1``, and ``num_classes`` for none.
        dim: channels.
        drop: probability to drop a label; 0 leaves out the vector for none.

    Source: Ho & Salimans, classifier-free guidance, arXiv:2207.12598.
    """

    def __init__(self, num_classes: int, dim: int, drop: float = 0.1, *, device=None, dtype=None) -> None:
        super().__init__()
        if not 0.0 <= drop < 1.0:
            raise ValueError(f"label_drop must be in [0, 1); got {drop}")
        self.num_classes, self.drop = num_classes, drop
        self.table = nn.Embedding(num_classes + (drop > 0), dim, device=device, dtype=dtype)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, labels: Tensor) -> Tensor:
        if self.training and self.drop:
            dropped = torch.rand(labels.shape, device=labels.device) < self.drop
            labels = labels.masked_fill(dropped, self.num_classes)
        return self.table(labels)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``x (1 + scale) + shift`` for tokens ``(batch, *grid, dim)`` and vectors ``(batch, dim)``."""
    between = (slice(None), *(None for _ in x.shape[2:]))
    return x * (1 + scale[between]) + shift[between]


class DiTBlock(nn.Module):
    """Mixer and MLP as residual branches, which a condition shifts and scales before and gates behind.

    Args:
        dim: channels.
        block: the mixer.
        hidden: channels of the MLP.
    """

    def __init__(self, dim: int, block: BlockSpec, hidden: int, **factory: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mixer = make_mixer(block, dim, 1, **factory)
        self.mlp = MLP(dim, hidden, act=partial(nn.GELU, approximate="tanh"), **factory)
        self.modulation = nn.Linear(dim, 6 * dim, **factory)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens ``(batch, rows, columns, dim)`` and the activated condition ``(batch, dim)``."""
        before, scale, gate, mlp_before, mlp_scale, mlp_gate = linear(self.modulation, condition).chunk(6, -1)
        x = x + gate[:, None, None] * self.mixer(modulate(self.norm(x), before, scale))
        return x + mlp_gate[:, None, None] * self.mlp(modulate(self.norm(x), mlp_before, mlp_scale))


class DiT(nn.Module):
    """The denoiser that a :class:`DiTSpec` describes.

    Args:
        spec: the table.
        in_chans: channels of the latents.

    Attributes:
        positions: ``(1, tokens, dim)``, fixed sines and cosines for ``input_size``.
    """

    positions: Tensor

    def __init__(self, spec: DiTSpec, *, in_chans: int = 4, device=None, dtype=None) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.spec, self.in_chans, self.out_chans = spec, in_chans, in_chans * (2 if spec.learn_sigma else 1)
        self.stem = PatchEmbed(in_chans, spec.dim, patch_size=spec.patch_size, norm=None, **factory)
        self.time = TimeEmbedding(spec.dim, **factory)
        self.labels = LabelEmbedding(spec.num_classes, spec.dim, spec.label_drop, **factory)
        self.side = -(-spec.input_size // spec.patch_size)
        self.register_buffer("positions", self._positions((self.side, self.side), self.stem.proj.weight).flatten(0, 1)[None])
        hidden = int(spec.dim * spec.mlp_ratio)
        self.blocks = nn.ModuleList(DiTBlock(spec.dim, block, hidden, **factory) for block in spec.blocks)
        self.norm = nn.LayerNorm(spec.dim, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(spec.dim, 2 * spec.dim, **factory)
        self.head = nn.Linear(spec.dim, spec.patch_size**2 * self.out_chans, **factory)
        self.grad_checkpointing = False
        self._initialise()

    def _initialise(self) -> None:
        """Uniform linear layers of Glorot & Bengio; what conditions and what comes out start at 0."""
        with torch.no_grad():
            for layer in self.blocks.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_uniform_(layer.weight)
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)
            nn.init.xavier_uniform_(self.stem.proj.weight.view(self.spec.dim, -1))
            for zero in (self.stem.proj.bias, *self.modulation.parameters(), *self.head.parameters()):
                nn.init.zeros_(zero)  # type: ignore[arg-type]  # the convolution has a bias
            for name, parameter in self.blocks.named_parameters():
                if ".modulation." in name:
                    nn.init.zeros_(parameter)

    def _positions(self, grid: Sequence[int], like: Tensor) -> Tensor:
        """``(rows, columns, dim)``: the first half of the channels tells the column."""
        table = sincos(grid, self.spec.dim, device=like.device, dtype=like.dtype)
        return torch.cat(table.chunk(2, -1)[::-1], -1)

    def adapted(self, name: str, table: Tensor) -> Tensor:
        """The positions of this model's size in place of a checkpoint's of another: they are not learned.

        Raises:
            ValueError: another tensor, or positions of another width.
        """
        if name != "positions" or table.ndim != 3 or table.shape[2] != self.spec.dim:
            raise ValueError(f"expected positions (1, side squared, {self.spec.dim})")
        return self._positions((self.side, self.side), table).flatten(0, 1)[None]

    def forward(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """Predict the noise in latents, and where the table says so, behind it the share of the variance.

        Args:
            x: ``(batch, in_chans, height, width)``, any size.
            time: ``(batch,)``, steps of the diffusion, whole or not.
            labels: ``(batch,)`` integers.

        Returns:
            ``(batch, out_chans, height, width)``.

        Raises:
            ValueError: other shapes.
        """
        if x.ndim != 4 or x.shape[1] != self.in_chans or 0 in x.shape:
            raise ValueError(f"expected latents (batch, {self.in_chans}, height, width); got {tuple(x.shape)}")
        for name, given in (("time", time), ("labels", labels)):
            if given.shape != x.shape[:1]:
                raise ValueError(f"expected {name} ({x.shape[0]},), one per item of the batch; got {tuple(given.shape)}")
        tokens = self.stem(x)
        grid = tuple(tokens.shape[1:3])
        native = grid == (self.side, self.side)
        tokens = tokens + (self.positions.unflatten(1, grid) if native else self._positions(grid, tokens))
        condition = F.silu(self.time(time) + self.labels(labels))
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                tokens = checkpoint(block, tokens, condition, use_reentrant=False)
            else:
                tokens = block(tokens, condition)
        y = linear(self.head, modulate(self.norm(tokens), *linear(self.modulation, condition).chunk(2, -1)))
        size = self.spec.patch_size
        y = y.unflatten(-1, (size, size, self.out_chans)).permute(0, 5, 1, 3, 2, 4)  # (batch, out, rows, size, columns, size)
        return y.flatten(4, 5).flatten(2, 3)[..., : x.shape[2], : x.shape[3]]

    def guided(self, x: Tensor, time: Tensor, labels: Tensor, scale: float, channels: int | None = None) -> Tensor:
        """The prediction, its noise pushed away from that without labels: ``without + scale (with - without)``.

        Args:
            x, time, labels: see :meth:`forward`.
            scale: 1 for none.
            channels: how many channels of the noise are guided, all by default; published samples were made with 3.

        Raises:
            ValueError: a model that was not made to drop labels; more channels than there are.

        Source: Ho & Salimans, arXiv:2207.12598.
        """
        count = self.in_chans if channels is None else channels
        if not self.labels.drop:
            raise ValueError("guidance compares with no label, which a model with label_drop=0 does not know")
        if not 0 <= count <= self.in_chans:
            raise ValueError(f"channels must be in 0..{self.in_chans}; got {channels}")
        none = torch.full_like(labels, self.labels.num_classes)
        both = self(torch.cat((x, x)), torch.cat((time, time)), torch.cat((labels, none)))
        known, unknown = both.chunk(2)
        guided = unknown[:, :count] + scale * (known[:, :count] - unknown[:, :count])
        return torch.cat((guided, known[:, count:]), 1)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable


# --------------------------------------------------------------------------------------------------------------------
# published models

_BLOCK = "blocks.{j}"
LAYOUTS = (
    Layout(
        "official",
        (
            Rule("x_embedder.{name}", "stem.{name}"),
            Rule("t_embedder.{name}", "time.{name}"),
            Rule("y_embedder.embedding_table.{name}", "labels.table.{name}"),
            Rule("pos_embed", "positions"),
            Rule(f"{_BLOCK}.attn.wg.{{name}}", f"{_BLOCK}.mixer.router.{{name}}"),
            Rule(f"{_BLOCK}.attn.wg_0.{{name}}", f"{_BLOCK}.mixer.balance.{{name}}"),
            Rule(f"{_BLOCK}.attn.wg_1.{{name}}", f"{_BLOCK}.mixer.shared_router.{{name}}"),
            Rule(f"{_BLOCK}.attn.{{name}}", f"{_BLOCK}.mixer.{{name}}"),
            Rule(f"{_BLOCK}.mlp.{{name}}", f"{_BLOCK}.mlp.{{name}}"),
            Rule(f"{_BLOCK}.adaLN_modulation.1.{{name}}", f"{_BLOCK}.modulation.{{name}}"),
            Rule("final_layer.adaLN_modulation.1.{name}", "modulation.{name}"),
            Rule("final_layer.linear.{name}", "head.{name}"),
        ),
    ),
)


def dit(
    dim: int = 1152,
    depth: int = 28,
    heads: int = 16,
    patch_size: int = 2,
    *,
    input_size: int = 32,
    num_classes: int = 1000,
    label_drop: float = 0.1,
    learn_sigma: bool = True,
    mlp_ratio: float = 4.0,
) -> DiTSpec:
    """The table of a DiT; other arguments as for :class:`DiTSpec`.

    Args:
        depth, heads: blocks, and attention heads of each.
    """
    return DiTSpec(
        dim, (BlockSpec(MultiHeadAttention, {"heads": heads}),) * depth, patch_size, input_size, mlp_ratio, num_classes,
        label_drop, learn_sigma, LAYOUTS,
    )  # fmt: skip


def moh_dit(
    dim: int = 1152,
    parts: Sequence[tuple[int, int, int, int]] = ((9, 8, 8, 0), (10, 16, 16, 0), (9, 24, 16, 3)),
    head_dim: int = 72,
    patch_size: int = 2,
    *,
    input_size: int = 32,
    num_classes: int = 1000,
    label_drop: float = 0.1,
    learn_sigma: bool = True,
    mlp_ratio: float = 4.0,
) -> DiTSpec:
    """The table of a MoH-DiT; other arguments as for :class:`DiTSpec`.

    Args:
        parts: consecutive blocks: how many, their heads, those that all tokens use, and those that each token chooses.
        head_dim: channels of a head.
    """
    blocks = [
        BlockSpec(MixtureOfHeadsAttention, {"heads": heads, "head_dim": head_dim, "shared": shared, "routed": routed})
        for count, heads, shared, routed in parts
        for _ in range(count)
    ]
    return DiTSpec(dim, tuple(blocks), patch_size, input_size, mlp_ratio, num_classes, label_drop, learn_sigma, LAYOUTS)


_MOH = {  # name: width, channels of a head, parts
    "s_2_90": (384, 64, ((8, 6, 3, 2), (4, 6, 6, 0))),
    "s_2_75": (384, 64, ((2, 6, 2, 1), (4, 6, 3, 1), (4, 6, 3, 2), (2, 6, 6, 0))),
    "b_2_90": (768, 64, ((5, 12, 6, 4), (5, 12, 7, 4), (2, 12, 12, 0))),
    "b_2_75": (768, 64, ((2, 12, 4, 2), (8, 12, 6, 3), (2, 12, 12, 0))),
    "l_2_90": (1024, 64, ((8, 8, 8, 0), (8, 16, 16, 0), (8, 24, 16, 3))),
    "l_2_75": (1024, 64, ((8, 8, 8, 0), (8, 16, 8, 4), (8, 24, 12, 4))),
    "xl_2_90": (1152, 72, ((9, 8, 8, 0), (10, 16, 16, 0), (9, 24, 16, 3))),
    "xl_2_75": (1152, 72, ((9, 8, 8, 0), (10, 16, 10, 2), (9, 24, 14, 2))),
}
_SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}
DITS: dict[str, Callable[..., DiTSpec]] = {
    **{
        f"dit_{name}_{patch}": partial(dit, dim=dim, depth=depth, heads=heads, patch_size=patch)
        for name, (dim, depth, heads) in _SIZES.items()
        for patch in (2, 4, 8)
    },
    **{
        f"moh_dit_{name}": partial(moh_dit, dim=dim, parts=parts, head_dim=head_dim)
        for name, (dim, head_dim, parts) in _MOH.items()
    },
}


def create_dit(
    name: str,
    pretrained: str | os.PathLike[str] | None = None,
    *,
    in_chans: int = 4,
    device=None,
    dtype=None,
    **table,
) -> DiT:
    """Create a DiT by name: ``"dit_xl_2"``, ``"moh_dit_xl_2_90"``, see :data:`DITS`.

    Args:
        name: of the model, with its size and its patch size.
        pretrained: path of a checkpoint, see :func:`regard.load_checkpoint`; nothing is ever downloaded.
        in_chans: channels of the latents.
        device, dtype: of the parameters.
        **table: changes to the published table, such as ``num_classes`` or ``input_size``, see :func:`dit` and :func:`moh_dit`.

    Raises:
        ValueError: unknown name or option; a checkpoint that does not fit.
        FileNotFoundError: no checkpoint at that path.
    """
    if name not in DITS:
        raise unknown_name("model", name, DITS, "regard.models.DITS")
    allowed = inspect.signature(DITS[name]).parameters
    unknown = [option for option in table if option not in allowed]
    if unknown:
        raise ValueError(f"{name} has no option {', '.join(unknown)}; its table takes {', '.join(allowed)}")
    model = DiT(DITS[name](**table), in_chans=in_chans, device=device, dtype=dtype)
    if pretrained is not None:
        load_checkpoint(model, pretrained)
    return model
