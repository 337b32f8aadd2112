"""Where tensors meet traced numbers: torch's functions with scalar inputs in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from typing_extensions import override

from meshwright.compile.scalar import Number, Numbers
from meshwright.errors import NotTraceable

__all__ = ["Meeting"]


class Meeting(TorchFunctionMode):
    """Replaces traced numbers among a function's arguments, and follows what `.item()` reads."""

    def __init__(self, numbers: Numbers) -> None:
        """Of one trace."""
        super().__init__()
        self.numbers = numbers

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SPECIAL:
            return _SPECIAL[func](self.numbers, *args)
        leaves = pytree.tree_leaves((args, kwargs))
        if not any(isinstance(leaf, Number) for leaf in leaves):
            return func(*args, **kwargs)
        try:
            return self._met(func, args, kwargs)
        except (TypeError, RuntimeError) as error:
            raise self.numbers.refusal(
                f"{_bare(func)}() takes no number that changes from step to step ({error})"
            ) from error

    def _met(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = _bare(func)
        if name in _WEIGHTED and (name not in ("add", "sub") or "alpha" in kwargs or len(args) > 2):
            return self._weighted(func, name, args, kwargs)
        if name in _FILLED:
            return _FILLED[name](self.numbers, *args, **kwargs)
        like = next((a for a in args if isinstance(a, Tensor)), None)
        change = {"lerp": self._alike, "clamp": self._bound}.get(name, self._scalar)
        args, kwargs = pytree.tree_map(lambda leaf: change(leaf, like), (args, kwargs))
        return func(*args, **kwargs)

    def _weighted(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`add(a, b, alpha=w)` is `add(a, w * b)`, in the dtype that the sum has."""
        key, others = _WEIGHTED[name]
        rest = {k: v for k, v in kwargs.items() if k != key}
        tensors = [a for a in args if isinstance(a, Tensor)]
        weight = kwargs[key] if key in kwargs else next(a for a in args if isinstance(a, Number))
        if len(tensors) != 1 + others:
            raise NotTraceable(f"{name}() of {len(args)} arguments")
        dtype = torch.result_type(tensors[0], tensors[1])
        first = tensors[1].to(dtype) * self.numbers.tensor(weight)
        if name == "addcmul":
            first = first * tensors[2]
        elif name == "addcdiv":
            first = first / tensors[2]
        if name == "sub":
            first = -first
        plain = Tensor.add_ if func.__name__.endswith("_") else torch.add
        return plain(tensors[0], first.to(dtype), **rest)

    def _scalar(self, leaf: Any, like: Tensor | None) -> Any:
        """A scalar input; in the dtype of what it meets, if that is a scalar too."""
        if not isinstance(leaf, Number):
            return leaf
        made = self.numbers.tensor(leaf)
        alike = like is not None and not like.dim() and like.is_floating_point()
        return made.to(like.dtype) if alike and like is not None else made

    def _alike(self, leaf: Any, like: Tensor | None) -> Any:
        if not isinstance(leaf, Number):
            return leaf
        return self.numbers.tensor(leaf).to(None if like is None else like.dtype)

    def _bound(self, leaf: Any, like: Tensor | None) -> Any:
        """Bounds are all numbers or all tensors."""
        if isinstance(leaf, int | float) and not isinstance(leaf, Number) and like is not None:
            return torch.full((), leaf, dtype=like.dtype)
        return self._alike(leaf, like)


def _bare(func: Any) -> str:
    """`add` of `add_` and `__add__`."""
    return str(func.__name__).strip("_")


_WEIGHTED = {"add": ("alpha", 1), "sub": ("alpha", 1), "addcmul": ("value", 2),
             "addcdiv": ("value", 2)}  # fmt: skip
"""Functions of tensors with a weight -> its name, and how many tensors come beside the first."""


def _item(numbers: Numbers, tensor: Tensor) -> Any:
    return numbers.read(tensor)


def _truth(numbers: Numbers, _: Tensor) -> Any:
    raise numbers.refusal("a branch depends on a tensor's value")


def _number(numbers: Numbers, _: Tensor) -> Any:
    raise numbers.refusal("float() or int() of a tensor")


def _data(_: Numbers, tensor: Tensor) -> Tensor:
    return tensor.detach()


def _set_data(_: Numbers, tensor: Tensor, new: Tensor) -> None:
    tensor.copy_(new)


_DATA: Any = Tensor.data
_SPECIAL: Mapping[Any, Callable[..., Any]] = {
    Tensor.item: _item,
    Tensor.__bool__: _truth,
    Tensor.__float__: _number,
    Tensor.__int__: _number,
    Tensor.__index__: _number,
    _DATA.__get__: _data,
    _DATA.__set__: _set_data,
}


def _tensor(numbers: Numbers, value: Any, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    made: Tensor = numbers.tensor(value)
    return made.to(dtype or torch.get_default_dtype())


def _full_like(numbers: Numbers, like: Tensor, value: Any, **how: Any) -> Tensor:
    made: Tensor = torch.zeros_like(like, **how) + numbers.tensor(value)
    return made


def _full(numbers: Numbers, size: Any, value: Any, **how: Any) -> Tensor:
    zeros = torch.zeros(size, **how)
    made: Tensor = zeros + numbers.tensor(value).to(zeros.dtype)
    return made


_FILLED: Mapping[str, Callable[..., Tensor]] = {
    "tensor": _tensor, "as_tensor": _tensor, "full": _full, "full_like": _full_like,
}  # fmt: skip
