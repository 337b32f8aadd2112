"""The reference of `verify`: the user's untouched code, eager, on one device.

`backward()` and `optimizer.step()` over the same micro-batches, under a mode that replaces only
random draws (by the same counter draws as the program's) and, in float64, promotes the model's own
casts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from meshwright.compile.draw import SampleDim, draw, position_operand
from meshwright.compile.init import Blueprint, built
from meshwright.compile.outcome import normalise
from meshwright.compile.precision import computing
from meshwright.compile.random import RandomMode
from meshwright.compile.settings import default_dtype, in_dtype, recast, straight_checkpoint
from meshwright.job import Job
from meshwright.run.build import micro_ranges
from meshwright.run.data import Source

__all__ = ["Reference", "Snapshot"]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The whole tensors after one step, by global name (`gradient/` as they were applied)."""

    loss: float
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]


class Reference:
    """Runs the job eagerly, one step at a time, on whole tensors."""

    def __init__(  # noqa: PLR0913 - all that a reference depends on
        self,
        job: Job,
        names: Blueprint,
        source: Source,
        microbatches: int,
        draws: Callable[[Any, int], Sequence[SampleDim | None]],
        dtype: torch.dtype | None,
        *,
        precision: str = "float32",
        flipped: bool = False,
        start: Mapping[str, Tensor] | None = None,
    ) -> None:
        """A reference at step 0.

        Args:
            job: of the user.
            names: the blueprint, for the global names of tied tensors.
            source: of batches, its own.
            microbatches: of the plan.
            draws: (micro-batch, samples in it) -> each random op's sample dim.
            dtype: float64, or None for the model's own.
            precision: of the plan: the code runs under autocast, as users would; in float64, where
                nothing is rounded, its creations keep torch's default dtype until they are used.
            flipped: samples in the opposite order, draws too: same sums in another order.
            start: weights to begin with instead of the factory's, by global name.
        """
        self.job, self.names, self.source, self.dtype = job, names, source, dtype
        self.microbatches, self.draws, self.flipped = microbatches, draws, flipped
        self.precision = precision
        self.model = built(job.model, job.seed, names)
        if start:
            _load(self.model, names, start)
        if dtype is not None:
            recast(self.model, dtype)
        self.optimizer = job.optimizer(self.model)
        self.scheduler = job.schedule(self.optimizer) if job.schedule is not None else None
        self.model.train()
        self.next = 0
        self.kept: dict[int, Snapshot] = {}

    def after(self, step: int) -> Snapshot:
        """The state after `step`; steps are run in order, the last two are kept."""
        while self.next <= step:
            self.kept[self.next] = self._step(self.next)
            self.kept.pop(self.next - 2, None)
            self.next += 1
        return self.kept[step]

    def _step(self, step: int) -> Snapshot:
        size = self.job.batch_size
        total, weight = 0.0, 0.0
        for k, (start, stop) in enumerate(micro_ranges(size, self.microbatches)):
            part, share = self._microbatch(step, k, start, stop)
            total, weight = total + part, weight + share
        trained = [p for p in self.model.parameters() if p.grad is not None]
        for parameter in trained:
            assert parameter.grad is not None
            parameter.grad *= size / weight
        if self.job.clip_norm is not None:
            nn.utils.clip_grad_norm_(trained, self.job.clip_norm)
        gradients = {name: p.grad.clone() for name, p in self._named() if p.grad is not None}
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)  # also what the optimizer does not hold
        if self.scheduler is not None:
            self.scheduler.step()
        return Snapshot(total / weight, gradients, self._weights(), self._slots())

    def _microbatch(self, step: int, k: int, start: int, stop: int) -> tuple[float, float]:
        tree = self.source.fetch(step, start, stop, (start, stop)).tree
        table = self.draws(tree, stop - start)  # of the batch as it comes: a rank traces that too
        tree = pytree.tree_map_only(Tensor, self._as_given, tree)
        place = position_operand(self.job.seed, step * self.job.batch_size + start, step, k)

        def emit(kind: str, size: Sequence[int], n: int) -> Tensor:
            sample = table[n] if n < len(table) else None
            drawn = draw(kind, size, n, sample, 0, place)
            return _flip_samples(drawn, sample) if self.flipped and sample else drawn

        # Not around the fetch: datasets make the same samples on both sides.
        mode = RandomMode(emit, promote=self.dtype == torch.float64)
        exact = self.dtype is not None  # then nothing is rounded, and autocast has no part in it
        default = self.dtype if self.precision == "float32" else None
        with default_dtype(default), straight_checkpoint(), mode:
            with computing("float32" if exact else self.precision):
                found = self.job.loss(self.model, tree)
            total, weight, _ = normalise(found, stop - start)
            (total / self.job.batch_size).backward()
        return float(total.detach()), float(weight)

    def _as_given(self, tensor: Tensor) -> Tensor:
        tensor = tensor.to(in_dtype(tensor.dtype, self.dtype))
        return tensor.flip(0) if self.flipped else tensor

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.model.named_parameters()

    def _weights(self) -> dict[str, Tensor]:
        found = {f"model/{name}": p.detach().clone() for name, p in self._named()}
        return found | {f"buffer/{n}": b.detach().clone() for n, b in self.model.named_buffers()}

    def _slots(self) -> dict[str, Tensor]:
        name_of = {id(p): name for name, p in self._named()}
        return slots(self.optimizer, name_of)


def slots(optimizer: torch.optim.Optimizer, name_of: Mapping[int, str]) -> dict[str, Tensor]:
    """`optimizer/<slot>/<parameter>` -> copy of the state tensor."""
    return {
        f"optimizer/{slot}/{name_of[id(parameter)]}": value.detach().clone()
        for parameter, state in optimizer.state.items()
        for slot, value in state.items()
        if isinstance(value, Tensor)
    }


def _load(model: nn.Module, names: Blueprint, start: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(start[f"model/{name}"])
        for name, buffer in model.named_buffers():
            if f"buffer/{name}" in start:
                buffer.copy_(start[f"buffer/{name}"])
    del names


def _flip_samples(tensor: Tensor, sample: SampleDim) -> Tensor:
    dim, outer, unit = sample
    shape = tensor.shape
    seen = tensor.reshape(*shape[:dim], outer, -1, unit, *shape[dim + 1 :])
    return seen.flip(dim + 1).reshape(shape)
