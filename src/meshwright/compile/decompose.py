"""Ops that hide a mean or a variance, taken apart before propagation.

`nll_loss`, `mean`, `mse_loss` and batch norm divide by a count, which would be the local one on a
shard; here each becomes sums and a division by the global count. The tracer applies these to the
traced ops, so shapes seen here are global.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from meshwright.compile.decompose_values import BY_VALUE

__all__ = ["DECOMPOSITIONS"]

aten = torch.ops.aten
MEAN, SUM = 1, 2
_SHORT = (torch.bfloat16, torch.float16)


def _nll_forward(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore: int
) -> Any:
    if reduction != MEAN:
        return NotImplemented
    total, count = aten.nll_loss_forward.default(x, target, weight, SUM, ignore)
    count = _counted(x, target, weight, ignore, count)
    return total / count, count


def _counted(
    x: Tensor, target: Tensor, weight: Tensor | None, ignore: int, count: Tensor
) -> Tensor:
    """How many targets count, of the targets alone: ranks can then add them up before they compute.

    Where classes have weights, or a short dtype could not count so far, it is the kernel's `count`.
    """
    if weight is not None or x.dtype in _SHORT:
        return count
    return (target != ignore).sum().to(x.dtype)


def _nll_backward(
    grad: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore: int,
    total: Tensor,
) -> Any:
    if reduction != MEAN:
        return NotImplemented
    return aten.nll_loss_backward.default(grad / total, x, target, weight, SUM, ignore, total)


def _wide(x: Tensor) -> Tensor:
    """What torch's own kernels sum 16-bit tensors in."""
    return x.float() if x.dtype in _SHORT else x


def _mean(x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    return (torch.sum(_wide(x), dtype=dtype) / x.numel()).to(dtype or x.dtype)


def _mean_dim(
    x: Tensor,
    dim: Sequence[int] | None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    dims = list(dim) if dim else list(range(x.dim()))
    count = math.prod(x.shape[d] for d in dims)
    total = torch.sum(_wide(x), dim=dims, keepdim=keepdim, dtype=dtype)
    return (total / count).to(dtype or x.dtype)


def _repeat(x: Tensor, times: Sequence[int]) -> Tensor:
    """Copies side by side: a dim of copies before each dim, so that either may be split."""
    sizes = [1] * (len(times) - x.dim()) + list(x.shape)
    if all(t == 1 for t in times):
        return x.reshape(sizes).clone()
    apart = [n for t, size in zip(times, sizes, strict=True) for n in (1, size)[t == 1 :]]
    wide = [n for t, size in zip(times, sizes, strict=True) for n in (t, size)[t == 1 :]]
    made = [t * n for t, n in zip(times, sizes, strict=True)]
    return x.reshape(apart).expand(wide).reshape(made).contiguous()  # as what reads it relies on


def _mse(x: Tensor, y: Tensor, reduction: int = MEAN) -> Tensor:
    return _averaged((x - y) ** 2, reduction)


def _mse_backward(grad: Tensor, x: Tensor, y: Tensor, reduction: int) -> Tensor:
    scale = 2.0 / x.numel() if reduction == MEAN else 2.0
    return scale * (x - y) * grad


def _averaged(each: Tensor, reduction: int) -> Tensor:
    """A loss per element, reduced as aten's number says."""
    if reduction == 0:
        return each
    return each.sum() / each.numel() if reduction == MEAN else each.sum()


def _share(grad: Tensor, x: Tensor, reduction: int) -> Tensor:
    """The gradient that each element of a reduced loss gets."""
    return grad / x.numel() if reduction == MEAN else grad


def _smooth_l1(x: Tensor, y: Tensor, reduction: int = MEAN, beta: float = 1.0) -> Tensor:
    far = (x - y).abs()
    if beta == 0:
        return _averaged(far, reduction)
    return _averaged(torch.where(far < beta, far * far / (2 * beta), far - beta / 2), reduction)


def _smooth_l1_backward(grad: Tensor, x: Tensor, y: Tensor, reduction: int, beta: float) -> Tensor:
    apart = x - y
    slope = torch.where(apart.abs() < beta, apart / beta, apart.sign()) if beta else apart.sign()
    return slope * _share(grad, x, reduction)


def _huber(x: Tensor, y: Tensor, reduction: int = MEAN, delta: float = 1.0) -> Tensor:
    far = (x - y).abs()
    each = torch.where(far <= delta, far * far / 2, delta * (far - delta / 2))
    return _averaged(each, reduction)


def _huber_backward(grad: Tensor, x: Tensor, y: Tensor, reduction: int, delta: float) -> Tensor:
    return (x - y).clamp(-delta, delta) * _share(grad, x, reduction)


def _soft_margin(x: Tensor, target: Tensor, reduction: int = MEAN) -> Tensor:
    return _averaged(torch.log1p(torch.exp(-target * x)), reduction)


def _soft_margin_backward(grad: Tensor, x: Tensor, target: Tensor, reduction: int) -> Tensor:
    return -target * torch.sigmoid(-target * x) * _share(grad, x, reduction)


def _bce_plain(
    x: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = MEAN
) -> Tensor:
    """torch holds both logarithms at -100."""
    yes, no = torch.log(x).clamp(min=-100), torch.log1p(-x).clamp(min=-100)
    each = (target - 1) * no - target * yes
    return _averaged(each if weight is None else each * weight, reduction)


def _bce_plain_backward(
    grad: Tensor, x: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = MEAN
) -> Tensor:
    slope = (x - target) / ((1 - x) * x).clamp(min=1e-12)
    slope = slope if weight is None else slope * weight
    return slope * _share(grad, x, reduction)


def _rows(x: Tensor) -> Tensor:
    """(n, c, h, w) -> (n h w, c)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _nll_2d_forward(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore: int
) -> tuple[Tensor, Tensor]:
    """Of images: that of their pixels."""
    how = SUM if reduction == MEAN else reduction
    found, count = aten.nll_loss_forward.default(_rows(x), target.reshape(-1), weight, how, ignore)
    if reduction == 0:
        return found.reshape(target.shape), count
    if reduction == SUM:
        return found, count
    count = _counted(x, target, weight, ignore, count)
    return found / count, count


def _nll_2d_backward(
    grad: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore: int,
    total: Tensor,
) -> Tensor:
    how = SUM if reduction == MEAN else reduction
    share = grad / total if reduction == MEAN else grad.reshape(-1) if reduction == 0 else grad
    flat = aten.nll_loss_backward.default(
        share, _rows(x), target.reshape(-1), weight, how, ignore, total
    )
    n, c, h, w = x.shape
    image: Tensor = flat.reshape(n, h, w, c).permute(0, 3, 1, 2)
    return image


def _bce(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    reduction: int = MEAN,
) -> Tensor:
    log_weight = 1 if pos_weight is None else (pos_weight - 1) * target + 1
    loss = (1 - target) * x - log_weight * aten.log_sigmoid_forward(x)[0]
    if weight is not None:
        loss = loss * weight
    return _averaged(loss, reduction)


def _log_sigmoid(x: Tensor) -> tuple[Tensor, Tensor]:
    smallest = torch.clamp_max(x, 0)
    return smallest - torch.log1p(torch.exp(-torch.abs(x))), x.new_empty(0)


def _log_sigmoid_backward(grad: Tensor, x: Tensor, _: Tensor) -> Tensor:
    return grad * torch.sigmoid(-x)


def _reduce_dims(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def _per_channel(c: Tensor, x: Tensor) -> Tensor:
    """c (C,) as (1, C, 1, ...) of x's rank."""
    return c.view([1, -1] + [1] * (x.dim() - 2))


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
) -> Tensor:
    y = (_wide(x) - _per_channel(mean, x)) * _per_channel(invstd, x)
    if weight is not None:
        y = y * _per_channel(weight, x)
    if bias is not None:
        y = y + _per_channel(bias, x)
    return y.to(x.dtype)


def _batch_norm_functional(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, ...]:
    """(y, mean, invstd, new running mean, new running variance); statistics over samples."""
    if not training:
        invstd = torch.rsqrt(running_var + eps)
        y = _batch_norm(x, weight, bias, running_mean, invstd)
        return y, x.new_zeros(0), x.new_zeros(0), running_mean.clone(), running_var.clone()
    y, mean, invstd, var = _train_norm(x, weight, bias, eps)
    count = x.numel() // x.shape[1]
    unbiased = var * (count / (count - 1)) if count > 1 else var
    new_mean = running_mean * (1 - momentum) + mean * momentum
    new_var = running_var * (1 - momentum) + unbiased * momentum
    return y, mean, invstd, new_mean, new_var


def _train_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dims, count = _reduce_dims(x), x.numel() // x.shape[1]
    mean = _wide(x).sum(dims) / count
    var = ((_wide(x) - _per_channel(mean, x)) ** 2).sum(dims) / count
    invstd = torch.rsqrt(var + eps)
    return _batch_norm(x, weight, bias, mean, invstd), mean, invstd, var


def _batch_norm_no_stats(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, ...]:
    del training, momentum
    return _train_norm(x, weight, bias, eps)[:3]


def _batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor | None,
    invstd: Tensor | None,
    train: bool,
    eps: float,
    mask: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    dims, count = _reduce_dims(x), x.numel() // x.shape[1]
    if not train:
        assert running_mean is not None and running_var is not None
        mean, invstd = running_mean, torch.rsqrt(running_var + eps)
    assert mean is not None and invstd is not None
    normal = (_wide(x) - _per_channel(mean, x)) * _per_channel(invstd, x)
    grad = _wide(grad)
    db = grad.sum(dims)
    dw = (grad * normal).sum(dims)
    scale = invstd if weight is None else invstd * weight
    if train:
        centred = grad - _per_channel(db / count, x) - normal * _per_channel(dw / count, x)
    else:
        centred = grad
    dx = (centred * _per_channel(scale, x)).to(x.dtype)
    found = (dx, dw, db)
    return tuple(t if wanted else None for t, wanted in zip(found, mask, strict=True))


def _batch_norm_cpu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """`native_batch_norm` without running statistics to update, or in evaluation."""
    if training and running_mean is None:
        return _train_norm(x, weight, bias, eps)[:3]
    if not training:
        assert running_mean is not None and running_var is not None
        y = _batch_norm(x, weight, bias, running_mean, torch.rsqrt(running_var + eps))
        return y, x.new_zeros(0), x.new_zeros(0)
    return NotImplemented


DECOMPOSITIONS: dict[Any, Any] = {
    **BY_VALUE,
    aten._conj.default: aten.conj_physical.default,  # a bit on a view, which no transport sees
    aten._neg_view.default: aten.neg.default,
    aten.nll_loss_forward.default: _nll_forward,
    aten.nll_loss_backward.default: _nll_backward,
    aten.mean.default: _mean,
    aten.mean.dim: _mean_dim,
    aten.repeat.default: _repeat,
    aten.nll_loss2d_forward.default: _nll_2d_forward,
    aten.nll_loss2d_backward.default: _nll_2d_backward,
    aten.smooth_l1_loss.default: _smooth_l1,
    aten.smooth_l1_loss_backward.default: _smooth_l1_backward,
    aten.huber_loss.default: _huber,
    aten.huber_loss_backward.default: _huber_backward,
    aten.soft_margin_loss.default: _soft_margin,
    aten.soft_margin_loss_backward.default: _soft_margin_backward,
    aten.binary_cross_entropy.default: _bce_plain,
    aten.binary_cross_entropy_backward.default: _bce_plain_backward,
    aten.mse_loss.default: _mse,
    aten.mse_loss_backward.default: _mse_backward,
    aten.binary_cross_entropy_with_logits.default: _bce,
    aten.log_sigmoid_forward.default: _log_sigmoid,
    aten.log_sigmoid_backward.default: _log_sigmoid_backward,
    aten._native_batch_norm_legit_functional.default: _batch_norm_functional,
    aten._native_batch_norm_legit.no_stats: _batch_norm_no_stats,
    aten.native_batch_norm.default: _batch_norm_cpu,
    aten.native_batch_norm_backward.default: _batch_norm_backward,
}
"""aten op -> torch function; the tracer leaves an op as it is where one answers NotImplemented."""
