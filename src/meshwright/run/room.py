"""Whether there is room for what ranks are about to need, and what is said where there is none."""

from __future__ import annotations

import platform
import resource
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from meshwright.comm.base import gather_json
from meshwright.errors import OutOfMemory
from meshwright.job import Job
from meshwright.plan.size import bytes_text
from meshwright.run.account import away_of, state_of
from meshwright.run.build import Build
from meshwright.run.fitting import out_of_memory
from meshwright.run.observe.resident import fields, resident
from meshwright.run.session import Session

__all__ = ["Short", "machine_free", "process_free", "require_room", "short"]

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)
_LIMITS = (
    ("RLIMIT_AS", resource.RLIMIT_AS, "VmSize"),
    ("RLIMIT_DATA", resource.RLIMIT_DATA, "VmData"),
)

_PAD = 64 << 20
"""Bytes by which malloc asks for more than it needs (launch/heap.py)."""


@dataclass(frozen=True, slots=True)
class Short:
    """A rank for which there is no room, the bytes that it may have, and what limits them."""

    rank: int
    room: int
    why: str


def process_free() -> tuple[int, str] | None:
    """Bytes that this process may still take by its own limits, and the limit; None: any."""
    used = fields()
    found = [
        (limit - used[name] - _PAD, word)
        for word, number, name in _LIMITS
        if (limit := resource.getrlimit(number)[0]) != resource.RLIM_INFINITY and name in used
    ]
    return min(found, default=None)


def machine_free() -> tuple[int, str]:
    """Bytes that are free on this machine, or in this control group, and in which."""
    found = [(psutil.virtual_memory().available, "on this machine")]
    for most, now in _CGROUPS:
        with suppress(OSError, ValueError):
            free = int(Path(most).read_text()) - int(Path(now).read_text())
            found.append((free, "in this control group"))
    return min(found)


def short(needs: Sequence[Mapping[str, Any]]) -> Short | None:
    """The rank that lacks most, if any does.

    Args:
        needs: of each rank `host`; in bytes `held` now, `still` to come and what of that is `sure`;
            and what is free to it: `own` and by which limit of its process or None, `free` and
            where on its host.
    """
    found: list[tuple[int, Short]] = []
    hosts: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for rank, need in enumerate(needs):
        hosts.setdefault(need["host"], []).append((rank, need))
        # Past a limit of its own an allocation fails, and that is explained; a host kills.
        if need["own"] is not None and need["sure"] > need["own"][0]:
            room, limit = need["own"]
            found.append((need["sure"] - room, Short(rank, need["held"] + room, f"by {limit}")))
    for ranks in hosts.values():
        still = sum(need["still"] for _, need in ranks)
        room, why = min(tuple(need["free"]) for _, need in ranks)
        if still > room:
            rank, need = max(ranks, key=lambda found: found[1]["still"])
            share = room * need["still"] // still
            several = f" for its {len(ranks)} ranks" if len(ranks) > 1 else ""
            found.append((still - room, Short(rank, need["held"] + share, why + several)))
    return max(found, key=lambda found: found[0])[1] if found else None


def _largest(build: Build, room: int) -> str:
    """The op that makes the largest value, where that alone takes a good part of the room."""
    made = [
        (unit.program.values[value].bytes, op.base.removeprefix("aten."), op.source)
        for unit in build.units.values()
        for op in unit.program.ops
        for value in op.results
    ]
    size, name, source = max(made, default=(0, "", ""))
    if 4 * size < room:
        return ""
    return f"; the largest value, {bytes_text(size)} in all, is made by {name} in {source}"


def _sure(bill: Mapping[str, Any], need: Mapping[str, Any], private: int) -> int:
    """Bytes to come that count against a limit of the process's own: no estimate.

    `RLIMIT_DATA` does not count what is shared: the host tier, buffers of collectives.
    """
    slack: int = bill["beside"]["slack"]
    still: int = need["still"]
    if need["own"] is not None and need["own"][1] == "RLIMIT_DATA":
        shared = bill.get("away", {}).get("host", 0) + bill["beside"]["communication buffers"]
        still = bill["peak"] - shared - private
    return max(0, still - slack)


def require_room(
    session: Session, job: Job, memory: Sequence[Mapping[str, Any]]
) -> Generator[Any, Any, None]:
    """Return if every rank has room for its bill; an exchange.

    Args:
        session: of this rank, which holds its state and has run nothing.
        job: that is trained.
        memory: the bills, by rank.

    Raises:
        OutOfMemory: one has not; on every rank, with the parts and what would fit.
    """
    worker, everyone = session.worker, session.everyone
    now = resident()
    held = sum(state_of(worker).values()) + away_of(worker).get("host", 0)
    held += 0 if now is None else max(0, now.shared - away_of(worker).get("host", 0))
    still = max(0, memory[worker.rank]["peak"] - held)
    mine = {"host": platform.node(), "held": held, "still": still}
    mine |= {"own": process_free(), "free": machine_free()}
    mine["sure"] = _sure(memory[worker.rank], mine, sum(state_of(worker).values()))
    needs = yield from gather_json(mine, everyone, "room")
    lacking = short(needs)
    if lacking is None:
        return
    text = ""
    if worker.rank == 0:
        text = out_of_memory(
            job, session.build.plan, memory[lacking.rank], lacking.room, lacking.why
        )
        text += _largest(session.build, lacking.room)
    told = yield from gather_json(text, everyone, "room")
    raise OutOfMemory(told[0])
