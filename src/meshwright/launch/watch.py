"""Watching the ranks of one host: who ended how, signals passed on, and nobody left behind.

The first rank that fails starts a clock. The others are given some seconds to find out and end by
themselves (they say more about it than we can), then SIGTERM, then SIGKILL.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

from meshwright.errors import OutOfMemory, PeerLost
from meshwright.launch import failure
from meshwright.launch.failure import Failure
from meshwright.launch.kernel import bill_text, oom_kills
from meshwright.launch.pump import Pump

__all__ = ["Member", "Watch"]

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_TICK = 0.25
_ON_TERM = 2.0
_LOG_LINES, _LOG_BYTES = 3, 4096


@final
@dataclass(slots=True)
class Member:
    """One started rank, which leads its own process group.

    `ended` is the time of day; `pressed` tells that it still ran when we began to end it.
    """

    rank: int
    process: subprocess.Popen[bytes]
    pidfd: int
    pumps: tuple[Pump, ...] = ()
    ended: float | None = None
    pressed: bool = False

    @property
    def status(self) -> int:
        """As `Popen.returncode`: negative for a signal; 0 while it runs."""
        return self.process.returncode or 0

    def signal(self, number: int) -> None:
        """Send a signal to the rank itself, which looks after its helpers."""
        if self.ended is None:
            self.process.send_signal(number)

    def press(self, number: int) -> None:
        """Have the rank end: ask it to, or with SIGKILL end it and all that it started."""
        if self.ended is None:
            self.pressed = True
            if number == signal.SIGKILL:
                self.kill()
            else:
                self.signal(number)

    def kill(self) -> None:
        """End the rank and all that it started."""
        if self.ended is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


@final
@dataclass(slots=True)
class Watch:
    """Waits for all ranks, hears signals, and ends what does not end by itself."""

    crew: list[Member]
    run_dir: Path
    grace: float
    heard: list[int] = field(default_factory=list)
    failed: float | None = None
    closing: int = 0
    oom_before: int = field(default_factory=lambda: oom_kills())  # noqa: PLW0108  looked up late

    def until_all_end(self) -> int:
        """The exit status, once no rank is left; the failure, if any, is printed to stderr."""
        with selectors.DefaultSelector() as selector, _signals() as wake:
            selector.register(wake, selectors.EVENT_READ, lambda: self._hear(wake))
            for member in self.crew:
                selector.register(
                    member.pidfd, selectors.EVENT_READ, self._end_of(selector, member)
                )
                for pump in member.pumps:
                    selector.register(pump.source, selectors.EVENT_READ, _copy(selector, pump))
            while any(member.ended is None for member in self.crew):
                for key, _ in selector.select(_TICK):
                    act: Callable[[], None] = key.data
                    act()
                self._press()
        for pump in self._pumps():
            pump.close()
        return self._report()

    def _pumps(self) -> Iterator[Pump]:
        return (pump for member in self.crew for pump in member.pumps)

    def _end_of(self, selector: selectors.BaseSelector, member: Member) -> Callable[[], None]:
        def end() -> None:
            selector.unregister(member.pidfd)
            member.kill()  # its helpers; the rank itself is dead, and not yet reaped
            status = member.process.wait()
            member.ended = time.time()
            if status and self.failed is None and not self._asked(status):
                self.failed = time.monotonic()

        return end

    def _asked(self, status: int) -> bool:
        """Whether a rank ended because of the signal that was passed on to it."""
        if not self.heard:
            return False
        sent = _sent(self.heard[0])
        return status in {-sent, 128 + sent}

    def _hear(self, wake: socket.socket) -> None:
        for number in wake.recv(64):
            if number == signal.SIGWINCH:
                for pump in self._pumps():
                    pump.resize()
            elif number in _FORWARDED:
                self.heard.append(number)
                for member in self.crew:
                    if len(self.heard) > 1:
                        member.press(signal.SIGKILL)
                    else:
                        member.signal(_sent(number))

    def _press(self) -> None:
        """After the first failure: some seconds, then SIGTERM, then SIGKILL."""
        if self.failed is None:
            return
        late = time.monotonic() - self.failed - self.grace
        if late > 0 and self.closing == 0:
            self.closing = 1
            for member in self.crew:
                member.press(signal.SIGTERM)
        if late > _ON_TERM and self.closing == 1:
            self.closing = 2
            for member in self.crew:
                member.press(signal.SIGKILL)

    def _report(self) -> int:
        """Print the failure, if there is one, and choose the exit status."""
        failures = self._failures()
        if failures:
            text = failure.render(failures, world=len(self.crew), logs=self.run_dir / "logs")
            print(text, file=sys.stderr, flush=True)  # noqa: T201
            return failure.deciding(failures).status
        asked = bool(self.heard) and any(member.status for member in self.crew)
        return 128 + self.heard[0] if asked else 0

    def _failures(self) -> list[Failure]:
        """What each failed rank recorded, or else what its exit says."""
        records = {found.rank: found for found in failure.read(self.run_dir)}
        failed = (m for m in self.crew if m.status and not self._expected(m))
        found = [records.get(member.rank) or self._unrecorded(member) for member in failed]
        # Ranks that were asked to stop leave one after the other: that loses nobody.
        return [known for known in found if not (self.heard and known.consequence)]

    def _expected(self, member: Member) -> bool:
        """Whether a rank ended by our own doing."""
        ours = {-signal.SIGTERM, -signal.SIGKILL, 128 + signal.SIGTERM}
        return self._asked(member.status) or (member.pressed and member.status in ours)

    def _unrecorded(self, member: Member) -> Failure:
        status, now = member.status, member.ended or 0.0
        pid = member.process.pid
        if status > 0:
            tail = _tail(self.run_dir / "logs" / f"rank{member.rank}.log")
            text = f"exit status {status}" + (f"; its log ends:\n{tail}" if tail else "")
            return Failure(member.rank, pid, now, failure.EXITED, text, status)
        name = signal.Signals(-status).name
        if status == -signal.SIGKILL and oom_kills() > self.oom_before:
            needed = bill_text(self.run_dir, member.rank)
            text = f"was killed by {name}: the kernel was out of memory; {needed}"
            return Failure(member.rank, pid, now, failure.SIGNALLED, text, OutOfMemory.exit_status)
        text = f"was killed by {name}"
        return Failure(member.rank, pid, now, failure.SIGNALLED, text, PeerLost.exit_status)


def _sent(number: int) -> int:
    """What ranks are sent for a signal that we got: a closed terminal means to stop."""
    return signal.SIGTERM if number == signal.SIGHUP else number


def _copy(selector: selectors.BaseSelector, pump: Pump) -> Callable[[], None]:
    def copy() -> None:
        if not pump.move():
            selector.unregister(pump.source)

    return copy


def _tail(log: Path) -> str:
    """The last lines of a log."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LOG_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join([line for line in lines if line.strip()][-_LOG_LINES:])


@contextmanager
def _signals() -> Iterator[socket.socket]:
    """Within, signals that matter here make the given socket readable and do nothing else."""
    reader, writer = socket.socketpair()
    os.set_blocking(writer.fileno(), False)
    watched = [
        number
        for number in (*_FORWARDED, signal.SIGWINCH)
        if signal.getsignal(number) != signal.SIG_IGN or number != signal.SIGHUP  # nohup
    ]
    before = {number: signal.signal(number, lambda *_: None) for number in watched}
    old = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(old)
        for number, handler in before.items():
            signal.signal(number, handler)
        reader.close()
        writer.close()
