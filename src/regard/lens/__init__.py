"""Look inside: the exact attention of any model, whatever mechanism and backend computes it.

``capture`` records it; ``image_map`` draws it; ``rollout``, ``flow`` and ``relevance`` follow it through the layers;
``entropy``, ``distance``, ``head_similarity`` and ``effective_rank`` measure it; ``receptive_field`` asks the gradient instead.
"""

from .analytics import HeadImportance, HopProfile, Patterns, attention_patterns, head_importance, hop_profile, without_heads
from .capture import capture
from .captured import Map, Maps
from .crf import dense_crf
from .field import ReceptiveField, receptive_field
from .flow import flow
from .layered import Shares
from .localise import (
    LabelledObject,
    Localisation,
    class_features,
    find_labelled_objects,
    localisation,
    train_classifier,
)
from .maps import ImageMap, image_map
from .motion import flow_colours, optical_flow
from .paths import PathEnsemble, PathInfluence, path_distillation_loss, path_influence, path_members, relative_log_amplitude
from .relevance import gradient_times_attention, relevance, relevance_of
from .rollout import rollout
from .statistics import distance, effective_rank, entropy, head_similarity
from .tokencut import FoundObject, find_objects, saliency, tokencut
from .tokencut_video import FoundVideo, find_video_object, tokencut_video

__all__ = [
    "FoundObject",
    "FoundVideo",
    "HeadImportance",
    "HopProfile",
    "ImageMap",
    "LabelledObject",
    "Localisation",
    "Map",
    "Maps",
    "PathEnsemble",
    "PathInfluence",
    "Patterns",
    "ReceptiveField",
    "Shares",
    "attention_patterns",
    "capture",
    "class_features",
    "dense_crf",
    "distance",
    "effective_rank",
    "entropy",
    "find_labelled_objects",
    "find_objects",
    "find_video_object",
    "flow",
    "flow_colours",
    "gradient_times_attention",
    "head_importance",
    "head_similarity",
    "hop_profile",
    "image_map",
    "localisation",
    "optical_flow",
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
    "tokencut_video",
    "train_classifier",
    "without_heads",
]
