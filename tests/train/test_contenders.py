"""Mixers written as text."""

from __future__ import annotations

import pytest

from regard.compare.contenders import DEMO, parse_mixers
from regard.layers.mixers import list_mixers
from regard.models import create_model


def test_list_of_mixers_with_options_is_read() -> None:
    found = parse_mixers("multi_head, window(window_size=8, shift=(2, 4)),neighborhood( kernel_size = 5 )")
    assert [c.choice for c in found] == [
        "multi_head",
        ("window", {"window_size": 8, "shift": (2, 4)}),
        ("neighborhood", {"kernel_size": 5}),
    ]
    assert [c.label for c in found] == ["dense", "window (window_size=8, shift=(2, 4))", "neighborhood (kernel_size=5)"]
    assert len({c.folder for c in found}) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected mixers such as"),
        ("windw", "unknown mixer 'windw'; did you mean window"),
        ("window,window", "mixer window is listed twice"),
        ("window(7)", "options of a mixer are written name=value"),
        ("window(window_size=open('x'))", "options of a mixer are written name=value"),
        ("window(size=7)", "mixer window has no option size; it has window_size, shift"),
        ("window(window_size=7", "brackets do not match"),
        ("window window", "expected a mixer such as"),
    ],
)
def test_what_cannot_be_read_is_quoted(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_mixers(text)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", list_mixers())
def test_every_registered_mixer_builds_the_compact_model(name: str) -> None:
    (contender,) = parse_mixers(name)
    assert create_model("compact_nano", num_classes=3, mixer=contender.choice).num_classes == 3


def test_the_demo_names_registered_mixers() -> None:
    assert set(DEMO) <= set(list_mixers())
