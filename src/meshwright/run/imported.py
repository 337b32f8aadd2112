"""What a run takes from a checkpoint that another run, or another program, wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from meshwright.errors import StorageError
from meshwright.run.checkpoint.manifest import Entry
from meshwright.run.checkpoint.restore import MANIFEST
from meshwright.run.checkpoint.retention import listed
from meshwright.run.checkpoint.save import Checkpoint, open_checkpoint

__all__ = [
    "checkpoint_in",
    "checkpoints_in",
    "found_entries",
    "checkpoint_weights",
    "require_optimizer",
    "stored_names",
]


def checkpoint_in(path: Path, step: int | None = None) -> Path | None:
    """A checkpoint's folder: `path` itself, or the newest (that of `step`) of a run or its folder.

    Raises:
        StorageError: there are some, but none of `step`.
    """
    if (path / MANIFEST).exists():
        return path
    for root in (path, path / "checkpoints"):
        saved = listed(entry.name for entry in root.iterdir()) if root.is_dir() else []
        found = [one for one in saved if step in (None, one.step)]
        if found:
            return root / found[0].name
        if saved:
            steps = ", ".join(str(number) for number in sorted({one.step for one in saved}))
            raise StorageError(f"{root} has no checkpoint of step {step}; it has {steps}")
    return None


def checkpoints_in(path: Path) -> list[Path]:
    """All checkpoints of a run or its folder, the newest first; `path` where there are none."""
    if path.is_dir() and not (path / MANIFEST).exists():
        for root in (path, path / "checkpoints"):
            saved = listed(entry.name for entry in root.iterdir()) if root.is_dir() else []
            if saved:
                return [root / one.name for one in saved]
    return [path]


@dataclass(frozen=True, slots=True, eq=False)
class _Weights:
    """A checkpoint's weights and buffers by the model's own names, as of safetensors."""

    checkpoint: Checkpoint
    names: Mapping[str, str]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shape of every tensor."""
        return {own: self.checkpoint.entries[name].shape for own, name in self.names.items()}

    def slice(self, name: str, start: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """The block of `shape` that begins at `start`."""
        return self.checkpoint.read(self.names[name], start, shape)


def checkpoint_weights(path: Path) -> _Weights:
    """The weights of a checkpoint, to start another run from.

    Raises:
        StorageError: it is none, or is damaged.
    """
    checkpoint = open_checkpoint(path)
    kept = (name for name in checkpoint.entries if name.startswith(("model/", "buffer/")))
    return _Weights(checkpoint, {name.partition("/")[2]: name for name in kept})


def stored_names(
    wanted: Mapping[str, Any], checkpoint: Checkpoint, tied: Mapping[str, str]
) -> dict[str, str]:
    """The entry that fills each tensor of the model.

    In what was imported a buffer may stand among the weights, and a tied tensor under any name.
    """
    entries = checkpoint.entries
    found = {name: name for name in wanted if name in entries}
    if "imported" not in checkpoint.meta:
        return found
    others = {f"model/{kept}": f"model/{other}" for other, kept in tied.items()}
    for name in wanted:
        kind, _, bare = name.partition("/")
        for stored in (f"model/{bare}" if kind == "buffer" else name, others.get(name, name)):
            if name not in found and stored in entries:
                found[name] = stored
    return found


def found_entries(
    checkpoint: Checkpoint, names: Mapping[str, str], tied: Mapping[str, str]
) -> dict[str, Entry]:
    """Weights and buffers by the names that the model has; the others by their own.

    Args:
        checkpoint: that holds them.
        names: as of `stored_names`.
        tied: other names of tensors, under which what was imported may hold them once more.
    """
    found = {name: checkpoint.entries[stored] for name, stored in names.items()}
    used = set(names.values())
    if "imported" in checkpoint.meta:
        used |= {f"model/{other}" for other in tied}
    others = {
        name: entry
        for name, entry in checkpoint.entries.items()
        if name.startswith(("model/", "buffer/")) and name not in used
    }
    return found | others


def require_optimizer(checkpoint: Checkpoint) -> None:
    """Refuse to go on from weights alone.

    Raises:
        StorageError: it holds no optimizer's state.
    """
    if not any(name.startswith("optimizer/") for name in checkpoint.entries):
        raise StorageError(
            f"checkpoint {checkpoint.path} was imported without an optimizer's state, so a run "
            "cannot go on from it; begin one with it as the job's weights="
        )
