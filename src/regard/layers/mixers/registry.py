"""Mixers by name, each with a card of what is known of it."""

from __future__ import annotations

import fnmatch
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...checks import check_text, shown
from ...names import check_options, options_of, unknown_name

Options = Mapping[str, Any]
_CARDS: dict[str, MixerCard] = {}


@dataclass(frozen=True)
class MixerCard:
    """What is known of a mixer without building it; its paper and cost stand in the docstring of its file.

    Args:
        name: what :func:`create_mixer` takes.
        constructor: its class.
        label: what reports and pictures call it; the name with hyphens by default.
        calls: how the attentions of one forward pass stand to each other, where there are several: ``"parallel"`` ones join
            their outputs, each of a ``"sequence"`` reads the output of the one before.
        options: with which it does all it can on a grid of 6 x 7 tokens with 16 channels.
        sized: makes, from a grid, the options that must fit it.
        compact: options that suit small images, where the defaults do not; several are taken by one block after another.
        varied: by what they change, further options whose cost is worth measuring, from a grid.
        unseen: parameters that change no picture of what a token sees.
        unlearned: parameters that get no gradient from the output, by how their names begin, and why.
    """

    name: str
    constructor: Callable[..., nn.Module]
    label: str
    calls: Literal["parallel", "sequence"] | None = None
    options: Options = field(default_factory=dict)
    sized: Callable[[Sequence[int]], Options] | None = None
    compact: Sequence[Options] = ()
    varied: Mapping[str, Callable[[Sequence[int]], Options]] = field(default_factory=dict)
    unseen: Sequence[str] = ()
    unlearned: Mapping[str, str] = field(default_factory=dict)

    @property
    def what(self) -> str:
        """A noun phrase."""
        return self._text.partition(":")[0]

    @property
    def cost(self) -> str:
        """What its file says of its cost; empty for one that computes nothing or says nothing."""
        found = re.search(r"Cost: (.*?)\.(?: |$)", self._text)
        return found.group(1) if found else ""

    @property
    def computes(self) -> bool:
        """Whether it computes anything at all."""
        return self.cost != "none"

    @property
    def papers(self) -> tuple[str, ...]:
        """Numbers of its papers on arXiv."""
        return tuple(dict.fromkeys(re.findall(r"arXiv:(\d{4}\.\d{5})", self._text)))

    @property
    def joins_extra(self) -> bool:
        """Whether tokens outside the grid see its tokens."""
        return getattr(self.constructor, "joins_extra", True)

    @property
    def _text(self) -> str:
        return " ".join((sys.modules[self.constructor.__module__].__doc__ or "").split())

    def options_for(self, grid: Sequence[int]) -> dict[str, Any]:
        """The options that must fit a grid."""
        return dict(self.sized(grid)) if self.sized else {}

    def tiny(self, *, device=None, dtype=None, **options) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """A small one of 16 channels in 4 heads that does all it can, and what to call it with: two images of 6 x 7 tokens."""
        factory = {"device": device, "dtype": dtype}
        chosen = {**self.options_for((6, 7)), **self.options, **options}
        tokens = torch.randn(2, 6, 7, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        module = create_mixer(self.name, **{"dim": 16, "heads": 4, **factory, **chosen})
        return module, (tokens.to(device, dtype or torch.float32),)


def register_mixer(
    name: str, *, label: str | None = None, tiny: Options | None = None, **known
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Class decorator that makes a mixer available as ``create_mixer(name, dim=..., heads=...)``.

    Args:
        name: of it.
        label: see :class:`MixerCard`.
        tiny: its ``options``.
        **known: what else stands on its :class:`MixerCard`.
    """

    def add(cls: type[nn.Module]) -> type[nn.Module]:
        if name in _CARDS:
            raise ValueError(f"mixer {name!r} is registered already")
        _CARDS[name] = MixerCard(name, cls, label or name.replace("_", "-"), options=tiny or {}, **known)
        return cls

    return add


def create_mixer(name: str, *values, **arguments) -> nn.Module:
    """Create a mixer by name.

    Args:
        name: one of :func:`list_mixers`.
        **arguments: its constructor's; all take ``dim`` and ``heads``. Tokens outside the grid see its tokens, but for classes
            whose ``joins_extra`` is False.

    Raises:
        ValueError: unknown name or option, with the nearest matches; an option that is missing or out of bounds.
        TypeError: an option of another kind, or without its name.
    """
    constructor = mixer_class(name)
    if values:
        given = ", ".join(map(shown, values))
        raise TypeError(f"options of a mixer are named, such as create_mixer({name!r}, dim=64, heads=4); got {given}")
    options = options_of(constructor)
    last = [option for option in ("dim", "heads", "device", "dtype") if option in options]
    check_options("mixer", name, arguments, [*(option for option in options if option not in last), *last])
    missing = [o for o, p in options.items() if p.default is p.empty and o not in arguments]
    if missing:
        raise ValueError(f"mixer {name} needs {', '.join(missing)}; got {', '.join(arguments) or 'no options'}")
    return constructor(**arguments)


def mixer_card(name: str) -> MixerCard:
    """The card of a mixer.

    Raises:
        ValueError: unknown name, with the nearest matches.
    """
    check_text("name", name)
    if name not in _CARDS:
        if (bare := name.partition("(")[0].strip()) in _CARDS:
            raise ValueError(
                f"options stand beside a mixer's name, create_mixer({bare!r}, ...) or mixer=({bare!r}, {{...}}); got {name!r}"
            )
        raise unknown_name("mixer", name, _CARDS, "regard.list_mixers() or `regard mixers`")
    return _CARDS[name]


def mixer_class(name: str) -> Callable[..., nn.Module]:
    """The constructor behind a mixer's name."""
    return mixer_card(name).constructor


def calls_of(module: nn.Module) -> str | None:
    """How the attentions of one forward pass of a registered mixer stand to each other; see :class:`MixerCard`."""
    return next((card.calls for card in _CARDS.values() if card.calls and isinstance(module, card.constructor)), None)  # type: ignore[arg-type]


def list_mixers(pattern: str = "*") -> list[str]:
    """Names of the mixers that match a shell-style pattern."""
    return sorted(fnmatch.filter(_CARDS, check_text("pattern", pattern)))
