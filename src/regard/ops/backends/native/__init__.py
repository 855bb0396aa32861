"""Attention in tiles in C, compiled for the CPU at hand."""
