"""Tiles: which queries and keys of a static pattern or of routed blocks are computed together, and on what."""
