"""Folders that cannot be written, signals, numbers that differ, and a Python without venv."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from tests.bad_input.conftest import ended, soon
from tests.bad_input.jobs import write_job
from tests.laws.source import ROOT


def test_runs_that_cannot_be_made(train, folder):
    (folder / "runs").write_text("")
    train().fails(74, "cannot make the run folder runs/job-001: Not a directory", "--run-dir")


@pytest.mark.parametrize("where", ["job.py", "/proc/none"])
def test_a_run_folder_that_cannot_be_made(train, where):
    train("--run-dir", where).fails(74, f"cannot make the run folder {where}", "another --run-dir")


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.json"])
def test_a_run_folder_that_cannot_be_written(train, folder, name):
    (folder / "run" / name).mkdir(parents=True)
    train("--run-dir", "run").fails(74, f"run/{name}")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to root")
def test_a_read_only_run_folder(train, folder):
    (folder / "run").mkdir(mode=0o555)
    train("--run-dir", "run").fails(74, "run", "Permission denied")


def test_reports_of_what_is_no_run(mw, folder):
    (folder / "empty").mkdir()
    (folder / "file").write_text("")
    mw("report", "none").fails(2, "none is not a folder")
    mw("report", "empty").fails(2, "empty has no run.json")
    mw("report", "file").fails(2, "file is not a folder")
    (folder / "empty" / "run.json").write_text("{")
    mw("report", "empty").fails(74, "run.json")


def test_verify_fails_where_the_numbers_differ(mw, folder):
    # What a program is traced from is another function than what runs on one device.
    write_job(
        folder / "job.py",
        """
        def loss(model, batch):
            more = 1.0 if torch.compiler.is_compiling() else 1.5
            return (model(batch["x"]) * more - batch["y"]).square().mean()
        """,
    )
    done = mw("verify", "job.py", "-n", 2, "--steps", 2)
    done.fails(76, "plan data=2 on 2 ranks differs from one device", "the law is 1e-10")
    assert "FAIL" in done.out


SENDS = """
class Data(Data):
    def __getitem__(self, index):
        if index == 13:
            os.kill(os.getpid(), signal.{name})
        return super().__getitem__(index)
"""


@pytest.mark.parametrize(("name", "number"), [("SIGTERM", 15), ("SIGINT", 2), ("SIGUSR1", 10)])
def test_a_signal_ends_the_step_and_saves(train, folder, name, number):
    done = train("--run-dir", "run", extra=SENDS.format(name=name), steps="9")
    assert done.status == 128 + number
    assert f"stopped by signal {number} after step 4; saved" in done.said
    assert (folder / "run" / "checkpoints" / "step-00000004").is_dir()
    train("--run-dir", "run", steps="9").works("resumed at step 4", "step 9/9")


STUCK = """
class Data(Data):
    def __getitem__(self, index):
        if index == 13:
            Path("stuck").touch()
            while {stays}:
                time.sleep(0.01)
                if signal.getsignal(signal.SIGINT).__self__.number:
                    Path("heard").touch()
        return super().__getitem__(index)
"""


@pytest.mark.mp
@pytest.mark.timeout(120)
def test_a_second_interrupt_ends_what_is_stuck(start, folder):
    write_job(folder / "job.py", STUCK.format(stays=True), steps="9")
    process = start("train", "job.py", "-n", 2)
    assert soon((folder / "stuck").exists, 60)
    process.send_signal(signal.SIGINT)
    assert soon((folder / "heard").exists, 20)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert ended(process, 20).status == 130


@pytest.mark.mp
@pytest.mark.timeout(120)
def test_a_supervisor_that_is_asked_to_end_lets_its_ranks_save(start, folder):
    write_job(folder / "job.py", STUCK.format(stays=False), steps="10 ** 9")
    process = start("train", "job.py", "-n", 2, "--run-dir", "run")
    assert soon((folder / "stuck").exists, 60)
    process.terminate()
    done = ended(process)
    assert done.status == 143, done.err
    assert "stopped by signal 15 after step" in done.said
    assert len(list((folder / "run" / "checkpoints").glob("step-*"))) == 1


def test_a_python_without_venv_is_told(tmp_path):
    python = tmp_path / "python3.11"
    python.write_text("#!/bin/sh\necho \"No module named 'venv'\" >&2\nexit 1\n")
    python.chmod(0o755)
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    (tmp_path / "pyproject.toml").write_text("")
    done = subprocess.run(
        ["make", "test"],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "python3.11 with its venv module is needed" in done.stderr
    assert "apt-get install python3.11-venv" in done.stderr
    assert not (tmp_path / ".venv").exists()
