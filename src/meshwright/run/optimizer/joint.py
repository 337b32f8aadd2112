"""Optimizers whose update of an element depends on others, which other ranks hold.

The class's own `step()` is traced for one parameter and partitioned: each rank steps its shard, and
what it needs of the others comes by collectives (a norm is a sum of the shards' squares). A step
that cannot be traced is run as it is, on every rank, on the gathered parameter, gradient and state;
the rank keeps its part of what comes out. Either way the numbers are those of one device.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.compile.lower import Segment, lower
from meshwright.compile.scalar import evaluate
from meshwright.compile.update import FOLLOWED, Form, Update, trace_update
from meshwright.errors import NotTraceable, UserCodeError
from meshwright.plan.mesh import Axis
from meshwright.program.assemble import gather_program
from meshwright.program.instruction import Instruction
from meshwright.program.layout import Layout
from meshwright.program.pieces import Table, run_pieces
from meshwright.program.program import Program, Value
from meshwright.program.update import update_program
from meshwright.program.zero import StateLayouts, slot_layout
from meshwright.run.executor import Machine, Place, follow
from meshwright.run.optimizer.beside import beside
from meshwright.run.optimizer.recipe import Recipe, build
from meshwright.run.part import part_of

__all__ = ["Joint", "Traces", "numbers_of"]

_BESIDE = 2**26
"""Bytes of the parameters whose steps go on side by side while each waits for collectives."""

_LOOPS = {"foreach": False, "fused": False}
"""How a step is traced: over one parameter, kernels over many have nothing to add."""


@dataclass(slots=True)
class Traces:
    """The traced steps of a job's optimizer, shared by the ranks of a process.

    Attributes:
        recipe: the optimizer.
        found: by settings and form; each holds under the conditions it names.
        whole: those that cannot be traced, and why.
    """

    recipe: Recipe
    found: dict[Hashable, list[Update]] = field(default_factory=dict)
    whole: dict[Hashable, str] = field(default_factory=dict)

    def of(
        self, settings: Mapping[str, Any], form: Form, inputs: Mapping[str, float]
    ) -> Update | None:
        """The step that holds for these numbers; None where it has to be run on whole tensors."""
        key = repr(sorted((k, v) for k, v in settings.items() if k not in FOLLOWED)), form
        if key in self.whole:
            return None
        known = self.found.setdefault(key, [])
        update = next((one for one in known if one.holds(inputs)), None)
        if update is None:
            try:
                update = trace_update(lambda t: self._over(t, settings), form, inputs)
            except NotTraceable as error:
                self.whole[key] = str(error)
                return None
            known.append(update)
        return update

    def _over(self, tensor: Tensor, settings: Mapping[str, Any]) -> torch.optim.Optimizer:
        """The class over one tensor that is to be traced."""
        plain = {k: v for k, v in _LOOPS.items() if k in settings}
        defaults = {**self.recipe.defaults, **plain}
        groups = ((("parameter",), {**settings, **plain}),)
        return build(Recipe(self.recipe.kind, defaults, groups), {"parameter": tensor})

    def over(self, parameter: nn.Parameter, settings: Mapping[str, Any]) -> torch.optim.Optimizer:
        """The class over one whole parameter."""
        groups = ((("parameter",), dict(settings)),)
        return build(
            Recipe(self.recipe.kind, self.recipe.defaults, groups), {"parameter": parameter}
        )


@dataclass(frozen=True, slots=True)
class _Ready:
    """A rank's program, ready to run: its results by name, and where they are found.

    Attributes:
        machine: with the program's functions and calls; each run has values of its own.
    """

    body: tuple[Instruction, ...]
    machine: Machine
    results: Mapping[str, str]

    def run(self, given: Mapping[str, Tensor]) -> Generator[Any, Any, dict[str, Tensor]]:
        """The program's outputs; an exchange."""
        machine = replace(self.machine, values=dict(given), pending={})
        yield from follow(machine, self.body)
        return {name: machine.values[there] for name, there in self.results.items()}


@dataclass(slots=True)
class Joint:
    """A rank's part of the steps that ranks take jointly.

    Attributes:
        traces: of the job's optimizer; None where every rank steps alone what it has.
        axes: of the mesh.
        place: the rank's.
        parameters: dtype and global shape of those that are stepped jointly.
        states: their layouts.
        shards: all that the optimizer sees.
        optimizer: over the shards: settings, and state by shard.
        slots: dtype and global shape of the tensors of their state.
    """

    traces: Traces | None
    axes: Sequence[Axis]
    place: Place
    parameters: Mapping[str, Value]
    states: Mapping[str, StateLayouts]
    shards: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    slots: dict[str, dict[str, Value]] = field(default_factory=dict)
    ready: dict[Hashable, _Ready] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """What the class made over shards before any step would be a shard's, not the whole's."""
        for name in self.parameters:
            self.optimizer.state.pop(self.shards[name], None)

    def run(
        self,
        gradients: Mapping[str, Tensor],
        holding: Callable[[str], AbstractContextManager[object]] | None = None,
    ) -> Generator[Any, Any, Set[str]]:
        """Step what is stepped jointly; the names of the other gradients; an exchange.

        `holding(name)` has the state of a parameter at hand while it is stepped: one at a time.
        """
        named = ((name, group) for name, group in self._in_order() if name in gradients)
        if holding is None:
            steps = (
                (self.parameters[name].bytes, self._step(name, gradients[name], group))
                for name, group in named
            )
            yield from beside(steps, _BESIDE)
        else:
            for name, group in named:
                with holding(name):
                    yield from self._step(name, gradients[name], group)
        return gradients.keys() - self.parameters.keys()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """The optimizer without what is stepped jointly: a class may take gradients for granted."""
        groups = self.optimizer.param_groups
        every = [group["params"] for group in groups]
        mine = {id(self.shards[name]) for name in self.parameters}
        for group in groups:
            group["params"] = [shard for shard in group["params"] if id(shard) not in mine]
        try:
            yield
        finally:
            for group, shards in zip(groups, every, strict=True):
                group["params"] = shards

    def layout(self, name: str, slot: str, local: Tensor) -> tuple[tuple[int, ...], Layout] | None:
        """(Global shape, layout) of a tensor of a parameter's state; None if stepped alone."""
        if name not in self.parameters:
            return None
        value = self.slots.get(name, {}).get(slot)
        if value is None:  # not stepped yet
            return tuple(local.shape), Layout()
        return value.shape, self._lies(name, value)

    def expect(self, name: str, slot: str, value: Value) -> Layout:
        """How a tensor of the state that comes from a checkpoint is to lie."""
        self.slots.setdefault(name, {})[slot] = value
        return self._lies(name, value)

    def _in_order(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        by_id = {id(shard): name for name, shard in self.shards.items()}
        for group in self.optimizer.param_groups:
            for shard in group["params"]:
                if by_id[id(shard)] in self.parameters:
                    yield by_id[id(shard)], group

    def _lies(self, name: str, value: Value) -> Layout:
        return slot_layout(value, self.parameters[name], self.states[name], self.axes)

    def _step(
        self, name: str, gradient: Tensor, group: Mapping[str, Any]
    ) -> Generator[Any, Any, None]:
        assert self.traces is not None
        shard = self.shards[name]
        state = self.optimizer.state.get(shard, {})
        settings = {key: value for key, value in group.items() if key != "params"}
        inputs = dict(numbers_of(settings, state))
        fused = self.states[name].optimizer.fused  # a program has an input for each part of those
        form = self._form(name, state)
        update = None if fused else self.traces.of(settings, form, inputs)
        if update is None:
            yield from self._whole(name, gradient, settings)
            return
        given = {"parameter": shard.data, "gradient": gradient, **update.constants}
        given |= {f"state/{s}": t for s, t in state.items() if isinstance(t, Tensor)}
        made = yield from self._ready(name, update).run({**given, **update.host(inputs)})
        after = {slot: evaluate(what, inputs) for slot, what in update.numbers.items()}
        after |= {n.removeprefix("state/"): t for n, t in made.items() if n != "parameter"}
        self._keep(name, made["parameter"], after, update.slots)

    def _form(self, name: str, state: Mapping[str, Any]) -> Form:
        known = self.slots.get(name, {})
        tensors = {slot: known[slot] for slot, t in state.items() if isinstance(t, Tensor)}
        return Form.of(self.parameters[name], tensors, state)

    def _keep(
        self, name: str, parameter: Tensor, state: dict[str, Any], slots: dict[str, Value]
    ) -> None:
        """Take in a step's results: weights in place, since the shard may be a part of a whole."""
        shard = self.shards[name]
        shard.data.copy_(parameter)
        self.slots[name] = slots
        self.optimizer.state[shard] = state

    def _ready(self, name: str, update: Update) -> _Ready:
        """The rank's part of an update; parameters that lie alike share it."""
        own = self.states[name].optimizer
        layouts = {"parameter": own, "gradient": own}
        layouts |= {f"state/{slot}": self._lies(name, v) for slot, v in update.slots.items()}
        key = id(update), tuple(layouts.values())
        if key not in self.ready:
            coordinates = self.place.coordinates
            local = update_program(update.program, self.axes, coordinates, layouts)
            self.ready[key] = self._prepared(local.program)
        return self.ready[key]

    def _prepared(self, program: Program) -> _Ready:
        table = Table()
        names = {name: name for name, _ in program.inputs}
        body = run_pieces(program, table, None, names, "update")
        functions: list[Segment] = [lower(s, self.place.coordinates) for s in table.segments]
        machine = Machine(functions, {}, self.place)
        machine.learn(table.calls, ())
        inputs = {value: name for name, value in program.inputs}
        results = {name: inputs.get(v, f"update:{v}") for name, v in program.outputs}
        return _Ready(body, machine, results)

    def _whole(
        self, name: str, gradient: Tensor, settings: Mapping[str, Any]
    ) -> Generator[Any, Any, None]:
        """Step the gathered parameter on every rank, and keep this rank's part."""
        assert self.traces is not None
        shard, own = self.shards[name], self.states[name].optimizer
        state = self.optimizer.state.get(shard, {})
        given = {"parameter": shard.data, "gradient": gradient}
        given |= {f"state/{s}": t for s, t in state.items() if isinstance(t, Tensor)}
        known = self.slots.get(name, {})
        value = self.parameters[name]
        moves = {"parameter": (value, own), "gradient": (value, own)}
        moves |= {f"state/{s}": (v, self._lies(name, v)) for s, v in known.items()}
        key = "whole", tuple(moves.items())
        if key not in self.ready:
            found = gather_program(moves, self.axes, self.place.coordinates)
            self.ready[key] = self._prepared(found.program)
        whole = yield from self.ready[key].run(given)
        parameter = nn.Parameter(whole["parameter"].clone())
        parameter.grad = whole["gradient"]
        optimizer = self.traces.over(parameter, settings)
        if state:
            tensors = {s: whole[f"state/{s}"].clone() for s in known}
            optimizer.state[parameter] = {**state, **tensors}
        optimizer.step()
        _require_still(settings, optimizer.param_groups[0])
        after = optimizer.state[parameter]
        self.slots[name] = {s: _value(t) for s, t in after.items() if isinstance(t, Tensor)}
        parts = {
            slot: self._part(after[slot], self._lies(name, v))
            for slot, v in self.slots[name].items()
        }
        self._keep(name, self._part(parameter.detach(), own), {**after, **parts}, self.slots[name])

    def _part(self, whole: Tensor, layout: Layout) -> Tensor:
        return part_of(whole, layout, self.axes, self.place.coordinates).clone()


def numbers_of(
    settings: Mapping[str, Any], state: Mapping[str, Any]
) -> Iterator[tuple[str, float]]:
    """The numbers of a step by name: `lr`, `betas.0`, `state.step`."""
    for key in FOLLOWED:
        if key in settings:
            yield from _named(key, settings[key])
    for slot, value in state.items():
        if type(value) in (int, float):
            yield f"state.{slot}", value


def _named(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, tuple | list):
        for place, one in enumerate(value):
            yield from _named(f"{name}.{place}", one)
    elif isinstance(value, Tensor):
        yield name, value.item()
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value


def _require_still(settings: Mapping[str, Any], group: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        if group.get(key) is not value and group.get(key) != value:
            raise UserCodeError(
                f"the optimizer's step changes its group's setting {key!r}, and so depends on how "
                "often it was called; keep it in the parameters' state, or use --eager"
            )


def _value(tensor: Tensor) -> Value:
    return Value(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
