"""Patterns: which keys each query of a grid may see.

A pattern is a small immutable value. It is defined by :meth:`Pattern.visible` on global coordinates; everything else (the
mask, the number of keys of a query, the halo a tile of queries needs) follows from that.

Most static patterns are *separable*: on every axis a query sees an arithmetic progression of keys, and a key is visible
when it is on all axes. Such a pattern states one thing, :meth:`Separable.axis_window`. Unions and intersections of
separable patterns decompose into disjoint separable parts (:func:`disjoint_parts`), so fast backends need to know only that
case. Routed patterns (:class:`Blocks`, :class:`Tokens`, :class:`Clusters`) hold tensors and may differ per batch item and head.

``True`` means visible, everywhere.
"""

from .base import AxisWindow, Ints, Pattern, Separable, grid_positions, per_axis
from .combined import Intersection, Literal, Part, PerHead, Union, disjoint_parts
from .routed import Blocks, Clusters, Tokens, leaves, tensors_of
from .static import Axis, Causal, Dense, Grid, Halo, Neighborhood, Window
from .text import as_pattern, parse

__all__ = [
    "Axis",
    "AxisWindow",
    "Blocks",
    "Causal",
    "Clusters",
    "Dense",
    "Grid",
    "Halo",
    "Intersection",
    "Ints",
    "Literal",
    "Neighborhood",
    "Part",
    "Pattern",
    "PerHead",
    "Separable",
    "Tokens",
    "Union",
    "Window",
    "as_pattern",
    "disjoint_parts",
    "grid_positions",
    "leaves",
    "parse",
    "per_axis",
    "tensors_of",
]
