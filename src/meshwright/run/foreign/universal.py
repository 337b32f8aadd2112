"""DeepSpeed's universal checkpoints: one folder per parameter, read and written.

latest_universal                              the tag's name
TAG/mp_rank_00_model_states.pt                buffers, counts, shapes
TAG/zero/NAME/fp32.pt exp_avg.pt ... step.pt  {"param": tensor}, or a flat one (ZeRO-3's)
TAG/zero/optimizer_state.pt                   the optimizer's groups
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from meshwright.errors import StorageError
from meshwright.run.checkpoint.durable import read_small
from meshwright.run.checkpoint.header import dtype_name
from meshwright.run.checkpoint.region import Region, whole
from meshwright.run.foreign.mapped import Lies, check, mapped
from meshwright.run.foreign.source import Item, Source, shown
from meshwright.run.foreign.symbols import Made
from meshwright.run.foreign.torchfile import open_torch

__all__ = ["LATEST", "STATES", "WEIGHTS", "ZERO", "is_universal", "open_universal"]

LATEST: Final = "latest_universal"
ZERO: Final = "zero"
WEIGHTS: Final = "fp32"
STATES: Final = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
_SLOT: Final = re.compile(r"([A-Za-z0-9_]{1,64})\.pt", re.ASCII)
_TAG: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", re.ASCII)


@dataclass(frozen=True, slots=True)
class _Number:
    """A count that is no tensor, as a step may be; read as torch's Adam keeps it."""

    value: float


_Value = Lies | _Number


def is_universal(path: Path) -> bool:
    """Whether a folder is one, or that of a tag in one."""
    return path.is_dir() and ((path / LATEST).is_file() or (path / ZERO).is_dir())


def open_universal(path: Path) -> Source:
    """A folder that `ds_to_universal.py` wrote, or the tag's folder in it.

    Raises:
        StorageError: it is none, or a file of it is missing or damaged.
    """
    tag = _tag(path)
    states = _states(tag)
    shapes = _shapes(states.get("param_shapes"))
    found: dict[str, _Value] = {}
    for own in _parameters(tag / ZERO):
        for slot, value in _of(tag / ZERO / own, own, shapes):
            name = f"model/{own}" if slot == WEIGHTS else f"optimizer/{slot}/{own}"
            found[name] = value
    if not found:
        raise StorageError(f"{tag / ZERO} holds no folder of a parameter")
    _require_weights(tag, found)
    found |= _steps(tag / ZERO, found)
    for name, value in _buffers(states).items():  # stages 1 and 2 give buffers a folder too
        found.pop(f"model/{name.partition('/')[2]}", None)
        found[name] = value
    items = {name: _item(value) for name, value in found.items()}

    def boxes(name: str) -> Iterator[tuple[Region, Tensor]]:
        value = found[name]
        tensor = torch.tensor(value.value) if isinstance(value, _Number) else mapped(value)
        yield whole(items[name].shape), tensor

    def checked() -> str:
        lies = [(n, v) for n, v in found.items() if isinstance(v, Lies) and v.elements]
        sums = [check(value, name) for name, value in lies]
        return "crc32" if sums and all(sums) else "nothing"

    step = states.get("global_steps")
    steps = step if type(step) is int and 0 <= step < 2**62 else None
    return Source("universal", path, items, boxes, checked, steps)


def _tag(path: Path) -> Path:
    if (path / ZERO).is_dir():
        return _own(path)
    text = read_small(path, LATEST, 256).decode("ascii", "replace").strip()
    if not _TAG.fullmatch(text):
        raise StorageError(f"{path / LATEST} names {shown(text)!r}, no folder beside it")
    tag = path / text
    if tag.is_symlink() or not (tag / ZERO).is_dir():
        raise StorageError(f"{path / LATEST} names {shown(text)!r}, which holds no folder {ZERO}")
    return _own(tag)


def _own(tag: Path) -> Path:
    if (tag / ZERO).is_symlink():
        raise StorageError(f"{tag / ZERO} is a symbolic link; a checkpoint holds its own files")
    return tag


def _states(tag: Path) -> Mapping[str, Any]:
    """What the model's states say; the files of other ranks say the same."""
    for name in STATES:
        if (tag / name).exists():
            found = open_torch(tag, name)
            return found if isinstance(found, dict) else {}
    return {}


def _shapes(told: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by name: a dict, or a list of them; sizes are tuples here."""
    groups = told if isinstance(told, list) else [told]
    return {
        name: size
        for group in groups
        if isinstance(group, dict)
        for name, size in group.items()
        if isinstance(name, str) and isinstance(size, tuple) and all(type(n) is int for n in size)
    }


def _parameters(folder: Path) -> list[str]:
    """The parameters that have a folder."""
    names = []
    for entry in sorted(folder.iterdir()):
        if entry.is_symlink():
            raise StorageError(f"{entry} is a symbolic link; a checkpoint holds its own files")
        if entry.is_dir():
            if not entry.name.isprintable():
                raise StorageError(f"{folder}: the name {shown(entry.name)!r} cannot be printed")
            names.append(entry.name)
    return names


def _of(
    folder: Path, own: str, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, _Value]]:
    for file in sorted(folder.iterdir()):
        match = _SLOT.fullmatch(file.name)
        if match is None:
            raise StorageError(f"{folder} holds {shown(file.name)!r}, which is no state's file")
        value = _value(folder, file.name)
        if isinstance(value, Lies):
            value = _shaped(value, own, match[1], shapes)
        yield match[1], value


def _value(folder: Path, name: str) -> _Value:
    tree = open_torch(folder, name)
    value = tree.get("param") if isinstance(tree, dict) else tree
    if isinstance(value, Lies):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _Number(float(value))
    what = str(value.maker) if isinstance(value, Made) else type(value).__name__
    raise StorageError(f"{folder / name} holds {shown(what)}, expected a tensor under 'param'")


def _shaped(value: Lies, own: str, slot: str, shapes: Mapping[str, tuple[int, ...]]) -> Lies:
    """ZeRO-3's tensors are flat; the model's states tell their shapes."""
    shape = shapes.get(own)
    if shape is None or slot == "step" or value.shape == shape or len(value.shape) != 1:
        return value
    if math.prod(shape) != value.shape[0] or value.stride != (1,):
        raise StorageError(
            f"{own}/{slot}.pt holds {value.shape[0]:,} elements, its shape is told as {list(shape)}"
        )
    stride = tuple(torch.empty(shape, device="meta").stride())
    return replace(value, shape=shape, stride=stride)


def _require_weights(tag: Path, found: Mapping[str, _Value]) -> None:
    """Every parameter has weights, and states of one parameter have one shape."""
    for name, value in found.items():
        kind, _, rest = name.partition("/")
        slot, _, own = rest.partition("/")
        if kind != "optimizer" or not isinstance(value, Lies):
            continue
        weights = found.get(f"model/{own}")
        if not isinstance(weights, Lies):
            raise StorageError(f"{tag / ZERO / own} holds no {WEIGHTS}.pt")
        if value.shape not in ((), (1,), weights.shape) and slot != "step":
            raise StorageError(
                f"{tag / ZERO / own}: {slot}.pt has shape {list(value.shape)}, {WEIGHTS}.pt "
                f"{list(weights.shape)}"
            )


def _steps(zero: Path, found: Mapping[str, _Value]) -> dict[str, _Value]:
    """ZeRO-3 tells the step once, for all parameters that have a state."""
    names = {name.split("/", 2)[2] for name in found if name.startswith("optimizer/")}
    file = "optimizer_state.pt"
    if not names or f"optimizer/step/{min(names)}" in found or not (zero / file).exists():
        return {}
    match open_torch(zero, file):
        case {"optimizer_state_dict": {"state": {0: {"step": Lies() | int() | float() as step}}}}:
            value = step if isinstance(step, Lies) else _Number(float(step))
            return {f"optimizer/step/{name}": value for name in names}
    return {}


def _buffers(states: Mapping[str, Any]) -> dict[str, _Value]:
    module, names = states.get("module"), states.get("buffer_names")
    if not isinstance(module, dict) or not isinstance(names, list):
        return {}
    return {
        f"buffer/{name}": module[name]
        for name in names
        if isinstance(name, str) and isinstance(module.get(name), Lies)
    }


def _item(value: _Value) -> Item:
    if isinstance(value, _Number):
        return Item("float32", ())
    return Item(dtype_name(value.dtype), value.shape, value.file)
