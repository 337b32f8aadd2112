"""A session: one process's rank of a job, driven over a real Comm. The loop is its caller's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.comm.base import Comm, Exchange, Group
from meshwright.comm.handshake import agree
from meshwright.compile.inductor import require_compiler
from meshwright.compile.init import built
from meshwright.compile.precision import notes_on
from meshwright.errors import StorageError, UsageError
from meshwright.job import Job
from meshwright.plan.plan import Plan
from meshwright.run import averaged, persist
from meshwright.run.auto import require_host
from meshwright.run.build import Build
from meshwright.run.checkpoint.save import open_checkpoint, resume
from meshwright.run.checkpoint.saver import BUSY, Saver
from meshwright.run.data.samples import Source, open_source
from meshwright.run.eager import EagerWorker
from meshwright.run.evaluate import evaluate, predict
from meshwright.run.executor import Timing
from meshwright.run.given import given_weights
from meshwright.run.phased import worker_for
from meshwright.run.phases import builds_of
from meshwright.run.same import require_same_job
from meshwright.run.step import Metrics, Policy
from meshwright.run.together import together
from meshwright.run.weights import export
from meshwright.run.whole import config_of, exported, gathered, held
from meshwright.run.worker import Fetched, Worker
from meshwright.schedule.bubble import pipeline_notes

__all__ = ["Record", "Session", "open_session", "steps_to_run"]


@dataclass(frozen=True, slots=True)
class Record:
    """One step, as loggers get it."""

    metrics: Metrics
    timing: Timing
    seconds: float
    lr: float
    samples: int


@dataclass(slots=True)
class Session:
    """This rank, its sources and its place in the job.

    Attributes:
        given: the job that is trained, with all its phases.
        step: how many steps are done.
        extra: JSON-able values that checkpoints keep for the user.
    """

    given: Job
    worker: Worker
    comm: Comm
    step: int = 0
    extra: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    fetched: Fetched | None = None
    evaluation: Source | None = None
    saver: Saver = field(init=False)
    _told: int = field(
        init=False, default=0
    )  # the first step whose flags are of the oldest save's present phase

    def __post_init__(self) -> None:
        self.saver = Saver(self.everyone, self.worker.rank)

    @property
    def build(self) -> Build:
        """What runs; of a job with phases, the one whose turn it is."""
        return self.worker.build

    @property
    def job(self) -> Job:
        """What is trained; of a job with phases, the one whose turn it is."""
        return self.build.job

    @property
    def everyone(self) -> Group:
        """All ranks."""
        return Group.world(self.build.mesh.size)

    @property
    def lr(self) -> float:
        """Learning rate of the first group."""
        return float(self.worker.state.optimizer.param_groups[0]["lr"])

    @property
    def done(self) -> bool:
        """Whether the job's AdaScale says that training ends here."""
        states = (state for _, state in self.worker.phases.values())
        return all(state.gains is not None and state.gains.done for state in states)

    def handshake(self, facts: Mapping[str, str]) -> None:
        """Compare versions, plan and program with all ranks before the first step."""
        self.comm.perform(agree(facts, self.everyone))

    def take(self, batch: Any = None, *, local: bool = False) -> Fetched:
        """The next step's batch, its shapes agreed on with all ranks.

        Args:
            batch: one of the user's own instead of the job's next: the global batch.
            local: `batch` is this rank's rows of it.
        """
        if batch is not None:
            pushed = self.worker.pushed(batch, self.step, local=local)
            self.comm.perform(self.worker.require_same_shapes(pushed))
            return pushed
        if self.fetched is None:
            exchange = self.worker.agree_on_shapes(self.worker.fetch(self.step))
            self.fetched = self.comm.perform(exchange)
        return self.fetched

    def run_step(
        self, batch: Any = None, *, local: bool = False, until: int | None = None
    ) -> Record:
        """Take a batch and run one step on it; arguments as of `take` and `run_taken`."""
        return self.run_taken(self.take(batch, local=local), until)

    def turn(self, phase: str | None = None) -> None:
        """Let a phase run next; by default the one that the job's order has at this step."""
        if phase is None:
            self.worker.turn_at(self.step)
            return
        if phase not in (self.given.phases or {}):
            known = ", ".join(map(repr, self.given.phases or ())) or "one loss"
            raise UsageError(f"the job has no phase {phase!r}; it has {known}")
        self.worker.turn(phase)

    def run_taken(
        self, fetched: Fetched, until: int | None = None, phase: str | None = None
    ) -> Record:
        """One step on a batch that was taken.

        Args:
            fetched: from `take`.
            until: the last step, after which no batch is looked at ahead.
            phase: that it is of; by default by the job's order.
        """
        self.turn(phase)
        began = time.perf_counter()
        lr = self.lr
        last = until is not None and self.step + 1 >= until
        upcoming = self.step + 1 if fetched is self.fetched and not last else None
        self.worker.ahead, self.worker.until = None, until
        self.worker.flags = {**self.worker.flags, BUSY: self.saver.busy}
        metrics, timing = self.comm.perform(self.worker.step(fetched, upcoming))
        metrics = replace(metrics, phase=self.worker.phase) if self.worker.phase else metrics
        self.fetched = self.worker.ahead
        self.step += 1
        if self.saver.pending and BUSY not in metrics.flags and metrics.step >= self._told:
            self._settle(self.saver.advance())
        self._take_notes(self.worker.source)
        self._tell_of_saves()
        seconds = time.perf_counter() - began
        return Record(metrics, timing, seconds, lr, self.job.batch_size)

    def evaluate(
        self,
        data: Any = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        weights: str = "current",
        phase: str | None = None,
    ) -> dict[str, float]:
        """Loss and metrics over the held-out set (or `data`), weighted as in training."""
        self.turn(phase)
        with self._weighing(weights), self._held_out(data) as source:
            found: dict[str, float] = self.comm.perform(evaluate(self.worker, source, forward))
            self._take_notes(source)
        return found

    def predict(
        self, data: Any, forward: Callable[[nn.Module, Any], Any], weights: str = "current"
    ) -> Any:
        """What `forward(model, batch)` gives for every sample, in order, on every rank."""
        with self._weighing(weights), closing(self._opened(data)) as source:
            found = self.comm.perform(predict(self.worker, source, forward))
            self._take_notes(source)
        return found

    @contextmanager
    def _weighing(self, weights: str) -> Iterator[None]:
        """Nothing in flight, and within, where it is asked for, the average in the weights' place.

        That costs a copy of the rank's weights meanwhile.
        """
        averaged.require_weights(weights, self.job)
        self._drain()
        kept = {} if weights == "current" else self.comm.perform(averaged.exchanged(self.worker))
        try:
            yield
        finally:
            averaged.put_back(self.worker, kept)

    @contextmanager
    def _held_out(self, data: Any) -> Iterator[Source]:
        """The held-out set for one pass: a dataset is kept open, an iterable is made anew."""
        factory = self.job.evaluation
        if data is not None:
            source = self._opened(data)
        elif factory is not None:
            source = self.evaluation or self._opened(factory())
        else:
            raise UsageError(
                "evaluate() needs data: give Job(evaluation=lambda: ...), or evaluate(data)"
            )
        if data is None and source.length is not None:
            self.evaluation = source
            yield source
        else:
            with closing(source):
                yield source

    def _opened(self, data: Any) -> Source:
        job = self.job
        return open_source(
            data, batch_size=job.batch_size, seed=job.seed, collate=job.collate, training=False
        )

    def _take_notes(self, source: Source | None) -> None:
        if source is not None:
            self.notes += source.notes
            source.notes.clear()

    def save(self, root: Path, keep: int = 3) -> Path:
        """Save a checkpoint of the steps done so far; every rank takes part."""
        self._drain()
        worker, step = self.worker, self.step
        path: Path = self._settle(
            persist.save_worker(worker, root, step, self.extra, keep, self.saver)
        )
        return path

    def prepare_saves(self) -> None:
        """Have memory made for the first `save_soon` while steps run; once, on this rank alone."""
        if not self.saver.prepared:
            self.saver.prepare(persist.pieces_of(self.worker))

    def save_soon(self, root: Path, keep: int = 3) -> None:
        """Copy the state, and write it while the next steps run; every rank takes part.

        What becomes of it is seen in `saver` and told in `notes`; `settle` waits for it.
        """
        self._drain()
        saver, step = self.saver, self.step
        self._settle(persist.stage_worker(self.worker, saver, root, step, self.extra, keep))

    def settle(self) -> None:
        """Wait until all checkpoints that were begun are in, or have failed; every rank."""
        self._settle(self.saver.settle())

    def _settle(self, exchange: Exchange) -> Any:
        """Perform what takes saves on."""
        found = self.comm.perform(exchange)
        self._told = self.step + self.worker.flags_behind
        self._tell_of_saves()
        return found

    def _tell_of_saves(self) -> None:
        told, self.saver.told = self.saver.told, []
        self.notes += told

    def resume(self, root: Path) -> Path | None:
        """Go on from the newest whole checkpoint in `root`; None where there is none."""
        self._drain()
        worker = self.worker
        use, fits = (partial(act, worker) for act in (persist.read_state, require_same_job))
        exchange = resume(root, self.everyone, worker.rank, use=use, fits=fits)
        found = self.comm.perform(exchange)
        self.notes += [*found.damaged, *found.unfinished]
        if found.path is None:
            return None
        with open_checkpoint(found.path) as checkpoint:
            worker.restart()
            self.extra = persist.go_on(worker, checkpoint)
            self.step = checkpoint.step
            self.notes += averaged.noted(worker, checkpoint)
        self.saver.trusted.add(found.path.name)  # all ranks have read it
        self.fetched = None
        return Path(found.path)

    def _drain(self) -> None:
        """Leave nothing in flight: what follows is of the newest weights."""
        self.comm.perform(self.worker.drain())

    def _whole(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """These tensors whole, gathered one at a time; every rank must go through all of them."""
        for name in names:
            yield name, self.comm.perform(gathered(self.worker, name))

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter and buffer whole, one at a time, on every rank; all must take all."""
        self._drain()
        yield from self._whole(held(self.worker))

    def export(self, folder: Path, weights: str = "current") -> None:
        """Write safetensors under the model's own names, as `from_pretrained` reads them.

        Only rank 0 keeps tensors, and no more than one file's.

        Raises:
            StorageError: on every rank, if rank 0 cannot write.
        """
        with self._weighing(weights):
            self._export(folder)

    def _export(self, folder: Path) -> None:
        tensors, problem = self._whole(exported(self.worker)), ""
        if self.worker.rank == 0:
            given = Path(self.job.weights) if self.job.weights is not None else None
            config = given if given is not None and given.is_dir() else config_of(self.build)
            try:
                export(folder, tensors, config)
            except StorageError as error:
                problem = str(error)
        for _ in tensors:
            pass  # the other ranks gather along

        def told() -> None:
            if problem:
                raise StorageError(problem)

        self.comm.perform(together(told, self.everyone, "export"))

    def module(self, weights: str = "current") -> nn.Module | None:
        """The whole eager model with these weights, on rank 0; None on the others."""
        with self._weighing(weights):
            return self._module()

    def _module(self) -> nn.Module | None:
        tensors = self._whole(held(self.worker))
        if self.worker.rank != 0:
            for _ in tensors:
                pass
            return None
        model = built(self.given.model, self.job.seed, self.worker.build.model)
        targets = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        with torch.no_grad():
            for name, tensor in tensors:
                targets[name].copy_(tensor)
        return model

    def close(self) -> None:
        """End data workers; what was offloaded goes."""
        self.worker.close()
        for source in (self.worker.source, self.evaluation):
            if source is not None:
                source.close()


def open_session(  # noqa: PLR0913 - what is asked of a run, one word each
    job: Job,
    plan: Plan,
    comm: Comm,
    *,
    nonfinite: str = "raise",
    eager: bool = False,
    data: Any = None,
    dtype: torch.dtype | None = None,
    compiled: bool = False,
    offload: Path | None = None,
) -> Session:
    """Prepare this rank: model, state, data; nothing has run yet.

    Args:
        job: what to train.
        plan: with or without `data`.
        comm: to the other ranks.
        nonfinite: `raise`, `skip` or `ignore` a step whose loss is not finite.
        eager: run the user's code as it is, untraced.
        data: what `job.data()` returned, where it was called already.
        dtype: floating tensors' dtype instead of their own.
        compiled: run segments compiled by inductor.
        offload: the folder of what the plan offloads to disk; a temporary one by default.
    """
    if compiled:
        if eager:
            raise UsageError(
                "--compile compiles what was traced, and --eager traces nothing; "
                "leave one of them out"
            )
        require_compiler()
    if eager:
        _require_as_it_is(job, plan)
    if nonfinite not in ("raise", "skip", "ignore"):
        raise UsageError(f"nonfinite={nonfinite!r}; use 'raise', 'skip' or 'ignore'")
    if nonfinite == "skip" and plan.asynchronous:
        raise UsageError(
            f"nonfinite='skip' leaves a whole step out, but schedule={plan.schedule} has begun the "
            "next ones by then; use nonfinite='raise', or a schedule that flushes, such as 1f1b"
        )
    builds = builds_of(job, plan, comm.world.size, dtype, data)
    for build in builds.values():
        build.compiled = compiled
        build.offload = offload or build.offload
    build = next(iter(builds.values()))
    require_host(build, comm.world.local_size)
    told = pipeline_notes(build.plan, job.batch_size)
    notes = [*build.model.notes, *notes_on(plan.precision), *told]
    source = open_source(
        job.data() if data is None else data,
        batch_size=job.batch_size,
        seed=job.seed,
        collate=job.collate,
    )
    make = None
    if job.weights is not None:
        if not Path(job.weights).exists():
            raise StorageError(
                f"weights {job.weights} are not there; give a safetensors file or folder"
            )
        make, missing = given_weights(build, Path(job.weights))
        notes += missing
    rest = comm.world.rank, source, Policy(job.clip_norm, nonfinite), make
    worker = EagerWorker(build, *rest) if eager else worker_for(job, builds, *rest)
    return Session(job, worker, comm, notes=notes)


def _require_as_it_is(job: Job, plan: Plan) -> None:
    """What `--eager` runs is neither split nor moved.

    Raises:
        UsageError: the plan or the job asks for it.
    """
    split = [axis for axis, size in plan.sizes.items() if axis != "data" and size > 1]
    if split:
        raise UsageError(
            f"--eager runs the user's code as it is, which {split[0]}={plan.sizes[split[0]]} would "
            "have to split; use data parallelism alone, or leave --eager out"
        )
    moved = {"remat": "computes parts of it again", "offload": "moves its state"}
    for key, does in moved.items():
        if plan.value(key) != "none":
            raise UsageError(
                f"--eager runs the user's code as it is, but {key}={plan.value(key)} {does}; leave "
                "one of them out"
            )
    if job.phases is not None:
        raise UsageError(
            "--eager runs one loss, but the job trains several in phases; leave --eager out"
        )


def steps_to_run(session: Session, steps: int | None) -> int:
    """How many steps the job takes in all.

    Raises:
        UsageError: nobody said.
    """
    job, source = session.job, session.worker.source
    if steps is not None:
        return steps
    if job.steps is not None:
        return job.steps
    if job.epochs is not None and source is not None:
        return source.steps(job.epochs)
    if job.adascale is not None and job.adascale.iterations is not None:
        return job.adascale.iterations  # a step is worth one at least
    raise UsageError(
        "nobody said how long to train; give steps=1000, or Job(steps=) or Job(epochs=)"
    )
