"""Other launchers' contracts, with real processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from .conftest import script  # noqa: TID252  pytest's importlib mode has no other way

pytestmark = [pytest.mark.mp, pytest.mark.timeout(60)]

BODY = """
    if rank == 1 and "FAIL" in os.environ:
        raise ValueError("label 50 is out of range")
    say(f"sum{rank}", f"{contract.engine} {contract.hosted} {total(comm, rank + 1)}")
    """


def torchrun(tmp_path, **environ):
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--nnodes=1",
         "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", str(script(tmp_path, BODY))],
        cwd=tmp_path,
        env={**os.environ, **environ},
        check=False,
        capture_output=True,
        text=True,
    )  # fmt: skip


def test_torchrun_whose_agent_keeps_the_store(tmp_path):
    done = torchrun(tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "sum0").read_text() == "torchrun True 3.0"
    assert (tmp_path / "sum1").read_text() == "torchrun True 3.0"


def test_a_rank_that_fails_under_torchrun_says_so_itself(tmp_path):
    done = torchrun(tmp_path, FAIL="1", MESHWRIGHT_RUN_DIR=str(tmp_path / "run"))
    assert done.returncode != 0
    assert "rank 1 failed: ValueError: label 50 is out of range" in done.stderr
    assert (tmp_path / "run" / "failures" / "rank1.json").exists()


def test_bare_variables_where_rank_0_keeps_the_store(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    path = script(tmp_path, BODY)
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(path)], cwd=tmp_path, env={**common, "RANK": str(rank)}
        )
        for rank in (1, 0)
    ]
    try:
        assert [rank.wait(40) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert (tmp_path / "sum0").read_text() == "torchrun False 3.0"


def test_a_taken_port_is_told_with_its_remedy(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        environ = {
            **os.environ,
            "RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(taken.getsockname()[1]),
        }
        done = subprocess.run(
            [sys.executable, str(script(tmp_path, BODY))],
            env=environ, check=False, capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 2
    said = " ".join(done.stderr.split())
    assert "rank 0 cannot listen on 127.0.0.1:" in said
    assert "Address already in use; choose a free port, and an address of rank 0's host" in said
    assert "rank 1" not in said
