"""Which of the peer processes on this host have ended, as the kernel knows it."""

from __future__ import annotations

import os
import select
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import final

__all__ = ["Peers"]


@final
class Peers:
    """Open descriptors of peer processes; one becomes readable when its process ends."""

    def __init__(self, pids: Mapping[int, int]) -> None:
        """`pids` by rank.

        Raises:
            OSError: the kernel has no pidfd, or a process is gone already.
        """
        self._poll = select.poll()
        self._ranks: dict[int, int] = {}
        try:
            for rank, pid in pids.items():
                fd = os.pidfd_open(pid)
                self._ranks[fd] = rank
                self._poll.register(fd, select.POLLIN)
        except OSError:
            self.close()
            raise

    def ended(self, ranks: Collection[int]) -> list[int]:
        """Those of `ranks` whose process has ended, in order; does not wait."""
        return sorted(self._ranks[fd] for fd, _ in self._poll.poll(0) if self._ranks[fd] in ranks)

    def close(self) -> None:
        """Let go of the descriptors."""
        for fd in self._ranks:
            with suppress(OSError):
                os.close(fd)
        self._ranks.clear()
        self._poll = select.poll()
