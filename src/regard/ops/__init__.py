"""Tensors in, tensors out, no parameters: attention, its patterns and its backends."""

from . import patterns
from .attention.softmax import attend, merge
from .attention.weights import attend_weights
from .calls.source import Source, TableBias

__all__ = ["Source", "TableBias", "attend", "attend_weights", "merge", "patterns"]
