"""The disk tier: tensors in one preallocated file per rank, whole or known to be damaged.

    folder/rank0-<pid>-<nonce>.offload     each tensor from a multiple of 4096 bytes on

Four threads read and four write, a chunk each at a time: while some wait for the disk, others take
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
from typing import Protocol, final

import torch
from torch import Tensor

from meshwright.errors import StorageError
from meshwright.run.checkpoint.digest import preferred, usable
from meshwright.run.offload.lane import Lane
from meshwright.run.offload.tier import PATIENCE, Moved, Place, Transfer, bytes_of

__all__ = ["ALIGNED", "CHUNK", "THREADS", "Disk", "buffered", "sweep"]

ALIGNED = 4096
"""What a file's places, and transfers past the page cache, are multiples of."""

CHUNK = 1 << 22
"""Bytes of a transfer that are read or written at once, and share a digest."""

_SUFFIX = ".offload"
THREADS = 4
"""Each way: some wait for the disk while others take digests and copy."""


def buffered(largest: int) -> int:
    """Bytes of the buffers that tensors of at most `largest` bytes pass through."""
    return 2 * THREADS * min(CHUNK, largest + -largest % ALIGNED)


class _Act(Protocol):
    """Reads or writes a chunk; `straight`: out of or into memory aligned as the file is."""

    def __call__(
        self, place: Place, part: memoryview | None, begin: int, size: int, /, *, straight: bool
    ) -> None: ...


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
        self.moved, self.bytes, self._largest = Moved(), 0, 0
        self.path = folder / f"rank{rank}-{os.getpid()}-{secrets.token_hex(4)}{_SUFFIX}"
        self._seconds, self._end = seconds, 0
        self._file = _made(self.path)
        self._direct = _reopened(self.path) if direct else None
        self._digest = usable(preferred())
        self._readers = Lane(THREADS, "offload-read")
        self._writers = Lane(THREADS, "offload-write")
        self._buffers: SimpleQueue[mmap.mmap] = SimpleQueue()
        for _ in range(2 * THREADS):
            self._buffers.put(mmap.mmap(-1, CHUNK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
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
        self._largest = max(self._largest, place.bytes)
        zeros = self._digest(bytes(min(CHUNK, place.bytes)))
        rest = place.bytes % CHUNK
        place.digests = [zeros] * -(-place.bytes // CHUNK)
        if rest and place.bytes > CHUNK:
            place.digests[-1] = self._digest(bytes(rest))
        return place

    @property
    def passing(self) -> int:
        """Bytes of memory that transfers pass through."""
        return buffered(self._largest)

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
        act: _Act,
        place: Place,
        tensor: Tensor | None,
    ) -> Transfer:
        before, data = place.last, None if tensor is None else bytes_of(tensor)
        aligned = tensor is not None and tensor.data_ptr() % ALIGNED == 0
        straight = aligned and self._direct is not None
        parts = []
        for begin in range(0, place.bytes, CHUNK):
            size = min(CHUNK, place.bytes - begin)
            part = None if data is None else data[begin : begin + size]
            move = partial(act, place, part, begin, size, straight=straight)
            parts.append(threads.submit(partial(_after, before, move)))
        what = f"{place.name} in {self.path}"
        place.last = Transfer(what, self._seconds, parts)
        return place.last

    def _write(
        self,
        place: Place,
        data: memoryview | None,
        begin: int,
        size: int,
        *,
        straight: bool,
    ) -> None:
        assert data is not None
        place.digests[begin // CHUNK] = self._digest(data)
        at, file = place.begin + begin, self._file
        with self._told("written", place):
            if self._direct is None:
                _written(file, data, at)
                os.posix_fadvise(file, at, size, os.POSIX_FADV_DONTNEED)
                return
            if straight and size % ALIGNED == 0:
                _written(self._direct, data, at)
                return
            buffer = self._buffers.get()
            try:
                buffer[:size] = data
                whole = size + -size % ALIGNED
                _written(self._direct, memoryview(buffer)[:whole], at)
            finally:
                self._buffers.put(buffer)

    def _read(
        self,
        place: Place,
        out: memoryview | None,
        begin: int,
        size: int,
        *,
        straight: bool,
    ) -> None:
        at = place.begin + begin
        if straight and out is not None and size % ALIGNED == 0:
            self._chunk(place, out, begin, size)
            return
        buffer = self._buffers.get()
        try:
            view = memoryview(buffer)
            self._chunk(place, view[: size + -size % ALIGNED], begin, size)
            if out is not None:
                out[:] = view[:size]
        finally:
            self._buffers.put(buffer)
        if self._direct is None:
            with suppress(OSError):
                os.posix_fadvise(self._file, at, size, os.POSIX_FADV_DONTNEED)

    def _chunk(self, place: Place, into: memoryview, begin: int, size: int) -> None:
        """Read a chunk, and compare it with its digest."""
        at = place.begin + begin
        with self._told("read", place):
            got = _filled(self._file if self._direct is None else self._direct, into, at)
        if got < size:
            raise self._damaged(place, f"ends at byte {at + got:,}: it was cut short")
        if self._digest(into[:size]) != place.digests[begin // CHUNK]:
            raise self._damaged(place, f"was changed between bytes {at:,} and {at + size:,}")

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


def _after(before: Transfer, act: Callable[[], None]) -> None:
    """Act once the place's transfer before this one is done; it tells its own errors."""
    for work in before.parts:
        work.exception(before.seconds)
    act()


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
