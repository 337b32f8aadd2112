"""`Job`: what to train. It holds factories and numbers, never a built model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from os import PathLike
from typing import Any

from meshwright.errors import UsageError

__all__ = ["AdaScale", "Job", "LossScale", "Phase"]


@dataclass(frozen=True, slots=True)
class LossScale:
    """What the loss is multiplied by where a plan computes in fp16, and how that number moves.

    Attributes:
        initial: at the first step.
        growth: its factor after `interval` steps without overflow.
        backoff: its factor after a step whose gradients overflow; that step is left out.
        interval: steps, see `growth`.
        patience: overflows in a row after which training stops with an error.

    Raises:
        UsageError: a field has a type or value that cannot be.
    """

    initial: float = 65536.0
    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000
    patience: int = 40

    def __post_init__(self) -> None:
        _require_between("initial", self.initial, 0.0, 3e38)
        _require_between("growth", self.growth, 1.0, 3e38)
        _require_between("backoff", self.backoff, 0.0, 1.0)
        _require_count("loss_scale's interval", self.interval)
        _require_count("loss_scale's patience", self.patience)


def _require_between(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < high:
        above = f"above {low:g} and below {high:g}" if high < 3e38 else f"above {low:g}"
        raise UsageError(
            f"loss_scale's {name} is {_described(value)}, but must be a number {above}"
        )


@dataclass(frozen=True, slots=True)
class AdaScale:
    """A learning rate that was found at a smaller batch, kept right at a larger (AdaScale SGD).

    Attributes:
        scale: how many times the batch is that for which the learning rate was found, and in how
            many slices its gradients' variance is taken; it divides the batch.
        smoothing: of the running averages, what stays of them at a step; by default as much less
            than 1 as a thousandth of `scale`.
        iterations: training ends when its steps were worth so many at the smaller batch.

    Raises:
        UsageError: a field has a type or value that cannot be.
    """

    scale: int
    smoothing: float | None = None
    iterations: int | None = None

    def __post_init__(self) -> None:
        _require_count("adascale's scale", self.scale)
        if self.scale == 1:
            raise UsageError("adascale's scale=1 has no variance between slices; use 2 or more")
        if self.iterations is not None:
            _require_count("adascale's iterations", self.iterations)
        if self.smoothing is not None:
            _require_smoothing(self.smoothing)


def _require_smoothing(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise UsageError(
            f"adascale's smoothing is {_described(value)}, but must be a number from 0 to below 1"
        )


def _absent(*_: Any) -> Any:
    """Stands for what was not given."""
    raise UsageError("the job has several phases, and no such thing of its own")


@dataclass(frozen=True, slots=True)
class Phase:
    """One of the losses that a job trains in turn, with the parameters and the optimizer it moves.

    Attributes:
        loss: as a job's.
        parameters: names of the parameters it trains, with wildcards, such as `"generator.*"`;
            the others are frozen in its steps.
        optimizer: as a job's; of what it is given, these parameters are stepped.
        schedule: as a job's, stepped once a step of this phase.
        clip_norm: the largest global L2 norm that these parameters' gradients keep.
        overlap: whether other phases that say so too may train some of them as well.

    Raises:
        UsageError: a field has a type or value that cannot be.
    """

    loss: Callable[[Any, Any], Any]
    _: KW_ONLY
    parameters: str | Sequence[str]
    optimizer: Callable[[Any], Any]
    schedule: Callable[[Any], Any] | None = None
    clip_norm: float | None = None
    overlap: bool = False

    def __post_init__(self) -> None:
        _require_loss(self.loss)
        if not self.patterns or not all(map(_is_pattern, self.patterns)):
            raise UsageError(
                f"a phase's parameters are {self.parameters!r}, but must be a name with wildcards, "
                'or a list of them; use parameters="generator.*"'
            )
        _require_factory(
            "optimizer", self.optimizer, "optimizer=lambda model: AdamW(model.parameters())"
        )
        if self.schedule is not None:
            example = "schedule=lambda optimizer: StepLR(optimizer, 100)"
            _require_factory("schedule", self.schedule, example)
        _require_clip_norm(self.clip_norm)

    @property
    def patterns(self) -> tuple[str, ...]:
        """The names that its parameters match."""
        return (self.parameters,) if isinstance(self.parameters, str) else tuple(self.parameters)


@dataclass(frozen=True, slots=True)
class Job:
    """What to train; the plan says where. No field depends on the number of devices.

    Attributes:
        model: `model()` returns a new `torch.nn.Module`. A factory, so that nothing is built until
            a rank needs its shard.
        loss: `loss(model, batch)` returns a scalar mean over the samples, or `(sum, weight)` where
            the mean is over something else (unmasked tokens), and may append a dict of metrics,
            each a scalar or `(sum, weight)`.
        optimizer: `optimizer(model)` returns a `torch.optim.Optimizer` over its parameters.
        data: `data()` returns a map-style dataset, a `DataLoader` over one, or an iterable of
            global batches.
        batch_size: samples per step, over all ranks.
        phases: by name, losses that are trained in turn, each with its own optimizer, instead of
            `loss` and `optimizer`.
        order: of phases, repeated: step s runs the one at place s; as they are written by default.
        schedule: `schedule(optimizer)` returns a learning-rate scheduler, stepped once a step.
        evaluation: like `data`, for the held-out set.
        weights: what to start from: a file or folder of safetensors, a run or a checkpoint.
        collate: makes a batch of a list of samples; torch's default when absent.
        clip_norm: the largest global L2 norm that gradients keep.
        loss_scale: how the loss is scaled where a plan computes in fp16; the usual when absent.
        adascale: scale the learning rate by what a batch of several slices gains over one.
        ema: keep an average of the weights, of which this part stays at each step, such as 0.999.
        steps: how many steps to train. At most one of `steps` and `epochs`.
        epochs: how many passes over the data to train.
        normalize_over: samples whose statistics a batch norm shares; the global batch when absent.
        seed: of initialisation, shuffling, dropout and augmentation.

    Raises:
        UsageError: a field has a type or value that cannot be.
    """

    model: Callable[[], Any]
    loss: Callable[[Any, Any], Any] = _absent
    optimizer: Callable[[Any], Any] = _absent
    data: Callable[[], Any] = _absent
    batch_size: int = 0
    _: KW_ONLY
    phases: Mapping[str, Phase] | None = None
    order: Sequence[str] | None = None
    schedule: Callable[[Any], Any] | None = None
    evaluation: Callable[[], Any] | None = None
    weights: str | PathLike[str] | None = None
    collate: Callable[[list[Any]], Any] | None = None
    clip_norm: float | None = None
    loss_scale: LossScale | None = None
    adascale: AdaScale | None = None
    ema: float | None = None
    steps: int | None = None
    epochs: int | None = None
    normalize_over: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _require_factory("model", self.model, "model=lambda: MyModel()")
        _require_losses(self)
        if self.data is _absent:
            raise UsageError("the job has no data; give data=lambda: MyDataset()")
        _require_factory("data", self.data, "data=lambda: MyDataset()")
        for name, value, example in (
            ("schedule", self.schedule, "schedule=lambda optimizer: StepLR(optimizer, 100)"),
            ("evaluation", self.evaluation, "evaluation=lambda: MyDataset(train=False)"),
            ("collate", self.collate, "collate=lambda samples: ..."),
        ):
            if value is not None:
                _require_factory(name, value, example)
        _require_count("batch_size", self.batch_size)
        for name, count in (
            ("steps", self.steps),
            ("epochs", self.epochs),
            ("normalize_over", self.normalize_over),
        ):
            if count is not None:
                _require_count(name, count)
        _require_seed(self.seed)
        _require_clip_norm(self.clip_norm)
        _require_loss_scale(self.loss_scale)
        _require_adascale(self.adascale, self.batch_size)
        _require_ema(self.ema)
        _require_weights(self.weights)
        if self.steps is not None and self.epochs is not None:
            raise UsageError(
                f"job gives both steps={self.steps} and epochs={self.epochs}; keep one of them"
            )
        if self.normalize_over is not None and self.batch_size % self.normalize_over:
            raise UsageError(
                f"normalize_over={self.normalize_over} does not divide "
                f"batch_size={self.batch_size}; use normalize_over="
                f"{_nearest_divisor(self.batch_size, self.normalize_over)}"
            )

    def of(self, name: str) -> Job:
        """The job that trains one phase alone; its own where it has no phases."""
        if self.phases is None:
            return self
        phase = self.phases[name]
        return replace(
            self,
            loss=phase.loss,
            optimizer=phase.optimizer,
            schedule=phase.schedule,
            clip_norm=phase.clip_norm,
            phases=None,
            order=None,
        )

    def phase_at(self, step: int) -> str:
        """The name of the phase that a step runs, by the job's order; empty without phases."""
        order = tuple(self.order or self.phases or ("",))
        return order[step % len(order)]


def _require_losses(job: Job) -> None:
    """One loss with its optimizer, or phases."""
    if job.phases is None:
        if job.order is not None:
            raise UsageError(f"job gives order={job.order!r} of phases, but no phases=")
        for name, value in (("loss", job.loss), ("optimizer", job.optimizer)):
            if value is _absent:
                raise UsageError(f"the job has no {name}; give {name}=, or phases= with several")
        _require_loss(job.loss)
        _require_factory(
            "optimizer", job.optimizer, "optimizer=lambda model: AdamW(model.parameters())"
        )
        return
    given = [n for n, v in (("loss", job.loss), ("optimizer", job.optimizer)) if v is not _absent]
    given += [n for n, v in (("schedule", job.schedule), ("clip_norm", job.clip_norm)) if v]
    if given:
        raise UsageError(
            f"job gives both phases and {given[0]}; each phase has its own: give {given[0]}= to "
            "every mw.Phase"
        )
    _require_phases(job.phases)
    if job.order is not None:
        _require_order(job.order, job.phases)


def _require_phases(phases: object) -> None:
    example = 'phases={"d": mw.Phase(loss, parameters="disc.*", optimizer=...), "g": ...}'
    if not isinstance(phases, Mapping) or not phases:
        raise UsageError(f"phases is {_described(phases)}, but must be a dict; use {example}")
    for name, phase in phases.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise UsageError(
                f"a phase is called {name!r}, but its name must be letters, digits and _, since "
                f"checkpoints and logs have it; use {example}"
            )
        if not isinstance(phase, Phase):
            raise UsageError(
                f"phase {name} is {_described(phase)}, but must be a Phase; use {example}"
            )


def _require_order(order: object, phases: Mapping[str, Phase]) -> None:
    known = ", ".join(map(repr, phases))
    if isinstance(order, str) or not isinstance(order, Sequence) or not order:
        raise UsageError(f"order is {order!r}, but must list phases; use order=({known})")
    for name in order:
        if name not in phases:
            raise UsageError(f"order names the phase {name!r}, which is none of {known}")
    missing = [name for name in phases if name not in order]
    if missing:
        raise UsageError(f"order leaves out the phase {missing[0]!r}; name each at least once")


def _is_pattern(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _require_callable(name: str, value: object, example: str) -> None:
    if not callable(value):
        raise UsageError(
            f"{name} is {_described(value)}, but must be something to call; use {example}"
        )


def _require_loss(value: object) -> None:
    example = "loss=lambda model, batch: cross_entropy(model(batch['x']), batch['y'])"
    _require_callable("loss", value, example)
    if type(value).__module__.startswith("torch.nn."):
        raise UsageError(
            f"loss is {_described(value)}, but must be a function of the model and a batch; "
            f"use {example}"
        )


def _require_factory(name: str, value: object, example: str) -> None:
    """A built module is callable too; passing one is the usual slip."""
    _require_callable(name, value, example)
    if any(base.__module__.startswith("torch.nn.") for base in type(value).__mro__):
        raise UsageError(
            f"{name} is {_described(value)} that is built already, but must be a function that "
            f"builds it, so that each rank builds only its shard; use {example}"
        )


def _require_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{name} is {_described(value)}, but must be a whole number, 1 or more")
    if value < 1:
        raise UsageError(f"{name}={value}, but must be 1 or more")


def _require_seed(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"seed is {_described(value)}, but must be a whole number, 0 or more")
    if not 0 <= value < 2**63:
        raise UsageError(f"seed={value}, but must be from 0 to 2**63 - 1")


def _require_clip_norm(value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"clip_norm is {_described(value)}, but must be a number above 0")
    if not (math.isfinite(value) and value > 0):
        raise UsageError(
            f"clip_norm={value}, but must be a finite number above 0; leave it out for no clipping"
        )


def _require_loss_scale(value: object) -> None:
    if value is not None and not isinstance(value, LossScale):
        raise UsageError(
            f"loss_scale is {_described(value)}, but must be a LossScale, such as "
            "LossScale(initial=1024)"
        )


def _require_adascale(value: object, samples: int) -> None:
    if value is None:
        return
    if not isinstance(value, AdaScale):
        raise UsageError(
            f"adascale is {_described(value)}, but must be an AdaScale, such as AdaScale(scale=4)"
        )
    if samples % value.scale:
        fits = _nearest_divisor(samples, value.scale)
        raise UsageError(
            f"adascale's scale={value.scale} does not divide batch_size={samples} in equal slices; "
            f"use scale={fits if fits > 1 else samples}, or another batch_size"
        )


def _require_ema(value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise UsageError(
            f"ema is {_described(value)}, but must be a number above 0 and below 1, such as 0.999; "
            "leave it out to keep no average of the weights"
        )


def _require_weights(value: object) -> None:
    if value is not None and not isinstance(value, str | PathLike):
        raise UsageError(
            f"weights is {_described(value)}, but must be the path of a safetensors file or folder"
        )
    if value == "":
        raise UsageError("weights is an empty path; name a safetensors file or folder")


def _described(value: object) -> str:
    """`value` for a sentence: short values as they are, others by their type."""
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'AEIOUaeiou' else 'a'} {kind}"


def _nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` closest to `wanted`, at most `number`."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return min((*small, *(number // d for d in small)), key=lambda d: (abs(d - wanted), d))
