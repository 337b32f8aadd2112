"""The ladder: what is turned on rung by rung, ours and DeepSpeed's, and what a trial is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import models

DEPTH, CONTEXT, ROWS, VOCABULARY, RANKS, HEAD = 8, 128, 2, 512, 2, 32
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Rung:
    """One step of the ladder.

    Attributes:
        what: is turned on, for the reader.
        plan: ours.
        zero: DeepSpeed's `zero_optimization`.
        again: whether DeepSpeed's activations are computed again in the backward.
        each: bytes of a rank's own memory per parameter, to begin the search with.
        host: bytes beside it per parameter, of all ranks.
    """

    what: str
    plan: str
    zero: Mapping[str, Any]
    again: bool = False
    each: float = 16.0
    host: float = 0.0


_PROCESS = 320 << 20  # Python and torch

_HOST = {"device": "cpu"}
_DISK = {"device": "nvme", "nvme_path": "FOLDER"}
_BUCKET = 25 * 2**20 // 4  # elements: as large as ours, for by default one alone takes 2 GB
_THREE = {
    "stage": 3,
    "stage3_param_persistence_threshold": 0,
    "reduce_bucket_size": _BUCKET,
    "stage3_prefetch_bucket_size": _BUCKET,
    "stage3_max_live_parameters": 2 * _BUCKET,
    "sub_group_size": 2 * _BUCKET,
}

RUNGS = (
    Rung("none", "data=2", {"stage": 0}, each=19.0),
    Rung("ZeRO-3", "zero3", _THREE, each=13.0),
    Rung("+ remat", "zero3,remat=full", _THREE, again=True, each=12.0),
    Rung(
        "+ host offload",
        "zero3,remat=full,offload=host",
        {**_THREE, "offload_optimizer": _HOST, "offload_param": _HOST},
        again=True,
        each=3.3,
        host=16.5,
    ),
    Rung(
        "+ disk offload",
        "zero3,remat=full,offload=disk",
        {**_THREE, "offload_optimizer": _DISK, "offload_param": _DISK},
        again=True,
        each=3.3,
    ),
)


@dataclass(frozen=True, slots=True)
class Trial:
    """What one rank of a trial is told: plain data.

    Attributes:
        side: `ours` or `deepspeed`.
        rung: its place in `RUNGS`.
        width: of the GPT.
        memory: bytes of private memory that the process may have.
        folder: for whatever it writes.
        rank: of this process.
        steps: to run.
    """

    side: str
    rung: int
    width: int
    memory: int
    folder: str
    rank: int = 0
    steps: int = 3


def parameters(width: int) -> int:
    """Of the GPT of a width: of its blocks, embeddings and head."""
    block = 12 * width * width + 13 * width
    around = (2 * VOCABULARY + CONTEXT) * width + 2 * width + VOCABULARY
    return DEPTH * block + around


def shape_of(width: int) -> models.Shape:
    """Of the GPT of a width."""
    return models.Shape(width, width // HEAD, DEPTH, CONTEXT, VOCABULARY)


def tokens() -> list[tuple[Tensor, Tensor]]:
    """Global batches, each of tokens and targets [rows, context] int64."""
    found = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, VOCABULARY, (RANKS * ROWS, CONTEXT + 1), generator=generator)
        found.append((ids[:, :-1].contiguous(), ids[:, 1:].contiguous()))
    return found


def guessed(rung: Rung, memory: int, host: int) -> int:
    """A width to begin a search with, from bytes per parameter.

    Args:
        rung: of the ladder.
        memory: of one rank.
        host: beside it, of all ranks.
    """
    most = max(memory - _PROCESS, memory // 4) / rung.each
    if rung.host:
        most = min(most, host / rung.host)
    return int((most / (12 * DEPTH)) ** 0.5)
