"""What several tasks need: refinement of masks (``refine``)."""
