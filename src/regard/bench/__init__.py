"""Measure the cost of attention: exact FLOPs and bytes, time and memory."""

from .cost import Cost, LayerCost, count, visible_pairs

__all__ = ["Cost", "LayerCost", "count", "visible_pairs"]
