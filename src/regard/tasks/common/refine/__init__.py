"""From a coarse mask to one that follows the borders of the image."""

from .bilateral import bilateral_solver
from .crf import dense_crf

__all__ = ["bilateral_solver", "dense_crf"]
