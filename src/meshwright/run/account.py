"""What a rank's memory goes to while it runs, in the parts of its bill."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from meshwright.run.meter import Meter
from meshwright.run.observe.resident import forget_peak, give_back, resident
from meshwright.run.offload.disk import Disk
from meshwright.run.session import Session
from meshwright.run.worker import Worker

__all__ = ["Account", "away_of", "state_of"]

_FIRST, _EVERY = 4, 50


@dataclass(slots=True)
class Account:
    """Kept by every rank from its first step on.

    Attributes:
        session: whose.
        process: bytes of the process beside tensors, just before its first step.
        before: the most that was resident until then: imports, tracing, initial weights.
        peak: the most that was resident in a step.
        saved: what copies of the state took when that was read.
        meter: counts what the first two steps hold.
    """

    session: Session
    process: int = 0
    before: int = 0
    peak: int = 0
    saved: int = 0
    meter: Meter = field(default_factory=Meter)
    _steps: int = 0
    _watching: bool = False

    def ready(self) -> None:
        """All is compiled; nothing has run."""
        found = resident()
        if found is not None:
            self.before = found.peak
        give_back()
        found = resident()
        if found is not None:
            held = sum(state_of(self.session.worker).values())
            self.process = max(0, found.private - held)

    def begins(self) -> None:
        """A step is about to run."""
        self._watching = self._steps < _FIRST or not self._steps % _EVERY
        if self._watching and forget_peak() and self._steps < 2:
            self.session.worker.meter = self.meter

    def ended(self) -> None:
        """A step has run."""
        self.session.worker.meter = None
        found = resident() if self._watching else None
        if found is not None and found.peak >= self.peak:
            self.peak, self.saved = found.peak, self.session.saver.copies
        if not self._steps:  # the optimizer's state lies where activations were: begin anew
            give_back()
        self._steps += 1

    def told(self) -> dict[str, Any]:
        """As run.json has it; `rest` is working memory and what malloc holds between blocks."""
        worker, found = self.session.worker, resident()
        far = away_of(worker)
        host = far.get("host", 0)
        shared = 0 if found is None else found.shared
        parts = state_of(worker) | {
            "gradients": self.meter.gradients,
            "saved activations": self.meter.activations,
            "communication buffers": max(0, shared - host),
        }
        if self.saved:
            parts["copies for checkpoints"] = self.saved
        rest = max(0, self.peak - self.process - host - sum(parts.values()))
        told = {"rank": worker.rank, "parts": parts, "process": self.process, "rest": rest}
        return told | {"away": far, "peak": self.peak, "before": self.before}


def state_of(worker: Worker) -> dict[str, int]:
    """Bytes of what a rank holds between steps, by part; each storage counts once."""
    state, seen = worker.state, set[int]()
    kept, store, optimizer = state.kept, state.store, state.optimizer.state.values()
    stays = kept is None or kept.tier is None

    def of(*prefixes: str) -> Iterable[Tensor]:
        return (t for name, t in state.values.items() if name.startswith(prefixes))

    def held(tensors: Iterable[Tensor]) -> int:
        found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        new = {key: size for key, size in found.items() if key not in seen}
        seen.update(new)
        return sum(new.values())

    here = store is None or "model" not in store.tiers
    found = {
        "weights": held(of("model/")) if here else 0,
        "optimizer": held(
            t for slots in optimizer for t in slots.values() if isinstance(t, Tensor) and t.dim()
        )
        if stays
        else 0,
        "buffers": held(of("buffer/", "constant/")),
    }
    if here:
        found["optimizer"] += held(shard.data for shard in state.shards.values())
    if older := held(of("older/")):
        found["older weights"] = older
    if state.average is not None and (store is None or "ema" not in store.tiers):
        found["average"] = held(state.average.tensors.values())
    return found


def away_of(worker: Worker) -> dict[str, int]:
    """Bytes that a rank keeps outside its device's memory, by tier."""
    kept, store = worker.state.kept, worker.state.store
    if store is None:
        return {}
    tiers = {id(tier): tier for tier in store.tiers.values()}
    passes = kept is not None and kept.here != {"gradients", "params"}  # else nothing is copied
    found = {"host": kept.passing if kept is not None and passes else 0, "disk": 0}
    for tier in tiers.values():
        found["disk" if isinstance(tier, Disk) else "host"] += tier.bytes
        found["host"] += tier.passing if isinstance(tier, Disk) else 0
    return found
