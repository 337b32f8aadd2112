"""A run: a job on this process's world.

with mw.Run(job, plan="zero3") as run:
    for step in run.steps(until=1000):
        metrics = run.step()
    run.evaluate()
    run.export("out/")
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from torch import nn

from meshwright.api.plans import agreed_plan
from meshwright.comm.base import Comm, gather_json
from meshwright.compile.outcome import RESERVED
from meshwright.errors import StorageError, UsageError
from meshwright.job import Job
from meshwright.launch.connect import connect
from meshwright.launch.contract import Contract, here
from meshwright.launch.heap import keep_freed_memory
from meshwright.launch.signals import Stop, listen
from meshwright.launch.worker import ending, guard
from meshwright.plan.plan import Plan
from meshwright.run.account import Account
from meshwright.run.describe import describe_run, facts_of
from meshwright.run.folder import OFFLOAD, choose
from meshwright.run.observe.profiler import Profiler
from meshwright.run.observe.window import parse_steps, within
from meshwright.run.room import require_room
from meshwright.run.session import Record, Session, open_session, steps_to_run
from meshwright.run.shortage import explained, forget, ran_out
from meshwright.run.step import Metrics
from meshwright.run.worker import Fetched
from meshwright.view.journal import Journal, Logger, open_journal
from meshwright.view.trace import write_trace

__all__ = ["Run"]

CHECKPOINT_SECONDS = 600.0
Weights = Literal["current", "ema"]


class Run:
    """A job on this process's world; a context manager. Every rank makes one and calls it alike."""

    def __init__(
        self,
        job: Job,
        plan: str | Plan = "auto",
        *,
        run_dir: str | Path | None = None,
        resume: bool | None = None,
        fresh: bool = False,
        overwrite: bool = False,
        loggers: Sequence[Logger] = (),
        nonfinite: Literal["raise", "skip", "ignore"] = "raise",
        eager: bool = False,
        keep: int = 3,
        wait_for_saves: bool = False,
        quiet: bool = False,
        compile: bool = False,  # noqa: A002  the command's word
        trace: bool | str = False,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        """Nothing happens before `with`.

        Args:
            job: what to train.
            plan: a Plan, its text, a TOML file or `auto`; MESHWRIGHT_PLAN overrides it.
            run_dir: where logs and checkpoints go; by default `runs/<file>-<NNN>`.
            resume: go on from the newest checkpoint; the default where `run_dir` has one.
            fresh: start anew, and refuse a `run_dir` that is not empty.
            overwrite: with `fresh`, start anew all the same.
            loggers: called on rank 0 with every record, beside metrics.jsonl and TensorBoard.
            nonfinite: what to do when the loss is not finite.
            eager: run the code as ordinary PyTorch, untraced; one process or data-parallel.
            keep: checkpoints that stay.
            wait_for_saves: whether training stands still until a checkpoint that is due is written;
                otherwise for a copy in memory only, which takes as much room as the state.
            quiet: no progress display.
            compile: run the traced code compiled by torch's inductor; needs a C++ compiler.
            trace: steps to trace, such as `"3-7"`, into the run's trace.json; True takes five,
                after two to warm up.
            info: added to run.json (which file, which command).
        """
        self.job = job
        self._plan = plan
        self._folder: dict[str, Any] = {
            "run_dir": run_dir,
            "resume": resume,
            "fresh": fresh,
            "overwrite": overwrite,
        }
        self._loggers = tuple(loggers)
        self._nonfinite = nonfinite
        self._eager = eager
        self._compiled = compile
        self._keep = keep
        self._waits = wait_for_saves
        self._quiet = quiet
        self._trace = parse_steps(trace) if isinstance(trace, str) else trace
        self._profiler: Profiler | None = None
        self._info = dict(info or {})
        self._stack = ExitStack()
        self._journal = Journal()
        self._saved_at = time.monotonic()
        self._until: int | None = None
        self._session: Session | None = None
        self._contract: Contract | None = None
        self._stop = Stop()
        self._described = False
        self._account: Account | None = None
        self.dir = Path()

    def __enter__(self) -> Self:
        self._described, self._saved_at = False, time.monotonic()
        self._session = self._account = None
        with ExitStack() as stack:
            self._contract = contract = here()
            keep_freed_memory()
            if _on_main_thread():
                self._stop = stack.enter_context(listen())
            comm = connect(contract)
            stack.callback(comm.close)
            if contract.supervised:
                guard(contract, comm)
            stack.enter_context(ending(contract, comm))
            self._connected(comm)
            plan, notes = agreed_plan(contract.plan or self._plan, self.job, comm)
            with self._remembering(plan, contract.world.rank):
                self._session = open_session(
                    self.job,
                    plan,
                    comm,
                    nonfinite=self._nonfinite,
                    eager=self._eager,
                    compiled=self._compiled,
                    offload=contract.offload or self._offload(contract),
                )
            stack.callback(self._session.close)
            if not self._eager:  # there the user's own forward draws from the process's generators
                self._session.worker.overlap_reading()
            self._session.notes += [*comm.notes, *notes]
            self._session.handshake(facts_of(self._session))
            self._open_folder()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self.session.saver.leave()
            self._journal.close("stopped" if kind is SystemExit else "failed")
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            try:
                if self._profiler is not None:
                    self._profiler.close()
                self.session.settle()
                self.memory()
                self._tell()
            except BaseException:
                self._journal.close("failed")
                raise
            self._journal.close("ok")

    @property
    def session(self) -> Session:
        """This rank's session; only inside `with`."""
        if self._session is None:
            raise UsageError("a Run works inside `with mw.Run(job) as run:`")
        return self._session

    @property
    def rank(self) -> int:
        """This process's rank."""
        return 0 if self._session is None else self._session.worker.rank

    @property
    def step_number(self) -> int:
        """How many steps are done."""
        return self.session.step

    @property
    def lr(self) -> float:
        """Learning rate of the first parameter group."""
        return self.session.lr

    @property
    def extra(self) -> dict[str, Any]:
        """JSON-able values of your own, kept in checkpoints."""
        return self.session.extra

    @property
    def plan(self) -> Plan:
        """The plan, `data` filled."""
        return self.session.build.plan

    def _connected(self, comm: Comm) -> None:
        """What a kind of run does before its job is prepared."""

    def _offload(self, contract: Contract) -> Path:
        """What is offloaded to disk lies beside the runs, or in the run's own folder."""
        given = self._folder["run_dir"] or contract.run_dir
        return Path(given or "runs") / OFFLOAD

    def _open_folder(self) -> None:
        assert self._contract is not None
        session, wanted = self.session, self._folder
        given = wanted["run_dir"] or self._contract.run_dir
        path, go_on = "", False
        if self.rank == 0:
            stem = Path(str(self._info.get("file") or sys.argv[0] or "run")).stem or "run"
            choice = choose(
                stem,
                run_dir=Path(given) if given else None,
                resume=bool(wanted["resume"]),
                fresh=bool(wanted["fresh"]),
                overwrite=bool(wanted["overwrite"]),
            )
            path, go_on = str(choice.path), choice.resume
        (path, go_on), *_ = session.comm.perform(
            gather_json([path, go_on], session.everyone, "run folder")
        )
        self.dir = Path(path)
        if go_on:
            session.resume(self.dir / "checkpoints")
        if self.rank == 0:
            self._journal = open_journal(self.dir, session.step, self._loggers, quiet=self._quiet)
        session.saver.saved = session.step

    def steps(self, until: int | None = None) -> Iterator[int]:
        """Step numbers from the next one up to `until`; ends early when asked to stop."""
        self._until = total = steps_to_run(self.session, until)
        self._profile(total)
        self._journal.start(total, self.session.step)
        while self.session.step < total and not self.session.done:
            yield self.session.step

    def step(
        self,
        batch: Any = None,
        part: Literal["global", "local"] = "global",
        *,
        phase: str | None = None,
    ) -> Metrics:
        """Run one step; its global metrics.

        Args:
            batch: one of your own instead of the job's next: the global one, or with
                `part="local"` this rank's rows. Of a job with phases, the name of one instead.
            part: what `batch` is.
            phase: of the job's phases, the one to run; by default the one whose turn it is.
        """
        session = self.session
        if isinstance(batch, str):
            batch, phase = None, batch
        session.turn(phase)
        if part not in ("global", "local"):
            raise UsageError(f"part={part!r}; use 'global' or 'local'")
        with self._remembering(self.plan, self.rank):
            fetched = session.take(batch, local=part == "local")
        if not self._described:
            self._describe(fetched)
            self._profile(self._until)
        due = time.monotonic() - self._saved_at > CHECKPOINT_SECONDS
        stops = {f"stop{n}": self._stop.number == n for n in (15, 2, 10)}
        session.worker.flags = {"save": due and self.rank == 0, **stops}
        if self._profiler is not None:
            self._profiler.before()
        record = self._ran(fetched, phase)
        if not self._waits and time.monotonic() - self._saved_at > 0.9 * CHECKPOINT_SECONDS:
            session.prepare_saves()
        stopped = [f for f in record.metrics.flags if f.startswith("stop")]
        if self._profiler is not None:
            self._profiler.after(last=bool(stopped))
        self._report(record)
        if stopped:
            self.save(last=True)
            number = self._stop.number or int(stopped[0].removeprefix("stop"))
            self._note(f"stopped by signal {number} after step {session.step}; saved")
            raise SystemExit(128 + number)
        if "save" in record.metrics.flags:
            self.save(wait=self._waits)
        return record.metrics

    def _ran(self, fetched: Fetched, phase: str | None) -> Record:
        """One step on a batch, its memory watched."""
        if self._account is not None:
            self._account.begins()
        with self._remembering(self.plan, self.rank):
            record = self.session.run_taken(fetched, self._until, phase)
        if self._account is not None:
            self._account.ended()
        return record

    @contextlib.contextmanager
    def _remembering(self, plan: Plan, rank: int) -> Iterator[None]:
        """Within, want of memory is explained."""
        try:
            yield
        except Exception as error:
            if not ran_out(error):
                raise
            where = f"in step {self._session.step + 1}" if self._session else "as it began"
            process = 0 if self._account is None else self._account.process
            if self._session is not None:
                forget(self._session)
            raise explained(self.job, plan, rank, (where, process), error) from error

    def _profile(self, total: int | None) -> None:
        """Get ready to trace, before the first step."""
        if self._trace and self._profiler is None:
            steps = within(self._trace, self.session.step, total)
            self._profiler = Profiler(self.session, self.dir, steps, write_trace)

    def _report(self, record: Record) -> None:
        self._tell()
        self._journal.step(record)

    def _tell(self) -> None:
        for note in self.session.notes:
            self._note(note)
        self.session.notes.clear()

    def _note(self, text: str) -> None:
        self._journal.note(self.session.step, text)

    def log(self, **values: float) -> None:
        """Add values to the next step's record."""
        for name in RESERVED & values.keys():
            raise UsageError(
                f"run.log({name}=...): records keep that name for themselves; use another name"
            )
        self._journal.add(values)

    def evaluate(
        self,
        data: Any = None,
        metrics: Callable[[nn.Module, Any], Mapping[str, Any]] | None = None,
        *,
        weights: Weights = "current",
    ) -> dict[str, float]:
        """Loss and metrics over the held-out set.

        Args:
            data: like `Job.data()` returns; by default the job's evaluation set.
            metrics: `metrics(model, batch)` returns more of them, as a loss does.
            weights: the trained ones, or their average (`Job(ema=...)`).

        Returns:
            Means by name; of a job with phases `d/loss` and so on, over each phase's loss.
        """
        found: dict[str, float] = {}
        for phase in self.job.phases or ("",):
            job = self.job.of(phase)
            forward = None if metrics is None else _WithMetrics(job.loss, metrics)
            held = self.session.evaluate(data, forward, weights, phase or None)
            found |= {f"{phase}/{n}": v for n, v in held.items()} if phase else held
        self._journal.evaluation(self.session.step, found)
        return found

    def predict(
        self, data: Any, fn: Callable[[nn.Module, Any], Any], *, weights: Weights = "current"
    ) -> Any:
        """`fn(model, batch)` for every sample of `data`, in order; whole on every rank."""
        return self.session.predict(data, fn, weights)

    def save(self, *, last: bool = False, wait: bool = True) -> Path | None:
        """Save a checkpoint; a failure is told and training goes on, unless it is the last one.

        Args:
            last: nothing is done where this step's is in already.
            wait: until it is written. Otherwise the state is copied and written while the next
                steps run; the last one is in before the run ends.

        Returns:
            Its folder, where that is written.
        """
        session, path = self.session, None
        if last:
            session.settle()
            self._tell()
            if session.saver.saved == session.step:
                return None
        try:
            if wait:
                path = session.save(self.dir / "checkpoints", self._keep)
            else:
                session.save_soon(self.dir / "checkpoints", self._keep)
        except StorageError as error:
            if last:
                raise
            self._note(
                f"checkpoint of step {session.step} was not saved, training goes on: {error}"
            )
        self._tell()
        self._saved_at = time.monotonic()
        return path

    def export(self, folder: str | Path, *, weights: Weights = "current") -> None:
        """Write the weights as safetensors under the model's own names."""
        self.session.export(Path(folder), weights)

    def module(self, *, weights: Weights = "current") -> nn.Module | None:
        """The whole eager model with these weights, on rank 0; None on the others."""
        return self.session.module(weights)

    def _describe(self, fetched: Fetched) -> None:
        """Before the first step: agree with all ranks on what will run, and write it down."""
        session = self.session
        self._described = True
        self._journal.describe(lambda: {**describe_run(session, fetched), **self._info})
        if not self._eager:
            self._bills(fetched)
        if session.step:
            self._note(f"resumed at step {session.step} from {self.dir}")

    def _bills(self, fetched: Fetched) -> None:
        """Before the first step: every rank learns its bill, and whether there is room for it."""
        session = self.session
        if not self.plan.asynchronous:
            session.worker.lowered(fetched)  # what it takes is the process's, not the step's
        told = session.comm.perform(
            gather_json(self._journal.told.get("memory"), session.everyone, "bills")
        )
        self._account = Account(session)
        self._account.ready()
        session.comm.perform(require_room(session, self.job, told[0]))

    def memory(self) -> list[dict[str, Any]]:
        """What each rank's memory went to so far, by rank; every rank calls it.

        Returns:
            Of each: `parts` in bytes, `process`, `rest`, `away`, and `peak`: the most that was
            resident in a step. Empty before the first step, and with `eager`.
        """
        if self._account is None:
            return []
        everyone, mine = self.session.everyone, self._account.told()
        told: list[dict[str, Any]] = self.session.comm.perform(
            gather_json(mine, everyone, "memory")
        )
        self._journal.amend({"measured": told})
        return told


def _on_main_thread() -> bool:
    import threading

    return threading.current_thread() is threading.main_thread()


@dataclass(frozen=True, slots=True)
class _WithMetrics:
    """A loss with more metrics; equal ones are traced once."""

    loss: Callable[[nn.Module, Any], Any]
    metrics: Callable[[nn.Module, Any], Mapping[str, Any]]

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        found, more = self.loss(model, batch), dict(self.metrics(model, batch))
        if not isinstance(found, tuple):
            return found, more
        if isinstance(found[-1], Mapping):
            return (*found[:-1], {**found[-1], **more})
        return (*found, more)
