"""Saving while training goes on: the steps wait for a copy in memory, threads write it.

    step 20   stage     every rank copies what it writes, and a thread of its own begins to
                        write, digest and sync it
    step 23   advance   no rank writes any more: the first rank's thread commits, or cleans up
                        where one failed
    step 24   advance   it has: the checkpoint of step 20 is there, or all learn why it is not

That no rank is busy travels with the steps' totals, so nobody waits for it. All ranks call the same
methods at the same steps; docs/decisions/0021-asynchronous-saves.md says what was weighed.
"""

from __future__ import annotations

import json
import logging
import secrets
import shutil
import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, final

from torch import Tensor

from meshwright.comm.base import Group, gather_json
from meshwright.errors import StorageError
from meshwright.run.checkpoint.durable import read_small, sync_folder, write_file
from meshwright.run.checkpoint.manifest import MANIFEST_BYTES
from meshwright.run.checkpoint.meta import check_meta
from meshwright.run.checkpoint.publishing import aside_name, clean, commit, make_aside, retire
from meshwright.run.checkpoint.save import Piece, merge, write_pieces
from meshwright.run.checkpoint.staging import Buffers, bytes_needed, copied
from meshwright.run.checkpoint.task import Task
from meshwright.run.together import failure, together, try_together

__all__ = ["BUSY", "Patience", "Saver"]

BUSY = "writing"
"""The flag of a step's totals that a rank raises while its thread works."""

_MOST = 2  # saves in flight, each with a copy of the state
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds: until a slow save is told, that a further save waits for room, that an end waits.

    `leaving` is how long a process that ends by an error waits for what it had begun to save.
    """

    alarm: float = 600.0
    room: float = 60.0
    end: float = 600.0
    leaving: float = 10.0


@dataclass(frozen=True, slots=True)
class _Order:
    """What is saved where."""

    root: Path
    step: int
    name: str
    meta: Mapping[str, Any]
    keep: int

    @property
    def aside(self) -> Path:
        """The folder it is written to."""
        return self.root / self.name

    @property
    def label(self) -> str:
        """For errors."""
        return f"saving the checkpoint of step {self.step}"


@dataclass(slots=True)
class _Save:
    """A save in flight: first every rank writes, then the first one finishes."""

    order: _Order
    buffer: Tensor | None
    task: Task[None] | None
    since: float
    failed: str = ""
    late: bool = False

    @property
    def writing(self) -> bool:
        """Whether ranks may still read the copy."""
        return self.buffer is not None

    @property
    def busy(self) -> bool:
        """Whether this rank's thread works for it."""
        return self.task is not None and not self.task.done

    def ended(self, seconds: float) -> None:
        """Wait for this rank's thread.

        Raises:
            StorageError: it has not ended by then.
        """
        if self.task is None:
            return
        if not self.task.wait(seconds):
            raise StorageError(f"the disk has not taken it in {seconds:g} s")
        self.task.result()


@final
class Saver:
    """One rank's saves.

    Attributes:
        saved: the step of the newest checkpoint that is in.
        prepared: whether memory for a copy was asked for.
        trusted: names of checkpoints known to be whole (see `retire`).
        told: what the user should know.
    """

    def __init__(self, group: Group, rank: int, patience: Patience | None = None) -> None:
        """Of `rank` among `group`, which are all ranks."""
        self.saved = -1
        self.prepared = False
        self.trusted: set[str] = set()
        self.told: list[str] = []
        self._group, self._rank = group, rank
        self._patience = patience or Patience()
        self._pending: deque[_Save] = deque()
        self._buffers = Buffers(_MOST)
        self._slow = False
        self._names: set[str] = set()  # of folders that are this process's own

    @property
    def pending(self) -> tuple[int, ...]:
        """The steps whose checkpoints are on their way."""
        return tuple(save.order.step for save in self._pending)

    @property
    def busy(self) -> bool:
        """Whether this rank's thread works for the oldest save; tells if that takes very long."""
        if not self._pending:
            return False
        head = self._pending[0]
        if not head.late and time.monotonic() - head.since > self._patience.alarm:
            head.late = True
            self.told.append(
                f"the checkpoint of step {head.order.step} is still being written after "
                f"{self._patience.alarm:g} s; training goes on, older ones are as they were"
            )
        return head.busy

    @property
    def copies(self) -> int:
        """Bytes of the copies that saves made of this rank's state, at most."""
        return self._buffers.bytes

    @property
    def _first(self) -> bool:
        return self._rank == self._group.ranks[0]

    def prepare(self, pieces: Sequence[Piece]) -> None:
        """A save of these will come: have memory made for it on a thread; of this rank alone."""
        self.prepared = True
        self._buffers.prepare(bytes_needed(pieces))

    def stage(
        self, root: Path, step: int, pieces: Sequence[Piece], meta: Mapping[str, Any], keep: int
    ) -> Generator[Any, Any, str]:
        """Copy what this rank writes and begin to write it; an exchange.

        Args:
            root: of all checkpoints.
            step: how many are done.
            pieces: of this rank.
            meta: the first rank's is kept.
            keep: how many checkpoints stay.

        Returns:
            Why it was not begun; empty where it was. `memory` asks for a save that needs no copy.

        Raises:
            StorageError: on every rank alike, if any cannot copy its part.
        """
        self.prepared = True
        room = yield from self._make_room()
        if not room:
            return "disk"
        held: list[Tensor] = []
        mine: list[Piece] = []

        def copy() -> str | None:
            check_meta(meta)
            buffer = self._buffers.take(bytes_needed(pieces))
            if buffer is None:
                return None
            held.append(buffer)
            mine.extend(copied(pieces, buffer))
            return secrets.token_hex(8)

        try:
            nonces = yield from together(copy, self._group, f"copying the state of step {step}")
        except StorageError:
            self._give(held)
            raise
        if None in nonces:
            self._give(held)
            return "memory"
        order = _Order(root, step, aside_name(step, nonces[0]), dict(meta), keep)
        self._names.add(order.name)
        task = Task(lambda: _write(order, self._rank, mine), f"save-{step}")
        self._pending.append(_Save(order, held[0], task, time.monotonic()))
        return ""

    def advance(self, *, seconds: float | None = None) -> Generator[Any, Any, None]:
        """Take the oldest save on; an exchange, for when no rank is busy with it.

        Where one is, it is given `seconds` to end.
        """
        head = self._pending[0]
        limit = self._patience.end if seconds is None else seconds
        _, errors = yield from try_together(
            lambda: head.ended(limit), self._group, head.order.label
        )
        problem = failure(head.order.label, errors) if errors else ""
        if head.writing:
            self._written(head, problem)
        else:
            self._finished(head, head.failed or problem)

    def settle(self, most: int = 0) -> Generator[Any, Any, None]:
        """Wait until at most `most` saves are in flight; an exchange."""
        while len(self._pending) > most:
            yield from self.advance()

    def leave(self) -> None:
        """This process ends by an error: finish what can be without asking other ranks.

        They may be gone. Each wrote an account beside its shard, so the first rank sees in the
        folder whether all parts are there.
        """
        deadline = time.monotonic() + self._patience.leaving
        while self._pending:
            save = self._pending.popleft()
            try:
                save.ended(max(0.0, deadline - time.monotonic()))
                if save.writing and self._first:
                    _await_accounts(save.order, self._group, deadline)
                    self._finish(save.order)
            except (StorageError, OSError) as error:
                _log.warning("%s: %s", save.order.label, error)

    def _make_room(self) -> Generator[Any, Any, bool]:
        """Wait for the oldest save where there are two; whether there is room for another.

        A disk that did not get ready once is not waited for again until it has.
        """
        while len(self._pending) == _MOST:
            task = self._pending[0].task
            patience = 0.0 if self._slow else self._patience.room
            done = task is None or task.wait(patience)
            everyone = yield from gather_json(done, self._group, "saves in flight")
            self._slow = not all(everyone)
            if self._slow:
                return False
            yield from self.advance()
        return True

    def _written(self, head: _Save, problem: str) -> None:
        """All ranks have written their parts, or one could not."""
        head.failed = problem
        if head.busy:
            self._buffers.drop()
        elif head.buffer is not None:
            self._buffers.give(head.buffer)
        head.buffer = head.task = None
        if self._first:
            order = head.order
            act = (lambda: _discard(order)) if problem else (lambda: self._finish(order))
            head.task = Task(act, f"commit-{order.step}")

    def _finished(self, head: _Save, problem: str) -> None:
        self._pending.popleft()
        if problem:
            step = head.order.step
            self.told.append(
                f"checkpoint of step {step} was not saved, training goes on: {problem}"
            )
        else:
            self.saved = max(self.saved, head.order.step)

    def _finish(self, order: _Order) -> None:
        """Commit what all ranks have written, then remove what is superfluous."""
        aside = order.aside
        try:
            accounts = [_account(order, rank) for rank in self._group.ranks]
            for rank in self._group.ranks:
                (aside / _account_name(rank)).unlink()
            commit(aside, order.root, merge(order.step, order.meta, accounts))
        except (StorageError, OSError):
            _discard(order)
            raise
        try:
            retire(order.root, order.step, order.keep, self.trusted)
            clean(order.root, self._names)
        except OSError as error:
            # The checkpoint is in; what stays beside it is no reason to stop a run.
            _log.warning("after %s: %s", order.label, error)

    def _give(self, held: Sequence[Tensor]) -> None:
        for buffer in held:
            self._buffers.give(buffer)


def _write(order: _Order, rank: int, pieces: Sequence[Piece]) -> None:
    """Write a rank's shard and, once it is on the disk, the account of it."""
    aside = make_aside(order.root, order.name)
    account = write_pieces(aside / f"rank{rank}.safetensors", pieces)
    begun, name = aside / f".{_account_name(rank)}", _account_name(rank)
    write_file(begun, [json.dumps(account).encode()])
    begun.rename(aside / name)  # whoever sees the name sees all of it
    sync_folder(aside)


def _account_name(rank: int) -> str:
    return f"rank{rank}.json"


def _account(order: _Order, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        read_small(order.aside, _account_name(rank), MANIFEST_BYTES).decode()
    )
    return found


def _await_accounts(order: _Order, group: Group, deadline: float) -> None:
    """Look into the folder until all ranks' accounts are there.

    Raises:
        StorageError: some are not, by the deadline.
    """
    never = Event()
    while missing := [r for r in group.ranks if not (order.aside / _account_name(r)).exists()]:
        if time.monotonic() > deadline:
            raise StorageError(f"rank {missing[0]} has not written its part")
        never.wait(0.02)


def _discard(order: _Order) -> None:
    """Nothing is left of a save that failed."""
    shutil.rmtree(order.aside, ignore_errors=True)
