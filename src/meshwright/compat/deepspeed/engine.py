"""The engine: DeepSpeed's three calls around one step of a run.

Between `engine(x)` and `engine.step()` nothing is computed: what the script does is recorded, and
at the end of an accumulation the whole step runs as one program under the plan.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from meshwright.api import Run
from meshwright.compat.deepspeed.behind import EngineRun, Schedule, job_of, recipe_of
from meshwright.compat.deepspeed.config import Settings
from meshwright.compat.deepspeed.forms import Form, form_of
from meshwright.compat.deepspeed.given import Given
from meshwright.compat.deepspeed.lazy import Call, Lazy, Recording
from meshwright.compat.deepspeed.meeting import Meeting
from meshwright.errors import MeshwrightError, StorageError, UsageError, UserCodeError
from meshwright.launch.contract import here
from meshwright.run.checkpoint.durable import sync_folder, write_file
from meshwright.run.step import Metrics

__all__ = ["Engine"]

_MANY: Final = 8  # forms of a loss after which its constants are likely to change with each step
_FOREVER: Final = 1 << 30  # checkpoints kept: the script removes its own


class Engine:
    """What `initialize` returns; called like the module."""

    def __init__(
        self,
        module: nn.Module,
        asked: Settings,
        optimizer: torch.optim.Optimizer,
        schedule: Callable[[Any], Any] | None,
        loader: Any,
    ) -> None:
        """`optimizer` is over the module's own parameters."""
        self.given = Given(module)
        self.asked = asked
        self.optimizer, self.training_dataloader = optimizer, loader
        self.contract = here()
        self.training = module.training
        self.global_steps = self.micro_steps = 0
        self.client_lr_scheduler = schedule
        self.lr_scheduler = None if schedule is None else Schedule(self)
        self.device = torch.device("cpu")
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._fake = self.given.fake(self._mode)
        self._structures: dict[str, Any] = {}
        self._recording: Recording | None = None
        self._losses: list[Lazy] = []
        self._micros: list[tuple[Form, dict[str, Tensor], Recording, list[Lazy]]] = []
        self.forms: dict[str, Form] = {}
        self._meeting = Meeting(self.contract.world.size)
        self.example: Any = None
        self._told: set[str] = set()
        self.recipe = recipe_of(self.given, optimizer)
        self._run: EngineRun | None = None
        self._metrics: Metrics | None = None
        if asked.plan.tensor == 1:  # a step's form says how tensors are split
            self._open()

    # ---- what a script asks -------------------------------------------------------------------

    @property
    def module(self) -> nn.Module:
        """The script's module, with the weights as they are now; every rank must ask."""
        self._refresh()
        return self.given.module

    @property
    def global_rank(self) -> int:
        """This process's rank."""
        return self.contract.world.rank

    @property
    def local_rank(self) -> int:
        """This process's rank on its host."""
        return self.contract.world.local_rank

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return self.contract.world.size

    @property
    def dp_world_size(self) -> int:
        """How many ranks share batches."""
        return self.asked.plan.data or 1

    @property
    def config(self) -> Settings:
        """What the configuration asks for."""
        return self.asked

    @property
    def run(self) -> Run:
        """The run behind it: `run.log`, `run.evaluate`, `run.export` and more."""
        return self._open()

    def train_batch_size(self) -> int:
        """Samples per step over all ranks."""
        return self.asked.batch_size

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples of one call of the engine."""
        return self.asked.micro

    def gradient_accumulation_steps(self) -> int:
        """Micro-batches per step."""
        return self.asked.plan.microbatches

    def zero_optimization_stage(self) -> int:
        """0 to 3."""
        return self.asked.plan.zero

    def zero_optimization(self) -> bool:
        """Whether anything is sharded."""
        return self.asked.plan.zero > 0

    def bfloat16_enabled(self) -> bool:
        """Whether the plan computes in bf16."""
        return self.asked.plan.precision == "bf16"

    def fp16_enabled(self) -> bool:
        """Whether the plan computes in fp16."""
        return self.asked.plan.precision == "fp16"

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether this micro-batch's `step()` updates the weights."""
        return (self.micro_steps + 1) % self.gradient_accumulation_steps() == 0

    def get_lr(self) -> list[float]:
        """Of each parameter group."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def get_global_grad_norm(self) -> float | None:
        """Of the last step, where gradients are clipped."""
        return None if self._metrics is None else self._metrics.gradient_norm

    def parameters(self) -> Iterator[nn.Parameter]:
        """The module's."""
        return self.given.module.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The module's."""
        return self.given.module.named_parameters()

    def train(self, mode: bool = True) -> Engine:  # noqa: FBT001, FBT002 - torch's
        """Like the module's."""
        self.training = mode
        self.given.module.train(mode)
        self._fake.train(mode)
        return self

    def eval(self) -> Engine:
        """Like the module's."""
        return self.train(mode=False)

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: FBT001, FBT002 - torch's
        """Gradients are gone when a step is."""

    def no_sync(self) -> AbstractContextManager[None]:
        """When gradients are reduced follows from the plan."""
        return nullcontext()

    # ---- a step -------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward: recorded in training, run at once otherwise, by all ranks."""
        args, kwargs = self._cast((args, kwargs))
        if not self.training or not torch.is_grad_enabled():
            return self.module(*args, **kwargs)
        if self._recording is None:
            self._recording = Recording(self.micro_steps, self._mode, self._forward)
        return self._recording.add(None, (args, kwargs), self._structure(args, kwargs))

    forward = __call__

    def backward(self, loss: Any, **_: Any) -> Any:
        """Have the step take the gradients of `loss`, a mean over this micro-batch's samples."""
        if not isinstance(loss, Lazy):
            raise UsageError(
                f"engine.backward(loss) got {_described(loss)}; give it what was computed from the "
                "outputs of engine(...) in training"
            )
        self._losses.append(loss)
        return loss

    def step(self, *_: Any, **__: Any) -> None:
        """End a micro-batch; the last one of an accumulation runs the step."""
        if not self._losses or self._recording is None:
            raise UsageError(
                "engine.step() without engine.backward(loss) before it; a step needs a loss"
            )
        recording, losses = self._recording, self._losses
        self._recording, self._losses = None, []
        form, tensors = form_of(recording, losses, self.asked.micro, self._meeting.kept)
        self._require_rows(tensors, recording)
        self._micros.append((form, tensors, recording, losses))
        self.micro_steps += 1
        if self.micro_steps % self.gradient_accumulation_steps() == 0:
            micros, self._micros = self._micros, []
            self._step(micros)

    def _step(self, micros: list[tuple[Form, dict[str, Tensor], Recording, list[Lazy]]]) -> None:
        form = micros[0][0]
        if any(other.key != form.key for other, *_ in micros):
            raise UserCodeError(
                "the micro-batches of one step compute different losses; a step is one program: "
                "compute the same in each"
            )
        self.forms[form.key] = form
        if len(self.forms) == _MANY:
            self._note(
                f"{_MANY} different losses were traced: a Python number in it changes with every "
                "step; make a tensor of it with one value per sample"
            )
        batch: dict[str, Any] = {
            name: torch.cat([tensors[name] for _, tensors, _, _ in micros]) for name in micros[0][1]
        }
        batch["form"] = form.key
        self.example = batch
        run = self._open()
        self._meet(busy=True)
        self._take_rates(run)
        self._metrics = metrics = run.step(batch, part="local")
        self.global_steps = run.step_number
        self.given.free()
        self._show(micros, metrics)
        self._give_rates(run)

    def _show(self, micros: Sequence[Any], metrics: Metrics) -> None:
        """What the step found, as values of the tensors that stand for it."""
        for _, _, _, losses in micros:
            for loss in losses:
                loss.call.known[loss.place] = torch.tensor(metrics.loss, dtype=loss.fake.dtype)
        *_, (_, _, recording, _) = micros
        models = [call for call in recording.calls if call.function is None]
        for name, tensor in metrics.watched.items():
            kind, _, places = name.partition("/")
            if kind == "output":
                turn, place = map(int, places.split("/"))
                rows = models[turn].fakes[place].shape[0]
                data = self.dp_world_size
                first = self.global_rank // self.asked.plan.tensor * rows
                mine = tensor[first : first + rows] if len(tensor) == rows * data else tensor
                models[turn].known[place] = mine

    def _require_rows(self, tensors: Mapping[str, Tensor], recording: Recording) -> None:
        if tensors:
            return
        leaves = pytree.tree_leaves([call.args for call in recording.calls[:1]])
        shapes = [list(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)]
        raise UserCodeError(
            f"the engine was called with tensors of shapes {shapes}, but dim 0 must be the "
            f"train_micro_batch_size_per_gpu={self.asked.micro} samples of a micro-batch; give the "
            "DataLoader that batch_size, and drop_last=True"
        )

    def _structure(self, args: Any, kwargs: Any) -> Any:
        """What the forward returns, on fake tensors; found once per form of the inputs."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        told = [(t.dtype, t.shape) if isinstance(t, Tensor) else repr(t) for t in leaves]
        key = repr((told, str(spec)))
        if key not in self._structures or any(isinstance(leaf, Lazy) for leaf in leaves):
            fakes = [leaf.fake if isinstance(leaf, Lazy) else leaf for leaf in leaves]
            args, kwargs = pytree.tree_unflatten(fakes, spec)
            with self._mode:
                found = self._fake(*args, **kwargs)
            if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(found)):
                raise UserCodeError(
                    f"the model returned {_described(found)}, in which no tensor can be found; "
                    "return tensors, or tuples, lists or dicts of them"
                )
            self._structures[key] = found
        return self._structures[key]

    def _forward(self, call: Call, place: int) -> list[Tensor]:
        """A value that was asked for without a step having given it."""
        if call.recording.number < self.global_steps * self.gradient_accumulation_steps():
            turn = [c for c in call.recording.calls if c.function is None].index(call)
            self._meeting.wanted.add((turn, place))
            self._note(
                "an output of the model was read after the step that used it; this once it is "
                "computed again, with the new weights, and from the next step on it is kept"
            )
        else:
            self._note(
                "a value was read before the step that computes it, which costs a forward (with "
                "dropout drawn otherwise); read it after engine.step()"
            )
        module = self.module
        args, kwargs = pytree.tree_map(
            lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, call.args
        )
        with torch.no_grad():
            found = module(*args, **kwargs)
        return [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]

    def _cast(self, tree: Any) -> Any:
        """Inputs in half precision, which DeepSpeed's modules take: weights here are float32."""
        if self.asked.plan.precision not in ("bf16", "fp16"):
            return tree
        low = (torch.float16, torch.bfloat16)

        def cast_(leaf: Any) -> Any:
            taken = isinstance(leaf, Tensor) and not isinstance(leaf, Lazy) and leaf.dtype in low
            return leaf.float() if taken else leaf

        return pytree.tree_map(cast_, tree)

    # ---- state --------------------------------------------------------------------------------

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,  # noqa: FBT001, FBT002 - DeepSpeed's
        **_: Any,
    ) -> bool:
        """Save under `save_dir/tag`; any plan on any number of ranks loads it."""
        run = self._open()
        self._meet()
        tag = f"global_step{self.global_steps}" if tag is None else str(tag)
        root = _within(Path(save_dir), tag)
        run.extra["deepspeed"] = {
            "client_state": dict(client_state or {}),
            "micro_steps": self.micro_steps,
        }
        run.session.save(root, _FOREVER)
        if save_latest and self.global_rank == 0:
            aside = Path(save_dir) / f".latest.{os.getpid()}"
            write_file(aside, [tag.encode()])
            aside.rename(Path(save_dir) / "latest")
            sync_folder(Path(save_dir))
        return True

    def load_checkpoint(
        self, load_dir: str | Path, tag: str | None = None, **_: Any
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Go on from `load_dir/tag`, by default the latest; (its path, the client's state)."""
        run = self._open()
        if tag is None:
            latest = Path(load_dir) / "latest"
            if not latest.is_file():
                return None, None
            tag = latest.read_text().strip()
        self._meet()
        found = run.session.resume(_within(Path(load_dir), str(tag)))
        if found is None:
            raise StorageError(f"there is no checkpoint in {load_dir}/{tag}; name another tag")
        self.given.free()
        told = run.extra.get("deepspeed", {})
        self.global_steps = run.step_number
        self.micro_steps = self.global_steps * self.gradient_accumulation_steps()
        self._give_rates(run)
        return str(found), dict(told.get("client_state", {}))

    def save_16bit_model(self, save_dir: str | Path, *_: Any, **__: Any) -> bool:
        """Export the whole weights as safetensors."""
        run = self._open()
        self._meet()
        run.export(save_dir)
        return True

    def _open(self) -> EngineRun:
        """The run, entered."""
        if self._run is None:
            if self.asked.plan.tensor > 1 and self.example is None:
                raise UsageError(
                    "with tensor_parallel the engine learns from its first training step how "
                    "weights are split; run one before evaluating, saving or loading"
                )
            self._run = EngineRun(self, job_of(self))
            self._run.__enter__()
        return self._run

    def close(self, error: BaseException | None = None) -> None:
        """Write what is still to be written, and leave the world; the process's end calls it."""
        atexit.unregister(self.leave)
        run, self._run = self._run, None
        if run is not None:
            kind = None if error is None else type(error)
            run.__exit__(kind, error, None if error is None else error.__traceback__)

    def leave(self) -> None:
        """Close, at the end of the process; as failed where an error ends it."""
        error = vars(sys).get("last_value")
        if error is None and self._run is not None:
            try:
                self._meet()
            except MeshwrightError as problem:
                error = problem
        self.close(error)

    def _refresh(self) -> None:
        """Put the weights as they are now into the script's module."""
        run = self._open()
        if not self.given.whole:
            self._meeting.hold(run.session.comm.perform, reading=True, busy=bool(self._micros))
            self.given.fill(run.session.whole())

    def _meet(self, *, busy: bool = False) -> None:
        """Before what all ranks do together: ranks that wait to read a value get what it takes."""
        run = self._open()
        perform, busy = run.session.comm.perform, busy or bool(self._micros)
        while self._meeting.hold(perform, reading=False, busy=busy):
            if not self.given.whole:
                self.given.fill(run.session.whole())

    def _take_rates(self, run: Run) -> None:
        """The script may have changed settings of its optimizer's groups."""
        if self.client_lr_scheduler is None:
            _copy_settings(self.optimizer, run.session.worker.state.optimizer)

    def _give_rates(self, run: Run) -> None:
        if self.client_lr_scheduler is not None:
            _copy_settings(run.session.worker.state.optimizer, self.optimizer)

    def _note(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._open().session.notes.append(text)


def _copy_settings(source: torch.optim.Optimizer, target: torch.optim.Optimizer) -> None:
    for one, other in zip(source.param_groups, target.param_groups, strict=False):
        other.update({key: one[key] for key in one.keys() & other.keys() if key != "params"})


def _within(folder: Path, tag: str) -> Path:
    if not tag or tag in (".", "..") or "/" in tag or "\\" in tag or "\0" in tag:
        raise StorageError(
            f"tag {tag!r} is no name of a folder; use letters, digits and _ - . only"
        )
    return folder / tag


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)} that is not the engine's"
    return f"{'an' if type(value).__name__[0] in 'AEIOUaeiou' else 'a'} {type(value).__name__}"
