"""Assemble: a schedule and the tasks of its micro-batches -> one rank's instruction list.

body   for each action: Load, Recv what this and the next one read, Wait, the task's pieces, Stash,
       Send what other ranks read
       gradients of parameters that live at several stages are summed
       Finish, Agree, Update, gather weights, Commit
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from meshwright.program.assemble import Compiled, in_place, move_instructions, move_program
from meshwright.program.instruction import Instruction, InstructionList, Message
from meshwright.program.layout import Layout, local_shape
from meshwright.program.partition import Local
from meshwright.program.pieces import Table, run_pieces, with_frees
from meshwright.program.program import Program, Value
from meshwright.program.propagate import Completed
from meshwright.program.stage import named
from meshwright.program.zero import StateLayouts
from meshwright.schedule.action import Action, Schedule
from meshwright.schedule.check import least_ahead
from meshwright.schedule.locals import Micro
from meshwright.schedule.messages import Sent, messages
from meshwright.schedule.post import Post
from meshwright.schedule.ties import ties

__all__ = ["assemble_stages"]

_AHEAD = 2
"""Messages of each sender that are received ahead of need, at least."""

_EVERYWHERE = ("output/", "watch/")
"""Outputs that every rank is given."""


def assemble_stages(
    schedule: Schedule,
    micros: Sequence[Micro],
    states: Mapping[str, StateLayouts],
    post: Post,
    *,
    fine: bool = False,
) -> Compiled:
    """The instruction list of the rank in `post`.

    Args:
        schedule: of a step.
        micros: the micro-batches, in order; equal ones may be one object.
        states: layouts by parameter.
        post: the rank's.
        fine: cut tasks without repeated layers too.
    """
    table = Table(fine=fine)
    assembler = _Assembler(schedule, micros, post, ahead=_ahead(schedule), table=table)
    body = assembler.whole_weights(states)
    body += assembler.actions()
    body += [*assembler.unneeded(), *assembler.ties(states)]
    gather = in_place(assembler.gather(states))
    body += [Instruction("Finish"), Instruction("Agree", axis="world"), Instruction("Update")]
    body += move_instructions(gather.program, assembler.table, "gather", "shard/", "gathered/")
    body.append(Instruction("Commit"))
    lists = InstructionList(
        (), tuple(with_frees(body)), (), tuple(table.segments), tuple(table.calls),
        tuple(assembler.told),
    )  # fmt: skip
    used = assembler.used.values()
    units = tuple((count, local) for count, local, _, _ in used)
    moves = (gather, *assembler.moved)
    return Compiled(lists, units, moves, tuple((whole, how) for _, _, whole, how in used))


@cache
def _ahead(schedule: Schedule) -> int:
    """How many messages to receive ahead: as many as sends without a buffer would need."""
    return max(_AHEAD, least_ahead(schedule) if len(schedule.ranks) > 1 else 0)


@dataclass(slots=True)
class _Assembler:
    schedule: Schedule
    micros: Sequence[Micro]
    post: Post
    ahead: int
    table: Table = field(default_factory=Table)
    told: list[Message] = field(default_factory=list)
    numbers: dict[Message, int] = field(default_factory=dict)
    used: dict[int, tuple[int, Local, Program, Completed]] = field(default_factory=dict)
    loaded: set[int] = field(default_factory=set)
    assigned: set[str] = field(default_factory=set)
    updated: set[str] = field(default_factory=set)
    sending: dict[int, str] = field(default_factory=dict)  # rank -> the send to wait for
    posted: Counter[int] = field(default_factory=Counter)  # by rank, how many are received from it
    read: Counter[int] = field(default_factory=Counter)  # and how many of them are needed by now
    moved: list[Local] = field(default_factory=list)  # programs of moves that run once a step
    gathered: set[str] = field(default_factory=set)  # parameters that are whole for the step

    @property
    def mine(self) -> tuple[Action, ...]:
        """This rank's actions."""
        everything = self.schedule.ranks[self.post.pipeline]
        return tuple(action for action in everything if self.post.takes(action.microbatch))

    def actions(self) -> list[Instruction]:
        """Every action with what it needs and sends."""
        outgoing: dict[Action, list[Sent]] = defaultdict(list)
        incoming: dict[int, list[Sent]] = defaultdict(list)
        needed: dict[Action, list[tuple[int, Sent]]] = defaultdict(list)
        tasks = [micro.tasks for micro in self.micros]
        for sent in messages(self.schedule, tasks, self.post.pipeline):
            k = sent.action.microbatch
            if not self.post.takes(k):
                continue
            if sent.source == self.post.pipeline:
                outgoing[sent.action].append(sent)
            else:
                peer = self.post.peer(sent.source, k)
                needed[sent.needed].append((len(incoming[peer]), sent))
                incoming[peer].append(sent)
        last = self._last_sums()
        body: list[Instruction] = []
        for number, action in enumerate(self.mine):
            body += self._received(incoming, needed[action])
            body += [self._arrived(sent) for _, sent in needed[action]]
            body += self._task(action, last[number])
            for sent in outgoing[action]:
                body += self._sent(sent)
        body += self._shared_outputs()
        return [*body, *self._all_sent()]

    def whole_weights(self, states: Mapping[str, StateLayouts]) -> list[Instruction]:
        """Gather the weights that micro-batches take as they are at work, once for the step."""
        program, here = self.micros[0].program, self.post.pipeline
        held = dict(program.inputs)
        moves = {}
        for name, homes in self.post.homes.items():
            taken = self.micros[0].states[name].weights
            if here in homes and f"model/{name}" in held and taken != states[name].weights:
                value = program.values[held[f"model/{name}"]]
                moves[f"model/{name}"] = (value, states[name].weights, taken)
                self.gathered.add(name)
        local = move_program(moves, self.post.axes, self.post.coordinates)
        self.moved.append(local)
        return move_instructions(local.program, self.table, "whole", "model/", "whole/")

    def unneeded(self) -> list[Instruction]:
        """What was gathered for the step goes."""
        names = tuple(f"whole/{name}" for name in sorted(self.gathered))
        return [Instruction("Free", None, None, 0, names)] if names else []

    def _last_sums(self) -> list[frozenset[str]]:
        """Of each action, the sums that are complete with it."""
        left: set[str] = set()
        found = []
        for action in reversed(self.mine):
            task = self.micros[action.microbatch].tasks.task((action.stage, action.kind))
            gradients = {name for name in task.sums if name.startswith("gradient/")}
            found.append(frozenset(gradients - left))
            left |= gradients
        return found[::-1]

    def _received(
        self, incoming: Mapping[int, list[Sent]], needed: Sequence[tuple[int, Sent]]
    ) -> list[Instruction]:
        """Receive what an action needs, what was sent before that, and some more."""
        for place, sent in needed:
            peer = self.post.peer(sent.source, sent.action.microbatch)
            self.read[peer] = max(self.read[peer], place + 1)
        found = []
        for peer, waiting in incoming.items():
            until = max(self.posted[peer], self.read[peer] + self.ahead)
            for sent in waiting[self.posted[peer] : until]:
                pending = (f"~{self._name(sent)}",)
                number, k = self._told(sent), sent.action.microbatch
                found.append(Instruction("Recv", number, k, 0, (), pending, peer=peer))
            self.posted[peer] = until
        return found

    def _arrived(self, sent: Sent) -> Instruction:
        k = sent.action.microbatch
        names = tuple(f"{k}:{named(value)}" for value in sent.values)
        return Instruction(
            "Wait", self._told(sent), k, 0, (f"~{self._name(sent)}",), names,
            peer=self.post.peer(sent.source, k),
        )  # fmt: skip

    def _name(self, sent: Sent) -> str:
        return f"{sent.action}>{sent.target}"

    def _told(self, sent: Sent) -> int:
        """The number of a message in the list's table."""
        micro = self.micros[sent.action.microbatch]
        values = []
        for value in sent.values:
            whole, layout = micro.tasks.whole.values[value], micro.landing(value)
            shape = local_shape(whole.shape, layout, self.post.axes, self.post.coordinates)
            values.append(Value(whole.dtype, shape))
        return self._number(Message(sent.label, tuple(values)))

    def _number(self, message: Message) -> int:
        if message not in self.numbers:
            self.numbers[message] = len(self.told)
            self.told.append(message)
        return self.numbers[message]

    def _sent(self, sent: Sent) -> list[Instruction]:
        """Send, once what was sent there before has been taken."""
        k = sent.action.microbatch
        peer = self.post.peer(sent.target, k)
        names = tuple(f"{k}:{named(value)}" for value in sent.values)
        found = self._gone(peer)
        pending = self.sending[peer] = f"~{self._name(sent)}"
        return [*found, Instruction("Send", self._told(sent), k, 0, names, (pending,), peer=peer)]

    def _gone(self, peer: int) -> list[Instruction]:
        before = self.sending.pop(peer, None)
        return [] if before is None else [Instruction("Wait", inputs=(before,), peer=peer)]

    def _all_sent(self) -> list[Instruction]:
        return [wait for peer in sorted(self.sending) for wait in self._gone(peer)]

    def _task(self, action: Action, last: frozenset[str]) -> list[Instruction]:
        """Load the micro-batch if it is new here, run the task's pieces, keep what outlives it."""
        k, key = action.microbatch, (action.stage, action.kind)
        micro = self.micros[k]
        sums = frozenset(micro.tasks.task(key).sums)
        local, whole, how = micro.local(key, sums - self.assigned, last)
        self.assigned |= sums
        count = self.used[id(local)][0] if id(local) in self.used else 0
        self.used[id(local)] = (count + 1, local, whole, how)
        program = local.program
        held = self._held_buffers(action) if action.kind == "F" else {}
        names = {name: self._outside(name, k, action) for name, _ in program.inputs}
        run = run_pieces(program, self.table, k, names, f"{action.stage}{action.kind}")
        inputs = {value: names[name] for name, value in program.inputs}
        own = f"{action.stage}{action.kind}{k}:"
        kept = {
            self._inside(name, k, last): inputs.get(v, f"{own}{v}") for name, v in program.outputs
        }
        found = [*self._load(k)]
        if held:
            found.append(Instruction("Stash", None, k, 0, tuple(held.values()), tuple(held)))
        found += run
        if kept:
            found.append(Instruction("Stash", None, k, 0, tuple(kept.values()), tuple(kept)))
        done = tuple(
            n.replace("reduced/", "gradient/", 1) for n in kept if n.startswith("reduced/")
        )
        if done:
            found.append(Instruction("Free", None, k, 0, done))
        self.updated |= {name for name in kept if name.startswith("next/")}
        return found

    def _load(self, k: int) -> list[Instruction]:
        """Load what this rank reads of a micro-batch, once."""
        if k in self.loaded:
            return []
        self.loaded.add(k)
        read: set[str] = set()
        for action in self.mine:
            if action.microbatch == k:
                program = self.micros[k].tasks.task((action.stage, action.kind)).program
                read |= {name for name, _ in program.inputs}
        mine = sorted(n for n in read if n.startswith("batch/") or n == "position")
        return [Instruction("Load", None, k, 0, (), tuple(f"{k}:{name}" for name in mine))]

    def _held_buffers(self, action: Action) -> dict[str, str]:
        """Updated buffers as a backward will read them: as they are before its forward."""
        k, tasks = action.microbatch, self.micros[action.microbatch].tasks
        mine = (a for a in self.mine if (a.stage, a.microbatch) == (action.stage, k))
        programs = [tasks.task((a.stage, a.kind)).program for a in mine]
        updated = {n.replace("next/", "buffer/", 1) for p in programs for n, _ in p.outputs}
        read = {name for program in programs[1:] for name, _ in program.inputs}
        return {
            f"{k}:{action.stage}:{name}": self._outside(name, k, action)
            for name in sorted(read & updated)
            if name.startswith("buffer/")
        }

    def _outside(self, name: str, k: int, action: Action) -> str:
        """What a task's input is called on this rank."""
        if name.startswith(("batch/", "value/")) or name == "position":
            return f"{k}:{name}"
        if name.removeprefix("model/") in self.gathered:
            return name.replace("model/", "whole/", 1)
        if not name.startswith("buffer/"):
            return name
        after = name.replace("buffer/", "next/", 1)
        tasks = self.micros[k].tasks
        forward = tasks.task((action.stage, "F")).program
        if action.kind != "F" and after in dict(forward.outputs):
            return f"{k}:{action.stage}:{name}"
        return after if after in self.updated else name

    def _inside(self, name: str, k: int, last: frozenset[str]) -> str:
        """What a task's output is called on this rank."""
        if name.startswith("value/"):
            return f"{k}:{name}"
        done = name in last or any(part.startswith(f"{name}[") for part in last)
        return name.replace("gradient/", "reduced/", 1) if done else name

    def _shared_outputs(self) -> list[Instruction]:
        """Outputs that every rank is given go from the stage that makes them to the others."""
        found: list[Instruction] = []
        last = len(self.micros) - 1
        tasks, here = self.micros[last].tasks, self.post.pipeline
        me = self.post.peers[here][self.post.replica]
        for stage in range(self.schedule.stages):
            made = dict(tasks.task((stage, "F")).program.outputs)
            names = tuple(name for name in made if name.startswith(_EVERYWHERE))
            if not names:
                continue
            values = tuple(tasks.whole.values[made[name]] for name in names)
            number = self._number(Message(f"outputs of stage {stage}", values))
            source = self.post.peer(self.schedule.placement[stage], last)
            if source != me:
                pending = (f"~outputs {stage}",)
                found.append(Instruction("Recv", number, None, 0, (), pending, peer=source))
                found.append(Instruction("Wait", number, None, 0, pending, names, peer=source))
                continue
            for peer in sorted({peer for peers in self.post.peers for peer in peers} - {me}):
                found += self._gone(peer)
                self.sending[peer] = f"~outputs {stage}>{peer}"
                gone = (self.sending[peer],)
                found.append(Instruction("Send", number, None, 0, names, gone, peer=peer))
        return found

    def ties(self, states: Mapping[str, StateLayouts]) -> list[Instruction]:
        """Sum the gradients of parameters that several ranks hold, once a step."""
        given = {n for n in self.assigned if n.startswith("gradient/")}
        found: list[Instruction] = []
        for number, program in enumerate(ties(self.micros[0], given, states, self.post)):
            self.moved.append(Local(program, ((-1, Layout()),) * len(program.values)))
            names, prefix = {n: n for n, _ in program.inputs}, f"tie{number}"
            found += run_pieces(program, self.table, None, names, prefix)
            kept = {n: f"{prefix}:{v}" for n, v in program.outputs}
            found.append(Instruction("Stash", None, None, 0, tuple(kept.values()), tuple(kept)))
        return found

    def gather(self, states: Mapping[str, StateLayouts]) -> Local:
        """Updated weights to where they rest."""
        program = self.micros[0].program
        held = dict(program.inputs)
        here = self.post.pipeline
        trained = self.micros[0].tasks.trained()
        moves = {}
        for name, homes in self.post.homes.items():
            state = states[name]
            if here in homes and name in trained and state.optimizer != state.weights:
                value = program.values[held[f"model/{name}"]]
                moves[f"model/{name}"] = (value, state.optimizer, state.weights)
        return move_program(moves, self.post.axes, self.post.coordinates)
