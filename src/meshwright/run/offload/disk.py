"""The disk tier: tensors in one preallocated file per rank, whole or known to be damaged.

    folder/rank0-<pid>-<nonce>.offload     each tensor from a multiple of 4096 bytes on

Two threads read and two write, a chunk each at a time: while one waits for the disk the other takes
digests and copies. The file is locked while its run lives, so that the next one can tell what a
killed one left and remove it.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import secrets
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import final

import torch
from torch import Tensor

from meshwright.errors import StorageError
from meshwright.run.checkpoint.digest import preferred, usable
from meshwright.run.offload.lane import Lane
from meshwright.run.offload.tier import PATIENCE, Moved, Place, Transfer, bytes_of

__all__ = ["ALIGNED", "CHUNK", "Disk", "sweep"]

ALIGNED = 4096
"""What a file's places, and transfers past the page cache, are multiples of."""

CHUNK = 1 << 22
"""Bytes of a transfer that are read or written at once, and share a digest."""

_SUFFIX = ".offload"
_THREADS = 2  # each way: one waits for the disk while the other computes


@final
class Disk:
    """Tensors in a file of this rank's."""

    def __init__(
        self, folder: Path, rank: int, *, seconds: float = PATIENCE, direct: bool = True
    ) -> None:
        """A new file in `folder`, which is made; what runs that died left there is removed.

        Args:
            folder: on the disk that is to be used.
            rank: whose file.
            seconds: that a transfer may take.
            direct: past the page cache, where the file system can.

        Raises:
            StorageError: no file can be made there.
        """
        self.moved, self.bytes = Moved(), 0
        self.path = folder / f"rank{rank}-{os.getpid()}-{secrets.token_hex(4)}{_SUFFIX}"
        self._seconds, self._end = seconds, 0
        self._file = _made(self.path)
        self._direct = _reopened(self.path) if direct else None
        self._digest = usable(preferred())
        self._readers = Lane(_THREADS, "offload-read")
        self._writers = Lane(_THREADS, "offload-write")
        self._buffers: SimpleQueue[mmap.mmap] = SimpleQueue()
        for _ in range(2 * _THREADS):
            self._buffers.put(mmap.mmap(-1, CHUNK))
        files = [file for file in (self._file, self._direct) if file is not None]
        self._gone = weakref.finalize(self, _removed, self.path, files)
        sweep(folder)

    def place(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Place:
        """Room for a tensor; it holds zeros.

        Raises:
            StorageError: the disk has none.
        """
        place = Place(name, shape, dtype, torch.empty(0), self._end)
        size = place.bytes + -place.bytes % ALIGNED
        if size:
            with self._told("grown", place):
                os.posix_fallocate(self._file, self._end, size)
                memory = mmap.mmap(self._file, size, offset=self._end)
            place.rests = torch.frombuffer(memory, dtype=torch.uint8)[: place.bytes]
            place.rests = place.rests.view(dtype).view(shape)
        else:
            place.rests = torch.empty(shape, dtype=dtype)
        self._end += size
        self.bytes += place.bytes
        zeros = self._digest(bytes(min(CHUNK, place.bytes)))
        rest = place.bytes % CHUNK
        place.digests = [zeros] * -(-place.bytes // CHUNK)
        if rest and place.bytes > CHUNK:
            place.digests[-1] = self._digest(bytes(rest))
        return place

    def put(self, place: Place, tensor: Tensor) -> Transfer:
        """Write a tensor; it must not change before the transfer is done."""
        self.moved.put += place.bytes
        source = tensor.detach().contiguous()
        return self._start(self._writers, self._write, place, source)

    def fetch(self, place: Place, out: Tensor) -> Transfer:
        """Read what rests there into `out`, a contiguous tensor; what is damaged raises."""
        assert out.is_contiguous()
        self.moved.fetched += place.bytes
        return self._start(self._readers, self._read, place, out.detach())

    def settle(self, place: Place) -> Tensor:
        """What rests there, mapped into memory, after its digests were compared.

        Raises:
            StorageError: it is damaged.
        """
        place.last.wait()
        self._start(self._readers, self._read, place, None).wait()
        return place.rests

    def close(self) -> None:
        """Remove the file."""
        self._readers.close()
        self._writers.close()
        self._gone()

    def _start(
        self,
        threads: Lane,
        act: Callable[[Place, memoryview | None, int, int], None],
        place: Place,
        tensor: Tensor | None,
    ) -> Transfer:
        before, data = place.last, None if tensor is None else bytes_of(tensor)
        parts = []
        for begin in range(0, place.bytes, CHUNK):
            size = min(CHUNK, place.bytes - begin)
            part = None if data is None else data[begin : begin + size]
            parts.append(threads.submit(partial(_after, before, act, place, part, begin, size)))
        what = f"{place.name} in {self.path}"
        place.last = Transfer(what, self._seconds, parts)
        return place.last

    def _write(self, place: Place, data: memoryview | None, begin: int, size: int) -> None:
        assert data is not None
        place.digests[begin // CHUNK] = self._digest(data)
        at, file = place.begin + begin, self._file
        with self._told("written", place):
            if self._direct is None:
                _written(file, data, at)
                os.posix_fadvise(file, at, size, os.POSIX_FADV_DONTNEED)
                return
            buffer = self._buffers.get()
            try:
                buffer[:size] = data
                whole = size + -size % ALIGNED
                _written(self._direct, memoryview(buffer)[:whole], at)
            finally:
                self._buffers.put(buffer)

    def _read(self, place: Place, out: memoryview | None, begin: int, size: int) -> None:
        at = place.begin + begin
        buffer = self._buffers.get()
        try:
            whole = size + -size % ALIGNED
            with self._told("read", place):
                file = self._file if self._direct is None else self._direct
                got = _filled(file, memoryview(buffer)[:whole], at)
            view = memoryview(buffer)[:size]
            if got < size:
                raise self._damaged(place, f"ends at byte {at + got:,}: it was cut short")
            if self._digest(view) != place.digests[begin // CHUNK]:
                raise self._damaged(place, f"was changed between bytes {at:,} and {at + size:,}")
            if out is not None:
                out[:] = view
        finally:
            self._buffers.put(buffer)
        if self._direct is None:
            with suppress(OSError):
                os.posix_fadvise(self._file, at, size, os.POSIX_FADV_DONTNEED)

    def _damaged(self, place: Place, how: str) -> StorageError:
        return StorageError(
            f"{self.path} {how}, so {place.name} is lost; start again from the newest checkpoint "
            "(--resume), and use another disk if it happens twice"
        )

    def _told(self, what: str, place: Place) -> _Told:
        return _Told(self.path, what, place.name)


class _Told:
    """What the operating system refuses is told with the file and the tensor."""

    def __init__(self, path: Path, what: str, name: str) -> None:
        self.path, self.what, self.name = path, what, name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, OSError | ValueError):
            return
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG)
        remedy = (
            "free some space there, or" if full or self.what == "grown" else "use another disk,"
        )
        raise StorageError(
            f"{self.path} cannot be {self.what} for {self.name}: {error}; {remedy} offload to "
            "another folder (MESHWRIGHT_OFFLOAD), or to host"
        ) from None


def _after(
    before: Transfer,
    act: Callable[[Place, memoryview | None, int, int], None],
    place: Place,
    part: memoryview | None,
    begin: int,
    size: int,
) -> None:
    """Act once the place's transfer before this one is done; it tells its own errors."""
    for work in before.parts:
        work.exception(before.seconds)
    act(place, part, begin, size)


def _made(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = os.open(path, flags, 0o600)
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file).st_nlink:
                break
            os.close(file)  # a sweep met it before it was locked
    except OSError as error:
        raise StorageError(
            f"{path.parent} takes no file to offload to: {error.strerror}; name a folder that can "
            "be written (MESHWRIGHT_OFFLOAD), or offload to host"
        ) from None
    return file


def _reopened(path: Path) -> int | None:
    """A descriptor past the page cache; None where the file system has none."""
    try:
        return os.open(path, os.O_RDWR | os.O_DIRECT | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None


def _written(file: int, data: memoryview, at: int) -> None:
    while data:
        count = os.pwrite(file, data, at)
        data, at = data[count:], at + count


def _filled(file: int, into: memoryview, at: int) -> int:
    """Read until `into` is full or the file ends; how many bytes came."""
    got = 0
    while got < len(into):
        count = os.preadv(file, [into[got:]], at + got)
        got += count
        if not count or got % ALIGNED:  # past the page cache a short read is the file's end
            break
    return got


def _removed(path: Path, files: list[int]) -> None:
    with suppress(OSError):
        path.unlink()
    for file in files:
        with suppress(OSError):
            os.close(file)


def sweep(folder: Path) -> list[Path]:
    """Remove the files of runs that are gone: nobody holds their locks."""
    found = []
    for path in folder.glob(f"rank*{_SUFFIX}"):
        with suppress(OSError):
            file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                found.append(path)
            finally:
                os.close(file)
    return found
