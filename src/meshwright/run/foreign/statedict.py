"""A state dict that `torch.save` wrote: read without unpickling, written for `torch.load`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from meshwright.errors import StorageError
from meshwright.run.checkpoint.header import dtype_name
from meshwright.run.checkpoint.region import Region, whole
from meshwright.run.foreign.mapped import check, mapped
from meshwright.run.foreign.source import Item, Source, bare, shown
from meshwright.run.foreign.symbols import Global, Made
from meshwright.run.foreign.torchfile import listed, open_torch
from meshwright.run.foreign.torchwrite import rebuilt, stored, write_torch

__all__ = ["open_statedict", "write_statedict"]

_PLAIN = frozenset({"torch.device", "torch.Size", "collections.OrderedDict", "builtins.set"})


def open_statedict(path: Path, *, skip: bool = False) -> Source:
    """The tensors of a file, by the dotted path of keys that lead to them.

    Args:
        path: of the file.
        skip: leave out objects that only a call could make, rather than refuse the file.

    Raises:
        StorageError: it is none, is damaged, or holds such objects.
    """
    tensors, calls = listed(open_torch(path.parent, path.name))
    calls = {name: maker for name, maker in calls.items() if maker not in _PLAIN}
    if calls and not skip:
        name, maker = next(iter(calls.items()))
        what = f"{shown(name)!r} is" if name else "it is"
        raise StorageError(
            f"{path}: {what} an object that only calling {shown(maker)} would make, and nothing of "
            f"a pickle is called ({len(calls)} such); --skip-objects leaves them out, or save "
            "model.state_dict() alone"
        )
    if not tensors:
        raise StorageError(f"{path} holds no tensors; name the file of a state dict")
    items = {
        f"model/{own}": Item(dtype_name(lies.dtype), lies.shape, path.name)
        for own, lies in tensors.items()
    }
    for own in tensors:
        if not own.isprintable() or not own:
            raise StorageError(f"{path}: the name {shown(own)!r} must be printable characters")

    def boxes(name: str) -> Iterator[tuple[Region, Tensor]]:
        yield whole(items[name].shape), mapped(tensors[bare(name)])

    def checked() -> str:
        sums = [check(lies, own) for own, lies in tensors.items() if lies.elements]
        return "crc32" if sums and all(sums) else "nothing"

    left = [f"{len(calls)} objects are left out ({shown(next(iter(calls)))}, ...)"] if calls else []
    return Source("torch", path, items, boxes, checked, notes=tuple(left))


def write_statedict(source: Source, folder: Path) -> dict[str, str]:
    """Write `model.pt`, weights and buffers by name; tied names share a storage."""
    names = source.weights
    keys = {name: str(number) for number, name in enumerate(names)}
    pairs: dict[str, Any] = {bare(n): rebuilt(keys[n], source.items[n]) for n in names}
    for other, name in source.tied.items():
        if name in pairs:
            pairs[other] = pairs[name]
    tree = Made(Global("collections", "OrderedDict"), pairs=pairs)
    write_torch(folder / "model.pt", tree, {keys[n]: stored(source, n) for n in names})
    return dict.fromkeys(names, "model.pt")
