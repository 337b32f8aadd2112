"""Saves a checkpoint in a child process and kills it with SIGKILL, once at every disk operation.

    python -m tests.run.saving_killed FOLDER every STRIDE
    python -m tests.run.saving_killed FOLDER random COUNT SEED

The first makes FOLDER/SCENARIO-HOW-K: what a save left that was killed just before its K-th
operation (a write: halfway through it), and prints the operations as JSON. The last folder is that
of a save nobody killed. Nothing there waits for time: the child says on a pipe that it has come to
its operation and then blocks; only then it is killed. The second kills at random moments.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

from meshwright.comm.base import Group
from meshwright.comm.local import run_local
from meshwright.run.checkpoint.restore import is_committed
from meshwright.run.checkpoint.retention import listed
from meshwright.run.checkpoint.save import newest, open_checkpoint
from meshwright.run.checkpoint.saver import Saver
from tests.run.saving import save_all, two_ranks

HOOKED = ("write", "fsync", "rename", "mkdir", "unlink", "rmdir", "open")

# What is there before, and the step that is saved; two are kept.
SCENARIOS = {"first": ((), 20), "next": ((10,), 20), "again": ((10, 20), 20), "retire": ((1, 2), 3)}


HOWS = ("now", "soon")


def save_step(root, step, generation, how="now"):
    """Save, of two ranks; `soon`: as while training goes on, each rank on its own thread."""
    meta = {"generation": generation}
    if how == "now":
        save_all(root, step, two_ranks(), meta, keep=2)
        return
    savers = [Saver(Group.world(2), rank) for rank in range(2)]
    pairs = list(zip(savers, two_ranks(), strict=True))
    run_local([saver.stage(root, step, pieces, meta, 2) for saver, pieces in pairs])
    run_local([saver.settle() for saver in savers])
    assert [saver.told for saver in savers] == [[], []]


def path_of(target):
    """The path of what a call to `os` is about, be it told by name or by descriptor."""
    return Path(f"/proc/self/fd/{target}").readlink() if isinstance(target, int) else Path(target)


def pausing(name, root, reached):
    """`os.<name>`, which tells `reached` of each call that changes something under `root`."""
    perform = getattr(os, name)

    def hooked(target, *rest, dir_fd=None, **named):
        extra = {} if dir_fd is None else {"dir_fd": dir_fd}
        changes = name != "open" or rest[0] & os.O_CREAT
        if changes and path_of(target if dir_fd is None else dir_fd).is_relative_to(root):
            half = None
            if name == "write":
                half = lambda: perform(target, rest[0][: len(rest[0]) // 2])  # noqa: E731
            reached(f"{name} {path_of(target).name}", half)
        return perform(target, *rest, **extra, **named)

    return hooked


def child(root, step, stop_at, told, never, how):
    """Save; at operation `stop_at` write its name to `told` and block."""
    count = 0
    plain_write, plain_read, one = os.write, os.read, threading.Lock()

    def reached(label, half):
        nonlocal count
        with one:
            mine, count = count, count + 1
        if mine == stop_at:
            if half is not None:
                half()
            plain_write(told, label.encode())
            plain_read(never, 1)

    for name in HOOKED:
        setattr(os, name, pausing(name, root, reached))
    save_step(root, step, "new", how)


def kill_at(root, step, stop_at, how):
    """The operation at which a saving child was killed, or None when it ended before that."""
    told, tell = os.pipe()
    never, unused = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(told)
        status = 1
        try:
            child(root, step, stop_at, tell, never, how)
            status = 0
        finally:
            os._exit(status)
    os.close(tell)
    label = os.read(told, 4096).decode()
    if label:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    for end in (told, never, unused):
        os.close(end)
    expected = signal.SIGKILL if label else 0
    if status != expected:
        raise SystemExit(f"the saving child ended with status {status}, not {expected}")
    return label or None


def swept(folder, scenario, how, stride):
    """Kill saves at every `stride`-th operation, each in a folder of its own.

    Their labels, and the digests of all files that were there before.
    """
    before, step = SCENARIOS[scenario]
    template = folder / f"{scenario}-{how}"
    template.mkdir()
    for old in before:
        save_step(template, old, "old", "now")
    labels, at = {}, random.Random(f"{scenario} {how}").randrange(stride)
    while True:
        root = folder / f"{scenario}-{how}-{at}"
        shutil.copytree(template, root)
        label = kill_at(root, step, at, how)
        labels[at] = label
        if label is None:
            return {"labels": labels, "before": digests(template)}
        at += stride


def digests(root):
    """Of every file of a folder, by its path in it."""
    files = [path for path in root.rglob("*") if path.is_file()]
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def killed_at_random(root, count, seed):
    """Kill a process that saves one step after the other, `count` times at a random moment.

    After each the newest checkpoint must verify, and hold what was saved at its step; nothing that
    was in before may have changed a byte.
    """
    dice = random.Random(seed)
    step = 1
    began = time.monotonic()
    save_step(root, step, step)
    most = 4 * (time.monotonic() - began)  # so that some are killed in their first save, not all
    for _ in range(count):
        known = {name: digests(root / name) for name in steps_in(root)}
        told, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.write(tell, b"go")
                for number in range(step + 1, step + 10_000):
                    save_step(root, number, number, ("now", "soon")[number % 2])
            finally:
                os._exit(1)
        os.close(tell)
        os.read(told, 2)
        time.sleep(dice.uniform(0.0, most))  # the random moment; nothing waits for it
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(told)
        path = newest(root)
        if path is not None:
            with open_checkpoint(path) as checkpoint:
                checkpoint.verify()
                assert checkpoint.step >= step, f"step {step} was in, and is gone"
                assert checkpoint.meta["generation"] == checkpoint.step
                step = checkpoint.step
        for name, files in known.items():
            assert not (root / name).exists() or digests(root / name) == files, name
        assert len(known) < 2 or len(steps_in(root)) >= 2
    return step


def steps_in(root):
    """The checkpoints that count."""
    found = listed(path.name for path in root.iterdir())
    return [one.name for one in found if is_committed(root / one.name)]


def main(folder, words):
    if words[0] == "random":
        found = killed_at_random(folder, int(words[1]), int(words[2]))
    else:
        stride = int(words[1])
        found = {
            f"{scenario}-{how}": swept(folder, scenario, how, stride)
            for scenario in SCENARIOS
            for how in HOWS
        }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
