"""What a forward may not do, refused as it does it: writes that no trace sees, so no program has.

torch's tracer sees ops. It sees neither `x.data = y`, nor gradients that are put into `.grad`, nor
parameters that come and go; eager code would go on with them, a program without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from meshwright.compile.init import Blueprint
from meshwright.compile.trace import user_line
from meshwright.errors import UserCodeError

__all__ = ["forbidding", "require_untouched"]

_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_GRAD = torch.Tensor.grad.__set__  # type: ignore[union-attr]
_DOES: dict[Any, str] = {
    _DATA: "sets .data of a tensor of shape {shape}; make a new tensor, or keep what is to stay "
    "from step to step in a buffer (register_buffer)",
    _GRAD: "sets .grad of a tensor of shape {shape}; put it into the loss, or change the gradient "
    "with register_hook",
    torch.Tensor.backward: "runs a backward of its own; return a loss that holds all terms, or "
    "take gradients with torch.autograd.grad",
}


class _Forbidding(TorchFunctionMode):
    """Refuses calls of torch that write beside the program."""

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        what = _DOES.get(func)
        if what is not None:
            raise _refusal(what.format(shape=list(args[0].shape)))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def forbidding(model: Blueprint) -> Iterator[None]:
    """Within, the model's forward runs; what a program could not have is refused with its line.

    Raises:
        UserCodeError: it writes where no program can.
    """
    members = {id(part) for part in model.module.modules()}

    def on_parameter(part: nn.Module, name: str, made: object) -> None:
        if id(part) in members and made is not None:
            raise _refusal(_comes(f"parameter {name} of {type(part).__name__}"))

    def on_module(part: nn.Module, name: str, made: nn.Module | None) -> None:
        if made is None or id(made) in members or id(part) not in members:
            return
        if any(True for _ in made.parameters()):
            raise _refusal(_comes(f"module {name} of {type(part).__name__}, with parameters"))

    hooks = (
        register_module_parameter_registration_hook(on_parameter),
        register_module_module_registration_hook(on_module),
    )
    try:
        with _Forbidding():
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _comes(what: str) -> str:
    return f"makes {what}, which the optimizer does not know; make it in the model's __init__"


def _refusal(what: str) -> UserCodeError:
    line = user_line()
    return UserCodeError(f"{line + ': ' if line else ''}the forward {what}, or use --eager")


def require_untouched(parameters: Mapping[str, Tensor], trained: Collection[str]) -> None:
    """Return if a forward left its parameters' gradients and flags alone.

    Raises:
        UserCodeError: naming the parameter.
    """
    for name, tensor in parameters.items():
        if tensor.grad is not None:
            raise UserCodeError(
                f"the forward gives parameter {name} a gradient (torch.autograd.backward), which "
                "would be lost; return a loss that holds all terms, or use --eager"
            )
        if tensor.requires_grad != (name in trained):
            raise UserCodeError(
                f"the forward sets requires_grad of parameter {name} to {tensor.requires_grad}; "
                "set it in model(), or use --eager"
            )
