"""Settings that hold for every test."""

from __future__ import annotations

from hypothesis import settings

# Shared CI machines stall for seconds; pytest-timeout is the deadline that counts.
settings.register_profile("meshwright", deadline=None, max_examples=60, print_blob=True)
settings.load_profile("meshwright")
