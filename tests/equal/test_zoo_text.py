"""Text families under every kind of plan equal one device, with the weights truly split."""

from __future__ import annotations

PLANS = (
    "data=2",
    "tensor=2",
    "data=2,tensor=2",
    "context=2",
    "zero3,data=2",
    "zero3,data=2,tensor=2",
    "zero3,data=4,shard=2",
)
MICROBATCHES = (1, 3)
