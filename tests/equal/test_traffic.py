"""What a step moves and what a rank holds: compiled count, real requests and closed form agree."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache

import pytest
import torch.nn.functional as F

from meshwright import Job
from meshwright.program.explain import collectives
from meshwright.program.zero import WHOLE_BELOW
from meshwright.run.describe import describe_build
from tests.equal.cells import example
from tests.equal.harness import Case
from tests.equal.odd import Mixed, Plain, Tied, adamw, next_token
from tests.equal.traffic import first_step

PLANS = [f"{zero}data={ranks}" for ranks in (2, 4) for zero in ("", "zero1,", "zero2,", "zero3,")]
# The gradients of an embedding and of a bias need not its value.
READ_IN_FORWARD_ONLY = {"token.weight", "position.weight", "blocks.0.mlp.up.bias"}
OURS = {"handshake", "totals of the step"}  # what a step says beside the program's collectives


@cache
def gpt():
    return Case(example("gpt").job(depth=1, width=128, context=16, batch=8, dropout=0.1))


@dataclass(frozen=True)
class Ran:
    """A plan's first step: workers, rank 0's compiled list and rows, requests, gradient bytes."""

    workers: list
    fetched: list
    logs: list
    gradients: Counter

    def rows(self, rank=0):
        worker = self.workers[rank]
        return collectives(worker.lowered(self.fetched[rank]).compiled, worker.build.axes)


@cache
def ran(case, plan):
    """Run once; several tests look at it."""
    gradients = Counter()

    def look(worker):
        now = held(worker, "gradient/", "reduced/")
        gradients[worker.rank] = max(gradients[worker.rank], now)

    return Ran(*first_step(case(), plan, look), gradients)


@cache
def tied():
    return Case(Job(Tied, next_token, adamw, Mixed, 12))


def stage(plan):
    return int(plan[4]) if plan.startswith("zero") else 0


def size(plan):
    return int(plan.rpartition("=")[2])


def whole_passes(plan, name, parameter, readings):
    """How many times (N-1)/N of a parameter's elements go to each rank in a step."""
    if parameter.numel() * parameter.element_size() < WHOLE_BELOW or stage(plan) < 3:
        return 2  # an all-reduce; or a reduce-scatter, and a gather of what was updated
    return 1 + readings.get(name, 2)  # its gradient's reduction, and a gather per reading segment


@pytest.mark.parametrize("plan", PLANS)
def test_parameters_move_as_often_as_the_closed_form_says(plan):
    build, n = ran(gpt, plan).workers[0].build, size(plan)
    moved = Counter()
    for row in ran(gpt, plan).rows():
        kind, _, name = row.value.partition("/")
        if kind in ("model", "gradient"):
            moved[name] += row.elements
    readings = dict.fromkeys(READ_IN_FORWARD_ONLY, 1)
    for name, parameter in build.model.parameters.items():
        passes = whole_passes(plan, name, parameter, readings)
        assert moved.pop(name) == passes * parameter.numel() * (n - 1) // n, name
    assert not moved


def test_the_sums_are_two_and_three_times_the_parameters():
    total = {}
    for plan in ("data=4", "zero1,data=4", "zero2,data=4", "zero3,data=4"):
        rows = ran(gpt, plan).rows()
        total[stage(plan)] = sum(r.elements for r in rows if r.value.startswith(("model", "grad")))
    parameters = ran(gpt, "data=4").workers[0].build.model.parameters
    count = sum(p.numel() for p in parameters.values())
    small = sum(p.numel() for p in parameters.values() if p.numel() * 4 < WHOLE_BELOW)
    once = sum(parameters[name].numel() for name in READ_IN_FORWARD_ONLY)
    assert total[0] == total[1] == total[2] == 2 * count * 3 // 4
    assert total[3] == (3 * count - small - once) * 3 // 4


def test_tied_weights_are_gathered_once_more():
    rows = ran(tied, "zero3,data=2").rows()
    gathers = [row for row in rows if row.value == "model/token.weight"]
    assert [row.op for row in gathers] == ["all_gather"] * 3
    assert sorted((row.module, row.phase) for row in gathers) == [
        ("head", "backward"),
        ("head", "forward"),
        ("token", "forward"),
    ]
    assert [row.op for row in rows if row.value == "gradient/token.weight"] == ["reduce_scatter"]


@pytest.mark.parametrize("plan", [*PLANS, "zero3,data=3", "zero1,data=3", "data=3"])
def test_ranks_send_what_was_compiled(plan):
    for rank, log in enumerate(ran(gpt, plan).logs):
        compiled, rows = Counter(), ran(gpt, plan).rows(rank)
        for row in rows:
            compiled[row.op] += row.elements
        sent = Counter()
        for call in log:
            if call.label not in OURS:
                sent[call.op] += call.elements
        assert sent == compiled
        named = {row.value or row.source for row in rows}
        assert {call.label.partition(" and ")[0] for call in log} - OURS <= named


@pytest.mark.parametrize(
    ("plan", "most"),
    [("data=2", 1), ("zero1,data=2", 3), ("zero2,data=2", 3), ("zero3,data=2", 4)],
)
def test_a_small_model_travels_in_one_bucket_of_each_kind(plan, most):
    """Sums of what is sharded and of what is not, gathers in forward and backward."""
    log = ran(gpt, plan).logs[0]
    assert sum(call.label.startswith(("model/", "gradient/")) for call in log) <= most


@pytest.mark.parametrize("plan", PLANS)
def test_what_else_moves_is_explained_and_small(plan):
    rows, log = ran(gpt, plan).rows(), ran(gpt, plan).logs[0]
    other = [row for row in rows if not row.value.startswith(("model/", "gradient/"))]
    for row in other:
        assert row.source.rpartition("/")[2].startswith("gpt.py:"), row
        assert " -> " in row.why
        assert row.elements <= 2 * row.count  # the number of tokens that count, a scalar
    named = {call.label.partition(" and ")[0] for call in log}
    own = named - {row.value or row.source for row in rows}
    assert own == OURS
    assert sum(call.elements for call in log if call.label == "totals of the step") < 20


def formula(plan, count):
    """Bytes of (weights, gradients, AdamW's two slots) in float32; Rajbhandari 2020, figure 1."""
    zero, n = stage(plan), size(plan)
    return (
        4 * count / (n if zero >= 3 else 1),
        4 * count / (n if zero >= 2 else 1),
        8 * count / (n if zero >= 1 else 1),
    )


def held(worker, *prefixes):
    """Bytes of the storages of a rank's values of these kinds."""
    tensors = [t for name, t in worker.state.values.items() if name.startswith(prefixes)]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("plan", PLANS)
def test_model_state_is_what_the_formulas_say(plan):
    step = ran(gpt, f"{plan},microbatches=2")  # else each sum is reduced as soon as it is made
    workers, fetched, gradients = step.workers, step.fetched, step.gradients
    build = workers[0].build
    count = sum(p.numel() for p in build.model.parameters.values())
    weights, of_gradients, slots = formula(plan, count)
    bills = describe_build(build, fetched[0].micros)["memory"]
    for worker, bill in zip(workers, bills, strict=True):
        state = worker.state.optimizer.state.values()
        kept = sum(t.nbytes for slot in state for t in slot.values() if t.dim())
        # Resident from step to step: weights and optimizer state; gradients are gone.
        assert held(worker, "model/") == pytest.approx(weights, rel=0.05)
        assert kept == pytest.approx(slots, rel=0.05)
        assert held(worker, "gradient/", "reduced/", "gathered/", "shard/") == 0
        # Transient: gradients, from the backward to the update.
        assert gradients[worker.rank] == pytest.approx(of_gradients, rel=0.05)
        parts = bill["parts"]
        assert parts["weights"] == held(worker, "model/")
        assert parts["optimizer"] == kept
        assert parts["gradients"] == pytest.approx(gradients[worker.rank], rel=0.01)


def test_zero3_keeps_no_gathered_weight_from_forward_to_backward():
    """Saved activations are those of one rank's samples, whatever the stage."""
    saved = {}
    for plan in ("data=4", "zero3,data=4"):
        step = ran(gpt, plan)
        bill = describe_build(step.workers[0].build, step.fetched[0].micros)["memory"][0]["parts"]
        saved[plan] = bill["saved activations"]
    assert saved["zero3,data=4"] == saved["data=4"]


def test_more_micro_batches_move_no_more_under_data_and_zero1():
    for zero in ("", "zero1,"):
        once, four = (
            sum(call.elements for call in log if call.label.startswith(("model/", "gradient/")))
            for log in (
                ran(gpt, f"{zero}data=2").logs[0],
                ran(gpt, f"{zero}data=2,microbatches=4").logs[0],
            )
        )
        assert once == four > 0


@pytest.mark.parametrize(("zero", "times"), [("zero1", 1), ("zero2", 4), ("zero3", 4)])
def test_sharded_gradients_are_reduced_every_micro_batch_and_whole_ones_once(zero, times):
    step = ran(gpt, f"{zero},data=2,microbatches=4")
    parameters = step.workers[0].build.model.parameters
    sizes = {n: p.numel() for n, p in parameters.items() if 4 * p.numel() >= WHOLE_BELOW}
    # What the later micro-batches add to the positions' is not scattered.
    moved = times * sum(sizes.values()) - (times - 1) * sizes["position.weight"]
    scattered = sum(row.elements for row in step.rows() if row.op == "reduce_scatter")
    sent = sum(call.elements for call in step.logs[0] if call.op == "reduce_scatter")
    assert scattered == sent == moved // 2


def test_a_loss_over_the_global_batch_gathers_what_it_compares():
    """Similarities of every sample with every other: features are gathered, and said to be."""

    def contrast(model, batch):
        z = F.normalize(model(batch["x"]), dim=-1)
        return (z @ z.t()).square().mean()

    rows = ran(lambda: Case(Job(Plain, contrast, adamw, Mixed, 12)), "data=2").rows()
    gathers = [row for row in rows if row.op == "all_gather"]
    assert gathers
    assert all("test_traffic.py" in row.source for row in gathers)
