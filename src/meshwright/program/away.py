"""Offload of saved activations: what the backward reads late rests in a tier meanwhile.

    Run -> 0:17                 the forward makes it
    Run 0:17 ->                 and reads it for the last time
    Stash 0:17 -> away/...      it goes to a slot of the tier; here it is freed
    ...
    Load away/... -> ~0:17      two Runs before the backward reads it: copied meanwhile
    Wait ~0:17 -> 0:17          before the first one that does; the slot is free again

A slot holds values of one dtype and shape, of any micro-batch, one after the other. The pass reads
a rank's finished list, so that it is the same for every schedule. Only a value that is alone in its
storage goes: where others view it, nothing would become free.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from meshwright.program.donate import bases
from meshwright.program.instruction import Instruction, InstructionList
from meshwright.program.program import Value

__all__ = ["AWAY", "LEAST", "put_away", "slots"]

AWAY: Final = "away/"
"""How the name of a slot begins."""

LEAST = 1 << 14
"""Bytes of a value below which it stays: a transfer costs more than it frees."""

_FAR: Final = 4  # Runs from one use to the next, at least
_AHEAD: Final = 2  # Runs before its use that a value is loaded


@dataclass(slots=True)
class _Storage:
    """Memory that a Run or a message made, and when any name in it is used."""

    bytes: int
    uses: list[int] = field(default_factory=list)  # places of instructions, in order
    first: dict[str, int] = field(default_factory=dict)  # by name
    last: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Trip:
    """A value that is away between two places; meanwhile its name may have changed."""

    name: str
    again: str
    form: Value
    leaves: int  # after the instruction at this place
    back: int  # before the one at this place


def put_away(lists: InstructionList, tier: str, least: int | None = None) -> InstructionList:
    """The list with saved activations stashed in a tier and loaded ahead of the backward.

    Args:
        lists: a rank's.
        tier: `host` or `disk`.
        least: bytes of a value that goes; LEAST by default.
    """
    runs = _runs_before(lists.body)
    trips = _trips(lists, runs, LEAST if least is None else least)
    return replace(lists, body=_written(lists.body, trips, runs, tier))


def slots(lists: InstructionList) -> dict[str, Value]:
    """The slots of a list's tier, and what each holds."""
    walk, found = _Walk(lists), dict[str, Value]()
    for place, each in enumerate(lists.body):
        if each.kind == "Stash" and each.offloads and each.outputs[0].startswith(AWAY):
            found[each.outputs[0]] = walk.forms[each.inputs[0]]
        walk.take(place, each)
    return found


def _runs_before(body: Sequence[Instruction]) -> list[int]:
    """Of each place, and of the end, how many Runs come before it."""
    found = [0]
    for each in body:
        found.append(found[-1] + (each.kind == "Run"))
    return found


class _Walk:
    """Goes through a list and learns which names lie in which storage."""

    def __init__(self, lists: InstructionList) -> None:
        self.lists = lists
        self.held: dict[str, _Storage] = {}
        self.forms: dict[str, Value] = {}
        self.all: list[_Storage] = []
        self.renamed: dict[str, tuple[str, int]] = {}  # new name -> the old one, and where
        self.renames: Counter[str] = Counter()
        self._bases: dict[int, dict[int, int]] = {}

    def take(self, place: int, each: Instruction) -> None:
        """Go on by one instruction."""
        if each.kind in ("Run", "Start", "Send") or each.offloads:
            for name in each.inputs:
                self._use(name, place)
        if each.kind == "Run":
            self._run(place, each)
        elif each.kind == "Wait" and each.peer is not None and each.outputs:
            assert each.segment is not None
            values = self.lists.messages[each.segment].values
            for name, value in zip(each.outputs, values, strict=True):
                self._make(name, value, value.bytes, place)
        elif each.kind == "Stash" and not each.offloads:
            for source, name in zip(each.inputs, each.outputs, strict=True):
                self._rename(source, name, place)
        elif each.kind != "Free":
            for name in each.outputs:
                self._alias(name, None, None, place)

    def _run(self, place: int, each: Instruction) -> None:
        assert each.segment is not None
        program = self.lists.segments[each.segment]
        if each.segment not in self._bases:
            self._bases[each.segment] = bases(program)
        base = self._bases[each.segment]
        given = {v: n for (_, v), n in zip(program.inputs, each.inputs, strict=True)}
        made: dict[int, _Storage] = {}
        for (_, value), name in zip(program.outputs, each.outputs, strict=True):
            root, form = base[value], program.values[value]
            if root in given:
                self._alias(name, self.held.get(given[root]), form, place)
            elif root in made:
                self._alias(name, made[root], form, place)
            else:
                made[root] = self._make(name, form, program.values[root].bytes, place)

    def _rename(self, source: str, name: str, place: int) -> None:
        """Between values of micro-batches a new name is no use; as state a value is wanted."""
        storage, form = self.held.get(source), self.forms.get(source)
        if ":" in name and storage is not None and form is not None:
            self.held[name], self.forms[name] = storage, form
            storage.first[name] = place
            self.renamed[name] = source, place
            self.renames[source] += 1
        else:
            self._use(source, place)
            self._alias(name, storage, form, place)

    def _make(self, name: str, form: Value, size: int, place: int) -> _Storage:
        storage = _Storage(size)
        self.all.append(storage)
        self._alias(name, storage, form, place)
        return storage

    def _alias(self, name: str, storage: _Storage | None, form: Value | None, place: int) -> None:
        self.held.pop(name, None)
        if storage is not None and form is not None:
            self.held[name], self.forms[name] = storage, form
            storage.first[name] = place
            self._use(name, place)

    def _use(self, name: str, place: int) -> None:
        storage = self.held.get(name)
        if storage is not None:
            storage.uses.append(place)
            storage.last[name] = place


def _trips(lists: InstructionList, runs: Sequence[int], least: int) -> list[_Trip]:
    walk = _Walk(lists)
    for place, each in enumerate(lists.body):
        walk.take(place, each)
    found = []
    for storage in walk.all:
        pairs = list(zip(storage.uses, storage.uses[1:], strict=False))
        if storage.bytes < least or not pairs:
            continue
        leaves, back = max(pairs, key=lambda pair: runs[pair[1]] - runs[pair[0] + 1])
        if runs[back] - runs[leaves + 1] < _FAR:
            continue
        after = [name for name, last in storage.last.items() if last >= back]
        if len(after) == 1 and (name := _called(walk, storage, after[0], leaves)) is not None:
            found.append(_Trip(name, after[0], walk.forms[after[0]], leaves, back))
    return found


def _called(walk: _Walk, storage: _Storage, name: str, place: int) -> str | None:
    """What a value is called right after a place; None where it must not go."""
    while storage.first[name] > place:
        if name not in walk.renamed:
            return None
        name, _ = walk.renamed[name]
        if walk.renames[name] > 1:
            return None
    return name if ":" in name else None


def _written(
    body: Sequence[Instruction], trips: Sequence[_Trip], runs: Sequence[int], tier: str
) -> tuple[Instruction, ...]:
    """The body with the trips in it; slots are dealt out in its order."""
    leaving: dict[int, list[_Trip]] = defaultdict(list)
    coming: dict[int, list[_Trip]] = defaultdict(list)
    loading: dict[int, list[_Trip]] = defaultdict(list)
    away = {trip.again: trip.name for trip in trips}
    starts = [place for place, each in enumerate(body) if each.kind == "Run"]
    for trip in trips:
        leaving[trip.leaves].append(trip)
        coming[trip.back].append(trip)
        ahead = runs[trip.back] - _AHEAD
        begin = starts[ahead] if ahead >= 0 else 0
        loading[max(begin, trip.leaves + 1)].append(trip)
    free: dict[Value, list[str]] = defaultdict(list)
    made: dict[Value, int] = defaultdict(int)
    slots: dict[tuple[str, int], str] = {}
    found: list[Instruction] = []
    for place, each in enumerate(body):
        for trip in loading[place]:
            micro, slot = body[trip.back].microbatch, slots[trip.name, trip.leaves]
            load = Instruction("Load", None, micro, 0, (slot,), (f"~{trip.again}",), tier)
            found.append(load)
        for trip in coming[place]:
            names = (f"~{trip.again}",), (trip.again,)
            found.append(Instruction("Wait", None, each.microbatch, 0, *names, tier))
            free[trip.form].append(slots[trip.name, trip.leaves])
        found += _without(each, away)
        for trip in leaving[place]:
            if not free[trip.form]:
                free[trip.form].append(_slot(trip.form, made[trip.form]))
                made[trip.form] += 1
            slot = slots[trip.name, trip.leaves] = free[trip.form].pop()
            put = Instruction("Stash", None, each.microbatch, 0, (trip.name,), (slot,), tier)
            gone = Instruction("Free", None, each.microbatch, 0, (trip.name,))
            found += [put, gone]
    return tuple(found)


def _without(each: Instruction, away: Mapping[str, str]) -> list[Instruction]:
    """A Stash without the new names of what is away."""
    if each.kind != "Stash" or each.offloads or away.keys().isdisjoint(each.outputs):
        return [each]
    pairs = [
        pair
        for pair in zip(each.inputs, each.outputs, strict=True)
        if away.get(pair[1], pair[1]) == pair[1]
    ]
    inputs, outputs = tuple(a for a, _ in pairs), tuple(b for _, b in pairs)
    return [replace(each, inputs=inputs, outputs=outputs)] if pairs else []


def _slot(form: Value, number: int) -> str:
    shape = "x".join(map(str, form.shape)) or "scalar"
    return f"{AWAY}{form.dtype}-{shape}/{number}"
