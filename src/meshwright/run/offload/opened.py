"""The tiers of a rank, as its plan asks for them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from meshwright.plan.offload import Part
from meshwright.program.offload import MOVED
from meshwright.run.build import Build
from meshwright.run.offload.disk import Disk
from meshwright.run.offload.host import Host
from meshwright.run.offload.kept import CHUNK, Kept
from meshwright.run.offload.probe import fuses, steps_apart
from meshwright.run.offload.store import Store
from meshwright.run.offload.tier import Tier

__all__ = ["kept_of", "store_of"]

_KINDS: Mapping[Part, tuple[str, ...]] = {
    "params": ("model",),
    "gradients": ("gradient", "reduced"),
    "activations": ("away",),
    "optimizer": ("optimizer", "ema"),
}
"""How the names of a part's values begin."""


def store_of(build: Build, rank: int) -> Store | None:
    """Where the plan has values of a rank rest; None: all in the device's memory."""
    asked = build.plan.offloads
    opened: dict[str, Tier] = {
        kind: Host() if kind == "host" else Disk(build.offload, rank)
        for kind in sorted(set(asked.values()))
    }
    tiers = {name: opened[kind] for part, kind in asked.items() for name in _KINDS[part]}
    return Store(tiers) if tiers else None


def kept_of(
    build: Build,
    shards: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    store: Store | None,
) -> Kept | None:
    """How a rank's optimizer steps on the host, where anything of it rests there; None: nothing."""
    asked = build.plan.offloads
    if store is None or not asked.keys() & {"optimizer", "gradients", "params"}:
        return None
    dtype = next((shard.dtype for shard in shards.values()), torch.float32)
    return Kept(
        store.tiers.get("optimizer"),
        shards,
        optimizer,
        stays=asked.get("optimizer") != "disk",
        fused=dtype.is_floating_point and fuses(build.recipe, dtype),
        chunk=CHUNK if steps_apart(build.recipe) else None,
        here=frozenset(part for part in MOVED if asked.get(part) == "host"),
        store=store,
        far=frozenset(part for part in MOVED if asked.get(part) == "disk"),
    )
