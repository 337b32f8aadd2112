"""What a rank's program loads from tiers and stashes there, by the names of values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from meshwright.run.offload.disk import Disk
from meshwright.run.offload.flight import Flight
from meshwright.run.offload.tier import Place, Tier

__all__ = ["Store"]


@dataclass(slots=True)
class Store:
    """Weights and sums of a rank.

    Attributes:
        tiers: of each kind of value (`model`, `gradient`, `optimizer` ...) that is offloaded.
        places: by name.
        flight: what is on its way to tiers.
    """

    tiers: Mapping[str, Tier]
    places: dict[str, Place] = field(default_factory=dict)
    flight: Flight = field(default_factory=Flight)

    def taken(self, name: str, tensor: Tensor) -> Tensor:
        """A value, moved to the tier that its kind rests in, at once; what is left of it here."""
        if name.partition("/")[0] not in self.tiers:
            return tensor
        found = self.stash(name, tensor)
        self.settle()
        return found

    def load(self, name: str) -> Callable[[], Tensor]:
        """Begin to copy a value here; the function waits for it."""
        place = self.places[name]
        out = torch.empty(place.shape, dtype=place.dtype)
        transfer = self.tier(name).fetch(place, out)

        def arrived() -> Tensor:
            transfer.wait()
            return out

        return arrived

    def stash(self, name: str, tensor: Tensor) -> Tensor:
        """Begin to copy a value there; what it is from now on."""
        place = self.places.get(name)
        if place is None or not place.fits(tensor):
            place = self.tier(name).place(name, tuple(tensor.shape), tensor.dtype)
            self.places[name] = place
        self.flight.begin(place.bytes, partial(self.tier(name).put, place, tensor))
        return place.rests

    def refresh(self, names: Iterable[str]) -> None:
        """What rests there was written to where it rests; on disk it is put anew, with digests."""
        for name in names:
            if name in self.far:
                self.stash(name, self.places[name].rests)
        self.settle()

    def require_whole(self, names: Iterable[str] | None = None) -> None:
        """Compare the digests of what rests on disk: of all of it, or of these.

        Raises:
            StorageError: something is damaged.
        """
        self.settle()
        for name in self.far if names is None else self.far.intersection(names):
            self.tier(name).settle(self.places[name])

    @property
    def far(self) -> frozenset[str]:
        """What rests on disk."""
        return frozenset(n for n in self.places if isinstance(self.tier(n), Disk))

    def settle(self) -> None:
        """Wait until all that was stashed is there."""
        self.flight.settle()

    def close(self) -> None:
        """Give the room back."""
        for tier in set(self.tiers.values()):
            tier.close()

    def tier(self, name: str) -> Tier:
        """Where a value rests."""
        return self.tiers[name.partition("/")[0]]
