"""The verbs that start ranks, as a user starts them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.laws.source import ROOT

pytestmark = [pytest.mark.mp, pytest.mark.slow, pytest.mark.timeout(120)]

SMALL = ("--set", "depth=1", "--set", "width=32", "--set", "context=32")


@pytest.fixture
def shell(folder):
    """Run `mw` as a process of its own in `folder`."""

    def run(*words):
        return subprocess.run(
            [sys.executable, "-m", "meshwright", *map(str, words)],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=110,
        )

    return run


def test_a_gpt_is_trained_on_two_ranks_and_gone_on_with_on_one(shell, folder):
    words = ("train", ROOT / "examples" / "gpt.py", *SMALL, "--run-dir", "out", "--json")
    done = shell(*words, "-n", 2, "--plan", "zero3", "--steps", 3)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["steps"], found["ranks"], found["plan"]) == (3, 2, "zero3,data=2")
    assert 4 < found["loss"] < 6
    run = json.loads((folder / "out" / "run.json").read_text())
    assert run["command"].startswith("mw train ")
    assert " -n 2 --set depth=1 " in run["command"]
    assert (folder / "out" / "logs" / "rank1.log").exists()
    resumed = shell(*words, "--steps", 4)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed at step 3 from out" in resumed.stderr
    assert json.loads(resumed.stdout)["ranks"] == 1


@pytest.mark.parametrize("bad", ["loss", "data"])
def test_a_failure_is_told_once_with_the_users_line(shell, bad):
    done = shell("train", "sums.py", "-n", 2, "--set", f"bad={bad}", "--steps", 8)
    assert done.returncode == 71, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("raise ") == 1
    text = done.stderr[done.stderr.index("failed: ") :]
    assert len(text.splitlines()) <= 12
    assert "exit status 71" in text


def test_processes_verify_as_one_thread_does(shell):
    words = ("verify", "sums.py", "--plan", "zero2", "--steps", 2, "--json")
    done = shell(*words, "--ranks", "processes")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["passed"], found["plan"], found["ranks"]) == (True, "zero2,data=2", 2)


def test_a_script_of_ones_own_is_launched(shell, folder):
    (folder / "own.py").write_text(
        "import sys\n"
        "import meshwright as mw\n"
        "from sums import job\n"
        "with mw.Run(job(), plan='data', quiet=True) as run:\n"
        "    for _ in run.steps(until=2):\n"
        "        loss = run.step().loss\n"
        "    if run.rank == 0:\n"
        "        print(run.plan.text(), sys.argv[1:], run.dir)\n"
    )
    words = ("--run-dir", "out", "--", sys.executable, "own.py", "--epochs", "3")
    done = shell("launch", "-n", 2, "--plan", "zero1", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"zero1,data=2 ['--epochs', '3'] {folder / 'out'}\n"


def test_a_script_that_fails_gives_its_status(shell, folder):
    (folder / "own.py").write_text("import os\nraise SystemExit(9 * (os.environ['RANK'] == '1'))\n")
    done = shell("launch", "-n", 2, "--", sys.executable, "own.py")
    assert done.returncode == 9
    assert "rank 1 failed: exit status 9" in done.stderr
    assert (folder / "runs" / "own-001" / "logs").is_dir()


def test_the_demo_plans_trains_verifies_and_reports(shell, folder):
    done = shell("demo", "--steps", 2)
    assert done.returncode == 0, done.stderr
    page = done.stdout
    assert page.index("1 Plan") < page.index("2 Train") < page.index("3 Verify")
    assert page.index("PASS") < page.index("4 Report")
    assert [line.split()[1] for line in done.stderr.splitlines() if "held-out loss" in line] == [
        str(step) for step in (1, 2)
    ]
    run_dir = folder / "runs" / "demo-001"
    assert json.loads((run_dir / "verify.json").read_text())["passed"]
    assert (run_dir / "report.html").as_uri() in page
    assert "gpt.py" in (run_dir / "report.html").read_text()


@pytest.mark.parametrize(
    "words",
    [
        ("plan", "--explain"),
        pytest.param(("plan", "--json"), marks=pytest.mark.matrix),
        pytest.param(("env",), marks=pytest.mark.matrix),
    ],
)
def test_a_reader_that_has_gone_ends_a_command_quietly(folder, words):
    verb, *flags = words
    given = [verb, *(["sums.py", "--plan", "data=2"] if verb == "plan" else []), *flags]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "meshwright", *given],
        cwd=folder, stdout=writer, stderr=subprocess.PIPE, text=True, check=False, timeout=110,
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.matrix
def test_training_goes_on_when_nobody_reads_its_log(folder):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "meshwright", "train", "sums.py", "--run-dir", "out", "-n", "2"],
        cwd=folder, stdout=subprocess.PIPE, stderr=writer, text=True, check=False, timeout=110,
    )  # fmt: skip
    os.close(writer)
    assert done.returncode == 0
    assert json.loads((folder / "out" / "run.json").read_text())["status"] == "ok"
