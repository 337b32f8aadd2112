"""Checkpoints that are damaged, of another job, cut off while written, or have no room."""

from __future__ import annotations

import pytest

from tests.bad_input.conftest import ended
from tests.bad_input.jobs import write_job

EVERY = ("--run-dir", "run", "--checkpoint-every", "1")


@pytest.fixture
def saved(train, folder):
    """Three steps, each saved; the folder of checkpoints."""
    train(*EVERY).works("step 3/3")
    return folder / "run" / "checkpoints"


def files(checkpoint):
    return sorted(checkpoint.glob("*.safetensors"))


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [(cut, ("rank0.safetensors has", "cut short")), (flip, ("does not match its digest",))],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(train, saved, damage, words):
    (file,) = files(saved / "step-00000003")
    damage(file)
    done = train(*EVERY, steps="5")
    done.works("step-00000003 cannot be used", *words, "resumed at step 2 from run", "step 5/5")


@pytest.mark.parametrize("damage", [cut, flip])
def test_no_whole_checkpoint_is_left(train, saved, damage):
    for checkpoint in saved.iterdir():
        damage(files(checkpoint)[0])
    words = ("step-00000003 cannot be used", "rank0.safetensors")
    train(*EVERY, steps="5").fails(74, *words)


def test_a_manifest_that_is_none(train, saved):
    (saved / "step-00000003" / "manifest.json").write_text('{"version": 1,')
    train(*EVERY, steps="5").works("step-00000003 cannot be used", "resumed at step 2")


@pytest.mark.parametrize(
    ("pieces", "status", "words"),
    [
        (
            {"model": "lambda: Model(9)"},
            74,
            ("of another model: 3 shape", "has shape [8, 4] in the checkpoint, [9, 4] in the"),
        ),
        (
            {"model": "lambda: nn.Linear(4, 1)"},
            74,
            ("2 missing, 4 extra", "model/weight is in the model, not in the checkpoint"),
        ),
        ({"batch_size": "16"}, 74, ("batch_size=8, the job has 16", "--fresh")),
        (
            {"optimizer": "lambda model: torch.optim.SGD(model.parameters(), lr=0.1)"},
            74,
            ("holds the state of AdamW, the job uses SGD",),
        ),
        ({"data": "lambda: Data(65)"}, 71, ("has 65 samples, but had 64",)),
    ],
    ids=["shapes", "names", "batch", "optimizer", "data"],
)
def test_a_checkpoint_of_another_job(train, saved, pieces, status, words):
    train(*EVERY, **(pieces | {"steps": "5"})).fails(status, *words)


def test_nothing_to_resume(train, folder):
    train("--resume").fails(2, "--resume, but there is no run of job in runs", "without --resume")
    train("--resume", "--run-dir", "none").fails(2, "none has no checkpoint")
    assert not (folder / "none").exists()
    train(extra="raise ValueError")
    train("--resume").fails(2, "no run of job with a checkpoint in runs")


def test_resume_passes_over_a_start_that_failed(train):
    train().works("step 3/3")
    train(extra="raise ValueError")
    train("--resume", steps="5").works("resumed at step 3 from runs/job-001", "step 5/5")


def test_words_about_the_run_folder_that_contradict(train, saved):
    train(*EVERY, "--fresh").fails(2, "--fresh, but run is not empty", "--overwrite")
    train(*EVERY, "--fresh", "--resume").fails(2, "contradict")
    train(*EVERY, "--overwrite").fails(2, "--overwrite is for --fresh")
    train(*EVERY, "--fresh", "--overwrite").works("step 1/3")


KILLED = """
real = os.fsync


def fsync(handle):
    file = os.readlink(f"/proc/self/fd/{handle}")
    if RANK == 0 and ".step-00000003.tmp" in file and "KILL" in os.environ:
        os.kill(os.getppid(), signal.SIGKILL)
        signal.pause()
    real(handle)


os.fsync = fsync
"""


@pytest.mark.mp
@pytest.mark.timeout(120)
def test_a_job_killed_while_it_saves_goes_on_from_the_checkpoint_before(shell, mw, folder):
    write_job(folder / "job.py", KILLED, steps="5")
    waits = "--wait-for-saves"  # else the one of step 2 may be under way too
    killed = shell("train", "job.py", *EVERY, waits, "-n", 2, environ={"KILL": "1"})
    assert killed.status == -9
    kept = folder / "run" / "checkpoints"
    assert [p.name for p in kept.glob("step-*")] != []
    assert list(kept.glob(".step-00000003.tmp-*")) != []
    assert not (kept / "step-00000003").exists()
    mw("train", "job.py", *EVERY, "--resume").works("resumed at step 2 from run", "step 5/5")
    assert list(kept.glob(".*")) == []


FULL = """
import resource


def room(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


class Data(Data):
    seen = 0

    def __getitem__(self, index):
        Data.seen += 1
        if Data.seen == 17:  # read ahead in step 2
            room(int(os.environ["ROOM"]))
        if Data.seen == 33 and "LIFT" in os.environ:
            room(resource.RLIM_INFINITY)
        return super().__getitem__(index)
"""


@pytest.mark.mp
@pytest.mark.timeout(120)
def test_a_full_disk_warns_while_training_and_fails_the_last_save(start, folder):
    write_job(folder / "job.py", FULL, model="lambda: Model(width=4000)", steps="6")
    words = ("train", "job.py", "--checkpoint-every", 1, "--run-dir")
    lifted = start(*words, "lifted", "--wait-for-saves", environ={"ROOM": "60000", "LIFT": "1"})
    full = start(*words, "full", environ={"ROOM": "0"})  # written while training goes on
    done = ended(lifted)
    done.works("checkpoint of step 2 was not saved, training goes on", "File too large", "step 6/6")
    assert (folder / "lifted" / "checkpoints" / "step-00000006").is_dir()
    done = ended(full)
    said = done.fails(74, "saving the checkpoint of step 6 failed: rank 0", "File too large")
    assert "checkpoint of step 2 was not saved, training goes on" in said
    for name in ("full/metrics.jsonl", "full/tensorboard"):
        assert said.count(f"cannot write {name}: File too large") == 1
    assert "step 6/6" in said
    kept = [p.name for p in (folder / "full" / "checkpoints").iterdir()]
    assert kept in ([], ["step-00000001"])  # it may have been on its way when the disk got full
