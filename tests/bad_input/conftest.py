"""Bad input as a user meets it: a command in a folder, its exit status and what it says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from meshwright.cli import main
from tests.bad_input.jobs import write_job

CONTRACT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """What it said, on one line: messages are wrapped for the terminal."""
        return " ".join(self.err.split())

    def fails(self, status: int, *words: str) -> str:
        """Check that it failed with `status`, briefly, saying `words`; what it said."""
        assert self.status == status, self.err
        for word in words:
            assert word in self.said, (word, self.err)
        failure = re.search(
            r"^(mw: |ranks? [\d, ]+failed: |rank \d+ \(pid )", self.err, re.MULTILINE
        )
        assert failure is not None, self.err
        assert len(self.err[failure.start() :].strip().splitlines()) <= 12, self.err
        assert "Traceback" not in self.err, self.err
        return self.said

    def works(self, *words: str) -> str:
        """Check that it ended well, saying `words`; what it said."""
        assert self.status == 0, self.err
        for word in words:
            assert word in self.said, (word, self.err)
        return self.said


def step_losses(run: Path) -> list[float]:
    """The losses that a run logged."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def running(folder: Path) -> list[str]:
    """Processes that work in `folder`, but for this one."""
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.pid != os.getpid() and process.cwd() == str(folder)
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def soon(true: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Whether something comes true within `seconds`."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Iterator[Path]:
    """An empty working folder, in which nothing runs afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in CONTRACT:
        monkeypatch.delenv(name, raising=False)
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(tmp_path):
            del sys.modules[name]
    assert soon(lambda: not running(tmp_path), 5), running(tmp_path)


@pytest.fixture
def mw(folder, capfd) -> Callable[..., Outcome]:
    """Run a command in this process."""

    def run(*words: object) -> Outcome:
        capfd.readouterr()
        # A file of the same name is another one in the next test, or later in this one.
        for name in ("job", "job_job_file"):
            sys.modules.pop(name, None)
        try:
            status = main([str(word) for word in words])
        except SystemExit as stop:
            status = stop.code
        return Outcome(status, *capfd.readouterr())

    return run


@pytest.fixture
def train(folder, mw) -> Callable[..., Outcome]:
    """Write `job.py` from its pieces and train it in this process."""

    def run(*words: object, extra: str = "", **pieces: str) -> Outcome:
        write_job(folder / "job.py", extra, **pieces)
        return mw("train", "job.py", *words)

    return run


Shell = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(folder) -> Iterator[Shell]:
    """Start a command as a process of its own; those that a failed test leaves are killed."""
    started: list[subprocess.Popen[str]] = []

    def run(*words: object, environ: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "meshwright", *map(str, words)],
            cwd=folder,
            env={**os.environ, **(environ or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def ended(process: subprocess.Popen[str], seconds: float = 60.0) -> Outcome:
    """How a started command ends, which it must within `seconds`."""
    out, err = process.communicate(timeout=seconds)
    return Outcome(process.returncode, out, err)


@pytest.fixture
def shell(start) -> Callable[..., Outcome]:
    """Run a command as a process of its own, and wait for its end."""

    def run(*words: object, environ: Mapping[str, str] | None = None) -> Outcome:
        return ended(start(*words, environ=environ))

    return run
