"""How a command's error is told: once, short, the user's own lines first, with its status."""

from __future__ import annotations

import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from meshwright.cli.output import log, silenced
from meshwright.errors import MeshwrightError, UsageError, VerificationFailed

__all__ = ["UNREAD", "Task", "attempt"]

UNREAD = 128 + signal.SIGPIPE
"""The status of a command whose reader has gone (`mw plan ... | head -1`), as other tools have."""

Task = Callable[[], int]
"""What a verb returns once it has read its words: does the work, returns the exit status."""


def attempt(task: Task, run_dir: Path | None = None) -> int:
    """Run `task`; an error is told on stderr and becomes the exit status.

    Args:
        task: what to do.
        run_dir: the run's folder, where the error and its whole traceback are kept.
    """
    try:
        return task()
    except SystemExit:
        raise
    except BrokenPipeError as error:
        return UNREAD if silenced() else _tell(error, run_dir)
    except BaseException as error:  # noqa: BLE001  the outermost handler: all ends are told alike
        return _tell(error, run_dir)


def _tell(error: BaseException, run_dir: Path | None) -> int:
    from meshwright.launch.contract import here
    from meshwright.launch.failure import status_of
    from meshwright.launch.worker import end

    with suppress(UsageError):  # a broken contract is itself what there is to tell
        contract = here()
        if contract.world.size > 1:
            end(contract, None, error)
    if run_dir is not None:
        with suppress(OSError):  # a full disk must not hide the error itself
            _keep(error, run_dir)
    log(_text(error, run_dir))
    return status_of(error)


def _keep(error: BaseException, run_dir: Path) -> None:
    """Write the failure's record, and its traceback to the log."""
    from meshwright.launch.failure import record

    record(run_dir, 0, error)
    log = run_dir / "logs" / "rank0.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("a") as file:
        file.write("".join(traceback.format_exception(error)))


def _text(error: BaseException, run_dir: Path | None) -> str:
    """What is printed: a line where the words were wrong, else where it happened."""
    from meshwright.launch.failure import describe, render

    if isinstance(error, KeyboardInterrupt):
        return "mw: interrupted"
    if isinstance(error, UsageError | VerificationFailed):
        return f"mw: {error}"
    failure = describe(0, error)
    if run_dir is not None:
        return render([failure], world=1, logs=run_dir / "logs")
    if failure.status == MeshwrightError.exit_status:  # ours: whoever mends it needs it all
        return "".join(traceback.format_exception(error)).rstrip()
    return render([failure], world=1)
