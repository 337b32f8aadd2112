"""`deepspeed.ops`: optimizers that scripts build themselves."""

from __future__ import annotations

from types import SimpleNamespace

from meshwright.compat.deepspeed.optimizers import cpu_adam
from meshwright.optim import LAMB

__all__ = ["adam", "lamb"]

adam = SimpleNamespace(DeepSpeedCPUAdam=cpu_adam, FusedAdam=cpu_adam)
lamb = SimpleNamespace(FusedLamb=LAMB)
