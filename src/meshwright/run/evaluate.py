"""Evaluation and prediction: the forward alone, over the same layouts as training."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from meshwright.comm.base import all_reduce
from meshwright.compile.draw import position_operand
from meshwright.compile.example import example_of
from meshwright.compile.settings import in_dtype
from meshwright.errors import UserCodeError
from meshwright.run.build import Micro
from meshwright.run.data.samples import Source
from meshwright.run.eager import EagerWorker, Result
from meshwright.run.executor import Committed
from meshwright.run.step import require_checks, summed
from meshwright.run.worker import Worker, same_everywhere

__all__ = ["evaluate", "predict"]

Forward = Callable[[nn.Module, Any], Any]


class _Forward:
    """A `Step` without gradients: what the executor is sent to run one batch."""

    def __init__(self, worker: Worker, leaves: Mapping[str, Tensor], place: Tensor) -> None:
        self.worker = worker
        self.operands = {**leaves, "position": place}
        self.names: tuple[str, ...] = ()
        self.vector = torch.zeros(0)
        self.expected: tuple[str, ...] = ()

    def load(self, microbatch: int) -> Mapping[str, Tensor]:
        """The one micro-batch."""
        assert microbatch == 0
        return self.operands

    def finish(self, values: dict[str, Tensor]) -> None:
        """Take the sums together."""
        found = summed(values, self.expected)
        self.names = tuple(found)
        self.vector = torch.stack([v.to(torch.float64) for v in found.values()])

    def agree(self) -> Generator[Any, Any, None]:
        """Reduce them over the ranks."""
        self.vector = yield from all_reduce(self.vector, self.worker.group, label="evaluation")

    def update(self, _values: dict[str, Tensor]) -> Generator[Any, Any, None]:
        """Nothing is updated."""
        yield from ()

    def commit(self, values: dict[str, Tensor]) -> tuple[dict[str, float], list[Tensor]]:
        """(sums by name, outputs in order)."""
        outputs: dict[int, Tensor] = {}
        for name in [n for n in values if n.startswith(("total/", "output/", "watch/"))]:
            tensor = values.pop(name)
            if name.startswith("output/"):
                outputs[int(name.removeprefix("output/"))] = tensor
        sums = dict(zip(self.names, self.vector.tolist(), strict=True))
        require_checks(sums, "this batch")
        return sums, [outputs[k] for k in sorted(outputs)]


def evaluate(
    worker: Worker, source: Source, forward: Forward | None = None
) -> Generator[Any, Any, dict[str, float]]:
    """The loss and metrics over one pass of `source`, each weighted as in training; an exchange.

    Args:
        worker: of this rank.
        source: opened with `training=False`; its last batch may be short.
        forward: like the job's loss, which it is by default.
    """
    sums: dict[str, float] = {}
    step = 0
    while source.size(step):
        found, _, _ = yield from _batch(worker, source, step, forward, predict=False)
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value
        step += 1
    if not sums.get("weight"):
        raise UserCodeError(
            "evaluation saw no samples (or none that count); its data must hold at least one"
        )
    named = [name.removeprefix("metric/") for name in sums if name.startswith("metric/")]
    metrics = {n: sums[f"metric/{n}"] / sums[f"metric-weight/{n}"] for n in named}
    return {"loss": sums["loss"] / sums["weight"], **metrics}


def predict(worker: Worker, source: Source, forward: Forward) -> Generator[Any, Any, Any]:
    """What `forward(model, batch)` returns for every sample, in order; an exchange.

    Answers its tree with each tensor's rows concatenated over the batches.
    """
    rows: list[list[Tensor]] = []
    spec: Any = None
    step = 0
    while source.size(step):
        _, outputs, spec = yield from _batch(worker, source, step, forward, predict=True)
        rows.append(outputs)
        step += 1
    if not rows:
        raise UserCodeError("predict saw no samples; its data must hold at least one")
    return pytree.tree_unflatten([torch.cat(parts) for parts in zip(*rows, strict=True)], spec)


def _batch(
    worker: Worker, source: Source, step: int, forward: Forward | None, *, predict: bool
) -> Generator[Any, Any, Result]:
    size = source.size(step)
    low, high = worker.build.samples_of(worker.rank, (0, size))
    batch = source.fetch(step, low, high, (0, size))
    same = yield from same_everywhere(batch.digest, worker.group)
    if not same:
        source.whole = True
        batch = source.fetch(step, low, high, (0, size))
    if isinstance(worker, EagerWorker):
        result: Result = yield from worker.forward(
            batch.tree, low, high, size, forward, predict=predict
        )
        return result
    found = yield from _traced(worker, batch.tree, size, step, forward, predict=predict)
    return found


def _traced(
    worker: Worker, tree: Any, size: int, step: int, forward: Forward | None, *, predict: bool
) -> Generator[Any, Any, Result]:
    example, tensors = example_of(tree)
    leaves = {
        f"batch/{name}": t.to(in_dtype(t.dtype, worker.build.dtype))
        for (name, _, _), t in zip(example.leaves, tensors, strict=True)
    }
    micro = Micro(example, size)
    how = {"training": False, "predict": predict}
    lowered = worker.build.lowered(worker.rank, [micro], forward, **how)
    place = position_operand(worker.build.job.seed, step * worker.build.job.batch_size, step, 0)
    work = _Forward(worker, leaves, place)
    work.expected = lowered.totals
    committed: Committed = yield from worker.run(lowered, work)
    sums, outputs = committed.result
    return sums, outputs, worker.build.unit(micro, forward, **how).outputs
