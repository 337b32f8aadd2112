"""An optimizer's own step, traced for one parameter: (parameter, gradient, state) -> the new ones.

The class is built over a fake parameter and its `step()` is run once, so that any class works that
computes with tensors; the learning rate and steps are inputs (see `scalar`). The program has global
shapes: partitioned as any other, a norm becomes a sum over the shards' squares.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from meshwright.compile.met import Meeting
from meshwright.compile.scalar import Condition, Expression, Known, Numbers, evaluate, patched
from meshwright.compile.settings import default_dtype
from meshwright.compile.trace import Places, Tagger, trace_function, user_line
from meshwright.errors import NotTraceable
from meshwright.program.program import Op, Program, Value

__all__ = ["FOLLOWED", "Form", "Update", "trace_update"]

FOLLOWED = ("lr", "momentum", "betas")
"""Settings that schedules change: inputs of the program. Another change is another program."""

_SPARE = 64

Maker = Callable[[Tensor], torch.optim.Optimizer]


@dataclass(frozen=True, slots=True)
class Form:
    """What a step is traced for.

    Attributes:
        parameter: dtype and global shape.
        tensors: of the parameter's state; none before the first step.
        numbers: of its state, Python's own.
        plain: what else of its state is no tensor.
    """

    parameter: Value
    tensors: tuple[tuple[str, Value], ...] = ()
    numbers: tuple[str, ...] = ()
    plain: tuple[tuple[str, bool | str | None], ...] = ()

    @classmethod
    def of(cls, parameter: Value, tensors: Mapping[str, Value], state: Mapping[str, Any]) -> Form:
        """Of a parameter whose state has these tensors, and what in `state` is none."""
        numbers = tuple(s for s, v in state.items() if type(v) in (int, float))
        plain = tuple((s, v) for s, v in state.items() if v is None or type(v) in (bool, str))
        return cls(parameter, tuple(tensors.items()), numbers, plain)


@dataclass(frozen=True, slots=True)
class Update:
    """A traced step.

    Attributes:
        program: inputs `parameter`, `gradient`, `state/*`, `host/*` and constants; outputs
            `parameter` and `state/*`.
        hosts: what the host computes for `host/*`, in order.
        conditions: under which the program is right.
        numbers: the numbers of the state after the step, by slot.
        constants: the program's inputs that the step closes over.
    """

    program: Program
    hosts: tuple[Expression, ...]
    conditions: tuple[Condition, ...]
    numbers: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def slots(self) -> dict[str, Value]:
        """The tensors of the state after the step: dtype and global shape."""
        program = self.program
        return {
            name.removeprefix("state/"): program.values[value]
            for name, value in program.outputs
            if name.startswith("state/")
        }

    def holds(self, inputs: Mapping[str, float]) -> bool:
        """Whether the branches that were taken are those of these numbers."""
        return all(bool(evaluate(what, inputs)) == way for what, way in self.conditions)

    def host(self, inputs: Mapping[str, float]) -> dict[str, Tensor]:
        """The scalar inputs of a step."""
        found = (evaluate(what, inputs) for what in self.hosts)
        return {
            f"host/{k}": torch.tensor(value, dtype=torch.float64) for k, value in enumerate(found)
        }


def trace_update(make: Maker, form: Form, inputs: Mapping[str, float]) -> Update:
    """Trace a step of the optimizer that `make` builds over a tensor.

    Args:
        make: of the user's class, with the settings of the parameter's group.
        form: of the parameter and its state.
        inputs: the numbers of this step, by name: `lr`, `betas.0`, `state.step`.

    Raises:
        NotTraceable: the step branches on what tensors hold, or depends on what is no input.
    """
    first = _trace(make, form, inputs, 0)
    other = {name: value * (1 + 1e-6) for name, value in inputs.items()}
    second = _trace(make, form, other, 1)
    if dict(first.conditions) != dict(second.conditions):
        second = _trace(make, form, inputs, 1)
    if first.program.digest != second.program.digest or first.numbers != second.numbers:
        raise NotTraceable(
            "the optimizer's step computes numbers in a way that cannot be followed (math functions"
            " taken by `from math import`, float(), numpy); use math.sqrt(x) or tensors, or --eager"
        )
    _require_still(first)
    return first


def _require_still(update: Update) -> None:
    for op in update.program.ops:
        if op.base.rsplit(".", 1)[-1] in _RANDOM:
            raise NotTraceable(
                f"{op.source}: the optimizer's step draws random numbers ({op.base}), which would "
                "differ between ranks"
            )


_RANDOM = {"rand", "randn", "rand_like", "randn_like", "bernoulli", "normal", "uniform", "randint",
           "normal_functional", "randperm", "multinomial", "exponential"}  # fmt: skip


@dataclass(slots=True)
class _Left:
    """What a run of the step leaves beside tensors."""

    numbers: dict[str, Any] = field(default_factory=dict)


def _trace(make: Maker, form: Form, inputs: Mapping[str, float], turn: int) -> Update:
    fakes = _fakes(form)
    places, left = Places(), _Left()
    spare = [name for name in fakes if name.startswith("host/")]
    numbers = Numbers((), turn, user_line())

    def function(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        numbers.spare = [given[name] for name in spare]
        return _stepped(make, form, given, numbers, inputs, places, left)

    with _quiet():
        program, constants = trace_function(
            function, fakes, places, lambda tensor: tensor, _DECOMPOSITIONS
        )
    used = {value for op in program.ops for value in op.inputs}
    used |= {value for _, value in program.outputs}
    needed = [(n, v) for n, v in program.inputs if v in used or not n.startswith("host/")]
    hosts = sorted(numbers.hosts, key=numbers.hosts.__getitem__)
    alive = {name for name, _ in needed}
    kept = [k for k in range(len(hosts)) if f"host/{k}" in alive]
    renamed = {f"host/{k}": f"host/{place}" for place, k in enumerate(kept)}
    program = replace(
        program,
        inputs=tuple((renamed.get(n, n), v) for n, v in needed),
        ops=tuple(_placed(op, numbers.outside) for op in program.ops),
    )
    conditions = tuple(numbers.conditions.items())
    return Update(program, tuple(hosts[k] for k in kept), conditions, left.numbers, constants)


def _placed(op: Op, outside: str) -> Op:
    """Lines are the user's own; torch's and our optimizers have none."""
    return replace(op, source="") if op.source == outside else op


def _fakes(form: Form) -> dict[str, Tensor]:
    def like(value: Value) -> Tensor:
        return torch.empty(value.shape, dtype=vars(torch)[value.dtype])

    with FakeTensorMode(allow_non_fake_inputs=True):
        found = {"parameter": like(form.parameter), "gradient": like(form.parameter)}
        found |= {f"state/{slot}": like(value) for slot, value in form.tensors}
        found |= {f"host/{k}": torch.empty((), dtype=torch.float64) for k in range(_SPARE)}
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch's profiling of every step is no part of it."""
    nothing = contextlib.nullcontext()
    quiet = mock.patch.object(torch.autograd.profiler, "record_function", return_value=nothing)
    with quiet, default_dtype(None):
        yield


def _stepped(
    make: Maker,
    form: Form,
    given: Mapping[str, Tensor],
    numbers: Numbers,
    inputs: Mapping[str, float],
    places: Places,
    left: _Left,
) -> dict[str, Tensor]:
    parameter = given["parameter"]
    optimizer = make(parameter)
    (group,) = optimizer.param_groups
    for key in FOLLOWED:
        if key in group:
            group[key] = followed(group[key], key, numbers, inputs)
    before = {key: value for key, value in group.items() if key != "params"}
    state = optimizer.state[parameter]
    state.update({slot: given[f"state/{slot}"] for slot, _ in form.tensors})
    for slot in form.numbers:
        name = f"state.{slot}"
        state[slot] = Known(numbers, inputs[name], Expression("input", (name,)))
    state.update(form.plain)
    if not state:
        del optimizer.state[parameter]
    parameter.grad = given["gradient"]
    tagger = Tagger(places)
    tagger.phase = "finish"
    with tagger, patched(numbers), Meeting(numbers), torch.no_grad():
        optimizer.step()
    _require_same_group(before, group)
    return {"parameter": parameter} | _state(optimizer.state[parameter], numbers, left)


def followed(setting: Any, key: str, numbers: Numbers, inputs: Mapping[str, float]) -> Any:
    """A setting whose numbers are inputs."""
    if isinstance(setting, tuple | list):
        each = [followed(one, f"{key}.{k}", numbers, inputs) for k, one in enumerate(setting)]
        return type(setting)(each)
    return Known(numbers, inputs[key], Expression("input", (key,))) if key in inputs else setting


def _require_same_group(before: Mapping[str, Any], group: Mapping[str, Any]) -> None:
    for key, value in before.items():
        if group.get(key) is not value:
            raise NotTraceable(
                f"the optimizer's step changes its group's setting {key!r}, and so depends on how "
                "often it was called"
            )


def _state(state: Mapping[str, Any], numbers: Numbers, left: _Left) -> dict[str, Tensor]:
    """The tensors of the state; its numbers are noted."""
    found: dict[str, Tensor] = {}
    for slot, value in state.items():
        if isinstance(value, Tensor):
            found[f"state/{slot}"] = value
        elif isinstance(value, Known):
            left.numbers[slot] = value.expression
        elif value is None or type(value) in (bool, int, float, str):
            left.numbers[slot] = value
        else:
            raise NotTraceable(
                f"the optimizer keeps a {type(value).__name__} as its state {slot!r}; tensors and "
                "numbers can be laid out over ranks"
            )
    del numbers
    return found


_aten = torch.ops.aten


def _norm(
    x: Tensor,
    ord: Any = 2,  # noqa: A002 - torch's name
    dim: Any = None,
    keepdim: bool = False,  # noqa: FBT001, FBT002 - torch's signature
    *,
    dtype: torch.dtype | None = None,
) -> Any:
    """A 2-norm as the root of a sum, which shards may share; short floats keep torch's."""
    if ord != 2 or dtype is not None or x.dtype not in (torch.float32, torch.float64):
        return NotImplemented
    dims = list(range(x.dim())) if dim is None else dim
    return (x * x).sum(dims, keepdim=keepdim).sqrt()


_DECOMPOSITIONS = {_aten.linalg_vector_norm.default: _norm}
