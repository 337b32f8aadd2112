"""Calls of ops that are layers: norms, gates, attention, lookups, losses, creation."""

from __future__ import annotations

from dataclasses import replace

import torch

import meshwright.compile.annotate
import meshwright.compile.ctc
import meshwright.compile.ring
import meshwright.compile.window  # noqa: F401 - they register ops
from meshwright.compile.draw import position_operand
from meshwright.program.attention import FLASH, RING
from tests.program.call import Call, f, truth, unit, whole

aten = torch.ops.aten


def _weight_norms():
    direction, length = f(5, 4), f(5, 1)
    yield Call("aten._weight_norm_interface.default", (direction, length, 0))
    _, norms = aten._weight_norm_interface.default(direction, length, 0)
    args = (f(5, 4), direction, length, norms, 0)
    yield Call("aten._weight_norm_interface_backward.default", args)


def _softmax():
    x, grad = f(5, 4, 6), f(5, 4, 6)
    for name in ("_softmax", "_log_softmax"):
        out = getattr(aten, name).default(x, -1, False)
        yield Call(f"aten.{name}.default", (x, -1, False))
        yield Call(f"aten.{name}.default", (x, 1, False), label="middle")
        yield Call(f"aten.{name}_backward_data.default", (grad, out, -1, torch.float64))
    yield Call("aten._softmax.default", (f(), 0, False), label="number")
    yield Call("aten._safe_softmax.default", (x, -1))


def _norms():
    x, grad, w, b = f(5, 4, 6), f(5, 4, 6), f(6), f(6)
    yield Call("aten.native_layer_norm.default", (x, (6,), w, b, 1e-5))
    yield Call("aten.native_layer_norm.default", (x, (4, 6), None, None, 1e-5), label="bare")
    _, mean, rstd = aten.native_layer_norm.default(x, (6,), w, b, 1e-5)
    every = (True, True, True)
    args = (grad, x, (6,), mean, rstd, w, b, every)
    yield Call("aten.native_layer_norm_backward.default", args)
    _, mean, rstd = aten.native_layer_norm.default(x, (4, 6), None, None, 1e-5)
    args = (grad, x, (4, 6), mean, rstd, None, None, (True, False, False))
    yield Call("aten.native_layer_norm_backward.default", args, label="bare")
    image, gain = f(5, 4, 3, 3), f(4)
    for label, weights in (("", (gain, f(4))), ("bare", (None, None))):
        args = (image, *weights, 5, 4, 9, 2, 1e-5)
        yield Call("aten.native_group_norm.default", args, label=label)
        _, mean, rstd = aten.native_group_norm.default(*args)
        mask = (True, weights[0] is not None, weights[0] is not None)
        args = (f(5, 4, 3, 3), image, mean, rstd, weights[0], 5, 4, 9, 2, mask)
        yield Call("aten.native_group_norm_backward.default", args, label=label)
    args = (*args[:-1], (False, True, True))
    args = (*args[:4], gain, *args[5:])
    yield Call("aten.native_group_norm_backward.default", args, label="weights only")


def _group_norms():
    """Of groups of one channel too, as over sound."""
    for label, (shape, groups) in {"three": ((5, 6, 4), 3), "each": ((5, 4, 6), 4)}.items():
        image, gain = f(*shape), f(shape[1])
        args = (image, gain, f(shape[1]), *shape, groups, 1e-5)
        yield Call("aten.native_group_norm.default", args, label=label)
        _, mean, rstd = aten.native_group_norm.default(*args)
        args = (f(*shape), image, mean, rstd, gain, *shape, groups, (True, True, True))
        yield Call("aten.native_group_norm_backward.default", args, label=label)


def _gates():
    for dim, shape in ((-1, (5, 3, 8)), (1, (5, 6, 4))):
        x = f(*shape)
        half = aten.glu.default(x, dim)
        yield Call("aten.glu.default", (x, dim), label=f"dim {dim}")
        yield Call("aten.glu_backward.default", (f(*half.shape), x, dim), label=f"dim {dim}")


def _rings():
    """Attention whose keys may go around; whole, it is torch's."""
    for call in _attention():
        yield replace(call, name=call.name.replace(FLASH, RING))


def _attention():
    name = "aten._scaled_dot_product_flash_attention_for_cpu"
    forward = aten._scaled_dot_product_flash_attention_for_cpu
    backward = f"{name}_backward.default"
    q, k, v = f(5, 4, 3, 8), f(5, 4, 6, 8), f(5, 4, 6, 8)
    masks = {
        "": None,
        "flat mask": f(3, 6),
        "sample mask": f(5, 1, 1, 6),
        "head mask": f(1, 4, 3, 6),
        "full mask": f(5, 4, 3, 6),
    }
    for label, mask in masks.items():
        named = {} if mask is None else {"attn_mask": mask}
        out, total = forward.default(q, k, v, 0.0, False, **named)
        yield Call(f"{name}.default", (q, k, v, 0.0, False), named, label)
        yield Call(backward, (f(5, 4, 3, 8), q, k, v, out, total, 0.0, False), named, label)
    q, few = f(5, 4, 6, 8), f(5, 2, 6, 8)
    out, total = forward.default(q, k, v, 0.0, True)
    yield Call(f"{name}.default", (q, k, v, 0.0, True), label="causal")
    yield Call(backward, (f(5, 4, 6, 8), q, k, v, out, total, 0.0, True), label="causal")
    for label, keys in (("grouped", few), ("one key", f(5, 1, 6, 8))):
        out, total = forward.default(q, keys, keys, 0.0, False)
        yield Call(f"{name}.default", (q, keys, keys, 0.0, True), label=f"{label}, causal")
        yield Call(f"{name}.default", (q, keys, keys, 0.0, False), label=label)
        yield Call(backward, (f(5, 4, 6, 8), q, keys, keys, out, total, 0.0, False), label=label)


def _lookups():
    weight, index = f(7, 4), whole(5, 3)
    yield Call("aten.embedding.default", (weight, index))
    yield Call("aten.embedding.default", (weight, index, 0), label="padded")
    for label, (pad, counted) in {
        "": (-1, False),
        "padded": (0, False),
        "counted": (-1, True),
    }.items():
        args = (f(5, 3, 4), index, 7, pad, counted)
        yield Call("aten.embedding_dense_backward.default", args, label=label)
    x = f(5, 6, 4)
    yield Call("aten.gather.default", (f(5, 6), 1, whole(5, 1, high=6)))
    yield Call("aten.gather.default", (f(5, 6), -1, whole(3, 4, high=6)), label="fewer rows")
    yield Call("aten.scatter.src", (f(5, 6), 1, whole(5, 2, high=6), f(5, 2)))
    yield Call("aten.scatter.value", (f(5, 6), 1, whole(5, 1, high=6), 1.0))
    yield Call("aten.scatter_add.default", (f(5, 6), 1, whole(5, 3, high=6), f(5, 3)))
    yield Call("aten.scatter_add.default", (f(5, 6), 0, whole(4, 6, high=5), f(4, 6)), label="rows")
    yield Call("aten.index_select.default", (x, 1, whole(3, high=6)))
    yield Call("aten.index_select.default", (x, 0, whole(3, high=5)), label="rows")
    yield Call("aten.index_add.default", (x, -1, whole(3, high=4), f(5, 6, 3)))
    yield Call("aten.index_add.default", (x, 0, whole(3, high=5), f(3, 6, 4)), label="rows")
    yield Call(
        "aten.index_add.default", (x, 1, whole(5, high=6), f(5, 5, 4)), {"alpha": 2.0}, "twice"
    )
    for how in ("amax", "prod"):
        args = (f(5, 6), 1, whole(5, 3, high=6), f(5, 3), how)
        yield Call("aten.scatter_reduce.two", args, {"include_self": False}, how)
    yield Call("aten.index.Tensor", (x, [whole(3, high=5)]))
    yield Call("aten.index.Tensor", (x, [None, whole(3, high=6)]), label="second")
    crossed = [whole(5, 1, high=5), whole(1, 3, high=6)]
    yield Call("aten.index.Tensor", (x, crossed), label="crossed")
    yield Call("aten.index.Tensor", (x, [whole(3, high=5), None, whole(3, high=4)]), label="apart")
    yield Call("aten.index.Tensor", (f(5, 4), [truth(5, 4)]), label="mask")
    for label, adds in (("", False), ("adds", True)):
        rows = torch.tensor([3, 0, 4])
        args = (x, [rows], f(3, 6, 4), adds)
        yield Call("aten.index_put.default", args, label=f"{label} rows".strip())
        args = (x, [None, rows], f(5, 3, 1), adds)
        yield Call("aten.index_put.default", args, label=f"{label} second".strip())
    twice = [torch.tensor([1, 1, 2])]
    yield Call("aten.index_put.default", (x, twice, f(6, 4), True), label="adds twice")
    yield Call("aten.index_put.default", (f(5, 4), [truth(5, 4)], f()), label="mask")


def _losses():
    x, target = f(5, 4), whole(5, high=4)
    for label, weight in (("", None), ("weighted", unit(4))):
        for how, name in ((0, "none"), (1, "mean"), (2, "sum")):
            args = (x, target, weight, how, 2)
            text = f"{name} {label}".strip()
            yield Call("aten.nll_loss_forward.default", args, label=text)
            out, total = aten.nll_loss_forward.default(*args)
            args = (f(*out.shape), x, target, weight, how, 2, total)
            yield Call("aten.nll_loss_backward.default", args, label=text)
    yield Call(
        "aten.nll_loss_forward.default", (f(4), whole(high=4), None, 2, -100), label="one sample"
    )


def _spoken():
    """The CTC loss of five samples of at most three classes of four, in six frames."""
    chances, targets = f(6, 5, 4).log_softmax(-1), whole(5, 3, high=3) + 1
    lengths = torch.tensor([3, 2, 3, 1, 2])
    given = (chances, targets, torch.tensor([6, 6, 5, 4, 6]), lengths)
    yield Call("meshwright.ctc.default", (*given, 0))
    yield Call("meshwright.ctc_backward.default", (f(5), *given, 0, False))


def _made():
    options = {"dtype": torch.float64}
    yield Call("aten.full.default", ((5, 4), 2.5), options)
    yield Call("aten.zeros.default", ((5, 4),), options)
    yield Call("aten.ones.default", ((5, 4),), options)
    yield Call("aten.empty.memory_format", ((5, 4),), options)
    for name in ("zeros", "ones", "empty"):
        yield Call(f"aten.new_{name}.default", (f(3, 2), (5, 4)))
    yield Call("aten.new_full.default", (f(3, 2), (5, 4), 2.5))
    yield Call("aten.arange.default", (5,))
    yield Call("aten.arange.start_step", (1, 9, 2), label="step")
    yield Call("aten.linspace.default", (0.0, 1.0, 5), options)
    yield Call("aten.eye.default", (5,), options)
    yield Call("aten.scalar_tensor.default", (1.5,), options)
    yield Call("meshwright.annotate.default", (f(5, 4), "", ""))
    yield Call("meshwright.classes.default", (whole(5, high=4), 4, -100))
    where = position_operand(3, 8, 1, 0)
    for kind in ("uniform", "normal", "integers"):
        yield Call("meshwright.draw.default", (kind, (5, 4), 2, 0, 1, 1, 0, where), label=kind)
    yield Call("meshwright.draw.default", ("normal", (20, 3), 0, 0, 1, 4, 0, where), label="tokens")
    yield Call("meshwright.draw.default", ("normal", (6, 10), 0, 1, 2, 1, 0, where), label="copies")
    yield Call("meshwright.draw.default", ("uniform", (5, 4), 1, -1, 1, 1, 0, where), label="none")


MAKERS = (
    _weight_norms, _softmax, _norms, _group_norms, _gates, _attention, _rings, _lookups, _losses,
    _spoken, _made,
)  # fmt: skip
