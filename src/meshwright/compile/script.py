"""What a run of the user's code did, op by op, so that two runs can be compared.

A second trace would show whether two differ, at the price of the first; a run on fake tensors under
a `Recorder` costs a sixth of it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from typing_extensions import override

__all__ = ["Recorder", "Script"]


@dataclass(slots=True)
class Script:
    """Ops in order, each with its arguments; tensors are the numbers in which they were first seen.

    Scripts are equal where the same ops ran on the same tensors and plain values.
    """

    lines: list[tuple[object, ...]] = field(default_factory=list)
    _numbers: dict[int, int] = field(default_factory=dict)
    _kept: list[Tensor] = field(default_factory=list)  # a number is by identity, which dies with it

    def note(self, what: object, given: object, made: object = ()) -> None:
        """Add a line; what is made follows from what is given, so it is only numbered."""
        self.lines.append((what, *(self._told(leaf) for leaf in pytree.tree_leaves(given))))
        for leaf in pytree.tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._number(leaf)

    def _told(self, leaf: object) -> object:
        if not isinstance(leaf, Tensor):
            return repr(leaf)  # 1 is not 1.0, and nan is nan
        known = id(leaf) in self._numbers
        number = self._number(leaf)
        return number if known else (number, leaf.dtype, tuple(leaf.shape), _content(leaf))

    def _number(self, tensor: Tensor) -> int:
        if id(tensor) not in self._numbers:
            self._numbers[id(tensor)] = len(self._kept)
            self._kept.append(tensor)
        return self._numbers[id(tensor)]


def _content(tensor: Tensor) -> bytes:
    """Of a tensor that the code brings along, which a program keeps; others have none."""
    if type(tensor) is not Tensor or tensor.device.type == "meta":
        return b""
    if torch._is_functional_tensor(tensor):  # noqa: SLF001
        return b""  # a wrapper of torch's, which has no memory
    with _disable_current_modes():
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        return hashlib.sha256(flat.numpy().tobytes()).digest()


class Recorder(TorchDispatchMode):
    """Writes every op that reaches it into a script."""

    def __init__(self, script: Script) -> None:
        """Lines go to `script`."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.script = script

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace != "prim":  # what only asks
            self.script.note(func, (args, kwargs or {}), result)
        return result
