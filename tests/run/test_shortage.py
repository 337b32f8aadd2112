"""Where memory is short a run ends with 72, the parts of the bill, and what would have fitted."""

from __future__ import annotations

import re
import resource
import subprocess
import sys

import pytest

from tests.laws.source import ROOT

pytestmark = [pytest.mark.mp, pytest.mark.slow, pytest.mark.timeout(120)]

MIB = 2**20
ROOM = 173
"""MiB for tensors: less than the 194 that plan data=1 needs."""


def train(tmp_path, plan, *words, ranks=1, data=None, space=None):
    """`mw train` of the hungry job, its memory limited."""

    def limited():
        for which, size in ((resource.RLIMIT_DATA, data), (resource.RLIMIT_AS, space)):
            if size is not None:
                resource.setrlimit(which, (size * MIB, size * MIB))

    return subprocess.run(
        [sys.executable, "-m", "meshwright", "train", "tests/run/hungry.py", *words,
         "--plan", plan, "-n", str(ranks), "--run-dir", str(tmp_path / "run")],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=110, preexec_fn=limited,
    )  # fmt: skip


def told(done):
    """The message, on one line."""
    assert done.returncode == 72, done.stderr
    text = " ".join(done.stderr.split())
    return text[text.index("OutOfMemory:") :]


@pytest.fixture(scope="module")
def refusal(tmp_path_factory):
    """A limit that leaves less than the plan needs, and what is said under it.

    What the process takes of a limit beside tensors differs between machines: a first run tells.
    """
    folder = tmp_path_factory.mktemp("refused")
    free = re.search(r"but (\S+) MiB are free", told(train(folder / "first", "data=1", data=600)))
    limit = 600 + round(ROOM - float(free[1]))
    return limit, told(train(folder / "second", "data=1", data=limit))


def test_a_plan_that_does_not_fit_is_refused_before_its_first_step(refusal):
    _, text = refusal
    assert "plan data=1 needs" in text
    assert re.search(r"\(optimizer 64\.1 MiB, .*weights 32\.0 MiB", text)
    assert "are free by RLIMIT_DATA; " in text
    assert re.search(r"(remat|microbatches|offload)=\S+ needs \S+ MiB \([+-]\d+ % time\)", text)
    assert "step 1/3" not in text


def test_and_runs_as_it_was_told_to(refusal, tmp_path):
    limit, text = refusal
    plan = re.search(r"; (\S+) needs", text)[1]
    done = train(tmp_path / "again", plan, data=limit)
    assert done.returncode == 0, done.stderr


@pytest.mark.matrix
def test_ranks_are_refused_together(tmp_path):
    text = told(train(tmp_path, "data=2", ranks=2, data=520))
    assert text.count("plan data=2 needs") == 1


@pytest.mark.parametrize(
    "limit", [{"data": 4096}, pytest.param({"space": 8192}, marks=pytest.mark.matrix)]
)
def test_memory_that_nobody_foretold_is_explained_by_the_same_parts(tmp_path, limit):
    text = told(train(tmp_path, "data=1", "--set", "greedy=true", **limit))
    assert "rank 0 ran out of memory in step 2 (" in text
    assert "plan data=1 needs" in text
    assert "optimizer 64.1 MiB" in text
    assert "MiB are free to it; " in text
