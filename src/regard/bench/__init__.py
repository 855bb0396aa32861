"""Measure: what attention costs, exactly and in time."""

from .cost import Cost, LayerCost, count, visible_pairs

__all__ = ["Cost", "LayerCost", "count", "visible_pairs"]
