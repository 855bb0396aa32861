"""Softmax attention: the front door ``attend``, its weights, its transpose and its plan."""
