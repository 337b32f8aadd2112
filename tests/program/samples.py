"""A call of every op that has a rule, as transformers' and convolutional networks' traces make it.

Dims are uneven under two and three ranks.
"""

from __future__ import annotations

from functools import cache

from tests.program import (
    samples_algebra,
    samples_experts,
    samples_layers,
    samples_matrices,
    samples_space,
    samples_spectral,
)


@cache
def calls():
    """Every sample call, in a fixed order."""
    makers = (
        *samples_algebra.MAKERS,
        *samples_layers.MAKERS,
        *samples_experts.MAKERS,
        *samples_matrices.MAKERS,
        *samples_space.MAKERS,
        *samples_spectral.MAKERS,
    )
    return tuple(call for maker in makers for call in maker())
