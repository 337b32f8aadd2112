"""The door `--eager`: the user's code as ordinary PyTorch, one process or data-parallel.

Same data order, optimizer, metrics, checkpoints and step as traced runs; `print`, `breakpoint()`,
`.item()` and data-dependent shapes work. Only what a micro-batch does is other: the user's forward
and backward run as they are, instead of a program.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from typing_extensions import override

from meshwright.comm.base import all_gather, all_reduce
from meshwright.compile.init import built
from meshwright.compile.outcome import normalise
from meshwright.compile.region import precisely
from meshwright.compile.settings import recast
from meshwright.compile.square import square
from meshwright.compile.watch import Watched, watching
from meshwright.errors import PlanError, UserCodeError
from meshwright.program.assemble import Compiled, move_instructions, move_program
from meshwright.program.instruction import Instruction, InstructionList
from meshwright.program.layout import chunk
from meshwright.program.pieces import Table
from meshwright.program.program import Program
from meshwright.program.slices import SQUARES
from meshwright.run.build import Build, Lowered, has_batch_norm
from meshwright.run.data.samples import Source
from meshwright.run.step import Policy
from meshwright.run.worker import AheadWork, Fetched, Make, Worker

__all__ = ["EagerWorker", "Result"]

Forward = Callable[[nn.Module, Any], Any]
Result = tuple[dict[str, float], list[Tensor], Any]
"""(sums by name, outputs per sample, their tree)."""


@final
class EagerWorker(Worker):
    """A rank that runs the user's module itself; its tensors are the rank's state."""

    def __init__(
        self,
        build: Build,
        rank: int,
        source: Source | None,
        policy: Policy,
        make: Make | None = None,
    ) -> None:
        """As a `Worker`; refuses what the user's own code cannot do."""
        _require_possible(build)
        super().__init__(build, rank, source, policy, make)
        self.module: nn.Module = built(build.job.model, build.job.seed, build.model)
        if build.dtype is not None:
            recast(self.module, build.dtype)
        self._share()
        self.list: Lowered | None = None

    def _share(self) -> None:
        """The module's tensors become the state's own storages, so that both see updates."""
        values = self.state.values
        for name, parameter in self.module.named_parameters():
            parameter.data = values[f"model/{name}"]
        for name, buffer in self.module.named_buffers():
            buffer.data = values[f"buffer/{name}"]

    @override
    def lowered(self, fetched: Fetched) -> Lowered:
        """Loads (which do the work), one reduction per gradient, the update."""
        if self.list is None:
            self.list = _list(self.build, self.rank, len(fetched.micros))
        return self.list

    @override
    def programs(self, fetched: Fetched) -> tuple[Program, ...]:
        """There is none to compare."""
        return ()

    @override
    def work(self, fetched: Fetched, upcoming: int | None) -> AheadWork:
        """What the executor is sent for one step."""
        return _EagerWork(self, fetched, upcoming)

    def forward(
        self,
        tree: Any,
        low: int,
        high: int,
        size: int,
        forward: Forward | None,
        *,
        predict: bool,
    ) -> Generator[Any, Any, Result]:
        """Evaluate or predict one batch: this rank's samples, sums and rows from all."""
        self.module.eval()
        with torch.no_grad(), precisely(self.build.precision, self.module):
            found = (forward or self.build.job.loss)(self.module, tree)
        self.module.train()
        counted = size >= len(self.group.ranks) or self.rank == self.group.ranks[0]
        if predict:
            result: Result = yield from self._rows(found, size)
            return result
        total, weight, metrics = normalise(found, high - low)
        sums = _sums(total, weight, metrics)
        vector = torch.stack([v.to(torch.float64) for v in sums.values()]) * float(counted)
        vector = yield from all_reduce(vector, self.group, label="evaluation")
        return dict(zip(sums, vector.tolist(), strict=True)), [], None

    def _rows(self, found: Any, size: int) -> Generator[Any, Any, Result]:
        leaves, spec = pytree.tree_flatten(found)
        ranks = len(self.group.ranks)
        whole = []
        for leaf in leaves:
            if size < ranks:
                whole.append(leaf)
                continue
            lengths = [chunk(size, ranks, k)[1] for k in range(ranks)]
            shapes = tuple((length, *leaf.shape[1:]) for length in lengths)
            parts = yield from all_gather(leaf.contiguous(), self.group, shapes, "predictions")
            whole.append(torch.cat(parts))
        return {}, whole, spec


def _require_possible(build: Build) -> None:
    """The user's own code can be replicated, not taken apart.

    Raises:
        PlanError: the plan asks for more.
    """
    plan, data = build.plan, build.plan.data or 1
    if plan.zero:
        raise PlanError(
            f"--eager runs the model as it is, but the plan asks for zero={plan.zero}; use zero=0, "
            "or leave out --eager"
        )
    if plan.reduce == "microbatch":
        raise PlanError(
            "--eager sums micro-batches up and reduces once a step, but the plan asks for "
            "reduce=microbatch; drop reduce, or leave out --eager"
        )
    if data > 1 and build.slices == ():
        raise PlanError(
            f"--eager takes a slice of adascale of what each of data={data} ranks has of a "
            f"micro-batch, but microbatches={plan.microbatches} are as many as the slices; use "
            f"microbatches={max(plan.microbatches // data, 1)}, or leave out --eager"
        )
    if data > 1 and has_batch_norm(build.model.module):
        raise PlanError(
            f"--eager with data={data} would take batch norm's statistics over each rank's samples "
            "only; use 1 rank, or leave out --eager"
        )


def _list(build: Build, rank: int, microbatches: int) -> Lowered:
    """The instruction list of an eager step."""
    place, table = build.place(rank), Table()
    body = [Instruction("Load", None, k) for k in range(microbatches)]
    trained = [n for n, p in build.model.parameters.items() if p.requires_grad]
    values = build.values()
    moves = {
        f"gradient/{n}": (values[n], build.states[n].gradients, build.states[n].optimizer)
        for n in trained
        if build.mesh.size > 1
    }
    reduce = move_program(moves, build.axes, place.coordinates)
    body += move_instructions(reduce.program, table, "reduce", "gradient/", "reduced/")
    body.append(Instruction("Free", inputs=tuple(moves)))
    body += [Instruction("Finish"), Instruction("Agree", axis="data"), Instruction("Update")]
    body.append(Instruction("Commit"))
    lists = InstructionList((), tuple(body), (), tuple(table.segments), tuple(table.calls))
    # Gradients of bf16 weights are widened to be summed.
    functions = build.lower(rank, table.segments)
    return Lowered(Compiled(lists, (), (reduce,)), functions)


def _sums(total: Tensor, weight: Any, metrics: Mapping[str, tuple[Any, Any]]) -> dict[str, Tensor]:
    scalars: dict[str, Any] = {"loss": total, "weight": weight}
    for name, (part, share) in metrics.items():
        scalars |= {f"metric/{name}": part, f"metric-weight/{name}": share}
    return {name: torch.as_tensor(v).detach().reshape(()) for name, v in scalars.items()}


class _EagerWork(AheadWork):
    """A step whose loads run the user's forward and backward."""

    def __init__(self, worker: EagerWorker, fetched: Fetched, upcoming: int | None) -> None:
        super().__init__(worker, fetched, upcoming)
        self.eager = worker
        self.buffers: dict[str, Tensor] = {}

    @override
    def load(self, microbatch: int) -> Mapping[str, Tensor]:
        """Run micro-batch k and add its sums to the state's accumulators."""
        worker, fetched = self.eager, self.fetched
        if not microbatch and (self.state.scaling is not None or self.policy.nonfinite == "skip"):
            self.buffers = {n: b.clone() for n, b in worker.module.named_buffers()}
        micro = fetched.micros[microbatch]
        leaves = fetched.leaves[microbatch]
        values = worker.state.values
        torch.manual_seed(
            hash((worker.build.job.seed, fetched.firsts[microbatch], worker.rank)) % 2**63
        )
        watched = Watched()
        with watching(watched), precisely(worker.build.precision, worker.module):
            found = worker.build.job.loss(worker.module, micro.example.build(leaves))
        values |= {f"watch/{name}": tensor.detach() for name, tensor in watched.found.items()}
        total, weight, metrics = normalise(found, leaves[0].shape[0])
        if not total.requires_grad:
            raise UserCodeError(
                "the loss does not depend on any parameter that requires a gradient; check that "
                "loss()"
                " uses the model it is given, and that not all parameters are frozen"
            )
        worker.module.zero_grad(set_to_none=True)
        (total * self.scale).backward()
        for name, parameter in worker.module.named_parameters():
            gradient, parameter.grad = parameter.grad, None
            if len(self.group.ranks) > 1 and parameter.requires_grad:
                _accumulate(values, f"total/reached/{name}", _scalar(gradient is not None))
                if gradient is None:  # another rank may reach it
                    gradient = torch.zeros_like(parameter)
            if gradient is not None and self.state.gains is not None:
                _accumulate(values, f"{SQUARES}{name}", square(gradient))
            if gradient is not None:
                _accumulate(values, f"gradient/{name}", gradient)
        for name, value in _sums(total, weight, metrics).items():
            _accumulate(values, f"total/{name}", value)
        return {}

    @override
    def finish(self, values: dict[str, Tensor]) -> None:
        """In a world of one nothing was reduced: the sums are the gradients, each by itself.

        Autograd may give one tensor to two parameters, or a number expanded.
        """
        if len(self.group.ranks) == 1:
            names = [n for n in values if n.startswith("gradient/")]
            users = Counter(values[name].untyped_storage().data_ptr() for name in names)
            for name in names:
                gradient = values.pop(name)
                storage = gradient.untyped_storage()
                if users[storage.data_ptr()] > 1 or storage.nbytes() < gradient.nbytes:
                    gradient = gradient.clone()
                values[f"reduced/{name.removeprefix('gradient/')}"] = gradient
        super().finish(values)

    @override
    def update(self, values: dict[str, Tensor]) -> Generator[Any, Any, None]:
        """What no rank reached has no gradient, as on one device; zeros would decay it."""
        for name in self.state.trained if len(self.group.ranks) > 1 else ():
            if not self.totals[f"reached/{name}"]:
                del values[f"reduced/{name}"]
        yield from super().update(values)

    @override
    def commit(self, values: dict[str, Tensor]) -> Any:
        """Buffers that the forward replaced become the state."""
        for name, buffer in self.eager.module.named_buffers():
            if self.skipped:  # the forward changed them all the same
                buffer.copy_(self.buffers[name])
            values[f"buffer/{name}"] = buffer
        return super().commit(values)


def _accumulate(values: dict[str, Tensor], name: str, part: Tensor) -> None:
    values[name] = values[name] + part if name in values else part


def _scalar(value: float) -> Tensor:
    return torch.tensor(float(value), dtype=torch.float64)
