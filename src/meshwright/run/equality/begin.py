"""A job's reference at step 0: its eager code, its phases in turn, or a recurrence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from meshwright.compile.draw import SampleDim
from meshwright.compile.example import example_of
from meshwright.job import Job
from meshwright.run.asynchronous import pipe_of
from meshwright.run.build import Build, Micro
from meshwright.run.data.samples import Source
from meshwright.run.equality.inturn import Draws, InTurn
from meshwright.run.equality.recurrence import Recurrence, stages_of
from meshwright.run.equality.reference import Reference
from meshwright.run.worker import rounding_of

__all__ = ["DRAINS", "reference_for", "reference_of"]

DRAINS = (7,)
"""The steps before which asynchronous pipelines are drained: drains are verified too."""


def _draws(build: Build) -> Draws:
    def draws(tree: Any, samples: int) -> Sequence[SampleDim | None]:
        return build.unit(Micro(example_of(tree)[0], samples)).draws

    return draws


def reference_of(job: Job, builds: Mapping[str, Build], source: Source, **how: Any) -> Reference:
    """The reference of a job, with phases or without."""
    if "" in builds:
        return reference_for(builds[""], source, **how)
    build = next(iter(builds.values()))
    usual = {
        "microbatches": build.plan.microbatches, "precision": build.precision,
        "dtype": build.dtype, "rounding": rounding_of(build),
    }  # fmt: skip
    draws = {name: _draws(one) for name, one in builds.items()}
    return InTurn(job, builds, source, draws=draws, **{**usual, **how})


def reference_for(build: Build, source: Source, **how: Any) -> Reference:
    """The reference of a build, counting random ops' samples as its programs do."""
    draws, plan = _draws(build), build.plan
    usual = {
        "microbatches": plan.microbatches, "precision": build.precision, "dtype": build.dtype,
        "rounding": rounding_of(build),
    }  # fmt: skip
    if plan.asynchronous and build.stages is not None:
        usual |= {"pipe": pipe_of(build), "stages": stages_of(build), "drains": DRAINS}
        return Recurrence(build.job, build.model, source, draws=draws, **{**usual, **how})
    return Reference(build.job, build.model, source, draws=draws, **{**usual, **how})
