"""The average of the weights as a worker holds it: in their place, in checkpoints."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from meshwright.compile.settings import in_dtype
from meshwright.errors import UsageError
from meshwright.job import Job
from meshwright.program.layout import Layout, pieces
from meshwright.run.average import averaged_dtype
from meshwright.run.checkpoint.compare import Wanted
from meshwright.run.checkpoint.header import dtype_name
from meshwright.run.checkpoint.restore import Checkpoint
from meshwright.run.part import box, part_of
from meshwright.run.whole import whole_of
from meshwright.run.worker import Worker

__all__ = ["exchanged", "held", "noted", "put_back", "read", "require_weights", "saved", "wanted"]

_AVERAGED = "ema"


def require_weights(weights: str, job: Job) -> None:
    """Return if the job has these weights.

    Raises:
        UsageError: it has not.
    """
    if weights not in ("current", _AVERAGED):
        raise UsageError(f"weights={weights!r}; use 'current' or '{_AVERAGED}'")
    if weights == _AVERAGED and job.ema is None:
        raise UsageError(
            f"weights='{_AVERAGED}' asks for the average of the weights, which the job does not "
            "keep; give Job(ema=0.999), or use weights='current'"
        )


def exchanged(worker: Worker) -> Generator[Any, Any, dict[str, Tensor]]:
    """Fill the rank's weights with their average; what they were, for `put_back`; an exchange."""
    kept: dict[str, Tensor] = {}
    if worker.state.store is not None:
        worker.state.store.require_whole()
    for entry, _, layout, tensor in held(worker):
        name, part = entry.partition("/")[2], tensor
        resting = worker.build.states[name].weights
        if layout != resting:
            whole = yield from whole_of(worker, name, tensor, layout)
            part = part_of(whole, resting, worker.build.axes, worker.place.coordinates)
        weights = worker.state.values[f"model/{name}"]
        kept[name] = weights.clone()
        weights.copy_(part)
    _written(worker, kept)
    return kept


def put_back(worker: Worker, kept: Mapping[str, Tensor]) -> None:
    """The weights are what they were."""
    for name, tensor in kept.items():
        worker.state.values[f"model/{name}"].copy_(tensor)
    _written(worker, kept)


def _written(worker: Worker, names: Iterable[str]) -> None:
    """Weights were written to: those on disk get new digests."""
    if worker.state.store is not None:
        worker.state.store.refresh(f"model/{name}" for name in names)


def held(worker: Worker) -> Iterator[tuple[str, tuple[int, ...], Layout, Tensor]]:
    """(Entry of a checkpoint, global shape, layout, this rank's part)."""
    for build, state in worker.phases.values():
        average = state.average
        for name, tensor in average.tensors.items() if average is not None else ():
            shape = tuple(build.model.parameters[name].shape)
            yield f"{_AVERAGED}/{name}", shape, build.states[name].optimizer, tensor


def saved(worker: Worker) -> dict[str, Any] | None:
    """What a checkpoint's `meta` says of the average."""
    average = worker.state.average
    if average is None:
        return None
    if not worker.phase:
        return {"decay": average.decay, "steps": average.steps}
    each = {name: state.average for name, (_, state) in worker.phases.items()}
    steps = {name: own.steps for name, own in each.items() if own is not None}
    return {"decay": average.decay, "steps": steps}


def wanted(worker: Worker, checkpoint: Checkpoint) -> dict[str, Wanted]:
    """What a checkpoint that has an average must hold of it."""
    if worker.build.job.ema is None or not checkpoint.meta.get("average"):
        return {}
    found: dict[str, Wanted] = {}
    for build, _ in worker.phases.values():
        for name in build.recipe.names:
            fake = build.model.parameters[name]
            if fake.requires_grad:
                kind = averaged_dtype(in_dtype(fake.dtype, build.dtype))
                found[f"{_AVERAGED}/{name}"] = Wanted(dtype_name(kind), tuple(fake.shape))
    return found


def read(worker: Worker, checkpoint: Checkpoint) -> None:
    """Fill the rank's part of the average; one that was not saved begins with the weights.

    Raises:
        StorageError: a part of it is damaged.
    """
    where = worker.build.axes, worker.place.coordinates
    meta = checkpoint.meta.get("average")
    for phase, (_, state) in worker.phases.items():
        if state.average is not None and not meta:
            state.average.begin(state.shards)
        elif state.average is not None and meta is not None:
            steps = meta["steps"][phase] if phase else meta["steps"]
            state.average.steps = int(steps)
    if not meta:
        return
    for name, shape, layout, tensor in held(worker):
        for there, here in pieces(shape, layout, *where):
            checkpoint.read_into(box(tensor, here), name, tuple(start for start, _ in there))
    for _, state in worker.phases.values():
        if state.average is not None:
            state.average.written()


def noted(worker: Worker, checkpoint: Checkpoint) -> list[str]:
    """What the user should know of an average that begins or ends with a checkpoint."""
    job, meta = worker.build.job, checkpoint.meta.get("average")
    if job.ema is not None and not meta:
        told = (
            f"checkpoint {checkpoint.path} holds no average of the weights: ema={job.ema} begins "
            f"with those of step {checkpoint.step}"
        )
        return [told]
    if job.ema is None and meta:
        told = (
            f"checkpoint {checkpoint.path} holds an average of the weights (ema={meta['decay']}), "
            "which the job does not go on with; Job(ema=...) would"
        )
        return [told]
    return []
