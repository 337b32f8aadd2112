"""A checkpoint's way into a folder of checkpoints: made aside, committed, the old ones removed.

What one process does on the disk, the first rank's or its thread; each call is whole by itself.
"""

from __future__ import annotations

import logging
import secrets
import shutil
from collections.abc import Collection
from pathlib import Path

from meshwright.errors import StorageError
from meshwright.run.checkpoint.durable import discard, make_folder, publish, sync_folder, write_file
from meshwright.run.checkpoint.manifest import Manifest, parse, record_of, render
from meshwright.run.checkpoint.restore import COMMIT, MANIFEST, is_committed, open_checkpoint
from meshwright.run.checkpoint.retention import doomed, is_leftover, replaced_name, step_name
from meshwright.run.checkpoint.shards import Shards

__all__ = ["aside_name", "clean", "commit", "make_aside", "retire"]

_log = logging.getLogger(__name__)


def aside_name(step: int, nonce: str | None = None) -> str:
    """The name of a folder that a checkpoint is written to."""
    return f".{step_name(step)}.tmp-{nonce or secrets.token_hex(8)}"


def clean(root: Path, busy: Collection[str] = ()) -> None:
    """Remove what crashed saves left; not the folders that are `busy`."""
    for path in root.iterdir() if root.is_dir() else ():
        if is_leftover(path.name) and path.name not in busy:
            shutil.rmtree(path)


def make_aside(root: Path, name: str) -> Path:
    """Make the folder that ranks write to; whichever comes first does."""
    make_folder(root)
    (root / name).mkdir(exist_ok=True)
    return root / name


def commit(aside: Path, root: Path, manifest: Manifest) -> None:
    """Write the manifest, give the folder its name, then write the record that it is whole.

    What has that name already stays until the new one counts.
    """
    data = render(manifest)
    parse(data)  # never leave behind what could not be read again
    Shards(aside, manifest.files).check_lengths(manifest.files)
    write_file(aside / MANIFEST, [data])
    final, old = root / step_name(manifest.step), root / replaced_name(manifest.step)
    if final.exists() and not is_committed(final):
        _remove(final)  # cut short itself; what it was to replace may still be there
    if final.exists():
        if old.exists():
            _remove(old)
        final.rename(old)
    publish(aside, final)
    write_file(final / COMMIT, [record_of(data)])
    sync_folder(final)
    if old.exists():
        _remove(old)


def retire(root: Path, step: int, keep: int, trusted: set[str]) -> None:
    """Remove checkpoints that are older than the newest `keep`; the newest two verify, or stay.

    Args:
        root: of all checkpoints.
        step: of the one that was just saved.
        keep: how many stay.
        trusted: names of those whose bytes were compared with their digests, or written, by this
            process; grows.
    """
    trusted.add(step_name(step))
    names = [path.name for path in root.iterdir()]
    verified: list[str] = []

    def counts(name: str) -> bool:
        """Whether it is one of those kept: the first two must be whole to the last bit."""
        if not _whole(root / name, lengths_only=name in trusted or len(verified) >= 2):
            return False
        verified.append(name)
        if len(verified) <= 2:
            trusted.add(name)
        return True

    for name in doomed(names, step, keep, counts):
        try:
            _remove(root / name)
        except OSError as error:
            # The checkpoint is in; an old one that stays is no reason to stop a run.
            _log.warning("could not remove the old checkpoint %s: %s", root / name, error)


def _whole(path: Path, *, lengths_only: bool) -> bool:
    try:
        with open_checkpoint(path) as checkpoint:
            if not lengths_only:
                checkpoint.verify()
    except StorageError:
        return False
    return True


def _remove(path: Path) -> None:
    name = path.name.removesuffix(".replaced")
    discard(path, path.with_name(f".{name}.old-{secrets.token_hex(8)}"))
