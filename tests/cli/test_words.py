"""What is typed: helps, unknown words with the nearest, values that cannot be."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

VERBS = ("train", "verify", "plan", "launch", "report", "demo", "env")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_helps_with_an_example(mw, verb):
    done = mw(verb, "--help")
    assert (done.status, done.err) == (0, "")
    assert f"Example:  mw {verb}" in done.out


def test_no_words_are_a_call_for_help(mw):
    done = mw()
    assert done.status == 0
    assert all(f" {verb} " in done.out for verb in VERBS)


def test_the_version_is_told(mw):
    assert mw("--version").out == "meshwright 0.1.0\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trian", "x.py"], "Did you mean 'train'?"),
        (["train", "sums.py", "--stepz", "3"], "--steps"),
        (["train", "sums.py", "--steps", "many"], "'--steps'"),
        (["train", "sums.py", "--steps", "0"], "'--steps': Input should be greater than"),
        (["train", "sums.py", "-n", "0"], "'-n': Input should be greater than or equal to 1"),
        (["train", "sums.py", "--seed=-1"], "'--seed': Input should be greater than"),
        (["train"], "Missing argument"),
        (["train", "sums.py", "more.py"], "more.py"),
        (["verify", "sums.py", "--dtype", "float16"], "'float64', 'float32'"),
        (["verify", "sums.py", "--ranks", "4"], "'local', 'processes'"),
        (["train", "smus.py"], "smus.py is not there; did you mean 'sums.py'?"),
        (["train", "."], ". is a folder"),
        (["train", "sums.py", "--plan", "zero3,dta=2"], "did you mean 'data'?"),
        (["train", "sums.py", "--plan", "data=3", "-n", "4"], "use data=4, or start 3 ranks"),
        (["verify", "sums.py", "--plan", "data=3", "-n", "4"], "use data=4, or start 3 ranks"),
        (["plan", "sums.py", "--plan", "data=3", "-n", "4"], "use data=4, or start 3 ranks"),
        (["train", "sums.py", "--plan", "no.toml"], "plan file no.toml cannot be read"),
        (["train", "sums.py", "--set", "widht=3"], "did you mean 'width'?"),
        (["train", "sums.py", "--set", "width"], "use `--set depth=4`"),
        (["train", "sums.py", "--set", "width=3", "--set", "width=4"], "keep one"),
        (["train", "sums.py", "--set", "width=wide"], "takes a whole number, not 'wide'"),
        (["train", "sums.py", "--set", "bad=lost"], "did you mean 'loss'?"),
        (["train", "sums.py:plain", "--set", "width=3"], "is a Job already"),
        (["train", "sums.py:jbo"], "use sums.py:job"),
        (["train", "sums.py:number"], "is of type int, but must be a Job"),
        (["train", "sums.py:nothing"], "returned NoneType, but must return a Job"),
        (["train", "sums.py", "--resume", "--fresh"], "contradict"),
        (["train", "sums.py", "--overwrite"], "use `--fresh --overwrite`"),
        (["train", "sums.py", "--resume"], "there is no run of sums"),
        (["report", "nowhere"], "nowhere is not a folder, so it is no run folder"),
        (["verify", "sums.py", "--run-dir", "nowhere"], "nowhere is not a folder"),
        (["launch", "-n", "2", "--", "no-such-program"], "cannot start 'no-such-program'"),
        (["launch", "-n", "100000", "--", "true"], "100,000 ranks on this host"),
        (["train", "sums.py", "-n", "100000"], "start at most"),
        (["verify", "sums.py", "-n", "100000", "--ranks", "processes"], "start at most"),
    ],
)
def test_what_cannot_be_is_told_with_status_2(mw, words, told):
    done = mw(*words)
    assert (done.status, done.out) == (2, "")
    assert told in done.err
    assert done.err.startswith("mw: ")
    assert "Traceback" not in done.err


def test_a_wrong_file_makes_no_run_folder(mw, folder):
    mw("train", "smus.py")
    mw("train", "sums.py", "--plan", "data=3", "-n", "2")
    assert not (folder / "runs").exists()


def test_a_plan_in_the_environment_is_taken_and_must_not_be_contradicted(mw, monkeypatch):
    monkeypatch.setenv("MESHWRIGHT_PLAN", "zero1,data=3")
    found = json.loads(mw("plan", "sums.py", "--json").out)
    assert found["plan"] == "zero1,data=3"
    done = mw("plan", "sums.py", "--plan", "data=2")
    assert done.status == 2
    assert "--plan data=2, but MESHWRIGHT_PLAN is 'zero1,data=3'" in done.err


def test_half_a_contract_is_told(mw, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    done = mw("env")
    assert done.status == 2
    assert "WORLD_SIZE is not set" in done.err


def test_the_environment_is_told(mw):
    found = json.loads(mw("env", "--json").out)
    assert found["versions"]["meshwright"] == "0.1.0"
    assert found["host"]["cores"] == len(os.sched_getaffinity(0))
    assert found["contract"]["engine"] == "none"
    assert "meshwright" in mw("env").out


@pytest.mark.mp
def test_help_loads_no_torch():
    code = (
        "import sys; from meshwright.cli import main; main(['train', '--help']); "
        "sys.exit('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.DEVNULL)
    assert ran.returncode == 0
