"""Backbones by name, with timm's outside: any input size, any token mixer, any published checkpoint."""

from . import biformer, compact, nat, swin
from .builder import Backbone, BackboneSpec, BlockSpec, FeatureBackbone, StageSpec, count_parameters
from .checkpoints import export_state_dict, load_checkpoint, save_checkpoint
from .registry import ModelCard, create_model, list_models, model_card, register_models

__all__ = [
    "Backbone",
    "BackboneSpec",
    "BlockSpec",
    "FeatureBackbone",
    "ModelCard",
    "StageSpec",
    "biformer",
    "compact",
    "count_parameters",
    "create_model",
    "export_state_dict",
    "list_models",
    "load_checkpoint",
    "model_card",
    "nat",
    "register_models",
    "save_checkpoint",
    "swin",
]
