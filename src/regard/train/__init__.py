"""Training: Lightning modules, recipes, exact resume.

Needs the ``train`` extra: ``pip install "regard[train]"``.
"""

try:
    import lightning as _lightning  # noqa: F401  # asked for here so that one message names the extra
    import torchmetrics as _torchmetrics  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f'training needs {error.name}; pip install "regard[train]"') from error

from .classify import Classifier
from .fitting import Recipe, fit

__all__ = ["Classifier", "Recipe", "fit"]
