"""The traced unit: what one micro-batch does, forward and backward, as one Program.

inputs    model/* buffer/* constant/* batch/*  position  scale
outputs   gradient/* of the loss sum times `scale`, next/* buffers,
          total/* (loss, weight, metric/*, check/*: sums over the micro-batch), watch/*
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
import torch.utils._pytree as pytree
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from meshwright.compile.attention import Attention
from meshwright.compile.blame import blamed
from meshwright.compile.check import Checks
from meshwright.compile.draw import SampleDim, draw_op
from meshwright.compile.example import Example
from meshwright.compile.forbidden import forbidding, require_untouched
from meshwright.compile.init import Blueprint
from meshwright.compile.outcome import normalise
from meshwright.compile.picked import Picks
from meshwright.compile.precision import with_shared_casts
from meshwright.compile.random import RandomMode
from meshwright.compile.region import FLOAT32, Precision, precisely
from meshwright.compile.samples import sample_dims, with_draws
from meshwright.compile.script import Recorder, Script
from meshwright.compile.settings import default_dtype, in_dtype, straight_checkpoint, unvalidated
from meshwright.compile.stale import not_stale
from meshwright.compile.state import (
    constants_swapped,
    kept,
    require_dense,
    require_kept,
    traced_parameters,
)
from meshwright.compile.trace import Places, Tagger, trace_function
from meshwright.compile.watch import Watched, watching
from meshwright.errors import UserCodeError
from meshwright.program.attention import Choice
from meshwright.program.experts import unsorted_experts
from meshwright.program.program import Program

__all__ = ["Loss", "Unit", "default_dtype", "straight_checkpoint", "trace_unit"]

Loss = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True, slots=True)
class Unit:
    """A traced micro-batch.

    Attributes:
        program: with global shapes.
        samples: in the micro-batch.
        draws: per random op, its sample dim, or None where it has none.
        unused: parameters that the loss does not reach; eager leaves their gradient None.
        trained: parameters with a gradient, in order.
        metrics: names, in order.
        outputs: of a prediction, the tree that its `output/*` are leaves of.
        constants: the program's inputs that the code closes over.
        attention: the form that each attention has taken over split sequences.
    """

    program: Program
    samples: int
    draws: tuple[SampleDim | None, ...]
    unused: tuple[str, ...]
    trained: tuple[str, ...]
    metrics: tuple[str, ...]
    outputs: Any = None
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    attention: tuple[Choice, ...] = ()


@dataclass(slots=True)
class _Run:
    """What a trace found out beside the program."""

    unused: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    draws: int = 0
    outputs: Any = None
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    script: Script = field(default_factory=Script)


@dataclass(frozen=True, slots=True)
class _How:
    """How to trace: `trace_unit`'s arguments."""

    samples: int
    dtype: torch.dtype | None
    precision: Precision
    training: bool
    predict: bool


def trace_unit(
    model: Blueprint,
    loss: Loss,
    example: Example,
    samples: int,
    *,
    dtype: torch.dtype | None = None,
    precision: Precision = FLOAT32,
    training: bool = True,
    predict: bool = False,
) -> Unit:
    """Trace one micro-batch of `samples` samples.

    Args:
        model: the user's, on fake tensors.
        loss: of the job.
        example: the form of the batch.
        samples: in the micro-batch, over all ranks.
        dtype: floating tensors' dtype instead of their own (float64 to verify).
        precision: of the plan; what the forward and its backward compute in.
        training: with gradients, in training mode; else forward only, in evaluation mode.
        predict: `loss` returns tensors per sample, which the program gives as `output/*`.

    Raises:
        NotTraceable: naming the user's line and the way out.
        UserCodeError: the loss is of a wrong form, or the forward changes what the trace bakes in.
    """
    how = _How(samples, dtype, precision, training, predict)
    first, run = _trace(model, loss, example, how, 0)
    if not _runs_again(model, loss, example, how, run.script):
        _require_same(first, _trace(model, loss, example, how, 1)[0])
    run.script = Script()  # it holds the trace's tensors
    draws = sample_dims(first, samples, run.draws)
    if samples == 1 and run.draws:
        probe, _ = _trace(model, loss, example, replace(how, samples=2), 0)
        draws = sample_dims(probe, 2, run.draws)
    trained = tuple(
        n.removeprefix("gradient/") for n, _ in first.outputs if n.startswith("gradient/")
    )
    program = with_draws(first, draws)
    names = run.metrics, run.outputs, run.constants
    return Unit(program, samples, draws, run.unused, trained, *names)


def _trace(
    model: Blueprint,
    loss: Loss,
    example: Example,
    how: _How,
    turn: int,
) -> tuple[Program, _Run]:
    places, run = Places(), _Run()
    fakes = _fakes(model, example, how.samples, how.dtype)

    def function(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _unit(model, loss, example, how, inputs, places, run)

    with _as_traced(how.dtype):
        program, run.constants = not_stale(
            lambda: trace_function(function, fakes, places, model.make), model.module, turn
        )
        program = unsorted_experts(require_kept(program))
    return with_shared_casts(program) if how.precision.short else program, run


@contextlib.contextmanager
def _as_traced(dtype: torch.dtype | None) -> Iterator[None]:
    # Code that asks whether it is being compiled (to avoid reading values) is told that it is.
    compiling = mock.patch.object(torch.compiler, "_is_compiling_flag", new=True)
    with blamed(), default_dtype(dtype), straight_checkpoint(), compiling, unvalidated():
        yield


def _runs_again(model: Blueprint, loss: Loss, example: Example, how: _How, script: Script) -> bool:
    """Whether a second run, with other random states, does what the traced one did.

    Where it cannot tell, it says no, and a second trace decides.
    """
    fakes, run = _fakes(model, example, how.samples, how.dtype), _Run()

    def function() -> None:
        with fakes["scale"].fake_mode:  # type: ignore[attr-defined]
            _unit(model, loss, example, how, fakes, Places(), run)

    try:
        with _as_traced(how.dtype):
            not_stale(function, model.module, 1)
    except Exception:  # noqa: BLE001 - whatever it is, the second trace raises it too
        return False
    return script.lines == run.script.lines


def _require_same(one: Program, other: Program) -> None:
    if one.digest != other.digest:
        raise UserCodeError(
            f"{_first_difference(one, other)}two traces of the model differ: its forward depends"
            " on something outside its inputs (a global counter, the clock); make it an input, or "
            "use --eager"
        )


def _first_difference(one: Program, other: Program) -> str:
    """`file:line: ` of the first op that differs."""
    pairs = zip(one.ops, other.ops, strict=False)
    sources = (
        a.source for a, b in pairs if (a.name, a.args, a.kwargs) != (b.name, b.args, b.kwargs)
    )
    line = next(sources, "")
    return f"{line}: " if line else ""


def _fakes(
    model: Blueprint, example: Example, samples: int, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Fake inputs of the unit, by name."""
    found: dict[str, Tensor] = {}

    def like(shape: Sequence[int], kind: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=in_dtype(kind, dtype))

    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, tensor in model.parameters.items():
            found[f"model/{name}"] = like(tensor.shape, tensor.dtype)
        for name, tensor in model.buffers.items():
            found[f"buffer/{name}"] = like(tensor.shape, tensor.dtype)
        for name, tensor in model.constants.items():
            found[f"constant/{name}"] = like(tensor.shape, tensor.dtype)
        for name, kind, shape in example.leaves:
            found[f"batch/{name}"] = like((samples, *shape), kind)
        found["position"] = torch.empty(5, dtype=torch.int64)
        found["scale"] = torch.empty((), dtype=dtype or torch.float32)
    return found


class _LossOf(nn.Module):
    """The loss as a module, so that torch swaps the model's tensors for the program's inputs."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Any) -> Any:
        return self.loss(self.model, batch)


def _unit(
    model: Blueprint,
    loss: Loss,
    example: Example,
    how: _How,
    inputs: Mapping[str, Tensor],
    places: Places,
    run: _Run,
) -> dict[str, Tensor]:
    training, samples = how.training, how.samples
    wanted = {n for n, p in model.module.named_parameters() if p.requires_grad and training}
    parameters = traced_parameters(model, inputs, wanted)
    buffers = {name: inputs[f"buffer/{name}"] for name in model.buffers}
    state = {f"model.{name}": t for name, t in {**parameters, **buffers}.items()}
    state |= {f"model.{other}": parameters[name] for other, name in model.tied.items()}
    batch = example.build([inputs[f"batch/{name}"] for name, _, _ in example.leaves], traced=True)

    def emit(kind: str, size: Sequence[int], n: int) -> Tensor:
        drawn: Tensor = draw_op(kind, size, n, -1, 1, 1, 0, inputs["position"])
        return drawn

    tagger = Tagger(places)
    whole = _LossOf(model.module, loss)
    whole.train(training)
    watched = Watched()
    with (
        Recorder(run.script),
        tagger,
        tagger.modules(model.module),
        RandomMode(emit, promote=how.dtype == torch.float64) as mode,
        constants_swapped(model, inputs),
        watching(watched),
        torch.set_grad_enabled(training),
        Attention(),
        Picks(),
        Checks() as checks,
    ):
        with forbidding(model), precisely(how.precision, model.module):
            found = torch.func.functional_call(whole, state, (batch,), tie_weights=False)
        require_untouched(parameters, wanted)
        unwritten = kept(model, inputs)
        outputs: dict[str, Tensor] = {}
        if how.predict:
            found, outputs = _predictions(found, how.samples, run), _named_outputs(found)
        total, weight, metrics = normalise(found, samples)
        if training:
            scaled = total * inputs["scale"]
            tagger.phase = "backward"
            outputs = _gradients(scaled, parameters, wanted, run)
            tagger.phase = "forward"
        run.draws, run.metrics = mode.count, tuple(metrics)
        scalars = {"loss": total, "weight": weight}
        for name, (part, share) in metrics.items():
            scalars |= {f"metric/{name}": part, f"metric-weight/{name}": share}
        for name, value in (scalars | checks.totals).items():
            outputs[f"total/{name}"] = _scalar(value, inputs["scale"])
    if training:
        # A buffer that the forward rebound was written back to `state` by functional_call.
        outputs |= {
            f"next/{name}": _next(name, state[f"model.{name}"], old)
            for name, old in buffers.items()
        }
    outputs |= unwritten
    outputs |= {f"watch/{name}": tensor.detach() for name, tensor in watched.found.items()}
    run.script.note("outputs", list(outputs.items()))
    return outputs


def _predictions(found: Any, samples: int, run: _Run) -> Tensor:
    """Note the form of what a prediction returns, and stand in for its loss."""
    leaves, run.outputs = pytree.tree_flatten(found)
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != samples:
            shape = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
            raise UserCodeError(
                f"predict's function returned {shape}, but every output must be a tensor with one "
                "row"
                f" per sample on dim 0 ({samples} here)"
            )
    return torch.zeros(())


def _named_outputs(found: Any) -> dict[str, Tensor]:
    return {f"output/{k}": leaf.detach() for k, leaf in enumerate(pytree.tree_leaves(found))}


def _next(name: str, new: Tensor, old: Tensor) -> Tensor:
    """A buffer after the forward; it keeps its form."""
    if (new.shape, new.dtype) != (old.shape, old.dtype):
        raise UserCodeError(
            f"the forward changes buffer {name} from {old.dtype} {tuple(old.shape)} to {new.dtype} "
            f"{tuple(new.shape)}; a buffer must keep its shape and dtype, or use --eager"
        )
    return new.detach()


def _scalar(value: Any, like: Tensor) -> Tensor:
    """A total: a scalar of the accumulators' dtype, or of the model's where that is wider."""
    if not isinstance(value, Tensor):
        return torch.full((), float(value), dtype=like.dtype)
    wide = value.dtype if value.dtype == torch.float64 else like.dtype
    return value.detach().reshape(()).to(wide)


def _gradients(
    scaled: Tensor, parameters: Mapping[str, Tensor], wanted: set[str], run: _Run
) -> dict[str, Tensor]:
    named = {name: tensor for name, tensor in parameters.items() if name in wanted}
    if not scaled.requires_grad:
        raise UserCodeError(
            "the loss does not depend on any parameter that requires a gradient; check that loss() "
            "uses the model it is given, and that not all parameters are frozen"
        )
    found: tuple[Tensor | None, ...] = torch.autograd.grad(
        scaled, list(named.values()), allow_unused=True
    )
    gradients = {n: g for n, g in zip(named, found, strict=True) if g is not None}
    require_dense(gradients)
    run.unused = tuple(name for name in named if name not in gradients)
    return {f"gradient/{name}": gradient for name, gradient in gradients.items()}
