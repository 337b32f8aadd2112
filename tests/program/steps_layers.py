"""Steps of random programs that are layers: norms, attention, convolutions; and annotations."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from meshwright.program.program import Ref
from tests.program.steps_algebra import SIZES, dim_of, one
from tests.program.steps_shape import dense


def softmax(draw, graph, x):
    name = one(draw, "_softmax", "_log_softmax", "_safe_softmax")
    rest = () if name == "_safe_softmax" else (False,)
    graph.call(f"{name}.default", Ref(x), dim_of(draw, graph, x), *rest)


def _softmax_backward(draw, graph, x):
    dim = dim_of(draw, graph, x)
    (out,) = graph.call("_softmax.default", Ref(x), dim, False)
    grad = graph.input(*graph.shape(x))
    args = (Ref(grad), Ref(out), dim, torch.float64)
    graph.call("_softmax_backward_data.default", *args)


def _layer_norm(draw, graph, x):
    shape = graph.shape(x)
    tail = list(shape[draw(st.integers(0, len(shape) - 1)) :])
    weights = [Ref(graph.input(*tail)) if draw(st.booleans()) else None for _ in range(2)]
    made = graph.call("native_layer_norm.default", Ref(x), tail, *weights, 0.1)
    if draw(st.booleans()):
        grad = Ref(graph.input(*shape))
        args = (grad, Ref(x), tail, Ref(made[1]), Ref(made[2]))
        if None not in weights:
            graph.call("native_layer_norm_backward.default", *args, *weights, [True, True, True])


def _group_norm(draw, graph, x):
    shape = graph.shape(x)
    if len(shape) < 3:
        return
    samples, channels = shape[:2]
    groups = draw(st.sampled_from([k for k in range(1, channels + 1) if channels % k == 0]))
    space = graph.tensors[x].numel() // (samples * channels)
    weights = [Ref(graph.input(channels)) for _ in range(2)]
    args = (Ref(dense(graph, x)), *weights, samples, channels, space, groups, 0.1)
    graph.call("native_group_norm.default", *args)


def _gate(draw, graph, x):
    dim = dim_of(draw, graph, x)
    if graph.shape(x)[dim] % 2 == 0:
        graph.call("glu.default", Ref(x), dim)


def _attention(draw, graph, x):
    shape = graph.shape(x)
    # torch's kernel reads a query whose last dim is not next to each other wrongly.
    if len(shape) != 4 or graph.tensors[x].stride(-1) != 1:
        return
    keys = (*shape[:2], one(draw, 2, 3, 4), shape[3])
    k, v = graph.input(*keys), graph.input(*keys)
    name = "_scaled_dot_product_flash_attention_for_cpu.default"
    graph.call(name, Ref(x), Ref(k), Ref(v), 0.0, draw(st.booleans()))


def _convolution(draw, graph, x):
    shape = graph.shape(x)
    space = len(shape) - 2
    if space not in (1, 2):
        return
    kernel, padding = one(draw, 1, 2, 3), one(draw, 0, 1)
    stride = one(draw, 1, 1, 2)
    if min(shape[2:]) + 2 * padding < kernel:
        return
    out, groups = one(draw, *SIZES), one(draw, 1, 1, 2)
    if shape[1] % groups or out % groups:
        groups = 1
    w = graph.input(out, shape[1] // groups, *[kernel] * space)
    bias = Ref(graph.input(out)) if draw(st.booleans()) else None
    sizes = ([stride] * space, [padding] * space, [1] * space)
    args = (Ref(x), Ref(w), bias, *sizes, False, [0] * space, groups)
    (made,) = graph.call("convolution.default", *args)
    if draw(st.booleans()):
        grad = graph.input(*graph.shape(made))
        biases = [out] if bias is not None else None
        mask = [True, True, bias is not None]
        if bias is not None:
            args = (Ref(grad), Ref(x), Ref(w), biases, *sizes, False, [0] * space, groups, mask)
            graph.call("convolution_backward.default", *args)


def _pooled(draw, graph, x):
    shape = graph.shape(x)
    if len(shape) != 4 or min(shape[2:]) < 2:
        return
    stride, padding = one(draw, 1, 2), one(draw, 0, 1)
    window = ([2, 2], [stride, stride], [padding, padding])
    name = one(draw, "max_pool2d_with_indices", "avg_pool2d")
    if name == "avg_pool2d" or x in graph.exact:
        graph.call(f"{name}.default", Ref(x), *window)


def _enlarged(draw, graph, x):
    shape = graph.shape(x)
    if len(shape) == 4 and draw(st.booleans()):
        sizes = [2 * shape[2], shape[3] * one(draw, 1, 3)]
        graph.call("upsample_nearest2d.default", Ref(x), sizes)
    elif len(shape) == 3:
        graph.call("upsample_nearest1d.default", Ref(x), [2 * shape[2]])


def _counted(draw, graph, x):
    """Numbers of places, added to one dim or compared to make a mask."""
    dim, shape = dim_of(draw, graph, x), graph.shape(x)
    (places,) = graph.call("arange.default", shape[dim])
    (column,) = graph.call("view.default", Ref(places), [shape[dim]] + [1] * (len(shape) - 1 - dim))
    if draw(st.booleans()):
        (numbers,) = graph.call("_to_copy.default", Ref(column), dtype=torch.float64)
        graph.call("add.Tensor", Ref(x), Ref(numbers))
    else:
        (late,) = graph.call("ge.Scalar", Ref(column), 1)
        graph.call("where.self", Ref(late), Ref(x), Ref(graph.input(*shape)))


def _constant(draw, graph, x):
    name = one(draw, "ones", "full", "new_zeros", "full_like")
    shape = list(graph.shape(x))
    if name == "full_like":
        (made,) = graph.call("full_like.default", Ref(x), 0.5)
    elif name == "new_zeros":
        (made,) = graph.call("new_zeros.default", Ref(x), shape)
    else:
        rest = (0.5,) if name == "full" else ()
        (made,) = graph.call(f"{name}.default", shape, *rest, dtype=torch.float64)
    graph.call("add.Tensor", Ref(x), Ref(made))


def _loss(draw, graph, x):
    shape = graph.shape(x)
    if len(shape) == 2:
        (logs,) = graph.call("_log_softmax.default", Ref(x), 1, False)
        target = graph.index(shape[1], shape[0])
        args = (Ref(logs), Ref(target), None, one(draw, 0, 2), -100)
        graph.call("nll_loss_forward.default", *args)


def _annotated(draw, graph, x):
    """The user's word on x: dims split over some axes, whole over others, the rest left open."""
    shape, dims, whole = graph.shape(x), {}, []
    for axis in graph.axes:
        long = [k for k, size in enumerate(shape) if size >= axis.size and k not in dims]
        said = draw(st.sampled_from([None, "", *long]))
        if said == "":
            whole.append(axis.name)
        elif said is not None:
            dims[said] = axis.name
    names = ",".join(dims.get(k, "") for k in range(len(shape)))
    graph.call("meshwright.annotate.default", Ref(x), names, ",".join(whole))


STEPS = (
    _annotated, _annotated, _annotated, softmax, _softmax_backward, _layer_norm, _layer_norm,
    _group_norm, _gate, _attention, _convolution, _pooled, _enlarged, _counted, _constant, _loss,
)  # fmt: skip
