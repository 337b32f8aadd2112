"""Which folder a start uses, and whether it goes on from there."""

from __future__ import annotations

import pytest

from meshwright.errors import StorageError, UsageError
from meshwright.run.folder import OFFLOAD, choose


def saved(run):
    (run / "checkpoints" / "step-00000003").mkdir(parents=True)
    return run


def test_each_start_makes_a_folder(tmp_path):
    names = [choose("gpt", root=tmp_path / "runs").path.name for _ in range(3)]
    assert names == ["gpt-001", "gpt-002", "gpt-003"]
    assert choose("gpt.old", root=tmp_path / "runs").path.name == "gpt.old-001"
    (tmp_path / "runs" / "gpt-041").mkdir()
    (tmp_path / "runs" / "gpt-notes").mkdir()
    assert choose("gpt", root=tmp_path / "runs").path.name == "gpt-042"


def test_resume_takes_the_newest_with_a_checkpoint(tmp_path):
    with pytest.raises(UsageError, match=r"--resume, but there is no run of gpt in .*without"):
        choose("gpt", root=tmp_path, resume=True)
    for _ in range(3):
        choose("gpt", root=tmp_path)
    with pytest.raises(UsageError, match="no run of gpt with a checkpoint in"):
        choose("gpt", root=tmp_path, resume=True)
    saved(tmp_path / "gpt-001")
    saved(tmp_path / "gpt-002")
    found = choose("gpt", root=tmp_path, resume=True)
    assert (found.path.name, found.resume) == ("gpt-002", True)


def test_a_folder_of_ones_own_is_gone_on_in(tmp_path):
    mine = tmp_path / "deep" / "mine"
    assert choose("gpt", run_dir=mine).resume
    assert mine.is_dir()
    with pytest.raises(UsageError, match=r"--resume, but .*mine has no checkpoint"):
        choose("gpt", run_dir=mine, resume=True)
    saved(mine)
    assert choose("gpt", run_dir=mine, resume=True).resume


def test_fresh_refuses_what_is_there_unless_told(tmp_path):
    mine = saved(tmp_path / "mine")
    (mine / "metrics.jsonl").write_text("{}")
    (mine / "thesis.txt").write_text("the user's own")
    with pytest.raises(UsageError, match=r"--fresh, but .*mine is not empty; use another"):
        choose("gpt", run_dir=mine, fresh=True)
    found = choose("gpt", run_dir=mine, fresh=True, overwrite=True)
    assert not found.resume
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]


def test_fresh_passes_over_what_this_run_offloads(tmp_path):
    (tmp_path / "mine" / OFFLOAD).mkdir(parents=True)
    assert not choose("gpt", run_dir=tmp_path / "mine", fresh=True).resume
    assert (tmp_path / "mine" / OFFLOAD).is_dir()


def test_words_that_contradict(tmp_path):
    with pytest.raises(UsageError, match="--resume and --fresh contradict"):
        choose("gpt", root=tmp_path, resume=True, fresh=True)
    with pytest.raises(UsageError, match="--overwrite is for --fresh"):
        choose("gpt", root=tmp_path, overwrite=True)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot make the run folder .*another --run-dir"):
        choose("gpt", run_dir=tmp_path / "file" / "mine")
    with pytest.raises(StorageError, match="cannot make the run folder"):
        choose("gpt", root=tmp_path / "file")
