"""A recorded loss as a function of the model and of a batch's tensors, told apart by its form."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from meshwright.api import watch
from meshwright.compat.deepspeed.lazy import Call, Lazy, Recording, identity
from meshwright.errors import UserCodeError

__all__ = ["Form", "form_of"]


@dataclass(frozen=True, slots=True)
class _Made:
    """The tensor at `place` among what the call at `number` of a form returned."""

    number: int
    place: int


@dataclass(frozen=True, slots=True)
class _Taken:
    """A tensor of the batch."""

    name: str


@dataclass(frozen=True, slots=True)
class _Step:
    """One call: its arguments are leaves of `spec`."""

    function: Any
    leaves: tuple[Any, ...]
    spec: Any
    grad: bool


@dataclass(frozen=True, slots=True)
class Form:
    """What is computed of a micro-batch, without its tensors.

    Attributes:
        key: equal for equal computations, constants included.
        steps: calls in order; a function of None is the model.
        losses: whose sum is the loss.
        kept: outputs of the model to be seen after the step, by name.
    """

    key: str
    steps: tuple[_Step, ...]
    losses: tuple[_Made, ...]
    kept: tuple[tuple[str, _Made], ...]

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Compute it: torch's functions, in the order in which the script called them."""
        made: list[list[Tensor]] = []

        def given(leaf: Any) -> Any:
            if isinstance(leaf, _Made):
                return made[leaf.number][leaf.place]
            return batch[leaf.name] if isinstance(leaf, _Taken) else leaf

        for step in self.steps:
            args, kwargs = pytree.tree_unflatten([given(leaf) for leaf in step.leaves], step.spec)
            with torch.set_grad_enabled(step.grad):
                found = (step.function or model)(*args, **kwargs)
            made.append([t for t in pytree.tree_leaves(found) if isinstance(t, Tensor)])
        for name, kept in self.kept:
            watch(name, given(kept))
        first, *more = (given(loss) for loss in self.losses)
        total: Tensor = sum(more, start=first)
        return total


def form_of(
    recording: Recording, losses: Sequence[Lazy], rows: int, kept: frozenset[tuple[int, int]]
) -> tuple[Form, dict[str, Tensor]]:
    """What a script computed in a micro-batch, and the tensors it took.

    Args:
        recording: all it did.
        losses: that it called backward on.
        rows: samples in the micro-batch: a tensor that is not the model's and has as many on dim 0
            is part of the batch; any other one is a constant.
        kept: outputs of the model to watch: a call's place among the model's, a tensor's within.

    Raises:
        UserCodeError: a loss is of another micro-batch, or no scalar.
    """
    for loss in losses:
        if loss.fake.numel() != 1:
            raise UserCodeError(
                f"engine.backward(loss) got a tensor of shape {list(loss.fake.shape)}, but a loss "
                "is one number; take its mean"
            )
    needed = _needed(recording, losses)
    places = {id(call): k for k, call in enumerate(needed)}
    taken: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}

    def leaf_of(leaf: Any) -> Any:
        if isinstance(leaf, Lazy):
            return _Made(places[id(leaf.call)], leaf.place)
        if not isinstance(leaf, Tensor) or leaf.shape[:1] != (rows,):
            return leaf
        if id(leaf) not in taken:
            taken[id(leaf)] = f"t{len(taken)}"
            tensors[taken[id(leaf)]] = leaf
        return _Taken(taken[id(leaf)])

    steps = []
    for call in needed:
        leaves, spec = pytree.tree_flatten(call.args)
        steps.append(_Step(call.function, tuple(map(leaf_of, leaves)), spec, call.grad))
    ends = tuple(_Made(places[id(loss.call)], loss.place) for loss in losses)
    models = [k for k, step in enumerate(steps) if step.function is None]
    shown = tuple(
        (f"output/{turn}/{place}", _Made(models[turn], place))
        for turn, place in sorted(kept)
        if turn < len(models) and place < len(needed[models[turn]].fakes)
    )
    key = hashlib.sha256(repr((tuple(map(_told, steps)), ends, shown)).encode()).hexdigest()[:16]
    return Form(key, tuple(steps), ends, shown), tensors


def _needed(recording: Recording, losses: Sequence[Lazy]) -> list[Call]:
    """The calls that losses depend on, in order."""
    found: dict[int, Call] = {}
    todo = [loss.call for loss in losses]
    while todo:
        call = todo.pop()
        if call.recording is not recording:
            raise UserCodeError(
                "engine.backward(loss) got a loss of an earlier micro-batch; call it on what was "
                "computed from this micro-batch's engine(...)"
            )
        if call.number not in found:
            found[call.number] = call
            todo += [one.call for one in call.inputs()]
    return [found[number] for number in sorted(found)]


def _told(step: _Step) -> Any:
    """A step as text that is equal for equal steps."""
    leaves = tuple(_digest(leaf) if isinstance(leaf, Tensor) else leaf for leaf in step.leaves)
    return identity(step.function), leaves, str(step.spec), step.grad


def _digest(tensor: Tensor) -> str:
    """A constant is part of the form: where it changes, the loss is another function."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    digest = hashlib.sha256(data.numpy().tobytes()).hexdigest()[:16]
    return f"{tensor.dtype}{list(tensor.shape)}={digest}"
