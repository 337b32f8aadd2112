from __future__ import annotations

import json
import runpy
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import (
    InternalError,
    OutOfMemory,
    PlanError,
    StorageError,
    UserCodeError,
    nearest,
)
from meshwright.launch.failure import (
    SIGNALLED,
    Failure,
    Frame,
    clear,
    deciding,
    describe,
    read,
    record,
    render,
)

SCRIPT = """
import json

def loss(batch):
    return json.loads(batch)

def step():
    return loss("{not json")

step()
"""


def caught(action):
    with pytest.raises(BaseException) as info:  # noqa: PT011  each caller looks at what it is
        action()
    return info.value


def of_script(tmp_path, text=SCRIPT):
    path = tmp_path / "train.py"
    path.write_text(text)
    return caught(lambda: runpy.run_path(str(path)))


def test_the_users_own_frames_come_first_innermost_first(tmp_path):
    failure = describe(1, of_script(tmp_path))
    assert [f.function for f in failure.frames if f.file.endswith("train.py")] == [
        "loss",
        "step",
        "<module>",
    ]
    assert failure.frames[0].text == "return json.loads(batch)"
    assert failure.frames[0].user
    assert not next(f for f in failure.frames if "json/decoder" in f.file).user
    assert (failure.rank, failure.kind, failure.status) == (1, "JSONDecodeError", 71)


def test_a_cause_is_told_with_its_frames(tmp_path):
    inner = of_script(tmp_path)

    def wrapped():
        try:
            raise inner
        except ValueError as error:
            raise UserCodeError("the loss raised an error on micro-batch 3") from error

    failure = describe(0, caught(wrapped))
    assert failure.kind == "UserCodeError"
    assert "because of JSONDecodeError: Expecting property name" in failure.message
    assert failure.frames[0].function == "loss"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (PlanError("x"), 2),
        (InternalError("x"), 70),
        (OutOfMemory("x"), 72),
        (MemoryError(), 72),
        (StorageError("x"), 74),
        (KeyboardInterrupt(), 130),
        (SystemExit(3), 3),
        (SystemExit(None), 0),
        (SystemExit("text"), 1),
    ],
)
def test_each_error_has_its_status(error, status):
    assert describe(0, error).status == status


def test_a_plain_exception_of_ours_is_our_bug_and_one_of_the_users_is_theirs(tmp_path):
    assert describe(0, caught(lambda: nearest(3, 4))).status == 70
    assert of_script(tmp_path, "import torch\ntorch.zeros(2) + torch.zeros(3)") is not None
    error = of_script(tmp_path, "import torch\ntorch.zeros(2) + torch.zeros(3)")
    assert describe(0, error).status == 71


def test_records_survive_writing_and_damaged_ones_are_left_out(tmp_path):
    written = [record(tmp_path, rank, of_script(tmp_path)) for rank in (2, 0)]
    assert read(tmp_path) == tuple(reversed(written))
    (tmp_path / "failures" / "rank1.json").write_text('{"rank": 1}')
    (tmp_path / "failures" / "rank3.json").write_text("[1")
    (tmp_path / "failures" / "rank4.json").write_text("[]")
    assert read(tmp_path) == tuple(reversed(written))
    clear(tmp_path)
    assert read(tmp_path) == ()


def failure(rank, kind="ValueError", message="bad label", status=71, time=0.0, frames=()):
    return Failure(rank, 100 + rank, time, kind, message, status, frames)


LOST = {"kind": "PeerLost", "status": 75, "message": "rank 1 is gone"}


def test_a_lost_peer_is_never_the_cause_while_another_failure_is_known():
    failures = [failure(0, time=1.0, **LOST), failure(1, time=2.0)]
    assert deciding(failures).rank == 1
    assert deciding(failures[:1]).rank == 0


def test_the_text_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = Frame(str(tmp_path / "model.py"), 88, "forward", "return self.table[x]", user=True)
    lib = Frame("/usr/lib/torch/module.py", 9, "call", "...", user=False)
    failures = [
        failure(0, time=2.0, **LOST),
        failure(
            1,
            time=1.0,
            kind="IndexError",
            message="index 50\x1bis out of range",
            frames=(mine, lib),
        ),
    ]
    text = render(failures, world=4, logs=tmp_path / "runs" / "logs")
    assert text.splitlines() == [
        "rank 1 failed: IndexError: index 50 is out of range",
        "  model.py:88 in forward",
        "    return self.table[x]",
        "  (1 more frame is in the log)",
        "rank 0: PeerLost; ranks 2, 3 ended as well",
        "log: runs/logs/rank1.log",
        "exit status 71",
    ]


def test_the_same_failure_on_all_ranks_is_told_once():
    text = render([failure(rank) for rank in range(8)], world=8)
    assert text.splitlines() == [
        "ranks 0, 1, 2 and 5 more failed: ValueError: bad label",
        "exit status 71",
    ]


def test_a_long_message_is_wrapped_so_that_its_remedy_is_read():
    message = "the plan asks for too much " * 8 + "so use data=2"
    lines = render([failure(0, "PlanError", message, 2)], world=1).splitlines()
    assert " ".join(line.strip() for line in lines[:-1]).endswith("so use data=2")
    assert len(lines) == 4
    cut = render([failure(0, "PlanError", message * 3, 2)], world=1).splitlines()
    assert len(cut) == 5
    assert cut[3].endswith(" ...")


def test_a_killed_rank_is_told_with_its_process():
    killed = failure(1, SIGNALLED, "was killed by SIGKILL", 75)
    text = render([failure(0, **LOST), killed], world=2)
    assert text.splitlines()[0] == "rank 1 (pid 101) was killed by SIGKILL"


@given(
    st.lists(
        st.builds(
            failure,
            st.integers(0, 40),
            st.sampled_from(["ValueError", "PeerLost", SIGNALLED]),
            st.text(max_size=400),
            st.sampled_from([1, 71, 75]),
            st.floats(0, 1e9),
            st.lists(
                st.builds(
                    Frame,
                    st.text(max_size=300),
                    st.integers(0),
                    st.text(),
                    st.text(),
                    st.booleans(),
                ),
                max_size=5,
            ).map(tuple),
        ),
        min_size=1,
        max_size=9,
        unique_by=lambda f: f.rank,
    )
)
def test_the_text_never_passes_twelve_lines_of_sane_width(failures):
    lines = render(failures, world=41).split("\n")
    assert len(lines) <= 12
    assert max(map(len, lines)) <= 160
    assert lines[-1].startswith("exit status ")


def test_a_record_is_json_that_others_can_read(tmp_path):
    found = record(tmp_path, 0, of_script(tmp_path))
    data = json.loads((tmp_path / "failures" / "rank0.json").read_text())
    assert data["frames"][0]["user"] is True
    assert data["status"] == 71
    assert replace(found, frames=()).message == data["message"]
