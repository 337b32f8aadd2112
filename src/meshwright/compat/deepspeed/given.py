"""A module that is built already, as the factory that a job wants.

Each rank of a DeepSpeed script builds the whole module before the engine sees it. The factory makes
a copy without memory whose tensors come from here one at a time; then the script's own are freed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from meshwright.comm.base import Exchange, Group, Start, Wait
from meshwright.errors import UserCodeError

__all__ = ["Given"]

_NUMBERS = count()
_GIVEN: WeakValueDictionary[int, Given] = WeakValueDictionary()
_CHUNK = 1 << 24  # elements that travel at once


@torch.library.custom_op("meshwright::given", mutates_args=())
def _given(owner: int, place: int, shape: list[int], like: Tensor) -> Tensor:
    """The values of a module's tensor; zeros once they are freed."""
    tensor = _GIVEN[owner].tensors[place]
    if list(tensor.shape) != shape:
        return torch.zeros(shape, dtype=like.dtype)
    return tensor.detach().clone()


@_given.register_fake
def _(owner: int, place: int, shape: list[int], like: Tensor) -> Tensor:
    del owner, place
    return like.new_empty(shape)


class Given:
    """A script's module: its tensors, which can be freed and put back."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.names = [name for name, _ in _named(module)]
        self.tensors = [tensor for _, tensor in _named(module)]
        self.forms = [(tuple(t.shape), t.dtype) for t in self.tensors]
        self.whole = True
        self._number = next(_NUMBERS)
        _GIVEN[self._number] = self

    def factory(self) -> nn.Module:
        """A copy of the module, its tensors made by an op that can be replayed alone."""

        def made(place: int) -> Tensor:
            shape, dtype = self.forms[place]
            like = torch.empty(0, dtype=dtype)
            found: Tensor = torch.ops.meshwright.given(self._number, place, list(shape), like)
            return found

        return self._copied(made)

    def fake(self, mode: FakeTensorMode) -> nn.Module:
        """A copy on fake tensors."""
        with mode:
            return self._copied(lambda k: torch.empty(self.forms[k][0], dtype=self.forms[k][1]))

    def _copied(self, make: Callable[[int], Tensor]) -> nn.Module:
        memo: dict[int, Any] = {}
        for place, tensor in enumerate(self.tensors):
            made = make(place)
            trained = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if trained else made
        try:
            return copy.deepcopy(self.module, memo)
        except Exception as error:
            raise UserCodeError(
                f"the model cannot be copied ({type(error).__name__}: {error}), which the engine "
                "does to trace it; keep what copy.deepcopy refuses out of the module"
            ) from error

    def agree(self, group: Group) -> Exchange:
        """All ranks take the first one's values, as DeepSpeed's do; an exchange."""
        for name, tensor in zip(self.names, self.tensors, strict=True):
            flat = tensor.detach().flatten()
            for start in range(0, flat.numel(), _CHUNK):
                part = flat[start : start + _CHUNK]
                handle = yield Start("broadcast", group, (part,), root=0, label=name)
                (found,) = yield Wait(handle)
                part.copy_(found)
            tensor.data.copy_(flat.view(tensor.shape))

    def free(self) -> None:
        """Give the tensors' memory back."""
        for tensor in self.tensors:
            tensor.data = torch.empty(0, dtype=tensor.dtype)
        self.whole = False

    def fill(self, values: Iterator[tuple[str, Tensor]]) -> None:
        """Put values in the tensors, by name."""
        place = {name: k for k, name in enumerate(self.names)}
        for name, value in values:
            tensor = self.tensors[place[name]]
            tensor.data = value.detach().to(tensor.dtype, copy=True)
        self.whole = True


def _named(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
