"""What users call: `Run`, `train`, `verify`, `explain`, `watch`."""

from __future__ import annotations

from meshwright.api.calls import explain, train, verify
from meshwright.api.plans import plan_of
from meshwright.api.run import Run
from meshwright.compile.watch import watch

__all__ = ["Run", "explain", "plan_of", "train", "verify", "watch"]
