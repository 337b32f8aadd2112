"""The reference of `verify`: the user's untouched code, eager, on one device.

`backward()` and `optimizer.step()` over the same micro-batches, under a mode that replaces only
random draws (by the same counter draws as the program's) and, in float64, promotes the model's own
casts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils import _pytree as pytree

from meshwright.compile.draw import SampleDim, draw, position_operand
from meshwright.compile.init import Blueprint, built
from meshwright.compile.outcome import normalise
from meshwright.compile.random import RandomMode
from meshwright.compile.region import FLOAT32, Precision, precisely
from meshwright.compile.settings import default_dtype, in_dtype, recast, straight_checkpoint
from meshwright.job import Job, LossScale
from meshwright.run.build import micro_ranges
from meshwright.run.data.samples import Source
from meshwright.run.equality.slices import sliced_of
from meshwright.run.optimizer.scaling import nonfinite
from meshwright.run.optimizer.stochastic import Rounding

__all__ = ["Reference", "Snapshot", "average_of", "scaler_of", "slots"]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The whole tensors after one step, by global name.

    Attributes:
        loss: of the step.
        gradients: as they were applied; none of a step that overflowed.
        weights: parameters and buffers, and the average of the former where the job keeps one.
        optimizer: its state.
        loss_scale: of the step; None where nothing computes in fp16.
        skipped: it overflowed, so that nothing was applied.
        gain: of AdaScale, over all parameters; None where the job has none.
        iterations: what it takes all steps to be worth.
    """

    loss: float
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    loss_scale: float | None = None
    skipped: bool = False
    gain: float | None = None
    iterations: float = 0.0


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
        precision: Precision = FLOAT32,
        rounding: Rounding | None = None,
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
            rounding: of what the plan keeps in bf16, whole; its draws are those of the plan.
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
        self.rounding = rounding if dtype is None else None
        kept = self.rounding.numbers if self.rounding is not None else {}
        for name, parameter in self.model.named_parameters():
            if name in kept:
                parameter.data = parameter.data.bfloat16()
        self.scaler = scaler_of(job) if precision.scales and dtype is None else None
        self.optimizer = job.optimizer(self.model)
        self.scheduler = job.schedule(self.optimizer) if job.schedule is not None else None
        self.average = average_of(job, self.model)
        self.sliced = sliced_of(job.adascale, self.optimizer)
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
        buffers = [b.clone() for b in self.model.buffers()] if self.scaler is not None else []
        parts = self.microbatches if self.sliced is None else self.sliced.rule.scale
        for k, (start, stop) in enumerate(micro_ranges(size, parts)):
            part, share = self._part(step, k * self.microbatches // parts, start, stop)
            total, weight = total + part, weight + share
        before = 0 if self.sliced is None else math.floor(self.sliced.iterations)
        gradients, scale, skipped = self._update(step, size / weight, buffers)
        worth = 1 if self.sliced is None else math.floor(self.sliced.iterations) - before
        if self.scheduler is not None and not skipped:
            for _ in range(worth):
                self.scheduler.step()
        if self.average is not None and not skipped:
            self.average.update_parameters(self.model)
        found = self._weights(), self._slots()
        told = (None, 0.0) if self.sliced is None else (self.sliced.gain(), self.sliced.iterations)
        return Snapshot(total / weight, gradients, *found, scale, skipped, *told)

    def _part(self, step: int, k: int, start: int, stop: int) -> tuple[float, float]:
        """A micro-batch, or a slice of it, whose own gradients AdaScale looks at."""
        if self.sliced is None:
            return self._microbatch(step, k, start, stop)
        before = {parameter: parameter.grad for parameter in self.model.parameters()}
        self.model.zero_grad(set_to_none=True)
        found = self._microbatch(step, k, start, stop)
        self.sliced.take({id(p): p.grad for p in before if p.grad is not None})
        for parameter, gradient in before.items():
            if gradient is not None and parameter.grad is not None:
                parameter.grad += gradient
            elif gradient is not None:
                parameter.grad = gradient
        return found

    def _update(
        self, step: int, factor: float, buffers: Sequence[Tensor]
    ) -> tuple[dict[str, Tensor], float | None, bool]:
        """Step the optimizer on gradients times `factor`; these, the loss scale, whether skipped.

        A step that overflowed leaves nothing: `buffers` come back.
        """
        gradients = {name: p.grad for name, p in self._named() if p.grad is not None}
        skipped = self.scaler is not None and bool(nonfinite(gradients.values()))
        if self.sliced is not None and skipped:
            self.sliced.drop()
        scale = None if self.scaler is None else self.scaler.get_scale()
        kept = {} if self.rounding is None else self.rounding.numbers
        named = dict(self._named())
        with (
            nullcontext()
            if self.rounding is None or skipped
            else self.rounding.wide(
                self.optimizer, {n: named[n] for n in kept if n in gradients}, step
            )
        ):
            for name, gradient in gradients.items():
                named[name].grad = gradient.to(named[name].dtype)
            found = self._step_optimizer([named[name] for name in gradients], factor)
            applied = (
                {} if skipped else {n: g.clone() for n, g in zip(gradients, found, strict=True)}
            )
        self.model.zero_grad(set_to_none=True)  # also what the optimizer does not hold
        if skipped:
            for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(before)
        return applied, scale, skipped

    def _step_optimizer(self, trained: Sequence[nn.Parameter], factor: float) -> list[Tensor]:
        """As a user would; the gradients that it was given."""
        scale = 1.0 if self.scaler is None else self.scaler.get_scale()
        if self.scaler is not None:
            held = self.optimizer.param_groups
            self.scaler.unscale_(self.optimizer)
            mine = {id(parameter) for group in held for parameter in group["params"]}
            for parameter in trained:
                if id(parameter) not in mine and parameter.grad is not None:
                    parameter.grad /= scale
        for parameter in trained:
            assert parameter.grad is not None
            parameter.grad *= factor
        judged = self.sliced is not None and bool(self.sliced.sums)
        if self.sliced is not None and judged:
            self.sliced.judge(trained, factor / scale)
        if self.job.clip_norm is not None:
            nn.utils.clip_grad_norm_(trained, self.job.clip_norm)
        found = [parameter.grad for parameter in trained if parameter.grad is not None]
        if self.sliced is not None and judged:
            self.sliced.step(self._step_scaled)
        else:
            self._step_scaled()
        return found

    def _step_scaled(self) -> None:
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

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
        default = None if self.precision.short else self.dtype
        with default_dtype(default), straight_checkpoint(), mode:
            with precisely(FLOAT32 if exact else self.precision, self.model):
                found = self.job.loss(self.model, tree)
            total, weight, _ = normalise(found, stop - start)
            mean = total / self.job.batch_size
            (mean if self.scaler is None else self.scaler.scale(mean)).backward()
        return float(total.detach()), float(weight)

    def _as_given(self, tensor: Tensor) -> Tensor:
        tensor = tensor.to(in_dtype(tensor.dtype, self.dtype))
        return tensor.flip(0) if self.flipped else tensor

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.model.named_parameters()

    def _weights(self) -> dict[str, Tensor]:
        found = {f"model/{name}": p.detach().clone() for name, p in self._named()}
        found |= {f"buffer/{n}": b.detach().clone() for n, b in self.model.named_buffers()}
        if self.average is not None:
            groups = self.optimizer.param_groups
            moved = {id(p) for group in groups for p in group["params"] if p.requires_grad}
            for name, parameter in self.average.module.named_parameters():
                if id(self.model.get_parameter(name)) in moved:
                    found[f"ema/{name}"] = parameter.detach().clone()
        return found

    def _slots(self) -> dict[str, Tensor]:
        name_of = {id(p): name for name, p in self._named()}
        return slots(self.optimizer, name_of)


def scaler_of(job: Job) -> torch.amp.GradScaler:
    """torch's own, as the job has the loss scale move."""
    rule = job.loss_scale or LossScale()
    return torch.amp.GradScaler(
        "cpu",
        init_scale=rule.initial,
        growth_factor=rule.growth,
        backoff_factor=rule.backoff,
        growth_interval=rule.interval,
    )


def average_of(job: Job, model: nn.Module) -> AveragedModel | None:
    """torch's own."""
    if job.ema is None:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(job.ema))


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
