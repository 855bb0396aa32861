"""Models by name."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import (
    LARGEST,
    check_device,
    check_dtype,
    check_flag,
    check_grid,
    check_integer,
    check_number,
    check_text,
    checked,
    shown,
)
from ..names import check_options, options_of, unknown_name
from .backbone import Backbone, FeatureBackbone
from .checkpoints import load_checkpoint
from .spec import BackboneSpec, MixerChoice

LOWEST = {"shared": 0, "routed": 0, "prune_at": 0, "reduce_at": 0}
"""Options of tables that may be smaller than 1: counts of heads that may be none, and numbers of blocks."""
RATES = ("drop_path", "drop", "attn_drop", "proj_drop")
"""Options of tables that are probabilities."""
TINY: dict[str, Any] = {
    "dim": 32,
    "dims": (16, 32, 48),
    "head_dim": 8,
    "depth": 2,
    "depths": (1, 1, 1, 1),
    "stem_dim": 8,
    "plain": 1,
    "pretrain_size": 64,
}
"""What makes a model small, where its table takes it."""
_CARDS: dict[str, ModelCard] = {}


@dataclass(frozen=True)
class ModelCard:
    """What is known of a model without building it.

    Args:
        name: what :func:`create_model` takes.
        table: makes its :class:`BackboneSpec`; keyword arguments change the published values.
        arxiv: the paper.
        params: learned values.
        gmacs: published multiply-adds (papers call them FLOPs) for one image of ``input_size`` squared pixels, in 10^9.
        input_size: of the published weights; any other works.
        options: changes to the table that make it small, beyond or instead of the usual ones.
    """

    name: str
    table: Callable[..., BackboneSpec]
    arxiv: str
    params: int
    gmacs: float
    input_size: int = 224
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> str:
        """The name of the function that makes its table."""
        return getattr(self.table, "func", self.table).__name__

    @property
    def tiny_options(self) -> dict[str, Any]:
        """Changes to its table that make it narrow and shallow."""
        taken = options_of(self.table)
        return {key: value for key, value in TINY.items() if key in taken} | dict(self.options)

    def tiny(self, **options) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """A narrow and shallow one for 5 classes, and what to call it with: two images of 61 x 83 pixels.

        Args:
            **options: see :func:`create_model`.
        """
        model = create_model(self.name, **{"num_classes": 5, **self.tiny_options, **options})
        images = torch.randn(2, 3, 61, 83, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return model, (images.to(options.get("device"), options.get("dtype") or torch.float32),)


def register_models(cards: Sequence[ModelCard], tiny: Mapping[str, Any] | None = None) -> None:
    """Make models available to :func:`create_model`.

    Args:
        cards: of the models.
        tiny: changes to their tables that make small ones of them, where the usual ones do not; see :meth:`ModelCard.tiny`.
    """
    for card in cards:
        if card.name in _CARDS:
            raise ValueError(f"model {card.name!r} is registered already")
        _CARDS[card.name] = replace(card, options=tiny) if tiny else card


def families() -> dict[str, str]:
    """The smallest model of each function that makes tables, by the name of that function."""
    smallest: dict[str, str] = {}
    for card in sorted(_CARDS.values(), key=lambda card: (card.params, card.name)):
        smallest.setdefault(card.family, card.name)
    return dict(sorted(smallest.items()))


def model_card(name: str) -> ModelCard:
    """The card of a model.

    Raises:
        ValueError: unknown name, with the nearest matches or the families.
    """
    check_text("name", name)
    if name not in _CARDS:
        raise unknown_name("model", name, _CARDS, "regard.list_models() or `regard models`")
    return _CARDS[name]


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models that match a shell-style pattern."""
    return sorted(fnmatch.filter(_CARDS, check_text("pattern", pattern)))


def create_model(
    name: str,
    pretrained: bool | str | os.PathLike[str] = False,
    *,
    num_classes: int | None = None,
    in_chans: int = 3,
    drop_rate: float = 0.0,
    drop_path_rate: float | None = None,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    mixer: MixerChoice | None = None,
    device=None,
    dtype=None,
    **table,
) -> Backbone | FeatureBackbone:
    """Create a backbone by name.

    Args:
        name: one of :func:`list_models`.
        pretrained: path of a checkpoint, see :func:`load_checkpoint`; nothing is ever downloaded.
        num_classes: outputs of the classifier, the published number by default; 0 returns pooled features.
        in_chans: channels of the images.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, the published rate by default.
        features_only: return a :class:`FeatureBackbone`, whose output is a list of feature maps.
        out_indices: which stages it returns; all by default.
        mixer: another token mixer for every block: a name, ``(name, options)``, or a list of these that each stage repeats.
        device, dtype: of the parameters; ``device="meta"`` allocates nothing.
        **table: changes to the published table, such as ``depths``, ``dim`` or ``window_size``; see the family.

    Raises:
        ValueError: unknown name, option or mixer; a checkpoint that does not fit.
        FileNotFoundError: no checkpoint at that path.
    """
    card = model_card(name)
    taken = [p for p in options_of(create_model) if p not in ("name", "pretrained")]
    own = [p for p in options_of(card.table) if p not in taken]
    check_options("model", name, table, own, "its table takes", also=taken)
    if num_classes is not None:
        check_integer("num_classes", num_classes)
    check_integer("in_chans", in_chans, 1)
    check_number("drop_rate", drop_rate, 0.0, below=1.0)
    if drop_path_rate is not None:
        check_number("drop_path_rate", drop_path_rate, 0.0, below=1.0)
    check_flag("features_only", features_only)
    check_device("device", device)
    check_dtype("dtype", dtype)
    if not isinstance(pretrained, (bool, str, os.PathLike)):
        raise TypeError(f"pretrained must be the path of a checkpoint; got {shown(pretrained)}")
    if pretrained is True:
        raise ValueError("nothing is downloaded: pass the path of a checkpoint (regard's, official or timm names); got True")
    if out_indices is not None and not features_only:
        raise ValueError(f"out_indices goes with features_only=True; got {shown(out_indices)}")
    if out_indices is not None and out_indices not in ([], ()):  # none at all is answered with the stages there are
        check_grid("out_indices", out_indices, -LARGEST)
    for option, value in table.items():  # here, since models multiply and divide them
        if option in RATES:
            check_number(option, value, 0.0, below=1.0)
        elif option.endswith("_ratio") and isinstance(value, (int, float)):
            check_number(option, value, 0.0)
    spec = checked(**LOWEST)(card.table)(**table)
    if mixer is not None:
        spec = spec.with_mixer(mixer)
    model = (spec.network or Backbone)(
        spec, in_chans=in_chans, num_classes=num_classes, drop_rate=drop_rate, drop_path_rate=drop_path_rate,
        device=device, dtype=dtype,
    )  # fmt: skip
    if pretrained:
        load_checkpoint(model, pretrained, new_head=num_classes is not None)
    return model.cut(out_indices) if features_only else model
