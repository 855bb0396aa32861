"""What the feature maps of a backbone are: channels, resolution, and the modules that give them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class FeatureInfo(list[dict[str, Any]]):
    """A line for each feature map, from fine to coarse: a list of dicts, and the methods that users of timm know.

    Every ``index`` counts these lines: None for all, a number for one, several numbers for as many.
    """

    def get(self, key: str, index: int | Sequence[int] | None = None) -> Any:
        """What stands under a key."""
        if isinstance(index, int):
            return self[index][key]
        return [self[i][key] for i in (range(len(self)) if index is None else index)]

    def get_dicts(self, keys: Sequence[str] | None = None, index: int | Sequence[int] | None = None) -> Any:
        """The lines, or what stands in them under some keys."""

        def line(i: int) -> dict[str, Any]:
            return {key: self[i][key] for key in (self[i] if keys is None else keys)}

        return line(index) if isinstance(index, int) else [line(i) for i in (range(len(self)) if index is None else index)]

    def channels(self, index: int | Sequence[int] | None = None) -> Any:
        """The channels of the maps."""
        return self.get("num_chs", index)

    def reduction(self, index: int | Sequence[int] | None = None) -> Any:
        """Pixels of the image per pixel of the maps, on a side."""
        return self.get("reduction", index)

    def module_name(self, index: int | Sequence[int] | None = None) -> Any:
        """The paths of the modules that give the maps."""
        return self.get("module", index)

    @property
    def out_indices(self) -> list[int]:
        """The lines, counted."""
        return list(range(len(self)))
