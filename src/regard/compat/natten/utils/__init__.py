"""Helpers that NATTEN documents."""
