"""Ways into models while they run: which module runs, and what its attention multiplies."""
