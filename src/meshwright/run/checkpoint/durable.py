"""Files and folders that survive a crash: written whole and synced, then renamed into place.

A name is opened inside a folder one trusts, never through a link, so that what a manifest says
cannot lead out of its checkpoint.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from meshwright.errors import StorageError

__all__ = [
    "discard",
    "make_folder",
    "opened",
    "publish",
    "read_at",
    "read_small",
    "sync_folder",
    "write_file",
]

_CHUNK = 8 << 20


def write_file(path: Path, chunks: Iterable[memoryview | bytes]) -> int:
    """Write a new file and sync it to the disk; its length in bytes.

    Raises:
        OSError: it exists, or the disk refuses; a part of the file may be left.
    """
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        length = sum(_write_all(file, chunk) for chunk in chunks)
        os.fsync(file)
    finally:
        os.close(file)
    return length


def _write_all(file: int, data: memoryview | bytes) -> int:
    rest = memoryview(data)
    while rest:
        # A write may take less than it was given: past 2 GiB, or on a disk that gets full.
        rest = rest[os.write(file, rest[:_CHUNK]) :]
    return len(data)


def publish(written: Path, name: Path) -> None:
    """Give a complete folder its final name; afterwards it is there, whole, also after a crash."""
    sync_folder(written)
    written.rename(name)
    sync_folder(name.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems keep names safe themselves, and know no sync of a folder.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it that are missing, for good."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def discard(folder: Path, aside: Path) -> None:
    """Remove a folder; it vanishes in one step, so no reader meets half of it."""
    folder.rename(aside)
    sync_folder(aside.parent)
    shutil.rmtree(aside)


@contextmanager
def opened(folder: Path, name: str) -> Iterator[int]:
    """A descriptor of the regular file `name` in `folder`, not reached through a link.

    Raises:
        StorageError: it is missing, unreadable, a link, a folder or a device.
    """
    # Without O_NONBLOCK, opening a named pipe would wait for a writer.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        file = os.open(folder / name, flags)
    except OSError as error:
        how = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise StorageError(f"{name} cannot be opened: {how}") from None
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise StorageError(f"{name} is not a regular file")
        yield file
    except OSError as error:
        raise StorageError(f"{name} cannot be read: {error.strerror}") from None
    finally:
        os.close(file)


def read_at(file: int, into: memoryview, offset: int, name: str) -> None:
    """Fill `into` with the bytes of a file from `offset` on.

    Raises:
        StorageError: `name` ends before, or the disk refuses.
    """
    while into:
        try:
            count = os.preadv(file, [into], offset)
        except OSError as error:
            raise StorageError(f"{name} cannot be read: {error.strerror}") from None
        if not count:
            raise StorageError(f"{name} ends at byte {offset:,}: it is cut short")
        into, offset = into[count:], offset + count


def read_small(folder: Path, name: str, limit: int) -> bytes:
    """The bytes of a file, at most `limit` + 1 of them.

    Raises:
        StorageError: as `opened`.
    """
    with opened(folder, name) as file, os.fdopen(os.dup(file), "rb") as stream:
        size = os.fstat(file).st_size  # read() takes memory for all that it is asked for
        return stream.read(min(limit, size) + 1)
