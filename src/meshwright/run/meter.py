"""What the executor holds between the instructions of a step, counted as it goes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from meshwright.program.instruction import Instruction

__all__ = ["Meter"]

_STATE = ("model/", "buffer/", "constant/", "next/", "shard/", "gathered/", "older/", "scale")
_SUMS = ("gradient/", "reduced/")
_ALL = ("Finish", "Update", "Commit")  # change more than they name


@dataclass(slots=True)
class Meter:
    """Bytes of the storages that values have, by kind: gradients, and what else a step makes.

    Attributes:
        gradients, activations: at most.
        most: bytes of both at once.
        state: what was there before, or is not here; it does not count.
        names: name of a value -> its storage.
        sizes, kinds, users: of each storage its bytes, what it counts as, how many names it has.
        alive: bytes by kind, now.
    """

    gradients: int = 0
    activations: int = 0
    most: int = 0
    state: set[int] = field(default_factory=set)
    names: dict[str, int] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    kinds: dict[int, str] = field(default_factory=dict)
    users: Counter[int] = field(default_factory=Counter)
    alive: Counter[str] = field(default_factory=Counter)

    def begin(self, values: Mapping[str, Tensor]) -> None:
        """A step is about to run on these."""
        self.state = {_storage(tensor) for tensor in values.values()}

    def take(self, instruction: Instruction, values: Mapping[str, Tensor]) -> None:
        """An instruction was followed; look at what it named."""
        if instruction.kind == "Stash" and instruction.offloads:  # it rests elsewhere now
            self.state |= {_storage(values[name]) for name in instruction.outputs}
        told = instruction.kind in _ALL
        known: Iterable[str] = (*self.names, *values) if told else instruction.outputs
        for name in (*known, *instruction.inputs):
            self._see(name, values.get(name))
        total = sum(self.alive.values())
        self.gradients = max(self.gradients, self.alive["gradient"])
        self.activations = max(self.activations, self.alive["activation"])
        self.most = max(self.most, total)

    def _see(self, name: str, tensor: Tensor | None) -> None:
        if name.startswith(_STATE):
            return
        storage = None if tensor is None else _storage(tensor)
        before = self.names.get(name)
        if storage != before:
            self._leave(name, before)
            if tensor is not None and storage is not None and storage not in self.state:
                self._enter(name, storage, tensor.untyped_storage().nbytes())
        if name.startswith(_SUMS) and self.kinds.get(storage or 0) == "activation":
            assert storage is not None
            self._becomes(storage, "gradient")

    def _leave(self, name: str, storage: int | None) -> None:
        if storage is None:
            return
        del self.names[name]
        self.users[storage] -= 1
        if not self.users[storage]:
            self.alive[self.kinds.pop(storage)] -= self.sizes.pop(storage)

    def _enter(self, name: str, storage: int, size: int) -> None:
        self.names[name] = storage
        self.users[storage] += 1
        if storage not in self.sizes:
            self.sizes[storage], self.kinds[storage] = size, "activation"
            self.alive["activation"] += size

    def _becomes(self, storage: int, kind: str) -> None:
        self.alive[self.kinds[storage]] -= self.sizes[storage]
        self.alive[kind] += self.sizes[storage]
        self.kinds[storage] = kind


def _storage(tensor: Tensor) -> int:
    """What tells storages that are there apart."""
    return tensor.untyped_storage().data_ptr()
