"""What a checkpoint says beside tensors: JSON, and nothing that JSON would change."""

from __future__ import annotations

from typing import Any

from meshwright.errors import StorageError

__all__ = ["check_meta"]

_NESTING = 32


def check_meta(meta: Any) -> None:
    """Refuse what JSON would not give back as it was.

    Raises:
        StorageError: names the path and the type of the value that cannot be kept.
    """
    if not isinstance(meta, dict):
        raise StorageError(f"meta must be a JSON object, not a {type(meta).__name__}")
    stack: list[tuple[Any, tuple[Any, ...]]] = [(meta, ())]
    while stack:
        value, path = stack.pop()
        if len(path) >= _NESTING:
            raise StorageError(f"{_path(path)} is nested more than {_NESTING} deep")
        if isinstance(value, dict):
            _check_keys(value, path)
            stack += [(item, (*path, key)) for key, item in value.items()]
        elif isinstance(value, list | tuple):
            stack += [(item, (*path, index)) for index, item in enumerate(value)]
        elif not (value is None or isinstance(value, str | int | float)):
            raise StorageError(
                f"{_path(path)} is a {type(value).__name__}; a checkpoint keeps JSON: "
                "dict, list, str, int, float, bool, None"
            )


def _check_keys(tree: dict[Any, Any], path: tuple[Any, ...]) -> None:
    for key in tree:
        if not isinstance(key, str):
            raise StorageError(
                f"{_path(path)} has the key {key!r}, a {type(key).__name__}; keys must be strings"
            )


def _path(path: tuple[Any, ...]) -> str:
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return "meta" + ascii("".join(parts))[1:-1][:200]
