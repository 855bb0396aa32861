"""The mechanisms of the playground: what there is to choose, which parameters it has, and building it from what was typed."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..layers.mixers import AttentionMixer, PatternMixer, create_mixer, list_mixers, mixer_card
from ..names import options_of
from ..ops.patterns import Ints, as_pattern
from ..text import read_literal

PATTERN = "any pattern"
"""The mechanism whose parameter is the text form of a pattern."""
EXAMPLE = "neighborhood(7, dilation=4) | axis(0)"
MOST = 64
"""Largest whole number that a parameter may have: photographs have no more tokens on a side, and costs grow with its square."""
LARGE = 1e6
"""Largest number that a parameter may have, whole or not."""
LONGEST, JOINED = 200, 5
"""Letters of the text form of a pattern, and patterns joined in it: telling apart what they share doubles with each."""
PARAMETERS = 20_000_000
"""Learned values that a mechanism may have."""

UNSHOWN = frozenset({*options_of(AttentionMixer), "rank", "grid"})
"""Parameters that all mixers may have: they change no picture, or the playground knows them itself."""


@dataclass(frozen=True)
class Field:
    """A parameter.

    Attributes:
        name: as the constructor has it.
        kind: ``"flag"``, ``"whole"``, ``"wholes"`` (one, or one per axis), ``"number"``, ``"word"`` or ``"pattern"``.
        default: its value.
        optional: whether it may be left empty.
        words: the choice, of a word.
    """

    name: str
    kind: str
    default: object
    optional: bool = False
    words: tuple[str, ...] = ()

    @property
    def shown(self) -> object:
        """The default, as a control shows it."""
        if self.kind in ("flag", "word"):
            return self.default
        return "" if self.default is None else str(self.default)

    def read(self, typed: object) -> object:
        """The value of what was typed.

        Raises:
            ValueError: it is none.
        """
        if self.kind == "flag":
            return bool(typed)
        text = str(typed).strip()
        if self.kind in ("word", "pattern"):
            return text
        if self.optional and text in ("", "None"):
            return None
        try:
            value = read_literal(text)
        except ValueError:
            value = None
        wanted = {"whole": "a whole number", "wholes": "a whole number, or two such as 3,7", "number": "a number"}[self.kind]
        if self.kind == "number" and isinstance(value, (int, float)) and not isinstance(value, bool):
            if not abs(value) <= LARGE:
                raise ValueError(f"{self.name} must lie between -{LARGE:g} and {LARGE:g}; got {short_text(text)[1:-1]}")
            return float(value)
        entries = value if isinstance(value, tuple) and self.kind == "wholes" else (value,)
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in entries)
        if self.kind == "number" or not whole or len(entries) != (2 if isinstance(value, tuple) else 1):
            raise ValueError(f"{self.name} must be {wanted}; got {short_text(text)}")
        if any(abs(n) > MOST for n in entries):
            raise ValueError(f"{self.name} must be at most {MOST} here; got {short_text(text)[1:-1]}")
        return value


def mechanisms() -> list[str]:
    """Names, that of free patterns first."""
    return [PATTERN, *list_mixers()]


def fields_of(name: str) -> tuple[Field, ...]:
    """The parameters of a mechanism that a picture can show.

    Raises:
        ValueError: unknown name.
    """
    if name == PATTERN:
        return (Field("pattern", "pattern", EXAMPLE),)
    card = mixer_card(name)
    made = card.constructor
    hints = typing.get_type_hints(made.__init__)  # type: ignore[misc]  # of the class that the registry holds
    shown = []
    for parameter in inspect.signature(made).parameters.values():
        if parameter.name in UNSHOWN | {*card.unseen} or parameter.kind is parameter.VAR_KEYWORD:
            continue
        hint = hints[parameter.name]
        words = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
        kinds = set(() if words else typing.get_args(hint) or (hint,))
        optional = type(None) in kinds
        if bool in kinds:
            kind = "flag"
        elif words:
            kind = "word"
        elif float in kinds:
            kind = "number"
        elif kinds - {type(None)} == set(typing.get_args(Ints)):
            kind = "wholes"
        else:
            kind = "whole"
        shown.append(Field(parameter.name, kind, parameter.default, optional, words))
    return tuple(shown)


def read(name: str, typed: Mapping[str, object]) -> dict[str, object]:
    """The parameters of a mechanism from what was typed; what was not is as by default.

    Raises:
        ValueError: unknown mechanism or parameter; a value that is none.
    """
    fields = {field.name: field for field in fields_of(name)}
    unknown = [each for each in typed if each not in fields]
    if unknown:
        raise ValueError(f"{name} has no parameter {', '.join(unknown)}; it has {', '.join(fields) or 'none'}")
    return {each: field.read(typed[each]) if each in typed else field.default for each, field in fields.items()}


def build(name: str, values: Mapping[str, object], dim: int, heads: int, grid: int, seed: int = 0) -> nn.Module:
    """A mixer with random weights that depend on the seed alone.

    Args:
        name: of the mechanism.
        values: from :func:`read`.
        dim, heads: channels and attention heads.
        grid: tokens on each side.
        seed: of the weights.

    Raises:
        ValueError: what the constructor does not take.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            with torch.device("meta"):
                learned = sum(p.numel() for p in _made(name, values, dim, heads, grid).parameters())
            if learned > PARAMETERS:
                raise ValueError(f"{name} has {learned:.3g} learned values like this, more than {PARAMETERS:.3g}: choose less")
            return _sharp(_made(name, values, dim, heads, grid))
        except (TypeError, RuntimeError, IndexError, ZeroDivisionError) as error:
            raise ValueError(f"{name} does not take this: {str(error).splitlines()[0]}") from error


def short_text(typed: str) -> str:
    """What was typed, in quotes and not too long to read."""
    return repr(typed if len(typed) <= 60 else f"{typed[:57]}...")


def _made(name: str, values: Mapping[str, object], dim: int, heads: int, grid: int) -> nn.Module:
    arguments = dict(values)
    if name == PATTERN:
        text = str(arguments["pattern"])
        if len(text) > LONGEST or text.count("|") + text.count("&") >= JOINED:
            raise ValueError(f"a pattern may have {LONGEST} letters and join {JOINED} others here; got {short_text(text)}")
        pattern = as_pattern(text)
        if pattern.rank() not in (None, 2):
            raise ValueError(f"{pattern!r} is for grids of {pattern.rank()} axes; a photograph has 2")
        return PatternMixer(dim, heads, pattern, relative_bias=False, rank=2)
    return create_mixer(name, dim=dim, heads=heads, **mixer_card(name).options_for((grid, grid)), **arguments)


def _sharp(mixer: nn.Module) -> nn.Module:
    """Linear layers of unit gain, instead of torch's third: queries and keys tell tokens apart, and the pictures show it."""
    with torch.no_grad():
        for module in mixer.modules():
            if isinstance(module, nn.Linear):
                module.weight *= 3.0**0.5
    return mixer.eval()


def load(mixer: nn.Module, place: str) -> str:
    """Give a mixer the weights of a file: its own, or those of a part of a model.

    Args:
        mixer: to load into.
        place: path of a safetensors file, with ``#part`` where several parts of it would fit.

    Returns:
        The part.

    Raises:
        ValueError: another kind of file; no part that fits.
        FileNotFoundError: no such file.
    """
    path, _, part = place.strip().partition("#")
    if not path.endswith(".safetensors"):
        raise ValueError(f"weights are read from .safetensors files; got {path!r}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path!r}")
    expected = {key: tuple(value.shape) for key, value in mixer.state_dict().items()}
    if not expected:
        return ""
    (first, *_) = expected
    try:
        with safe_open(path, "pt") as file:
            prefixes = [key.removesuffix(first) for key in file.keys() if key == first or key.endswith(f".{first}")]  # noqa: SIM118
            if part:
                prefixes = [prefix for prefix in prefixes if prefix.rstrip(".") == part.rstrip(".")]
            inside = set(file.keys())
            for prefix in prefixes:
                if all(
                    prefix + key in inside and tuple(file.get_slice(prefix + key).get_shape()) == shape
                    for key, shape in expected.items()
                ):
                    mixer.load_state_dict({key: file.get_tensor(prefix + key) for key in expected})
                    return prefix.rstrip(".")
    except SafetensorError as error:
        raise ValueError(f"cannot read {path!r}: {error}") from error
    shapes = ", ".join(f"{key} {'x'.join(map(str, shape))}" for key, shape in list(expected.items())[:3])
    raise ValueError(f"no part of {Path(path).name} fits; {shapes} are wanted")
