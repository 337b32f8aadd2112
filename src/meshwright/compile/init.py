"""Initialisation: a model built without memory, whose tensors can be made one at a time.

The factory runs once on fake tensors while every op is written on a tape, its random draws keyed by
(seed, order). Any tensor can then be replayed alone (the ops that wrote its storage, and what those
read), sliced and freed: a rank's peak is its shards plus the largest tensor, and the numbers are
the same under every plan, and the same as the factory's own run under `seeded`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from meshwright.compile.blame import blamed
from meshwright.compile.draw import draw, draw_op, fill, fill_op, position_operand
from meshwright.compile.random import RandomMode
from meshwright.compile.settings import default_dtype
from meshwright.compile.stale import python_seeded
from meshwright.errors import UserCodeError

__all__ = ["Blueprint", "blueprint", "built", "seeded"]

_STREAM = 2**40
"""Initialisation draws from streams of its own, far from those of training steps."""

_BLANK = (
    "empty",
    "empty_like",
    "empty_permuted",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
)
"""What makes tensors of whatever lies in memory."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """One op on the tape: what it was given, what it made, which storages it read and wrote.

    `dtype` is torch's default one when it ran: what a tensor made without a dtype is of.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    reads: frozenset[int]
    writes: frozenset[int]
    dtype: torch.dtype


class _Tape(TorchDispatchMode):
    """Writes down every op that runs under it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.entries: list[_Entry] = []

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = _storages(result)
        given = _storages((args, kwargs))
        mutates = func._schema.is_mutable
        writes = made | (_mutated(func, args, kwargs) if mutates else frozenset())
        dtype = torch.get_default_dtype()
        self.entries.append(_Entry(func, args, kwargs, result, given, writes, dtype))
        return result


def _storages(tree: Any) -> frozenset[int]:
    return frozenset(
        _storage(leaf) for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)
    )


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _mutated(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> frozenset[int]:
    found: set[int] = set()
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            found |= _storages(value)
    return frozenset(found)


@dataclass(slots=True)
class Blueprint:
    """A model on fake tensors, and how to make each of its tensors.

    Attributes:
        module: the user's module, with fake parameters and buffers.
        parameters: name -> fake parameter; a tied one stands under its first name only.
        tied: other name -> the name that it is tied to.
        buffers: name -> fake buffer.
        constants: name -> tensor that is a plain attribute of a module.
        notes: what the user should be told.
        originals: by id, what the factory made of a parameter that is kept in another dtype.
    """

    module: nn.Module
    parameters: dict[str, Tensor]
    tied: dict[str, str]
    buffers: dict[str, Tensor]
    constants: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)
    tape: list[_Entry] = field(default_factory=list)
    originals: dict[int, Tensor] = field(default_factory=dict)

    def make(self, tensor: Tensor) -> Tensor:
        """The real tensor that `tensor` (one of this blueprint's) stands for, alone in memory.

        Raises:
            UserCodeError: a parameter without values: each rank would begin with other numbers.
        """
        made = self._made(tensor)
        if made is None and isinstance(tensor, nn.Parameter):
            name = next(n for n, other in self.parameters.items() if other is tensor)
            raise UserCodeError(
                f"parameter {name} of shape {list(tensor.shape)} is made without values "
                "(torch.empty, or the meta device) and the model factory never gives it any: "
                "initialise it there (nn.init), or name weights= that hold it"
            )
        return _zeros(tensor) if made is None else made

    def _made(self, tensor: Tensor) -> Tensor | None:
        """The same; None where the factory gives it no values."""
        tensor = self.originals.get(id(tensor), tensor)
        if not isinstance(tensor, FakeTensor):
            return None if tensor.is_meta else tensor.detach().clone()
        needed = {_storage(tensor)}
        chain: list[_Entry] = []
        for entry in reversed(self.tape):
            if entry.writes & needed:
                chain.append(entry)
                needed |= entry.reads
        chain.reverse()
        if tensor.numel() and not any(_fills(entry, _storage(tensor)) for entry in chain):
            return None
        real = _replayed(chain, _storage(tensor))
        found = real.get(id(tensor))
        if found is None:  # a Parameter wraps the tensor that the tape knows
            found = next(real[id(e.result)] for e in reversed(chain) if _same(e.result, tensor))
        return found.detach()  # type: ignore[no-any-return]

    def stand_in(self, name: str) -> Tensor:
        """A tensor by its name, for a module that is given its values later: blank ones are 0."""
        tensor = {**self.parameters, **self.buffers, **self.constants}[name]
        made = self._made(tensor)
        return _zeros(tensor) if made is None else made


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype)


def _fills(entry: _Entry, storage: int) -> bool:
    """Whether an op gives values to a storage, and neither makes it blank nor views it."""
    if storage not in entry.writes:
        return False
    schema = entry.function._schema
    made = storage not in entry.reads and schema.name.split("::")[1] not in _BLANK
    return bool(schema.is_mutable) or made


def _replayed(chain: Sequence[_Entry], wanted: int) -> dict[int, Any]:
    """Run entries for real: id of fake -> real, of those that lie in storage `wanted`.

    Everything else is freed after its last use.
    """
    real: dict[int, Any] = {}
    last: dict[int, int] = {}
    for place, entry in enumerate(chain):
        for leaf in pytree.tree_leaves((entry.args, entry.kwargs, entry.result)):
            if isinstance(leaf, FakeTensor) and _storage(leaf) != wanted:
                last[id(leaf)] = place
    dying: dict[int, list[int]] = {}
    for key, place in last.items():
        dying.setdefault(place, []).append(key)
    with torch.no_grad():
        for place, entry in enumerate(chain):
            args, kwargs = pytree.tree_map(lambda x: _real(x, real), (entry.args, entry.kwargs))
            with default_dtype(entry.dtype):
                made = entry.function(*args, **kwargs)
            for fake, value in zip(
                pytree.tree_leaves(entry.result), pytree.tree_leaves(made), strict=True
            ):
                real[id(fake)] = value
            del args, kwargs, made, value
            for key in dying.get(place, ()):
                real.pop(key, None)
    return real


def _same(made: Any, tensor: Tensor) -> bool:
    return (
        isinstance(made, Tensor)
        and _storage(made) == _storage(tensor)
        and made.shape == tensor.shape
        and made.stride() == tensor.stride()
        and made.storage_offset() == tensor.storage_offset()
    )


def _real(value: Any, real: Mapping[int, Any]) -> Any:
    if isinstance(value, FakeTensor):
        return real[id(value)]
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a model factory for real, with the draws that `blueprint` records."""
    place = position_operand(seed, 0, 0, 0)

    def emit(kind: str, size: Any, n: int) -> Tensor:
        return draw(kind, size, _STREAM + n, None, 0, place)

    def write(x: Tensor, kind: str, n: int, scale: float, shift: float) -> Tensor:
        return fill(x, kind, _STREAM + n, scale, shift, place)

    with python_seeded(seed), _recordable(), RandomMode(emit, write=write):
        yield


@contextlib.contextmanager
def _recordable() -> Iterator[None]:
    """torch's truncated normal draws again until it likes the values; ours draws once."""
    with mock.patch.object(nn.init, "_no_grad_trunc_normal_", _truncated_normal):
        yield


def _truncated_normal(
    tensor: Tensor, mean: float, std: float, a: float, b: float, generator: Any = None
) -> Tensor:
    """Fill by the inverse of the distribution function, the same distribution as torch's."""
    del generator  # draws are keyed by the seed

    def share(bound: float) -> float:
        """Twice the normal distribution function, less one: what `erfinv` inverts."""
        return math.erf((bound - mean) / (std * math.sqrt(2)))

    with torch.no_grad():
        low = tensor.dtype in (torch.float16, torch.bfloat16)
        wide = torch.empty_like(tensor, dtype=torch.float32) if low else tensor
        wide.uniform_(share(a), share(b))
        wide.erfinv_().mul_(std * math.sqrt(2)).add_(mean).clamp_(a, b)
        return tensor if wide is tensor else tensor.copy_(wide)


def blueprint(factory: Callable[[], Any], seed: int) -> Blueprint:
    """Run `factory` on fake tensors and keep the tape.

    A factory that reads its tensors' values (`.item()`, `from_pretrained`) is run for real.
    """
    place = position_operand(seed, 0, 0, 0)
    mode, tape = FakeTensorMode(allow_non_fake_inputs=True), _Tape()

    def emit(kind: str, size: Any, n: int) -> Tensor:
        drawn: Tensor = draw_op(kind, size, _STREAM + n, -1, 1, 1, 0, place)
        return drawn

    def write(x: Tensor, kind: str, n: int, scale: float, shift: float) -> Tensor:
        fill_op(x, kind, _STREAM + n, scale, shift, place)
        return x

    notes: list[str] = []
    module: Any = None
    with blamed("model()"):
        try:
            with python_seeded(seed), _recordable(), mode, tape, RandomMode(emit, write=write):
                module = factory()
        except (
            DataDependentOutputException,
            DynamicOutputShapeException,
            UnsupportedOperatorException,
            NotImplementedError,
            RuntimeError,
        ) as error:
            notes.append(
                f"the model factory reads tensor values ({type(error).__name__}), so each rank "
                "builds the whole model once before it keeps its shards"
            )
        if notes:  # outside of the handler: what it raises now is the user's own error, alone
            with seeded(seed):
                module = factory()
    if not isinstance(module, nn.Module):
        raise UserCodeError(
            f"model() returned {type(module).__name__}, but must return a torch.nn.Module"
        )
    return _named(module, tape.entries, notes)


def built(factory: Callable[[], nn.Module], seed: int, model: Blueprint) -> nn.Module:
    """The factory's module for real, in one process: what it leaves on the meta device is made."""
    with seeded(seed):
        module = factory()
    real: dict[int, Tensor] = {}  # a tied tensor stays tied
    for path, part in module.named_modules():
        for name, tensor in {**part._parameters, **part._buffers, **vars(part)}.items():
            if not (isinstance(tensor, Tensor) and tensor.is_meta):
                continue
            if id(tensor) not in real:
                made = model.stand_in(f"{path}.{name}" if path else name)
                trained = isinstance(tensor, nn.Parameter)
                real[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if trained else made
            setattr(part, name, real[id(tensor)])
    return module


def _named(module: nn.Module, tape: list[_Entry], notes: list[str]) -> Blueprint:
    parameters: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in module.named_parameters(remove_duplicate=False):
        if id(tensor) in first:
            tied[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            parameters[name] = tensor
    buffers = dict(module.named_buffers())
    return Blueprint(module, parameters, tied, buffers, _constants(module), notes, tape)


def _constants(module: nn.Module) -> dict[str, Tensor]:
    """Tensors that modules keep as plain attributes, by path."""
    found: dict[str, Tensor] = {}
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor):
                found[f"{path}.{name}" if path else name] = value
    return found
