"""Images to learn from: photographs embedded in installed packages, folders, parquet files, `datasets`.

Needs the ``train`` extra: ``pip install "regard[train]"``.
"""

from .embedded import PHOTOGRAPHS, photo_crops, photograph, to_grey
from .images import ImageSet, Samples, VisionData
from .loading import EpochSampler, ResumableLoader
from .sources import load_data

__all__ = [
    "PHOTOGRAPHS",
    "EpochSampler",
    "ImageSet",
    "ResumableLoader",
    "Samples",
    "VisionData",
    "load_data",
    "photo_crops",
    "photograph",
    "to_grey",
]
