"""State dicts as JSON and back: checkpoints hold no pickle, so here is all that they can hold."""

from __future__ import annotations

import base64
import math
from typing import Any

import torch
from torch import Tensor

from meshwright.errors import StorageError, UserCodeError

__all__ = ["from_plain", "to_plain"]

_TAG = "__meshwright__"


def to_plain(value: Any, where: str = "state_dict()") -> Any:
    """`value` as JSON can hold it; tensors, bytes, tuples and odd dict keys are tagged.

    Args:
        value: None, bools, numbers, texts, bytes, CPU tensors, and lists, tuples and dicts of them.
        where: how to call `value` in an error.

    Raises:
        UserCodeError: a value of another kind.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {_TAG: "float", "value": repr(value)}
        case bytes():
            return {_TAG: "bytes", "value": base64.b64encode(value).decode()}
        case Tensor():
            return _tensor_to_plain(value)
        case list() | tuple():
            items = [to_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
            return items if isinstance(value, list) else {_TAG: "tuple", "value": items}
        case dict():
            return _dict_to_plain(value, where)
    raise UserCodeError(
        f"{where} is of type {type(value).__name__}, which a checkpoint cannot hold, since it has "
        "no pickle; keep numbers, texts, bytes, tensors, and lists, tuples and dicts of them"
    )


def from_plain(value: Any) -> Any:
    """What `to_plain` was given.

    Raises:
        StorageError: a tag that this version does not know.
    """
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    if _TAG not in value:
        return {key: from_plain(item) for key, item in value.items()}
    return _untagged(value)


def _untagged(entry: dict[str, Any]) -> Any:
    match entry:
        case {"value": str(text)} if entry[_TAG] == "float":
            return float(text)
        case {"value": str(text)} if entry[_TAG] == "bytes":
            return base64.b64decode(text)
        case {"value": list(items)} if entry[_TAG] == "tuple":
            return tuple(from_plain(item) for item in items)
        case {"value": list(items)} if entry[_TAG] == "dict":
            return {from_plain(key): from_plain(item) for key, item in items}
        case {"dtype": str(dtype), "shape": list(shape), "value": str(text)}:
            return _tensor_from_plain(dtype, shape, text)
    raise StorageError(
        f"a saved state holds an entry tagged {entry[_TAG]!r}, which this version cannot read; "
        "resume with the version that wrote it"
    )


_DTYPES = {
    str(dtype): dtype
    for dtype in (
        torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16,
        torch.bfloat16, torch.float32, torch.float64, torch.uint16, torch.uint32, torch.uint64,
    )
}  # fmt: skip


def _dict_to_plain(value: dict[Any, Any], where: str) -> Any:
    if all(isinstance(key, str) for key in value) and _TAG not in value:
        return {key: to_plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    pairs = [
        [to_plain(key, f"a key of {where}"), to_plain(item, f"{where}[{key!r}]")]
        for key, item in value.items()
    ]
    return {_TAG: "dict", "value": pairs}


def _tensor_to_plain(value: Tensor) -> dict[str, Any]:
    flat = value.detach().cpu().contiguous().flatten().view(torch.uint8)
    return {
        _TAG: "tensor",
        "dtype": str(value.dtype),
        "shape": list(value.shape),
        "value": base64.b64encode(flat.numpy().tobytes()).decode(),
    }


def _tensor_from_plain(dtype: str, shape: list[int], text: str) -> Tensor:
    if dtype not in _DTYPES:
        raise StorageError(f"a saved state holds a tensor of dtype {dtype!r}, which is not known")
    data = bytearray(base64.b64decode(text))
    flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return flat.view(_DTYPES[dtype]).reshape(shape)
