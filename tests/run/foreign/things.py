"""Tensors of every kind that formats stumble over, and what is the same to the bit."""

from __future__ import annotations

import random
import struct
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from meshwright.errors import StorageError
from meshwright.run.checkpoint.region import whole
from meshwright.run.foreign.source import Item, Source, tensor_of

_BASE = torch.randn(12, 8, generator=torch.Generator().manual_seed(3))

WEIGHTS = {
    "wte.weight": _BASE,
    "blocks.0.w": torch.randn(5, 3, dtype=torch.float64),
    "blocks.1.w": torch.randn(5, 3).bfloat16(),
    "half": torch.randn(7).half(),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 4),
    "none.left": torch.empty(3, 0, 2, dtype=torch.int64),
    "transposed": _BASE[:4].t(),
    "strided": _BASE[::2, ::3],
    "numbers": torch.arange(-3, 4),
    "bytes": torch.arange(9, dtype=torch.uint8),
    "flags": torch.tensor([True, False, True]),
    "complex": torch.randn(3, dtype=torch.complex64),
    "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
    "short": torch.ones(3, dtype=torch.uint16),
    "eight": torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn),
    "odd name é\u00a7": torch.ones(2),
}
BUFFERS = {"bn.mean": torch.randn(4), "bn.count": torch.tensor(7)}
STATE = {
    f"{slot}/{name}": value
    for name in ("wte.weight", "blocks.1.w", "scalar", "empty")
    for slot, value in (
        ("exp_avg", torch.randn(WEIGHTS[name].shape)),
        ("step", torch.tensor(3.0)),
    )
}
TIED = {"head.weight": "wte.weight"}


def entries() -> dict[str, Tensor]:
    """All of them, by global name."""
    return {
        **{f"model/{name}": value for name, value in WEIGHTS.items()},
        **{f"buffer/{name}": value for name, value in BUFFERS.items()},
        **{f"optimizer/{name}": value for name, value in STATE.items()},
    }


def meta() -> dict[str, object]:
    """What a checkpoint of a run would say of them."""
    names = [name for name in WEIGHTS if f"step/{name}" in STATE]
    return {
        "plan": "zero3,data=2",
        "batch_size": 8,
        "seed": 1,
        "optimizer": {
            "class": "AdamW",
            "groups": [{"parameters": names, "settings": {"lr": 0.1, "amsgrad": False}}],
            "state": {},
        },
        "scheduler": None,
        "data": None,
        "extra": {"seen": [1, 2.5, None]},
        "tied": dict(TIED),
        "transient": [],
    }


def source(tensors: dict[str, Tensor] | None = None, **changes: object) -> Source:
    """Tensors in memory as a source."""
    held = entries() if tensors is None else tensors
    items = {
        name: Item(str(value.dtype).removeprefix("torch."), tuple(value.shape))
        for name, value in held.items()
    }

    def boxes(name):
        yield whole(tuple(held[name].shape)), held[name]

    made = Source("memory", Path("nowhere"), items, boxes, lambda: "nothing", 20, meta())
    return replace(made, **changes)


def bits(tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    """Dtype, shape and bytes: NaNs and signs of zeros count."""
    dense = tensor.detach().contiguous()
    data = dense.reshape(-1).view(torch.uint8).numpy().tobytes() if dense.numel() else b""
    return str(dense.dtype), tuple(dense.shape), data


def held(found: Source) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Everything in a source, to the bit."""
    return {name: bits(tensor_of(found, name)) for name in found.items}


def wanted(tensors: dict[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The same of tensors in memory."""
    return {name: bits(tensor) for name, tensor in tensors.items()}


def damages(data: bytes, count: int, seed: int = 0):
    """`data` with a bit flipped, or cut short: what disks and networks do."""
    draw = random.Random(seed)
    for _ in range(count):
        if draw.random() < 0.2:
            yield data[: draw.randrange(len(data))]
        else:
            changed = bytearray(data)
            changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            yield bytes(changed)


def only_storage_errors(act):
    """`act()`, which may fail by StorageError and by nothing else; None where it did."""
    with suppress(StorageError):
        return act()
    return None


def zip_entry(data: bytes, name: bytes) -> int:
    """Where a member's entry in an archive's central directory begins."""
    place = data.index(b"PK\x01\x02")
    while True:
        length, extra, comment = struct.unpack("<HHH", data[place + 28 : place + 34])
        if data[place + 46 : place + 46 + length] == name:
            return place
        place += 46 + length + extra + comment
