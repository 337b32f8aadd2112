"""Any format to any other: opened by what is in a folder, written aside and renamed into place."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from meshwright.errors import StorageError, UsageError
from meshwright.run.checkpoint.durable import make_folder, publish
from meshwright.run.checkpoint.restore import MANIFEST
from meshwright.run.checkpoint.retention import step_name, step_of
from meshwright.run.foreign.dcp import METADATA, open_dcp
from meshwright.run.foreign.dcpwrite import write_dcp
from meshwright.run.foreign.hub import open_hub, write_hub
from meshwright.run.foreign.native import open_native, write_native
from meshwright.run.foreign.sidecar import with_sidecar, write_sidecar
from meshwright.run.foreign.source import Source, kind, shown, tensor_of
from meshwright.run.foreign.statedict import open_statedict, write_statedict
from meshwright.run.foreign.universal import is_universal, open_universal
from meshwright.run.foreign.universalwrite import write_universal
from meshwright.run.imported import checkpoint_in
from meshwright.run.weights import SHARD_BYTES

__all__ = ["FORMATS", "Written", "checked", "convert", "open_source", "usual_format"]

FORMATS: Final[Mapping[str, tuple[str, ...]]] = {
    "meshwright": ("model", "buffer", "optimizer"),  # and whatever else a run keeps
    "safetensors": ("model", "buffer"),
    "dcp": ("model", "buffer", "optimizer"),
    "universal": ("model", "buffer", "optimizer"),
    "torch": ("model", "buffer"),
}
"""What each format has room for."""

_LARGEST: Final = 10**15
_TORCH: Final = ("*.pt", "*.pth", "*.bin", "*.ckpt")


@dataclass(frozen=True, slots=True)
class Written:
    """What was written: where, in which format, how many tensors and bytes of files."""

    path: Path
    format: str
    tensors: int
    bytes: int
    left_out: tuple[str, ...]


def open_source(path: Path, *, skip_objects: bool = False) -> Source:
    """What lies at `path`, whatever its format; of a run's folder, its newest checkpoint.

    Args:
        path: a folder or file.
        skip_objects: of a torch file, leave out what is neither a tensor nor plain.

    Raises:
        StorageError: nothing that is known lies there, or it is damaged.
    """
    try:
        return _counted(_opened(path, skip_objects=skip_objects))
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from None


def _opened(path: Path, *, skip_objects: bool) -> Source:
    if path.is_file():
        if path.name.endswith((".safetensors", ".index.json")):
            return with_sidecar(open_hub(path))
        return with_sidecar(open_statedict(path.resolve(), skip=skip_objects))
    if not path.exists():
        raise StorageError(f"there is nothing at {path}")
    if not path.is_dir():
        raise StorageError(f"{path} is neither a file nor a folder")
    inside = checkpoint_in(path)
    if inside is not None:
        return open_native(inside)
    if (path / METADATA).exists() or (path / METADATA).is_symlink():
        return with_sidecar(open_dcp(path))
    if is_universal(path):
        return with_sidecar(open_universal(path))
    if any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json")):
        return with_sidecar(open_hub(path))
    files = sorted(file for pattern in _TORCH for file in path.glob(pattern))
    if len(files) == 1:
        return _opened(files[0], skip_objects=skip_objects)
    raise StorageError(_nothing(path, [file.name for file in files]))


def _counted(source: Source) -> Source:
    """The source with the step that its optimizer counted, where nothing else tells one."""
    name = next((name for name in source.items if name.startswith("optimizer/step/")), None)
    if source.step is not None or name is None or source.items[name].shape not in ((), (1,)):
        return source
    count = float(tensor_of(source, name))
    whole = count.is_integer() and 0 <= count < _LARGEST
    return replace(source, step=int(count)) if whole else source


def _nothing(path: Path, files: list[str]) -> str:
    if files:
        return f"{path} holds {len(files)} torch files ({shown(files[0])}, ...); name one of them"
    names = sorted(entry.name for entry in path.iterdir())
    holds = f"holds {', '.join(map(shown, names[:3]))}" if names else "is empty"
    return (
        f"{path} {holds}, but no checkpoint that is known here: Meshwright's has {MANIFEST}, torch "
        f"DCP's {METADATA}, DeepSpeed's universal zero/ or latest_universal, Hugging Face's "
        "*.safetensors, and what torch.save wrote is a file"
    )


def checked(path: Path, *, skip_objects: bool = False) -> dict[str, Any]:
    """Whether all of a checkpoint is as its digests say, as JSON: `problem` says what is not."""
    found: dict[str, Any] = {"path": str(path), "whole": False, "problem": "", "checked": "nothing"}
    try:
        source = open_source(path, skip_objects=skip_objects)
        found |= {"format": source.format, "step": source.step, "notes": list(source.notes)}
        found |= {
            "tensors": len(source.items),
            "bytes": sum(i.bytes for i in source.items.values()),
        }
        found["checked"] = source.check()
        found["whole"] = True
    except StorageError as error:
        found["problem"] = str(error)
    return found


def usual_format(source: Source) -> str:
    """Where a source goes that nobody says otherwise of: its optimizer's state is kept."""
    return "meshwright" if source.of("optimizer") else "safetensors"


def convert(
    source: Source,
    to: Path,
    form: str,
    *,
    config: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Written:
    """Write the source in another format; `to` appears whole, or not at all.

    Args:
        source: what to write, checked before.
        to: a folder that is not there yet, or is empty.
        form: of `FORMATS`.
        config: whose `config.json` and tokenizer go along, for `safetensors`.
        shard_bytes: most bytes of one file, for `safetensors`.

    Raises:
        StorageError: the source cannot be read, or the disk refuses.
        UsageError: `to` is taken.
    """
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise UsageError(f"{to} is there already and not empty; name a new folder")
    named = step_of(to.name)
    if form == "meshwright" and named not in (None, source.step or 0):
        raise UsageError(
            f"{to.name} is the name of another step's checkpoint; this one's is "
            f"{step_name(source.step or 0)}"
        )
    _require_one_loss(source, form)
    left_out = tuple(name for name in source.items if not _holds(form, name))
    # Something else than a checkpoint's name, so that no run takes half of one for its own.
    aside = to.parent / f".{to.name}.tmp-{secrets.token_hex(8)}"
    try:
        make_folder(to.absolute().parent)
        aside.mkdir()
        made = _write(source, aside, form, config, shard_bytes)
        files = [file for file in made.rglob("*") if file.is_file()]
        size = sum(file.stat().st_size for file in files)
        publish(made, to)
    except OSError as error:
        raise StorageError(
            f"{to} cannot be written: {error.strerror or error}; nothing of it is left"
        ) from error
    finally:
        with suppress(OSError):
            shutil.rmtree(aside)
    return Written(to, form, len(source.items) - len(left_out), size, left_out)


def _require_one_loss(source: Source, form: str) -> None:
    """Formats that keep an optimizer's state by parameter have no name for a phase's."""
    phases = (source.meta or {}).get("phases")
    if phases and form in ("dcp", "universal"):
        raise UsageError(
            f"{source.path} holds the optimizers of phases {', '.join(phases)}, which {form} has "
            "no place for; write --to safetensors or --to torch, of the weights alone"
        )


def _holds(form: str, name: str) -> bool:
    return form == "meshwright" or kind(name) in FORMATS[form]


def _write(source: Source, aside: Path, form: str, config: Path | None, shard_bytes: int) -> Path:
    if form == "meshwright":
        return write_native(source, aside)
    if form == "safetensors":
        write_hub(source, aside, config, shard_bytes)
    elif form == "dcp":
        write_dcp(source, aside)
    elif form == "universal":
        write_universal(source, aside)
    else:
        write_statedict(source, aside)
    write_sidecar(source, aside, whole=all(_holds(form, name) for name in source.items))
    return aside
