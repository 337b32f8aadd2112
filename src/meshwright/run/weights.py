"""Weights as Hugging Face keeps them: slices of a safetensors file or folder, and export."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from meshwright.errors import StorageError, nearest

__all__ = ["Entry", "Weights", "export", "read"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # what Hugging Face splits at
_INDEX_BYTES = 100_000_000  # an index holds names only: a larger one is no index
COMPANIONS = (
    "config.json", "generation_config.json", "preprocessor_config.json", "special_tokens_map.json",
    "added_tokens.json", "tokenizer*", "vocab.*", "merges.txt", "*.model", "chat_template.*",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies: its file, its dtype as safetensors calls it (`F32`), its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Weights:
    """The index of a safetensors file or folder; values are read when asked for."""

    path: Path
    entries: Mapping[str, Entry]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shape of every tensor."""
        return {name: entry.shape for name, entry in self.entries.items()}

    def slice(self, name: str, start: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """The block of `shape` that begins at `start`; only its bytes are read.

        Raises:
            StorageError: there is no such tensor or block, or its file cannot be read.
        """
        entry = self._entry(name)
        ends = [begin + size for begin, size in zip(start, shape, strict=False)]
        inside = len(start) == len(shape) == len(entry.shape) and all(
            0 <= begin <= end <= size
            for begin, end, size in zip(start, ends, entry.shape, strict=True)
        )
        if not inside:
            raise StorageError(
                f"{name} in {entry.file} has shape {entry.shape}, which has no block of shape "
                f"{shape} at {start}"
            )
        with _opened(entry.file) as file:
            if not shape:  # a slice of a scalar has no dims to name
                return file.get_tensor(name)  # type: ignore[no-any-return]
            region = tuple(slice(b, e) for b, e in zip(start, ends, strict=True))
            return file.get_slice(name)[region]  # type: ignore[no-any-return]

    def tensor(self, name: str) -> Tensor:
        """The whole tensor.

        Raises:
            StorageError: there is no such tensor, or its file cannot be read.
        """
        with _opened(self._entry(name).file) as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise StorageError(
                f"{self.path} has no tensor {name!r}; {nearest(name, list(self.entries))}"
            )
        return self.entries[name]


def read(path: str | os.PathLike[str]) -> Weights:
    """The index of weights on disk; no values are read.

    Args:
        path: a `.safetensors` file, an index of shards (`model.safetensors.index.json`), or a
            folder with either.

    Raises:
        StorageError: nothing is there, or what is there is damaged, incomplete or a pickle.
    """
    found = _find(Path(path))
    if found.name.endswith(".index.json"):
        return Weights(found, _sharded(found))
    return Weights(found, _entries(found))


def export(
    folder: str | os.PathLike[str],
    tensors: Iterable[tuple[str, Tensor]],
    config: Mapping[str, Any] | Path | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write tensors as Hugging Face does, so that `from_pretrained(folder)` loads them.

    Everything is written aside and then renamed into place; an older export in the folder is
    replaced, other files in it stay.

    Args:
        folder: made if it is missing.
        tensors: names and whole tensors; at most `shard_bytes` of them are held at once.
        config: what `config.json` says, or a model's folder whose configuration and tokenizer are
            copied.
        shard_bytes: one file up to this size, else numbered files and an index.

    Returns:
        The folder.

    Raises:
        StorageError: the disk refused, or `folder` is a file.
    """
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".export-", dir=target))
        try:
            _write_companions(aside, config)
            _write_tensors(aside, tensors, shard_bytes)
            _move_in(aside, target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"cannot export to {target}: {error}; what was there before is kept"
        ) from error
    return target


def _find(path: Path) -> Path:
    if path.is_file():
        if path.name.endswith((".safetensors", ".index.json")):
            return path
        raise StorageError(f"{path} is no safetensors file; {_no_pickle(path)}")
    if not path.is_dir():
        raise StorageError(
            f"there are no weights at {path}; name a safetensors file or a folder with one (a "
            f"model of the Hugging Face Hub is fetched by `hf download {path} --local-dir FOLDER`)"
        )
    for name in (SINGLE, INDEX):
        if (path / name).is_file():
            return path / name
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if files:
        raise StorageError(
            f"{path} holds {len(files)} safetensors files ({files[0].name}, ...) but no {INDEX} "
            "that says what is in which; name one of the files"
        )
    raise StorageError(f"{path} holds no safetensors file; {_no_pickle(path)}")


def _no_pickle(path: Path) -> str:
    pickles = [path] if path.is_file() else [*path.glob("*.bin"), *path.glob("*.pt*")]
    if not pickles:
        return f"weights are read from {SINGLE} or {INDEX}"
    return (
        f"{pickles[0].name} is not read, because a pickle can run any command; "
        f"`mw checkpoint convert {pickles[0]} FOLDER` makes safetensors of its tensors without "
        "running it"
    )


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (OSError, SafetensorError) as error:
        size = file.stat().st_size if file.is_file() else 0
        raise StorageError(
            f"{file} ({size} bytes) cannot be read: {error}; copy it again from where it came"
        ) from error


def _entries(file: Path) -> dict[str, Entry]:
    with _opened(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - no dict
        return {
            name: Entry(file, part.get_dtype(), tuple(part.get_shape()))
            for name, part in slices.items()
        }


def _sharded(index: Path) -> dict[str, Entry]:
    where = _weight_map(index)
    shards = {name: _entries(index.parent / name) for name in sorted(set(where.values()))}
    lost = [f"{name} ({file})" for name, file in where.items() if name not in shards[file]]
    if lost:
        raise StorageError(
            f"{index} names {len(lost)} tensors that their shards do not hold: "
            f"{', '.join(lost[:5])}; copy the folder again from where it came"
        )
    return {name: shards[file][name] for name, file in where.items()}


def _weight_map(index: Path) -> dict[str, str]:
    def refuse(rule: str) -> StorageError:
        return StorageError(f"{index} is no index of shards: {rule}; write the folder anew")

    if index.stat().st_size > _INDEX_BYTES:
        raise refuse(f"it is {index.stat().st_size} bytes, more than {_INDEX_BYTES}")
    try:
        content = json.loads(index.read_text("utf-8"), object_pairs_hook=_once(refuse))
    except (ValueError, RecursionError) as error:
        raise refuse(f"it is not JSON ({error})") from error
    where = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(where, dict) or not where:
        raise refuse("it must hold a weight_map from names to files")
    for name, file in where.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise refuse(f"the file of {name!r} is {file!r}, but must be a safetensors file's name")
        if Path(file).name != file or "\\" in file or "\0" in file:
            raise refuse(f"the file of {name!r} is {file!r}, but must lie in the index's folder")
        if not (index.parent / file).is_file():
            raise StorageError(f"{index} names the shard {file}, which is missing; copy it there")
    return where


def _once(refuse: Callable[[str], StorageError]) -> Callable[[list[tuple[str, Any]]], Any]:
    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise refuse(f"{twice!r} occurs twice")
        return found

    return build


def _write_companions(aside: Path, config: Mapping[str, Any] | Path | None) -> None:
    if isinstance(config, Path):
        source = config if config.is_dir() else config.parent
        for pattern in COMPANIONS:
            for file in source.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, aside / file.name)
    elif config is not None:
        _write_json(aside / "config.json", dict(config))


def _write_tensors(aside: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> None:
    shards: list[tuple[Path, dict[str, int]]] = []
    for group in _grouped(tensors, shard_bytes):
        file = aside / f".shard-{len(shards):05d}"
        save_file(group, file, metadata={"format": "pt"})
        _sync(file)
        shards.append((file, {name: tensor.nbytes for name, tensor in group.items()}))
    if len(shards) == 1:
        shards[0][0].rename(aside / SINGLE)
        return
    weight_map = {}
    for number, (file, sizes) in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file.rename(aside / name)
        weight_map.update(dict.fromkeys(sizes, name))
    total = sum(sum(sizes.values()) for _, sizes in shards)
    _write_json(aside / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _grouped(
    tensors: Iterable[tuple[str, Tensor]], shard_bytes: int
) -> Iterator[dict[str, Tensor]]:
    """Groups of at most `shard_bytes`, or of one tensor; one empty group where there are none."""
    group: dict[str, Tensor] = {}
    held = 0
    for name, tensor in tensors:
        if group and held + tensor.nbytes > shard_bytes:
            yield group
            group, held = {}, 0
        group[name] = tensor.detach().cpu().contiguous().clone()  # views of one storage are refused
        held += tensor.nbytes
    yield group


def _move_in(aside: Path, target: Path) -> None:
    """The index goes last, so that it never names a shard that is not there; then old ones go."""
    files = sorted(aside.iterdir(), key=lambda file: file.name.endswith(".index.json"))
    names = {file.name for file in files}
    for file in files:
        file.replace(target / file.name)
    _sync(target)
    for old in (target / INDEX, target / SINGLE, *target.glob("model-*-of-*.safetensors")):
        if old.name not in names:
            old.unlink(missing_ok=True)


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
    _sync(file)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
