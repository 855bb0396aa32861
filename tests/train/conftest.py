"""One miniature comparison, shared by the tests of what is written about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from regard.compare.demo import demo


@dataclass(frozen=True)
class Miniature:
    """The folder of a miniature demo, and what it told while it ran."""

    folder: Path
    told: tuple[str, ...]

    def again(self, **changes) -> Miniature:
        told: list[str] = []
        options = {"epochs": 2, "size": 16, "repeats": 1, "progress": False} | changes
        demo(self.folder / "report", runs=self.folder / "runs", tell=told.append, **options)
        return Miniature(self.folder, tuple(told))


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Miniature:
    return Miniature(tmp_path_factory.mktemp("demo"), ()).again()
