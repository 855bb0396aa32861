"""Look inside: the exact attention of any model, whatever mechanism and backend computes it."""

from .capture import Map, Maps, capture

__all__ = ["Map", "Maps", "capture"]
