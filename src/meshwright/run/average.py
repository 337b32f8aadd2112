"""The exponential moving average of the weights, over the shards that the optimizer steps.

As `torch.optim.swa_utils.AveragedModel` with `get_ema_multi_avg_fn(decay)`: after the first step it
is the weights, after each further one `decay` of itself and `1 - decay` of them.

Where the optimizer's state is offloaded the average is too. What rests on disk, weights or average,
is read a parameter ahead and written behind; what rests in memory is changed where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from meshwright.run.offload.store import Store

__all__ = ["Average", "averaged_dtype"]


def averaged_dtype(dtype: torch.dtype) -> torch.dtype:
    """That of an average of weights kept in `dtype`: steps of `1 - decay` vanish in 16 bits."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(slots=True)
class Average:
    """A rank's part of the average.

    Attributes:
        decay: how much of it stays at a step.
        tensors: by name of the parameter, laid out as the optimizer holds it.
        steps: that were taken in; before the first it is the weights that training began with.
        store: of what is offloaded of it, and of the weights.
    """

    decay: float
    tensors: dict[str, Tensor]
    steps: int = 0
    store: Store | None = None

    @classmethod
    def of(
        cls, decay: float, shards: Mapping[str, nn.Parameter], store: Store | None = None
    ) -> Average:
        """An average that begins with these; what is not trained has none."""
        found = {n: _copy(p.data) for n, p in shards.items() if p.requires_grad}
        if store is not None:
            found = {name: store.taken(_named(name), each) for name, each in found.items()}
        return cls(decay, found, 0, store)

    def begin(self, shards: Mapping[str, nn.Parameter]) -> None:
        """Begin anew with these."""
        for name, tensor in self.tensors.items():
            tensor.copy_(shards[name].data)
        self.written()
        self.steps = 0

    def take(self, shards: Mapping[str, nn.Parameter]) -> None:
        """Take the weights in after a step that was applied."""
        weight = 1.0 - self.decay if self.steps else 1.0
        far = self._far()
        _lerp(((t, shards[n].data) for n, t in self.tensors.items() if n not in far), weight)
        for name, tensor, now in self._read(far, shards):
            _lerp([(tensor, now)], weight)
            if self.store is not None and _named(name) in self.store.far:
                self.store.stash(_named(name), tensor)
        if self.store is not None:
            self.store.settle()
        self.steps += 1

    def written(self) -> None:
        """The tensors were written to: what rests on disk gets new digests."""
        if self.store is not None:
            self.store.refresh(map(_named, self.tensors))

    def _far(self) -> dict[str, None]:
        """Parameters of which the weights or the average rest on disk, in order."""
        far = frozenset[str]() if self.store is None else self.store.far
        return {n: None for n in self.tensors if not far.isdisjoint((_named(n), f"model/{n}"))}

    def _read(
        self, names: Iterable[str], shards: Mapping[str, nn.Parameter]
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(Name, average, weights) of each, all in memory, the next one's on their way."""
        begun = (
            partial(self._arrived, name, shards[name].data, self._begun(name)) for name in names
        )
        before = next(begun, None)
        while before is not None:
            after = next(begun, None)
            yield before()
            before = after

    def _begun(self, name: str) -> dict[str, _Coming]:
        """Reads of what of a parameter rests on disk."""
        assert self.store is not None
        wanted = self.store.far.intersection((_named(name), f"model/{name}"))
        return {full: self.store.load(full) for full in wanted}

    def _arrived(
        self, name: str, now: Tensor, coming: Mapping[str, _Coming]
    ) -> tuple[str, Tensor, Tensor]:
        own, whole = coming.get(_named(name)), coming.get(f"model/{name}")
        if whole is not None:  # of which the shard is a part
            now = whole().as_strided(now.shape, now.stride(), now.storage_offset())
        return name, self.tensors[name] if own is None else own(), now


_Coming = Callable[[], Tensor]


def _named(name: str) -> str:
    """What the average of a parameter is called in checkpoints, and in the store."""
    return f"ema/{name}"


def _lerp(pairs: Iterable[tuple[Tensor, Tensor]], weight: float) -> None:
    """Each average goes towards the weights by `weight`: all the way at 1."""
    alike: list[tuple[Tensor, Tensor]] = []
    for tensor, now in pairs:
        if tensor.dtype == now.dtype:
            alike.append((tensor, now))
        else:
            tensor.lerp_(now.to(tensor.dtype), weight)
    if alike:
        torch._foreach_lerp_([t for t, _ in alike], [now for _, now in alike], weight)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.to(averaged_dtype(tensor.dtype), copy=True)
