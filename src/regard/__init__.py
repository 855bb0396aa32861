"""regard: visual attention behind one front door.

``attend(q, k, v, pattern)`` computes any softmax attention of the field, exactly, on any device; mixers, models and systems
are built from it, and :mod:`regard.lens` shows what they look at.

Names are loaded when they are first used, so that what needs no tensors, such as ``regard --help``, does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .counted import wait_for_counter

if TYPE_CHECKING:
    from . import bench, lens
    from .caches import cache_info, clear_caches
    from .layers.mixers import create_mixer, list_mixers
    from .models import create_model, list_models, load_checkpoint
    from .ops import Source, attend, merge, patterns
    from .ops.attention.planning import backends, plan
    from .ops.linear.plan import plan_linear

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
    "plan_linear",
]

_HOMES = {
    "attend": "ops",
    "backends": "ops.attention.planning",
    "cache_info": "caches",
    "clear_caches": "caches",
    "create_mixer": "layers.mixers",
    "create_model": "models",
    "list_mixers": "layers.mixers",
    "list_models": "models",
    "load_checkpoint": "models",
    "merge": "ops",
    "patterns": "ops",
    "plan": "ops.attention.planning",
    "plan_linear": "ops.linear.plan",
    "Source": "ops",
}
_ROOMS = ("bench", "compat", "data", "layers", "lens", "losses", "models", "ops", "train")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})


wait_for_counter()
