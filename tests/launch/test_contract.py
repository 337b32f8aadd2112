from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.comm.base import World
from meshwright.errors import UsageError
from meshwright.launch.contract import Contract, read, write

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}


@st.composite
def contracts(draw):
    size = draw(st.integers(2, 64))
    rank = draw(st.integers(0, size - 1))
    local_size = draw(st.integers(1, size))
    return Contract(
        World(rank, size, draw(st.integers(0, min(rank, local_size - 1))), local_size),
        "meshwright",
        draw(st.sampled_from(["127.0.0.1", "node7"])),
        draw(st.integers(1, 65535)),
        draw(st.text("0123456789abcdef", min_size=64, max_size=64)),
        Path(draw(st.text("ab/ ", min_size=1)).strip() or "runs"),
        draw(st.sampled_from([None, "zero3,data=2"])),
        draw(st.integers(3, 99)) if rank == 0 else None,
        attempt=draw(st.sampled_from(["0", "7"])),
        timeout=draw(st.none() | st.floats(0.1, 1e6)),
    )


@given(contracts())
def test_what_is_written_is_read_back_and_the_token_is_not_in_it(contract):
    fd = os.memfd_create("token")
    try:
        os.write(fd, contract.token.encode())
        environ = write(contract, fd)
        assert contract.token not in str(environ)
        assert contract.token not in repr(contract)
        assert read(environ) == read(environ) == contract
    finally:
        os.close(fd)


def test_no_variables_are_a_world_of_one():
    assert read({}) == Contract()
    assert read({}).world == World(0, 1, 0, 1)


def test_torchrun():
    environ = {
        **TORCHRUN,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": "abc",
        "TORCHELASTIC_RESTART_COUNT": "2",
    }
    contract = read(environ)
    assert contract.world == World(3, 4, 1, 2)
    assert (contract.engine, contract.hosted, contract.attempt) == ("torchrun", True, "abc.2")
    assert (contract.address, contract.port, contract.token) == ("10.0.0.1", 29500, None)


def test_slurm_with_its_nodes():
    environ = {
        "SLURM_JOB_ID": "12",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "5",
        "SLURM_NTASKS": "7",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2),3",
        "SLURM_STEP_NODELIST": "gpu[07-09,12]",
    }
    contract = read(environ)
    assert contract.world == World(5, 7, 1, 3)
    assert contract.engine == "slurm"
    assert contract.address == "gpu07"
    assert 20_000 <= contract.port < 32_000
    assert read({**environ, "SLURM_PROCID": "6"}).port == contract.port
    assert read({**environ, "SLURM_JOB_ID": "13"}).port != contract.port


def test_a_slurm_batch_script_is_no_rank():
    assert read({"SLURM_JOB_ID": "12", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == Contract()


def test_open_mpi_on_one_host_needs_nothing_else():
    environ = {
        "OMPI_COMM_WORLD_RANK": "1",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        "PMIX_NAMESPACE": "prterun-1",
    }
    contract = read(environ)
    assert (contract.engine, contract.address) == ("openmpi", "127.0.0.1")
    spread = {**environ, "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    with pytest.raises(UsageError, match="MASTER_ADDR is not set"):
        read(spread)
    assert read({**spread, "MASTER_ADDR": "node1"}).address == "node1"


def test_pmi():
    assert read({"PMI_RANK": "0", "PMI_SIZE": "2"}).engine == "pmi"


def test_torchruns_variables_win_over_the_engine_it_runs_under():
    environ = {**TORCHRUN, "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}
    assert read(environ).world == World(3, 4, 1, 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"WORLD_SIZE": None}, "RANK is '3' but WORLD_SIZE is not set"),
        ({"RANK": None}, "WORLD_SIZE is '4' but RANK is not set"),
        ({"RANK": "4"}, "RANK=4 and WORLD_SIZE=4: ranks go from 0 to"),
        ({"RANK": "-1"}, "RANK is '-1'; it must be a whole number"),
        ({"RANK": "one"}, "RANK is 'one'"),
        ({"RANK": "٣"}, "RANK is '٣'"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE=0"),
        ({"LOCAL_RANK": "2"}, "local rank 2 of 2"),
        ({"LOCAL_RANK": None}, "LOCAL_WORLD_SIZE is '2' but LOCAL_RANK is not set"),
        ({"LOCAL_WORLD_SIZE": "5"}, "local rank 1 of 5"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": ""}, "MASTER_PORT is not set"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is 70000; ports go from 1 to 65535"),
        ({"MESHWRIGHT_TIMEOUT": "soon"}, "MESHWRIGHT_TIMEOUT is 'soon'; it is a positive number"),
        ({"MESHWRIGHT_TIMEOUT": "nan"}, "MESHWRIGHT_TIMEOUT is 'nan'"),
        ({"MESHWRIGHT_TIMEOUT": "-1"}, "MESHWRIGHT_TIMEOUT is '-1'"),
        ({"MESHWRIGHT_TOKEN_FD": "9999"}, "MESHWRIGHT_TOKEN_FD=9999 cannot be read"),
    ],
)
def test_what_contradicts_itself_is_refused_by_name_and_value(change, words):
    environ = {k: v for k, v in {**TORCHRUN, **change}.items() if v is not None}
    with pytest.raises(UsageError) as caught:
        read(environ)
    assert words in str(caught.value)


def test_a_token_file_must_be_private(tmp_path):
    path = tmp_path / "token"
    path.write_text("ab" * 32 + "\n")
    path.chmod(0o644)
    environ = {**TORCHRUN, "MESHWRIGHT_TOKEN_FILE": str(path)}
    with pytest.raises(UsageError, match="mode 644"):
        read(environ)
    path.chmod(0o600)
    assert read(environ).token == "ab" * 32
    path.write_text("")
    with pytest.raises(UsageError, match="is empty"):
        read(environ)
    path.unlink()
    with pytest.raises(UsageError, match="cannot be read"):
        read(environ)


def test_run_dir_and_plan_are_read_in_a_world_of_one_too():
    contract = read({"MESHWRIGHT_RUN_DIR": "runs/a", "MESHWRIGHT_PLAN": "zero1"})
    assert (contract.run_dir, contract.plan) == (Path("runs/a"), "zero1")


def test_what_carries_the_data_can_be_chosen():
    assert read({}).comm is None
    assert read(TORCHRUN | {"MESHWRIGHT_COMM": "gloo"}).comm == "gloo"
    assert read(TORCHRUN | {"MESHWRIGHT_COMM": "shared"}).comm == "shared"
    with pytest.raises(UsageError, match="MESHWRIGHT_COMM is 'shred'; did you mean 'shared'"):
        read(TORCHRUN | {"MESHWRIGHT_COMM": "shred"})


def test_open_mpi_may_number_the_ranks_of_one_host_otherwise():
    found = read(
        {
            "OMPI_COMM_WORLD_RANK": "1",
            "OMPI_COMM_WORLD_SIZE": "3",
            "OMPI_COMM_WORLD_LOCAL_RANK": "2",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "3",
        }
    )
    assert found.world == World(1, 3, 2, 3)
