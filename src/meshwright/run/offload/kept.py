"""The optimizer's state in a tier, and the steps that stream it through the host.

A step goes chunk by chunk of parameters: gradients and weights of a chunk go to the host, the
user's own optimizer steps them there, weights come back. State in host memory is stepped where it
rests; state on disk is read a chunk ahead and written back a chunk behind.

    chunk   0          1          2
            read
            step       read
            write      step       read
                       write      step
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle

import torch
from torch import Tensor, nn

from meshwright.run.offload.flight import Flight
from meshwright.run.offload.probe import lets_fuse
from meshwright.run.offload.staging import Staging
from meshwright.run.offload.store import Store
from meshwright.run.offload.tier import Moved, Place, Tier, Transfer

__all__ = ["CHUNK", "Kept", "chunks_of"]

_FULL = {"gradients": "reduced/", "params": "model/"}
"""How values of a part are called."""

CHUNK = 32 << 20
"""Bytes of weights that are stepped together."""


def chunks_of(sizes: Mapping[str, int], most: int) -> tuple[tuple[str, ...], ...]:
    """Names in their order, in chunks of at most `most` bytes, or of one name."""
    found: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not found or size > room:
            found.append([])
            room = most
        found[-1].append(name)
        room -= size
    return tuple(map(tuple, found))


@dataclass(slots=True)
class Kept:
    """The state of a rank's optimizer.

    Attributes:
        tier: where it rests; None: where the optimizer makes it.
        shards: what the optimizer sees, by name.
        optimizer: the user's.
        stays: whether it is stepped where it rests.
        fused: whether it may run its fused kernels.
        chunk: bytes of weights that are stepped together; None: all of them at once.
        here: `gradients` and `params`, if they are in host memory already.
        store: of weights and gradients, where they are offloaded.
        far: `gradients` and `params`, if the store has them on disk.
        moved: gradients and weights that went to the host (put) and back (fetched).
        places: by parameter and slot.
    """

    tier: Tier | None
    shards: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    stays: bool = True
    fused: bool = False
    chunk: int | None = CHUNK
    here: frozenset[str] = frozenset()
    store: Store | None = None
    far: frozenset[str] = frozenset()
    moved: Moved = field(default_factory=Moved)
    places: dict[str, dict[str, Place]] = field(default_factory=dict)
    flight: Flight = field(default_factory=Flight)
    _steps: Staging = field(default_factory=lambda: Staging("a chunk's weights and gradients"))
    _sets: tuple[_Read, ...] = field(init=False)
    _reads: Iterator[_Read] = field(init=False)
    _coming: dict[str, _Read] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """What the optimizer made when it was built rests from now on."""
        self._sets = tuple(_Read(Staging("a chunk of the optimizer's state")) for _ in range(3))
        self._reads = cycle(self._sets)
        self.rest(tuple(self.shards))
        self._written()

    @property
    def passing(self) -> int:
        """Bytes of host memory that chunks pass through."""
        return self._steps.bytes + sum(read.staging.bytes for read in self._sets)

    def step(self, gradients: Mapping[str, Tensor], factor: float = 1.0) -> None:
        """Step the parameters that have gradients; those on disk are still to be multiplied."""
        sizes = {n: s.nbytes for n, s in self.shards.items() if n in gradients}
        chunks = chunks_of(sizes, self.chunk if self.chunk is not None else sum(sizes.values()))
        for names, after in zip(chunks, (*chunks[1:], ()), strict=True):
            self._begin(names)
            self._begin(after)
            self._open(names)
            with self._on_host(names, gradients, factor):
                self._stepped()
            self.rest(names)
        self._written()

    @contextmanager
    def holding(self, name: str) -> Iterator[None]:
        """The state of a parameter is there; afterwards it rests."""
        weight = (f"model/{name}",)
        if self.store is not None:
            self.store.require_whole(weight)
        self._begin((name,))
        self._open((name,))
        yield
        self.rest((name,))
        if self.store is not None:
            self.store.refresh(weight)
        self._written()

    def rest(self, names: Sequence[str]) -> None:
        """Put what the optimizer now has of these into the tier."""
        for name in names if self.tier is not None else ():
            state = self.optimizer.state.get(self.shards[name], {})
            for slot, tensor in state.items():
                if isinstance(tensor, Tensor) and tensor.dim():
                    state[slot] = self._put(name, slot, tensor.detach())

    def settle(self) -> None:
        """All is in the tier, and whole.

        Raises:
            StorageError: it is damaged.
        """
        for name, places in self.places.items():
            state = self.optimizer.state.get(self.shards[name], {})
            for slot, place in places.items():
                if self.tier is not None and state.get(slot) is place.rests:
                    self.tier.settle(place)

    def close(self) -> None:
        """Give the tier's room back."""
        if self.tier is not None:
            self.tier.close()

    def _put(self, name: str, slot: str, tensor: Tensor) -> Tensor:
        assert self.tier is not None
        places = self.places.setdefault(name, {})
        place = places.get(slot)
        if place is None or not place.fits(tensor):
            full = f"optimizer/{slot}/{name}"
            place = places[slot] = self.tier.place(full, tuple(tensor.shape), tensor.dtype)
        if tensor.data_ptr() != place.rests.data_ptr():
            writing = self.flight.begin(place.bytes, partial(self.tier.put, place, tensor))
            if name in self._coming:
                self._coming[name].writing.append(writing)
        return place.rests

    def _begin(self, names: Sequence[str]) -> None:
        """Begin to read the state of a chunk, unless it is stepped where it rests."""
        new = [name for name in names if name not in self._coming]
        if (self.stays and not self.far) or not new:
            return
        wanted = [(name, slot, p, tier) for name in new for slot, p, tier in self._resting(name)]
        read = next(self._reads)
        read.free()
        read.staging.begin([(place.shape, place.dtype) for _, _, place, _ in wanted])
        for name, slot, place, tier in wanted:
            out = read.staging.take(place.shape, place.dtype)
            read.found.setdefault(name, {})[slot] = out, tier.fetch(place, out)
        self._coming |= dict.fromkeys(new, read)

    def _resting(self, name: str) -> Iterator[tuple[str, Place, Tier]]:
        """What has to be read for a parameter's step, and from where."""
        if self.tier is not None and not self.stays:
            state = self.optimizer.state.get(self.shards[name], {})
            for slot, place in self.places.get(name, {}).items():
                if state.get(slot) is place.rests:
                    yield slot, place, self.tier
        for part in sorted(self.far):
            assert self.store is not None
            full = _FULL[part] + name
            if full in self.store.places:
                yield full, self.store.places[full], self.store.tier(full)

    def _open(self, names: Sequence[str]) -> None:
        """Wait until the state of a chunk has come."""
        for name in names:
            if name in self._coming:
                for slot, (tensor, reading) in self._coming[name].found.get(name, {}).items():
                    reading.wait()
                    if "/" not in slot:
                        self.optimizer.state[self.shards[name]][slot] = tensor

    @contextmanager
    def _on_host(
        self, names: Sequence[str], gradients: Mapping[str, Tensor], factor: float
    ) -> Iterator[None]:
        """Weights and gradients of a chunk are the optimizer's on the host, then weights return."""
        mine = {name: self.shards[name] for name in names}
        homes = {name: shard.data for name, shard in mine.items()}
        forms = [(tuple(home.shape), home.dtype) for home in homes.values()]
        self._steps.begin([form for form in forms for _ in range(2)])
        for name, shard in mine.items():
            shard.grad = self._staged(name, "gradients", gradients[name])
            shard.data = self._staged(name, "params", shard.data)
            if "gradients" in self.far:
                shard.grad.mul_(factor)
        try:
            yield
            for name, home in homes.items():
                self._returned(name, home)
        finally:
            for name, shard in mine.items():
                shard.data, shard.grad = homes[name], None

    def _staged(self, name: str, part: str, tensor: Tensor) -> Tensor:
        """A tensor on the host: itself, what was read from disk, or a copy."""
        if part in self.far:
            found = self._read(name, part, tensor)
            if found.is_contiguous():  # fused kernels take no others
                return found.to(tensor.dtype)
            return self._steps.take(tuple(tensor.shape), tensor.dtype).copy_(found)
        if part in self.here and tensor.is_contiguous():
            return tensor
        copy = self._steps.take(tuple(tensor.shape), tensor.dtype)
        self.moved.put += tensor.nbytes
        return copy.copy_(tensor)

    def _read(self, name: str, part: str, rests: Tensor) -> Tensor:
        """What was read of a tensor that is what rests on disk, or a view of it."""
        whole, _ = self._coming[name].found[name][_FULL[part] + name]
        return whole.as_strided(rests.shape, rests.stride(), _offset(rests, whole))

    def _returned(self, name: str, home: Tensor) -> None:
        """Stepped weights go where they rest."""
        stepped = self.shards[name].data
        if "params" in self.far:
            assert self.store is not None
            whole, _ = self._coming[name].found[name][f"model/{name}"]
            part = self._read(name, "params", home)
            if part.data_ptr() != stepped.data_ptr():
                part.copy_(stepped)
            self.store.stash(f"model/{name}", whole)
            self._coming[name].writing.append(self.store.places[f"model/{name}"].last)
        elif stepped.data_ptr() != home.data_ptr():
            home.copy_(stepped)
            self.moved.fetched += stepped.nbytes

    def _stepped(self) -> None:
        groups = [g for g in self.optimizer.param_groups if self.fused and lets_fuse(g)]
        for group in groups:
            group["fused"] = True
        try:
            self.optimizer.step()
        finally:
            for group in groups:
                group["fused"] = None

    def _written(self) -> None:
        """Wait until all is in the tier."""
        self.flight.settle()
        for read in self._sets:
            read.free()
        if self.store is not None:
            self.store.settle()
        self._coming.clear()
        self._reads = cycle(self._sets)  # a step of one chunk takes room for one


def _offset(part: Tensor, whole: Tensor) -> int:
    """Where in `whole`, read anew, a part begins that is a view of what rests."""
    return int(whole.storage_offset()) + int(part.storage_offset())


@dataclass(slots=True)
class _Read:
    """A chunk's state on its way in, and back."""

    staging: Staging
    found: dict[str, dict[str, tuple[Tensor, Transfer]]] = field(default_factory=dict)
    writing: list[Transfer] = field(default_factory=list)

    def free(self) -> None:
        """Nothing uses the staging any more."""
        for writing in self.writing:
            writing.wait()
        self.writing.clear()
        self.found.clear()
