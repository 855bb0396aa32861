"""Ways to compute a call, one file each.

A backend has ``supports(call)``, None or the reason why not, and ``run(call)``, the output
``(batch, *q_grid, heads, value_dim)`` and the lse ``(batch, *q_grid, heads)`` (None where it was not asked for).
"""
