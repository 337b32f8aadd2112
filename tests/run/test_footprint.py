"""A model never needs its real size in memory: to be planned, initialised, or loaded."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from safetensors.torch import save_file

from tests.laws.source import ROOT
from tests.run.footprint import LAYERS, WIDTH, Layers

pytestmark = [pytest.mark.mp, pytest.mark.slow, pytest.mark.timeout(120)]

MIB = 2**20
SLACK = 24 * MIB
"""For what the process takes beside tensors: code that is loaded, small objects."""


def ended(*words):
    """What the process says on stdout and stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.run.footprint", *words],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize(
    ("plan", "meta"),
    [("tensor=4", True), pytest.param("zero3,data=4", False, marks=pytest.mark.matrix)],
)
def test_a_model_of_six_gib_is_planned_in_one(plan, meta):
    settings = ("--set", "width=14336", "--set", "layers=4", "--set", f"meta={meta}".lower())
    words = ("mw", "plan", "tests/run/footprint.py", *settings, "--plan", plan, "--json")
    out, said = ended(*words)
    weights = [entry["parts"]["weights"] for entry in json.loads(out)["memory"]]
    assert sum(weights) > 6 * 1024 * MIB
    assert int(said.splitlines()[-1]) < 1024 * MIB


@pytest.mark.parametrize(
    ("plan", "given"),
    [
        ("zero3,data=4", True),
        pytest.param("tensor=4", False, marks=pytest.mark.matrix),
        pytest.param("zero3,data=4", False, marks=pytest.mark.matrix),
        pytest.param("tensor=4", True, marks=pytest.mark.matrix),
    ],
)
def test_a_rank_holds_its_share_and_one_tensor_at_a_time(tmp_path, plan, given):
    weights = [str(tmp_path / "w.safetensors")] if given else []
    if given:
        save_file(Layers(WIDTH, LAYERS).state_dict(), weights[0])
    out, _ = ended("state", plan, *weights)
    found = json.loads(out)
    whole = 4 * found["share"]
    assert whole > 128 * MIB
    assert found["grew"] < found["share"] + found["largest"] + SLACK < whole / 2
