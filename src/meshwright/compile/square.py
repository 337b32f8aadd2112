"""The sum of squares of a gradient, as an op."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["square"]


def square(tensor: Tensor) -> Tensor:
    """The sum of squares in float64, for which a squared fp16 gradient may be too small."""
    if tensor.numel() == 1:  # a count may be large, and is to be told from the next one
        return tensor.double().square().sum()
    wide = torch.promote_types(tensor.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=wide)
    return norm.double().square()


@torch.library.custom_op("meshwright::square", mutates_args=())
def square_op(tensor: Tensor, apart: str) -> Tensor:
    """The same; over the axes in `apart` a partial sum's terms are squared (only rules ask)."""
    del apart
    return square(tensor)


@square_op.register_fake
def _(tensor: Tensor, _apart: str) -> Tensor:
    return tensor.new_empty((), dtype=torch.float64)
