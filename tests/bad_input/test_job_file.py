"""The words typed, the file they name, and the job in it."""

from __future__ import annotations

import pytest

from tests.bad_input.jobs import write_job


@pytest.fixture(autouse=True)
def job_file(folder):
    write_job(folder / "job.py")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian", "job.py"], ("No such command 'trian'", "Did you mean 'train'?")),
        (["train"], ("Missing argument 'FILE[:NAME]'",)),
        (["train", "job.py", "--stpes", "3"], ("--stpes", "--steps")),
        (["train", "job.py", "-n", "0"], ("'-n'", "greater than or equal to 1")),
        (["train", "job.py", "-n", "two"], ("'-n'", "valid integer")),
        (["train", "job.py", "--steps", "-1"], ("'--steps'", "greater than or equal to 1")),
        (["train", "job.py", "--seed", "-1"], ("'--seed'",)),
        (["verify", "job.py", "--dtype", "float16"], ("'--dtype'", "'float64', 'float32'")),
        (["verify", "job.py", "--ranks", "threads"], ("'--ranks'", "'local', 'processes'")),
        (["launch", "-n", "2"], ("Missing argument '-- COMMAND...'",)),
        (["report"], ("Missing argument 'RUN'",)),
        (["train", "none.py"], ("none.py is not there", "did you mean 'job.py'?")),
        (["train", "elsewhere/none.py"], ("elsewhere/none.py is not there",)),
        (["train", "."], (". is a folder", "name the Python file")),
        (["train", "job.py:a-b"], ("'a-b'", "no Python name")),
        (["train", "job.py", "--set", "depth"], ("--set 'depth' is no key=value",)),
        (["train", "job.py", "--set", "depth=2"], ("is a Job already", "make it a function")),
    ],
)
def test_words_that_mean_nothing(mw, words, said):
    mw(*words).fails(2, *said)


def test_more_ranks_than_a_host_can_start(mw, folder):
    mw("train", "job.py", "-n", 100_000).fails(2, "100,000 ranks on this host", "start at most")
    mw("launch", "-n", 100_000, "--", "true").fails(2, "100,000 ranks", "start at most")
    mw("verify", "job.py", "-n", 100_000, "--ranks", "processes").fails(2, "start at most")
    mw("plan", "job.py", "-n", 100_000).fails(2, "use data=8 or fewer")


def test_a_file_without_a_job(mw, folder):
    (folder / "job.py").write_text("jobs = 3\n")
    mw("train", "job.py").fails(2, "job.py has no 'job'", "define `job = mw.Job(...)`")


def test_a_job_of_another_name(mw):
    mw("train", "job.py:task").fails(2, "job.py has no 'task'", "it has job: use job.py:job")


def test_a_job_that_is_none(mw, folder):
    (folder / "job.py").write_text("job = {'model': None}\n")
    mw("train", "job.py").fails(2, "is of type dict, but must be a Job")


def test_a_function_that_returns_none(mw, folder):
    (folder / "job.py").write_text("def job(): pass\n")
    mw("train", "job.py").fails(2, "job() in job.py returned NoneType", "return mw.Job(...)")


def test_settings_that_the_function_does_not_take(mw, folder):
    (folder / "job.py").write_text("def job(width: int = 4, deep: bool = False): pass\n")
    mw("train", "job.py", "--set", "widht=8").fails(2, "'widht'", "did you mean 'width'?")
    mw("train", "job.py", "--set", "width=wide").fails(2, "width takes a whole number", "'wide'")
    mw("train", "job.py", "--set", "deep=maybe").fails(2, "--set deep=maybe")
    mw("train", "job.py", "--set", "width=1", "--set", "width=2").fails(2, "gives width twice")


def test_a_file_that_raises(mw, folder):
    (folder / "job.py").write_text("import json\n\nvalues = json.loads('{')\n")
    said = mw("train", "job.py").fails(71, "importing job.py raised JSONDecodeError")
    assert "job.py:3 in <module> values = json.loads('{')" in said


def test_a_file_that_is_not_python(mw, folder):
    (folder / "job.py").write_text("import json\ndef job(:\n")
    said = mw("train", "job.py").fails(71, "importing job.py raised SyntaxError")
    assert "job.py:2 in <module> def job(:" in said


def test_a_file_that_ends_the_program(mw, folder):
    (folder / "job.py").write_text("import sys\nsys.exit(0)\n")
    mw("train", "job.py").fails(71, "ended the program by exit(0)", "__name__ == '__main__'")


def test_an_argument_that_job_does_not_have(train):
    said = train(opimizer="None").fails(71, "unexpected keyword argument 'opimizer'")
    assert "did you mean 'optimizer'?" in said
    assert "job.py:" in said


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        ({"batch_size": "0"}, ("batch_size=0", "1 or more")),
        ({"batch_size": "'8'"}, ("batch_size is '8'", "whole number")),
        ({"normalize_over": "3"}, ("normalize_over=3 does not divide batch_size=8",)),
        ({"seed": "-1"}, ("seed=-1",)),
        ({"model": "Model()"}, ("model is a Model that is built already", "model=lambda:")),
        ({"steps": "None"}, ("nobody said how long to train", "steps=1000")),
    ],
)
def test_a_job_that_cannot_be(train, pieces, words):
    train(**pieces).fails(2, *words)


def test_a_failure_is_kept_in_the_run(train, folder):
    done = train(extra="raise ValueError('kept')")
    assert "log: runs/job-001/logs/rank0.log" in done.fails(71, "exit status 71")
    log = (folder / "runs/job-001/logs/rank0.log").read_text()
    assert "Traceback (most recent call last)" in log
    assert "ValueError: kept" in log
