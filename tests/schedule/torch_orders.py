"""The orders that torch's own pipelining makes, without process groups."""

from __future__ import annotations

from types import SimpleNamespace

from torch.distributed.pipelining import schedules as theirs

from meshwright.schedule.action import Action


def order(name, ranks, microbatches, virtual=1):
    """Each rank's actions, bubbles left out, overlapped pairs one after another."""
    found = _MAKERS[name](ranks, microbatches, virtual)
    return tuple(tuple(_flat(found[rank])) for rank in range(ranks))


def _single(kind):
    def make(ranks, microbatches, virtual):
        me = SimpleNamespace(_num_stages=ranks, _n_microbatches=microbatches)
        return kind._get_pipeline_order(me)

    return make


def _multi(kind):
    def make(ranks, microbatches, virtual):
        rounds = max(1, microbatches // ranks)
        me = SimpleNamespace(
            pp_group_size=ranks,
            n_local_stages=virtual,
            num_stages=ranks * virtual,
            _num_stages=ranks * virtual,
            _n_microbatches=microbatches,
            microbatches_per_round=microbatches // rounds,
            _stages=[None] * virtual,
        )
        return [kind._calculate_single_rank_operations(me, rank) for rank in range(ranks)]

    return make


_MAKERS = {
    "gpipe": _single(theirs.ScheduleGPipe),
    "1f1b": _single(theirs.Schedule1F1B),
    "looped": _multi(theirs.ScheduleLoopedBFS),
    "interleaved": _multi(theirs.ScheduleInterleaved1F1B),
    "interleaved-zb": _multi(theirs.ScheduleInterleavedZeroBubble),
    "zb-v": _multi(theirs.ScheduleZBVZeroBubble),
    "dualpipe-v": _multi(theirs.ScheduleDualPipeV),
}


def _flat(actions):
    for action in actions:
        if action is None:
            continue
        for part in action.sub_actions or (action,):
            if part.is_compute_op:
                yield Action(part.stage_index, part.computation_type.value, part.microbatch_index)
