"""What users call: `Run`, `train`, `watch`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import meshwright as mw
from meshwright.api import plans
from meshwright.api import run as api
from meshwright.comm.base import World
from meshwright.errors import StorageError, UsageError, UserCodeError
from meshwright.launch.contract import Contract
from meshwright.launch.local import launch
from tests.run.crew import crew
from tests.run.jobs import Points, alone, job, losses, weighted_loss


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(made, **how):
    return mw.Run(made, how.pop("plan", "data=1"), run_dir="r", quiet=True, **how)


def lines(folder="r"):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def runs_of(size, body, monkeypatch):
    """`body()` on `size` ranks of this process, each of which `Run` takes for a world's."""
    here = threading.local()
    monkeypatch.setattr(api, "connect", lambda contract: here.comm)
    monkeypatch.setattr(
        api, "here", lambda: Contract(World(here.comm.world.rank, size), engine="none")
    )

    def rank(comm):
        here.comm = comm
        return body()

    return crew(size, rank)


# ── the loop ─────────────────────────────────────────────────────────────────────────────────────


def test_the_loop_in_the_users_hands():
    made = job(loss=weighted_loss, evaluation=lambda: Points(20))
    with run(made) as r:
        seen = []
        for step in r.steps(until=3):
            metrics = r.step()
            r.log(square=step**2)
            seen.append(metrics.loss)
        found = r.evaluate()
        assert (r.step_number, r.rank, r.lr) == (3, 0, pytest.approx(1e-2))
    assert seen == losses(alone(made), 3)
    records = lines()
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3]
    assert [record["loss"] for record in steps] == seen
    assert [record.get("square") for record in steps] == [None, 0, 1]
    assert steps[0]["samples"] == 12
    assert set(steps[0]["time"]) == {"data", "compute", "communication", "update"}
    assert steps[0]["accuracy"] == pytest.approx(metrics_of(made)["accuracy"])
    assert records[-1] == {"step": 3, "evaluation": found}
    told = json.loads(Path("r/run.json").read_text())
    assert (told["status"], told["plan"]) == ("ok", "data=1")


def metrics_of(made):
    return alone(made).run_step().metrics.metrics


@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_calls_it_alike(size, monkeypatch):
    made = job(evaluation=lambda: Points(20))

    def body():
        with run(made, plan=f"zero3,data={size}") as r:
            seen = [r.step().loss for _ in r.steps(until=3)]
            found = r.evaluate()
            rows = r.predict(Points(4), lambda model, batch: model(batch["x"]))
            r.extra["rank"] = "any"
            path = r.save()
            r.export("out")
            return seen, found, rows, path, r.module()

    (seen, found, rows, path, model), *others = runs_of(size, body, monkeypatch)
    want = alone(made)
    assert seen == pytest.approx(losses(want, 3), rel=1e-5)
    assert found == pytest.approx(want.evaluate(), rel=1e-5)
    for other in others:
        assert other[:2] == (seen, found)
        assert torch.equal(other[2], rows)
        assert other[3:] == (path, None)
    assert all(
        torch.equal(t, load_file("out/model.safetensors")[n]) for n, t in model.state_dict().items()
    )
    assert [r["step"] for r in lines() if "loss" in r] == [1, 2, 3]


def test_a_run_works_inside_with():
    r = run(job())
    with pytest.raises(UsageError, match=r"inside `with mw.Run\(job\) as run:`"):
        r.step()


def test_a_run_can_be_entered_again_and_goes_on():
    made = job()
    want = losses(alone(made), 4)
    r = run(made)
    seen = []
    for until in (2, 4):
        with r:
            seen += [r.step().loss for _ in r.steps(until=until)]
            r.save()
        assert json.loads(Path("r/run.json").read_text())["status"] == "ok"
    assert seen == want
    assert [record["step"] for record in lines() if "loss" in record] == [1, 2, 3, 4]


def test_two_runs_in_one_process():
    first = mw.train(job(), steps=2, run_dir="a", quiet=True)
    second = mw.train(job(), steps=2, run_dir="b", quiet=True)
    assert first | {"run_dir": ""} == second | {"run_dir": ""}


def test_an_exception_inside_ends_the_run_as_failed():
    def body():
        with run(job()) as r:
            r.step()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        body()
    assert json.loads(Path("r/run.json").read_text())["status"] == "failed"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    mw.train(job(), steps=1, run_dir="after", quiet=True)


def test_batches_of_ones_own():
    made = job()
    session = alone(made)
    batches = [session.worker.source.fetch(k, 0, 12, (0, 12)).tree for k in range(3)]
    with run(made) as r:
        seen = [
            r.step(batches[0]).loss,
            r.step(batches[1], part="local").loss,
            r.step(batches[2], part="global").loss,
        ]
        with pytest.raises(UsageError, match="part='mine'; use 'global' or 'local'"):
            r.step(batches[0], part="mine")
    assert seen == pytest.approx(losses(session, 3))


def test_batches_of_ones_own_are_described_not_the_jobs():
    """The job's own data may be of another form, and is never looked at."""

    class Untouched(Points):
        def __getitem__(self, index):
            raise AssertionError("looked at")

    batch = alone(job()).worker.source.fetch(0, 0, 12, (0, 12)).tree
    with run(job(data=Untouched)) as r:
        assert r.step(batch).loss > 0


# ── watching ─────────────────────────────────────────────────────────────────────────────────────


class Shown(nn.Module):
    """Shows its input, a mean over samples, and the same name twice."""

    def forward(self, x):
        mw.watch("hidden", x)
        mw.watch("mean", x.mean(0))
        return mw.watch("hidden", x * 2) / 2


@pytest.mark.parametrize("plan", ["data=2", "zero3,data=3", "pipeline=2"])
def test_a_watched_tensor_is_the_global_one(plan, monkeypatch):
    from tests.run.jobs import Net

    made = job(model=lambda: Net(Shown()))
    model = alone(made).module()
    x = alone(made).worker.source.fetch(0, 0, 12, (0, 12)).tree["x"]
    with torch.no_grad():
        want = torch.tanh(model.up(x))

    def body():
        with run(made, plan=plan) as r:
            return r.step().watched  # of one micro-batch, over all ranks

    for watched in runs_of(int(plan[-1]), body, monkeypatch):
        assert set(watched) == {"hidden", "mean", "hidden#2"}
        torch.testing.assert_close(watched["hidden"], want)
        torch.testing.assert_close(watched["hidden#2"], want * 2)
        torch.testing.assert_close(watched["mean"], want.mean(0))


def test_outside_a_run_watching_does_nothing():
    x = torch.ones(3)
    assert mw.watch("x", x) is x


# ── train ────────────────────────────────────────────────────────────────────────────────────────


def test_train_from_start_to_end():
    called = []
    made = job(evaluation=lambda: Points(20))
    summary = mw.train(
        made,
        steps=5,
        plan="data=1",
        evaluate_every=2,
        checkpoint_every=2,
        on_step=[lambda r, metrics: called.append((r.step_number, metrics.loss))],
        run_dir="r",
        quiet=True,
        keep=5,
    )
    session = alone(made)
    want = losses(session, 5)
    assert called == list(enumerate(want, 1))
    assert summary == {
        "run_dir": "r",
        "steps": 5,
        "loss": want[-1],
        "evaluation": session.evaluate(),
        "plan": "data=1",
        "ranks": 1,
    }
    assert [r["step"] for r in lines() if "evaluation" in r] == [2, 4, 5]
    saved = sorted(path.name for path in Path("r/checkpoints").iterdir())
    assert saved == ["step-00000002", "step-00000004", "step-00000005"]


def test_train_goes_on_from_its_folder():
    made = job()
    mw.train(made, steps=3, run_dir="r", quiet=True)
    summary = mw.train(made, steps=5, run_dir="r", quiet=True)
    assert summary["loss"] == losses(alone(made), 5)[-1]
    records = lines()
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5]
    assert any(r.get("note") == "resumed at step 3 from r" for r in records)
    again = mw.train(made, steps=5, run_dir="r", quiet=True)
    assert (again["steps"], again["loss"]) == (5, None)


def test_lines_past_the_checkpoint_are_taken_again():
    made = job()
    with run(made) as r:
        for _ in r.steps(until=4):
            r.step()
            if r.step_number == 2:
                r.save()
    mw.train(made, steps=5, run_dir="r", quiet=True)
    assert [r["step"] for r in lines() if "loss" in r] == [1, 2, 3, 4, 5]


def test_extra_is_there_after_a_resume():
    with run(job()) as r:
        r.step()
        r.extra["best"] = {"loss": 1.5, "at": [1, 2]}
        r.save()
    with run(job()) as r:
        assert r.extra == {"best": {"loss": 1.5, "at": [1, 2]}}


def test_evaluate_with_metrics_of_ones_own():
    def most(model, batch):
        logits = model(batch["x"])
        return {"right": (logits.argmax(-1) == batch["y"]).float().mean()}

    made = job(loss=weighted_loss)
    with run(made) as r:
        found = r.evaluate(Points(24, seed=9), metrics=most)
        r.evaluate(Points(24, seed=9), metrics=most)
        assert len(r.session.build.units) == 1
        model = r.module()
    data = Points(24, seed=9)
    with torch.no_grad():
        right = (model(data.x).argmax(-1) == data.y).float().mean()
    assert found["right"] == pytest.approx(float(right))
    assert set(found) == {"loss", "accuracy", "spread", "right"}


def test_loggers_get_every_record():
    got = []
    mw.train(job(), steps=2, run_dir="r", quiet=True, loggers=[got.append])
    assert [record["step"] for record in got] == [1, 2]
    events = list(Path("r/tensorboard").iterdir())
    assert len(events) == 1
    assert events[0].stat().st_size > 100


@pytest.mark.parametrize("name", ["loss", "step", "lr", "time"])
def test_names_that_records_keep_for_themselves(name):
    def loss(model, batch):
        return model(batch["x"]).mean(), {name: 1.0}

    with run(job(loss=loss)) as r, pytest.raises(UserCodeError, match=f"metric '{name}'.*another"):
        r.step()
    with run(job()) as r, pytest.raises(UsageError, match=rf"run.log\({name}=.*another name"):
        r.log(**{name: 1.0})


def test_a_periodic_save_that_fails_is_told_the_last_one_ends_the_run():
    with run(job()) as r:
        r.step()
        Path("r/checkpoints").write_text("in the way")
        assert r.save() is None
        with pytest.raises(StorageError):
            r.save(last=True)
    assert any("was not saved, training goes on" in record.get("note", "") for record in lines())


def test_auto_is_the_first_ranks_choice(monkeypatch):
    """Free memory differs from rank to rank; the plan must not."""
    texts = iter(["zero1,data=2", "data=2"])
    monkeypatch.setattr(plans, "choose_plan", lambda job, world: mw.Plan.parse(next(texts)))

    def body():
        with run(job(), plan="auto") as r:
            r.step()
            return r.plan.text()

    assert runs_of(2, body, monkeypatch) == ["zero1,data=2"] * 2
    assert any("time was not compared" in record.get("note", "") for record in lines())


# ── signals, in real processes ───────────────────────────────────────────────────────────────────

SCRIPT = """
import sys
sys.path.insert(0, {root!r})
import meshwright as mw
from tests.run.jobs import job

if __name__ == "__main__":
    {body}
"""


def script(body):
    path = Path("script.py")
    root = str(Path(__file__).parents[1])
    path.write_text(SCRIPT.format(root=root, body=textwrap.indent(body, "    ").strip()))
    return path


def until(condition, seconds=60.0):
    """Poll; a deadline is the only sleep that matters."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def stepped():
    file = Path("r/metrics.jsonl")
    return file.exists() and '"loss"' in file.read_text()


def stopped(number):
    """What a run that a signal ended leaves: the last step saved, and said."""
    (saved,) = Path("r/checkpoints").iterdir()
    steps = [record["step"] for record in lines() if "loss" in record]
    assert saved.name == f"step-{steps[-1]:08d}"
    assert json.loads(Path("r/run.json").read_text())["status"] == "stopped"
    assert any(f"stopped by signal {int(number)}" in r.get("note", "") for r in lines())


def test_a_signal_ends_the_step_saves_and_exits():
    path = script("mw.train(job(), steps=10**7, run_dir='r', quiet=True)")
    process = subprocess.Popen([sys.executable, str(path)])
    try:
        until(lambda: stepped() or process.poll() is not None)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
    finally:
        process.kill()
    stopped(signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_other_signals_do_the_same(number):
    def send(r, metrics):
        if r.step_number == 2:
            os.kill(os.getpid(), number)

    with pytest.raises(SystemExit) as caught:
        mw.train(job(), steps=9, run_dir="r", quiet=True, on_step=[send])
    assert caught.value.code == 128 + number
    stopped(number)
    assert mw.train(job(), steps=4, run_dir="r", quiet=True)["steps"] == 4


@pytest.mark.mp
def test_two_runs_one_after_the_other_on_two_ranks(capfd):
    path = script(
        "for name in ('a', 'b'):\n"
        "    mw.train(job(), steps=2, plan='zero2', run_dir=name, quiet=True)\n"
    )
    status = launch(2, [sys.executable, str(path)], run_dir=Path("r"))
    assert status == 0, capfd.readouterr().err
    first, second = lines("a"), lines("b")
    assert [r["loss"] for r in first if "loss" in r] == [r["loss"] for r in second if "loss" in r]


# ── traces ───────────────────────────────────────────────────────────────────────────────────────


def traced_steps(folder="r"):
    whole = json.loads((Path(folder) / "trace.json").read_text())
    steps = [e for e in whole["traceEvents"] if e.get("cat") == "step"]
    return sorted((event["pid"], event["args"]["step"]) for event in steps)


def test_steps_are_traced_on_every_rank_and_a_loop_that_ends_early_keeps_its_own(monkeypatch):
    made = job()

    def body():
        with run(made, plan="zero1,data=2", trace="2-9") as trained:
            for _ in range(3):
                trained.step()

    runs_of(2, body, monkeypatch)
    assert traced_steps() == [(rank, step) for rank in (0, 1) for step in (2, 3)]
    assert any("trace of steps 2 to 3" in line.get("note", "") for line in lines())


def test_an_error_leaves_the_part_and_no_merged_trace():
    def body():
        with run(job(), trace=True) as trained:
            for number in trained.steps(until=9):
                trained.step()
                if number == 4:
                    raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        body()
    part = [json.loads(line) for line in Path("r/trace/rank0.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in part if "step" in entry] == [3, 4, 5]
    assert not Path("r/trace.json").exists()


# ── explain ──────────────────────────────────────────────────────────────────────────────────────


def test_explain_says_what_the_plan_means_and_starts_nothing():
    found = mw.explain(job(), "zero3,data=4")
    assert found["plan"] == "zero3,data=4"
    assert len(found["mesh"]["ranks"]) == 4
    assert found["traffic"]["bytes"] == sum(row["bytes"] for row in found["collectives"]) > 0
    assert not Path("runs").exists()


def test_explain_fills_the_ranks_there_are():
    assert mw.explain(job(), "zero1", ranks=3)["plan"] == "zero1,data=3"
    assert mw.explain(job(), mw.Plan(zero=1, data=2))["plan"] == "zero1,data=2"
    assert mw.explain(job(), ranks=2)["plan"] == "data=2"


def test_a_budget_in_a_test_of_the_users():
    moved = mw.explain(job(), "data=2")["traffic"]["bytes"]
    mw.explain(job(), "data=2", max_bytes=moved, memory="1GiB")
    with pytest.raises(
        mw.MeshwrightError, match=r"(?s)moves .* the budget is .*to move less"
    ) as error:
        mw.explain(job(), "data=2", max_bytes=moved - 1)
    assert error.value.exit_status == 2
    with pytest.raises(UsageError, match="max_bytes takes bytes"):
        mw.explain(job(), "data=2", max_bytes="2 Mi")
    with pytest.raises(UsageError, match=r"but there are 1\.0 KiB"):
        mw.explain(job(), "data=2", memory="1KiB")
