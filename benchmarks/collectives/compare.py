"""Collectives over shared memory, over gloo, and the copy that bounds them, side by side.

    python benchmarks/collectives/compare.py --ranks 2 4 --ops all_reduce all_gather reduce_scatter

Every round times each contestant once, in an order that rotates from round to round, after a
warm-up of its own; ratios are taken within a round. A line shows medians of times, and medians of
ratios with the 95 % interval of that median. `copy` is all ranks at once copying as many bytes from
one private tensor to another: what is left to a collective is less than that only in cache. An
all-reduce is timed into fresh tensors, and into its own where the caller gives them up (`donated`).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from meshwright.comm.base import Group, Start, Wait, World, all_reduce, barrier
from meshwright.comm.meeting import Deadline, Meeting
from meshwright.comm.shared import Shared
from meshwright.comm.store import Rendezvous
from meshwright.comm.torchdist import TorchDist

SIZES = [4 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20, 256 << 20]
ROUND_BYTES, ROUND_CALLS = 256 << 20, 200


def request(op: str, size: int, group: Group) -> Start:
    """A collective whose whole tensor has `size` bytes of float32."""
    n = len(group.ranks)
    part = torch.ones(size // 4 // n)
    if op == "all_gather":
        return Start(op, group, (part,))
    if op == "reduce_scatter":
        return Start(op, group, (part,) * n)
    return Start("all_reduce", group, (torch.ones(size // 4),))


def one(start: Start) -> Iterator:
    handle = yield start
    return (yield Wait(handle))


def seconds(comm: Shared, body: Callable[[], object], calls: int) -> float:
    """Time per call on the slowest rank."""
    group = Group.world(comm.world.size)
    body()
    comm.perform(barrier(group))
    began = time.perf_counter()
    for _ in range(calls):
        body()
    mine = torch.tensor([(time.perf_counter() - began) / calls], dtype=torch.float64)
    return comm.perform(all_reduce(mine, group, "max")).item()


def middle(values: list[float]) -> tuple[float, float, float]:
    """The median and its 95 % interval, by order statistics."""
    values, n = sorted(values), len(values)
    off = 0.98 * n**0.5
    low, high = max(0, int(n / 2 - off)), min(n - 1, int(n / 2 + off))
    return values[n // 2], values[low], values[high]


def ratio(a: list[float], b: list[float]) -> str:
    found = middle([x / y for x, y in zip(a, b, strict=True)])
    return "{:6.2f} [{:.2f}, {:.2f}]".format(*found)


def work(
    rank: int,
    n: int,
    ports: tuple[int, int],
    ops: list[str],
    sizes: list[int],
    rounds: int,
    file: Path | None,
) -> None:
    torch.set_num_threads(1)
    world, deadline = World(rank, n, rank, n), Deadline(120.0, 120.0)
    meetings = [Meeting.open(world, Rendezvous("127.0.0.1", p), deadline) for p in ports]
    ours, gloo = Shared.over(meetings[0]), TorchDist.over(meetings[1])
    group = Group.world(n)
    for op in ops:
        for size in sizes:
            start = request(op, size, group)
            source, target = torch.ones(size // 4), torch.ones(size // 4)
            bodies = {
                "ours": lambda start=start: ours.perform(one(start)),
                "gloo": lambda start=start: gloo.perform(one(start)),
                "copy": lambda a=target, b=source: a.copy_(b),
            }
            if op == "all_reduce":
                given = replace(start, donate=True)
                bodies["donated"] = lambda start=given: ours.perform(one(start))
            calls = max(1, min(ROUND_CALLS, ROUND_BYTES // size))
            times = {name: [] for name in bodies}
            names = list(bodies)
            for turn in range(rounds):
                for name in _turned(names, turn):
                    share = max(1, calls // 8) if name == "gloo" else calls
                    times[name].append(seconds(ours, bodies[name], share))
            if rank == 0:
                spent = "  ".join(f"{middle(times[name])[0] * 1e6:11.1f}" for name in names[:3])
                line = f"{n} {op:14} {size >> 10:7} KB  {spent}"
                line += f"  {ratio(times['ours'], times['copy'])}"
                line += f"  {ratio(times['gloo'], times['ours'])}"
                if "donated" in times:
                    line += f"  donated/copy {ratio(times['donated'], times['copy'])}"
                print(line, flush=True)
                if file:
                    cell = {"ranks": n, "op": op, "bytes": size, "seconds": times}
                    with file.open("a") as out:
                        out.write(json.dumps(cell) + "\n")
    gloo.close()
    ours.close()


def _turned(names: list[str], turn: int) -> list[str]:
    first = turn % len(names)
    return names[first:] + names[:first]


def ports() -> tuple[int, int]:
    with socket.create_server(("127.0.0.1", 0)) as a, socket.create_server(("127.0.0.1", 0)) as b:
        return a.getsockname()[1], b.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--ops", nargs="+", default=["all_reduce", "all_gather", "reduce_scatter"])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="bytes")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, metavar="FILE", help="times of every round, by line")
    asked = parser.parse_args()
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    print(f"{cores} cores, load {load:.1f}; microseconds a call")
    print(f"ranks, op, size {'ours':>20} {'gloo':>12} {'copy':>12}   ours/copy   gloo/ours")
    for n in asked.ranks:
        given = (n, ports(), asked.ops, asked.sizes, asked.rounds, asked.json)
        crew = [
            multiprocessing.get_context("spawn").Process(target=work, args=(rank, *given))
            for rank in range(n)
        ]
        for process in crew:
            process.start()
        for process in crew:
            process.join()


if __name__ == "__main__":
    main()
