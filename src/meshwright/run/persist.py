"""A rank's state to a checkpoint and back, under any plan; and out to whole tensors."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meshwright.comm.base import Group
from meshwright.compile.interpret import interpret
from meshwright.errors import StorageError
from meshwright.program.assemble import move_program
from meshwright.program.layout import REPLICATED, Layout, region
from meshwright.program.program import Value
from meshwright.run.checkpoint import Checkpoint, Piece, save
from meshwright.run.compare import Wanted, compare, describe
from meshwright.run.match import compare as match
from meshwright.run.plain import from_plain, to_plain
from meshwright.run.shard import dtype_name
from meshwright.run.weights import read
from meshwright.run.worker import Bounds, Make, Worker

__all__ = ["given_weights", "pieces_of", "restore", "save_worker", "whole_weights"]


def _first(worker: Worker) -> bool:
    """Whether this rank keeps the replica that is written."""
    return all(index == 0 for index in worker.place.coordinates.values())


def _piece(
    worker: Worker, name: str, shape: tuple[int, ...], layout: Layout, part: Tensor
) -> Piece:
    bounds = region(shape, layout, worker.build.axes, worker.place.coordinates)
    primary = _first(worker) or bool(layout.placements)
    return Piece(name, shape, tuple(start for start, _ in bounds), part, primary)


def pieces_of(worker: Worker) -> list[Piece]:
    """Everything this rank holds, by global name."""
    build, found = worker.build, []
    for name, tensor in worker.state.values.items():
        kind, _, bare = name.partition("/")
        if kind == "model":
            shape = tuple(build.model.parameters[bare].shape)
            found.append(_piece(worker, name, shape, build.states[bare].weights, tensor))
        elif kind == "buffer":
            found.append(_piece(worker, name, tuple(tensor.shape), REPLICATED, tensor))
    for bare, shard in worker.state.shards.items():
        shape, layout = tuple(build.model.parameters[bare].shape), build.states[bare].optimizer
        for slot, held in worker.state.optimizer.state.get(shard, {}).items():
            name = f"optimizer/{slot}/{bare}"
            value = held if isinstance(held, Tensor) else torch.tensor(held)
            if value.shape == shard.shape and value.dim():
                found.append(_piece(worker, name, shape, layout, value))
            else:
                found.append(_piece(worker, name, tuple(value.shape), REPLICATED, value))
    return found


def meta_of(worker: Worker, step: int, extra: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says beside tensors."""
    state, job = worker.state, worker.build.job
    groups = [
        {
            key: to_plain(value, f"optimizer group setting {key}")
            for key, value in group.items()
            if _kept(key, value)
        }
        for group in state.optimizer.param_groups
    ]
    scheduler = None if state.scheduler is None else to_plain(state.scheduler.state_dict())
    data = None if worker.source is None else worker.source.state(step)
    return {
        "plan": worker.build.plan.text() if not worker.build.plan.layouts else "",
        "batch_size": job.batch_size,
        "seed": job.seed,
        "optimizer": {"class": type(state.optimizer).__name__, "groups": groups},
        "scheduler": scheduler,
        "data": data,
        "extra": dict(extra),
    }


def _kept(key: str, value: Any) -> bool:
    return key != "params" and (
        value is None or isinstance(value, bool | int | float | str | tuple | list | Tensor)
    )


def save_worker(
    worker: Worker, root: Path, step: int, extra: Mapping[str, Any], keep: int
) -> Generator[Any, Any, Path]:
    """Save this rank's part of the checkpoint after `step` steps; an exchange."""
    group = Group.world(worker.build.mesh.size)
    meta = meta_of(worker, step, extra)
    path = yield from save(root, step, pieces_of(worker), meta, group, worker.rank, keep)
    return path


def restore(worker: Worker, checkpoint: Checkpoint) -> dict[str, Any]:
    """Fill this rank's state from a checkpoint of any plan; its `extra`.

    Raises:
        StorageError: it is of another model, optimizer or batch size.
    """
    _require_same_job(worker, checkpoint)
    values = worker.state.values
    axes, coordinates = worker.build.axes, worker.place.coordinates
    for name, tensor in values.items():
        kind, _, bare = name.partition("/")
        if kind == "model":
            fake = worker.build.model.parameters[bare]
            bounds = region(tuple(fake.shape), worker.build.states[bare].weights, axes, coordinates)
            checkpoint.read_into(tensor, name, tuple(start for start, _ in bounds))
        elif kind == "buffer":
            checkpoint.read_into(tensor, name, (0,) * tensor.dim())
    _restore_optimizer(worker, checkpoint)
    meta = checkpoint.meta
    for group, saved in zip(
        worker.state.optimizer.param_groups, meta["optimizer"]["groups"], strict=True
    ):
        group.update({key: from_plain(value) for key, value in saved.items()})
    if worker.state.scheduler is not None and meta["scheduler"] is not None:
        worker.state.scheduler.load_state_dict(from_plain(meta["scheduler"]))
    if worker.source is not None and meta["data"] is not None:
        worker.source.restore(meta["data"])
    return dict(meta["extra"])


def _require_same_job(worker: Worker, checkpoint: Checkpoint) -> None:
    build = worker.build
    wanted = {
        name: Wanted(dtype_name(t.dtype), _whole_shape(worker, name, t))
        for name, t in worker.state.values.items()
        if name.startswith(("model/", "buffer/"))
    }
    entries = {n: e for n, e in checkpoint.entries.items() if n.startswith(("model/", "buffer/"))}
    problems = compare(entries, wanted)
    if problems:
        raise StorageError(describe(problems, str(checkpoint.path)))
    meta = checkpoint.meta
    if meta["batch_size"] != build.job.batch_size:
        raise StorageError(
            f"checkpoint {checkpoint.path} was trained with batch_size={meta['batch_size']}, the "
            "job has"
            f" {build.job.batch_size}; samples would be repeated or lost: use the same, or --fresh"
        )
    kind = type(worker.state.optimizer).__name__
    if meta["optimizer"]["class"] != kind:
        raise StorageError(
            f"checkpoint {checkpoint.path} holds the state of {meta['optimizer']['class']}, the "
            "job uses"
            f" {kind}; use the same optimizer, or weights= to start from exported weights"
        )
    groups = len(meta["optimizer"]["groups"])
    if groups != len(worker.state.optimizer.param_groups):
        raise StorageError(
            f"checkpoint {checkpoint.path} has {groups} optimizer groups, the job makes "
            f"{len(worker.state.optimizer.param_groups)}; make the same groups"
        )


def _whole_shape(worker: Worker, name: str, tensor: Tensor) -> tuple[int, ...]:
    kind, _, bare = name.partition("/")
    return tuple(worker.build.model.parameters[bare].shape if kind == "model" else tensor.shape)


def _restore_optimizer(worker: Worker, checkpoint: Checkpoint) -> None:
    axes, coordinates = worker.build.axes, worker.place.coordinates
    for bare, shard in worker.state.shards.items():
        whole = tuple(worker.build.model.parameters[bare].shape)
        bounds = region(whole, worker.build.states[bare].optimizer, axes, coordinates)
        for name, entry in checkpoint.entries.items():
            kind, _, rest = name.partition("/")
            slot, _, parameter = rest.partition("/")
            if kind != "optimizer" or parameter != bare:
                continue
            start = tuple(s for s, _ in bounds)
            shape = tuple(n for _, n in bounds)
            tensor = (
                checkpoint.read(name, start, shape)
                if entry.shape == whole and whole
                else checkpoint.read(name)
            )
            worker.state.optimizer.state[shard][slot] = tensor


def given_weights(worker_build: Any, path: str | Path) -> tuple[Make, list[str]]:
    """How to read the job's `weights` for a rank, and what to tell the user.

    Raises:
        StorageError: names or shapes do not fit, all problems at once.
    """
    model = worker_build.model
    weights = read(path)
    shapes = {
        name: tuple(t.shape) for name, t in (*model.parameters.items(), *model.buffers.items())
    }
    persistent = set(model.module.state_dict())
    wanted = {n: s for n, s in shapes.items() if n in persistent or n in model.parameters}
    found = match(weights.shapes(), wanted, model.tied, where=str(path))

    def make(name: str, _: Tensor, bounds: Bounds) -> Tensor | None:
        source = found.sources.get(name.partition("/")[2])
        if source is None or name.startswith("constant/"):
            return None
        start, shape = tuple(s for s, _ in bounds), tuple(n for _, n in bounds)
        return weights.slice(source, start, shape)

    return make, list(found.notes)


def whole_weights(worker: Worker) -> Generator[Any, Any, dict[str, Tensor]]:
    """Every parameter and persistent buffer whole, by the model's own names; an exchange.

    All ranks take part and all get them, one parameter's gather at a time.
    """
    build, values = worker.build, worker.state.values
    found: dict[str, Tensor] = {}
    for name, fake in build.model.parameters.items():
        layout = build.states[name].weights
        tensor = values[f"model/{name}"]
        if layout.placements:
            value = Value(str(tensor.dtype).removeprefix("torch."), tuple(fake.shape))
            local = move_program(
                {name: (value, layout, REPLICATED)}, build.axes, worker.place.coordinates
            )
            outputs = yield from interpret(
                local.program, {name: tensor}, worker.place.coordinates, worker.place.groups
            )
            tensor = outputs[name]
        found[name] = tensor
    persistent = set(build.model.module.state_dict())
    for name in build.model.buffers:
        if name in persistent:
            found[name] = values[f"buffer/{name}"]
    return found


def in_order(worker: Worker, whole: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors in the order of the model's state_dict; tied ones once."""
    for name in worker.build.model.module.state_dict():
        if name in whole:
            yield name, whole[name]
