"""From one trained model to another: wrappers, and what they are trained with.

An adaptation is a function or a module that takes a trained model, ``PathEnsemble(model)``, and leaves the model it was given
as it was. ``path_ensemble`` is the one to follow.
"""

from .path_ensemble import (
    PathEnsemble,
    PathInfluence,
    path_distillation_loss,
    path_influence,
    path_members,
    relative_log_amplitude,
)

__all__ = [
    "PathEnsemble",
    "PathInfluence",
    "path_distillation_loss",
    "path_influence",
    "path_members",
    "relative_log_amplitude",
]
