"""Losses that several systems share."""

from .token_labeling import token_labeling_loss

__all__ = ["token_labeling_loss"]
