"""Checkpoints written as DeepSpeed's universal ones, which its engines load at any ZeRO stage.

A tensor keeps its dtype: DeepSpeed copies `fp32.pt` into its own float32, whatever it is of.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from meshwright.errors import StorageError
from meshwright.run.checkpoint.durable import sync_folder, write_file
from meshwright.run.foreign.dcpwrite import settings
from meshwright.run.foreign.source import Source, bare, kind, shown
from meshwright.run.foreign.symbols import Global, Made
from meshwright.run.foreign.torchwrite import Stored, rebuilt, stored, write_torch
from meshwright.run.foreign.universal import LATEST, STATES, WEIGHTS, ZERO

__all__ = ["write_universal"]

_VERSION: Final = "0.19.0"  # DeepSpeed refuses to read what a version before 0.3.17 wrote
_LAYOUT: Final = 0.2  # of universal checkpoints; what later ones add is for tensor parallelism
_LONGEST: Final = 255  # bytes in the name of a folder


def write_universal(source: Source, folder: Path) -> dict[str, str]:
    """Write the checkpoint; file by global name. One tensor is in memory at a time."""
    tag = f"global_step{source.step or 0}_universal"
    zero = folder / tag / ZERO
    zero.mkdir(parents=True)
    files: dict[str, str] = {}
    for name in source.of("model", "optimizer"):
        own = bare(name)
        _require_folder_name(own)
        slot = WEIGHTS if kind(name) == "model" else name.split("/")[1]
        (zero / own).mkdir(exist_ok=True)
        _write_one(source, name, zero / own / f"{slot}.pt", plain=slot == "step")
        files[name] = f"{tag}/{ZERO}/{own}/{slot}.pt"
    write_torch(zero / "optimizer_state.pt", _optimizer(source), {})
    for name in source.of("buffer"):
        files[name] = f"{tag}/{STATES[0]}"
    for file in STATES:
        _write_states(source, folder / tag / file)
    write_file(folder / LATEST, [tag.encode()])
    for made in (*zero.iterdir(), zero, folder / tag, folder):
        if made.is_dir():
            sync_folder(made)
    return files


def _require_folder_name(own: str) -> None:
    if "/" in own or own in (".", "..") or len(own.encode()) > _LONGEST:
        raise StorageError(f"{shown(own)} is no name for a folder, as this format needs; use --map")


def _write_one(source: Source, name: str, path: Path, *, plain: bool) -> None:
    tensor = rebuilt("0", source.items[name])
    tree: Any = tensor if plain else {"param": tensor, "cat_dim": 0}
    write_torch(path, tree, {"0": stored(source, name)})


def _groups(source: Source) -> list[dict[str, Any]]:
    return [{**group, "params": []} for group in settings(source)]


def _optimizer(source: Source) -> dict[str, Any]:
    """What is the same for all parameters, as stages 1 and 2 read it, and as stage 3 does."""
    groups = _groups(source)
    inner = {"state": {0: {"step": source.step or 0}}, "param_groups": groups or [{"params": []}]}
    return {
        "zero_stage": 1,
        "ds_version": _VERSION,
        "overflow": False,
        "param_groups": groups,
        "optimizer_state_dict": inner,
    }


def _write_states(source: Source, path: Path) -> None:
    buffers = source.of("buffer")
    keys = {name: str(number) for number, name in enumerate(buffers)}
    shapes = {
        bare(name): Made(Global("torch", "Size"), (item.shape,))
        for name, item in source.of("model").items()
    }
    tree = {
        "module": {bare(name): rebuilt(keys[name], source.items[name]) for name in buffers},
        "buffer_names": [bare(name) for name in buffers],
        "param_shapes": [shapes],
        "optimizer": None,
        "lr_scheduler": None,
        "global_steps": source.step or 0,
        "global_samples": 0,
        "skipped_steps": 0,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": _VERSION,
        "universal_checkpoint_info": {"universal_checkpoint_version": _LAYOUT},
    }
    storages: dict[str, Stored] = {keys[name]: stored(source, name) for name in buffers}
    write_torch(path, tree, storages)
