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
        plan: ours only.
        stage: of ZeRO, DeepSpeed only.
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
    plan: str = ""
    stage: int = 0
    dropout: float = 0.0
    weights: str = ""
    folder: str = ""

    @property
    def needs_peers(self) -> bool:
        """It lives in the peers' environment."""
        return self.module in ("deepspeed", "fairscale", "accelerate")
