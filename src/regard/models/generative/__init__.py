"""From noise, or from tokens so far, to samples: one file a family. ``dit`` is the one to follow."""
