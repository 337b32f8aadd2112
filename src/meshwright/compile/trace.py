"""User code -> Program: one micro-batch, forward and backward together.

`make_fx` runs the user's loss once on fake tensors under functionalisation, so in-place ops, buffer
updates, custom autograd functions and tied weights come out as plain data flow. Every op is tagged
with the user's source line, its module, its checkpoint region and its phase; a backward op takes
those of its forward op by autograd's sequence number.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from meshwright.compile import decompose, strided
from meshwright.compile.consecutive import with_slices
from meshwright.compile.settings import checkpoint_region
from meshwright.errors import NotTraceable
from meshwright.program.program import Arg, Op, Phase, Program, Ref, Symbol, Value, without_dead_ops

__all__ = [
    "Places",
    "Tagger",
    "hooks_of",
    "is_our_file",
    "is_user_file",
    "trace_function",
    "user_line",
]

_OURS = str(Path(__file__).resolve().parents[1])
_TORCH = str(Path(torch.__file__).resolve().parent)


@dataclass(slots=True)
class Places:
    """Where ops come from, kept by name of graph node while tracing."""

    module: dict[str, str] = field(default_factory=dict)
    source: dict[str, str] = field(default_factory=dict)
    phase: dict[str, Phase] = field(default_factory=dict)
    region: dict[str, int] = field(default_factory=dict)


_CHECKS = {torch.ops.aten._linalg_check_errors.default}
"""Ops that only raise, which a program of data flow has no place for."""


class Tagger(TorchDispatchMode):
    """Notes, for each op traced under it, its phase, module and user source line."""

    def __init__(self, places: Places) -> None:
        """Notes go to `places`."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.places = places
        self.stack: list[str] = []
        self.phase: Phase = "forward"
        self.by_sequence: dict[int, tuple[str, str, int]] = {}

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _CHECKS:
            return None
        mode = get_proxy_mode()
        if mode is None:  # the run beside the trace, which makes no program
            return func(*args, **(kwargs or {}))
        graph = mode.tracer.graph
        before = graph._root._prev
        result = func(*args, **(kwargs or {}))
        module, source, region = self._where()
        node = graph._root._prev
        while node is not before and node is not graph._root:
            self.places.module[node.name] = module
            self.places.source[node.name] = source
            self.places.phase[node.name] = self.phase
            self.places.region[node.name] = region
            node = node._prev
        return result

    def _where(self) -> tuple[str, str, int]:
        if self.phase == "backward":
            return self.by_sequence.get(_backward_sequence(), ("", "", 0))
        found = (self.stack[-1] if self.stack else "", user_line(), checkpoint_region())
        made = torch.autograd._get_sequence_nr() - 1  # type: ignore[attr-defined]
        if made >= 0:  # ops without a gradient come after one with it, under the same number
            self.by_sequence.setdefault(made, found)
        return found

    @contextmanager
    def modules(self, model: nn.Module) -> Iterator[None]:
        """Follow which module of `model` runs."""
        handles = []
        for name, module in model.named_modules():
            if name:
                handles.append(module.register_forward_pre_hook(self._enter(name)))
                handles.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> Callable[[nn.Module, Any], None]:
        def hook(_module: nn.Module, _inputs: Any) -> None:
            self.stack.append(name)

        return hook

    def _leave(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        self.stack.pop()


def _backward_sequence() -> int:
    """The sequence number of the autograd node that runs now, which its forward op was given."""
    node: Any = torch._C._current_autograd_node()
    return -1 if node is None else int(node._sequence_nr())


def hooks_of(parameter: Tensor) -> tuple[tuple[Callable[..., Any], ...], bool]:
    """(hooks on the parameter's gradient, whether others wait for its `.grad`)."""
    hooks = parameter._backward_hooks or {}
    return tuple(hooks.values()), bool(parameter._post_accumulate_grad_hooks)


def is_user_file(file: str) -> bool:
    """Whether code of this file is neither torch's, nor ours, nor generated."""
    return not file.startswith((_TORCH, _OURS, "<"))


def is_our_file(file: str) -> bool:
    """Whether code of this file is Meshwright's."""
    return file.startswith(_OURS)


def user_line() -> str:
    """`file:line` of the nearest frame that is neither torch's nor ours; the full path."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if is_user_file(file):
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def trace_function(
    function: Callable[..., Mapping[str, Tensor]],
    inputs: Mapping[str, Tensor],
    places: Places,
    make: Callable[[Tensor], Tensor],
    decompositions: Mapping[Any, Callable[..., Any]] = MappingProxyType({}),
) -> tuple[Program, dict[str, Tensor]]:
    """The Program of `function(**inputs)`, a mapping of named tensors, functionalised.

    Tensors that the code closes over (`torch.tensor(0.5)`, class weights of a module) become inputs
    `constant/<digest>`; they are returned beside it.

    Args:
        function: takes the inputs by name (as one mapping) and returns named outputs. It may
            change its inputs in place.
        inputs: fake tensors, all of one fake mode.
        places: filled by a `Tagger` that the function runs under.
        make: the real tensor that a fake one stands for, alone in memory.
        decompositions: of ops, beside those of every trace.
    """
    names: list[str] = []

    def flat(*tensors: Tensor) -> list[Tensor]:
        with FunctionalTensorMode(), _no_functional_keys():
            wrapped = [FunctionalTensor.to_functional(t) for t in tensors]
            outputs = function(dict(zip(inputs, wrapped, strict=True)))
            names[:] = list(outputs)
            return [_unwrap(t) for t in outputs.values()]

    table = {**decompose.DECOMPOSITIONS, **strided.DECOMPOSITIONS, **decompositions}
    graph = make_fx(flat, decomposition_table=table, tracing_mode="fake")(*inputs.values())
    graph.graph.eliminate_dead_code()
    reader = _Reader(graph, places, make)
    program = reader.read(list(inputs), names)
    return with_slices(program, reader.constants), reader.constants


@contextmanager
def _no_functional_keys() -> Iterator[None]:
    """Python functionalisation is on; the C++ key above it must be off (as AOTAutograd does)."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize)
    with torch._C._ExcludeDispatchKeyGuard(keys):
        yield


def _unwrap(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, FunctionalTensor):
        return tensor
    torch._sync(tensor)  # type: ignore[attr-defined, no-untyped-call]
    return torch._from_functional_tensor(tensor.elem)


_SAME = {
    "aten.detach.default",
    "aten.alias.default",
    "aten.lift_fresh.default",
    "aten.lift_fresh_copy.default",
}
"""Ops that are the identity in a functional program."""


_STRIDED = {"aten.as_strided.default": 0, "aten.as_strided_scatter.default": 1}
"""Ops on memory -> the operand whose elements they give back, where they only rename its dims."""


def _straight(node: Node) -> bool:
    """Whether such an op sees all of its tensor's memory in order: pooling to one pixel does so."""
    tensor: Tensor = node.args[0].meta["val"]  # type: ignore[union-attr]
    given: Any = node.args[1 + _STRIDED[str(node.target)] :]
    size, stride, offset = (*given, None)[:3]
    whole = math.prod(size) == tensor.numel() and not offset and not tensor.storage_offset()
    return whole and strided.dense(size, stride) and strided.dense(tensor.shape, tensor.stride())


class _Reader:
    """Reads an fx graph into a Program."""

    def __init__(
        self, graph: GraphModule, places: Places, make: Callable[[Tensor], Tensor]
    ) -> None:
        self.graph = graph
        self.make = make
        self.places = places
        self.values: list[Value] = []
        self.ops: list[Op] = []
        self.number: dict[Node, int] = {}
        self.parts: dict[tuple[Node, int], int] = {}
        self.constants: dict[str, Tensor] = {}

    def new(self, tensor: Tensor) -> int:
        self.values.append(
            Value(str(tensor.dtype).removeprefix("torch."), tuple(int(s) for s in tensor.shape))
        )
        return len(self.values) - 1

    def arg(self, arg: Any) -> Arg:
        if isinstance(arg, Node):
            return Ref(self.number[arg])
        if isinstance(arg, (list, tuple)):
            return tuple(self.arg(part) for part in arg)
        if isinstance(arg, torch.dtype):
            return Symbol("dtype", str(arg).removeprefix("torch."))
        if isinstance(arg, torch.device):
            return Symbol("device", str(arg))
        if isinstance(arg, torch.layout):
            return Symbol("layout", str(arg).removeprefix("torch."))
        if isinstance(arg, torch.memory_format):
            return Symbol("memory_format", str(arg).removeprefix("torch."))
        return arg  # type: ignore[no-any-return]

    def call(self, node: Node) -> None:
        name = str(node.target)
        if name in _SAME:
            self.number[node] = self.number[node.args[0]]  # type: ignore[index]
            return
        if name == "aten.copy.default" and self._same_form(node):
            self.number[node] = self.number[node.args[1]]  # type: ignore[index]
            return
        made = node.meta["val"]
        packed = isinstance(made, (tuple, list))
        if packed:
            used = {user.args[1] for user in node.users}
            outputs = tuple(
                self.new(t) if isinstance(t, Tensor) and k in used else None
                for k, t in enumerate(made)
            )
            for k, value in enumerate(outputs):
                if value is not None:
                    self.parts[node, k] = value
        else:
            self.number[node] = self.new(made)
            outputs = (self.number[node],)
        args = tuple(self.arg(a) for a in node.args)
        if name in _STRIDED:
            self._require_straight(node)
            source, shape = args[_STRIDED[name]], made.shape
            name, args = "aten.view.default", (source, tuple(int(size) for size in shape))
        kwargs = tuple(
            (k, self.arg(v))
            for k, v in node.kwargs.items()
            if k not in ("device", "pin_memory", "layout")
        )
        op = Op(
            name,
            args,
            kwargs,
            outputs,
            packed,
            self.places.phase.get(node.name, "forward"),
            self.places.module.get(node.name, ""),
            self.places.source.get(node.name, ""),
            self.places.region.get(node.name, 0),
        )
        self.ops.append(_canonical(op, self.values))

    def _require_straight(self, node: Node) -> None:
        if not _straight(node):
            line = self.places.source.get(node.name) or "the model"
            raise NotTraceable(
                f"{line}: as_strided reads memory that is not its tensor's own, which no shard "
                "has; index the tensor, or use unfold, or run it with --eager"
            )

    def _same_form(self, node: Node) -> bool:
        """Whether copying makes nothing new: source and destination alike."""
        target, source = (self.values[self.number[arg]] for arg in node.args[:2])  # type: ignore[index]
        return target == source

    def read(self, inputs: Sequence[str], outputs: Sequence[str]) -> Program:
        names = iter(inputs)
        named: list[tuple[str, int]] = []
        delivered: list[tuple[str, int]] = []
        for node in self.graph.graph.nodes:
            if node.op == "placeholder":
                self.number[node] = self.new(node.meta["val"])
                named.append((next(names), self.number[node]))
            elif node.op == "get_attr":
                tensor = self.make(_attribute(self.graph, node.target))
                name = f"constant/{_digest(tensor)}"
                if name not in self.constants:
                    self.constants[name] = tensor
                    named.append((name, self.new(tensor)))
                self.number[node] = dict(named)[name]
            elif node.op == "call_function" and "getitem" in str(node.target):
                self.number[node] = self.parts[node.args[0], node.args[1]]
            elif node.op == "call_function":
                self.call(node)
            elif node.op == "output":
                found = [self.number[n] for n in node.args[0]]
                delivered = list(zip(outputs, found, strict=True))
        return without_dead_ops(
            Program(tuple(self.values), tuple(named), tuple(self.ops), tuple(delivered))
        )


def _attribute(graph: GraphModule, path: str) -> Tensor:
    found: Any = graph
    for part in path.split("."):
        found = getattr(found, part)
    assert isinstance(found, Tensor)
    return found


_FILLED: dict[str, Arg] = {
    "aten.ones_like": 1,
    "aten.zeros_like": 0,
    "aten.empty_like": 0,
    "aten.full_like": None,
    "aten.new_ones": 1,
    "aten.new_zeros": 0,
    "aten.new_empty": 0,
    "aten.new_full": None,
}
_FILLS = {"aten.full_like": 1, "aten.new_full": 2}
"""Where what they are filled with stands among the arguments."""


def _digest(tensor: Tensor) -> str:
    """A name for a tensor's content, the same on every rank."""
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    form = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return hashlib.sha256(form + content).hexdigest()[:16]


def _canonical(op: Op, values: Sequence[Value]) -> Op:
    """One form for what has several.

    Squeezes become views (a local dim of size one must not vanish); `ones_like` and its like, which
    do not depend on values, become `full` (a partial operand need not be paid for).
    """
    if op.base in _FILLED:
        made = values[op.results[0]]
        fill = op.args[_FILLS[op.base]] if op.base in _FILLS else _FILLED[op.base]
        kwargs = (("dtype", Symbol("dtype", made.dtype)),)
        return replace(op, name="aten.full.default", args=(made.shape, fill), kwargs=kwargs)
    if op.base == "aten.squeeze":
        shape = values[op.results[0]].shape
        return replace(op, name="aten.view.default", args=(op.args[0], shape))
    return op
