"""Helpers that NATTEN documents, and those that modules written for it import."""
