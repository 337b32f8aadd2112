"""A task: what one process of a contestant is told. Plain data, JSON on the command line."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Task:
    """One process of a contestant.

    Attributes:
        module: under benchmarks/contestants.
        model: of `models.SHAPES`.
        rows: sequences per rank and step.
        rank: of this process.
        ranks: processes of the contestant.
        connected: they are one world; otherwise each is a world of one on its own rows.
        threads: per process.
        bound: to a core of its own, where it has one thread.
        plan: ours only.
        stage: of ZeRO with DeepSpeed, or that of a pipeline which is run alone.
        schedule: of a pipeline; ours has it in its plan.
        microbatches: of a step; ours has them in its plan.
        dropout: probability.
        weights: file of the common initial weights.
        folder: for whatever the contestant writes.
    """

    module: str
    model: str
    rows: int
    rank: int = 0
    ranks: int = 2
    connected: bool = True
    threads: int = 1
    bound: bool = True
    plan: str = ""
    stage: int = 0
    schedule: str = ""
    microbatches: int = 1
    dropout: float = 0.0
    weights: str = ""
    folder: str = ""

    @property
    def package(self) -> str:
        """That the module is about."""
        return self.module.removeprefix("pipe_")

    @property
    def needs_peers(self) -> bool:
        """It lives in the peers' environment."""
        return self.package in ("deepspeed", "fairscale", "accelerate", "torchgpipe")

    @property
    def ahead(self) -> bool:
        """It takes the next batch before it has learned from this one, so that losses differ."""
        return "pipedream" in self.plan
