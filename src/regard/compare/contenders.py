"""Mixers to compare, written as text: ``multi_head, window(window_size=7), neighborhood(kernel_size=7, dilation=2)``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..layers.mixers import mixer_card
from ..names import check_options, options_of
from ..text import read_call, read_literal

DEMO = ("multi_head", "window", "neighborhood", "bi_level_routing")


@dataclass(frozen=True)
class Contender:
    """A mixer that takes part in a comparison.

    Args:
        text: as the user wrote it.
        choice: for ``create_model(mixer=...)``.
        name: short and unique, for folders and tables.
    """

    text: str
    choice: Any
    name: str

    @property
    def label(self) -> str:
        base, _, options = self.text.partition("(")
        return mixer_card(base).label + (f" ({options}" if options else "")

    @property
    def folder(self) -> str:
        return re.sub(r"[^A-Za-z0-9]+", "-", self.name).strip("-")


def parse_mixers(text: str) -> list[Contender]:
    """Read a comma-separated list of mixers, each a registered name with or without ``(option=value, ...)``.

    Raises:
        ValueError: nothing, a name twice, an unknown name or option, a value that is not a literal.
    """
    found = [parse_mixer(part) for part in split_top_level(text)]
    if not found:
        raise ValueError(f"expected mixers such as 'multi_head,window'; got {text!r}")
    names = [contender.name for contender in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"mixer {twice} is listed twice")
    return found


def split_top_level(text: str) -> list[str]:
    """Split at commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for position, letter in enumerate(f"{text},"):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append(text[start:position].strip())
            start = position + 1
    if depth:
        raise ValueError(f"brackets do not match in {text!r}")
    return [part for part in parts if part]


def parse_mixer(text: str) -> Contender:
    """Read one mixer; see :func:`parse_mixers`."""
    try:
        name, values, written = read_call(text)
    except ValueError:
        raise ValueError(f"expected a mixer such as window or window(window_size=7); got {text!r}") from None
    try:
        if values:
            raise ValueError
        options = {option: read_literal(node) for option, node in written.items()}
    except ValueError:
        raise ValueError(f"options of a mixer are written name=value, such as window(window_size=7); got {text!r}") from None
    ours = ("dim", "heads", "device", "dtype")
    check_options("mixer", name, options, [option for option in options_of(mixer_card(name).constructor) if option not in ours])
    if options:
        shown = ", ".join(f"{key}={value!r}" for key, value in options.items())
        return Contender(f"{name}({shown})", (name, options), f"{name}({shown})")
    compact = [(name, dict(chosen)) for chosen in mixer_card(name).compact]  # the defaults are made for large images
    return Contender(name, compact if len(compact) > 1 else compact[0] if compact else name, name)
