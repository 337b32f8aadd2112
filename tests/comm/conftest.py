"""Several ranks as threads of the test's process: real sockets, no start-up cost."""

from __future__ import annotations

import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from meshwright.comm.base import World
from meshwright.comm.meeting import Deadline
from meshwright.comm.store import Rendezvous
from meshwright.comm.torchdist import TorchDist


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def in_threads(
    n: int,
    body: Callable[[TorchDist], Any],
    *,
    tokens: tuple[str | None, ...] | None = None,
    deadline: Deadline | None = None,
    seconds: float = 20.0,
    ranks: tuple[int, ...] | None = None,
) -> list[Any]:
    """Each rank's result, or the exception that ended it."""
    port = free_port()

    def rank_thread(rank: int) -> Any:
        token = tokens[rank] if tokens else "secret"
        where = Rendezvous("127.0.0.1", port, token, seconds=seconds)
        comm = TorchDist()
        try:
            comm = TorchDist.connect(World(rank, n, rank, n), where, deadline)
            return body(comm)
        except Exception as error:  # noqa: BLE001  handed to the test
            # Without its traceback, whose frames hold works, which hold connections open: gloo
            # waits for unfinished works of peers, here in one process. Real ranks just exit.
            return type(error)(str(error))
        finally:
            comm.close()

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(rank_thread, ranks or range(n)))


@pytest.fixture
def threads() -> Callable[..., list[Any]]:
    return in_threads
