"""Ranks that fail alone, are killed, or were started with other plans, code or data."""

from __future__ import annotations

import json
import re
import socket
import sys

import pytest

from meshwright.comm.base import Comm
from meshwright.errors import UsageError
from meshwright.launch.userfile import load_job
from meshwright.plan.plan import Plan
from meshwright.run.describe import facts_of
from meshwright.run.session import open_session
from tests.bad_input.conftest import ended, step_losses
from tests.bad_input.jobs import write_job
from tests.run.crew import crew

ONE_RAISES = {
    "data": """
        class Data(Data):
            def __getitem__(self, index):
                if index == 13:
                    raise ValueError("only here")
                return super().__getitem__(index)
        """,
    "model": """
        class Model(Model):
            def forward(self, x):
                if RANK == 1:
                    raise ValueError("only here")
                return super().forward(x)
        """,
    "loss": """
        def loss(model, batch):
            if RANK == 1:
                raise ValueError("only here")
            return (model(batch["x"]) - batch["y"]).square().mean()
        """,
}


@pytest.mark.mp
@pytest.mark.timeout(120)
@pytest.mark.parametrize("where", ONE_RAISES)
def test_an_exception_on_one_rank_is_told_once(shell, folder, where):
    write_job(folder / "job.py", ONE_RAISES[where], steps="8")
    said = shell("train", "job.py", "-n", 2).fails(71, "rank 1 failed: UserCodeError", "only here")
    assert said.count('raise ValueError("only here")') == 1
    assert "rank 0: PeerLost log: runs/job-001/logs/rank1.log exit status 71" in said
    log = (folder / "runs/job-001/logs/rank1.log").read_text()
    assert "Traceback (most recent call last)" in log


@pytest.mark.mp
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("plan", "dies"),
    [
        ("data=2", "True"),
        pytest.param(  # whose ranks all read the same samples
            "pipeline=2,schedule=1f1b,microbatches=4", "int(RANK) == 1", marks=pytest.mark.matrix
        ),
    ],
)
def test_a_killed_rank_is_named_and_the_others_end(plan, dies, shell, folder):
    extra = f"""
    class Data(Data):
        def __getitem__(self, index):
            if index == 13 and {dies}:
                Path("killed").write_text(f"{{RANK}} {{os.getpid()}} {{time.time()}}")
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__getitem__(index)
    """
    write_job(folder / "job.py", extra, steps="8")
    said = shell("train", "job.py", "--plan", plan).fails(75, "exit status 75")
    rank, pid, killed = (folder / "killed").read_text().split()
    assert f"rank {rank} (pid {pid}) was killed by SIGKILL rank {1 - int(rank)}: PeerLost" in said
    left = json.loads((folder / f"runs/job-001/failures/rank{1 - int(rank)}.json").read_text())
    assert left["time"] - float(killed) < 10


@pytest.mark.mp
@pytest.mark.timeout(120)
def test_shapes_that_differ_between_ranks_are_exact_and_noted(shell, mw, folder):
    extra = """
    def collate(samples):
        longest = max(int(s["x"][0] * 64) % 5 for s in samples) + 4
        x = torch.zeros(len(samples), longest)
        for row, sample in zip(x, samples):
            row[:4] = sample["x"]
        return {"x": x, "y": torch.stack([s["y"] for s in samples])}

    class Model(Model):
        def forward(self, x):
            return super().forward(x[:, :4]) + x.shape[1] * x.sum(1, keepdim=True)
    """
    write_job(folder / "job.py", extra, collate="collate", batch_size="4", steps="6")
    done = shell("train", "job.py", "-n", 2, "--run-dir", "two")
    done.works("collate to different shapes", "exact, but slower", "step 6/6")
    mw("train", "job.py", "--run-dir", "one").works("step 6/6")
    one, two = step_losses(folder / "one"), step_losses(folder / "two")
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.mp
@pytest.mark.timeout(120)
def test_pushed_batches_that_differ_between_ranks(shell, folder):
    write_job(folder / "job.py")
    (folder / "loop.py").write_text(
        "from job import RANK, job, mw, torch\n"
        "with mw.Run(job) as run:\n"
        "    run.step({'x': torch.ones(4, 4 + RANK), 'y': torch.ones(4, 1)}, part='local')\n"
    )
    done = shell("launch", "-n", 2, "--", sys.executable, "loop.py")
    done.fails(71, "run.step() in step 1 has other shapes", "on other ranks", "loop.py:3")


@pytest.fixture
def by_hand(start):
    """Start two ranks by torchrun's variables, each with words of its own; how they end."""

    def run(first, second, port, **environ):
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = [
            start(*words, environ={**common, **environ, "RANK": str(rank)})
            for rank, words in enumerate((first, second))
        ]
        return [ended(rank) for rank in ranks]

    return run


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@pytest.mark.mp
@pytest.mark.timeout(120)
def test_ranks_with_other_plans(by_hand, folder):
    write_job(folder / "job.py")
    words = ("train", "job.py", "--run-dir", "run", "--plan")
    for done in by_hand((*words, "data=2"), (*words, "zero3"), free_port()):
        done.fails(2, "ranks differ", "plan is 'data=2' on rank 0 and 'zero3,data=2' on rank 1")


@pytest.mark.mp
@pytest.mark.timeout(120)
def test_a_port_that_is_taken(by_hand, folder):
    write_job(folder / "job.py")
    words = ("train", "job.py", "--run-dir", "run")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        first, second = by_hand(words, words, port, MESHWRIGHT_TIMEOUT="5")
    where = f"127.0.0.1:{port} (MASTER_ADDR:MASTER_PORT)"
    first.fails(2, f"cannot listen on {where}: Address already in use", "choose a free port")
    second.fails(73, f"reached {where}, but no store answered", "another program holds the port")


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        ({"model": "lambda: Model(8 + {rank})"}, "parameters is"),
        ({"model": "Model().double if {rank} else Model"}, "parameters is"),
        ({"batch_size": "8 + {rank}"}, "batch_size is '8' on rank 0 and '9' on rank 1"),
        ({"seed": "{rank}"}, "seed is '0' on rank 0 and '1' on rank 1"),
        ({"steps": "3 + {rank}"}, "steps is '3' on rank 0 and '4' on rank 1"),
        ({"data": "lambda: Data(64 + {rank})"}, "samples in the data is '64' on rank 0 and '65'"),
        (
            {"optimizer": "lambda m: torch.optim.SGD(m.parameters(), lr=0.1 + {rank})"},
            "lr of optimizer group 0 is '0.1' on rank 0 and '1.1' on rank 1",
        ),
    ],
    ids=["width", "dtype", "batch", "seed", "steps", "data", "lr"],
)
def test_ranks_with_other_code(folder, pieces, words):
    def body(comm: Comm):
        rank = comm.world.rank
        path = folder / f"job{rank}.py"
        write_job(path, **{name: text.format(rank=rank) for name, text in pieces.items()})
        session = open_session(load_job(str(path)), Plan(data=2), comm)
        session.handshake(facts_of(session))

    with pytest.raises(UsageError, match=re.escape(words)) as caught:
        crew(2, body)
    assert caught.value.exit_status == 2
    assert "start every rank with the same code" in str(caught.value)


def test_ranks_whose_losses_differ_are_told_the_first_op(folder):
    def body(comm: Comm):
        path = folder / f"job{comm.world.rank}.py"
        write_job(path, loss=f"lambda m, b: m(b['x']).mean() * {comm.world.rank + 2}")
        open_session(load_job(str(path)), Plan(data=2), comm).run_step()

    told = (
        r"the first op of the model or loss that differs is 'mul\(%\d+, 2\) at job0.py:\d+' on "
        r"rank 0 and 'mul\(%\d+, 3\) at job1.py:\d+' on rank 1"
    )
    with pytest.raises(UsageError, match=told):
        crew(2, body)
