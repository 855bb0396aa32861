"""ConvShareViT: a vision transformer whose linear layers are convolutions of the tokens themselves, one kernel for all tokens.

    x_n seen as maps of s x s channels;  y_n = [K_1 * x_n, ..., K_M * x_n] for every token n, with the same kernels K
    x + proj(softmax(q k^T / sqrt(d)) v), x + fc2(GELU(fc1(x))), where qkv, proj, fc1 and fc2 are such convolutions

A 4f optical correlator convolves a large plane with a kernel in one pass, so all tokens lie side by side on it. With kernels as
large as the map the layers are linear layers; with "valid" padding and nearly so large ones every output still sees most of
its token; with "same" padding and small ones a layer is a local filter.
Cost: M k^2 (s - k + 1)^2 per token and layer ("valid"), M k^2 parameters. Source: Ibadulla et al., arXiv:2504.11517.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ...layers.mixers import SplitMixer
from ...layers.mixers.base import check_choice
from ...layers.mlps import MLP
from ...layers.positions import PositionTable
from ...layers.stems import PatchEmbed
from ..registry import ModelCard, register_models
from ..spec import BackboneSpec, BlockSpec, StageSpec

PLACES = ("qkv", "proj", "mlp")
PLANE = (2160, 3840)
TILINGS = ("token", "kernel", "mixed")


class TokenConv(nn.Module):
    """Each token convolved by itself: ``(batch, *grid, dim) -> (batch, *grid, out)``, in place of a linear layer.

    A token's channels are ``dim / side^2`` maps. A kernel has a slice for each, sums over them and makes one map, of
    ``side - kernel_size + 1`` squared channels with ``"valid"`` padding and ``side`` squared ones with ``"same"`` padding;
    there are as many kernels as ``out`` needs. With ``kernel_size == side`` and ``"valid"`` padding that is a linear layer.

    Args:
        dim, out: channels in and out.
        kernel_size: extent of the kernels on both axes.
        side: rows and columns of a map.
        padding: ``"valid"`` or ``"same"``, which needs odd kernels.
        tokens: None for one set of kernels that all tokens share, or the number of tokens that each have their own.

    Raises:
        ValueError: widths that are no whole number of maps; kernels larger than a map, or even ones with ``"same"`` padding;
            input of another width, or of another number of tokens where these have their own kernels.
    """

    def __init__(
        self,
        dim: int,
        out: int,
        kernel_size: int,
        *,
        side: int,
        padding: str = "valid",
        tokens: int | None = None,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        same = check_choice("padding", padding, ("valid", "same")) == "same"
        if not 1 <= kernel_size <= side or (same and kernel_size % 2 == 0):
            odd = "odd and " if same else ""
            raise ValueError(f"kernel_size must be {odd}in 1..{side}, the side of a map; got {kernel_size}")
        self.dim, self.out, self.side, self.padding, self.tokens = dim, out, side, padding, tokens
        self.reach = side if same else side - kernel_size + 1
        for name, width, area in (("dim", dim, side**2), ("out", out, self.reach**2)):
            if width < 1 or width % area:
                raise ValueError(f"{name} must be a multiple of {area}, the channels of a map; got {width}")
        self.maps, self.kernels = dim // side**2, out // self.reach**2
        groups = tokens or 1
        self.conv = nn.Conv2d(
            groups * self.maps, groups * self.kernels, kernel_size, padding=padding, groups=groups, bias=bias,
            device=device, dtype=dtype,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        count = math.prod(x.shape[1:-1])
        if x.shape[-1] != self.dim or self.tokens not in (None, count):
            expected = "*grid" if self.tokens is None else f"{self.tokens} tokens"
            raise ValueError(f"expected (batch, {expected}, {self.dim}); got {tuple(x.shape)}")
        planes = x.shape[0] * (count if self.tokens is None else 1)
        y = self.conv(x.reshape(planes, -1, self.side, self.side))
        return y.reshape(*x.shape[:-1], self.out)

    @property
    def tile(self) -> int:
        """Pixels of a tile's side on an optical plane, so that its neighbours do not touch what is read of it."""
        return self.side if self.padding == "valid" else self.side + self.conv.kernel_size[0] // 2

    def passes(self, tokens: int, plane: tuple[int, int] = PLANE, tiling: str = "mixed") -> int:
        """Passes through a 4f correlator for one image.

        A pass convolves an input plane with a kernel plane. ``"token"`` tiles the maps on the input plane under one kernel,
        ``"kernel"`` tiles kernels on the kernel plane over one map, ``"mixed"`` does both, a tile for each pair. Kernels that
        tokens do not share leave only ``"kernel"`` something to gain.

        Args:
            tokens: of the image.
            plane: rows and columns of pixels.
            tiling: one of the three.

        Raises:
            ValueError: another tiling; a plane without room for a tile.
        """
        check_choice("tiling", tiling, TILINGS)
        tiles = math.prod(n // self.tile for n in plane)
        if not tiles:
            raise ValueError(f"a tile has {self.tile} x {self.tile} pixels; the plane has {plane[0]} x {plane[1]}")
        inputs = tokens * self.maps
        if tiling == "kernel" or (self.tokens is not None and tiling == "mixed"):
            return inputs * -(-self.kernels // tiles)
        if self.tokens is not None:
            return inputs * self.kernels
        return self.kernels * -(-inputs // tiles) if tiling == "token" else -(-inputs * self.kernels // tiles)

    def extra_repr(self) -> str:
        own = "" if self.tokens is None else f", tokens={self.tokens}"
        return f"{self.dim}, {self.out}, side={self.side}{own}"


def optical_passes(model: nn.Module, tokens: int, plane: tuple[int, int] = PLANE, tiling: str = "mixed") -> int:
    """Passes through a 4f correlator of all convolutions of tokens in a model, see :meth:`TokenConv.passes`."""
    return sum(layer.passes(tokens, plane, tiling) for layer in model.modules() if isinstance(layer, TokenConv))


class ConvShareAttention(SplitMixer):
    """Attention of every token to every token, whose projections are convolutions of the tokens.

    With ``"same"`` padding a head has a kernel of its own, and the width of a whole token; with ``"valid"`` padding the kernels
    that make up a token are shared out among the heads.

    Args:
        dim, heads: channels and attention heads.
        make: makes a convolution of tokens, called with ``(dim, out)``.
        padding: that of ``make``.
        convolved: which of ``"qkv"`` and ``"proj"`` are convolutions; the other is a linear layer.
        **projections: see :class:`regard.layers.mixers.AttentionMixer`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        make: Callable[..., TokenConv],
        padding: str = "valid",
        convolved: Sequence[str] = ("qkv", "proj"),
        **projections,
    ) -> None:
        self.make, self.convolved = make, tuple(convolved)
        same = padding == "same" and "qkv" in convolved
        super().__init__(dim, heads, **{"head_dim": dim if same else None} | projections)
        if "proj" in convolved:
            self.proj = make(heads * self.value_dim, dim, bias=self.proj.bias is not None, **self.factory)

    def add_projections(self, bias: bool, factory: dict[str, Any]) -> None:
        if "qkv" not in self.convolved:
            return super().add_projections(bias, factory)
        self.add_module("q", self.make(self.dim, self.widths[0], bias=bias, **factory))
        self.add_module("kv", self.make(self.dim, sum(self.widths[1:]), bias=bias, **factory))


class ConvShareMLP(MLP):
    """An MLP whose two layers are convolutions of the tokens.

    Args:
        dim, hidden: channels, and those between the layers.
        make: makes a convolution of tokens, called with ``(dim, out)``.
    """

    def __init__(self, dim: int, hidden: int, *, make: Callable[..., TokenConv], **factory) -> None:
        super().__init__(dim, hidden, **factory)
        self.add_module("fc1", make(dim, hidden, **factory))
        self.add_module("fc2", make(hidden, dim, **factory))


class PositionedPatches(PatchEmbed):
    """Patches with a learned vector per place.

    Args:
        in_chans, dim, patch_size: see :class:`regard.layers.stems.PatchEmbed`.
        grid: rows and columns of the table of positions.
    """

    def __init__(self, in_chans: int, dim: int, *, patch_size: int, grid: tuple[int, int], **factory) -> None:
        super().__init__(in_chans, dim, patch_size=patch_size, norm=None, **factory)
        self.positions = PositionTable(dim, grid, **factory)

    def forward(self, image: Tensor) -> Tensor:
        return self.positions(super().forward(image))


def convshare_vit(
    side: int = 16,
    depth: int = 6,
    *,
    heads: int = 4,
    kernel_size: int = 13,
    padding: str = "valid",
    shared: bool = True,
    convolved: Sequence[str] = PLACES,
    patch_size: int = 4,
    image_size: int = 32,
    mlp_ratio: float = 4.0,
    drop_path: float = 0.0,
    num_classes: int = 100,
) -> BackboneSpec:
    """The table of a ConvShareViT.

    Args:
        side: rows and columns of a token's map; tokens have ``side ** 2`` channels.
        depth, heads: blocks and attention heads.
        kernel_size: extent of the kernels; ``side`` with ``"valid"`` padding makes a plain vision transformer.
        padding: of the maps, ``"valid"`` or ``"same"``.
        shared: whether all tokens share their kernels; if not, the network takes images of ``image_size`` alone.
        convolved: which layers are convolutions, ``"qkv"``, ``"proj"`` and ``"mlp"``; the others are linear.
        patch_size: pixels of a token's side.
        image_size: pixels of the side of the images that the table of positions is for.
        mlp_ratio: hidden channels of the MLPs over those of a token.
        drop_path: stochastic depth of the last block.
        num_classes: outputs of the classifier.

    Raises:
        ValueError: other names in ``convolved``.
    """
    unknown = [place for place in convolved if place not in PLACES]
    if unknown:
        raise ValueError(f"convolved lists any of {', '.join(PLACES)}; got {', '.join(map(repr, unknown))}")
    dim, rows = side**2, -(-image_size // patch_size)
    make = partial(TokenConv, kernel_size=kernel_size, side=side, padding=padding, tokens=None if shared else rows**2)
    mixer = BlockSpec(ConvShareAttention, {"make": make, "padding": padding, "convolved": tuple(convolved)})
    return BackboneSpec(
        stages=(StageSpec(dim, heads, depth, (mixer,)),),
        stem=partial(PositionedPatches, patch_size=patch_size, grid=(rows, rows)),
        norm=partial(nn.LayerNorm, eps=1e-6),
        mlp=partial(ConvShareMLP, make=make) if "mlp" in convolved else MLP,
        mlp_ratio=mlp_ratio,
        drop_path=drop_path,
        num_classes=num_classes,
    )


_PAPER = "2504.11517"
_CONVOLVED = {"qkv": ("qkv",), "mlp": ("mlp",), "both": PLACES}
_KERNELS = {"valid": 13, "same": 3}

# the configurations of the study; it does not state its sizes: parameters and multiply-adds are those of this table
_STUDY = {
    ("valid", "shared", "qkv"): (3_658_404, 0.2897),
    ("valid", "shared", "mlp"): (1_770_564, 0.2470),
    ("valid", "shared", "both"): (256_836, 0.2128),
    ("valid", "own", "qkv"): (6_742_884, 0.2897),
    ("valid", "own", "mlp"): (9_977_700, 0.2470),
    ("valid", "own", "both"): (12_576_612, 0.2128),
    ("same", "shared", "qkv"): (4_789_812, 0.3638),
    ("same", "shared", "mlp"): (1_640_754, 0.1211),
    ("same", "shared", "both"): (62_688, 0.0724),
    ("same", "own", "qkv"): (4_835_172, 0.3638),
    ("same", "own", "mlp"): (1_669_860, 0.1211),
    ("same", "own", "both"): (151_140, 0.0724),
}


def _card(padding: str, kernels: str, place: str, params: int, gmacs: float) -> ModelCard:
    table = partial(
        convshare_vit, kernel_size=_KERNELS[padding], padding=padding, shared=kernels == "shared", convolved=_CONVOLVED[place]
    )
    return ModelCard(f"convshare_vit_{padding}_{kernels}_{place}", table, _PAPER, params, gmacs, 32)


register_models([_card(*key, *size) for key, size in _STUDY.items()])
