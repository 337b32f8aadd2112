"""From the world contract to a `Comm`: which one carries the data, and why."""

from __future__ import annotations

from meshwright.comm.base import World
from meshwright.comm.meeting import Deadline, Meeting
from meshwright.comm.shared import Shared
from meshwright.comm.sharing import Unsuited
from meshwright.comm.store import Rendezvous
from meshwright.comm.torchdist import TorchDist
from meshwright.errors import UsageError
from meshwright.launch.contract import COMM, Contract
from meshwright.launch.orphan import die_with_parent

__all__ = ["Connected", "connect"]

Connected = Shared | TorchDist


def connect(contract: Contract) -> Connected:
    """Join the world that `contract` describes; a world of one joins nobody.

    Ranks of one host share memory; others talk through gloo, and so do ranks that cannot share
    memory, with a note that says why. MESHWRIGHT_COMM decides otherwise.

    Raises:
        UsageError: address, port or token are wrong, or MESHWRIGHT_COMM=shared cannot be done.
        Stalled: a rank did not come in time; names it.
    """
    if contract.supervised:
        die_with_parent()
    timeout = contract.timeout
    deadline = Deadline() if timeout is None else Deadline(timeout, timeout)
    if contract.world.size == 1:
        return TorchDist(contract.world, deadline=deadline)
    where = Rendezvous(
        contract.address,
        contract.port,
        contract.token,
        contract.store_fd,
        contract.hosted,
        contract.attempt,
        deadline.first,
    )
    meeting = Meeting.open(contract.world, where, deadline)
    try:
        return Shared.over(meeting, _refusal(contract.comm, contract.world))
    except Unsuited as reason:
        if contract.comm == "shared":
            meeting.leave()
            raise UsageError(
                f"{COMM} is 'shared', but {reason}; unset it, or use {COMM}=gloo"
            ) from None
        asked = contract.comm == "gloo"
        notes = () if asked else (f"collectives go through gloo: {reason}",)
        return TorchDist.over(meeting, notes)


def _refusal(comm: str | None, world: World) -> str | None:
    """Why this rank does not want to share memory."""
    if comm == "gloo":
        return f"{COMM} is 'gloo'"
    if comm is None and world.local_size < world.size:
        return f"{world.local_size} of {world.size} ranks are on this host"
    return None
