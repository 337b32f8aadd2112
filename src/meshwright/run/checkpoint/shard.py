"""One rank's file of a checkpoint: safetensors, written with a digest per chunk.

The header is written here rather than by safetensors, so that digests are of what was in memory
(a disk that changes a byte is found out), and no second copy of the shard is ever made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from meshwright.run.checkpoint.digest import chunks_of, preferred, usable
from meshwright.run.checkpoint.durable import write_file
from meshwright.run.checkpoint.header import made
from meshwright.run.checkpoint.manifest import File

__all__ = ["bytes_of", "key_of", "write_shard"]


def key_of(name: str, start: tuple[int, ...]) -> str:
    """A piece's name in its file: `model/head@4,0` is the piece of model/head that starts there."""
    return f"{name}@{','.join(map(str, start))}"


def write_shard(
    path: Path, tensors: Mapping[str, Tensor]
) -> tuple[File, dict[str, tuple[str, ...]]]:
    """Write tensors to a new safetensors file; its claim, and the digests of each one's chunks.

    Besides the tensors at most one contiguous copy of one of them is held in host memory.

    Raises:
        OSError: the disk refuses.
    """
    # Widest first keeps every tensor aligned to its items.
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    header = made({key: tensors[key] for key in order})
    kind = preferred()
    digest = usable(kind)
    found: dict[str, tuple[str, ...]] = {}

    def chunks() -> Iterator[memoryview | bytes]:
        yield header
        for key in order:
            data = bytes_of(_dense(tensors[key]))
            told = []
            for begin, end in chunks_of(len(data)):
                chunk = data[begin:end]
                told.append(digest(chunk))  # now, while the write has it in the cache too
                yield chunk
            found[key] = tuple(told)
            del data

    length = write_file(path, chunks())
    return File(length, digest(header), kind), found


def _dense(tensor: Tensor) -> Tensor:
    """The tensor in host memory, its elements in row-major order."""
    return tensor.detach().cpu().contiguous().resolve_conj().resolve_neg()


def bytes_of(dense: Tensor) -> memoryview:
    """The memory of a contiguous tensor of the host."""
    if not dense.numel():
        return memoryview(bytearray())
    return dense.detach().reshape(-1).view(torch.uint8).numpy().data
