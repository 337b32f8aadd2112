"""The disk tier beside the disk: as many bytes written and read, in turn.

    python -m benchmarks.offload.disk --bytes 536870912 --rounds 7 --folder .bench

Every round times each once, in an order that rotates, each on a file that is there already. Both
write and read the same tensors: where pages lie scattered, a disk may take twice as long for them.

    raw write     4 MiB at a time past the page cache, as many threads as the tier has; then a sync
    put           the tier, with its digests; then a sync
    raw read      likewise
    fetch         the tier: every 4 MiB compared with its digest
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from meshwright.run.offload.disk import CHUNK, THREADS, Disk
from meshwright.run.offload.staging import Staging
from meshwright.run.offload.tier import Place, bytes_of

TENSORS = 8
CONTESTANTS = ("raw write", "put", "raw read", "fetch")


class Raw:
    """A file past the page cache, and threads that write tensors to it and read them."""

    def __init__(self, path: Path, size: int) -> None:
        self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        os.posix_fallocate(self.file, 0, size)
        self.size, self.threads = size, ThreadPoolExecutor(THREADS)

    def write(self, tensors: list[torch.Tensor]) -> None:
        """All of them, then a sync."""
        self._all(lambda part, at: os.pwrite(self.file, part, at), tensors)
        os.fsync(self.file)

    def read(self, tensors: list[torch.Tensor]) -> None:
        """All of them."""
        self._all(lambda part, at: os.preadv(self.file, [part], at), tensors)

    def _all(self, act: Callable[[memoryview, int], int], tensors: list[torch.Tensor]) -> None:
        data = map(bytes_of, tensors)
        parts = [d[at : at + CHUNK] for d in data for at in range(0, len(d), CHUNK)]
        begins = itertools.accumulate(map(len, parts), initial=0)
        if sum(self.threads.map(act, parts, begins)) != self.size:
            raise RuntimeError("the disk took or gave less than it was asked")


def seconds(
    size: int, rounds: int, say: Callable[[str], None], parent: Path | None = None
) -> dict[str, list[float]]:
    """Seconds by contestant, a value a round; the first round, in which files grow, is not counted.

    Args:
        size: bytes, a multiple of 32 MiB.
        rounds: counted ones.
        say: told of each contestant's median.
        parent: a folder on the disk that is meant.
    """
    times: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory(prefix="mw-disk-", dir=parent) as name:
        raw, disk = Raw(Path(name, "raw"), size), Disk(Path(name), 0)
        form = (size // TENSORS // 4,)
        tensors, read = _staged(form), _staged(form)
        for tensor in tensors:
            tensor.normal_()
        places = [disk.place(f"tensor {n}", form, torch.float32) for n in range(TENSORS)]
        steps: dict[str, Callable[[], None]] = {
            "raw write": lambda: raw.write(tensors),
            "put": lambda: _put(disk, places, tensors),
            "raw read": lambda: raw.read(read),
            "fetch": lambda: _fetched(disk, places, read),
        }
        try:
            for number in range(rounds + 1):
                order = CONTESTANTS if number % 2 else ("put", "raw write", "fetch", "raw read")
                for one in order:
                    began = time.perf_counter()
                    steps[one]()
                    times[one].append(time.perf_counter() - began)
            if not all(map(torch.equal, tensors, read)):
                raise RuntimeError("what was fetched is not what was put")
        finally:
            disk.close()
            raw.threads.shutdown()
            os.close(raw.file)
    found = {name: values[1:] for name, values in times.items()}
    for name, values in found.items():
        middle = statistics.median(values)
        say(f"{name}: {middle:.3f} s, {size / middle / 1e9:.2f} GB/s")
    return found


def _staged(form: tuple[int, ...]) -> list[torch.Tensor]:
    """Memory as an optimizer's step has it."""
    staging = Staging("tensors")
    staging.begin([(form, torch.float32)] * TENSORS)
    return [staging.take(form, torch.float32) for _ in range(TENSORS)]


def _put(disk: Disk, places: list[Place], tensors: list[torch.Tensor]) -> None:
    going = [disk.put(place, tensor) for place, tensor in zip(places, tensors, strict=True)]
    for transfer in going:
        transfer.wait()
    file = os.open(disk.path, os.O_RDONLY)
    os.fsync(file)
    os.close(file)


def _fetched(disk: Disk, places: list[Place], tensors: list[torch.Tensor]) -> None:
    going = [disk.fetch(place, tensor) for place, tensor in zip(places, tensors, strict=True)]
    for transfer in going:
        transfer.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", type=int, default=512 << 20)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    seconds(asked.bytes, asked.rounds, print, asked.folder)


if __name__ == "__main__":
    main()
