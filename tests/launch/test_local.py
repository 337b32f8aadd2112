"""The supervisor with real processes: who failed, with which status, and nothing left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from meshwright.errors import UsageError
from meshwright.launch.local import launch

from .conftest import script  # noqa: TID252  pytest's importlib mode has no other way

pytestmark = [pytest.mark.mp, pytest.mark.timeout(60)]


def nothing_runs(run_dir: Path) -> bool:
    """Whether no process has this run's folder in its environment."""
    for process in psutil.process_iter():
        try:
            if process.environ().get("MESHWRIGHT_RUN_DIR") == str(run_dir):
                return False
        except psutil.Error:
            continue
    return True


def ended(pid: int) -> bool:
    """Whether a process is dead within five seconds, if perhaps not yet reaped by its parent."""
    poll = threading.Event()
    for _ in range(100):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        poll.wait(0.05)
    return False


def test_ranks_meet_and_rank_0_speaks(ranks):
    done = ranks(
        3,
        """
        print("sum", total(comm, rank), "threads", torch.get_num_threads(), contract.plan)
        print("to stderr", file=sys.stderr)
        import subprocess
        say(f"children{rank}", subprocess.run(["env"], capture_output=True, text=True).stdout)
        """,
        plan="zero1",
    )
    assert done.status == 0, done.err
    assert done.out == "sum 3.0 threads 1 zero1\n"
    assert done.err == "to stderr\n"
    assert "sum 3.0" in done.log(2)
    assert sorted(done.log(0).splitlines()) == ["sum 3.0 threads 1 zero1", "to stderr"]
    # The token is 64 hex digits; neither the environment nor a log holds such a word.
    text = Path("children1").read_text() + done.log(1) + done.err
    assert not [word for word in text.replace("=", " ").split() if len(word) == 64]
    assert nothing_runs(done.run_dir)


@pytest.mark.parametrize(
    ("comm", "kept", "other"),
    [
        ("gloo", ["127.0.0.1", "127.0.0.1"], ["127.0.0.1"]),  # the store's and gloo's
        ("shared", ["127.0.0.1"], []),  # the store's
    ],
)
def test_all_listening_sockets_are_on_loopback(ranks, monkeypatch, comm, kept, other):
    monkeypatch.setenv("MESHWRIGHT_COMM", comm)
    done = ranks(
        2,
        """
        total(comm, 1)
        import psutil
        listening = [c.laddr.ip for c in psutil.Process().net_connections()
                     if c.status == psutil.CONN_LISTEN]
        total(comm, 1)
        print(sorted(listening))
        """,
    )
    assert done.status == 0, done.err
    assert done.out == f"{kept}\n"
    assert done.log(1) == f"{other}\n"


def test_a_failing_rank_is_told_once_with_the_users_line(ranks):
    done = ranks(
        3,
        """
        total(comm, 1)
        if rank == 1:
            raise ValueError("label 50 is out of range")
        total(comm, 1, label="gradient of w")
        """,
    )
    assert done.status == 71
    lines = done.err.splitlines()
    assert len(lines) <= 12
    assert lines[0] == "rank 1 failed: ValueError: label 50 is out of range"
    assert "worker.py" in lines[1]
    assert "raise ValueError" in lines[2]
    assert "rank 0: PeerLost" in done.err or "ranks 0, 2: PeerLost" in done.err
    assert lines[-2] == "log: run/logs/rank1.log"
    assert lines[-1] == "exit status 71"
    assert done.err.count("Traceback") == 0
    assert "Traceback" in done.log(1)
    assert "rank 1 ended: ValueError: label 50" in done.log(0)
    assert (done.run_dir / "ledger" / "rank0.json").exists()
    assert nothing_runs(done.run_dir)


def test_a_killed_rank_is_named_and_the_others_end_within_seconds(ranks):
    begun = time.monotonic()
    done = ranks(
        3,
        """
        total(comm, 1)
        if rank == 2:
            say("died")
            os.kill(os.getpid(), signal.SIGKILL)
        while True:
            total(comm, 1, label="loss")
        """,
    )
    took = time.time() - Path("died").stat().st_mtime
    assert done.status == 75
    assert "rank 2 (pid " in done.err.splitlines()[0]
    assert done.err.splitlines()[0].endswith(") was killed by SIGKILL")
    assert took < 8, (took, time.monotonic() - begun)
    assert "rank 2 (pid" in done.log(0) + done.log(1)
    assert "is gone" in done.log(0) + done.log(1)
    assert nothing_runs(done.run_dir)


def test_a_killed_rank_is_named_though_the_other_had_to_be_ended(ranks, tmp_path):
    dying = "if os.environ['RANK'] == '1':\n    os.kill(os.getpid(), 9)\n"
    (tmp_path / "deaf.py").write_text(f"import os, signal\n{dying}signal.pause()\n")
    done = ranks(2, command=[sys.executable, "deaf.py"], grace=0.2)
    assert done.status == 75
    assert "rank 1 (pid " in done.err.splitlines()[0]
    assert done.err.splitlines()[0].endswith(") was killed by SIGKILL")
    assert "rank 0" in done.err


def test_losing_rank_0_which_keeps_the_store_ends_the_others_too(ranks):
    done = ranks(
        2,
        """
        total(comm, 1)
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        total(comm, 1)
        """,
    )
    assert done.status == 75
    assert "rank 0 (pid " in done.err.splitlines()[0]
    assert nothing_runs(done.run_dir)


def test_a_stalled_rank_passes_the_deadline_and_is_named(ranks):
    done = ranks(
        2,
        """
        total(comm, 1)
        if rank == 1:
            signal.pause()
        total(comm, 1, label="gradient of w")
        """,
        timeout=4,
        grace=0.5,
    )
    assert done.status == 73
    said = " ".join(done.err.split())
    assert said.startswith("rank 0 failed: Stalled: all_reduce over world (gradient of w), call 2")
    assert "rank 1 did not come" in said
    assert nothing_runs(done.run_dir)


def test_a_plain_programs_status_is_passed_on_with_the_end_of_its_log(ranks):
    done = ranks(2, command=["sh", "-c", "echo working; echo no such file >&2; exit $((RANK * 9))"])
    assert done.status == 9
    assert "rank 1 failed: exit status 9; its log ends:" in done.err
    assert "no such file" in done.err


def test_helpers_of_a_rank_end_with_it(ranks):
    done = ranks(1, command=["sh", "-c", "sleep 1000 & echo $!"])
    assert done.status == 0
    assert ended(int(done.out))


def test_what_cannot_be_started_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="cannot start 'no-such-program'"):
        launch(2, ["no-such-program"], run_dir=tmp_path)
    with pytest.raises(UsageError, match="-n is 0"):
        launch(0, ["true"], run_dir=tmp_path)


def test_records_of_an_earlier_start_are_not_this_ones(ranks, tmp_path):
    (tmp_path / "run" / "failures").mkdir(parents=True)
    (tmp_path / "run" / "failures" / "rank0.json").write_text("{}")
    assert ranks(1, command=["true"]).status == 0
    assert not list((tmp_path / "run" / "failures").iterdir())


SUPERVISOR = """
import sys
from pathlib import Path
from meshwright.launch.local import launch
sys.exit(launch(2, [sys.executable, sys.argv[1]], run_dir=Path("run")))
"""

LOOP = """
    with listen() as stop:
        step = 0
        while True:
            step += 1
            if step == 2:
                say(f"ready{rank}.new", os.getpid())
                Path(f"ready{rank}.new").replace(f"ready{rank}")
            if total(comm, int(bool(stop))):
                say(f"saved{rank}", step)
                return 128 + signal.SIGTERM
    """


def supervised(tmp_path: Path, body: str) -> subprocess.Popen[str]:
    """A supervisor of two ranks in a process of its own, once both ranks are ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, str(script(tmp_path, body))],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 40
    poll = threading.Event()
    while not ((tmp_path / "ready0").exists() and (tmp_path / "ready1").exists()):
        assert time.monotonic() < end, "the ranks did not start"
        assert process.poll() is None, process.stderr.read()
        poll.wait(0.05)
    return process


def test_a_signal_reaches_the_ranks_which_finish_their_step_and_save(tmp_path):
    process = supervised(tmp_path, LOOP)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert (tmp_path / "saved0").read_text() == (tmp_path / "saved1").read_text()
    assert nothing_runs(tmp_path / "run")


def test_a_second_signal_ends_at_once_what_ignores_the_first(tmp_path):
    process = supervised(
        tmp_path,
        """
        signal.signal(signal.SIGINT, lambda *_: say(f"heard{rank}"))
        say(f"ready{rank}")
        while True:
            signal.pause()
        """,
    )
    process.send_signal(signal.SIGINT)
    poll = threading.Event()
    while not ((tmp_path / "heard0").exists() and (tmp_path / "heard1").exists()):
        poll.wait(0.05)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=5)
    assert process.returncode == 128 + signal.SIGINT
    assert nothing_runs(tmp_path / "run")


def test_no_rank_outlives_its_supervisor(tmp_path):
    process = supervised(tmp_path, LOOP)
    ranks = [int((tmp_path / f"ready{k}").read_text()) for k in (0, 1)]
    process.kill()
    process.communicate(timeout=5)
    assert all(ended(rank) for rank in ranks)


def test_the_workers_are_given_no_terminal_to_read(ranks):
    done = ranks(1, command=["sh", "-c", "cat; echo $OMP_NUM_THREADS"])
    assert done.out.strip() == str(len(os.sched_getaffinity(0)))
