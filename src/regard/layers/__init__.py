"""Modules: mixers, blocks, gates, pools, positions, stems, MLPs."""
