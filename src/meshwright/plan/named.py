"""Names for common plans; each stands for a few keys."""

from __future__ import annotations

from typing import Final

__all__ = ["PRESETS"]

# ZeRO stages (Rajbhandari et al. 2020, section 5): 1 shards the optimizer state over the data axis,
# 2 the gradients too, 3 the weights too.
PRESETS: Final[dict[str, dict[str, int | str]]] = {
    "data": {},
    "zero1": {"zero": 1},
    "zero2": {"zero": 2},
    "zero3": {"zero": 3},
}
