"""Plans by the names of the systems that brought them; every one is a point of one space.

mw.presets.megatron(tensor=2, data=4)
"""

from __future__ import annotations

from meshwright.plan.plan import Plan

__all__ = ["context", "data_parallel", "expert", "hybrid", "megatron", "zero"]


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
