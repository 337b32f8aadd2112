"""`mw verify`: passes, and fails with status 76 naming what differs."""

from __future__ import annotations

import json

import pytest

from meshwright.cli.verify import failure_text
from meshwright.comm import local
from meshwright.run.optimizer import recipe as optimizer


def test_a_plan_that_is_equal_passes(mw, folder):
    (folder / "out").mkdir()
    done = mw("verify", "sums.py", "--plan", "zero3,microbatches=3", "--json", "--run-dir", "out")
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert {"passed", "plan", "ranks", "steps", "worst_relative_error", "worst_tensor"} <= set(
        found
    )
    assert (found["passed"], found["ranks"], found["steps"]) == (True, 2, 5)
    assert found["plan"] == "zero3,data=2,microbatches=3"
    assert set(found["worst_relative_error"]) == {"loss", "gradients", "weights", "optimizer"}
    assert max(found["worst_relative_error"].values()) <= 1e-10
    assert json.loads((folder / "out" / "verify.json").read_text()) == found


@pytest.mark.parametrize(
    ("words", "ranks"),
    [
        ([], 2),
        (["--plan", "data=3"], 3),
        (["--plan", "zero1", "-n", "4"], 4),
        (["--plan", "data=1"], 1),
    ],
)
def test_ranks_follow_from_the_plan_or_are_two(mw, words, ranks):
    done = mw("verify", "sums.py", "--steps", 1, "--json", *words)
    assert json.loads(done.out)["ranks"] == ranks


def test_float32_is_held_to_its_own_laws(mw):
    found = json.loads(mw("verify", "sums.py", "--dtype", "float32", "--json").out)
    assert found["passed"]
    assert set(found["law"]) == {"loss", "gradients"}


def test_for_people_there_is_a_table(mw):
    done = mw("verify", "sums.py", "--steps", 2)
    assert "PASS" in done.out
    assert "optimizer" in done.out


def test_numbers_that_differ_are_status_76_with_the_tensor(mw, monkeypatch):
    """A wrong step size on the ranks: the kind of bug that verify is for."""
    make = optimizer.build

    def wrong(recipe, shards):
        made = make(recipe, shards)
        for group in made.param_groups:
            group["lr"] *= 1.5
        return made

    monkeypatch.setattr("meshwright.run.initial.build_optimizer", wrong)
    done = mw("verify", "sums.py", "--plan", "zero2", "--json")
    assert done.status == 76
    found = json.loads(done.out)
    assert not found["passed"]
    assert found["worst_relative_error"]["weights"] > 1e-4
    assert "plan zero2,data=2 on 2 ranks differs from one device: " in done.err
    assert found["worst_tensor"] in done.err
    assert "the law is 1e-10" in done.err


def test_a_wrong_collective_is_named_with_its_line(mw, monkeypatch):
    """Gathers of weights that give the first rank's shard twice."""
    true_collective = local.collective

    def forgetful(starts):
        answers = true_collective(starts)
        shards = starts[0].tensors
        if starts[0].op != "all_gather" or shards[0].dim() != 2:
            return answers
        return [(answer[0],) * len(answer) for answer in answers]

    monkeypatch.setattr(local, "collective", forgetful)
    done = mw("verify", "sums.py", "--plan", "zero3", "--json", "--set", "width=64")
    assert done.status == 76, done.err
    first = json.loads(done.out)["first_difference"]
    assert first["op"] == "comm.all_gather"
    assert first["module"] == "up"
    assert "the first op that differs is comm.all_gather (forward) at sums.py:" in done.err


def test_the_failure_names_the_first_op_that_differs():
    found = {
        "plan": "zero3,data=2",
        "ranks": 2,
        "worst_tensor": "blocks.0.attn.q.weight",
        "worst_relative_error": {"loss": 0.0, "gradients": float("nan"), "weights": 2e-3},
        "law": {"loss": 1e-10, "gradients": 1e-10, "weights": 1e-10},
        "first_difference": {
            "op": "aten.mm",
            "phase": "backward",
            "source": "gpt.py:41",
            "module": "blocks.0.attn",
        },
    }
    assert failure_text(found) == (
        "plan zero3,data=2 on 2 ranks differs from one device: gradients of "
        "blocks.0.attn.q.weight by nan, but the law is 1e-10\n"
        "the first op that differs is aten.mm (backward) at gpt.py:41 in blocks.0.attn"
    )
