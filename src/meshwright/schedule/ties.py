"""Ties: gradients of parameters that several ranks of a pipeline hold, summed once a step.

A parameter that stages share (an embedding and a head) lives at each of them; one of a replicated
stage at each of its replicas.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from meshwright.program.layout import local_shape
from meshwright.program.program import Op, Program, Ref, Value
from meshwright.program.zero import StateLayouts
from meshwright.schedule.locals import Micro
from meshwright.schedule.post import Post, tied_axis

__all__ = ["ties"]


def ties(
    micro: Micro, given: Collection[str], states: Mapping[str, StateLayouts], post: Post
) -> list[Program]:
    """The programs that sum what this rank and others hold, by who holds it.

    Args:
        micro: any micro-batch of the step.
        given: the gradients that this rank has; of others that it holds, it brings zeros.
        states: layouts by parameter.
        post: the rank's.
    """
    shared: dict[tuple[int, ...], list[str]] = defaultdict(list)
    trained = micro.tasks.trained()
    for name, homes in sorted(post.homes.items()):
        if post.pipeline in homes and post.holders(name) > 1 and name in trained:
            shared[homes].append(name)
    return [_tie(micro, names, given, states, post) for _, names in sorted(shared.items())]


def _tie(
    micro: Micro,
    names: Sequence[str],
    given: Collection[str],
    states: Mapping[str, StateLayouts],
    post: Post,
) -> Program:
    values = list[Value]()
    inputs: list[tuple[str, int]] = []
    zeros: list[Op] = []
    sums: list[Op] = []
    outputs: list[tuple[str, int]] = []
    axis = tied_axis(post.homes[names[0]])

    def new(name: str, *, at_rest: bool) -> int:
        """A value for this rank's part: of the weight as it rests, or as the optimizer has it."""
        whole = micro.program.values[micro.program.input(f"model/{name}")]
        layout = states[name].weights if at_rest else states[name].optimizer
        shape = local_shape(whole.shape, layout, post.axes, post.coordinates)
        values.append(Value(whole.dtype, shape))
        return len(values) - 1

    for name in names:
        mine, total = new(name, at_rest=False), new(name, at_rest=False)
        if f"gradient/{name}" in given:
            inputs.append((f"reduced/{name}", mine))
        else:
            weight = new(name, at_rest=True)
            inputs.append((f"model/{name}", weight))
            made = (Ref(weight), values[mine].shape)
            zeros.append(Op("aten.new_zeros.default", made, (), (mine,), phase="finish"))
        notes = (
            ("before", "a term at each of its ranks"),
            ("after", "summed"),
            ("value", f"gradient/{name}"),
            ("load", values[mine].elements),
        )
        sums.append(
            Op("comm.all_reduce", (Ref(mine), axis, "sum"), notes, (total,), phase="finish")
        )
        outputs.append((f"reduced/{name}", total))
    return Program(tuple(values), tuple(inputs), (*zeros, *sums), tuple(outputs))
