"""Checkpoints beside what bounds them and beside torch's: saved, staged and loaded, in turn.

    python benchmarks/checkpoint/compare.py --bytes 1073741824 --rounds 9 --folder /tmp

Each of two ranks holds half of the bytes, as float32 tensors of 8 MiB. Every round times each
contestant once, on the slowest rank, in an order that rotates from round to round:

    raw           writes its bytes to a file and syncs it
    save          ours: shards, digests, manifest, commit
    DCP save      torch.distributed.checkpoint.save
    copy          copies its tensors once in memory that was used before
    stage         ours: what the steps wait for while a save is begun (it is finished untimed)
    DCP stage     torch.distributed.checkpoint.async_save, likewise
    read          reads a file, which is in the page cache, into its tensors
    load          ours, of the same state: every chunk compared with its digest
    DCP load      torch.distributed.checkpoint.load
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from benchmarks.collectives.compare import ports
from meshwright.comm.base import Group, World, all_reduce, barrier
from meshwright.comm.meeting import Deadline, Meeting
from meshwright.comm.shared import Shared
from meshwright.comm.store import Rendezvous
from meshwright.run.checkpoint.save import Piece, open_checkpoint, save
from meshwright.run.checkpoint.saver import Saver

RANKS, TENSOR_BYTES, BLOCK = 2, 8 << 20, 8 << 20
CONTESTANTS = ("raw", "save", "DCP save", "copy", "stage", "DCP stage", "read", "load", "DCP load")


@dataclass
class Rank:
    """One rank's state and where it writes."""

    comm: Shared
    folder: Path
    bytes: int
    tensors: list[torch.Tensor] = field(default_factory=list)
    copies: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        rank = self.comm.world.rank
        generator = torch.Generator().manual_seed(rank)
        count = max(1, self.bytes // RANKS // TENSOR_BYTES)
        shape = (TENSOR_BYTES // 4096, 1024)
        self.tensors = [torch.randn(shape, generator=generator) for _ in range(count)]
        self.copies = [torch.zeros_like(tensor) for tensor in self.tensors]
        self.group = Group.world(RANKS)
        self.saver = Saver(self.group, rank)
        self.step = 0

    @property
    def rank(self) -> int:
        return self.comm.world.rank

    def pieces(self, tensors: list[torch.Tensor]) -> list[Piece]:
        """Each rank has the rows of its half of every tensor."""
        rows, columns = tensors[0].shape
        shape, start = (RANKS * rows, columns), (self.rank * rows, 0)
        return [Piece(f"model/{n}", shape, start, tensor) for n, tensor in enumerate(tensors)]

    def named(self, tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """For DCP, whose entries of one name are one rank's."""
        return {f"{self.rank}/{n}": tensor for n, tensor in enumerate(tensors)}

    @contextmanager
    def timed(self, times: dict[str, list[float]], name: str) -> Iterator[None]:
        """Seconds of the slowest rank."""
        self.comm.perform(barrier(self.group))
        began = time.perf_counter()
        yield
        mine = torch.tensor([time.perf_counter() - began], dtype=torch.float64)
        times[name].append(self.comm.perform(all_reduce(mine, self.group, "max")).item())

    def emptied(self, name: str) -> Path:
        """A folder that is not there yet."""
        path = self.folder / name
        self.comm.perform(barrier(self.group))
        if self.rank == 0:
            shutil.rmtree(path, ignore_errors=True)
        self.comm.perform(barrier(self.group))
        return path


def raw(rank: Rank, times: dict[str, list[float]]) -> None:
    folder = rank.emptied("raw")
    folder.mkdir(exist_ok=True)
    with rank.timed(times, "raw"):
        file = os.open(folder / str(rank.rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for tensor in rank.tensors:
            data = tensor.view(-1).view(torch.uint8).numpy().data
            while data:
                data = data[os.write(file, data[:BLOCK]) :]
        os.fsync(file)
        os.close(file)


def saved(rank: Rank, times: dict[str, list[float]]) -> None:
    folder, pieces = rank.emptied("ours"), rank.pieces(rank.tensors)
    with rank.timed(times, "save"):
        rank.comm.perform(save(folder, 1, pieces, {}, rank.group, rank.rank))


def dcp_saved(rank: Rank, times: dict[str, list[float]]) -> None:
    folder = rank.emptied("dcp")
    with rank.timed(times, "DCP save"):
        dcp.save(rank.named(rank.tensors), checkpoint_id=folder)


def copied(rank: Rank, times: dict[str, list[float]]) -> None:
    with rank.timed(times, "copy"):
        for copy, tensor in zip(rank.copies, rank.tensors, strict=True):
            copy.copy_(tensor)


def staged(rank: Rank, times: dict[str, list[float]]) -> None:
    folder, pieces = rank.emptied("staged"), rank.pieces(rank.tensors)
    rank.step += 1
    with rank.timed(times, "stage"):
        rank.comm.perform(rank.saver.stage(folder, rank.step, pieces, {}, 2))
    rank.comm.perform(rank.saver.settle())
    if rank.saver.told:
        raise RuntimeError(rank.saver.told[0])


def dcp_staged(rank: Rank, times: dict[str, list[float]]) -> None:
    folder = rank.emptied("dcp staged")
    with rank.timed(times, "DCP stage"):
        future = dcp.async_save(rank.named(rank.tensors), checkpoint_id=folder)
    future.result()


def read(rank: Rank, times: dict[str, list[float]]) -> None:
    with rank.timed(times, "read"):
        file = os.open(rank.folder / "raw" / str(rank.rank), os.O_RDONLY)
        at = 0
        for copy in rank.copies:
            data = copy.view(-1).view(torch.uint8).numpy().data
            while data:
                count = os.preadv(file, [data], at)
                data, at = data[count:], at + count
        os.close(file)


def loaded(rank: Rank, times: dict[str, list[float]]) -> None:
    pieces = rank.pieces(rank.copies)
    with (
        rank.timed(times, "load"),
        open_checkpoint(rank.folder / "ours" / "step-00000001") as checkpoint,
    ):
        for piece in pieces:
            checkpoint.read_into(piece.tensor, piece.name, piece.start)
    _require_equal(rank)


def dcp_loaded(rank: Rank, times: dict[str, list[float]]) -> None:
    with rank.timed(times, "DCP load"):
        dcp.load(rank.named(rank.copies), checkpoint_id=rank.folder / "dcp")
    _require_equal(rank)


def _require_equal(rank: Rank) -> None:
    for copy, tensor in zip(rank.copies, rank.tensors, strict=True):
        if not torch.equal(copy, tensor):
            raise RuntimeError("what was loaded is not what was saved")
        copy.zero_()


STEPS = (raw, saved, dcp_saved, copied, staged, dcp_staged, read, loaded, dcp_loaded)


def work(rank: int, at: tuple[int, int], size: int, rounds: int, folder: Path, told: Path) -> None:
    """A rank's rounds; the first one is not counted, for memory is touched first in it."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    world = World(rank, RANKS, rank, RANKS)
    meeting = Meeting.open(world, Rendezvous("127.0.0.1", at[0]), Deadline(300.0, 300.0))
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{at[1]}", rank=rank, world_size=RANKS)
    comm = Shared.over(meeting)
    mine = Rank(comm, folder, size)
    for number in range(rounds + 1):
        times: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
        for group in (STEPS[:3], STEPS[3:6], STEPS[6:]):  # loads read what this round has saved
            for step in (*group[number % 3 :], *group[: number % 3]):
                step(mine, times)
        if rank == 0 and number:
            with told.open("a") as out:
                out.write(json.dumps({name: found[0] for name, found in times.items()}) + "\n")
    comm.close()
    dist.destroy_process_group()


def seconds(
    size: int, rounds: int, say: Callable[[str], None], parent: Path | None = None
) -> dict[str, list[float]]:
    """Seconds by contestant, a value a round.

    Args:
        size: bytes of the state, of both ranks.
        rounds: counted ones.
        say: told of each contestant's median.
        parent: a folder on the disk that is meant.
    """
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="mw-checkpoint-", dir=parent) as name:
        folder, at = Path(name), ports()
        told = folder / "seconds.jsonl"
        started = [
            spawn.Process(target=work, args=(rank, at, size, rounds, folder, told))
            for rank in range(RANKS)
        ]
        for process in started:
            process.start()
        try:
            for process in started:
                process.join(60.0 + 60.0 * (rounds + 1))
            if any(process.exitcode != 0 for process in started):
                raise RuntimeError(f"ranks ended {[process.exitcode for process in started]}")
        finally:
            for process in started:
                process.kill()
        lines = [json.loads(line) for line in told.read_text().splitlines()]
    found = {name: [line[name] for line in lines] for name in CONTESTANTS}
    for name, values in found.items():
        middle = statistics.median(values)
        say(f"{name}: {middle:.3f} s, {size / middle / 1e9:.2f} GB/s")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", type=int, default=1 << 30)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    seconds(asked.bytes, asked.rounds, print, asked.folder)


if __name__ == "__main__":
    main()
