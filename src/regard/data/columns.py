"""Names and contents that the columns of a data set may have, in parquet files and for `datasets` alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..checks import shown

IMAGES = ("image", "img", "images", "picture", "photo", "pixels", "jpg", "jpeg", "png", "image_bytes")
"""Names of columns of images, the most usual first."""
LABELS = (
    "label", "labels", "class", "class_label", "category", "category_id", "target", "targets", "fine_label", "coarse_label",
    "digit", "kind", "y",
)  # fmt: skip
"""Names of columns of classes."""
MOST_CLASSES = 100_000
"""The largest class number of a data set."""


def choose_column(kind: str, wanted: Sequence[str], there: Iterable[str], where: str) -> str:
    """The column of a table that holds images or classes: the first of the ``wanted`` names, capitals do not count.

    Raises:
        ValueError: there is none.
    """
    there = list(there)
    lower = {name.lower(): name for name in reversed(there)}
    found = next((lower[name] for name in wanted if name in lower), None)
    if found is None:
        raise ValueError(
            f"{where}: expected columns image and label; there are {', '.join(there) or 'none'}; a column of {kind} may be "
            f"called {', '.join(wanted)}"
        )
    return found


def class_numbers(values: Iterable[Any], where: str) -> list[int]:
    """Labels as the numbers of classes.

    Raises:
        ValueError: one that is no whole number from 0 on, or beyond ``MOST_CLASSES``.
    """
    labels = []
    for row, value in enumerate(values):
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if not whole or not 0 <= value < MOST_CLASSES:
            raise ValueError(
                f"{where}: a label must be the number of a class, a whole number from 0 to {MOST_CLASSES - 1}; row {row} has "
                f"{shown(value)}"
            )
        labels.append(int(value))
    return labels


def numbered(splits: Sequence[Sequence[Any]], names: Sequence[str], where: str) -> tuple[list[list[int]], list[str]]:
    """The labels of each split as numbers of classes, and the names of the classes.

    Args:
        splits: labels, numbers or texts.
        names: of the classes, where they are known; else those of texts are the texts, and those of numbers the numbers.
        where: the labels are from, for errors.

    Raises:
        ValueError: texts and numbers, a text that is no name, or see :func:`class_numbers`.
    """
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{where}: two classes are named {shown(twice)}")
    values = [value for labels in splits for value in labels]
    if values and all(isinstance(value, str) for value in values):
        classes = list(names) or sorted(set(values))
        place = {name: index for index, name in enumerate(classes)}
        if unknown := next((value for value in values if value not in place), None):
            raise ValueError(f"{where}: label {shown(unknown)} is none of the classes {', '.join(classes[:20])}")
        return [[place[label] for label in labels] for labels in splits], classes
    numbers = [class_numbers(labels, where) for labels in splits]
    most = max((label for labels in numbers for label in labels), default=-1)
    return numbers, list(names) or [str(label) for label in range(most + 1)]
