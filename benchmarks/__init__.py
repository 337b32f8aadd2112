"""Measurements: every line of the reach table against its peer and its limit; `make bench`."""
