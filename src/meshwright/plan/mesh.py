"""Mesh: which ranks there are, and how they are arranged, by arithmetic only.

A mesh is a tuple of stage meshes; each is a list of named axes with sizes, major axis first:

    Mesh.of(data=2, tensor=2)          one stage       Mesh((StageMesh(axes), StageMesh(axes)))

        tensor  0   1                  stage 0: ranks 0..3   stage 1: ranks 4..7
    data 0      0   1
         1      2   3

Stages may differ in shape; world size is the sum over stages. An axis may be split inside
(`data=4x2`: 4 hosts of 2), which only names which of its ranks are near.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from meshwright.errors import PlanError

__all__ = ["AXES", "SAMPLE_AXES", "Axis", "Mesh", "StageMesh"]

AXES = ("data", "shard", "context", "expert", "tensor")
"""Axes within a stage, major first: the nearest ranks share the axis that talks most."""

SAMPLE_AXES = ("data", "shard", "expert")
"""Axes that split samples. Under hybrid sharding ranks of `shard` share state, and groups along
`data` are replicas of it; ranks of `expert` share the weights of experts, and send them tokens."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A named mesh axis of `size` coordinates; `inner` divides it into near groups."""

    name: str
    size: int
    inner: int = 1

    def __post_init__(self) -> None:
        """Sizes are positive and the inner split divides."""
        if self.size < 1 or self.inner < 1 or self.size % self.inner:
            raise PlanError(
                f"mesh axis {self.name}={self.size} (inner split {self.inner}): sizes are at least"
                " 1 and the inner split divides the axis"
            )


@dataclass(frozen=True, slots=True)
class StageMesh:
    """The axes of one pipeline stage, major first."""

    axes: tuple[Axis, ...] = ()

    def __post_init__(self) -> None:
        """Axis names are unique."""
        names = [axis.name for axis in self.axes]
        if len(set(names)) != len(names):
            raise PlanError(f"mesh axes {names} name one twice; each name stands once")

    @property
    def size(self) -> int:
        """Ranks in this stage."""
        return math.prod(axis.size for axis in self.axes)

    def axis_size(self, name: str) -> int:
        """Size of the named axis; 1 where the stage has none of that name."""
        return next((axis.size for axis in self.axes if axis.name == name), 1)

    def coordinates(self, index: int) -> dict[str, int]:
        """Coordinates of the stage's `index`-th rank, row-major."""
        found: dict[str, int] = {}
        for axis in reversed(self.axes):
            index, found[axis.name] = divmod(index, axis.size)
        return {axis.name: found[axis.name] for axis in self.axes}

    def index(self, coordinates: Mapping[str, int]) -> int:
        """The inverse of `coordinates`."""
        index = 0
        for axis in self.axes:
            index = index * axis.size + coordinates[axis.name]
        return index


@dataclass(frozen=True, slots=True)
class Mesh:
    """Stage meshes in pipeline order; ranks are numbered stage by stage."""

    stages: tuple[StageMesh, ...]

    @classmethod
    def of(cls, pipeline: int = 1, replicas: Sequence[int] = (), **sizes: int) -> Mesh:
        """Stages with the named axis sizes, e.g. `Mesh.of(data=2)`.

        Args:
            pipeline: stages, all alike.
            replicas: in their place, the size of `data` in each of them.
            **sizes: of the axes.
        """
        if replicas:
            return cls(tuple(_stage(**{**sizes, "data": size}) for size in replicas))
        return cls((_stage(**sizes),) * pipeline)

    @property
    def size(self) -> int:
        """World size."""
        return sum(stage.size for stage in self.stages)

    def coordinates(self, rank: int) -> tuple[int, dict[str, int]]:
        """(stage, coordinates within it) of `rank`."""
        index = rank
        for number, stage in enumerate(self.stages):
            if 0 <= index < stage.size:
                return number, stage.coordinates(index)
            index -= stage.size
        raise PlanError(f"rank {rank} is outside a mesh of {self.size} ranks")

    def rank(self, stage: int, coordinates: Mapping[str, int]) -> int:
        """The inverse of `coordinates`."""
        before = sum(mesh.size for mesh in self.stages[:stage])
        return before + self.stages[stage].index(coordinates)

    def group(self, rank: int, axis: str) -> tuple[int, ...]:
        """`rank` and those that differ from it in `axis` only, in coordinate order."""
        stage, here = self.coordinates(rank)
        size = self.stages[stage].axis_size(axis)
        if size == 1:
            return (rank,)
        return tuple(self.rank(stage, {**here, axis: k}) for k in range(size))

    def groups(self, stage: int, axis: str) -> Iterator[tuple[int, ...]]:
        """All groups along `axis` in `stage`: together they hold each of its ranks once."""
        mesh = self.stages[stage]
        others = [range(a.size) for a in mesh.axes if a.name != axis]
        names = [a.name for a in mesh.axes if a.name != axis]
        for place in itertools.product(*others):
            here = dict(zip(names, place, strict=True))
            if any(a.name == axis for a in mesh.axes):
                here[axis] = 0
            yield self.group(self.rank(stage, here), axis)


def _stage(**sizes: int) -> StageMesh:
    """A stage of these axes, in their order."""
    order = {name: place for place, name in enumerate(AXES)}
    names = sorted(sizes, key=lambda name: order.get(name, len(order)))
    return StageMesh(tuple(Axis(name, sizes[name]) for name in names))
