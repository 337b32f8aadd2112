"""The supervisor: starts N ranks on this host, watches them, and leaves nothing running.

It owns what the ranks share: the job's token (in a memory file that they inherit, never in
arguments or the environment) and the listening socket, bound to loopback, of rank 0's store. The
first rank to fail decides; the others get a few seconds to end by themselves.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from meshwright.comm.base import World
from meshwright.errors import UsageError
from meshwright.launch import failure
from meshwright.launch.contract import Contract, write
from meshwright.launch.orphan import die_with_parent
from meshwright.launch.pump import Pump
from meshwright.launch.watch import Member, Watch

__all__ = ["launch"]


def launch(
    n: int,
    command: Sequence[str],
    *,
    run_dir: Path,
    environ: Mapping[str, str] | None = None,
    plan: str | None = None,
    timeout: float | None = None,
    grace: float = 4.0,
) -> int:
    """Run `command` as `n` ranks on this host and return the documented exit status.

    Args:
        n: how many ranks.
        command: program and arguments, the same for every rank.
        run_dir: the run's folder: logs/, failures/ and ledger/ go there.
        environ: the ranks' environment; default this process's.
        plan: text for MESHWRIGHT_PLAN.
        timeout: seconds for every wait of the ranks on each other.
        grace: seconds that ranks get to end by themselves once one has failed.

    Raises:
        UsageError: `n` is below 1, or the command cannot be started.
    """
    if n < 1:
        raise UsageError(f"-n is {n}; start at least 1 rank")
    environ = dict(os.environ if environ is None else environ)
    plan = plan or environ.get("MESHWRIGHT_PLAN")
    contract = Contract(World(0, n, 0, n), "meshwright", run_dir=run_dir.absolute(), plan=plan,
                        timeout=timeout)  # fmt: skip
    failure.clear(run_dir)
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        crew = _start(command, contract, environ, stack)
        return Watch(crew, run_dir, grace).until_all_end()


def _start(
    command: Sequence[str], contract: Contract, environ: Mapping[str, str], stack: ExitStack
) -> list[Member]:
    """Start every rank; on any trouble, none is left."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    stack.callback(listener.close)
    token = os.memfd_create("meshwright-token")
    stack.callback(os.close, token)
    os.write(token, secrets.token_hex(32).encode())
    crew: list[Member] = []
    stack.callback(_kill_all, crew)
    threads = max(1, len(os.sched_getaffinity(0)) // contract.world.size)
    for rank in range(contract.world.size):
        mine = replace(
            contract,
            world=replace(contract.world, rank=rank, local_rank=rank),
            address="127.0.0.1",
            port=listener.getsockname()[1],
            store_fd=listener.fileno() if rank == 0 else None,
        )
        variables = {
            "OMP_NUM_THREADS": str(threads),
            "PYTHONUNBUFFERED": "1",
            **environ,
            **write(mine, token),
        }
        fds = [token] if mine.store_fd is None else [token, mine.store_fd]
        crew.append(_spawn(command, mine, variables, fds, stack))
    return crew


def _spawn(
    command: Sequence[str],
    contract: Contract,
    environ: Mapping[str, str],
    fds: Sequence[int],
    stack: ExitStack,
) -> Member:
    rank = contract.world.rank
    assert contract.run_dir is not None
    log = stack.enter_context((contract.run_dir / "logs" / f"rank{rank}.log").open("ab"))
    pumps = _pumps(log) if rank == 0 else ()
    me = os.getpid()
    try:
        process = subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=pumps[0].child_end if pumps else log,
            stderr=pumps[1].child_end if pumps else log,
            pass_fds=fds,
            process_group=0,
            preexec_fn=lambda: die_with_parent(me),  # noqa: PLW1509  there are no threads here
        )
    except OSError as error:
        raise UsageError(f"cannot start {command[0]!r}: {error.strerror}") from None
    for pump in pumps:
        pump.started()
    pidfd = os.pidfd_open(process.pid)
    stack.callback(os.close, pidfd)
    return Member(rank, process, pidfd, pumps)


def _kill_all(crew: Sequence[Member]) -> None:
    for member in crew:
        member.kill()


def _pumps(log: BinaryIO) -> tuple[Pump, ...]:
    return Pump(1, log), Pump(2, log)
