"""Endless: what a rank of an asynchronous pipeline does for one micro-batch, as instructions.

forward    Recv, Wait, Load, the task's pieces, Finish (its sums join those that came along), Send
backward   Recv, Wait, the task's pieces, Send; the sums of all stages come back with the gradients
step       Agree among replicas, Update, Commit

A micro-batch's values live from its forward, in one step, to its backward, in a later one; they go
by the number of a *slot* that is taken again when it is free. What belongs to a whole minibatch
(sums, buffers) goes by that of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from meshwright.program.instruction import Instruction, Message
from meshwright.program.layout import local_shape
from meshwright.program.pieces import Table, run_pieces, with_frees
from meshwright.program.program import Value
from meshwright.program.stage import Key, Kind, named
from meshwright.schedule.action import Action, Schedule
from meshwright.schedule.locals import Micro
from meshwright.schedule.messages import Sent, messages

__all__ = ["Endless", "Passing", "Turn", "at"]

_MARK = "boundary:"
"""Stands between forward and backward while it is found out what lives how long."""


def at(minibatch: int, name: str) -> str:
    """What a minibatch's value is called."""
    return f"at{minibatch}/{name}"


@dataclass(frozen=True, slots=True)
class Turn:
    """One micro-batch's turn on a rank.

    Attributes:
        slot: of the micro-batch.
        minibatch: the slot of its minibatch.
        first, last: of its minibatch.
        peers: of each stage, the rank that takes it.
        others: of its last stage, the ranks that take no part in it.
    """

    slot: int
    minibatch: int
    first: bool
    last: bool
    peers: tuple[int, ...]
    others: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Passing:
    """A micro-batch's turn as instructions."""

    forward: tuple[Instruction, ...]
    backward: tuple[Instruction, ...]

    def aged(self, forward: int, backward: int) -> Passing:
        """The same with weights that are so many updates older than the newest."""
        return Passing(
            tuple(replace(each, version=forward) for each in self.forward)
            if forward
            else self.forward,
            tuple(replace(each, version=backward) for each in self.backward)
            if backward
            else self.backward,
        )


@dataclass(slots=True)
class Endless:
    """Assembles the turns of a rank; its tables grow with what is new.

    Attributes:
        stage: the rank's.
        sums: how many numbers ride along with each minibatch.
        alone: no other rank shares the last stage's sums of a minibatch.
    """

    stage: int
    stages: int
    sums: int
    alone: bool
    table: Table = field(default_factory=Table)
    told: list[Message] = field(default_factory=list)
    _numbers: dict[Message, int] = field(default_factory=dict)
    _known: dict[tuple[int, Turn, int, int], tuple[Micro, Passing]] = field(default_factory=dict)
    _sent: dict[int, tuple[Micro, tuple[Sent, ...]]] = field(default_factory=dict)

    def passing(self, micro: Micro, turn: Turn, forward: int = 0, backward: int = 0) -> Passing:
        """The instructions of a turn, whose weights are so many updates older than the newest."""
        key = id(micro), turn, forward, backward
        if key not in self._known:
            if forward or backward:
                made = self.passing(micro, turn).aged(forward, backward)
            else:
                made = _Assembler(self, micro, turn).run()
            self._known[key] = micro, made
        return self._known[key][1]

    def sent(self, micro: Micro) -> tuple[Sent, ...]:
        """All messages of a micro-batch, between any two stages."""
        if id(micro) not in self._sent:
            order = tuple(
                (Action(stage, "F", 0), Action(stage, "B", 0)) for stage in range(self.stages)
            )
            schedule = Schedule("one micro-batch", tuple(range(self.stages)), 1, order)
            self._sent[id(micro)] = micro, messages(schedule, [micro.tasks])
        return self._sent[id(micro)][1]

    def heard(self, minibatch: int, source: int) -> tuple[Instruction, ...]:
        """Hear the sums of a minibatch that this rank takes no part in."""
        number = self.number(self.totals)
        pending = (f"~{at(minibatch, 'totals')}",)
        names = (at(minibatch, "totals"),)
        return (
            Instruction("Recv", number, minibatch, 0, (), pending, peer=source),
            Instruction("Wait", number, minibatch, 0, pending, names, peer=source),
        )

    def dropped(
        self, micro: Micro, source: tuple[int, int], kinds: str, *, last: bool
    ) -> tuple[Instruction, ...]:
        """Receive what an earlier stage's forward has sent, for actions that never come.

        Args:
            micro: the micro-batch.
            source: the stage, and its rank.
            kinds: of the actions.
            last: of its minibatch.
        """
        stage, peer = source
        found: list[Instruction] = []
        nowhere = Turn(0, 0, first=True, last=last, peers=(), others=())
        for letter in _Assembler(self, micro, nowhere).letters():
            here = letter.target == self.stage and letter.needed in kinds
            if here and (letter.source, letter.kind) == (stage, "F"):
                names = tuple(f"dropped:{k}" for k in range(len(letter.values) + letter.rides))
                found += _receive(self.number(self.message(micro, letter)), 0, names, peer, "drop")
                found.append(Instruction("Free", None, 0, 0, names))
        return tuple(found)

    @property
    def totals(self) -> Message:
        """The sums of a minibatch, by themselves."""
        return Message("sums of a minibatch", (self.riders,))

    @property
    def riders(self) -> Value:
        """The sums of a minibatch."""
        return Value("float64", (self.sums,))

    def number(self, message: Message) -> int:
        """The number of a message in the table."""
        if message not in self._numbers:
            self._numbers[message] = len(self.told)
            self.told.append(message)
        return self._numbers[message]

    def message(self, micro: Micro, sent: _Letter) -> Message:
        """What a message carries."""
        found = []
        for value in sent.values:
            whole, layout = micro.tasks.whole.values[value], micro.landing(value)
            shape = local_shape(whole.shape, layout, micro.axes, micro.coordinates)
            found.append(Value(whole.dtype, shape))
        label = f"{sent.source}{sent.kind} for stage {sent.target}"
        return Message(label, (*found, *([self.riders] if sent.rides else ())))


@dataclass(frozen=True, slots=True)
class _Letter:
    """A message between two stages, with or without the sums of its minibatch."""

    source: int
    kind: str
    target: int
    needed: str
    values: tuple[int, ...]
    rides: bool


@dataclass(slots=True)
class _Assembler:
    """One turn."""

    rank: Endless
    micro: Micro
    turn: Turn

    def run(self) -> Passing:
        """Forward and backward together, so that values live as long as either reads them."""
        mark = Instruction("Stash", outputs=(_MARK,))
        forward = self.action("F")
        backward = self.action("B") if self.micro.tasks.trains else []
        whole = with_frees([*forward, mark, *backward])
        place = whole.index(mark)
        rest = whole[place + 1 :]
        if rest and rest[0].inputs == (_MARK,):
            rest = rest[1:]
        return Passing(tuple(whole[:place]), tuple(rest))

    def action(self, kind: Kind) -> list[Instruction]:
        """An action with what it needs and sends."""
        found: list[Instruction] = []
        turn, stage = self.turn, self.rank.stage
        for letter in self.letters():
            if letter.target == stage and letter.needed == kind:
                number = self.rank.number(self.rank.message(self.micro, letter))
                what, peer = f"{letter.source}{letter.kind}", turn.peers[letter.source]
                found += _receive(number, turn.slot, self._names(letter), peer, what)
        if kind == "F":
            found += [*self._load(), *self._held()]
        found += self._task((stage, kind))
        if kind == "F" and turn.last:
            found += self._finish()
        for letter in self.letters():
            if letter.source == stage and letter.kind == kind:
                found += self._send(letter)
        return found

    def letters(self) -> list[_Letter]:
        """All messages of the micro-batch; sums go from stage to stage, and come back."""
        kind: Kind
        found: dict[tuple[int, str, int], _Letter] = {}
        for sent in self.rank.sent(self.micro):
            key = sent.source, sent.action.kind, sent.target
            found[key] = _Letter(*key, sent.needed.kind, sent.values, rides=False)
        if self.turn.last:
            for kind, step in (("F", 1), ("B", -1)):
                for stage in range(self.rank.stages):
                    if 0 <= stage + step < self.rank.stages:
                        key = stage, kind, stage + step
                        values = found[key].values if key in found else ()
                        found[key] = _Letter(*key, kind, values, rides=True)
        return list(found.values())

    def _names(self, letter: _Letter) -> tuple[str, ...]:
        turn = self.turn
        names = tuple(f"{turn.slot}:{named(value)}" for value in letter.values)
        coming = letter.target == self.rank.stage and letter.kind == "F"
        sums = at(turn.minibatch, "coming" if coming else "totals")
        return (*names, sums) if letter.rides else names

    def _send(self, letter: _Letter) -> list[Instruction]:
        slot, peer = self.turn.slot, self.turn.peers[letter.target]
        number = self.rank.number(self.rank.message(self.micro, letter))
        pending = (f"~{letter.kind}{slot}>{letter.target}",)
        return [
            Instruction("Send", number, slot, 0, self._names(letter), pending, peer=peer),
            Instruction("Wait", None, slot, 0, pending, peer=peer),
        ]

    def _finish(self) -> list[Instruction]:
        """Add this stage's sums to those that came; the last stage tells ranks that take no part.

        Others hear them with the gradients.
        """
        turn, sums = self.turn, at(self.turn.minibatch, "totals")
        found = [Instruction("Finish", None, turn.minibatch, 0, (), (sums,))]
        if self.rank.stage != self.rank.stages - 1:
            return found
        if not self.rank.alone:
            found.append(Instruction("Agree", None, turn.minibatch, axis="stage"))
        number = self.rank.number(self.rank.totals)
        for peer in turn.others:
            gone = (f"~totals>{peer}",)
            found.append(Instruction("Send", number, turn.minibatch, 0, (sums,), gone, peer=peer))
            found.append(Instruction("Wait", None, turn.minibatch, 0, gone, peer=peer))
        return found

    def _programs(self) -> list[tuple[Sequence[tuple[str, int]], Sequence[tuple[str, int]]]]:
        kinds: tuple[Kind, ...] = ("F", "B") if self.micro.tasks.trains else ("F",)
        tasks = [self.micro.tasks.task((self.rank.stage, kind)) for kind in kinds]
        return [(task.program.inputs, task.program.outputs) for task in tasks]

    def _load(self) -> list[Instruction]:
        """What forward or backward reads of the batch."""
        read = {name for inputs, _ in self._programs() for name, _ in inputs}
        mine = sorted(n for n in read if n.startswith("batch/") or n == "position")
        names = tuple(f"{self.turn.slot}:{name}" for name in mine)
        return [Instruction("Load", None, self.turn.slot, 0, (), names)]

    @property
    def _renewed(self) -> frozenset[str]:
        """Buffers that the forward makes anew."""
        outputs = dict(self._programs()[0][1])
        return frozenset(
            name.replace("next/", "buffer/", 1) for name in outputs if name.startswith("next/")
        )

    def _held(self) -> list[Instruction]:
        """Buffers that the backward reads as they are before the forward renews them."""
        read = {name for inputs, _ in self._programs()[1:] for name, _ in inputs}
        held = {f"{self.turn.slot}:{n}": _front(n) for n in sorted(read & self._renewed)}
        if not held:
            return []
        return [Instruction("Stash", None, self.turn.slot, 0, tuple(held.values()), tuple(held))]

    def _task(self, key: Key) -> list[Instruction]:
        """The task's pieces; what outlives them is kept."""
        turn, kind = self.turn, key[1]
        sums = frozenset(self.micro.tasks.task(key).sums)
        gradients = frozenset(name for name in sums if name.startswith("gradient/"))
        new, done = (sums if turn.first else frozenset()), (gradients if turn.last else frozenset())
        local, _, _ = self.micro.local(key, new, done)
        program = local.program
        names = {name: self._outside(name, kind) for name, _ in program.inputs}
        prefix = f"{self.rank.stage}{kind}"
        run = run_pieces(program, self.rank.table, turn.slot, names, prefix)
        inputs = {value: names[name] for name, value in program.inputs}
        kept: dict[str, str] = {}
        for name, value in program.outputs:
            source = inputs.get(value, f"{prefix}{turn.slot}:{value}")
            kept.update(dict.fromkeys(self._inside(name, done), source))
        found = [*run]
        if kept:
            found.append(
                Instruction("Stash", None, turn.slot, 0, tuple(kept.values()), tuple(kept))
            )
        over = tuple(n.replace("reduced/", "gradient/", 1) for n in kept if "reduced/" in n)
        if over:
            found.append(Instruction("Free", None, turn.slot, 0, over))
        return found

    def _outside(self, name: str, kind: str) -> str:
        """What a task's input is called on this rank."""
        if name.startswith(("batch/", "value/")) or name == "position":
            return f"{self.turn.slot}:{name}"
        if name.startswith("total/"):
            return at(self.turn.minibatch, name)
        if name in self._renewed:
            return _front(name) if kind == "F" else f"{self.turn.slot}:{name}"
        return name

    def _inside(self, name: str, done: frozenset[str]) -> tuple[str, ...]:
        """What a task's output is called on this rank."""
        if name.startswith("value/"):
            return (f"{self.turn.slot}:{name}",)
        if name.startswith("next/"):
            return at(self.turn.minibatch, name), _front(name)
        if name.startswith("gradient/"):
            over = name in done or any(part.startswith(f"{name}[") for part in done)
            return (name.replace("gradient/", "reduced/", 1) if over else name,)
        return (at(self.turn.minibatch, name),)


def _front(name: str) -> str:
    """A buffer after the latest forward, in flight or not."""
    return f"front/{name.partition('/')[2]}"


def _receive(
    number: int, slot: int, names: tuple[str, ...], peer: int, what: str
) -> tuple[Instruction, Instruction]:
    pending = (f"~{what}@{slot}",)
    return (
        Instruction("Recv", number, slot, 0, (), pending, peer=peer),
        Instruction("Wait", number, slot, 0, pending, names, peer=peer),
    )
