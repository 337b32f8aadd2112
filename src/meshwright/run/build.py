"""From a job and a plan to what ranks run: blueprint, layouts, traced units, lowered lists.

A `Build` is per process and shared by all ranks that the process drives; it caches what equal
batches and equal ranks have in common.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.comm.base import Group
from meshwright.compile.example import Example
from meshwright.compile.init import Blueprint
from meshwright.compile.lower import Segment, lower
from meshwright.compile.precision import promoting
from meshwright.compile.region import FLOAT32, Precision
from meshwright.compile.settings import in_dtype
from meshwright.compile.unit import Unit, trace_unit
from meshwright.job import Job
from meshwright.plan.mesh import SAMPLE_AXES, Axis, Mesh
from meshwright.plan.plan import Plan
from meshwright.plan.sliced import split_slices
from meshwright.program.assemble import Compiled, assemble
from meshwright.program.attention import formed
from meshwright.program.away import put_away
from meshwright.program.context import split_sequences
from meshwright.program.dispatch import dispatched
from meshwright.program.fallback import require_small
from meshwright.program.layout import chunk
from meshwright.program.offload import MOVED, offloaded, viewed_again
from meshwright.program.program import Program, Value
from meshwright.program.slices import require_apart, squared
from meshwright.program.vocabulary import split_losses
from meshwright.program.zero import StateLayouts, gathered_once
from meshwright.run.executor import Place
from meshwright.run.optimizer.joint import Traces
from meshwright.run.optimizer.recipe import Recipe
from meshwright.run.remat import Chosen, kept_by
from meshwright.run.staged import Staged
from meshwright.schedule.assemble import assemble_stages
from meshwright.schedule.locals import Micro as StageMicro
from meshwright.schedule.locals import open_unit
from meshwright.schedule.post import Post, tied_axis

__all__ = ["Build", "Lowered", "Micro", "has_batch_norm", "mesh_of", "micro_ranges", "values_of"]


def mesh_of(plan: Plan) -> Mesh:
    """The mesh of a plan whose `data` is filled."""
    sizes = {name: size for name, size in plan.sizes.items() if name != "pipeline"}
    if plan.shard is not None:
        sizes |= {"data": sizes["data"] // plan.shard, "shard": plan.shard}
    replicas = plan.widths if plan.replicas is not None else ()
    return Mesh.of(plan.pipeline, replicas, **sizes)


def micro_ranges(samples: int, microbatches: int) -> tuple[tuple[int, int], ...]:
    """(start, stop) of each micro-batch within a global batch; sizes differ by one at most."""
    parts = (chunk(samples, microbatches, k) for k in range(microbatches))
    return tuple((start, start + length) for start, length in parts)


@dataclass(frozen=True, slots=True)
class Micro:
    """The form of one micro-batch: what its leaves look like, and how many samples it has."""

    example: Example
    samples: int

    @property
    def key(self) -> str:
        """Equal for micro-batches that run the same program."""
        return f"{self.samples} {self.example.key}"


@dataclass(frozen=True, slots=True)
class Lowered:
    """A rank's compiled list with its segments as callables.

    Attributes:
        totals: the sums of a step over all ranks, of which a stage makes some.
    """

    compiled: Compiled
    functions: tuple[Segment, ...]
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    totals: tuple[str, ...] = ()


@dataclass(slots=True)
class Build:
    """A job under a plan.

    Attributes:
        dtype: of all floating tensors, where it is not their own (float64 to verify).
        states: layouts of every parameter's state.
        compiled: segments run compiled by inductor.
        precision: of the plan, its patterns resolved.
        stages: of a pipeline, a traced micro-batch and the stages of its ops; None without one.
        chosen: what is saved for the backward, where the plan has a budget.
        traces: of an optimizer that is not elementwise, where its state is sharded.
        offload: the folder of what is offloaded to disk.
    """

    job: Job
    plan: Plan
    mesh: Mesh
    model: Blueprint
    recipe: Recipe
    states: dict[str, StateLayouts]
    dtype: torch.dtype | None = None
    compiled: bool = False
    precision: Precision = FLOAT32
    stages: Staged | None = None
    chosen: Chosen | None = None
    traces: Traces | None = None
    offload: Path = field(default_factory=lambda: Path(gettempdir()) / "meshwright-offload")
    units: dict[tuple[Hashable, ...], Unit] = field(default_factory=dict)
    lists: dict[tuple[Hashable, ...], Lowered] = field(default_factory=dict)
    micros: dict[tuple[Hashable, ...], StageMicro] = field(default_factory=dict)
    unhashable: dict[int, Callable[..., Any]] = field(default_factory=dict)

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Axes that a micro-batch is split over, alike in all stages; replicas take turns."""
        axes = self.mesh.stages[0].axes
        if self.plan.replicas is None:
            return axes
        return tuple(Axis("data", 1) if axis.name == "data" else axis for axis in axes)

    def within(self, rank: int) -> tuple[int, int, dict[str, int]]:
        """A rank's stage, which of its replicas it is, and its coordinates within that."""
        stage, coordinates = self.mesh.coordinates(rank)
        if self.plan.replicas is None:
            return stage, 0, coordinates
        return stage, coordinates["data"], {**coordinates, "data": 0}

    def replicas(self, rank: int) -> Group:
        """The ranks that take turns with a rank."""
        if self.plan.replicas is None:
            return Group("replicas", (rank,))
        return Group("replicas", self.mesh.group(rank, "data"))

    def peer(self, rank: int, stage: int, replica: int) -> int:
        """The rank of another stage that lies as this one does, in one of its replicas."""
        _, coordinates = self.mesh.coordinates(rank)
        if self.plan.replicas is not None:
            coordinates = {**coordinates, "data": replica}
        return self.mesh.rank(stage, coordinates)

    def lines(self, rank: int) -> tuple[Axis, ...]:
        """All axes along which a rank communicates: its stage's, and those of tied parameters."""
        groups = self.place(rank).groups.items()
        known = {"world", *(axis.name for axis in self.axes)}
        tied = (Axis(name, len(group.ranks)) for name, group in groups if name not in known)
        return (*self.axes, *tied)

    @property
    def promotes(self) -> bool:
        """Whether programs are traced in the plan's precision and run promoted to `dtype`."""
        return self.dtype is not None and self.precision.short

    def values(self) -> dict[str, Value]:
        """Dtype and global shape of every parameter."""
        return values_of(self.model.parameters, self.dtype)

    @property
    def everyone(self) -> Group:
        """All ranks."""
        return self.place(0).groups["world"]

    def place(self, rank: int) -> Place:
        """Coordinates and groups of a rank."""
        stage, _, coordinates = self.within(rank)
        groups = {a.name: Group(a.name, self.mesh.group(rank, a.name)) for a in self.axes}
        if self.plan.replicas is not None:
            groups["data"] = Group("data", (rank,))
        for homes in set(self.homes.values()):
            holders = tuple(r for home in homes for r in self.seats(rank)[home])
            if len(holders) > 1 and stage in homes:
                name = tied_axis(homes)
                groups[name] = Group(name, holders)
                coordinates[name] = holders.index(rank)
        data = groups["data"]  # where it is all there is, it is the world
        every = data if len(data.ranks) == self.mesh.size else Group.world(self.mesh.size)
        groups["world"] = every
        return Place(coordinates, groups, rank)

    def peers(self, rank: int) -> tuple[int, ...]:
        """By pipeline rank, the rank that has the same coordinates in its stage."""
        return tuple(self.peer(rank, stage, 0) for stage in range(len(self.mesh.stages)))

    def seats(self, rank: int) -> tuple[tuple[int, ...], ...]:
        """By pipeline rank, the ranks with the same coordinates in each of its replicas."""
        widths = (
            self.plan.widths if self.plan.replicas is not None else (1,) * len(self.mesh.stages)
        )
        return tuple(
            tuple(self.peer(rank, stage, replica) for replica in range(width))
            for stage, width in enumerate(widths)
        )

    @property
    def homes(self) -> Mapping[str, tuple[int, ...]]:
        """The pipeline ranks that hold each parameter and buffer, by `model/` or `buffer/` name."""
        return {} if self.stages is None else self.stages.homes

    def holds(self, rank: int, name: str) -> bool:
        """Whether a rank holds state: a `model/` parameter or a `buffer/`."""
        return self.mesh.coordinates(rank)[0] in self.homes.get(name, range(len(self.mesh.stages)))

    def counts(self, rank: int, name: str) -> bool:
        """Whether a rank is of the first stage that holds state: each is counted there once."""
        stage, replica, _ = self.within(rank)
        return not replica and stage == self.homes.get(name, (0,))[0]

    def unit(
        self, micro: Micro, loss: Callable[[nn.Module, Any], Any] | None = None, **how: bool
    ) -> Unit:
        """The traced program of a micro-batch form; traced once."""
        function = loss or self.job.loss
        precision = self.precision
        stage = self.mesh.stages[0]
        splits = stage.axis_size("tensor") > 1, stage.axis_size("expert") > 1
        split = *splits, *self._shared_sequences(), self._fetches, self._saves_away, self.slices
        key = (micro.key, self._identity(function), precision, split, tuple(sorted(how.items())))
        if key not in self.units:
            unit = trace_unit(
                self.model,
                function,
                micro.example,
                micro.samples,
                dtype=None if self.promotes else self.dtype,
                precision=precision,
                **how,
            )
            self.units[key] = self._split(unit)
        return self.units[key]

    @property
    def slices(self) -> tuple[str, ...] | None:
        """Axes whose ranks have slices of their own of a batch; None where it has no slices."""
        if self.job.adascale is None:
            return None
        over = ("data", "shard") if split_slices(self.plan, self.job.adascale.scale) else ()
        return tuple(axis.name for axis in self.axes if axis.name in over)

    @property
    def slicing(self) -> int:
        """How many ranks have slices of their own of a micro-batch."""
        return math.prod(axis.size for axis in self.axes if axis.name in (self.slices or ()))

    @property
    def _fetches(self) -> bool:
        """Whether weights come whole from another tier; under ZeRO-3 they are gathered anyway."""
        return "params" in self.plan.offloads and self.plan.zero < 3

    @property
    def _saves_away(self) -> bool:
        """Whether saved activations rest in another tier."""
        return "activations" in self.plan.offloads

    def _shared_sequences(self) -> tuple[Hashable, ...]:
        """What programs whose sequences are split depend on."""
        stage = self.mesh.stages[0]
        parts = stage.axis_size("context")
        return (parts, self.plan.attention, stage.axis_size("tensor")) if parts > 1 else (parts,)

    def _split(self, unit: Unit) -> Unit:
        """The unit with what the mesh's axes need: ops that may be split, annotations."""
        stage, program, attention = self.mesh.stages[0], unit.program, unit.attention
        if (tensor := stage.axis_size("tensor")) > 1:
            program = split_losses(program)
        if (parts := stage.axis_size("context")) > 1:
            program = split_sequences(program, parts)
            program, attention = formed(program, parts, tensor, self.plan.attention)
        if stage.axis_size("expert") > 1:
            program = dispatched(program)
        if self.slices is not None:
            program = squared(program, self.slices)
        if self._fetches or self._saves_away:
            program = viewed_again(program, all_values=self._saves_away)
        return replace(unit, program=program, attention=attention)

    def lowered(
        self,
        rank: int,
        micros: Sequence[Micro],
        loss: Callable[[nn.Module, Any], Any] | None = None,
        **how: bool,
    ) -> Lowered:
        """The instruction list of `rank` for a step of these micro-batches."""
        function = self._identity(loss or self.job.loss)
        key = (rank, tuple(m.key for m in micros), function, tuple(sorted(how.items())))
        if key not in self.lists:
            place = self.place(rank)
            units = [self.unit(m, loss, **how) for m in micros]
            programs = [unit.program for unit in units]
            compiled = (
                assemble(
                    programs,
                    self.axes,
                    place.coordinates,
                    self.states,
                    sequence=self.plan.sequence == "tensor",
                    kept=self.kept,
                    fine=self._saves_away,
                )
                if self.stages is None
                else self._staged(rank, programs, training=how.get("training", True))
            )
            if how.get("training", True):
                self._require_slices(compiled)
            compiled = self._offloaded(compiled, training=how.get("training", True))
            require_small(compiled, self.axes, self.plan.max_fallback * 2**20)
            functions = self.lower(rank, compiled.instructions.segments)
            constants = {name: t for unit in units for name, t in unit.constants.items()}
            found = (name for unit in units for name, _ in unit.program.outputs)
            totals = tuple(dict.fromkeys(name for name in found if name.startswith("total/")))
            self.lists[key] = Lowered(compiled, functions, constants, totals)
        return self.lists[key]

    def _require_slices(self, compiled: Compiled) -> None:
        """What ranks have slices of for AdaScale is made of these alone."""
        adascale, axes = self.job.adascale, self.axes
        over = [axis.name for axis in axes if axis.name in (self.slices or ()) and axis.size > 1]
        if adascale is not None and over:
            for _, local in compiled.units:
                require_apart(local, over, f"use microbatches={adascale.scale}, each a slice")

    def _offloaded(self, compiled: Compiled, *, training: bool) -> Compiled:
        """The list with loads and stashes of what the plan offloads."""
        tiers = {part: tier for part, tier in self.plan.offloads.items() if part in MOVED}
        if self.plan.asynchronous:
            return compiled
        lists = compiled.instructions
        if training and "activations" in self.plan.offloads:
            lists = put_away(lists, self.plan.offloads["activations"])
        if tiers:
            weights = [f"model/{name}" for name in self.model.parameters]
            lists = offloaded(lists, weights, tiers)
        return replace(compiled, instructions=lists)

    def kept(self, program: Program) -> frozenset[int] | None:
        """The forward values of a micro-batch, as it is placed, that the backward may read."""
        return kept_by(self.plan, program, self.chosen)

    def lower(self, rank: int, segments: Sequence[Program]) -> tuple[Segment, ...]:
        """What runs a rank's segments."""
        coordinates = self.place(rank).coordinates
        return tuple(
            promoting(lower(segment, coordinates))
            if self.promotes
            else lower(segment, coordinates, self.dtype, compiled=self.compiled)
            for segment in segments
        )

    def _staged(self, rank: int, programs: Sequence[Program], *, training: bool) -> Compiled:
        """The list of a rank of a pipeline."""
        assert self.stages is not None
        place = self.place(rank)
        name = self.plan.order if training else "fill-drain"
        schedule = self.stages.schedule(name, len(programs))
        homes = {n.removeprefix("model/"): h for n, h in self.homes.items() if "model/" in n}
        pipeline, replica, _ = self.within(rank)
        post = Post(pipeline, replica, self.seats(rank), self.axes, place.coordinates, homes)
        each = [self.staged_micro(rank, program) for program in programs]
        return assemble_stages(schedule, each, self.states, post, fine=self._saves_away)

    def staged_micro(self, rank: int, program: Program) -> StageMicro:
        """A traced micro-batch cut into tasks, as ranks with this one's coordinates run them."""
        assert self.stages is not None
        _, _, coordinates = self.within(rank)
        key = (id(program), tuple(coordinates.values()))  # what is kept holds the program
        if key not in self.micros:
            states: Mapping[str, StateLayouts] = self.states
            if self.plan.gather == "step":
                states = {n: gathered_once(s) for n, s in states.items()}
            unit = open_unit(program, self.states)
            self.micros[key] = StageMicro.of(
                program,
                unit,
                self.stages.of(unit),
                self.axes,
                coordinates,
                states,
                sequence=self.plan.sequence == "tensor",
                kept=self.kept(unit),
            )
        return self.micros[key]

    def _identity(self, function: Callable[..., Any]) -> Hashable:
        """What tells functions apart; it holds them, since the id of one that is gone is reused."""
        if type(function).__hash__ is not None:
            return function
        self.unhashable[id(function)] = function
        return id(function)

    def samples_of(self, rank: int, range_: tuple[int, int]) -> tuple[int, int]:
        """(start, stop) of the samples of a micro-batch that `rank` loads."""
        _, _, coordinates = self.within(rank)
        start, stop = range_
        axes = [axis for axis in self.axes if axis.name in SAMPLE_AXES]
        if stop - start < math.prod(axis.size for axis in axes):
            return range_
        for axis in axes:
            first, length = chunk(stop - start, axis.size, coordinates[axis.name])
            start, stop = start + first, start + first + length
        return start, stop


def values_of(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Value]:
    """Dtypes and shapes, by name."""
    found = {}
    for name, tensor in tensors.items():
        kind = str(in_dtype(tensor.dtype, dtype)).removeprefix("torch.")
        found[name] = Value(kind, tuple(tensor.shape))
    return found


_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def has_batch_norm(module: nn.Module) -> bool:
    """Whether statistics over samples are taken in training."""
    return any(isinstance(part, _NORMS) for part in module.modules())
