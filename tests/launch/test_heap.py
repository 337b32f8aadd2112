"""Freed memory stays: in steady state a step touches no fresh page."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys

import pytest

from tests.laws.source import ROOT

BODY = """
import resource, sys
import torch
import meshwright as mw
from tests.equal.cells import example

faults = []

def count(run, metrics):
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)

# Activations of 2 MiB and more, which malloc maps one by one if left alone.
job = example("gpt").job(depth=1, width=128, context=64, batch=64, dropout=0.0)
mw.train(job, 9, "data=1", on_step=[count], run_dir=sys.argv[1], quiet=True)
print([b - a for a, b in zip(faults, faults[1:])])
"""


def faults_of_a_step(folder, **environment):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    environment = {
        **kept,
        "PYTHONPATH": f"{ROOT}:{ROOT}/src",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-c", BODY, str(folder)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return statistics.median(json.loads(done.stdout.splitlines()[-1])[3:])


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_steps_touch_no_fresh_memory(tmp_path):
    assert faults_of_a_step(tmp_path / "kept") < 300
    # What the user set up holds, and shows what would be without.
    assert faults_of_a_step(tmp_path / "given", MALLOC_MMAP_THRESHOLD_="131072") > 3000
