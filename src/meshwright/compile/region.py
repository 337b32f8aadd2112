"""Precision by module: what computes in another dtype than the rest, what is stored in bf16.

A module's forward runs in a region of its own: `torch.autocast` on, or off, from its first op to
its last. What comes into a float32 module in 16 bits is widened first, as `custom_fwd` does for
functions; what leaves a 16-bit module for code that is not under autocast is widened too, since an
op there takes one dtype.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from meshwright.compile.init import Blueprint
from meshwright.compile.precision import DTYPES, computing
from meshwright.errors import PlanError, nearest
from meshwright.plan.plan import Plan

__all__ = ["FLOAT32", "Precision", "precisely", "precision_of", "shorten"]

_SHORT = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Precision:
    """What a job computes in under a plan.

    Attributes:
        base: of all code.
        modules: (path, precision) of modules that a plan's `precisions` name.
        stored: parameters that are bf16 wherever they are kept, as is their optimizer state.
    """

    base: str = "float32"
    modules: tuple[tuple[str, str], ...] = ()
    stored: frozenset[str] = frozenset()

    @property
    def scales(self) -> bool:
        """Whether something computes in fp16, so that the loss is scaled."""
        return "fp16" in (self.base, *dict(self.modules).values())

    @property
    def short(self) -> bool:
        """Whether something computes in 16 bits."""
        return any(name != "float32" for name in (self.base, *dict(self.modules).values()))


FLOAT32 = Precision()


def precision_of(plan: Plan, model: Blueprint) -> Precision:
    """The plan's precisions, its patterns resolved; of patterns the later one holds.

    Raises:
        PlanError: a pattern matches no module.
    """
    found: dict[str, str] = {}
    paths = [path for path, _ in model.module.named_modules() if path]
    for pattern, precision in plan.precisions:
        named = fnmatch.filter(paths, pattern)
        if not named:
            raise PlanError(f"precision {pattern!r} matches no module; {_hint(pattern, model)}")
        found |= dict.fromkeys(named, precision)
    stored = _stored(model, found) if plan.precision == "bf16-pure" else frozenset()
    return Precision(plan.precision, tuple(sorted(found.items())), stored)


def _hint(pattern: str, model: Blueprint) -> str:
    """What a pattern that matches no module may have meant."""
    paths = [path for path, _ in model.module.named_modules() if path]
    if pattern in {*model.parameters, *model.tied} and "." in pattern:
        return f"{pattern!r} is a parameter; name its module, {pattern.rpartition('.')[0]!r}"
    return nearest(pattern, paths) if paths else "the model has no submodules"


def _stored(model: Blueprint, apart: Mapping[str, str]) -> frozenset[str]:
    """The float32 parameters, but those of modules that the plan names, or that torch needs wide.

    torch has no batch norm of bf16 weights beside float32 statistics.
    """
    owners: dict[str, list[str]] = {name: [name] for name in model.parameters}
    for other, name in model.tied.items():
        owners[name].append(other)
    modules = dict(model.module.named_modules(remove_duplicate=False))

    def wide(name: str) -> bool:
        path = name.rpartition(".")[0]
        inside = any(path == named or path.startswith(f"{named}.") for named in apart)
        return inside or isinstance(modules[path], _NormBase)

    return frozenset(
        name
        for name, names in owners.items()
        if model.parameters[name].dtype == torch.float32 and not any(map(wide, names))
    )


def shorten(model: Blueprint, names: frozenset[str]) -> None:
    """Have these parameters be bf16; their values are made as the factory makes them, and cast."""
    for name in names:
        parameter = model.parameters[name]
        model.originals[id(parameter)] = parameter.detach()
        parameter.data = torch.empty_like(parameter.detach(), dtype=torch.bfloat16)


@final
@dataclass(slots=True)
class _Regions:
    """The regions that are open, innermost last, each with what to do to a module's output."""

    open: list[tuple[AbstractContextManager[None], bool]] = field(default_factory=list)

    def enter(self, precision: str) -> Callable[[Any, Any, Any], Any]:
        """A forward pre-hook."""

        def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
            plain = not torch.is_autocast_enabled("cpu")
            region = _region(precision)
            region.__enter__()
            self.open.append((region, plain))
            return _widened((args, kwargs)) if precision == "float32" else (args, kwargs)

        return hook

    def leave(self, _: nn.Module, _args: Any, output: Any) -> Any:
        """A forward hook, also called where the forward raised."""
        region, plain = self.open.pop()
        region.__exit__(None, None, None)
        return _widened(output) if plain else output


def _widened(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.float() if t.dtype in _SHORT else t, tree)


def _shortened(_: nn.Module, args: Any, kwargs: Any) -> Any:
    def short(tensor: Tensor) -> Tensor:
        return tensor.bfloat16() if tensor.dtype == torch.float32 else tensor

    return pytree.tree_map_only(Tensor, short, (args, kwargs))


@contextmanager
def _region(precision: str) -> Iterator[None]:
    """Autocast in this precision, or none."""
    dtype = DTYPES.get(precision)
    outer = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    mixed = None not in (dtype, outer) and dtype != outer
    if mixed:  # the cache is by tensor, whatever it was cast to
        torch.clear_autocast_cache()
    try:
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            yield
    finally:
        if mixed:
            torch.clear_autocast_cache()


@contextmanager
def precisely(precision: Precision, model: nn.Module) -> Iterator[None]:
    """Run the model's forward as the plan has it compute; the backward is to run outside."""
    regions, handles = _Regions(), []
    parts = dict(model.named_modules())
    for path, name in precision.modules:
        enter = regions.enter(name)
        handles.append(parts[path].register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(parts[path].register_forward_hook(regions.leave, always_call=True))
    for part in parts.values() if precision.stored else ():
        own = list(part.parameters(recurse=False))
        leaf = own and not any(True for _ in part.children())
        if leaf and all(p.dtype == torch.bfloat16 for p in own):
            handles.append(part.register_forward_pre_hook(_shortened, with_kwargs=True))
    try:
        with computing(precision.base):
            yield
    finally:
        for handle in handles:
            handle.remove()
