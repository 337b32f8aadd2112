"""What is on its way to tiers, bounded: a tensor that leaves is not free before it has arrived."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from meshwright.program.offload import FLIGHT
from meshwright.run.offload.tier import Transfer

__all__ = ["Flight"]


@dataclass(slots=True)
class Flight:
    """Transfers under way with their bytes: `FLIGHT` of them, and the newest, at most."""

    going: list[tuple[int, Transfer]] = field(default_factory=list)

    def begin(self, size: int, start: Callable[[], Transfer]) -> Transfer:
        """Start one of `size` bytes, once there is room for it.

        Raises:
            StorageError: one that has ended, or was waited for, failed.
        """
        for _, transfer in self.going:
            if transfer.done:
                transfer.wait()
        self.going = [each for each in self.going if not each[1].done]
        while sum(each for each, _ in self.going) > FLIGHT:
            _, first = self.going.pop(0)
            first.wait()
        begun = start()
        self.going.append((size, begun))
        return begun

    def settle(self) -> None:
        """Wait until all have arrived.

        Raises:
            StorageError: one failed.
        """
        for _, transfer in self.going:
            transfer.wait()
        self.going.clear()
