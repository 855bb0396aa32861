"""The loggers that modules written for NATTEN write to."""

from logging import getLogger as get_logger

__all__ = ["get_logger"]
