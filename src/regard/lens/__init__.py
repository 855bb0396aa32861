"""Look inside: the exact attention of any model, whatever mechanism and backend computes it.

``capture`` records it; ``image_map`` draws it; ``rollout``, ``flow`` and ``relevance`` follow it through the layers;
``entropy``, ``distance``, ``head_similarity`` and ``effective_rank`` measure it; ``receptive_field`` asks the gradient instead.
"""

from .capture import capture
from .captured import Map, Maps
from .field import ReceptiveField, receptive_field
from .flow import flow
from .layered import Shares
from .maps import ImageMap, image_map
from .relevance import gradient_times_attention, relevance, relevance_of
from .rollout import rollout
from .statistics import distance, effective_rank, entropy, head_similarity

__all__ = [
    "ImageMap",
    "Map",
    "Maps",
    "ReceptiveField",
    "Shares",
    "capture",
    "distance",
    "effective_rank",
    "entropy",
    "flow",
    "gradient_times_attention",
    "head_similarity",
    "image_map",
    "receptive_field",
    "relevance",
    "relevance_of",
    "rollout",
]
