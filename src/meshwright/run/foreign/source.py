"""What a checkpoint or weights of any format hold, under Meshwright's names; read box by box.

model/NAME              a parameter (or, of formats that do not tell them apart, a buffer)
buffer/NAME             a buffer
optimizer/SLOT/NAME     what an optimizer keeps for a parameter
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meshwright.errors import StorageError
from meshwright.run.checkpoint.header import dtype_of
from meshwright.run.checkpoint.manifest import ITEM_BYTES
from meshwright.run.checkpoint.region import Region, overlap, whole

__all__ = ["Item", "Source", "bare", "kind", "require_tiled", "shown", "tensor_of"]

Boxes = Callable[[str], Iterator[tuple[Region, Tensor]]]


@dataclass(frozen=True, slots=True)
class Item:
    """A tensor: its dtype, global shape, the file with its first element, in how many boxes."""

    dtype: str
    shape: tuple[int, ...]
    file: str = ""
    boxes: int = 1

    @property
    def bytes(self) -> int:
        """Of all its elements."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """An opened checkpoint or weights; values are read when asked for.

    Attributes:
        format: `meshwright`, `safetensors`, `dcp`, `universal` or `torch`.
        path: of the folder or file.
        items: what it holds, by global name.
        boxes: the boxes that tile a tensor, each mapped or read when its turn comes.
        check: compares all of it with whatever digests there are; says what was compared.
        step: how many had been done, where it is told.
        meta: what Meshwright's own checkpoint says beside tensors, where that is kept.
        notes: what the user should know.
    """

    format: str
    path: Path
    items: Mapping[str, Item]
    boxes: Boxes
    check: Callable[[], str]
    step: int | None = None
    meta: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()

    @property
    def tied(self) -> Mapping[str, str]:
        """Other names of parameters."""
        found: Mapping[str, str] = (self.meta or {}).get("tied", {})
        return found

    @property
    def weights(self) -> dict[str, Item]:
        """What a model's state dict has: weights and the buffers that it keeps."""
        gone = {f"buffer/{name}" for name in (self.meta or {}).get("transient", [])}
        return {n: item for n, item in self.of("model", "buffer").items() if n not in gone}

    def of(self, *kinds: str) -> dict[str, Item]:
        """The items of some kinds, by global name."""
        return {name: item for name, item in self.items.items() if kind(name) in kinds}


def kind(name: str) -> str:
    """`model`, `buffer`, `optimizer`, of a global name."""
    return name.partition("/")[0]


def bare(name: str) -> str:
    """The model's own name in a global one."""
    head, _, rest = name.partition("/")
    return rest.partition("/")[2] if head == "optimizer" else rest


def tensor_of(source: Source, name: str) -> Tensor:
    """A whole tensor; mapped from its file where it lies there in one piece."""
    item = source.items[name]
    boxes = source.boxes(name)
    first = next(boxes, None)
    if first is not None and first[0].shape == item.shape:
        return first[1]
    target = torch.empty(item.shape, dtype=dtype_of(item.dtype))
    for region, tensor in [first] if first else []:
        target[region.slices((0,) * target.dim())] = tensor
    for region, tensor in boxes:
        target[region.slices((0,) * target.dim())] = tensor
    return target


def require_tiled(name: str, shape: tuple[int, ...], regions: Iterable[Region]) -> None:
    """Refuse boxes that overlap, lie outside or leave a hole.

    Raises:
        StorageError: names the tensor and the boxes.
    """
    boxes = [region for region in regions if region.volume]
    for region in boxes:
        if not region.inside(shape):
            raise StorageError(
                f"{shown(name)}, shape {list(shape)}: the chunk at {list(region.start)} of shape "
                f"{list(region.shape)} lies outside"
            )
    try:
        pair = overlap(boxes) if boxes else None
    except ValueError as error:
        raise StorageError(f"{shown(name)}: {error}") from None
    if pair is not None:
        one, two = ([list(r.start), list(r.shape)] for r in pair)
        raise StorageError(f"{shown(name)}: the chunks {one} and {two} (start, shape) overlap")
    held, size = sum(region.volume for region in boxes), whole(shape).volume
    if held != size:
        raise StorageError(
            f"{shown(name)}, shape {list(shape)}: its chunks hold {held:,} of {size:,} elements"
        )


def shown(name: str) -> str:
    """A stranger's text, fit for a terminal: escaped, and short."""
    text = ascii(name)[1:-1]
    return text if len(text) <= 100 else text[:97] + "..."
