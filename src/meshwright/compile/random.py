"""Random ops of user code, replaced by counter draws.

`RandomMode` serves the trace and the eager reference of `verify` alike, so both count random ops
in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from meshwright.compile.draw import keep
from meshwright.compile.experts import grouped_mm
from meshwright.compile.precision import promoted
from meshwright.errors import NotTraceable

__all__ = ["RandomMode"]

aten = torch.ops.aten

Draw = Callable[[str, Sequence[int]], Tensor]
Write = Callable[[Tensor, str, int, float, float], Tensor]


class RandomMode(TorchDispatchMode):
    """Replaces every random op of the code under it by counter draws, in order.

    With `promote`, floating casts and creations inside the code go to float64 too, so that a
    model's own casts to float32 do not blunt a float64 verification.
    """

    def __init__(
        self,
        emit: Callable[[str, Sequence[int], int], Tensor],
        *,
        promote: bool = False,
        write: Write | None = None,
    ):
        """`emit(kind, size, n)` makes the numbers of the n-th draw.

        `write(x, kind, n, scale, shift)`, where given, puts those of a tensor filled in place into
        it without a second one.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.emit = emit
        self.count = 0
        self.promote = promote
        self.write = write

    def _draw(self, kind: str, size: Sequence[int]) -> Tensor:
        self.count += 1
        return self.emit(kind, [int(s) for s in size], self.count - 1)

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.promote:
            args, kwargs = promoted(func, args, kwargs)
        if func is aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            return grouped_mm(*args, **kwargs)  # torch's has no float64, and no shape of float32
        if self.write is not None and func in _SPANS:
            kind, scale, shift = _SPANS[func](*args[1:], **kwargs)
            self.count += 1
            return self.write(args[0], kind, self.count - 1, scale, shift)
        handler = _HANDLERS.get(func)
        if handler is not None:
            return handler(self._draw, *args, **kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags and not _deterministic(
            func, args, kwargs
        ):
            raise NotTraceable(
                f"the model draws random numbers by {func}, for which Meshwright has no "
                "counter-based"
                " draw; use torch.rand, randn, bernoulli, dropout or one built on them"
            )
        return func(*args, **kwargs)


def _deterministic(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Ops that carry the tag for their dropout argument only, with it at zero."""
    name = str(func)
    if "scaled_dot_product" not in name:
        return False
    named = {a.name: a for a in func._schema.arguments}
    if "dropout_p" not in named:
        return True
    place = [a.name for a in func._schema.arguments].index("dropout_p")
    p = args[place] if place < len(args) else kwargs.get("dropout_p", 0.0)
    return float(p) == 0.0


def _bernoulli_in_place(draw: Draw, x: Tensor, p: float | Tensor = 0.5, **_: Any) -> Tensor:
    if isinstance(p, Tensor):
        return x.copy_((draw("uniform", x.shape) < p).to(x.dtype))
    return x.copy_(draw(keep(p, x.dtype), x.shape))


def _bernoulli(draw: Draw, x: Tensor, p: float | None = None, **_: Any) -> Tensor:
    if p is None:
        return (draw("uniform", x.shape) < x).to(x.dtype)
    return draw(keep(p, x.dtype), x.shape)


def _native_dropout(
    draw: Draw, x: Tensor, p: float, train: bool | None = True
) -> tuple[Tensor, Tensor]:
    if not train or p == 0:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    kept = draw(keep(1 - p, torch.bool), x.shape)
    return x * kept.to(x.dtype) * (1 / (1 - p) if p < 1 else 0.0), kept


_BITS = {torch.float16: 11, torch.bfloat16: 8}


def _uniform(draw: Draw, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Numbers in [0, 1); what a short dtype would round up to 1 becomes the largest below.

    In float64 the same ops change nothing, so that a program in bf16 can be verified there.
    """
    u = draw("uniform", size).to(dtype)
    return torch.where(u < 1, u, 1 - 2.0 ** -_BITS[dtype]) if dtype in _BITS else u


def _exponential(draw: Draw, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Numbers above zero: their logarithm is taken (Gumbel), and they are divided by."""
    return -torch.log1p(-draw("uniform", size).clamp(min=2.0**-25)).to(dtype)


def _floating(dtype: torch.dtype | None) -> torch.dtype:
    return dtype or torch.get_default_dtype()


def _rand(draw: Draw, size: Sequence[int], *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return _uniform(draw, size, _floating(dtype))


def _randn(
    draw: Draw, size: Sequence[int], *, dtype: torch.dtype | None = None, **_: Any
) -> Tensor:
    return draw("normal", size).to(_floating(dtype))


def _rand_like(draw: Draw, x: Tensor, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return _uniform(draw, x.shape, dtype or x.dtype)


def _randn_like(draw: Draw, x: Tensor, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return draw("normal", x.shape).to(dtype or x.dtype)


def _uniform_in_place(draw: Draw, x: Tensor, low: float = 0, high: float = 1, **_: Any) -> Tensor:
    return x.copy_(_uniform(draw, x.shape, x.dtype) * (high - low) + low)


def _uniform_span(low: float = 0, high: float = 1, **_: Any) -> tuple[str, float, float]:
    return "uniform", high - low, low


def _normal_span(mean: float = 0, std: float = 1, **_: Any) -> tuple[str, float, float]:
    return "normal", std, mean


def _normal_in_place(draw: Draw, x: Tensor, mean: float = 0, std: float = 1, **_: Any) -> Tensor:
    return x.copy_(draw("normal", x.shape).to(x.dtype) * std + mean)


def _normal_tensors(draw: Draw, mean: Any, std: Any = 1.0, *_: Any, **__: Any) -> Tensor:
    like = mean if isinstance(mean, Tensor) else std
    shape = torch.broadcast_shapes(*(x.shape for x in (mean, std) if isinstance(x, Tensor)))
    drawn: Tensor = draw("normal", shape).to(like.dtype) * std + mean
    return drawn


def _normal_size(draw: Draw, mean: float, std: float, size: Sequence[int], **k: Any) -> Tensor:
    return _randn(draw, size, **k) * std + mean


def _exponential_in_place(draw: Draw, x: Tensor, rate: float = 1, **_: Any) -> Tensor:
    return x.copy_(_exponential(draw, x.shape, x.dtype) / rate)


def _log_normal_in_place(
    draw: Draw, x: Tensor, mean: float = 1, std: float = 2, **_: Any
) -> Tensor:
    return x.copy_(torch.exp(draw("normal", x.shape).to(x.dtype) * std + mean))


def _cauchy_in_place(
    draw: Draw, x: Tensor, median: float = 0, sigma: float = 1, **_: Any
) -> Tensor:
    turned = torch.tan(math.pi * (draw("uniform", x.shape).to(x.dtype) - 0.5))
    return x.copy_(median + sigma * turned)


def _geometric_in_place(draw: Draw, x: Tensor, p: float, **_: Any) -> Tensor:
    u = draw("uniform", x.shape).to(torch.float64)
    failure = math.log1p(-p) if p < 1 else -math.inf
    return x.copy_(torch.ceil(torch.log1p(-u) / failure).clamp(min=1).to(x.dtype))


def _integers(draw: Draw, low: int, high: int, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    if high <= low:
        raise NotTraceable(f"random integers from {low} to {high}: the range is empty")
    return (draw("integers", size) % (high - low) + low).to(dtype)


def _randint(draw: Draw, high: int, size: Sequence[int], *, dtype: Any = None, **_: Any) -> Tensor:
    return _integers(draw, 0, high, size, dtype or torch.int64)


def _randint_low(
    draw: Draw, low: int, high: int, size: Sequence[int], *, dtype: Any = None, **_: Any
) -> Tensor:
    return _integers(draw, low, high, size, dtype or torch.int64)


def _randint_like(draw: Draw, x: Tensor, high: int, *, dtype: Any = None, **_: Any) -> Tensor:
    return _integers(draw, 0, high, x.shape, dtype or x.dtype)


def _randint_like_low(
    draw: Draw, x: Tensor, low: int, high: int, *, dtype: Any = None, **_: Any
) -> Tensor:
    return _integers(draw, low, high, x.shape, dtype or x.dtype)


def _random_in_place(draw: Draw, x: Tensor, *bounds: int | None, **_: Any) -> Tensor:
    low, high = (0, 2**31) if not bounds else (0, bounds[0]) if len(bounds) == 1 else bounds
    return x.copy_(_integers(draw, low or 0, high or 2**31, x.shape, x.dtype))


def _randperm(draw: Draw, n: int, *, dtype: Any = None, **_: Any) -> Tensor:
    return torch.argsort(draw("uniform", (n,)), stable=True).to(dtype or torch.int64)


def _multinomial(draw: Draw, x: Tensor, count: int, replacement: bool = False, **_: Any) -> Tensor:
    """Exponential race: the smallest of E/p; with replacement, the inverse of the cumulated sum."""
    if replacement:
        total = x.cumsum(-1)
        u = draw("uniform", (*x.shape[:-1], count)).to(x.dtype) * total[..., -1:]
        return torch.searchsorted(total, u, right=True).clamp(max=x.shape[-1] - 1)
    race = _exponential(draw, x.shape, x.dtype) / x
    return race.argsort(-1)[..., :count]


_SPANS: dict[Any, Callable[..., tuple[str, float, float]]] = {
    aten.uniform_.default: _uniform_span,
    aten.normal_.default: _normal_span,
}
"""Ops that fill in place: their arguments -> (kind, scale, shift)."""

_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.bernoulli_.float: _bernoulli_in_place,
    aten.bernoulli_.Tensor: _bernoulli_in_place,
    aten.bernoulli.default: _bernoulli,
    aten.bernoulli.p: _bernoulli,
    aten.native_dropout.default: _native_dropout,
    aten.rand.default: _rand,
    aten.randn.default: _randn,
    aten.rand_like.default: _rand_like,
    aten.randn_like.default: _randn_like,
    aten.uniform_.default: _uniform_in_place,
    aten.normal_.default: _normal_in_place,
    aten.normal.Tensor_float: _normal_tensors,
    aten.normal.float_Tensor: _normal_tensors,
    aten.normal.Tensor_Tensor: _normal_tensors,
    aten.normal.float_float: _normal_size,
    aten.exponential_.default: _exponential_in_place,
    aten.log_normal_.default: _log_normal_in_place,
    aten.cauchy_.default: _cauchy_in_place,
    aten.geometric_.default: _geometric_in_place,
    aten.randint.default: _randint,
    aten.randint.low: _randint_low,
    aten.randint_like.default: _randint_like,
    aten.randint_like.low_dtype: _randint_like_low,
    aten.random_.default: _random_in_place,
    aten.random_.to: _random_in_place,
    getattr(aten.random_, "from"): _random_in_place,
    aten.randperm.default: _randperm,
    aten.multinomial.default: _multinomial,
}
