"""Post: where a rank stands in a pipeline, and whom it meets there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from meshwright.plan.mesh import Axis

__all__ = ["Post", "tied_axis"]


@dataclass(frozen=True, slots=True)
class Post:
    """Where a rank stands.

    Attributes:
        pipeline: its pipeline rank.
        replica: which of that one's replicas it is; they take micro-batches in turn.
        peers: by pipeline rank its replicas: the ranks with the same coordinates within.
        axes: of its stage.
        coordinates: along them.
        homes: of each parameter the pipeline ranks that hold it.
    """

    pipeline: int
    replica: int
    peers: tuple[tuple[int, ...], ...]
    axes: Sequence[Axis]
    coordinates: Mapping[str, int]
    homes: Mapping[str, tuple[int, ...]]

    def takes(self, microbatch: int) -> bool:
        """Whether the rank takes a micro-batch."""
        return microbatch % len(self.peers[self.pipeline]) == self.replica

    def peer(self, pipeline: int, microbatch: int) -> int:
        """The rank that takes a micro-batch at a pipeline rank."""
        return self.peers[pipeline][microbatch % len(self.peers[pipeline])]

    def holders(self, name: str) -> int:
        """How many ranks hold a parameter, or this one's part of it."""
        return sum(len(self.peers[home]) for home in self.homes[name])


def tied_axis(homes: tuple[int, ...]) -> str:
    """The name of the axis along which parameters with several homes are summed."""
    return "pipeline " + "+".join(map(str, homes))
