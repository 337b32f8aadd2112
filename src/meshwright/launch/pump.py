"""Rank 0's output goes to the terminal and to its log.

Where the supervisor's own stream is a terminal, rank 0 is given a terminal of its own (a pty), so
that its progress display works; otherwise a pipe.
"""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import re
import termios
from typing import BinaryIO, final

__all__ = ["Pump", "plain"]

_CHUNK = 1 << 16
_ESCAPE = re.compile(rb"\x1b(\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[@-Z\\-_=>78])")


@final
class Pump:
    """Copies what a child writes to `child_end` to `out` and, without screen codes, to `log`."""

    def __init__(self, out: int, log: BinaryIO) -> None:
        """Make a pty or pipe; hand `child_end` to the child, then call `started`."""
        self._out, self._log = out, log
        self._terminal = os.isatty(out)
        self._line = b""
        self.source, self.child_end = pty.openpty() if self._terminal else os.pipe()
        os.set_blocking(self.source, False)
        if self._terminal:
            self.resize()
            _raw_output(self.child_end)

    def started(self) -> None:
        """The child has its end: let go of it here, so that its exit shows as the end of data."""
        os.close(self.child_end)

    def resize(self) -> None:
        """Give the child's terminal the size of ours."""
        if self._terminal:
            size = fcntl.ioctl(self._out, termios.TIOCGWINSZ, b"\0" * 8)
            fcntl.ioctl(self.source, termios.TIOCSWINSZ, size)

    def move(self) -> bool:
        """Copy what is there; False once the child's end is closed."""
        try:
            data = os.read(self.source, _CHUNK)
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno != errno.EIO:  # how a pty says that nobody holds its other end
                raise
            data = b""
        if data:
            _write_all(self._out, data)
            self._note(data)
        return bool(data)

    def close(self) -> None:
        """Copy what is left, without waiting for more, and let go."""
        while _ready(self.source) and self.move():
            pass
        self._log.write(plain(self._line))
        self._log.flush()
        os.close(self.source)

    def _note(self, data: bytes) -> None:
        if not self._terminal:
            self._log.write(data)
        else:
            *lines, self._line = (self._line + data).split(b"\n")
            self._log.write(b"".join(plain(line) + b"\n" for line in lines))
        self._log.flush()


def plain(line: bytes) -> bytes:
    """What a terminal shows in the end of a line that was drawn several times."""
    return _ESCAPE.sub(b"", line.rstrip(b"\r").rpartition(b"\r")[2])


def _ready(fd: int) -> bool:
    import select

    return bool(select.select([fd], [], [], 0)[0])


def _raw_output(fd: int) -> None:
    """Let bytes through as they are: the real terminal turns newlines into its own."""
    attributes = termios.tcgetattr(fd)
    attributes[1] &= ~termios.OPOST
    termios.tcsetattr(fd, termios.TCSANOW, attributes)


def _write_all(fd: int, data: bytes) -> None:
    """Write all of `data`; a reader that has gone is no reason to end a training run."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            continue
        except OSError:
            return
