"""Batch norm whose running statistics wait for the whole batch (GPipe, Huang et al. 2019, 2.2).

Each micro-batch is normalised by its own statistics, as under any plan. An ordinary batch norm also
moves its running statistics once a micro-batch; this one gathers the sums of the batch's
micro-batches and moves them once, to where the whole batch in one piece would have moved them. All
of it is buffers and plain ops, so that every plan treats it as it treats the rest of the model.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meshwright.errors import UsageError

__all__ = ["DeferredBatchNorm", "deferred_batch_norm"]

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class DeferredBatchNorm(nn.SyncBatchNorm):
    """A batch norm over dim 1 of (N, C, ...) that moves its running statistics once a batch.

    With m the momentum, n the elements per channel of all `microbatches` together, and mean and
    variance those of all of them: running_mean becomes (1 - m) running_mean + m mean, running_var
    becomes (1 - m) running_var + m n/(n-1) variance.

    Attributes:
        microbatches: how many make a batch.
        sums, squares: of what lies off the running mean, over the batch so far, (C,).
        seen, count: micro-batches and elements per channel so far.
    """

    sums: Tensor
    squares: Tensor
    seen: Tensor
    count: Tensor

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm, microbatches: int) -> None:
        """Take the place of `norm`, whose parameters and buffers it takes over."""
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine)
        self.microbatches = microbatches
        self.weight, self.bias = norm.weight, norm.bias
        mean = cast(Tensor, norm.running_mean)
        self.running_mean, self.running_var = mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.register_buffer("sums", torch.zeros_like(mean))
        self.register_buffer("squares", torch.zeros_like(mean))
        self.register_buffer("seen", mean.new_zeros((), dtype=torch.long))
        self.register_buffer("count", mean.new_zeros((), dtype=torch.long))
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x by its own statistics; in evaluation, by the running ones."""
        mean, var = cast(Tensor, self.running_mean), cast(Tensor, self.running_var)
        if not self.training:
            return F.batch_norm(x, mean, var, self.weight, self.bias, eps=self.eps)
        with torch.no_grad():
            self._gather(x.detach(), mean, var)
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)

    def _gather(self, x: Tensor, mean: Tensor, var: Tensor) -> None:
        dims = [dim for dim in range(x.dim()) if dim != 1]
        # From the running mean, which stays meanwhile: squares of large means would cancel.
        off = x.to(mean.dtype) - mean.view(1, -1, *[1] * (x.dim() - 2))
        sums, squares = self.sums + off.sum(dims), self.squares + (off * off).sum(dims)
        seen, count = self.seen + 1, self.count + x.numel() // x.shape[1]
        last = seen == self.microbatches
        tracked = cast(Tensor, self.num_batches_tracked) + last
        share = (
            1.0 / tracked.clamp(min=1).to(mean.dtype) if self.momentum is None else self.momentum
        )
        n = count.to(mean.dtype)
        shift = sums / n
        unbiased = (squares - n * shift * shift) / (n - 1).clamp(min=1)
        var.copy_(torch.where(last, var + share * (unbiased - var), var))
        mean.copy_(torch.where(last, mean + share * shift, mean))
        self.num_batches_tracked.copy_(tracked)  # type: ignore[union-attr]
        for held, new in zip(
            (self.sums, self.squares, self.seen, self.count),
            (sums, squares, seen, count),
            strict=True,
        ):
            held.copy_(torch.where(last, torch.zeros_like(new), new))


def deferred_batch_norm(model: nn.Module, microbatches: int) -> nn.Module:
    """Make a model's batch norms move their running statistics once a batch, as GPipe's do.

    For the job's `model` factory, beside `normalize_over=batch_size // microbatches`:
    `model=lambda: mw.deferred_batch_norm(Net(), microbatches=4)`. Norms that keep no running
    statistics stay as they are.

    Args:
        model: changed in place.
        microbatches: that make a batch.

    Returns:
        The model, or what takes its place where it is itself a batch norm.

    Raises:
        UsageError: `microbatches` is no whole number of 1 or more.
    """
    if type(microbatches) is not int or microbatches < 1:
        raise UsageError(
            f"deferred_batch_norm got microbatches={microbatches!r}, but needs a whole number of 1 "
            "or more: batch_size // normalize_over of the job"
        )
    done: dict[nn.Module, nn.Module] = {}  # a norm that is used twice stays one
    for name, part in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(part, _PLAIN) or isinstance(part, DeferredBatchNorm):
            continue
        if part.running_mean is not None:
            made = done.setdefault(part, DeferredBatchNorm(part, microbatches))
            if not name:
                return made
            model.set_submodule(name, made)
    return model
