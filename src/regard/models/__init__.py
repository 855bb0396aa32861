"""Backbones by name, with timm's outside: any input size, any token mixer, any published checkpoint."""

from . import backbones
from .backbone import Backbone, FeatureBackbone, count_parameters
from .checkpoints import export_state_dict, load_checkpoint, save_checkpoint
from .checkpoints.ulsam import ulsam_layout
from .generative.axial_transformer import AxialTransformer
from .generative.dit import DITS, DiT, DiTSpec, create_dit
from .generative.fit import FIT, FITAutoregressive, FITDenoiser
from .registry import ModelCard, create_model, families, list_models, model_card, register_models
from .spec import BackboneSpec, BlockSpec, StageSpec

__all__ = [
    "DITS",
    "FIT",
    "AxialTransformer",
    "Backbone",
    "BackboneSpec",
    "BlockSpec",
    "DiT",
    "DiTSpec",
    "FITAutoregressive",
    "FITDenoiser",
    "FeatureBackbone",
    "ModelCard",
    "StageSpec",
    "backbones",
    "count_parameters",
    "create_dit",
    "create_model",
    "export_state_dict",
    "families",
    "list_models",
    "load_checkpoint",
    "model_card",
    "register_models",
    "save_checkpoint",
    "ulsam_layout",
]
