"""`mw train` in this process: runs, resuming, failures and their statuses."""

from __future__ import annotations

import json

import pytest

from meshwright.cli.train import spelled_out


def records(path):
    """The lines of a metrics file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_is_written_and_told(mw, folder):
    done = mw("train", "sums.py", "--json", "--set", "width=4", "--set", "lr=0.1")
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert found["run_dir"] == "runs/sums-001"
    assert (found["steps"], found["ranks"], found["plan"]) == (3, 1, "data=1")
    assert found["evaluation"]["loss"] > 0
    run = json.loads((folder / "runs/sums-001/run.json").read_text())
    assert (run["file"], run["name"], run["status"]) == ("sums.py", "job", "ok")
    assert run["command"] == "mw train sums.py --set width=4 --set lr=0.1"
    assert next(p["shape"] for p in run["parameters"] if p["name"] == "up.weight") == [4, 8]
    lines = records(folder / "runs/sums-001/metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert lines[0]["lr"] == 0.1


def test_for_people_the_result_says_where_to_look(mw):
    done = mw("train", "sums.py", "--steps", "1")
    assert "mw report runs/sums-001" in done.out
    assert "step 1/1" in done.err


def test_what_the_users_code_prints_is_kept_out_of_json(mw, folder):
    noisy = (folder / "sums.py").read_text() + "\nprint('hello from the file')\n"
    (folder / "noisy.py").write_text(noisy)
    done = mw("train", "noisy.py", "--steps", "1", "--json")
    assert json.loads(done.out)["steps"] == 1
    assert "hello from the file" in done.err


def test_the_seed_of_the_command_replaces_the_jobs(mw):
    losses = [
        json.loads(mw("train", "sums.py", "--steps", "1", "--json", *more).out)["loss"]
        for more in ([], ["--seed", 0], ["--seed", 1])
    ]
    assert losses[0] == losses[1] != losses[2]


def test_a_run_folder_is_gone_on_with_unless_fresh(mw, folder):
    words = ("train", "sums.py", "--run-dir", "out", "--json")
    whole = json.loads(mw("train", "sums.py", "--steps", 6, "--json").out)
    assert json.loads(mw(*words, "--steps", 3).out)["steps"] == 3
    done = mw(*words, "--steps", 6)
    assert "resumed at step 3 from out" in done.err
    assert json.loads(done.out)["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    refused = mw(*words, "--fresh")
    assert refused.status == 2
    assert "out is not empty" in refused.err
    (folder / "out" / "mine.txt").write_text("kept")
    anew = mw(*words, "--fresh", "--overwrite", "--steps", 2)
    assert json.loads(anew.out)["steps"] == 2
    assert [line["step"] for line in records(folder / "out/metrics.jsonl") if "loss" in line] == [
        1,
        2,
    ]
    assert (folder / "out" / "mine.txt").read_text() == "kept"


def test_resume_takes_the_newest_run(mw):
    mw("train", "sums.py", "--steps", 1)
    mw("train", "sums.py", "--steps", 2)
    done = mw("train", "sums.py", "--steps", 4, "--resume", "--json")
    assert json.loads(done.out)["run_dir"] == "runs/sums-002"
    assert "resumed at step 2" in done.err


def test_a_run_folder_in_the_environment_is_taken(mw, folder, monkeypatch):
    monkeypatch.setenv("MESHWRIGHT_RUN_DIR", str(folder / "there"))
    assert mw("train", "sums.py", "--steps", 1).status == 0
    assert (folder / "there" / "metrics.jsonl").exists()


def test_evaluations_and_checkpoints_come_as_often_as_asked(mw, folder):
    words = ("--evaluate-every", 2, "--checkpoint-every", 2, "--run-dir", "out")
    assert mw("train", "sums.py", "--steps", 4, *words).status == 0
    lines = records(folder / "out" / "metrics.jsonl")
    assert [line["step"] for line in lines if "evaluation" in line] == [2, 4]
    found = sorted(p.name for p in (folder / "out" / "checkpoints").glob("step-*"))
    assert [int(name.removeprefix("step-")) for name in found] == [2, 4]


def test_the_eager_door(mw):
    traced = json.loads(mw("train", "sums.py", "--json").out)
    eager = json.loads(mw("train", "sums.py", "--json", "--eager").out)
    assert eager["loss"] == pytest.approx(traced["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("bad", "told", "line"),
    [
        ("data", "dataset[77] raised ValueError: row 77 is damaged", "raise ValueError"),
        ("loss", "no loss today", "raise ArithmeticError"),
    ],
)
def test_the_users_error_is_told_short_with_his_line_and_kept(mw, folder, bad, told, line):
    done = mw("train", "sums.py", "--set", f"bad={bad}", "--steps", 8)
    assert (done.status, done.out) == (71, "")
    text = done.err[done.err.index("rank 0 failed:") :]
    assert told in text
    assert line in text
    assert "sums.py:" in text
    assert len(text.splitlines()) <= 12
    record = json.loads((folder / "runs/sums-001/failures/rank0.json").read_text())
    assert record["status"] == 71
    assert "Traceback" in (folder / "runs/sums-001/logs/rank0.log").read_text()


@pytest.mark.parametrize(
    ("text", "status", "told"),
    [
        ("import no_such_thing", 71, "No module named 'no_such_thing'"),
        ("def f(:", 71, "SyntaxError"),
        ("raise SystemExit(3)", 71, "exit(3)"),
        ("import meshwright as mw\nmw.Job(None, None, None, None, 3)", 2, "model is None"),
        ("x = 1", 2, "has no 'job'; define `job = mw.Job(...)`"),
        ("", 2, "has no 'job'"),
    ],
)
def test_a_file_that_is_no_job(mw, folder, text, status, told):
    (folder / "wrong.py").write_text(text)
    done = mw("train", "wrong.py")
    assert done.status == status, done.err
    assert told in done.err


def test_ctrl_c_is_130(mw, folder):
    (folder / "stopped.py").write_text("raise KeyboardInterrupt")
    done = mw("plan", "stopped.py")
    assert (done.status, done.err) == (130, "mw: interrupted\n")


def test_steps_are_traced(mw, folder):
    assert mw("train", "--trace", "sums.py").status == 0
    whole = json.loads((folder / "runs/sums-001/trace.json").read_text())
    steps = [e["args"]["step"] for e in whole["traceEvents"] if e.get("cat") == "step"]
    assert steps == [3]  # two warm up, and there are three
    done = mw("train", "sums.py", "--trace", "1-2")
    assert "trace of steps 1 to 2 written to runs/sums-002/trace.json" in done.err


@pytest.mark.parametrize(
    ("steps", "told"), [("7-3", "'7-3'"), ("2-x", "'2-x'"), ("3-9", "takes steps 1 to 3")]
)
def test_steps_that_cannot_be_traced_are_refused_before_the_first(mw, folder, steps, told):
    done = mw("train", "sums.py", "--trace", steps)
    assert done.status == 2
    assert told in done.err
    assert "step 1" not in done.err.replace("steps 1", "")


def test_the_steps_of_trace_may_be_left_out():
    assert spelled_out(["train", "a.py", "--trace"]) == ["train", "a.py", "--trace", "auto"]
    assert spelled_out(["train", "--trace", "a.py"]) == ["train", "--trace", "auto", "a.py"]
    assert spelled_out(["train", "--trace", "--json"]) == ["train", "--trace", "auto", "--json"]
    for given in (["--trace", "3"], ["--trace", "3-7"], ["--trace", "auto"], ["--trace=2"]):
        assert spelled_out(["train", *given, "a.py"]) == ["train", *given, "a.py"]
