"""Tensors that stand for what a model will return: what is done to them is written down.

A DeepSpeed script computes its loss between `engine(x)` and `engine.backward(loss)`, in its own
code. A program of the whole step needs that code, so `engine(x)` answers with these: torch's
functions on them are recorded instead of run (docs/decisions/0030). Their shapes are known, from a
run on fake tensors; their values once a step has run, or when something asks for one.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils import _pytree as pytree
from typing_extensions import override

from meshwright.errors import UserCodeError

__all__ = ["Call", "Lazy", "Recording", "identity", "lazies", "value_of"]

_VALUES = frozenset(
    ("item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "data_ptr", "backward")
) | {
    f"__{name}__"
    for name in (
        "repr", "str", "format", "bool", "float", "int", "index", "complex", "array", "contains",
        "reduce_ex", "deepcopy",
    )
}  # fmt: skip
"""Functions that need a tensor's values."""


@dataclass(eq=False, slots=True)
class Call:
    """A function that was called, what with, and what came out.

    Attributes:
        function: of torch; None for the model itself.
        args: positional and keyword arguments, as given.
        number: its place in the recording.
        grad: whether gradients were enabled.
        fakes: the tensors among what it returned, without values.
        known: their values, by place, where they are known.
        recording: that it is part of.
    """

    function: Callable[..., Any] | None
    args: tuple[tuple[Any, ...], dict[str, Any]]
    number: int
    fakes: tuple[Tensor, ...]
    recording: Recording
    grad: bool = True
    known: dict[int, Tensor] = field(default_factory=dict)

    def inputs(self) -> Iterator[Lazy]:
        """What it was given that is lazy itself."""
        return (leaf for leaf in pytree.tree_leaves(self.args) if isinstance(leaf, Lazy))


@dataclass(eq=False, slots=True)
class Recording:
    """What a script did with the model's outputs in one micro-batch, in order.

    Attributes:
        number: later recordings have higher ones.
        mode: the fake tensors'.
        forward: runs a call of the model for real, with the weights as they are now; it is told
            which of the returned tensors is wanted.
        calls: in order.
    """

    number: int
    mode: FakeTensorMode
    forward: Callable[[Call, int], list[Tensor]]
    calls: list[Call] = field(default_factory=list)

    def add(self, function: Callable[..., Any] | None, args: Any, found: Any) -> Any:
        """Write a call down; its result with lazy tensors in place of fake ones."""
        leaves, spec = pytree.tree_flatten(found)
        fakes = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        call = Call(function, args, len(self.calls), fakes, self, torch.is_grad_enabled())
        self.calls.append(call)
        made = iter(Lazy.of(call, place) for place in range(len(fakes)))
        lazy = [next(made) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return pytree.tree_unflatten(lazy, spec)


class Lazy(Tensor):
    """One tensor that a recorded call returned."""

    call: Call
    place: int

    @classmethod
    def of(cls, call: Call, place: int) -> Self:
        """The tensor at `place` among what `call` returned."""
        fake = call.fakes[place]
        made: Self = Tensor._make_wrapper_subclass(  # noqa: SLF001 - its public name
            cls, fake.shape, dtype=fake.dtype, requires_grad=fake.requires_grad
        )
        made.call, made.place = call, place
        return made

    @property
    def fake(self) -> Tensor:
        """Its shape and dtype, without values."""
        return self.call.fakes[self.place]

    @classmethod
    @override
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return _called(func, args, dict(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Code below torch's functions needs values."""
        real = pytree.tree_map(_real, (args, dict(kwargs or {})))
        return func(*real[0], **real[1])


def _called(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    found = lazies((args, kwargs))
    name = func.__name__
    if name == "backward":
        raise UserCodeError(
            "loss.backward() was called on what the engine returned; call engine.backward(loss)"
        )
    if name in _VALUES or all(_is_known(one) for one in found):
        return _for_real(func, args, kwargs)
    if not _changes(name):
        return _recorded(func, args, kwargs, found)
    if not isinstance(args[0], Lazy):
        return _for_real(func, args, kwargs)
    made = _recorded(_on_a_copy(func), args, kwargs, found)
    args[0].call, args[0].place = made.call, made.place
    return args[0]


def _recorded(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], found: list[Lazy]
) -> Any:
    unknown = (one.call.recording for one in found if not _is_known(one))
    recording = max(unknown, key=lambda one: one.number)
    fakes = pytree.tree_map(
        lambda leaf: leaf.fake if isinstance(leaf, Lazy) else leaf, (args, kwargs)
    )
    try:
        with recording.mode:
            result = func(*fakes[0], **fakes[1])
    except (
        DataDependentOutputException,
        DynamicOutputShapeException,
        UnsupportedOperatorException,
    ):
        return _for_real(func, args, kwargs)
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result)):
        return result
    return recording.add(func, (_frozen(args), _frozen(kwargs)), result)


def _frozen(tree: Any) -> Any:
    """Arguments as they are now: a lazy one may stand for another tensor later."""

    def now(leaf: Any) -> Any:
        return Lazy.of(leaf.call, leaf.place) if isinstance(leaf, Lazy) else leaf

    return pytree.tree_map(now, tree)


def _changes(name: str) -> bool:
    """Whether a function of this name writes into its first argument."""
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name != "__invert__")
    return name.endswith("_")


class _OnACopy:
    """An in-place function, without its effect on who else holds the tensor."""

    def __init__(self, func: Callable[..., Any]) -> None:
        self.func = func
        self.__name__ = f"{func.__name__} on a copy"

    def __call__(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copy = tensor.clone()
        self.func(copy, *args, **kwargs)
        return copy


def _on_a_copy(func: Callable[..., Any]) -> Callable[..., Any]:
    return _OnACopy(func)


def identity(func: Callable[..., Any] | None) -> Any:
    """Equal for the same function, also where torch makes a new object of it for each use."""
    if isinstance(func, _OnACopy):
        return ("copy", identity(func.func))
    if isinstance(func, types.MethodWrapperType):
        return (func.__name__, id(func.__self__))
    return id(func)


def lazies(tree: Any) -> list[Lazy]:
    """The lazy tensors in a tree."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Lazy)]


def _is_known(tensor: Lazy) -> bool:
    """Whether its value follows from what is known, without another forward."""
    call = tensor.call
    if tensor.place in call.known:
        return True
    return call.function is not None and all(_is_known(one) for one in call.inputs())


def value_of(tensor: Lazy) -> Tensor:
    """Its value: known, or computed now from what is; at worst by a forward of the model."""
    call = tensor.call
    if tensor.place not in call.known:
        if call.function is None:
            found = call.recording.forward(call, tensor.place)
        else:
            result = _for_real(call.function, *call.args)
            found = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        call.known = dict(enumerate(found)) | call.known
    return call.known[tensor.place]


def _for_real(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    real = pytree.tree_map(_real, (args, kwargs))
    with torch.no_grad():
        return func(*real[0], **real[1])


def _real(leaf: Any) -> Any:
    return value_of(leaf).detach() if isinstance(leaf, Lazy) else leaf
