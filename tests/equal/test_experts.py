"""Mixtures of experts equal one device, their auxiliary losses included, wherever experts lie."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache

import pytest

from meshwright.compile.collective import unpack
from meshwright.errors import PlanError
from meshwright.program.layout import Shard
from meshwright.program.partition import COLLECTIVES
from meshwright.run import executor
from meshwright.run.equality.lockstep import first_difference
from meshwright.run.form import first_micros
from tests.equal.families import llama
from tests.equal.harness import Case, assert_equal, unruled
from tests.equal.mixtures import MIXTURES
from tests.equal.tables import EXPERTS, with_micros
from tests.laws.source import ROOT

SAMPLE = (
    ("mixtral", "data=2,expert=2", 3),
    ("mixtral", "data=1,expert=2,tensor=2", 1),
    ("mixtral", "data=1,context=2,expert=2", 1),
    ("qwen3", "zero3,data=2", 3),
    ("qwen3", "data=1,expert=3", 1),
    ("olmoe", "data=1,tensor=2", 1),
    ("olmoe", "zero3,data=2,expert=2", 1),
    ("deepseek", "data=1,expert=2", 3),
    ("gptoss", "data=1,expert=2", 1),
)


@pytest.fixture(scope="module")
def case():
    return cache(lambda name: Case(MIXTURES[name]()))


def verified(case, name, plan, microbatches):
    report = case(name).verify(with_micros(plan, microbatches), steps=2)
    assert_equal(report)
    return report


@pytest.mark.parametrize(("name", "plan", "microbatches"), SAMPLE)
def test_a_mixture_equals_one_device(case, name, plan, microbatches):
    verified(case, name, plan, microbatches)


@pytest.mark.matrix
@pytest.mark.timeout(240)
@pytest.mark.parametrize("cell", EXPERTS.cells, ids=str)
def test_every_mixture_equals_one_device(case, record, cell):
    record.once(EXPERTS, cell, lambda: verified(case, *cell))


def local_program(case, name, plan):
    build = case(name).build(plan)
    lowered = build.lowered(0, first_micros(build, case(name).data))
    return build, lowered.compiled.units[0][1].program


@pytest.mark.parametrize("name", MIXTURES)
def test_splitting_samples_moves_no_rows(case, name):
    """What travels between ranks of `data` is sums: gradients, and counts for a loss."""
    _, program = local_program(case, name, "data=2")
    moved = {op.name for op in program.ops if op.name in COLLECTIVES}
    assert moved == {"comm.all_reduce"}
    assert "aten.sort" not in {op.base for op in program.ops}


@pytest.mark.parametrize("name", MIXTURES)
def test_rows_travel_four_times(case, name):
    """To their experts and back, forward and backward; biases of experts travel as rows too."""
    build, program = local_program(case, name, "data=1,expert=2")
    sent = [op for op in program.ops if op.name == "comm.exchange"]
    assert len(sent) == (6 if name == "gptoss" else 4)
    assert not [op for op in program.ops if op.name == "comm.all_gather"]
    split = {n for n, s in build.states.items() if s.work.on("expert") == Shard(0)}
    assert len(split) == 2
    assert all(".experts." in name for name in split)


def test_rows_that_come_back_in_another_order_are_told(case, monkeypatch):
    def turned(bucket, parts, into):
        return unpack(bucket, parts[::-1] if bucket.op == "exchange" else parts, into)

    monkeypatch.setattr(executor, "unpack", turned)
    assert not case("mixtral").verify("data=1,expert=2", steps=1).passed


def test_ranks_that_are_right_differ_nowhere(case):
    build = case("mixtral").build("data=1,expert=2")
    assert first_difference(build, case("mixtral").workers(build)) is None


def test_every_op_of_a_mixture_has_a_rule(case):
    assert unruled(case("mixtral"), "data=1,expert=2") == set()


def test_expert_asks_for_experts(case):
    with pytest.raises(PlanError, match=r"expert=2, but no weights of the model are experts'"):
        Case(llama()).build("data=1,expert=2")
    with pytest.raises(
        PlanError, match=r"expert=5, but .*gate_up_proj has 4 experts; use expert=4"
    ):
        case("mixtral").build("data=1,expert=5")


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("comm", ["shared", pytest.param("gloo", marks=pytest.mark.matrix)])
def test_processes_send_rows_to_experts(comm):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/src", "MESHWRIGHT_COMM": comm}
    done = subprocess.run(
        [sys.executable, "-m", "meshwright", "verify", "tests/equal/mixtures.py:mixtral", "--json",
         "--plan", "data=1,expert=2", "--ranks", "processes"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=220, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passed"]
