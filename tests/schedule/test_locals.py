"""Locals: tasks on one rank, how what crosses lies, and that equal work is made once."""

from __future__ import annotations

from meshwright.plan.mesh import Axis
from meshwright.program.layout import REPLICATED, Layout, Shard
from meshwright.program.placing import placed_by
from meshwright.program.program import Value
from meshwright.program.zero import zero_layouts
from meshwright.schedule.locals import Micro
from tests.program.chains import SIZE, begins, chain, told

NONE = frozenset()


def states(program, axes, zero):
    """Of every weight, as of one that is large enough to be sharded."""
    names = [name.removeprefix("model/") for name, _ in program.inputs if name.startswith("model/")]
    return zero_layouts(zero, dict.fromkeys(names, Value("float32", (1024, 1024))), axes)


def micro(program, layers, axes=(), *, zero=0, kept=None, rank=0):
    """The micro-batch on one rank, its stages beginning at these layers and at the first."""
    return Micro.of(
        program,
        program,
        placed_by(program, begins(program, *layers)),
        axes,
        {axis.name: rank for axis in axes},
        states(program, axes, zero),
        sequence=False,
        kept=kept,
    )


def shapes(local, prefix):
    values = local.program.values
    return {n: values[v].shape for n, v in local.program.inputs if n.startswith(prefix)}


def moves(local):
    return [op.name for op in local.program.ops if op.name.startswith("comm.")]


DATA = (Axis("data", 2),)


def test_alone_a_task_is_its_program():
    made = micro(chain(0, 1), [1])
    local, whole, _ = made.local((0, "F"), NONE, NONE)
    assert told(local.program) == told(whole) == ["mm"]
    assert not moves(local)


def test_what_crosses_lies_as_it_is_made():
    made = micro(chain(0, 1), [1], DATA)
    (crossing,) = made.tasks.task((0, "F")).gives[:1]
    assert made.landing(crossing) == Layout.of(DATA, {"data": Shard(0)})
    for key in ((0, "F"), (1, "F"), (1, "B"), (0, "B")):
        local, _, _ = made.local(key, NONE, NONE)
        assert set(shapes(local, "value/").values()) <= {(SIZE // 2, SIZE)}
        assert not moves(local)


def test_both_ends_of_a_message_agree_on_how_it_lies():
    made = micro(chain(0, 1, 2, skip=True), [1, 2], DATA)
    given, taken = {}, {}
    for stage in range(3):
        for kind in "FIW":
            local, _, _ = made.local((stage, kind), NONE, NONE)
            values = local.program.values
            given |= {n: values[v].shape for n, v in local.program.outputs if "value/" in n}
            taken |= {(n, stage, kind): s for n, s in shapes(local, "value/").items()}
    assert taken
    assert all(given[name] == shape for (name, _, _), shape in taken.items())


def test_gradients_are_reduced_after_the_last_that_adds_to_them():
    made = micro(chain(0, 1), [1], DATA)
    usual, _, _ = made.local((1, "B"), NONE, NONE)
    final, _, _ = made.local((1, "B"), NONE, frozenset({"gradient/w1"}))
    assert not moves(usual)
    assert moves(final) == ["comm.all_reduce"]


def test_sharded_weights_are_gathered_by_each_task_that_reads_them():
    made = micro(chain(0, 1), [1], DATA, zero=3)
    forward, _, _ = made.local((0, "F"), NONE, NONE)
    assert shapes(forward, "model/") == {"model/w0": (SIZE // 2, SIZE)}
    assert moves(forward) == ["comm.all_gather"]
    backward, _, _ = made.local((0, "B"), NONE, NONE)  # nobody waits for a gradient through w0
    assert moves(backward) == ["comm.reduce_scatter"]


def test_equal_work_is_made_once():
    made = micro(chain(0, 1), [1])
    again = frozenset({"gradient/w1"})
    first = made.local((1, "B"), again, NONE)
    assert made.local((1, "B"), again | {"gradient/w0"}, frozenset({"gradient/w0"})) is first
    assert made.local((1, "B"), NONE, NONE) is not first
    assert told(made.local((1, "B"), NONE, NONE)[0].program)[-1] == "add_"


def test_a_number_crosses_whole():
    """What is replicated lands replicated."""
    made = micro(chain(0, 1), [1])
    (crossing,) = made.tasks.task((1, "B")).gives
    assert made.landing(crossing) == REPLICATED
