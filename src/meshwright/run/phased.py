"""A rank of a job with phases: one model state, and for each phase what steps its part of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

from typing_extensions import override

from meshwright.job import Job
from meshwright.run.asynchronous import worker_of
from meshwright.run.build import Build
from meshwright.run.data.samples import Source
from meshwright.run.initial import Make, further_state
from meshwright.run.step import Policy, RankState
from meshwright.run.worker import Worker

__all__ = ["PhasedWorker", "worker_for"]


@dataclass(frozen=True, slots=True)
class _Turn:
    """What a worker has of a phase alone."""

    build: Build
    state: RankState
    policy: Policy
    agreed: set[tuple[str, ...]] = field(default_factory=set)


@final
class PhasedWorker(Worker):
    """A rank whose steps are each of one phase; what it reads, holds and sends is shared."""

    def __init__(
        self,
        job: Job,
        builds: Mapping[str, Build],
        rank: int,
        source: Source | None,
        policy: Policy,
        make: Make | None = None,
    ) -> None:
        """A rank at step 0, its first phase to run.

        Args:
            job: with its phases.
            builds: by phase.
            rank: as of `Worker`.
            source: likewise.
            policy: likewise.
            make: likewise.
        """
        (first, build), *others = builds.items()
        super().__init__(build, rank, source, _policy(build, policy), make)
        self._turns = {first: _Turn(build, self.state, self.policy, self.agreed)}
        for name, other in others:
            state = further_state(other, rank, self.state)
            self._turns[name] = _Turn(other, state, _policy(other, policy))
        self._job, self._phase = job, first

    @property
    @override
    def phases(self) -> Mapping[str, tuple[Build, RankState]]:
        """By name, what each runs and steps."""
        return {name: (turn.build, turn.state) for name, turn in self._turns.items()}

    @property
    @override
    def phase(self) -> str:
        """The name of the one that runs next."""
        return self._phase

    @override
    def turn(self, phase: str) -> None:
        """Let this phase run next; in fp16 each has its own loss scale."""
        turn, self._phase = self._turns[phase], phase
        self.build, self.state, self.policy = turn.build, turn.state, turn.policy
        self.agreed = turn.agreed
        if turn.state.scaling is not None:
            turn.state.rescale(turn.state.scaling)

    @override
    def turn_at(self, step: int) -> None:
        """Let the phase run next that the job's order has at a step."""
        self.turn(self._job.phase_at(step))

    @override
    def close(self) -> None:
        """End what runs beside the steps, and remove what was offloaded."""
        for turn in self._turns.values():
            if turn.state.kept is not None:
                turn.state.kept.close()
        super().close()


def _policy(build: Build, policy: Policy) -> Policy:
    """Each phase clips its own gradients."""
    return Policy(build.job.clip_norm, policy.nonfinite)


def worker_for(
    job: Job,
    builds: Mapping[str, Build],
    rank: int,
    source: Source | None,
    policy: Policy,
    make: Make | None = None,
) -> Worker:
    """A rank of a job, with phases or without."""
    if "" in builds:
        return worker_of(builds[""], rank, source, policy, make)
    return PhasedWorker(job, builds, rank, source, policy, make)
