"""Memory that several processes of one host map: a memfd of its maker, opened by its peers.

A memfd has no name in the file system and goes when the last process that maps it goes, however
it ends. Peers open it through `/proc/<pid>/fd`, which the kernel grants to the same user only, and
know it by a nonce which they are told in private. All pages are there before use: a page that
cannot be had later would end the process by SIGBUS.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import torch
from torch import Tensor

__all__ = ["HEADER", "NoRoom", "Segment", "available"]

HEADER = 64
_NONCE = 16
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_CGROUP = Path("/sys/fs/cgroup")


class NoRoom(Exception):
    """A segment cannot be made or opened here; the text says why."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """A mapped segment: `data` is all of it, as bytes; its first `HEADER` bytes are taken."""

    fd: int | None
    memory: mmap.mmap
    data: Tensor

    @classmethod
    def create(cls, size: int) -> Segment:
        """A segment of `size` bytes of zeros.

        Raises:
            NoRoom: the memory is not there.
        """
        free = available()
        if free is not None and size > free:
            raise NoRoom(f"{_mib(size)} of shared memory asked for, and {_mib(free)} are free")
        fd = -1
        try:
            fd = os.memfd_create("meshwright", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, size)
            os.posix_fallocate(fd, 0, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            segment = cls._map(fd, size)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            why = f" ({_LIMITS[error.errno]})" if error.errno in _LIMITS else ""
            raise NoRoom(f"{_mib(size)} of shared memory: {error.strerror}{why}") from None
        segment.memory[:_NONCE] = secrets.token_bytes(_NONCE)
        return segment

    @classmethod
    def attach(cls, card: str) -> Segment:
        """The segment that a peer described by its `card`.

        Raises:
            NoRoom: it cannot be opened, or is another one.
        """
        found = json.loads(card)
        path = f"/proc/{found['pid']}/fd/{found['fd']}"
        fd = -1
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            if os.fstat(fd).st_size != found["size"]:
                raise NoRoom(f"{path} is not the segment of process {found['pid']}")
            segment = cls._map(fd, found["size"])
        except OSError as error:
            raise NoRoom(f"cannot open {path}: {error.strerror}") from None
        finally:
            if fd >= 0:
                os.close(fd)  # the mapping stays
        segment = replace(segment, fd=None)
        if not secrets.compare_digest(segment.memory[:_NONCE].hex(), found["nonce"]):
            raise NoRoom(f"{path} is not the segment of process {found['pid']}")
        return segment

    @classmethod
    def _map(cls, fd: int, size: int) -> Segment:
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        memory = mmap.mmap(fd, size, flags, mmap.PROT_READ | mmap.PROT_WRITE)
        return cls(fd, memory, torch.frombuffer(memory, dtype=torch.uint8))

    @property
    def card(self) -> str:
        """What peers need to know to attach: JSON, for a private place."""
        facts = {"pid": os.getpid(), "fd": self.fd, "size": len(self.memory)}
        return json.dumps(facts | {"nonce": self.memory[:_NONCE].hex()})

    def close(self) -> None:
        """Its maker lets no more peers in; the mapping goes with the last tensor on it."""
        if self.fd is not None:
            os.close(self.fd)


_LIMITS = {
    errno.EFBIG: "the limit on file sizes, RLIMIT_FSIZE; see `ulimit -f`",
    errno.EMFILE: "the limit on open files, RLIMIT_NOFILE; see `ulimit -n`",
    errno.ENOMEM: "the memory limit of this process or its control group",
}


def available(cgroup: Path = _CGROUP) -> int | None:
    """Bytes that this process may still take; None where the system does not say."""
    known = [left for left in (_host_memory(), _cgroup_memory(cgroup)) if left is not None]
    return min(known, default=None)


def _host_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def _cgroup_memory(folder: Path) -> int | None:
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
    except (OSError, ValueError):
        return None
    return max(0, int(limit) - used) if limit.isdigit() else None


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
