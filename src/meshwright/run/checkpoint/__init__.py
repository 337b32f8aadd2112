"""Checkpoints: a state in files, whole or not at all, under any plan."""
