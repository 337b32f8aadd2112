"""The worker's end of a launch: every way to fail leaves a record, tells the others, and ends.

A process that is stuck in a collective cannot be unwound: gloo's threads block its teardown. So a
failing rank writes what it has to say and leaves by `os._exit`.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import NoReturn

from meshwright.errors import InternalError, UserCodeError
from meshwright.launch.connect import Connected, connect
from meshwright.launch.contract import Contract
from meshwright.launch.failure import describe, record, render, status_of

__all__ = ["end", "ending", "guard", "serve"]


def serve(contract: Contract, body: Callable[[Connected], int]) -> int:
    """Join the world, run `body`, leave, and return its exit status; an error ends the process.

    For processes that are ranks and nothing else, such as `mw train` under a launcher.
    """
    comm: Connected | None = None
    try:
        comm = connect(contract)
        status = body(comm)
        comm.close()
    except SystemExit:
        raise
    except BaseException as error:  # noqa: BLE001  every way to fail must reach the other ranks
        end(contract, comm, error)
    return status


def guard(contract: Contract, comm: Connected) -> None:
    """Let an exception that nobody catches end this process as `end` does.

    For a script with its own loop, where our code is not around the user's.
    """

    def hook(
        _kind: type[BaseException], error: BaseException, _trace: TracebackType | None
    ) -> None:
        end(contract, comm, error)

    sys.excepthook = hook
    with suppress(OSError, ValueError):  # stderr may be no real file, as in a notebook
        faulthandler.enable()


@contextmanager
def ending(contract: Contract, comm: Connected) -> Iterator[None]:
    """Within, an error that leaves ends this process as `end` does, if others wait for it.

    Unwinding further would wait for collectives that no other rank will ever finish.
    """
    try:
        yield
    except SystemExit:
        raise
    except BaseException as error:
        if contract.world.size > 1:
            end(contract, comm, error)
        raise


def end(contract: Contract, comm: Connected | None, error: BaseException) -> NoReturn:
    """Record `error`, tell the other ranks, and end this process with the error's status."""
    rank = contract.world.rank
    failure = describe(rank, error)
    if comm is not None:
        comm.abandon(f"{failure.kind}: {failure.message.splitlines()[0]}")
    run_dir = contract.run_dir
    if run_dir is not None:
        with suppress(OSError):  # a full disk must not hide the error itself
            record(run_dir, rank, error)
            if comm is not None:
                comm.ledger.dump(run_dir)
    _say(contract, error, render([failure], world=0))
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(failure.status)


def _say(contract: Contract, error: BaseException, text: str) -> None:
    """The whole traceback to this rank's log; to stderr where no supervisor prints the failure.

    A user's mistake in a name or a plan needs no traceback; a bug, theirs or ours, does.
    """
    whole = "".join(traceback.format_exception(error))
    if contract.supervised and contract.run_dir is not None:
        log = contract.run_dir / "logs" / f"rank{contract.world.rank}.log"
        with suppress(OSError), log.open("a") as file:
            file.write(whole)
        return
    with suppress(OSError, ValueError):
        bug = status_of(error) in {UserCodeError.exit_status, InternalError.exit_status}
        print((whole if bug else "") + text, file=sys.stderr)  # noqa: T201
