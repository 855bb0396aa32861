"""regard: visual attention behind one front door.

``attend(q, k, v, pattern)`` computes any softmax attention of the field, exactly, on any device; mixers, models and systems
are built from it, and :mod:`regard.lens` shows what they look at.
"""

from . import bench, lens
from .caches import cache_info, clear_caches
from .layers.mixers import create_mixer, list_mixers
from .models import create_model, list_models, load_checkpoint
from .ops import Source, attend, merge, patterns
from .ops.planning import backends, plan

__version__ = "0.1.0"

__all__ = [
    "Source",
    "attend",
    "backends",
    "bench",
    "cache_info",
    "clear_caches",
    "create_mixer",
    "create_model",
    "lens",
    "list_mixers",
    "list_models",
    "load_checkpoint",
    "merge",
    "patterns",
    "plan",
]
