"""Write the model for one device; Meshwright lays it over the devices you have.

    import meshwright as mw

    job = mw.Job(model=..., loss=..., optimizer=..., data=..., batch_size=64)
    mw.train(job, steps=1000)

Names are loaded on first use (PEP 562): importing meshwright does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from meshwright import optim
    from meshwright.api import Run, explain, train, verify, watch
    from meshwright.compile.annotate import annotate, cut
    from meshwright.compile.deferred import deferred_batch_norm
    from meshwright.errors import MeshwrightError
    from meshwright.job import AdaScale, Job, LossScale, Phase
    from meshwright.plan import presets
    from meshwright.plan.mesh import Mesh
    from meshwright.plan.plan import Plan
    from meshwright.program.rules.user import rule

__all__ = [
    "AdaScale",
    "Job",
    "LossScale",
    "Mesh",
    "MeshwrightError",
    "Phase",
    "Plan",
    "Run",
    "annotate",
    "cut",
    "deferred_batch_norm",
    "explain",
    "optim",
    "presets",
    "rule",
    "train",
    "verify",
    "watch",
]

__version__ = "0.1.0"

_HOMES: Final = {
    "AdaScale": "meshwright.job",
    "Job": "meshwright.job",
    "LossScale": "meshwright.job",
    "Mesh": "meshwright.plan.mesh",
    "MeshwrightError": "meshwright.errors",
    "Phase": "meshwright.job",
    "Plan": "meshwright.plan.plan",
    "Run": "meshwright.api",
    "annotate": "meshwright.compile.annotate",
    "cut": "meshwright.compile.annotate",
    "deferred_batch_norm": "meshwright.compile.deferred",
    "explain": "meshwright.api",
    "rule": "meshwright.program.rules.user",
    "train": "meshwright.api",
    "verify": "meshwright.api",
    "watch": "meshwright.api",
}


_ROOMS: Final = {"optim": "meshwright.optim", "presets": "meshwright.plan.presets"}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(_ROOMS[name])
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'meshwright' has no attribute {name!r}")
    return vars(import_module(home))[name]


def __dir__() -> list[str]:
    return sorted((*globals(), *__all__))
