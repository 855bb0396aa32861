"""Operators on the neighbors of a token: scores and sums over windows, learned kernels, samples between grid points."""
