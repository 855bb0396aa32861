"""Other libraries' interfaces, computed by regard."""
