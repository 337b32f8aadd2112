"""A script with its own loop: an exception that nobody catches ends it as a failure should."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.mp

SCRIPT = """
import os, sys
from meshwright.launch import contract as contracts, worker
from meshwright.launch.connect import connect

contract = contracts.read(os.environ)
comm = connect(contract)
worker.guard(contract, comm)
{what}
"""


def run(tmp_path: Path, what: str, **environ: str) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT.format(what=what))
    return subprocess.run(
        [sys.executable, str(path)], check=False, env=environ, capture_output=True, text=True
    )


def test_an_uncaught_exception_leaves_a_record_and_its_status(tmp_path):
    run_dir = tmp_path / "run"
    done = run(tmp_path, "sys.stdout.write('out'); [][3]", MESHWRIGHT_RUN_DIR=str(run_dir))
    assert done.returncode == 71
    assert done.stdout == "out"
    assert "Traceback" in done.stderr
    assert "rank 0 failed: IndexError: list index out of range" in done.stderr
    record = json.loads((run_dir / "failures" / "rank0.json").read_text())
    assert record["frames"][0]["text"].endswith("[][3]")
    assert json.loads((run_dir / "ledger" / "rank0.json").read_text())["entered"] == 0


def test_a_usage_error_needs_no_traceback(tmp_path):
    done = run(tmp_path, "from meshwright.errors import PlanError; raise PlanError('use data=2')")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "rank 0 failed: PlanError: use data=2"
    assert "Traceback" not in done.stderr


def test_leaving_by_sys_exit_is_no_failure(tmp_path):
    done = run(tmp_path, "sys.exit(5)")
    assert (done.returncode, done.stderr) == (5, "")
