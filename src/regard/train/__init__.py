"""Train and compare: Lightning modules, exact resume, measurements, reports.

Needs the ``train`` extra: ``pip install "regard[train]"``.
"""

try:
    import lightning as _lightning  # noqa: F401  # asked for here so that one message names the extra
    import torchmetrics as _torchmetrics  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f'training needs {error.name}; pip install "regard[train]"') from error

from .comparing import Outcome, Settings, compare
from .contenders import Contender, parse_mixers
from .demo import compare_on, demo
from .fitting import Recipe, fit
from .module import Classifier

__all__ = [
    "Classifier",
    "Contender",
    "Outcome",
    "Recipe",
    "Settings",
    "compare",
    "compare_on",
    "demo",
    "fit",
    "parse_mixers",
]
