"""The reference of a job with phases: the user's losses in turn on one model, each its optimizer.

As is usual for several networks in one loop: before a phase's step its own parameters, and no
others, require gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from typing_extensions import override

from meshwright.compile.draw import SampleDim
from meshwright.job import Job
from meshwright.run.build import Build
from meshwright.run.data.samples import Source
from meshwright.run.equality.reference import Reference, Snapshot, average_of, scaler_of
from meshwright.run.equality.slices import Sliced, sliced_of

__all__ = ["Draws", "InTurn"]

Draws = Callable[[Any, int], Sequence[SampleDim | None]]


@dataclass(frozen=True, slots=True)
class _Turn:
    """What a phase has for itself."""

    job: Job
    trained: frozenset[str]
    draws: Draws
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: torch.amp.GradScaler | None
    average: AveragedModel | None
    sliced: Sliced | None


@final
class InTurn(Reference):
    """Runs the phases of a job in its order, one a step."""

    def __init__(
        self,
        job: Job,
        builds: Mapping[str, Build],
        source: Source,
        microbatches: int,
        draws: Mapping[str, Draws],
        dtype: torch.dtype | None,
        **how: Any,
    ) -> None:
        """A reference at step 0.

        Args:
            job: with its phases.
            builds: by phase, for the names of what each trains.
            source: of batches, its own.
            microbatches: of the plan.
            draws: by phase, as of `Reference`.
            dtype: likewise.
            **how: likewise.
        """
        first, *_ = builds
        build = builds[first]
        super().__init__(build.job, build.model, source, microbatches, draws[first], dtype, **how)
        self.given = job
        self.turns = {name: self._begun(one, draws[name]) for name, one in builds.items()}

    def _begun(self, build: Build, draws: Draws) -> _Turn:
        """A phase before its first step."""
        job, parameters = build.job, build.model.parameters
        trained = frozenset(name for name, p in parameters.items() if p.requires_grad)
        self._free(trained)
        optimizer = job.optimizer(self.model)
        scheduler = None if job.schedule is None else job.schedule(optimizer)
        scaler = None if self.scaler is None else scaler_of(job)
        average = average_of(job, self.model)
        sliced = sliced_of(job.adascale, optimizer)
        return _Turn(job, trained, draws, optimizer, scheduler, scaler, average, sliced)

    def _free(self, trained: frozenset[str]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad = name in trained

    @override
    def _step(self, step: int) -> Snapshot:
        turn = self.turns[self.given.phase_at(step)]
        self._free(turn.trained)
        self.job, self.draws, self.optimizer = turn.job, turn.draws, turn.optimizer
        self.scheduler, self.scaler, self.average = turn.scheduler, turn.scaler, turn.average
        self.sliced = turn.sliced
        return super()._step(step)

    @override
    def _weights(self) -> dict[str, Tensor]:
        own = self.average
        found: dict[str, Tensor] = {}
        for turn in self.turns.values():
            self._free(turn.trained)
            self.average, self.optimizer = turn.average, turn.optimizer
            found |= super()._weights()
        self.average = own
        return found

    @override
    def _slots(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for phase, turn in self.turns.items():
            self.optimizer = turn.optimizer
            for name, tensor in super()._slots().items():
                found[name.replace("optimizer/", f"optimizer/{phase}/", 1)] = tensor
        return found
