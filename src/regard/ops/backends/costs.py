"""The cost table: what the choice between backends goes by, in one place.

The unit is the time that dense attention without a mask takes for a pair of query and key. All backends scale alike with batch,
heads and widths, so only ratios count, and one table serves processors that differ in speed alone.
"""

DENSE, DENSE_LSE = 1.0, 1e6
"""A pair of dense attention: by torch's operator, and with the log-sum-exp, which stores all weights: never where tiles can."""
TILED_CPU, TILED = 1.4, 2.5
"""A pair of tiles on torch's operators, on a CPU and elsewhere."""
SINGLE = 12.0
"""A pair where keys are gathered for single queries: they are read far more often."""
NATIVE = 0.5
"""A pair of compiled tiles."""
NATIVE_CALL, NATIVE_WORTH = 4.0, 1e7
"""How many times as much it costs where no pair is saved and there are fewer FLOPs than ``NATIVE_WORTH``: a call takes 0.05 ms
more than one of torch's operator."""
FUSED = 1.0
"""A pair of a kernel made for the pattern, on a GPU."""

LINEAR_NATIVE, LINEAR_TORCH, LINEAR_NAIVE = 1.0, 2.0, 1e6
"""A token of linear attention: compiled, on torch's operators, and by the definition, which computes all weights."""
