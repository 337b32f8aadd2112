"""Names that a plan may use: of common plans, each a few keys, and of pipeline schedules."""

from __future__ import annotations

from typing import Final

__all__ = ["ASYNCHRONOUS", "CHUNKED", "OWN", "PAIRED", "PRESETS", "REPLICATED", "SCHEDULES"]

# ZeRO stages (Rajbhandari et al. 2020, section 5): 1 shards the optimizer state over the data axis,
# 2 the gradients too, 3 the weights too.
PRESETS: Final[dict[str, dict[str, int | str]]] = {
    "data": {},
    "zero1": {"zero": 1},
    "zero2": {"zero": 2},
    "zero3": {"zero": 3},
}

ASYNCHRONOUS: Final = ("pipedream", "pipedream-vertical", "pipedream-2bw")

# What a schedule that the user wrote is called.
OWN: Final = "own"

# Whose stages may have several ranks each that take turns.
REPLICATED: Final = ("gpipe", "1f1b", *ASYNCHRONOUS)
"""Schedules that never flush: gradients are of weights some updates old."""

CHUNKED: Final = ("gpipe", "interleaved", "search")
"""Schedules that may hold several stages on each rank (`virtual`)."""

PAIRED: Final = ("zb-v", "dualpipe-v")
"""Schedules that always hold two stages on each rank, folded like a V."""

SCHEDULES: Final = (
    "gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v", "dualpipe-v", *ASYNCHRONOUS, "search",
)  # fmt: skip
"""What a plan's `schedule` may say."""
