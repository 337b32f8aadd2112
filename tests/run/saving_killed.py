"""Saves a checkpoint in a child process and kills it with SIGKILL, once at every disk operation.

    python -m tests.run.saving_killed FOLDER SCENARIO

makes FOLDER/0, FOLDER/1, ...: what a save left that was killed just before its k-th operation (a
write: halfway through it), and prints the operations as a JSON list. The last folder is that of a
save nobody killed. Nothing here waits for time: the child says on a pipe that it has come to its
operation and then blocks; only then it is killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from tests.run.saving import save_all, two_ranks

HOOKED = ("write", "fsync", "rename", "mkdir", "unlink", "rmdir", "open")

# What is there before, and the step that is saved; two are kept.
SCENARIOS = {"first": ((), 20), "next": ((10,), 20), "again": ((10, 20), 20), "retire": ((1, 2), 3)}


def save_step(root, step, generation):
    return save_all(root, step, two_ranks(), {"generation": generation}, keep=2)


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


def child(root, step, stop_at, told, never):
    """Save; at operation `stop_at` write its name to `told` and block."""
    count = 0
    plain_write, plain_read = os.write, os.read

    def reached(label, half):
        nonlocal count
        if count == stop_at:
            if half is not None:
                half()
            plain_write(told, label.encode())
            plain_read(never, 1)
        count += 1

    for name in HOOKED:
        setattr(os, name, pausing(name, root, reached))
    save_step(root, step, "new")


def kill_at(root, step, stop_at):
    """The operation at which a saving child was killed, or None when it ended before that."""
    told, tell = os.pipe()
    never, unused = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(told)
        status = 1
        try:
            child(root, step, stop_at, tell, never)
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


def main(folder, scenario):
    before, step = SCENARIOS[scenario]
    labels = []
    while True:
        root = folder / str(len(labels))
        for old in before:
            save_step(root, old, "old")
        label = kill_at(root, step, len(labels))
        if label is None:
            break
        labels.append(label)
    sys.stdout.write(json.dumps(labels))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
