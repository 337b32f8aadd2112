"""A rank's state to a checkpoint and back, under any plan; and from weights on disk."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meshwright.comm.base import Group, gather_json
from meshwright.errors import StorageError, UserCodeError
from meshwright.program.layout import (
    REPLICATED,
    Layout,
    local_shape,
    pieces,
    primary,
)
from meshwright.program.program import Value
from meshwright.run import averaged
from meshwright.run.build import Build
from meshwright.run.checkpoint.header import dtype_name, dtype_of
from meshwright.run.checkpoint.meta import check_meta
from meshwright.run.checkpoint.plain import from_plain, to_plain
from meshwright.run.checkpoint.save import Checkpoint, Piece, save
from meshwright.run.checkpoint.saver import Saver
from meshwright.run.imported import stored_names
from meshwright.run.kept import KEPT, may_cast, read_cast
from meshwright.run.optimizer import adascale
from meshwright.run.optimizer.scaling import restored, saved
from meshwright.run.part import box
from meshwright.run.same import phase_meta, require_same_job, under, wanted
from meshwright.run.step import RankState
from meshwright.run.worker import Worker

__all__ = [
    "go_on",
    "pieces_of",
    "read_state",
    "restore",
    "save_worker",
    "stage_worker",
]


def _pieces(
    worker: Worker, name: str, state: str, shape: tuple[int, ...], layout: Layout, part: Tensor
) -> Iterator[Piece]:
    """The boxes of this rank's part; of replicas, and of stages that hold it, one is written.

    `state` is the `model/` or `buffer/` that it is of.
    """
    build, where = worker.build, (worker.build.axes, worker.place.coordinates)
    first = build.counts(worker.rank, state)
    for there, here in pieces(shape, layout, *where):
        start = tuple(start for start, _ in there)
        yield Piece(name, shape, start, box(part, here), first and primary(layout, *where, there))


def pieces_of(worker: Worker) -> list[Piece]:
    """Everything this rank holds, by global name."""
    build = worker.build
    for _, state in worker.phases.values():
        if state.kept is not None:
            state.kept.settle()
    if worker.state.store is not None:
        worker.state.store.require_whole()
    found: list[Piece] = []
    for name, tensor in worker.state.values.items():
        kind, _, bare = name.partition("/")
        if kind == "model":
            shape = tuple(build.model.parameters[bare].shape)
            found += _pieces(worker, name, name, shape, build.states[bare].weights, tensor)
        elif kind == "buffer":
            found += _pieces(worker, name, name, tuple(tensor.shape), REPLICATED, tensor)
    for phase, (of_phase, state) in worker.phases.items():
        found += _optimizer_pieces(worker, phase, of_phase, state)
    for name, shape, layout, tensor in averaged.held(worker):
        found += _pieces(worker, name, f"model/{name.partition('/')[2]}", shape, layout, tensor)
    return found


def _optimizer_pieces(
    worker: Worker, phase: str, build: Build, state: RankState
) -> Iterator[Piece]:
    """Tensors of the optimizer's state: `optimizer/<slot>/<parameter>`, a phase's name before."""
    for bare, shard in state.shards.items():
        like = tuple(build.model.parameters[bare].shape), build.states[bare].optimizer
        for slot, value in state.optimizer.state.get(shard, {}).items():
            if isinstance(value, Tensor):  # other values are kept in the manifest
                name = f"{under(phase)}{slot}/{bare}"
                lies = state.lies(bare, slot, value, like)
                yield from _pieces(worker, name, f"model/{bare}", *lies, value)


def meta_of(
    worker: Worker, step: int, extra: Mapping[str, Any], plain: Mapping[str, Any]
) -> dict[str, Any]:
    """What a checkpoint says beside tensors.

    Args:
        worker: of a rank.
        step: how many are done.
        extra: the user's own values.
        plain: by phase, what of the optimizer's state is no tensor, of all stages' parameters.

    Raises:
        UserCodeError: `extra`, the schedule or the data's state hold what JSON cannot.
    """
    job, model = worker.build.job, worker.build.model
    kept = _state_dict(worker)
    _require_json(extra)
    told = {
        phase: _phase_meta(build, state, plain.get(phase, {}))
        for phase, (build, state) in worker.phases.items()
    }
    return {
        "plan": worker.build.plan.label,
        "precision": worker.build.precision.base,
        "batch_size": job.batch_size,
        "seed": job.seed,
        **(told.get("") or {"phases": told}),
        "average": averaged.saved(worker),
        "data": _data_state(worker, step),
        "extra": dict(extra),
        "tied": dict(model.tied),
        "transient": [name for name in model.buffers if name not in kept],
    }


def _phase_meta(build: Build, state: RankState, plain: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of a loss's optimizer, its schedule and what scales them."""
    scheduler = None
    if state.scheduler is not None:
        scheduler = to_plain(state.scheduler.state_dict(), "the schedule's state_dict()")
    return {
        "optimizer": {**_optimizer_meta(build, state), "state": dict(plain)},
        "scheduler": scheduler,
        "scaling": saved(state.scaling),
        "adascale": adascale.saved(state.gains),
    }


def _state_dict(worker: Worker) -> frozenset[str]:
    """Names in the model's state dict: a buffer may be kept out of it."""
    return frozenset(worker.build.model.module.state_dict())


def _data_state(worker: Worker, step: int) -> dict[str, Any] | None:
    """How the data goes on with `step`; None where it begins anew and passes the steps before.

    A stream's place is the step, also where the user pushed batches of their own instead: those it
    has not read are passed now.
    """
    source = worker.source
    if source is None:
        return None
    if source.length is None and not worker.read:
        return None
    if source.length is None and worker.unread is not None:
        source.size(worker.unread)
    return source.state(step)


def _require_json(extra: Mapping[str, Any]) -> None:
    try:
        check_meta({"extra": dict(extra)})
        json.dumps(extra, allow_nan=False)
    except (StorageError, ValueError) as error:
        what = str(error).replace("meta.extra", "run.extra")
        raise UserCodeError(
            f"run.extra cannot be saved: {what}; keep finite numbers, texts, and lists and dicts "
            "of them (tensor.tolist(), str(path)), or take it out"
        ) from error


def _optimizer_meta(build: Build, state: RankState) -> dict[str, Any]:
    """Its class, its groups' parameters and settings, and of how many each tensor is kept."""
    names, optimizer = build.recipe.groups, state.optimizer
    groups = [
        {
            "parameters": list(members),
            "settings": {
                key: to_plain(value, f"optimizer group setting {key}")
                for key, value in group.items()
                if _kept(key, value)
            },
        }
        for (members, _), group in zip(names, optimizer.param_groups, strict=True)
    ]
    slots = Counter(
        slot
        for shard in state.shards.values()
        for slot, value in optimizer.state.get(shard, {}).items()
        if isinstance(value, Tensor)
    )
    return {"class": type(optimizer).__name__, "groups": groups, "slots": dict(slots)}


def _plain_state(state: RankState) -> dict[str, Any]:
    """What of the optimizer's state of this rank's parameters is no tensor."""
    plain = {
        bare: {
            slot: to_plain(value, f"optimizer state {slot} of {bare}")
            for slot, value in state.optimizer.state.get(shard, {}).items()
            if not isinstance(value, Tensor)
        }
        for bare, shard in state.shards.items()
    }
    return {bare: slots for bare, slots in plain.items() if slots}


def _kept(key: str, value: Any) -> bool:
    return key != "params" and (
        value is None or isinstance(value, bool | int | float | str | tuple | list | Tensor)
    )


def save_worker(
    worker: Worker,
    root: Path,
    step: int,
    extra: Mapping[str, Any],
    keep: int,
    saver: Saver | None = None,
) -> Generator[Any, Any, Path]:
    """Save this rank's part of the checkpoint after `step` steps; an exchange.

    What `saver` has in flight is finished first.
    """
    group = Group.world(worker.build.mesh.size)
    saver = saver or Saver(group, worker.rank)
    meta = yield from _meta(worker, step, extra)
    yield from saver.settle()
    mine, trusted = pieces_of(worker), saver.trusted
    path = yield from save(root, step, mine, meta, group, worker.rank, keep, trusted)
    saver.saved = step
    return path


def stage_worker(
    worker: Worker, saver: Saver, root: Path, step: int, extra: Mapping[str, Any], keep: int
) -> Generator[Any, Any, None]:
    """Begin to save the same while training goes on; an exchange.

    A host without memory for a copy has it saved at once; on a disk that still writes the two
    before it is left out; either is told in `saver.told`.
    """
    meta = yield from _meta(worker, step, extra)
    problem = yield from saver.stage(root, step, pieces_of(worker), meta, keep)
    if problem == "memory":
        saver.told.append(
            f"the checkpoint of step {step} was written while training waited: a host has no "
            "memory for a copy of its ranks' state"
        )
        yield from save_worker(worker, root, step, extra, keep, saver)
    elif problem:
        steps = " and ".join(map(str, saver.pending))
        saver.told.append(
            f"the checkpoint of step {step} was left out: those of steps {steps} are still being "
            "written; save less often, or to a faster disk"
        )


def _meta(
    worker: Worker, step: int, extra: Mapping[str, Any]
) -> Generator[Any, Any, dict[str, Any]]:
    mesh = worker.build.mesh
    group = Group.world(mesh.size)
    plain = {phase: _plain_state(state) for phase, (_, state) in worker.phases.items()}
    if len(mesh.stages) > 1:  # the first rank, whose account is kept, knows of its stage only
        stages = yield from gather_json(plain[""], group, "the optimizer's state")
        plain = {"": {name: slots for stage in stages for name, slots in stage.items()}}
    return meta_of(worker, step, extra, plain)


def read_state(worker: Worker, checkpoint: Checkpoint) -> None:
    """Fill this rank's tensors and optimizer from a checkpoint of any plan.

    Raises:
        StorageError: a part that this rank needs is damaged; what was filled before stays so.
    """
    values = worker.state.values
    names = stored_names(wanted(worker), checkpoint, worker.build.model.tied)
    axes, coordinates = worker.build.axes, worker.place.coordinates
    for name, tensor in values.items():
        kind, _, bare = name.partition("/")
        if kind == "model":
            fake = worker.build.model.parameters[bare]
            layout = worker.build.states[bare].weights
            for there, here in pieces(tuple(fake.shape), layout, axes, coordinates):
                start = tuple(start for start, _ in there)
                read_cast(checkpoint, box(tensor, here), names[name], start)
        elif kind == "buffer" and name in names:
            checkpoint.read_into(tensor, names[name], (0,) * tensor.dim())
    if worker.state.store is not None:
        worker.state.store.refresh(values.keys())
    averaged.read(worker, checkpoint)
    for phase, (build, state) in worker.phases.items():
        _read_optimizer(worker, phase, build, state, checkpoint)


def go_on(worker: Worker, checkpoint: Checkpoint) -> dict[str, Any]:
    """Take up the schedule and the data where the checkpoint left them; its `extra`."""
    meta = checkpoint.meta
    for phase, (_, state) in worker.phases.items():
        told = phase_meta(meta, phase)
        if state.scheduler is not None and told["scheduler"] is not None:
            state.scheduler.load_state_dict(from_plain(told["scheduler"]))
        if state.scaling is not None:
            state.rescale(restored(state.scaling, told.get("scaling")))
        if state.gains is not None:
            state.gains = adascale.restored(state.gains, told.get("adascale"))
    worker.turn(worker.phase)
    if worker.source is not None and meta["data"] is not None:
        worker.source.restore(meta["data"])
        worker.read = True
    return dict(meta["extra"])


def restore(worker: Worker, checkpoint: Checkpoint) -> dict[str, Any]:
    """Fill this rank's state from a checkpoint of any plan; its `extra`.

    Raises:
        StorageError: it is damaged, or of another model, optimizer or batch size.
    """
    require_same_job(worker, checkpoint)
    read_state(worker, checkpoint)
    return go_on(worker, checkpoint)


def _read_optimizer(
    worker: Worker, phase: str, build: Build, state: RankState, checkpoint: Checkpoint
) -> None:
    """Fill the optimizer's state and its groups' settings."""
    saved = phase_meta(checkpoint.meta, phase)["optimizer"]
    for shard in state.shards.values():  # a damaged checkpoint may have filled some before
        state.optimizer.state.pop(shard, None)
    for bare in state.shards.keys() & saved["state"].keys():
        state.optimizer.state[state.shards[bare]].update(from_plain(saved["state"][bare]))
    for name, entry in checkpoint.entries.items():
        if not name.startswith(under(phase)):
            continue
        slot, _, bare = name.removeprefix(under(phase)).partition("/")
        if bare not in state.shards:
            continue
        whole = tuple(build.model.parameters[bare].shape)
        alike = bool(whole) and entry.shape == whole
        layout = build.states[bare].optimizer if alike else REPLICATED
        cast = alike and entry.dtype in KEPT and may_cast(worker, checkpoint)
        kind = dtype_name(state.shards[bare].dtype) if cast else entry.dtype
        if bare in state.joint.parameters:
            layout = state.joint.expect(bare, slot, Value(kind, entry.shape))
        if layout.placements:
            shape, where = entry.shape, (build.axes, worker.place.coordinates)
            tensor = torch.empty(local_shape(shape, layout, *where), dtype=dtype_of(entry.dtype))
            for there, here in pieces(shape, layout, *where):
                checkpoint.read_into(box(tensor, here), name, tuple(start for start, _ in there))
        else:
            tensor = checkpoint.read(name)
        state.optimizer.state[state.shards[bare]][slot] = tensor.to(dtype_of(kind))
        state.rest(bare)
    told = "imported" not in checkpoint.meta  # else the job's own settings stay
    for group, kept in zip(state.optimizer.param_groups, saved["groups"], strict=told):
        group.update({key: from_plain(value) for key, value in kept["settings"].items()})
