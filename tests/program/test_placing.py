"""Placing: the stage of every op and the homes of every state, told where stages begin."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshwright.errors import PlanError
from meshwright.program.placing import forward_end, placed_by, placed_like, repeatable
from meshwright.program.program import Op, Program, Ref, Value
from tests.program.chains import SIZE, begins, chain, told


def placed(program, *layers):
    return placed_by(program, begins(program, *layers))


def at(program, placement):
    """(op, module) -> stages, of each phase."""
    found = {}
    for op, stage in zip(program.ops, placement.stages, strict=True):
        found.setdefault((op.phase, op.module), set()).add(stage)
    return found


def test_forward_goes_by_order_and_backward_to_what_it_saved():
    program = chain(0, 1, 2)
    found = at(program, placed(program, 1, 2))
    for layer in range(3):
        assert found["forward", f"layers.{layer}"] == {layer}
        assert found["backward", f"layers.{layer}"] - {None} == {layer}
    assert found["forward", "loss"] == {2}


def test_any_cut_is_legal():
    program = chain(0, 1, 2, skip=True)
    for position in range(1, forward_end(program)):
        placement = placed_by(program, [position])
        read = [op for op, s in zip(program.ops, placement.stages, strict=True) if s is not None]
        assert placement.count == 2
        assert len(read) + placement.stages.count(None) == len(program.ops)


def test_values_flow_forward_then_backward():
    program = chain(0, 1, 0, 2, skip=True)
    placement, made = placed(program, 1, 2, 3), {}
    for op, stage in zip(program.ops, placement.stages, strict=True):
        if stage is None:
            continue
        for value in op.inputs:
            phase, source = made.get(value, (op.phase, stage))
            if phase == op.phase:
                assert source <= stage if op.phase == "forward" else source >= stage
        made.update((value, (op.phase, stage)) for value in op.results)


def test_state_lives_with_those_who_read_it():
    assert placed(chain(0, 1, 2), 1, 2).homes == {
        "model/w0": (0,),
        "model/w1": (1,),
        "model/w2": (2,),
    }
    assert placed(chain(0, 1, 0), 1, 2).homes == {"model/w0": (0, 2), "model/w1": (1,)}
    assert placed(chain(0, 0, 0), 1, 2).homes == {"model/w0": (0, 1, 2)}


def test_state_that_nobody_reads_lives_with_its_module():
    program = chain(0, 1, 2)
    values = (*program.values, *[Value("float32", (SIZE,))] * 2)
    idle = (("buffer/layers.1.count", len(values) - 2), ("model/elsewhere.w", len(values) - 1))
    program = replace(program, values=values, inputs=(*program.inputs, *idle))
    homes = placed(program, 1, 2).homes
    assert homes["buffer/layers.1.count"] == (1,)
    assert homes["model/elsewhere.w"] == (0,)


def counting(*layers):
    """A chain whose layers read a buffer that the first of them updates."""
    program = chain(0, 1, 2)
    count = len(program.values)
    values = (*program.values, *[Value("float32", (SIZE, SIZE))] * 2)
    made = program.ops[layers[0]].results[0]
    update = Op("aten.add.Tensor", (Ref(count), Ref(made)), (), (count + 1,))
    ops = list(program.ops)
    for layer in layers[1:]:
        reader = ops[layer]
        ops[layer] = replace(reader, args=(*reader.args, Ref(count)))
    ops.insert(layers[0] + 1, replace(update, module=f"layers.{layers[0]}"))
    inputs = (*program.inputs, ("buffer/seen", count))
    return replace(
        program, values=values, inputs=inputs, ops=tuple(ops),
        outputs=(*program.outputs, ("next/seen", count + 1)),
    )  # fmt: skip


def test_a_buffer_lives_where_it_changes():
    assert placed(counting(1), 1, 2).homes["buffer/seen"] == (1,)
    assert placed(counting(0, 1), 2).homes["buffer/seen"] == (0,)


def test_a_buffer_that_one_stage_updates_and_another_reads_is_refused():
    with pytest.raises(PlanError, match=r"updates buffer seen, which stages \[0, 1\] share"):
        placed(counting(0, 1), 1, 2)


def test_what_is_cheap_of_the_batch_is_in_no_stage():
    """A mask is made wherever it is read; a product of the batch is too much work for that."""
    program = chain(0, 1)
    assert told(program)[:2] == ["mm", "mm"]
    x, count = program.input("batch/x"), len(program.values)
    values = (*program.values, Value("bool", (SIZE, SIZE)), Value("float32", (SIZE, SIZE)))
    mask = Op("aten.gt.Scalar", (Ref(x), 0.0), (), (count,), module="layers.1")
    square = Op("aten.mm.default", (Ref(x), Ref(x)), (), (count + 1,), module="layers.1")
    program = replace(program, values=values, ops=(mask, square, *program.ops))
    assert repeatable(program) >= {0}
    assert 1 not in repeatable(program)
    assert placed_by(program, (2,)).stages[:2] == (None, 0)


def test_views_of_weights_are_in_no_stage():
    program = chain(0, 1, 2)
    turned = [n for n, op in enumerate(program.ops) if op.base == "aten.t"]
    weights = [n for n in turned if program.ops[n].inputs[0] in {v for _, v in program.inputs}]
    assert weights
    assert repeatable(program) >= set(weights)


def test_the_transpose_of_a_skipped_value_is_made_where_it_is_read():
    """It could be made at the last stage, which holds the value too, and would be sent from it."""
    program = chain(0, 1, 2, skip=True)
    placement = placed(program, 1, 2)
    first = program.ops[0].results[0]
    (turned,) = [
        n for n, op in enumerate(program.ops) if op.base == "aten.t" and first in op.inputs
    ]
    assert placement.stages[turned] == 1


def test_a_view_of_a_gradient_is_made_where_it_is_read():
    program = chain(0, 1)
    last = max(n for n, op in enumerate(program.ops) if op.name == "aten.mm.default")
    gradient = program.ops[last].inputs[1]
    count = len(program.values)
    values = (*program.values, Value("float32", (SIZE, SIZE)))
    view = Op("aten.view.default", (Ref(gradient), (SIZE, SIZE)), (), (count,), phase="backward")
    reader = replace(program.ops[last], args=(program.ops[last].args[0], Ref(count)))
    ops = (*program.ops[:last], view, reader, *program.ops[last + 1 :])
    placement = placed(replace(program, values=values, ops=ops), 1)
    assert placement.stages[last : last + 2] == (0, 0)


def test_a_backward_that_no_stage_can_do_is_refused():
    program = chain(0, 1, 2)
    first, last = program.ops[0].results[0], program.ops[2].results[0]
    count = len(program.values)
    values = (*program.values, Value("float32", (SIZE, SIZE)))
    both = Op("aten.mul.Tensor", (Ref(first), Ref(last)), (), (count,), phase="backward")
    ops = (*program.ops, replace(both, source="loss.py:7"))
    program = replace(program, values=values, ops=ops)
    with pytest.raises(PlanError, match=r"loss\.py:7 has a backward.*no one stage.*by cuts"):
        placed(program, 1, 2)


def forward(program):
    """Its forward alone, as an evaluation's, with an op more."""
    end = forward_end(program)
    ops = tuple(op for op in program.ops[:end])
    extra = len(program.values)
    values = (*program.values, Value("float32", (SIZE, SIZE)))
    made = ops[0].results[0]
    more = Op("aten.relu.default", (Ref(made),), (), (extra,), module="layers.0")
    return Program(
        values, program.inputs, (ops[0], more, *ops[1:]), (("total/loss", ops[-1].results[0]),)
    )


def test_an_evaluation_is_cut_where_training_keeps_its_state():
    program = chain(0, 1, 2, 3)
    chosen = placed(program, 2, 3)
    found = placed_like(forward(program), program, chosen)
    assert found.stages == (0, 0, 0, 1, 2, 2)
    assert found.homes == chosen.homes


def test_a_micro_batch_of_another_size_is_cut_alike():
    program = chain(0, 1, 2)
    chosen = placed(program, 1, 2)
    values = tuple(replace(v, shape=(SIZE, 2 * SIZE)) if v.shape else v for v in program.values)
    assert placed_like(replace(program, values=values), program, chosen).stages == chosen.stages


def test_an_evaluation_that_reads_state_elsewhere_is_refused():
    program = chain(0, 1, 2)
    chosen = placed(program, 1, 2)
    backwards = chain(2, 1, 0)
    with pytest.raises(PlanError, match=r"w\d is read by stages .* training keeps it at"):
        placed_like(forward(backwards), program, chosen)


def test_one_stage_is_everything():
    program = chain(0, 1)
    assert set(placed_by(program, ()).stages) == {0, None}
    assert placed_by(program, ()).count == 1
