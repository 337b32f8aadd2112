"""What `run.json` says: what was trained, under which plan, and what each rank holds and moves."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from meshwright.view.accounts import (
    Attention,
    Block,
    Collective,
    Conflict,
    Fallback,
    parse_attention,
    parse_block,
    parse_collective,
    parse_conflict,
    parse_fallback,
)
from meshwright.view.fields import finite, integer, mapping, mappings, numbers, shape, text

__all__ = ["Axis", "Parameter", "Rank", "RankMemory", "Setup", "parse_setup"]

Axis = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Rank:
    """A rank and its coordinate on each mesh axis, in the axes' order."""

    rank: int
    coordinates: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter: global shape and bytes, its three layouts, its shape on each rank."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    weights: str
    gradients: str
    optimizer: str
    local: tuple[tuple[int, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class RankMemory:
    """What a rank's memory goes to: (part, bytes), largest kinds first as written.

    Attributes:
        parts: tensors, each part at its most.
        away: (tier, bytes) of what it keeps elsewhere.
        beside: what the process holds beside tensors: shared buffers, what malloc keeps.
        peak: the most of all that at once.
        saving: what a copy for a checkpoint takes on top.
    """

    rank: int
    parts: tuple[tuple[str, int], ...]
    away: tuple[tuple[str, int], ...] = ()
    beside: tuple[tuple[str, int], ...] = ()
    peak: int = 0
    saving: int = 0

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(size for _, size in self.parts)


@dataclass(frozen=True, slots=True)
class Setup:
    """The facts of a run that do not change with its steps.

    Attributes:
        sent: by a stage to others in a step: bytes and messages, of the one that sends most.
        process: bytes of a process that has loaded and traced the job, and holds no tensors of it.
    """

    file: str
    name: str
    started: str
    status: str
    plan: str
    batch_size: int
    microbatches: int
    command: str
    versions: tuple[tuple[str, str], ...]
    host: tuple[tuple[str, str | float], ...]
    axes: tuple[Axis, ...]
    ranks: tuple[Rank, ...]
    parameters: tuple[Parameter, ...]
    collectives: tuple[Collective, ...]
    messages: int
    sent: tuple[int, int]
    fallbacks: tuple[Fallback, ...]
    conflicts: tuple[Conflict, ...]
    attention: tuple[Attention, ...]
    block: Block
    memory: tuple[RankMemory, ...]
    process: int = 0


def parse_setup(run: Mapping[str, Any]) -> Setup:
    """The setup that the decoded `run.json` describes; what is missing is empty."""
    mesh, batch = mapping(run.get("mesh")), mapping(run.get("batch"))
    return Setup(
        file=text(run.get("file")),
        name=text(run.get("name"), "job"),
        started=text(run.get("started")),
        status=text(run.get("status")),
        plan=text(run.get("plan")),
        batch_size=integer(batch.get("batch_size")),
        microbatches=integer(batch.get("microbatches"), 1),
        command=_command(run.get("command")),
        versions=tuple((k, text(v)) for k, v in mapping(run.get("versions")).items()),
        host=tuple((k, _host(v)) for k, v in mapping(run.get("host")).items()),
        axes=_axes(mesh.get("axes")),
        ranks=_ranks(mesh.get("ranks")),
        parameters=tuple(_parameter(entry) for entry in mappings(run.get("parameters"))),
        collectives=tuple(map(parse_collective, mappings(run.get("collectives")))),
        messages=integer(mapping(run.get("traffic")).get("messages")),
        sent=_sent(run.get("pipeline")),
        fallbacks=tuple(map(parse_fallback, mappings(run.get("fallbacks")))),
        conflicts=tuple(map(parse_conflict, mappings(run.get("conflicts")))),
        attention=tuple(map(parse_attention, mappings(run.get("attention")))),
        block=parse_block(run.get("block")),
        memory=tuple(_memory(entry) for entry in mappings(run.get("memory"))),
        process=integer(run.get("process")),
    )


def _sent(pipeline: Any) -> tuple[int, int]:
    entries = mappings(mapping(pipeline).get("traffic"))
    each = ((integer(entry.get("sent")), integer(entry.get("messages"))) for entry in entries)
    return max(each, default=(0, 0))


def _command(value: Any) -> str:
    if isinstance(value, list):
        return shlex.join(text(word) for word in value)
    return text(value)


def _host(value: Any) -> str | float:
    number = finite(value)
    return text(value) if number is None else number


def _axes(value: Any) -> tuple[Axis, ...]:
    pairs = value if isinstance(value, list) else []
    pairs = [pair for pair in pairs if isinstance(pair, list | tuple) and len(pair) == 2]
    return tuple((text(name), integer(size, 1)) for name, size in pairs)


def _ranks(value: Any) -> tuple[Rank, ...]:
    def one(entry: Mapping[str, Any]) -> Rank:
        coordinates = numbers(entry.get("coordinates"))
        return Rank(integer(entry.get("rank")), tuple((a, int(at)) for a, at in coordinates))

    return tuple(one(entry) for entry in mappings(value)) or (Rank(0, ()),)


def _parameter(entry: Mapping[str, Any]) -> Parameter:
    local = mapping(entry.get("local"))
    return Parameter(
        name=text(entry.get("name")),
        shape=shape(entry.get("shape")),
        dtype=text(entry.get("dtype")).removeprefix("torch."),
        bytes=integer(entry.get("bytes")),
        weights=text(entry.get("weights", "replicated"), "none"),
        gradients=text(entry.get("gradients", "replicated"), "none"),
        optimizer=text(entry.get("optimizer", "replicated"), "none"),
        local=tuple((int(rank), shape(size)) for rank, size in local.items() if rank.isdecimal()),
    )


def _memory(entry: Mapping[str, Any]) -> RankMemory:
    parts = tuple((name, int(size)) for name, size in numbers(entry.get("parts")))
    away = tuple((name, integer(size)) for name, size in mapping(entry.get("away")).items())
    beside = tuple((name, int(size)) for name, size in numbers(entry.get("beside")))
    peak, saving = integer(entry.get("peak")), integer(entry.get("saving"))
    return RankMemory(integer(entry.get("rank")), parts, away, beside, peak, saving)
