"""Plans by the names of the systems that brought them; every one is a point of one space.

mw.presets.megatron(tensor=2, data=4)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, TypedDict

from meshwright.errors import UsageError
from meshwright.plan.plan import Plan

__all__ = [
    "context",
    "data_parallel",
    "expert",
    "gpipe",
    "hybrid",
    "interleaved",
    "megatron",
    "pipedream",
    "pipedream_2bw",
    "zero",
    "zero_bubble",
]


def data_parallel(data: int | None = None, *, microbatches: int = 1) -> Plan:
    """Every rank holds the model and takes its samples (Horovod; Sergeev, Del Balso 2018)."""
    return Plan(data=data, microbatches=microbatches)


def zero(stage: int, data: int | None = None, *, microbatches: int = 1) -> Plan:
    """Optimizer state (1), gradients too (2), weights too (3) split over `data`.

    Rajbhandari et al. 2020, section 5.
    """
    return Plan(data=data, zero=stage, microbatches=microbatches)


def hybrid(shard: int, data: int | None = None, *, stage: int = 3, microbatches: int = 1) -> Plan:
    """ZeRO within groups of `shard` neighbouring ranks, replicas across them.

    As FSDP's HYBRID_SHARD does; MiCS (Zhang et al. 2022, section 3.1).
    """
    return Plan(data=data, zero=stage, shard=shard, microbatches=microbatches)


def megatron(
    tensor: int,
    data: int | None = None,
    *,
    sequence: bool = False,
    stage: int = 0,
    microbatches: int = 1,
) -> Plan:
    """Weights split in columns and rows over `tensor`, found from the graph of any model.

    Shoeybi et al. 2019, section 3; with `sequence` the activations between them along the sequence,
    Korthikanti et al. 2022.
    """
    over = "tensor" if sequence else "none"
    return Plan(data=data, tensor=tensor, sequence=over, zero=stage, microbatches=microbatches)


def context(
    context: int, data: int | None = None, *, stage: int = 0, microbatches: int = 1
) -> Plan:
    """Sequences split over `context`; heads at attention, or a ring (`attention` in a plan)."""
    return Plan(data=data, context=context, zero=stage, microbatches=microbatches)


def expert(expert: int, data: int | None = None, *, stage: int = 0, microbatches: int = 1) -> Plan:
    """Each layer's experts split over `expert` (GShard; Lepikhin et al. 2020, section 3)."""
    return Plan(data=data, expert=expert, zero=stage, microbatches=microbatches)


def gpipe(stages: int, microbatches: int, data: int | None = None, *, remat: bool = True) -> Plan:
    """All forwards, then all backwards, which compute again what their stage's forward made.

    Huang et al. 2019, section 2.3; without `remat` every micro-batch's activations are kept.
    """
    again = "full" if remat else "none"
    return Plan(data, stages, schedule="gpipe", microbatches=microbatches, remat=again)


def interleaved(
    stages: int, microbatches: int, data: int | None = None, *, virtual: int = 2
) -> Plan:
    """1F1B with `virtual` smaller stages on each of `stages` ranks (Narayanan et al. 2021, 2.2)."""
    return Plan(data, stages, schedule="interleaved", virtual=virtual, microbatches=microbatches)


def zero_bubble(
    stages: int,
    microbatches: int,
    data: int | None = None,
    *,
    memory: Literal["1x", "2x", "v"] = "1x",
) -> Plan:
    """Backwards in two parts, whose second fills the bubbles (Qi et al. 2023).

    Args:
        stages: pipeline ranks.
        microbatches: of a step.
        data: ranks that share each micro-batch's samples; None fills the world.
        memory: for activations: `1x` that of 1F1B (ZB-H1), `2x` twice it and no bubble (ZB-H2), or
            `v`, that of 1F1B and no bubble where two stages a rank take equal times (ZB-V).
    """
    names = {"1x": "zb-h1", "2x": "zb-h2", "v": "zb-v"}
    if memory not in names:
        raise UsageError(f"zero_bubble has memory={memory!r}; use '1x', '2x' or 'v'")
    return Plan(data, stages, schedule=names[memory], microbatches=microbatches)


def pipedream(stages: int | str, *, vertical: bool = False) -> Plan:
    """Stages that never flush, and keep for every minibatch the weights that it began with.

    Narayanan et al. 2019, section 3.3.

    Args:
        stages: how many, or the replicas of each in the paper's notation, as in `15-1`.
        vertical: a minibatch has weights of one age at all stages (vertical sync).
    """
    name = "pipedream-vertical" if vertical else "pipedream"
    return Plan(schedule=name, **_stages(stages))


def pipedream_2bw(stages: int | str, microbatches: int | None = None) -> Plan:
    """PipeDream with two versions of the weights and gradients one update old.

    Narayanan et al. 2021 (Memory-Efficient Pipeline-Parallel DNN Training), section 3.1.

    Args:
        stages: as of `pipedream`.
        microbatches: whose gradients make an update; as many as stages when absent, the fewest
            that two versions suffice for.
    """
    plan = Plan(schedule="pipedream-2bw", **_stages(stages))
    return replace(plan, microbatches=microbatches or plan.pipeline)


class _Stages(TypedDict, total=False):
    pipeline: int
    replicas: str


def _stages(stages: int | str) -> _Stages:
    """The keys of a plan that say so many stages, or stages of so many replicas."""
    if isinstance(stages, int):
        return {"pipeline": stages}
    return {"pipeline": stages.count("-") + 1, "replicas": stages}
