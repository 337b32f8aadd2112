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


def fused_bubble(ranks, microbatches, times):
    """DualPipe-V's idle time in a step if an overlapped pair gives out nothing until both end."""
    forward, inputs, weights = times
    cost = {"F": forward, "B": inputs + weights, "I": inputs, "W": weights}
    orders = _MAKERS["dualpipe-v"](ranks, microbatches, 2)
    free, at, ends = [0.0] * ranks, [0] * ranks, {}
    while any(at[rank] < len(orders[rank]) for rank in range(ranks)):
        for rank, order in enumerate(orders):
            while at[rank] < len(order):
                parts = tuple(_flat([order[at[rank]]]))
                reads = [read for part in parts for read in _reads(part, 2 * ranks)]
                if not all(read in ends for read in reads):
                    break
                begin = max([free[rank], *(ends[read] for read in reads)])
                free[rank] = begin + sum(cost[part.kind] for part in parts)
                at[rank] += 1
                for part in parts:
                    ends[part.stage, part.kind in "BI", part.microbatch] = free[rank]
    return max(free) - 2 * microbatches * sum(times)


def _reads(action, stages):
    stage, microbatch = action.stage, action.microbatch
    if action.kind == "W":
        return []
    if action.kind == "F":
        return [(stage - 1, False, microbatch)] if stage else []
    later = [(stage + 1, True, microbatch)] if stage + 1 < stages else []
    return [(stage, False, microbatch), *later]
