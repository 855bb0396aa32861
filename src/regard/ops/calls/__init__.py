"""What is asked of a backend: sources, lowered to calls, the definition they are held to, and who is told of them."""
