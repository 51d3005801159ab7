"""A page on this machine to play with a model: stories as they are written, next-token probabilities, attention."""
