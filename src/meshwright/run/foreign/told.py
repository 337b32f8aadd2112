"""What a checkpoint holds, as JSON: for `mw checkpoint inspect`, and whoever reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meshwright.run.foreign.fit import Difference
from meshwright.run.foreign.rename import Renamed
from meshwright.run.foreign.source import Item, Source

__all__ = ["difference_told", "told"]


def told(source: Source) -> dict[str, Any]:
    """The source as JSON."""
    meta = source.meta or {}
    return {
        "path": str(source.path),
        "format": source.format,
        "step": source.step,
        "plan": meta.get("plan"),
        "batch_size": meta.get("batch_size"),
        "seed": meta.get("seed"),
        "optimizer": (meta.get("optimizer") or {}).get("class"),
        "parts": _parts(source.items),
        "bytes": sum(item.bytes for item in source.items.values()),
        "files": _files(source),
        "tensors": [
            {
                "name": name,
                "dtype": item.dtype,
                "shape": list(item.shape),
                "bytes": item.bytes,
                "file": item.file,
                "boxes": item.boxes,
            }
            for name, item in source.items.items()
        ],
        "tied": dict(source.tied),
        "notes": list(source.notes),
    }


def _parts(items: Mapping[str, Item]) -> list[dict[str, Any]]:
    """Tensors and bytes of weights, buffers, and each kind of optimizer state."""
    found: dict[str, list[Item]] = {}
    for name, item in items.items():
        kind, _, rest = name.partition("/")
        slot = f" {rest.partition('/')[0]}" if kind == "optimizer" else ""
        found.setdefault(
            {"model": "weights", "buffer": "buffers"}.get(kind, kind) + slot, []
        ).append(item)
    return [
        {
            "part": part,
            "tensors": len(those),
            "bytes": sum(item.bytes for item in those),
            "dtypes": dict(Counter(item.dtype for item in those)),
        }
        for part, those in sorted(found.items(), key=lambda pair: _order(pair[0]))
    ]


def _order(part: str) -> tuple[int, str]:
    return ({"weights": 0, "buffers": 1}.get(part, 2), part)


def _files(source: Source) -> list[dict[str, Any]]:
    root = source.path
    files = [root] if root.is_file() else [f for f in sorted(root.rglob("*")) if f.is_file()]
    return [{"name": _name(file, root), "bytes": file.stat().st_size} for file in files]


def _name(file: Path, root: Path) -> str:
    return file.name if file == root else file.relative_to(root).as_posix()


def difference_told(renamed: Renamed, found: Difference | None) -> dict[str, Any]:
    """What was renamed and left out, and how the rest differs from what is wanted, as JSON."""
    return {
        "renamed": dict(renamed.names),
        "dropped": list(renamed.dropped),
        "missing": {} if found is None else dict(found.missing),
        "unexpected": [] if found is None else list(found.unexpected),
        "dtypes": {} if found is None else {n: list(pair) for n, pair in found.dtypes.items()},
    }
