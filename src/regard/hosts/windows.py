"""Windows that hosts put into the batch: which cell of the grid each of their tokens is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Forward = Callable[..., Any]


class Windows:
    """The window layouts of the blocks that are running."""

    def __init__(self) -> None:
        self._layouts: list[tuple[tuple[int, ...], Tensor]] = []

    def around(self, block: Any) -> Callable[[Forward, list[Any]], Forward]:
        """What a block's ``forward`` is wrapped in: its layout is known while it runs."""

        def wrap(forward: Forward, listeners: list[Any]) -> Forward:
            def run(*args, **kwargs):
                x = args[0] if args else kwargs["hidden_states"]
                if hasattr(block, "set_shift_and_window_size"):  # transformers: tokens in a row, their grid beside them
                    grid = tuple(kwargs["input_dimensions"] if "input_dimensions" in kwargs else args[1])
                    block.set_shift_and_window_size(grid)  # as its forward does
                    shift, window = (block.shift_size,) * 2, (block.window_size,) * 2
                    layout = window_index(grid, window, shift, pad_first=True)
                else:  # timm: tokens on their grid
                    grid = tuple(x.shape[1:3])
                    layout = window_index(grid, _pair(block.window_size), _pair(block.shift_size), pad_first=False)
                for windows in listeners:
                    windows._layouts.append((grid, layout.to(x.device)))
                try:
                    return forward(*args, **kwargs)
                finally:
                    for windows in listeners:
                        windows._layouts.pop()

            return run

        return wrap

    def of(self, batch: int, queries: int, keys: int) -> tuple[tuple[int, ...], Tensor] | None:
        """Grid and cells of the running block, where an attention of these sizes is one of its windows."""
        if self._layouts and queries == keys == self._layouts[-1][1].shape[1]:
            grid, index = self._layouts[-1]
            if batch % len(index) == 0:
                return grid, index
        return None


def cuts_windows(module: nn.Module) -> bool:
    """Whether a module of another library puts windows into the batch."""
    return (
        hasattr(module, "window_size") and hasattr(module, "shift_size") and not type(module).__module__.startswith("regard.")
    )


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def window_index(grid: tuple[int, ...], window: tuple[int, int], shift: tuple[int, int], *, pad_first: bool) -> Tensor:
    """Which cell each token of each window is, ``(windows, tokens)``; -1 where it only pads.

    Args:
        grid: rows and columns.
        window, shift: per axis; the grid is rolled back by the shift.
        pad_first: whether the grid is padded before it is rolled, or after.
    """
    index = torch.arange(grid[0] * grid[1]).reshape(grid)
    pads = [n for length, size in ((grid[1], window[1]), (grid[0], window[0])) for n in (0, -length % size)]
    if pad_first:
        index = F.pad(index, pads, value=-1)
    index = index.roll((-shift[0], -shift[1]), (0, 1))
    if not pad_first:
        index = F.pad(index, pads, value=-1)
    rows, columns = index.shape
    tiles = index.reshape(rows // window[0], window[0], columns // window[1], window[1]).transpose(1, 2)
    return tiles.reshape(-1, window[0] * window[1])
