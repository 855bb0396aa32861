"""Operators on which tokens there are and where they stand: order, routes, trees, rotary positions."""
