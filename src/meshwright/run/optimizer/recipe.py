"""The user's optimizer, built anew over this rank's shards.

The factory runs once on the blueprint's model for its groups and settings; then an instance of the
same class is built over the shards with every recorded setting, and stepped eagerly. A class that
is not elementwise (found by a probe, not a list) cannot be stepped on shards.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from meshwright.compile.init import Blueprint
from meshwright.errors import UserCodeError

__all__ = [
    "Recipe",
    "Schedule",
    "build",
    "draws",
    "is_elementwise",
    "is_separable",
    "recipe",
    "recorded",
    "scheduled",
    "unsplittable",
]


@runtime_checkable
class Schedule(Protocol):
    """What every scheduler of torch.optim.lr_scheduler offers."""

    def step(self) -> None:
        """One global step was taken."""

    def state_dict(self) -> dict[str, Any]:
        """Where it is."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go there."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the user's factory made: its class, and per group the parameters' names and settings."""

    kind: type[torch.optim.Optimizer]
    defaults: dict[str, Any]
    groups: tuple[tuple[tuple[str, ...], dict[str, Any]], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters it updates."""
        return tuple(name for names, _ in self.groups for name in names)

    def of(self, names: Iterable[str]) -> Recipe:
        """The same for these parameters only: of a stage."""
        mine = frozenset(names)
        groups = ((tuple(n for n in found if n in mine), how) for found, how in self.groups)
        return Recipe(self.kind, self.defaults, tuple(groups))

    def slots(self) -> int:
        """State tensors per parameter, of the parameter's shape, after a step."""
        parameter = nn.Parameter(torch.zeros(3, 5))
        (_, settings), *_ = self.groups
        optimizer = build(Recipe(self.kind, self.defaults, ((("p",), settings),)), {"p": parameter})
        parameter.grad = torch.ones(3, 5)
        optimizer.step()
        state = optimizer.state[parameter].values()
        return sum(isinstance(slot, Tensor) and slot.shape == parameter.shape for slot in state)


def recipe(model: Blueprint, factory: Callable[[nn.Module], Any]) -> Recipe:
    """Call the factory on the model and record what it made.

    Raises:
        UserCodeError: it made no optimizer, or one over tensors that are not the model's.
    """
    made = factory(model.module)
    if not isinstance(made, torch.optim.Optimizer):
        raise UserCodeError(
            f"optimizer(model) returned {type(made).__name__}, but must return a "
            "torch.optim.Optimizer"
        )
    _require_plain_step(type(made))
    return recorded(made, {id(tensor): name for name, tensor in model.parameters.items()})


def recorded(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> Recipe:
    """An optimizer's class and its groups; `names` of parameters by the id of their tensor.

    Raises:
        UserCodeError: a tensor of a group is none of them.
    """
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        for tensor in group["params"]:
            if id(tensor) not in names:
                raise UserCodeError(
                    f"optimizer group {number} holds a tensor of shape {list(tensor.shape)} that "
                    "is no parameter of the model it was given; build it from that model's "
                    "parameters"
                )
        settings = {key: value for key, value in group.items() if key != "params"}
        groups.append((tuple(names[id(t)] for t in group["params"]), settings))
    return Recipe(type(optimizer), dict(optimizer.defaults), tuple(groups))


def _require_plain_step(kind: type[torch.optim.Optimizer]) -> None:
    """`step()` must do without a closure: the gradient is there once, reduced over the ranks."""
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UserCodeError(
            f"optimizer {kind.__name__} computes the loss again within a step (its step() needs a "
            "closure), which a job has no place for; use one that steps from gradients, such as "
            "AdamW"
        )


def build(plan: Recipe, shards: Mapping[str, Tensor]) -> torch.optim.Optimizer:
    """The same optimizer over these tensors, with the recorded settings of each group."""
    accepted = inspect.signature(plan.kind.__init__).parameters
    defaults = {key: value for key, value in plan.defaults.items() if key in accepted}
    groups: list[dict[str, Any]] = [
        {"params": [shards[name] for name in names]} for names, _ in plan.groups
    ]
    try:
        made = plan.kind(groups, **defaults)
    except TypeError as error:
        raise UserCodeError(
            f"optimizer {plan.kind.__name__} cannot be built over shards: {error}; give its "
            "__init__ "
            "the usual (params, **settings), or use --eager"
        ) from error
    for group, (_, settings) in zip(made.param_groups, plan.groups, strict=True):
        group.update(settings)
    return made


def scheduled(optimizer: torch.optim.Optimizer, factory: Callable[[Any], Any]) -> Schedule:
    """Call the user's schedule factory on the optimizer over shards.

    Raises:
        UserCodeError: it made no schedule, or one whose step needs a metric.
    """
    made = factory(optimizer)
    kind = type(made).__name__
    if not isinstance(made, Schedule):
        raise UserCodeError(
            f"schedule(optimizer) returned {kind}, but must return a scheduler of "
            "torch.optim.lr_scheduler (or what has its step, state_dict and load_state_dict)"
        )
    needed = [
        name
        for name, parameter in inspect.signature(made.step).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    if needed:
        raise UserCodeError(
            f"the schedule is {kind}, whose step needs a metric ({', '.join(needed)}), but a "
            "schedule is stepped after every step, without one; use one of the step alone, such as "
            "LambdaLR or CosineAnnealingLR"
        )
    return made


def is_elementwise(plan: Recipe) -> bool:
    """Whether three steps on a small tensor, whole and in two parts, agree to the bit.

    Tried with the settings of every group.
    """
    return all(_splits(plan, settings) for _, settings in plan.groups)


def draws(plan: Recipe) -> str | None:
    """Why replicas would drift apart: two runs, when torch draws otherwise, do not agree."""
    for _, settings in plan.groups:
        (one, _), (again, _) = _apart(plan, settings), _apart(plan, settings, seed=1)
        if not torch.equal(one, again):
            return "draws random numbers in its step, which would differ between ranks"
    return None


def unsplittable(plan: Recipe) -> str | None:
    """Why ranks cannot share the work of an optimizer; None where they can.

    Each parameter must be stepped by itself, and two runs must agree.
    """
    if (why := draws(plan)) is not None:
        return why
    for _, settings in plan.groups:
        together = _run(plan, settings, _tries((6, 4), 0), _tries((4, 3), 1))
        if not all(map(torch.equal, _apart(plan, settings), together)):
            return (
                "steps parameters together: its update of one depends on others, whose gradients "
                "lie on other ranks"
            )
    return None


def _apart(plan: Recipe, settings: Mapping[str, Any], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two small parameters, each stepped by itself, when torch draws with `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        (one,) = _run(plan, settings, _tries((6, 4), 0))
        (other,) = _run(plan, settings, _tries((4, 3), 1))
    return one, other


def _tries(shape: tuple[int, int], seed: int) -> list[Tensor]:
    """A parameter, and its gradients."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(4)]


def _run(plan: Recipe, settings: Mapping[str, Any], *tries: list[Tensor]) -> list[Tensor]:
    """Each try's parameter after as many steps as it has gradients."""
    tensors = {str(k): nn.Parameter(start.clone()) for k, (start, *_) in enumerate(tries)}
    single = Recipe(plan.kind, plan.defaults, ((tuple(tensors), dict(settings)),))
    optimizer = build(single, tensors)
    for gradients in zip(*(found for _, *found in tries), strict=True):
        for tensor, gradient in zip(tensors.values(), gradients, strict=True):
            tensor.grad = gradient.clone()
        _try_step(plan, optimizer)
    return [tensor.detach() for tensor in tensors.values()]


def _try_step(plan: Recipe, optimizer: torch.optim.Optimizer) -> None:
    try:
        optimizer.step()
    except Exception as error:
        raise UserCodeError(
            f"optimizer {plan.kind.__name__} raised {type(error).__name__} in its step on a small "
            f"matrix: {error}; gradients are dense tensors, of each parameter's shape: use an "
            "optimizer for those, such as AdamW"
        ) from error


def is_separable(plan: Recipe) -> bool:
    """Whether two parameters stepped one after the other come out as when stepped at once.

    Tried with the settings of every group, for three steps.
    """
    return all(_separates(plan, settings) for _, settings in plan.groups)


def _separates(plan: Recipe, settings: Mapping[str, Any]) -> bool:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, 6, 4, generator=generator)
    gradients = [torch.randn(2, 6, 4, generator=generator) for _ in range(3)]
    single = Recipe(plan.kind, plan.defaults, ((("p", "q"), dict(settings)),))

    def run(turns: Sequence[Sequence[int]]) -> Sequence[Tensor]:
        tensors = [nn.Parameter(tensor.clone()) for tensor in start]
        optimizer = build(single, {"p": tensors[0], "q": tensors[1]})
        for gradient in gradients:
            for turn in turns:
                for k in turn:
                    tensors[k].grad = gradient[k].clone()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return tensors

    pairs = zip(run([(0, 1)]), run([(0,), (1,)]), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def _splits(plan: Recipe, settings: Mapping[str, Any]) -> bool:
    whole = _tries((6, 4), 0)
    (found,) = _run(plan, settings, whole)
    parts = [[t[part] for t in whole] for part in (slice(0, 2), slice(2, 6))]
    return torch.equal(found, torch.cat([_run(plan, settings, part)[0] for part in parts]))
