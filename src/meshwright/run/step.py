"""One step's Finish, Agree, Update and Commit, on one rank's state."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.comm.base import Group, all_reduce
from meshwright.errors import UserCodeError
from meshwright.program.layout import REPLICATED, Bounds, Layout
from meshwright.program.slices import require_even
from meshwright.run.average import Average
from meshwright.run.meter import Meter
from meshwright.run.offload.kept import Kept
from meshwright.run.offload.store import Store
from meshwright.run.optimizer.adascale import Gains, further
from meshwright.run.optimizer.joint import Joint
from meshwright.run.optimizer.scaling import Scaling, nonfinite, require_found
from meshwright.run.optimizer.stochastic import Rounding
from meshwright.run.part import box

__all__ = ["Metrics", "Policy", "RankState", "StepWork", "Totals", "require_checks", "summed"]


@dataclass(frozen=True, slots=True)
class Policy:
    """What a step does beside the plan.

    Attributes:
        clip_norm: largest global norm of the gradients.
        nonfinite: `raise`, `skip` the update, or `ignore` it.
    """

    clip_norm: float | None = None
    nonfinite: str = "raise"


@dataclass(frozen=True, slots=True)
class Metrics:
    """A step's global numbers.

    Attributes:
        skipped: nothing of it was applied.
        flags: those that any rank raised.
        loss_scale: what the loss was scaled by; None where nothing computes in fp16.
        overflowed: its gradients, under that scale, were not finite.
        phase: of the job, whose loss it is; empty where it has one loss.
        gain: of AdaScale, by which learning rates were multiplied; None where the job has none.
        iterations: how many steps on one slice all steps were worth, with AdaScale.
    """

    step: int
    loss: float
    metrics: Mapping[str, float]
    gradient_norm: float | None
    skipped: bool
    watched: Mapping[str, Tensor]
    flags: frozenset[str] = frozenset()
    loss_scale: float | None = None
    overflowed: bool = False
    phase: str = ""
    gain: float | None = None
    iterations: float | None = None

    def __getitem__(self, name: str) -> float:
        """`loss`, or a metric by name."""
        return self.loss if name == "loss" else self.metrics[name]


@dataclass(slots=True)
class RankState:
    """What a rank holds between steps.

    Attributes:
        values: by global name: `model/`, `buffer/`, `constant/`, `scale`.
        shards: parameters as the optimizer sees them (parts of `model/` where they are whole).
        optimizer: over the shards.
        counted: parameters whose shard this rank counts in global sums (one of its replicas does).
        joint: steps parameters of which other ranks hold what their update needs.
        inplace: parameters whose whole tensor is refreshed from gathered shards.
        partly: of those counted that are fused, the boxes of their shards that are.
        kept: steps the optimizer on the host, where anything of it is offloaded.
        store: weights and gradients that are.
        scaling: of the loss; None where nothing computes in fp16.
        rounding: of what is kept in bf16; None where nothing is.
        average: of the weights; None where the job keeps none.
        gains: of AdaScale; None where the job has none.
    """

    values: dict[str, Tensor]
    shards: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    counted: frozenset[str]
    trained: tuple[str, ...]
    joint: Joint
    scheduler: Any = None
    partly: Mapping[str, tuple[Bounds, ...]] = field(default_factory=dict)
    scaling: Scaling | None = None
    rounding: Rounding | None = None
    kept: Kept | None = None
    store: Store | None = None
    average: Average | None = None
    gains: Gains | None = None

    def rescale(self, scaling: Scaling) -> None:
        """Take a loss scale for the next step."""
        self.values["scale"] = scaling.operand(self.values["scale"])
        self.scaling = scaling

    def rest(self, name: str) -> None:
        """The optimizer was given state of a parameter: it goes where it rests."""
        if self.kept is not None:
            self.kept.rest((name,))

    def lies(
        self, name: str, slot: str, tensor: Tensor, like: tuple[tuple[int, ...], Layout]
    ) -> tuple[tuple[int, ...], Layout]:
        """(Global shape, layout) of a tensor of the optimizer's state.

        Args:
            name: of the parameter.
            slot: of its state.
            tensor: what this rank has of it.
            like: (global shape, layout) of the parameter's state.
        """
        joint = self.joint.layout(name, slot, tensor)
        if joint is not None:
            return joint
        alike = tensor.shape == self.shards[name].shape and tensor.dim()
        return like if alike else (tuple(tensor.shape), REPLICATED)


_SHORT = (torch.bfloat16, torch.float16)


@dataclass(slots=True)
class Totals:
    """The step's sums, global after Agree."""

    vector: Tensor
    names: tuple[str, ...]
    numbers: dict[str, float] = field(default_factory=dict)

    def reduced(self, vector: Tensor) -> None:
        """The sums over all ranks; the host reads them once."""
        self.vector = vector
        self.numbers = dict(zip(self.names, vector.tolist(), strict=True))

    def __getitem__(self, name: str) -> float:
        return self.numbers[name]


class StepWork:
    """The `Step` that the executor is sent: this rank's part of one global step."""

    def __init__(
        self,
        state: RankState,
        policy: Policy,
        step: int,
        load: Callable[[int], tuple[Mapping[str, Tensor], Tensor]],
        group: Group,
        flags: dict[str, bool] | None = None,
    ) -> None:
        """A step of one rank.

        Args:
            state: of the rank; read and changed.
            policy: what to do beside the plan.
            step: its number.
            load: gives micro-batch k's leaves by name and its position operand.
            group: the ranks that agree.
            flags: raised for all ranks where any of them raises it (stop, save).
        """
        self.state = state
        self.policy = policy
        self.step = step
        self._load = load
        self.group = group
        self.next_digest = 0
        self.flags = flags or {}
        self.digests_differ = False
        self.totals = Totals(torch.zeros(0), ())
        self.skipped = self.overflowed = False
        self.norm: float | None = None
        self.gains = state.gains  # of the state, once the step is judged
        self.keep_gradients: dict[str, Tensor] | None = None
        self.meter: Meter | None = None  # counts what the step holds, where somebody asked for it
        self.expected: tuple[str, ...] = ()  # totals of the step, of which this rank makes some

    def load(self, microbatch: int) -> Mapping[str, Tensor]:
        """The operands of a micro-batch."""
        leaves, position = self._load(microbatch)
        return {**{f"batch/{name}": t for name, t in leaves.items()}, "position": position}

    def finish(self, values: dict[str, Tensor]) -> None:
        """Take the sums together, in float64: totals, squared gradient norm, shape digests."""
        found = summed(values, self.expected)
        if self.policy.clip_norm is not None:
            found["norm2"] = self._squares(values, self.state.trained)
        if self.gains is not None:
            found = self.gains.summed(found, partial(self._squares, values))
        if self.state.scaling is not None:
            mine = (f"reduced/{name}" for name in self.state.trained)
            found["overflow"] = nonfinite(values[name] for name in mine if name in values)
        digest = float(self.next_digest)
        known = {"digest": digest, "digest2": digest * digest}
        known |= {f"flag/{name}": float(raised) for name, raised in self.flags.items()}
        sums = torch.stack([total.to(torch.float64) for total in found.values()])
        vector = torch.cat([sums, sums.new_tensor(list(known.values()))])
        self.totals = Totals(vector, (*found, *known))

    def _squares(self, values: Mapping[str, Tensor], names: Collection[str]) -> Tensor:
        """This rank's share of the squared norm of these gradients, as accumulated."""
        mine = []
        for name in self.state.trained:
            if (
                name not in names
                or name not in self.state.counted
                or f"reduced/{name}" not in values
            ):
                continue
            gradient, boxes = self._read(values, name), self.state.partly.get(name)
            found = [gradient] if boxes is None else [box(gradient, bounds) for bounds in boxes]
            # One at a time of those that come from a disk.
            mine += [_norm(found)] if self._far else found
        return _norm(mine).square()

    @property
    def _far(self) -> bool:
        """Whether gradients rest on disk."""
        return self.state.kept is not None and "gradients" in self.state.kept.far

    def _read(self, values: Mapping[str, Tensor], name: str) -> Tensor:
        """A reduced gradient."""
        if self._far and self.state.store is not None:
            return self.state.store.load(f"reduced/{name}")()
        return values[f"reduced/{name}"]

    def agree(self) -> Generator[Any, Any, None]:
        """Reduce the sums over the ranks, and decide: go on, skip, or raise."""
        total = yield from all_reduce(self.totals.vector, self.group, label="totals of the step")
        self.totals.reduced(total)
        size = len(self.group.ranks)
        digest, squares = self.totals["digest"], self.totals["digest2"]
        self.digests_differ = digest * digest != size * squares
        self.judge()

    def judge(self) -> None:
        """Decide by the step's totals: go on, skip, or raise."""
        require_checks(self.totals.numbers, f"step {self.step + 1}")
        weight = self.totals["weight"]
        if not weight > 0:
            raise UserCodeError(
                f"the loss's weight in step {self.step + 1} is {weight}, but must be above 0; a "
                "batch needs at least one sample (or token) that counts"
            )
        if self.policy.clip_norm is not None:
            self.norm = math.sqrt(self.totals["norm2"]) / (weight * float(self.scale))
        if self.state.scaling is not None and self.totals["overflow"] > 0:
            self.skipped = self.overflowed = True
            after = self.state.scaling.after(overflowed=True)
            require_found(after, self.step, self.totals["loss"] / weight)
            return
        finite = math.isfinite(self.totals["loss"]) and math.isfinite(self.norm or 0.0)
        if not finite and self.policy.nonfinite == "raise":
            what = "the loss" if not math.isfinite(self.totals["loss"]) else "the gradient norm"
            value = self.totals["loss"] if what == "the loss" else self.norm
            raise UserCodeError(
                f"{what} is {value} in step {self.step + 1}; nothing of this step was applied. "
                "Lower the learning rate, check the data, or set nonfinite='skip'"
            )
        self.skipped = not finite and self.policy.nonfinite == "skip"
        if self.gains is not None and not self.skipped:
            require_even(self.totals.numbers, self.gains.ranks, f"step {self.step + 1}")
            self.gains = self.gains.judged(self.totals.numbers, weight * float(self.scale))

    @property
    def scale(self) -> Tensor:
        """What the loss sum was multiplied by before its gradient."""
        return self.state.values["scale"]

    def update(self, values: dict[str, Tensor]) -> Generator[Any, Any, None]:
        """Divide by the step's weight, clip, and step the optimizer on the shards."""
        factor = 1.0 / (self.totals["weight"] * float(self.scale))
        if self.norm is not None and self.policy.clip_norm is not None:
            coefficient = self.policy.clip_norm / (self.norm + 1e-6)
            factor *= min(coefficient, 1.0)  # as torch does, NaN stays NaN
        jointly = self.state.joint.parameters.keys() if self._far else ()
        read = {n: self._read(values, n) for n in jointly if f"reduced/{n}" in values}
        gradients = {**self.gradients(values), **read}
        later = self._late(gradients)
        now = [gradient for name, gradient in gradients.items() if name not in later]
        if factor != 1.0 and now:  # a stage of a pipeline may have none
            torch._foreach_mul_(now, factor)
        scaled = nullcontext() if self.gains is None else self.gains.scaled(self.state.optimizer)
        with scaled:
            yield from self.apply(gradients, factor)
        for name, shard in self.state.shards.items():
            values[f"shard/{name}"] = shard.data

    def gradients(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take the reduced gradients, by parameter."""
        found: dict[str, Tensor] = {}
        for name in self.state.trained:
            # The loss may not reach a parameter; eager leaves its gradient None too.
            if (gradient := values.pop(f"reduced/{name}", None)) is not None:
                found[name] = gradient.to(values[f"model/{name}"].dtype)
        return found

    def apply(
        self, gradients: Mapping[str, Tensor], factor: float = 1.0
    ) -> Generator[Any, Any, None]:
        """Step the optimizer with these; an exchange where it needs what lies on other ranks.

        Those of what is kept in bf16, or rests on disk, are yet to be times `factor`.
        """
        rounding, optimizer, shards = self.state.rounding, self.state.optimizer, self.state.shards
        self._note(gradients, factor)
        if self.skipped:
            return
        if rounding is not None:
            rounding.step(optimizer, shards, gradients, factor, self.step)
            return
        kept = self.state.kept
        holding = () if kept is None else (kept.holding,)
        rest = yield from self.state.joint.run(gradients, *holding)
        rest &= shards.keys()
        if kept is not None:
            kept.step({name: gradients[name] for name in shards if name in rest}, factor)
            return
        for name in rest:
            shards[name].grad = gradients[name]
        before = {name: shards[name].data for name in rest}
        with self.state.joint.aside():
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for name, held in before.items():
            shard = shards[name]
            if shard.data_ptr() != held.data_ptr():  # replaced: it may be a part of a whole
                held.copy_(shard.data)
                shard.data = held

    def _note(self, gradients: Mapping[str, Tensor], factor: float) -> None:
        """Keep what is applied, where somebody asked for it."""
        if self.keep_gradients is None:
            return
        later = self._late(gradients)
        self.keep_gradients.clear()
        for name, gradient in gradients.items() if not self.overflowed else ():
            kept = _wide(gradient) * factor if name in later else gradient.clone()
            self.keep_gradients[name] = kept

    def _late(self, names: Iterable[str]) -> Set[str]:
        """Which gradients are multiplied by the step's factor only where they are applied."""
        if self._far:
            return set(names) - self.state.joint.parameters.keys()
        rounding = self.state.rounding
        return frozenset() if rounding is None else rounding.numbers.keys()

    def commit(self, values: dict[str, Tensor]) -> Metrics:
        """Gathered weights and new buffers become the state."""
        watched: dict[str, Tensor] = {}
        written: list[str] = []
        for name in [n for n in values if n.startswith(("gathered/", "next/", "watch/"))]:
            kind, _, bare = name.partition("/")
            tensor = values.pop(name)
            if kind == "gathered":
                written.append(f"model/{bare}")
                whole = values[f"model/{bare}"]
                if whole.data_ptr() != tensor.data_ptr():  # else it was gathered in place
                    whole.copy_(tensor)
            elif kind == "watch":
                watched[bare] = tensor
            elif not self.skipped:
                values[f"buffer/{bare}"] = tensor
        if self.state.store is not None:
            self.state.store.refresh(written)
        for name in [n for n in values if n.startswith(("total/", "shard/"))]:
            del values[name]
        if not self.skipped:
            self._applied()
        metrics = self.metrics(watched)
        if self.state.scaling is not None:
            self.state.rescale(self.state.scaling.after(overflowed=self.overflowed))
        return metrics

    def _applied(self) -> None:
        """What counts the steps that were applied goes on."""
        steps = further(self.state.gains, self.gains)
        for _ in range(steps if self.state.scheduler is not None else 0):
            self.state.scheduler.step()
        self.state.gains = self.gains
        if self.state.average is not None:
            self.state.average.take(self.state.shards)

    def metrics(self, watched: Mapping[str, Tensor]) -> Metrics:
        """The step's global numbers."""
        totals = self.totals
        named = [n.removeprefix("metric/") for n in totals.names if n.startswith("metric/")]
        metrics = {n: _mean(totals[f"metric/{n}"], totals[f"metric-weight/{n}"]) for n in named}
        loss = totals["loss"] / totals["weight"]
        flags = frozenset(n for n in self.flags if totals[f"flag/{n}"] > 0)
        scale = None if self.state.scaling is None else self.state.scaling.scale
        told = (self.norm, self.skipped, watched, flags, scale, self.overflowed)
        made = Metrics(self.step, loss, metrics, *told)
        if self.gains is None:
            return made
        return replace(made, gain=self.gains.gain(), iterations=self.gains.iterations)


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of all these together, in float64; of short ones it is taken in float32."""
    short = [tensor.float() for tensor in tensors if tensor.dtype in _SHORT]
    wide = [tensor for tensor in tensors if tensor.dtype not in _SHORT]
    norms = [nn.utils.get_total_norm(found).to(torch.float64) for found in (wide, short)]
    return torch.stack(norms).square().sum().sqrt()


def _wide(gradient: Tensor) -> Tensor:
    """A short gradient in float32."""
    return gradient.float() if gradient.dtype in _SHORT else gradient


def summed(values: Mapping[str, Tensor], expected: Sequence[str]) -> dict[str, Tensor]:
    """This rank's totals by bare name: all that are expected, in their order, then the others."""
    found = {n: v for n, v in values.items() if n.startswith("total/")}
    nothing = torch.zeros((), dtype=torch.float64)
    names = (*expected, *(name for name in found if name not in expected))
    return {name.removeprefix("total/"): found.get(name, nothing) for name in names}


def require_checks(numbers: Mapping[str, float], when: str) -> None:
    """Return if every condition that the trace took for granted held.

    Raises:
        UserCodeError: one did not; names its line.
    """
    for name, against in numbers.items():
        if name.startswith("check/") and against:
            raise UserCodeError(
                f"{name.removeprefix('check/').partition('#')[0]}: in {when} the condition there "
                "was not what the program was traced with (a check that raises passes, all() is "
                "true, any() is false), so eager code would have gone the other way; correct the "
                "data, write it with torch.where, or run it with --eager"
            )


def _mean(total: float, weight: float) -> float:
    """A metric that nothing counted for is no number; training goes on."""
    return total / weight if weight else math.nan
