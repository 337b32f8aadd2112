"""The recurrence of an asynchronous pipeline: the user's untouched code, eager, on one device.

Minibatch t is run forward and back with each stage's weights as `Asynchronous.seen` says, and its
gradients are applied to the newest:

    w[t+1] = w[t] - update(grad f(w_1[seen(1, t)], ..., w_n[seen(n, t)]))

A replicated stage applies the mean over the minibatches of its replicas, once for all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from meshwright.run.build import Build, micro_ranges
from meshwright.run.equality.reference import Reference, Snapshot
from meshwright.schedule.pipedream import Asynchronous

__all__ = ["Recurrence", "stages_of"]


def stages_of(build: Build) -> dict[str, int]:
    """The stage of each parameter, by its bare name."""
    return {
        name.removeprefix("model/"): homes[0]
        for name, homes in build.homes.items()
        if name.startswith("model/")
    }


class Recurrence(Reference):
    """Runs the recurrence, one step at a time, on whole tensors."""

    def __init__(
        self,
        *arguments: Any,
        pipe: Asynchronous,
        stages: Mapping[str, int],
        drains: Collection[int] = (),
        **how: Any,
    ) -> None:
        """A recurrence at step 0.

        Args:
            *arguments: as of `Reference`.
            pipe: whose recurrence.
            stages: of each parameter.
            drains: the steps before which the pipe is drained.
            **how: as of `Reference`.
        """
        super().__init__(*arguments, **how)
        self.pipe, self.drains, self.base = pipe, frozenset(drains), 0
        self.mine: list[list[nn.Parameter]] = [[] for _ in range(pipe.stages)]
        for name, parameter in self._named():
            self.mine[stages.get(name, 0)].append(parameter)
        # Of each stage, by the minibatches that they have taken in: its weights.
        self.held: list[dict[int, list[Tensor]]] = [{} for _ in range(pipe.stages)]
        self.sums: dict[nn.Parameter, Tensor] = {}
        self._keep(0)

    @override
    def _step(self, step: int) -> Snapshot:
        if step in self.drains:
            self._drain(step)
        loss = self._minibatch(step)
        for stage, parameters in enumerate(self.mine):
            for parameter in parameters:
                if parameter.grad is not None:
                    before = self.sums.pop(parameter, None)
                    total = parameter.grad if before is None else before + parameter.grad
                    self.sums[parameter] = total
                parameter.grad = None
            if self.pipe.updates(stage, step, self.base):
                self._mean(stage, self.pipe.replicas[stage])
        gradients = {name: p.grad.clone() for name, p in self._named() if p.grad is not None}
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        if self.scheduler is not None:
            self.scheduler.step()
        self._keep(step + 1)
        return Snapshot(loss, gradients, self._weights(), self._slots())

    def _minibatch(self, step: int) -> float:
        """Gradients of one minibatch, at the weights that it meets; its loss."""
        newest = [[p.detach().clone() for p in parameters] for parameters in self.mine]
        for stage in range(self.pipe.stages):
            self._put(stage, self.held[stage][self.pipe.seen(stage, step, self.base)])
        size = self.job.batch_size
        total, weight = 0.0, 0.0
        for k, (start, stop) in enumerate(micro_ranges(size, self.microbatches)):
            part, share = self._microbatch(step, k, start, stop)
            total, weight = total + part, weight + share
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad *= size / weight
        for stage, tensors in enumerate(newest):
            self._put(stage, tensors)
        return total / weight

    def _mean(self, stage: int, count: int) -> None:
        """Hand the mean of a stage's gradients to the optimizer."""
        for parameter in self.mine[stage]:
            total = self.sums.pop(parameter, None)
            if total is not None:
                parameter.grad = total / count

    def _drain(self, step: int) -> None:
        """What replicas still owe is applied; all counts begin anew."""
        for stage in range(self.pipe.stages):
            if owed := self.pipe.owed(stage, step, self.base):
                self._mean(stage, owed)
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        self.base = step
        for held in self.held:
            held.clear()
        self._keep(step)

    def _keep(self, step: int) -> None:
        """Keep the newest weights under their names, and none that no minibatch will meet."""
        for stage, held in enumerate(self.held):
            newest = self.pipe.applied(stage, step, self.base)
            if newest not in held:
                held[newest] = [p.detach().clone() for p in self.mine[stage]]
            oldest = self.pipe.seen(stage, step, self.base)
            for version in [v for v in held if v < oldest]:
                del held[version]

    def _put(self, stage: int, tensors: list[Tensor]) -> None:
        with torch.no_grad():
            for parameter, tensor in zip(self.mine[stage], tensors, strict=True):
                parameter.copy_(tensor)
