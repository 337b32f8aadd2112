"""A rank that ran out of memory: in which parts, and what would have fitted."""

from __future__ import annotations

from contextlib import suppress

import torch

from meshwright.errors import MeshwrightError, OutOfMemory
from meshwright.job import Job
from meshwright.plan.plan import Plan
from meshwright.run.bill import bill_of
from meshwright.run.fitting import out_of_memory
from meshwright.run.form import first_micros
from meshwright.run.observe.resident import give_back, resident
from meshwright.run.prepare import prepare
from meshwright.run.session import Session

__all__ = ["explained", "forget", "ran_out"]

_OF_TORCH = "DefaultCPUAllocator: can't allocate memory"  # a RuntimeError

_LESS = 0.9


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there was no memory."""
    known = MemoryError | torch.OutOfMemoryError
    return isinstance(error, known) or _OF_TORCH in str(error)


def forget(session: Session) -> None:
    """Give up the state of a run that is over; what is worked out about it needs room."""
    session.worker.state.values.clear()
    session.worker.state.optimizer.state.clear()


def explained(
    job: Job, plan: Plan, rank: int, when: tuple[str, int], error: BaseException
) -> OutOfMemory:
    """What to raise in place of `error`.

    What was resident at most is what the rank could have: plans that need a tenth less are named.

    Args:
        job: that is trained.
        plan: under which.
        rank: this one.
        when: in words, and the bytes that the process took beside tensors.
        error: that says that there was no memory.
    """
    found = resident()
    room = 0 if found is None else found.peak
    give_back()
    where, process = when
    first = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    said = f"rank {rank} ran out of memory {where} ({_short(first, 40)})"
    with suppress(MeshwrightError, MemoryError, RuntimeError):
        build = prepare(job, plan, plan.ranks)
        entry = bill_of(build, first_micros(build))[rank]
        told = out_of_memory(job, plan, entry, room, "to it", process, _LESS)
        return OutOfMemory(f"{said}: {told}")
    return OutOfMemory(f"{said}; use zero3, remat=full, offload=disk, or more ranks")


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."
