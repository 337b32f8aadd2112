"""precision=bf16 in the trace: what is cast, how often, and to the bits of eager autocast."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from meshwright.compile import precision
from meshwright.compile.precision import Promoting, computing, notes_on, with_shared_casts
from meshwright.plan.plan import Plan
from meshwright.program.program import Op, Program, Ref, Symbol, Value
from meshwright.run.equality.verify import Trial, try_local
from tests.equal.cells import gpt
from tests.run.jobs import Net, alone, job, mean_loss, step


def unit_of(made, plan="data=1,precision=bf16"):
    """The traced unit of the job's first batch."""
    session = alone(made, plan)
    return session.build.unit(session.take().micros[0])


def dtypes(program, name):
    """dtypes of what the ops of this name make, and how often."""
    made = [program.values[op.results[0]].dtype for op in program.ops if op.base == name]
    return Counter(made)


def casts_of(program, prefix):
    """How often each input is cast."""
    named = {value: name for name, value in program.inputs if name.startswith(prefix)}
    casts = [op.inputs[0] for op in program.ops if op.base == "aten._to_copy"]
    return Counter(named[value] for value in casts if value in named)


class Shared(nn.Module):
    """One weight read by three products, one input read by two layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        x = F.layer_norm(self.first(x) + x, (8,))
        return self.out(self.first(self.first(x)) + self.second(x))


def test_products_are_bf16_and_all_that_stays_is_float32():
    program = unit_of(job()).program
    assert dtypes(program, "aten.addmm") == {"bfloat16": 2}
    assert dtypes(program, "aten.nll_loss_forward") == {"float32": 1}
    kept = [*program.inputs, *program.outputs]
    assert all(
        program.values[value].dtype == "float32"
        for name, value in kept
        if name.startswith(("model/", "gradient/", "total/", "scale"))
    )


def test_parameters_are_cast_once_and_so_is_what_several_layers_read():
    made = job(model=Shared, loss=mean_loss)
    program = unit_of(made).program
    cast = casts_of(program, "model/")
    assert cast == dict.fromkeys(cast, 1)
    assert len(cast) == 6
    (read,) = [op.results[0] for op in program.ops if op.base == "aten.native_layer_norm"]
    readers = [op for op in program.ops if read in op.inputs and op.base == "aten._to_copy"]
    assert len(readers) == 1  # by first and by second


def test_evaluation_casts_once_too():
    session = alone(job(model=Shared), "data=1,precision=bf16")
    micro = session.take().micros[0]
    program = session.build.unit(micro, training=False).program
    assert set(casts_of(program, "model/").values()) == {1}


def test_no_cast_outlives_its_trace():
    """Autocast's cache is by tensor, and a trace's tensors are functional ones."""
    made = job()
    first, again = (unit_of(made).program.digest for _ in range(2))
    assert first == again
    assert not torch.is_autocast_enabled("cpu")
    assert dtypes(unit_of(made, "data=1").program, "aten.addmm") == {"float32": 2}
    assert unit_of(made).program.digest == first


class OwnRegions(Net):
    """Turns autocast off for its last layer, and casts by hand beside it."""

    def forward(self, x):
        x = torch.tanh(self.up(x))
        with torch.autocast("cpu", enabled=False):
            by_hand = (x.to(torch.bfloat16) * 2).float()
            return self.down(x.float()) + by_hand.sum() * 0


def test_a_models_own_regions_and_casts_are_kept():
    program = unit_of(job(model=OwnRegions)).program
    assert dtypes(program, "aten.addmm") == {"bfloat16": 1, "float32": 1}
    trial = Trial.of(job(model=OwnRegions), Plan.parse("data=2,precision=bf16"), 2, "float64")
    assert try_local(trial, 2)["passed"]


def test_one_device_traced_is_eager_autocast_to_the_bit():
    made = gpt(None, 0.0)
    trial = Trial.of(made, Plan.parse("data=1,precision=bf16"), 1, "float32")
    errors = try_local(trial, 3)["worst_relative_error"]
    assert errors == {"loss in bf16": 0.0, "gradients in bf16": 0.0}


def test_masks_are_the_same_numbers():
    made = job(model=lambda: Net(nn.Dropout(0.5)))
    draws = {
        plan: [op.args for op in unit_of(made, plan).program.ops if op.base == "meshwright.draw"]
        for plan in ("data=1", "data=1,precision=bf16")
    }
    wide, short = draws.values()
    assert [args[1:7] for args in wide] == [args[1:7] for args in short]
    assert len(wide) == 1


def test_short_losses_and_metrics_are_summed_in_float32():
    def loss(model, batch):
        logits = model(batch["x"])
        right = (logits.argmax(-1) == batch["y"]).to(torch.bfloat16).mean()
        return logits.square().mean(), {"right": right}

    program = unit_of(job(loss=loss)).program
    for name in ("total/loss", "total/metric/right"):
        producer = program.ops[program.producers()[program.output(name)]]
        assert program.values[producer.inputs[0]].dtype == "float32"


def test_the_backward_shares_no_cast_with_the_forward():
    """A cast that the backward makes again is not kept for it."""
    values = tuple(Value(d, (4,)) for d in ("float32", "bfloat16", "bfloat16", "bfloat16"))
    to = (("dtype", Symbol("dtype", "bfloat16")),)
    ops = tuple(
        Op("aten._to_copy.default", (Ref(0),), to, (k,), phase=phase)
        for k, phase in ((1, "forward"), (2, "forward"), (3, "backward"))
    )
    program = Program(values, (("x", 0),), ops, (("a", 1), ("b", 2), ("c", 3)))
    shared = with_shared_casts(program)
    assert shared.outputs == (("a", 1), ("b", 1), ("c", 3))
    assert shared.ops == (ops[0], ops[2])


def test_promoting_changes_every_dtype_that_is_asked_for():
    x = torch.randn(3, 4)
    with Promoting():
        assert x.to(torch.bfloat16).dtype == torch.float64
        assert torch.zeros(2, dtype=torch.float16).dtype == torch.float64
        y = torch.softmax(x.double(), -1)
        back = torch.ops.aten._softmax_backward_data(y, y, -1, torch.bfloat16)
    assert back.dtype == torch.float64
    assert x.to(torch.bfloat16).dtype == torch.bfloat16


def test_float32_is_left_alone():
    with computing("float32"):
        assert not torch.is_autocast_enabled("cpu")
    with computing("bf16"):
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16


@pytest.mark.parametrize(
    ("has", "told"), [({"avx2": True, "avx512_bf16": False}, 1), ({"amx_bf16": True}, 0)]
)
def test_a_processor_that_emulates_bf16_is_noted(monkeypatch, has, told):
    monkeypatch.setattr(precision.torch.cpu, "get_capabilities", lambda: has)
    assert len(notes_on("bf16")) == told
    assert notes_on("float32") == ()
    session = alone(job(), "data=1,precision=bf16")
    assert sum("no bf16 instructions" in note for note in session.notes) == told


def test_a_step_moves_the_float32_weights():
    session = alone(job(), "data=1,precision=bf16")
    before = {
        n: t.clone() for n, t in session.worker.state.values.items() if n.startswith("model/")
    }
    step(session)
    for name, tensor in before.items():
        now = session.worker.state.values[name]
        assert now.dtype == torch.float32
        assert not torch.equal(now, tensor)
