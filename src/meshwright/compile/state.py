"""The model's state in a trace: hooks on parameters are kept, writes that would be lost refused.

A program gives new buffers back; nothing else that the forward writes to reaches the next step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from meshwright.compile.init import Blueprint
from meshwright.compile.trace import hooks_of
from meshwright.errors import NotTraceable, UserCodeError
from meshwright.program.program import Program, without_dead_ops

__all__ = ["constants_swapped", "kept", "require_dense", "require_kept", "traced_parameters"]


def traced_parameters(
    model: Blueprint, inputs: Mapping[str, Tensor], trained: Collection[str]
) -> dict[str, Tensor]:
    """The program's inputs as parameters, with the hooks that the user put on the model's own.

    Raises:
        NotTraceable: a hook waits for `.grad`, which a program has not.
    """
    found = {}
    for name, own in model.parameters.items():
        found[name] = inputs[f"model/{name}"].detach().requires_grad_(name in trained)
        hooks, waiting = hooks_of(own)
        if waiting:
            raise NotTraceable(
                f"parameter {name} has a hook that runs when its .grad is there "
                "(register_post_accumulate_grad_hook), which a program has not; change the "
                "gradient with register_hook, or use --eager"
            )
        for hook in hooks if name in trained else ():
            found[name].register_hook(hook)
    return found


@contextlib.contextmanager
def constants_swapped(model: Blueprint, inputs: Mapping[str, Tensor]) -> Iterator[None]:
    """Tensors that modules keep as plain attributes become inputs too."""
    homes = [(name.rpartition("."), name) for name in model.constants]
    try:
        for (path, _, attribute), name in homes:
            setattr(model.module.get_submodule(path), attribute, inputs[f"constant/{name}"])
        yield
    finally:
        for (path, _, attribute), name in homes:
            setattr(model.module.get_submodule(path), attribute, model.constants[name])


def kept(model: Blueprint, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs that tell `require_kept` what became of parameters and plain tensor attributes."""
    found = {f"kept/model/{name}": inputs[f"model/{name}"] for name in model.parameters}
    for name in model.constants:
        path, _, attribute = name.rpartition(".")
        now = vars(model.module.get_submodule(path)).get(attribute)
        if isinstance(now, Tensor):
            found[f"kept/constant/{name}"] = now
    return found


def require_kept(program: Program) -> Program:
    """The program without the outputs that `kept` added.

    Raises:
        UserCodeError: the forward writes to one of them; names the user's line.
    """
    inputs, producers = dict(program.inputs), program.producers()
    for output, value in program.outputs:
        if not output.startswith("kept/"):
            continue
        kind, _, name = output.removeprefix("kept/").partition("/")
        if inputs.get(f"{kind}/{name}") != value:
            line = program.ops[producers[value]].source if value in producers else ""
            what = "parameter" if kind == "model" else "the tensor"
            raise UserCodeError(
                f"{line + ': ' if line else ''}the forward writes to {what} {name}, which would be "
                "lost: of what a forward changes only buffers are kept; make it one "
                "(register_buffer), or use --eager"
            )
    outputs = tuple(pair for pair in program.outputs if not pair[0].startswith("kept/"))
    return without_dead_ops(replace(program, outputs=outputs))


def require_dense(gradients: Mapping[str, Tensor]) -> None:
    """Refuse gradients that are lists of rows.

    Raises:
        NotTraceable: naming the parameter and the way out.
    """
    for name, gradient in gradients.items():
        if gradient.layout != torch.strided:
            raise NotTraceable(
                f"the gradient of {name} is sparse, which a program cannot hold; make its "
                "embedding with sparse=False, or use --eager"
            )
