"""Look inside: the exact attention of any model, whatever mechanism and backend computes it.

``capture`` records it; ``image_map`` draws it; ``rollout``, ``flow`` and ``relevance`` follow it through the layers;
``entropy``, ``distance``, ``head_similarity`` and ``effective_rank`` measure it; ``receptive_field`` asks the gradient instead.
"""

from .analytics import HeadImportance, HopProfile, Patterns, attention_patterns, head_importance, hop_profile, without_heads
from .capture import Map, Maps, capture
from .field import ReceptiveField, receptive_field
from .flow import flow
from .layered import Shares
from .maps import ImageMap, image_map
from .paths import PathEnsemble, PathInfluence, path_distillation_loss, path_influence, path_members, relative_log_amplitude
from .relevance import gradient_times_attention, relevance, relevance_of
from .rollout import rollout
from .statistics import distance, effective_rank, entropy, head_similarity
from .tokencut import FoundObject, find_objects, saliency, tokencut

__all__ = [
    "FoundObject",
    "HeadImportance",
    "HopProfile",
    "ImageMap",
    "Map",
    "Maps",
    "PathEnsemble",
    "PathInfluence",
    "Patterns",
    "ReceptiveField",
    "Shares",
    "attention_patterns",
    "capture",
    "distance",
    "effective_rank",
    "entropy",
    "find_objects",
    "flow",
    "gradient_times_attention",
    "head_importance",
    "head_similarity",
    "hop_profile",
    "image_map",
    "path_distillation_loss",
    "path_influence",
    "path_members",
    "receptive_field",
    "relative_log_amplitude",
    "relevance",
    "relevance_of",
    "rollout",
    "saliency",
    "tokencut",
    "without_heads",
]
