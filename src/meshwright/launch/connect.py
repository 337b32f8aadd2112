"""From the world contract to a `Comm`."""

from __future__ import annotations

from meshwright.comm.store import Rendezvous
from meshwright.comm.torchdist import Deadline, TorchDist
from meshwright.launch.contract import Contract
from meshwright.launch.orphan import die_with_parent

__all__ = ["connect"]


def connect(contract: Contract) -> TorchDist:
    """Join the world that `contract` describes; a world of one joins nobody.

    Raises:
        UsageError: address, port or token are wrong.
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
    return TorchDist.connect(contract.world, where, deadline)
