"""The parameters as a table: repeated layers folded into one line, what each rank holds of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from meshwright.program.fold import folded_name
from meshwright.view.layouts import KINDS, layout_of, rank_names, shards
from meshwright.view.runfile import Axis, Parameter

__all__ = ["Holding", "Module", "modules", "shape_text"]


@dataclass(frozen=True, slots=True)
class Holding:
    """Equal tensors of equal modules: `layouts` has each kind's text and number of shards."""

    name: str
    count: int
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    local: str
    local_bytes: int
    layouts: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Module:
    """A module, or equal ones folded together, and its own parameters."""

    name: str
    count: int
    holdings: tuple[Holding, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all its parameters, over all ranks once."""
        return sum(holding.bytes for holding in self.holdings)

    @property
    def local_bytes(self) -> int:
        """Bytes of its weights on the rank that holds most."""
        return sum(holding.local_bytes for holding in self.holdings)


Path = tuple[str, ...]


def modules(parameters: Sequence[Parameter], axes: Sequence[Axis]) -> tuple[Module, ...]:
    """The parameters by module, in their order; layers alike in all parameters are one line."""
    by_module: dict[Path, list[Parameter]] = {}
    for parameter in parameters:
        by_module.setdefault(tuple(parameter.name.split(".")[:-1]), []).append(parameter)
    alike: dict[tuple[object, ...], list[Path]] = {}
    for path, owned in by_module.items():
        pattern = tuple("*" if word.isdecimal() else word for word in path)
        alike.setdefault((pattern, *(_likeness(p) for p in owned)), []).append(path)
    return tuple(
        Module(
            folded_name(paths),
            len(paths),
            tuple(_holding(parameter, len(paths), axes) for parameter in by_module[paths[0]]),
        )
        for paths in alike.values()
    )


def _likeness(parameter: Parameter) -> tuple[object, ...]:
    leaf = parameter.name.rpartition(".")[2]
    layouts = tuple(layout_of(parameter, kind) for kind in KINDS)
    return leaf, parameter.shape, parameter.dtype, layouts, parameter.local


def _holding(parameter: Parameter, count: int, axes: Sequence[Axis]) -> Holding:
    local: dict[tuple[int, ...], list[int]] = {}
    for rank, shape in parameter.local:
        local.setdefault(shape, []).append(rank)
    largest = max((prod(shape) for shape in local), default=prod(parameter.shape))
    share = largest / (prod(parameter.shape) or 1)
    return Holding(
        name=parameter.name.rpartition(".")[2],
        count=count,
        shape=parameter.shape,
        dtype=parameter.dtype,
        bytes=parameter.bytes * count,
        local=_local_text(parameter, local),
        local_bytes=round(parameter.bytes * share) * count,
        layouts=tuple(
            (layout_of(parameter, k), shards(layout_of(parameter, k), axes)) for k in KINDS
        ),
    )


def _local_text(parameter: Parameter, local: dict[tuple[int, ...], list[int]]) -> str:
    if len(local) <= 1:
        return shape_text(next(iter(local), parameter.shape))
    return "; ".join(f"{shape_text(shape)} on {rank_names(r)}" for shape, r in local.items())


def shape_text(shape: Sequence[int]) -> str:
    """`(32, 512)` as `32 × 512`; a single number is `scalar`."""
    return " × ".join(f"{size:,}" for size in shape) or "scalar"
