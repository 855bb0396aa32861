"""Tensors in, tensors out, no parameters: attention, its patterns and its backends."""

from . import patterns
from .attention import attend, merge
from .call import Source, TableBias
from .weights import attend_weights

__all__ = ["Source", "TableBias", "attend", "attend_weights", "merge", "patterns"]
