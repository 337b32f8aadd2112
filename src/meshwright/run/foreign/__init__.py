"""Checkpoints and weights in the formats of others, read and written a tensor at a time."""
