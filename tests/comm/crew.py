"""A few worker processes, started once, that are the ranks of one world after the other."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from meshwright.comm.base import Group, Wait, World, all_reduce, barrier
from meshwright.comm.local import collective
from meshwright.comm.meeting import Deadline, Meeting
from meshwright.comm.shared import Shared
from meshwright.comm.store import Rendezvous
from meshwright.comm.torchdist import TorchDist
from meshwright.errors import MeshwrightError
from meshwright.launch.connect import connect
from meshwright.launch.contract import Contract
from tests.comm import mailing
from tests.comm.conftest import free_port
from tests.comm.traffic import BUCKETED, bucket, many_buckets, same, starts

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.comm.crew"])


def join(
    rank: int,
    n: int,
    port: int,
    seconds: float = 20.0,
    refusal: str | None = None,
    tokens: tuple[str, ...] = (),
    gloo: bool = False,
) -> Shared | TorchDist:
    """This process as a rank of a world of `n`."""
    token = tokens[rank] if tokens else "secret"
    where = Rendezvous("127.0.0.1", port, token, seconds=seconds)
    meeting = Meeting.open(World(rank, n, rank, n), where, Deadline(seconds, seconds))
    return TorchDist.over(meeting) if gloo else Shared.over(meeting, refusal)


def pause(dice: random.Random) -> None:
    """Come late now and then: this is what is tested, not how ranks wait for each other."""
    if dice.random() < 0.2:
        time.sleep(dice.random() * 0.003)


def one(request):
    """Start and wait."""
    handle = yield request
    return (yield Wait(handle))


def back_to_back(comm: Shared, seed: int, calls: int, late: bool) -> None:
    """Many collectives, one after the other."""
    me, group = comm.world.rank, Group.world(comm.world.size)
    dice = random.Random(seed * 1000 + me)
    for k in range(calls):
        table = starts(group, seed * 100_003 + k)
        if late:
            pause(dice)
        got = comm.perform(one(table[me]))
        assert same(got, collective(table)[me]), (k, table[me].op, table[me].tensors)


def buckets(comm: Shared) -> None:
    """Several tensors at a time."""
    me = comm.world.rank
    for k, table in enumerate(many_buckets(comm.world.size)):
        want, start = collective(table)[me], table[me]
        assert same(comm.perform(one(start)), want), (k, start.op, len(start.tensors))
        given = tuple(tensor.clone() for tensor in start.tensors)
        got = comm.perform(one(replace(start, tensors=given, donate=True)))
        assert same(got, want), (k, start.op, len(given), "donated")
        large = start.op == "all_reduce" and sum(tensor.nbytes for tensor in given) > 1 << 18
        assert large <= (got[0].data_ptr() == given[0].data_ptr()), "in the donated memory"


def in_flight(comm: Shared, seed: int, calls: int, groups: list[tuple[int, ...]]) -> None:
    """Several collectives under way over several groups, waited for in an order of one's own."""
    me, common = comm.world.rank, random.Random(seed)
    mine = random.Random(seed * 1000 + me)

    def exchange():
        flying = []
        for k in range(calls):
            ranks = common.choice(groups)
            keep = common.randrange(5)
            if me in ranks:
                group = Group("axis" + "-".join(map(str, ranks)), ranks)
                table = starts(group, seed * 100_003 + k)
                index = ranks.index(me)
                pause(mine)
                flying.append(((yield table[index]), table, index))
            while len(flying) > keep:
                handle, table, index = flying.pop(mine.randrange(len(flying)))
                got = yield Wait(handle)
                assert same(got, collective(table)[index]), (k, table[index].op)
        for handle, table, index in flying:
            got = yield Wait(handle)
            assert same(got, collective(table)[index]), table[index].op

    comm.perform(exchange())


def until_broken(comm: Shared, size: int, seed: int) -> tuple[float, str, str]:
    """Collectives without end; when one fails: the time, and what it said."""
    group, dice = Group.world(comm.world.size), random.Random(seed + comm.world.rank)
    tensor = torch.ones(size)
    try:
        while True:
            comm.perform(all_reduce(tensor, group, label="w"))
            pause(dice)
    except Exception as error:  # noqa: BLE001  the test looks at it
        return time.time(), type(error).__name__, str(error)


def any_until_broken(comm: Shared, seed: int) -> tuple[float, float, str, str]:
    """As `until_broken`, over all kinds and sizes; also when the one that failed began."""
    me, group, dice = comm.world.rank, Group.world(comm.world.size), random.Random(seed)
    calls = [starts(group, seed * 100_003 + k)[me] for k in range(16)]
    calls += [bucket(group, seed, op, [3, 40_000, 0, 500_001])[me] for op in BUCKETED]
    mine, began = random.Random(seed + me), 0.0
    try:
        while True:
            if mine.random() < 0.1:
                pause(mine)
            began = time.time()
            comm.perform(one(dice.choice(calls)))
    except Exception as error:  # noqa: BLE001  the test looks at it
        return began, time.time(), type(error).__name__, str(error)


def mapped(comm: Shared) -> tuple[int, int]:
    """How many segments this process maps, and has open, besides those of its own world."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text().splitlines()
    links = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert not any("/dev/shm/" in line for line in maps), "no file that could be left"
    kept = sum("memfd:meshwright" in line for line in maps)
    comm.perform(barrier(Group.world(comm.world.size)))
    return kept, sum("memfd:meshwright" in link for link in links)


def report(comm: Shared, body: Callable[[], Any]) -> tuple[str, str]:
    """What a collective answers, or how it fails."""
    try:
        return "answer", str(body())
    except Exception as error:  # noqa: BLE001  the test looks at it
        return type(error).__name__, str(error)


def meaning(comm: Shared, shape: tuple[int, ...], label: str) -> tuple[str, str]:
    return report(
        comm,
        lambda: comm.perform(
            all_reduce(torch.ones(shape), Group.world(comm.world.size), label=label)
        ),
    )


def abandoned(comm: Shared, who: int) -> tuple[str, str]:
    """All wait for `who`, which gives up, and goes."""
    group = Group.world(comm.world.size)
    comm.perform(barrier(group))
    if comm.world.rank == who:
        comm.abandon("ValueError: bad label 12")
        os._exit(71)
    return report(comm, lambda: comm.perform(all_reduce(torch.ones(2), group, label="w")))


def late(comm: Shared, who: int) -> tuple[str, str]:
    """All wait for `who`, which never comes."""
    group = Group.world(comm.world.size)
    comm.perform(barrier(group, "w"))
    if comm.world.rank == who:
        return "stayed", "away"
    return report(comm, lambda: comm.perform(barrier(group, "w")))


def leaves_early(comm: Shared) -> None:
    """The last to wait finds all others gone, who had brought what they owed."""
    me, group = comm.world.rank, Group.world(comm.world.size)
    if me:
        for _ in range(3):
            comm.perform(barrier(group, "w"))
        os._exit(0)
    comm.perform(barrier(group, "w"))
    comm.perform(barrier(group, "w"))
    time.sleep(0.3)  # they have gone by now, or else the test is easier than meant
    comm.perform(barrier(group, "w"))


def warm(comm: Shared, size: int, calls: int) -> tuple[int, int, int]:
    """Bytes that are kept for results after some calls, and after many, and the pages faulted."""
    group, tensor = Group.world(comm.world.size), torch.ones(size)
    for _ in range(3):
        comm.perform(all_reduce(tensor, group))
    before, faults = comm._pool.idle, resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        comm.perform(all_reduce(tensor, group))
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    return before, comm._pool.idle, faults


def connected(rank: int, n: int, port: int, limit: int, **contract: Any) -> tuple[str, Any, Any]:
    """Which driver `connect` takes, its notes, and a sum; with a limit on the size of files."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    world = World(rank, n, rank, n)
    try:
        comm = connect(Contract(world, "torchrun", "127.0.0.1", port, timeout=20.0, **contract))
    except MeshwrightError as error:
        return type(error).__name__, str(error), None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    total = comm.perform(all_reduce(torch.tensor([rank + 1]), Group.world(n)))
    comm.close()
    return type(comm).__name__, comm.notes, total.item()


BODIES = {
    body.__name__: body
    for body in (
        back_to_back,
        buckets,
        in_flight,
        until_broken,
        any_until_broken,
        mapped,
        meaning,
        abandoned,
        late,
        leaves_early,
        warm,
    )
} | mailing.BODIES


def _serve(pipe) -> None:
    """A worker: joins a world, runs a body, leaves; again and again."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            name, rank, n, port, how, given = pipe.recv()
        except EOFError:
            return
        try:
            if name == "connected":
                answer = connected(rank, n, port, **given)
            else:
                comm = join(rank, n, port, **how)
                pipe.send((None, "joined"))
                answer = BODIES[name](comm, **given)
                comm.close()
                comm = None  # and with it the memory
            pipe.send((True, answer))
        except BaseException as error:  # noqa: BLE001  handed to the test
            pipe.send((False, f"{type(error).__name__}: {error}"))


class Crew:
    """Workers that are ranks 0, 1, ... of the worlds that tests ask for; the dead are replaced."""

    def __init__(self) -> None:
        self.workers: list[tuple[Any, Any]] = []

    def start(
        self,
        n: int,
        name: str,
        *,
        how: dict | None = None,
        each: Sequence[dict] | None = None,
        **given: Any,
    ) -> None:
        """Let `n` workers join a world and run the body of that name, given the same or `each`."""
        port = free_port()
        self.workers = [w for w in self.workers if w[0].is_alive()]
        while len(self.workers) < n:
            ours, theirs = FORKS.Pipe()
            process = FORKS.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.workers.append((process, ours))
        for rank in range(n):
            mine = each[rank] if each else given
            self.workers[rank][1].send((name, rank, n, port, how or {}, mine))

    def joined(self, ranks: range) -> None:
        """Wait until these ranks have joined the world."""
        for rank in ranks:
            fine, said = self.workers[rank][1].recv()
            assert fine is None, f"rank {rank}: {said}"

    def answers(self, ranks: range | list[int]) -> list[Any]:
        """What the bodies returned."""
        found = []
        for rank in ranks:
            fine, answer = self._heard(rank)
            assert fine, f"rank {rank}: {answer}"
            found.append(answer)
        return found

    def failures(self, ranks: range) -> list[str]:
        """How the bodies failed."""
        found = []
        for rank in ranks:
            fine, error = self._heard(rank)
            assert not fine, error
            found.append(error)
        return found

    def _heard(self, rank: int) -> tuple[bool, Any]:
        fine, said = self.workers[rank][1].recv()
        return (fine, said) if fine is not None else self._heard(rank)

    def kill(self, rank: int) -> int:
        """SIGKILL; its pid."""
        process = self.workers[rank][0]
        pid = process.pid
        process.kill()
        process.join()
        return pid

    def gone(self, ranks: Sequence[int]) -> None:
        """Wait until workers that end themselves have: the next world must not count on them."""
        for rank in ranks:
            self.workers[rank][0].join(20)
            assert not self.workers[rank][0].is_alive(), f"rank {rank} is still there"

    def close(self) -> None:
        for process, pipe in self.workers:
            pipe.close()
            process.join(5)
            if process.is_alive():
                process.kill()
