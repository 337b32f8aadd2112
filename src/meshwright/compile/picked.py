"""What a mask picks, `x[mask]`, kept as all of `x` with the mask beside it.

How much is picked depends on values, so a program has no shape for it. But a loss mostly computes
elementwise on what it picked and then takes the mean or the sum: that is the same of all of `x`
with the rest left out at the end. The rest is 1 from the start, so that no logarithm or quotient of
it spoils a gradient, and what it is then worth is dropped. Any other use is refused, as before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from meshwright.compile.ctc import ctc_loss

__all__ = ["Picks"]

_PICKS = (torch.Tensor.masked_select, torch.masked_select, torch.Tensor.__getitem__)
_ASKS = (
    torch.Tensor.dtype.__get__,  # type: ignore[attr-defined]
    torch.Tensor.device.__get__,
    torch.Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    torch.Tensor.ndim.__get__,  # type: ignore[attr-defined]
    torch.Tensor.dim,
    torch.Tensor.is_floating_point,
)
"""What a stand-in answers rightly; how many elements it has is not among it."""
_ELEMENTWISE = frozenset(
    """
    abs add clamp clip clone contiguous detach div divide double eq exp expm1 float ge gelu gt half
    le log log10 log1p log2 logical_and logical_not logical_or logsigmoid long lt maximum minimum
    mul multiply ne neg pow reciprocal relu rsqrt rsub sigmoid sign silu softplus sqrt square sub
    subtract tanh to true_divide type_as
    __abs__ __add__ __eq__ __ge__ __gt__ __le__ __lt__ __mul__ __ne__ __neg__ __pow__ __radd__
    __rmul__ __rpow__ __rsub__ __rtruediv__ __sub__ __truediv__ __invert__ __and__ __or__
    """.split()  # noqa: SIM905 - a table of words
)
_LOSSES = (
    F.l1_loss, F.mse_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
)  # fmt: skip
_Kwargs = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Picked:
    """What `mask` picks of `whole`, whose first dims are the mask's.

    Attributes:
        whole: with ones where the mask does not pick.
        mask: what is picked, as it was then.
        said: the tensor that said so; picks by the same one have as many elements.
    """

    whole: Tensor
    mask: Tensor
    said: Tensor

    @property
    def rest(self) -> tuple[int, ...]:
        """Sizes of the dims of a picked row."""
        return tuple(self.whole.shape[self.mask.dim() :])

    def wide(self) -> Tensor:
        """The mask with as many dims as the whole."""
        return self.mask.reshape(*self.mask.shape, *[1] * len(self.rest))

    def total(self) -> Tensor:
        """The sum of what is picked."""
        return torch.where(self.wide(), self.whole, torch.zeros((), dtype=self.whole.dtype)).sum()

    def mean(self) -> Tensor:
        """Its mean."""
        return self.total() / (self.mask.sum() * math.prod(self.rest))

    def stand_in(self) -> Tensor:
        """A tensor of its dtype and number of dims."""
        return self.whole.flatten(0, self.mask.dim() - 1)


class Picks(TorchFunctionMode):
    """Under it, what is picked by a mask may be computed with elementwise, and reduced."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[
            int, tuple[Tensor, _Picked]
        ] = {}  # tensors too: ids of the dead are reused

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.ctc_loss:
            loss = ctc_loss(self._picked_rows, *args, **kwargs)
            if loss is not None:
                return loss
        if func in _PICKS and (picked := _pick(*args, **kwargs)) is not None:
            return self._told(picked)
        if not self.known or func in _ASKS:
            return func(*args, **kwargs)
        found = pytree.tree_map(self._find, (args, kwargs))
        if any(isinstance(leaf, _Picked) for leaf in pytree.tree_leaves(found)):
            answer = _computed(func, *found)
            if answer is not None:
                return self._told(answer) if isinstance(answer, _Picked) else answer
            args, kwargs = pytree.tree_map(_refused, found)
        return func(*args, **kwargs)

    def _told(self, picked: _Picked) -> Tensor:
        place = picked.stand_in()
        self.known[id(place)] = (place, picked)
        return place

    def _find(self, leaf: Any) -> Any:
        known = self.known.get(id(leaf)) if isinstance(leaf, Tensor) else None
        return leaf if known is None else known[1]

    def _picked_rows(self, targets: Tensor) -> tuple[Tensor, Tensor] | None:
        """(rows, mask) that targets were picked from."""
        found = self._find(targets)
        if not isinstance(found, _Picked) or found.rest or found.mask.dim() != 2:
            return None
        return found.whole, found.mask


def _pick(x: Any, mask: Any) -> _Picked | None:
    """What a mask over the first dims of `x` picks; None where it is no such call."""
    if not isinstance(x, Tensor) or not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        return None
    if mask.dim() == 0 or x.shape[: mask.dim()] != mask.shape:
        return None
    bare = _Picked(x, mask.clone(), mask)
    return replace(bare, whole=torch.where(bare.wide(), x, torch.ones((), dtype=x.dtype)))


def _refused(leaf: Any) -> Any:
    """What is picked, as torch has it: its shape is not known, which is told with the line."""
    if not isinstance(leaf, _Picked):
        return leaf
    return torch.ops.aten.index.Tensor(leaf.whole, [leaf.mask])


def _computed(func: Any, args: tuple[Any, ...], kwargs: _Kwargs) -> _Picked | Tensor | None:
    """What a call makes of picked operands; None where it is not known to respect what is."""
    leaves = pytree.tree_leaves((args, dict(kwargs)))
    first, *others = [leaf for leaf in leaves if isinstance(leaf, _Picked)]
    if any(other.said is not first.said for other in others):
        return None
    if func is F.cross_entropy:
        return _classes(*args, **kwargs)
    if func in _LOSSES:
        return _loss(func, first, args, kwargs)
    name = func.__name__
    if name in ("sum", "mean") and len(args) == 1 and not kwargs:
        return first.total() if name == "sum" else first.mean()
    if name in ("view", "reshape") and args[1:] in (((-1, *first.rest)), ((-1, *first.rest),)):
        return first
    return _elementwise(func, first, args, kwargs) if name in _ELEMENTWISE else None


def _elementwise(
    func: Callable[..., Tensor], first: _Picked, args: tuple[Any, ...], kwargs: _Kwargs
) -> _Picked | None:
    """Each picked operand whole; others must be the same for every picked row."""
    if kwargs.get("out") is not None or kwargs.get("inplace"):
        return None
    for leaf in pytree.tree_leaves((args, dict(kwargs))):
        if isinstance(leaf, Tensor) and leaf.dim() > len(first.rest):
            return None
        if isinstance(leaf, _Picked) and leaf.rest != first.rest:
            return None
    args, kwargs = pytree.tree_map(
        lambda leaf: leaf.whole if isinstance(leaf, _Picked) else leaf, (args, dict(kwargs))
    )
    return replace(first, whole=func(*args, **kwargs))


def _loss(
    func: Callable[..., Tensor], first: _Picked, args: tuple[Any, ...], kwargs: _Kwargs
) -> _Picked | Tensor | None:
    """A loss of picked elements: of each, then reduced."""
    named = dict(kwargs)
    reduction = named.pop("reduction", "mean")
    if len(args) > 2 or named.pop("size_average", None) or named.pop("reduce", None):
        return None
    each = _elementwise(lambda *a, **k: func(*a, **k, reduction="none"), first, args, named)
    if each is None or reduction == "none":
        return each
    return each.mean() if reduction == "mean" else each.total()


def _classes(rows: Any, target: Any, weight: Tensor | None = None, **named: Any) -> Tensor | None:
    """Cross-entropy of picked rows: targets of the others are the ignored one."""
    both = isinstance(rows, _Picked) and isinstance(target, _Picked)
    if not both or len(rows.rest) != 1 or target.rest or named.get("reduction") == "none":
        return None
    ignored = named.get("ignore_index", -100)
    wanted = torch.where(target.mask, target.whole, ignored).reshape(-1)
    return F.cross_entropy(rows.whole.reshape(-1, rows.rest[0]), wanted, weight, **named)
