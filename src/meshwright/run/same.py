"""Whether a checkpoint is of the job that is to go on from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from meshwright.compile.settings import in_dtype
from meshwright.errors import StorageError
from meshwright.run import averaged
from meshwright.run.build import Build
from meshwright.run.checkpoint.claims import require_claims
from meshwright.run.checkpoint.compare import Wanted, compare, describe
from meshwright.run.checkpoint.header import dtype_name
from meshwright.run.checkpoint.restore import Checkpoint
from meshwright.run.imported import found_entries, require_optimizer, stored_names
from meshwright.run.kept import cast_from, may_cast
from meshwright.run.step import RankState
from meshwright.run.worker import Worker

__all__ = ["phase_meta", "require_same_job", "under", "wanted"]


def require_same_job(worker: Worker, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint of another model, optimizer or batch size.

    Raises:
        StorageError: says in what they differ.
    """
    _require_same_phases(worker, checkpoint)
    job, tied = worker.build.job, worker.build.model.tied
    every = {**wanted(worker), **averaged.wanted(worker, checkpoint)}
    names = stored_names(every, checkpoint, tied)
    asked = {n: want for n, want in every.items() if n in names or _needed(n, checkpoint, worker)}
    entries = found_entries(checkpoint, names, tied)
    if may_cast(worker, checkpoint):
        asked = cast_from(asked, entries)
    problems = compare(entries, asked)
    if problems:
        raise StorageError(describe(problems, str(checkpoint.path)))
    if "imported" in checkpoint.meta:
        require_optimizer(checkpoint)
        return
    try:
        require_claims(checkpoint.meta)
    except StorageError as error:
        raise StorageError(f"checkpoint {checkpoint.path} cannot be used: {error}") from None
    for what in ("batch_size", "seed"):
        saved, now = checkpoint.meta[what], {"batch_size": job.batch_size, "seed": job.seed}[what]
        if saved != now:
            raise StorageError(
                f"checkpoint {checkpoint.path} was trained with {what}={saved}, the job has {now}; "
                "samples would be repeated or lost: use the same, or --fresh"
            )
    for phase, (build, state) in worker.phases.items():
        _require_same_optimizer(phase, build, state, checkpoint)


def under(phase: str) -> str:
    """How entries of a phase's optimizer begin; of a job without phases, its only one's."""
    return f"optimizer/{phase}/" if phase else "optimizer/"


def phase_meta(meta: Mapping[str, Any], phase: str) -> Mapping[str, Any]:
    """What a checkpoint says of a phase's optimizer, schedule and scaling."""
    found: Mapping[str, Any] = meta["phases"][phase] if phase else meta
    return found


def _require_same_phases(worker: Worker, checkpoint: Checkpoint) -> None:
    """The job's losses are those of the checkpoint."""
    saved, now = set(checkpoint.meta.get("phases", ())), {name for name in worker.phases if name}
    if saved != now:
        held, asked = (f"phases {', '.join(sorted(x))}" if x else "one loss" for x in (saved, now))
        raise StorageError(
            f"checkpoint {checkpoint.path} is of a job with {held}, this one has {asked}; use the "
            "same phases, or weights= to start from its weights"
        )


def _needed(name: str, checkpoint: Checkpoint, worker: Worker) -> bool:
    """Whether a checkpoint must hold it: other formats keep what a state dict has."""
    kind, _, bare = name.partition("/")
    kept = "imported" not in checkpoint.meta or kind != "buffer"
    return kept or bare in worker.build.model.module.state_dict()


def _require_same_optimizer(
    phase: str, build: Build, state: RankState, checkpoint: Checkpoint
) -> None:
    saved, kind = phase_meta(checkpoint.meta, phase)["optimizer"], type(state.optimizer).__name__
    _require_optimizer_state(phase, checkpoint)
    if saved["class"] != kind:
        raise StorageError(
            f"checkpoint {checkpoint.path} holds the state of {saved['class']}, the job uses "
            f"{kind}; use the same optimizer, or weights= to start from exported weights"
        )
    old, new = saved["groups"], build.recipe.groups
    if len(old) != len(new):
        raise StorageError(
            f"checkpoint {checkpoint.path} has {_counted(len(old))}, the job makes "
            f"{_counted(len(new))}; make the same groups"
        )
    for number, (was, (names, _)) in enumerate(zip(old, new, strict=True)):
        moved = sorted(set(was["parameters"]) ^ set(names))
        if moved:
            where = "the checkpoint's" if moved[0] in was["parameters"] else "the job's"
            raise StorageError(
                f"checkpoint {checkpoint.path}: {moved[0]} is in {where} optimizer group {number} "
                f"only ({len(moved)} such parameters); make the same groups"
            )


def _require_optimizer_state(phase: str, checkpoint: Checkpoint) -> None:
    """What the first rank held of the optimizer must be there: a step with less is another step."""
    begin = under(phase)
    mine = (name.removeprefix(begin) for name in checkpoint.entries if name.startswith(begin))
    found = Counter(name.partition("/")[0] for name in mine)
    slots = phase_meta(checkpoint.meta, phase)["optimizer"].get("slots", {})
    for slot, told in slots.items():
        if found[slot] < told:
            raise StorageError(
                f"checkpoint {checkpoint.path} has the optimizer's {slot} of {found[slot]} of "
                f"{told} parameters; take a whole one, or only its weights (Job(weights=))"
            )


def _counted(groups: int) -> str:
    return "1 optimizer group" if groups == 1 else f"{groups} optimizer groups"


def wanted(worker: Worker) -> dict[str, Wanted]:
    """Every parameter and buffer of the model, whichever rank holds it."""
    model, dtype = worker.build.model, worker.build.dtype
    named = [(f"model/{name}", fake) for name, fake in model.parameters.items()]
    named += [(f"buffer/{name}", fake) for name, fake in model.buffers.items()]
    return {
        name: Wanted(dtype_name(in_dtype(fake.dtype, dtype)), tuple(fake.shape))
        for name, fake in named
    }
