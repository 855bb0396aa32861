"""TokenCut: objects in images and videos, without labels, from a normalised cut of the graph of patches."""

from .cutting import FoundObject, find_objects, saliency, tokencut
from .localising import LabelledObject, Localisation, class_features, find_labelled_objects, localisation, train_classifier
from .motion import flow_colours, optical_flow
from .video import FoundVideo, find_video_object, tokencut_video

__all__ = [
    "FoundObject",
    "FoundVideo",
    "LabelledObject",
    "Localisation",
    "class_features",
    "find_labelled_objects",
    "find_objects",
    "find_video_object",
    "flow_colours",
    "localisation",
    "optical_flow",
    "saliency",
    "tokencut",
    "tokencut_video",
    "train_classifier",
]
