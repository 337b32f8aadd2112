"""DeepSpeed's interface over Meshwright: a script runs with only its import changed.

    from meshwright.compat import deepspeed

    engine, optimizer, loader, schedule = deepspeed.initialize(model=model, config="ds_config.json")
    for x, y in loader:
        loss = cross_entropy(engine(x), y)
        engine.backward(loss)
        engine.step()

docs/deepspeed.md says what is the same and what is not.
"""

from __future__ import annotations

from meshwright.compat.deepspeed import comm, ops, zero
from meshwright.compat.deepspeed.config import LeftOut, Settings, settings
from meshwright.compat.deepspeed.engine import Engine
from meshwright.compat.deepspeed.start import add_config_arguments, init_distributed, initialize

DeepSpeedEngine = Engine

__all__ = [
    "DeepSpeedEngine",
    "Engine",
    "LeftOut",
    "Settings",
    "add_config_arguments",
    "comm",
    "init_distributed",
    "initialize",
    "ops",
    "settings",
    "zero",
]
