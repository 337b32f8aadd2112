"""`mw.annotate`: the user's word on how a value inside the model lies, as an op of the program.

The gradient of an annotated value is annotated alike (GSPMD, Xu et al. 2021, section 3.2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from meshwright.compile.trace import user_line
from meshwright.errors import PlanError, nearest
from meshwright.plan.mesh import AXES
from meshwright.program.cut import MARK

__all__ = ["annotate", "cut"]


def annotate(tensor: Tensor, *dims: str | None, whole: str | tuple[str, ...] = ()) -> Tensor:
    """Say how `tensor` lies over the mesh; outside a run, or where an axis is not there, a no-op.

    Args:
        tensor: any value inside a model or loss.
        dims: for each dim, the mesh axis that splits it, or None; dims left out are None.
        whole: a mesh axis, or several, over which it must not be split. Axes named nowhere are
            left open.

    Raises:
        PlanError: an axis that there is not, named twice, or a dim that is not there.
    """
    whole = (whole,) if isinstance(whole, str) else tuple(whole)
    _require(tensor, dims, whole)
    if not torch.compiler.is_compiling() or not (any(dims) or whole):
        return tensor
    made: Tensor = _annotate(tensor, ",".join(dim or "" for dim in dims), ",".join(whole))
    return made


def cut(tensor: Tensor) -> Tensor:
    """Mark that a pipeline stage may begin here; outside a run a no-op.

    A model with marks is cut at some of them and nowhere else: as many as a plan has stages.

    Args:
        tensor: any value inside a model; what follows it is of the next stage.
    """
    if not torch.compiler.is_compiling():
        return tensor
    made: Tensor = _annotate(tensor, "", MARK)
    return made


def _require(tensor: Tensor, dims: tuple[str | None, ...], whole: tuple[str, ...]) -> None:
    named = [*(dim for dim in dims if dim is not None), *whole]
    for axis in named:
        if axis not in AXES:
            raise PlanError(
                f"{user_line()}: annotate names the mesh axis {axis!r}; {nearest(str(axis), AXES)}"
            )
        if named.count(axis) > 1:
            raise PlanError(
                f"{user_line()}: annotate names the mesh axis {axis} twice; an axis splits one dim"
            )
    if len(dims) > tensor.dim():
        raise PlanError(
            f"{user_line()}: annotate names {len(dims)} dims of a tensor of shape "
            f"{list(tensor.shape)}; name {tensor.dim()} or fewer"
        )


@torch.library.custom_op("meshwright::annotate", mutates_args=())
def _annotate(x: Tensor, dims: str, whole: str) -> Tensor:
    del dims, whole  # they are read off the program
    return x.clone()


@_annotate.register_fake
def _(x: Tensor, *_: str) -> Tensor:
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: tuple[Tensor, str, str], output: Tensor) -> None:
    del output
    _, ctx.dims, ctx.whole = inputs


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return _annotate(gradient, ctx.dims, ctx.whole), None, None


_annotate.register_autograd(_backward, setup_context=_setup)
