"""A call of every op that has a rule, as transformers' and convolutional networks' traces make it.

`SAMPLES` maps an op's name to calls; dims are uneven under two and three ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from meshwright.compile.random import position_operand
from meshwright.program.program import Op, Program, Ref, Symbol, Value

aten = torch.ops.aten


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call of an op, by its full name."""

    name: str
    args: tuple
    kwargs: dict = field(default_factory=dict)
    label: str = ""

    @property
    def base(self):
        return self.name.rsplit(".", 1)[0]

    def __str__(self):
        return f"{self.name}-{self.label}" if self.label else self.name


def program_of(call):
    """(program of that one op, its inputs by name)."""
    values, inputs, tensors = [], [], {}

    def new(tensor):
        values.append(Value(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)))
        return len(values) - 1

    def arg(found):
        if isinstance(found, Tensor):
            number = new(found)
            inputs.append((f"x{number}", number))
            tensors[f"x{number}"] = found
            return Ref(number)
        if isinstance(found, (list, tuple)):
            return tuple(arg(part) for part in found)
        if isinstance(found, torch.dtype):
            return Symbol("dtype", str(found).removeprefix("torch."))
        if isinstance(found, torch.memory_format):
            return Symbol("memory_format", str(found).removeprefix("torch."))
        return found

    args = tuple(arg(found) for found in call.args)
    kwargs = tuple((name, arg(found)) for name, found in call.kwargs.items())
    namespace, name, overload = call.name.split(".")
    function = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    made = function(*call.args, **call.kwargs)
    packed = isinstance(made, (tuple, list))
    outputs = tuple(
        new(tensor) if isinstance(tensor, Tensor) else None
        for tensor in (made if packed else [made])
    )
    op = Op(call.name, args, kwargs, outputs, packed)
    results = tuple((f"y{k}", value) for k, value in enumerate(op.results))
    return Program(tuple(values), tuple(inputs), (op,), results), tensors


# ── operands ─────────────────────────────────────────────────────────────────────────────────────


def _random(shape):
    seed = sum((k + 2) * size for k, size in enumerate(shape)) + _random.count
    _random.count += 1
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


_random.count = 0


def f(*shape):
    """Numbers in [-2, 2)."""
    return _random(shape) * 4 - 2


def unit(*shape):
    """Numbers in [0.05, 0.95)."""
    return _random(shape) * 0.9 + 0.05


def above(*shape):
    """Numbers in [1.1, 3.1)."""
    return _random(shape) * 2 + 1.1


def whole(*shape, high=7):
    """Whole numbers in [0, high)."""
    return (_random(shape) * high).long()


def truth(*shape):
    """True or false."""
    return _random(shape) < 0.5


ANYWHERE = """
abs asinh atan ceil cos cosh digamma erf erfc exp exp2 expm1 floor frac gelu hardshrink
hardsigmoid hardswish hardtanh isfinite isinf isnan isneginf isposinf leaky_relu mish nan_to_num
neg reciprocal relu relu6 round sgn sigmoid sign silu sin sinc sinh softplus softshrink square
tan tanh trunc elu logical_not clone detach alias lift_fresh_copy ones_like zeros_like
empty_like zero
""".split()  # noqa: SIM905 - a table of words

IN_UNIT = """
acos asin atanh erfinv log log10 log1p log2 logit rsqrt sqrt lgamma
""".split()  # noqa: SIM905 - a table of words

BINARY = """
add sub mul div rsub copysign eq ne lt le gt ge fmod remainder
""".split()  # noqa: SIM905 - a table of words


def _unary():
    for name in ANYWHERE:
        yield Call(f"aten.{name}.default", (f(5, 4),))
    for name in IN_UNIT:
        yield Call(f"aten.{name}.default", (unit(5, 4),))
    yield Call("aten.acosh.default", (above(5, 4),))
    yield Call("aten.bitwise_not.default", (whole(5, 4),))
    yield Call("aten.full_like.default", (f(5, 4), 2.5))
    yield Call("aten.fill.Scalar", (f(5, 4), 2.5))
    yield Call("aten.fill.Tensor", (f(5, 4), f()))
    yield Call("aten.gelu.default", (f(5, 4),), {"approximate": "tanh"}, "tanh")
    yield Call("aten.clone.default", (f(5, 4),), {"memory_format": torch.contiguous_format}, "kept")
    for dtype in (torch.float32, torch.int64, torch.bool):
        yield Call("aten._to_copy.default", (f(5, 4),), {"dtype": dtype}, str(dtype))
    yield Call("aten._to_copy.default", (whole(5, 4),), {"dtype": torch.float64}, "from int")


def _binary():
    a, b, row = f(5, 4), f(5, 4), f(4)
    for name in ["atan2", "fmax", "fmin", "hypot", "logaddexp", "maximum", "minimum"]:
        yield Call(f"aten.{name}.default", (a, b))
        yield Call(f"aten.{name}.default", (a, row), label="row")
    for name in BINARY:
        yield Call(f"aten.{name}.Tensor", (a, b))
        yield Call(f"aten.{name}.Tensor", (a, row), label="row")
        yield Call(f"aten.{name}.Tensor", (f(5, 1), row), label="crossed")
        yield Call(f"aten.{name}.Scalar", (a, 1.5))
    for name in ("add", "sub", "rsub"):
        yield Call(f"aten.{name}.Tensor", (a, b), {"alpha": 0.5}, "alpha")
        yield Call(f"aten.{name}.Tensor", (a, f()), label="number")
    yield Call("aten.add.Tensor", (a, 1.5), label="scalar")
    yield Call("aten.mul.Tensor", (a, 1.5), label="scalar")
    yield Call("aten.mul.Tensor", (a, f()), label="number")
    yield Call("aten.div.Tensor", (a, 3.0), label="scalar")
    for mode in ("floor", "trunc", None):
        yield Call("aten.div.Tensor_mode", (a, b), {"rounding_mode": mode}, str(mode))
    yield Call("aten.div.Tensor", (whole(5, 4), 2), label="int")
    yield Call("aten.floor_divide.default", (a, b))
    for name in ("logical_and", "logical_or", "logical_xor"):
        yield Call(f"aten.{name}.default", (truth(5, 4), truth(5, 4)))
    for name in ("bitwise_and", "bitwise_or", "bitwise_xor"):
        yield Call(f"aten.{name}.Tensor", (whole(5, 4), whole(5, 4)))
        yield Call(f"aten.{name}.Tensor", (truth(1, 4), truth(5, 1)), label="mask")
    for name in ("bitwise_left_shift", "bitwise_right_shift"):
        yield Call(f"aten.{name}.Tensor", (whole(5, 4), whole(5, 4, high=3)))
    yield Call("aten.pow.Tensor_Tensor", (unit(5, 4), b))
    yield Call("aten.pow.Tensor_Scalar", (a, 3))
    yield Call("aten.pow.Scalar", (2.0, a))
    yield Call("aten.xlogy.Tensor", (a, unit(5, 4)))
    yield Call("aten.special_xlog1py.default", (a, unit(5, 4)))
    yield Call("aten.clamp.default", (a, -1.0, 1.0))
    yield Call("aten.clamp.Tensor", (a, row, None))
    yield Call("aten.clamp_max.default", (a, 1.0))
    yield Call("aten.clamp_min.default", (a, -1.0))
    yield Call("aten.clamp_min.Tensor", (a, row))
    yield Call("aten._prelu_kernel.default", (f(5, 4), f(1, 4)))
    yield Call("aten._prelu_kernel_backward.default", (f(5, 4), f(5, 4), f(1, 4)))
    yield Call("aten.copy.default", (a, b))
    yield Call("aten.copy.default", (a, row), label="row")
    yield Call("aten.threshold.default", (a, 0.1, 7.0))


def _ternary():
    a, b, c = f(5, 4), f(5, 4), unit(5, 4)
    yield Call("aten.addcmul.default", (a, b, c), {"value": 0.5})
    yield Call("aten.addcdiv.default", (a, b, c), {"value": 0.5})
    yield Call("aten.lerp.Scalar", (a, b, 0.3))
    yield Call("aten.lerp.Tensor", (a, b, c))
    yield Call("aten.where.self", (truth(5, 4), a, b))
    yield Call("aten.where.self", (truth(5, 1), f(4), f()), label="spread")
    yield Call("aten.masked_fill.Scalar", (a, truth(5, 4), float("-inf")))
    yield Call("aten.masked_fill.Scalar", (a, truth(4), -1e9), label="row")
    yield Call("aten.masked_fill.Tensor", (a, truth(5, 1), f()))


def _pointwise_backward():
    grad, x = f(5, 4), f(5, 4)
    for name in ["hardsigmoid", "hardswish", "mish", "sigmoid", "silu", "tanh", "gelu"]:
        yield Call(f"aten.{name}_backward.default", (grad, x))
    yield Call("aten.gelu_backward.default", (grad, x), {"approximate": "tanh"}, "tanh")
    yield Call("aten.threshold_backward.default", (grad, x, 0.0))
    yield Call("aten.hardtanh_backward.default", (grad, x, -1.0, 1.0))
    yield Call("aten.leaky_relu_backward.default", (grad, x, 0.1, False))
    yield Call("aten.softplus_backward.default", (grad, x, 1.0, 20.0))
    yield Call("aten.elu_backward.default", (grad, 1.0, 1.0, 1.0, False, x))
    buffer = aten.log_sigmoid_forward.default(x)[1]
    yield Call("aten.log_sigmoid_backward.default", (grad, x, buffer))


# ── shapes ───────────────────────────────────────────────────────────────────────────────────────


def _views():
    x = f(5, 4, 6)
    for name in ("aten.view", "aten._unsafe_view", "aten.reshape"):
        yield Call(f"{name}.default", (x, (20, 6)), label="join")
        yield Call(f"{name}.default", (f(20, 6), (5, 4, 6)), label="part")
        yield Call(f"{name}.default", (f(5, 24), (5, -1, 3, 2)), label="guess")
        yield Call(f"{name}.default", (f(6, 4, 5), (8, 3, 5)), label="crossing")
        yield Call(f"{name}.default", (f(5, 3, 1, 4), (1, 15, 4)), label="ones")
        yield Call(f"{name}.default", (f(5, 24), (5, 3, 4, 2)), label="fused heads")
    yield Call("aten.view.dtype", (f(5, 4), torch.int64))
    yield Call("aten.unsqueeze.default", (f(5, 4), 1))
    yield Call("aten.unsqueeze.default", (f(5, 4), -1), label="last")
    yield Call("aten.squeeze.dim", (f(5, 1, 4), 1))
    yield Call("aten.squeeze.dims", (f(1, 5, 1, 4), (0, 2)))
    yield Call("aten.t.default", (f(5, 4),))
    yield Call("aten.t.default", (f(5),), label="vector")
    yield Call("aten.transpose.int", (x, 1, -1))
    yield Call("aten.permute.default", (x, (2, 0, -2)))
    yield Call("aten.expand.default", (f(5, 1, 4), (5, 3, 4)))
    yield Call("aten.expand.default", (f(4), (5, -1)), label="lead")
    yield Call("aten.expand.default", (f(5, 1), (-1, 6)), label="kept")


def _cuts():
    x = f(5, 6)
    yield Call("aten.slice.Tensor", (x, 1, 1, 5))
    yield Call("aten.slice.Tensor", (x, 0, 1, 5, 2), label="step")
    yield Call("aten.slice.Tensor", (x, 0, 0, 9223372036854775807), label="whole")
    yield Call("aten.slice.Tensor", (x, 1, -6, 6), label="whole, named")
    yield Call("aten.slice.Tensor", (x,), label="bare")
    yield Call("aten.slice_backward.default", (f(5, 4), (5, 6), 1, 1, 5, 1))
    yield Call(
        "aten.slice_backward.default", (x, (5, 6), 0, 0, 9223372036854775807, 1), label="whole"
    )
    yield Call("aten.select.int", (x, 1, 2))
    yield Call("aten.select.int", (f(5, 4, 6), -2, -1), label="last")
    yield Call("aten.select_backward.default", (f(5, 6), (5, 4, 6), 1, 2))
    yield Call("aten.unbind.int", (f(3, 5, 4),))
    yield Call("aten.unbind.int", (f(5, 4, 3), -1), label="last")
    yield Call("aten.stack.default", ([f(5, 4), f(5, 4), f(5, 4)],))
    yield Call("aten.stack.default", ([f(5, 4), f(5, 4)], -1), label="last")
    yield Call("aten.split.Tensor", (x, 2, 1))
    yield Call("aten.split.Tensor", (f(5, 6), 2), label="rows")
    yield Call("aten.split_with_sizes.default", (f(5, 12), (4, 4, 4), -1))
    yield Call("aten.unsafe_split.Tensor", (f(5, 6), 2, 1))
    yield Call("aten.slice_scatter.default", (f(5, 6), f(5, 3), 1, 1, 4))
    yield Call("aten.slice_scatter.default", (f(5, 6), f(2, 6), 0, 1, 3), label="rows")
    yield Call("aten.select_scatter.default", (f(5, 6), f(5), -1, 2))
    yield Call("aten.select_scatter.default", (f(5, 6), f(6), 0, 2), label="row")
    yield Call("aten.cat.default", ([f(5, 4), f(5, 2)], 1))
    yield Call("aten.cat.default", ([f(5, 4), f(2, 4)],), label="rows")
    yield Call("aten.constant_pad_nd.default", (x, (1, 2)))
    yield Call("aten.constant_pad_nd.default", (x, (0, -1, 0, 0), 3.0), label="cut, filled")
    yield Call("aten.constant_pad_nd.default", (x, (1, 1, 0, 0), 3.0), label="filled")
    yield Call("aten.repeat.default", (f(5, 4), (3, 1, 2)))
    yield Call("aten.repeat.default", (f(5, 4), (2, 1)), label="rows")


def _along():
    x = f(5, 6)
    yield Call("aten.tril.default", (f(5, 4, 6),))
    yield Call("aten.triu.default", (f(5, 4, 6), 1))
    yield Call("aten.cumsum.default", (x, 1))
    yield Call("aten.cumsum.default", (whole(5, 6), -1), label="int")
    yield Call("aten.cumprod.default", (x, 1))
    yield Call("aten.flip.default", (x, (1,)))
    yield Call("aten.flip.default", (x, (0, 1)), label="both")
    yield Call("aten.roll.default", (x, (2,), (0,)))
    yield Call("aten.roll.default", (x, (2,)), label="flat")
    yield Call("aten.sort.default", (x,))
    yield Call("aten.sort.default", (x, 0, True), label="rows")
    yield Call("aten.sort.stable", (whole(5, 6),), {"stable": True, "dim": 0, "descending": True})
    yield Call("aten.topk.default", (x, 2))
    yield Call("aten.topk.default", (x, 2, 0), label="rows")


# ── sums and products ────────────────────────────────────────────────────────────────────────────


def _matmul():
    yield Call("aten.mm.default", (f(5, 4), f(4, 6)))
    yield Call("aten.bmm.default", (f(5, 3, 4), f(5, 4, 6)))
    yield Call("aten.mv.default", (f(5, 4), f(4)))
    yield Call("aten.dot.default", (f(5), f(5)))
    yield Call("aten.vdot.default", (f(5), f(5)))
    for label, bias in (("row", f(6)), ("full", f(5, 6)), ("column", f(5, 1))):
        yield Call("aten.addmm.default", (bias, f(5, 4), f(4, 6)), label=label)
    yield Call("aten.addmm.default", (f(6), f(5, 4), f(4, 6)), {"beta": 0.5, "alpha": 2}, "scaled")
    yield Call("aten.baddbmm.default", (f(5, 3, 6), f(5, 3, 4), f(5, 4, 6)))
    yield Call("aten.baddbmm.default", (f(3, 6), f(5, 3, 4), f(5, 4, 6)), label="spread")
    yield Call("aten.baddbmm.default", (f(5, 1, 6), f(5, 3, 4), f(5, 4, 6)), {"beta": 0.5}, "alibi")


def _reduce():
    x = f(5, 4, 6)
    yield Call("aten.sum.default", (x,))
    yield Call("aten.sum.dim_IntList", (x, (0, 2)))
    yield Call("aten.sum.dim_IntList", (x, (-1,), True), label="kept")
    yield Call("aten.sum.dim_IntList", (x, None, True), label="all kept")
    yield Call("aten.sum.default", (truth(5, 4),), label="count")
    yield Call("aten.sum.default", (f(),), label="number")
    for name in ("amax", "amin"):
        yield Call(f"aten.{name}.default", (x, (-1,), True))
        yield Call(f"aten.{name}.default", (x, (0,)), label="rows")
        yield Call(f"aten.{name}.default", (whole(5, 6),), label="all, int")
    for name in ("any", "all"):
        yield Call(f"aten.{name}.default", (truth(5, 4),))
        yield Call(f"aten.{name}.dim", (truth(5, 4), 1, True))
        yield Call(f"aten.{name}.dims", (truth(5, 4, 6), (0, -1)))
    yield Call("aten.prod.default", (x,))
    yield Call("aten.prod.dim_int", (x, 1))
    for name in ("argmax", "argmin"):
        yield Call(f"aten.{name}.default", (x,))
        yield Call(f"aten.{name}.default", (x, -1), label="last")
        yield Call(f"aten.{name}.default", (x, 1, True), label="kept")
    for name in ("max", "min", "median"):
        yield Call(f"aten.{name}.default", (x,))
        yield Call(f"aten.{name}.dim", (x, 1))
        yield Call(f"aten.{name}.dim", (x, -1, True), label="kept")
    yield Call("aten.logsumexp.default", (x, (-1,)))
    yield Call("aten.logsumexp.default", (x, (1,), True), label="kept")
    yield Call("aten.linalg_vector_norm.default", (x,))
    yield Call("aten.linalg_vector_norm.default", (x, 2, (-1,), True), label="kept")
    yield Call("aten.linalg_vector_norm.default", (x, 1, (0,)), label="rows")
    for name in ("var", "std", "var_mean"):
        yield Call(
            f"aten.{name}.correction", (x, (-1,)), {"correction": 1, "keepdim": True}, "kept"
        )
        yield Call(f"aten.{name}.correction", (x, (1,)), {"correction": 0})
        yield Call(f"aten.{name}.correction", (x,), label="all")


# ── layers ───────────────────────────────────────────────────────────────────────────────────────


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
    yield Call(f"{name}.default", (q, few, few, 0.0, True), label="grouped")


def _pooling():
    x = f(5, 2, 4, 6)
    window = ((2, 2), (2, 2), (0, 0))
    yield Call("aten.max_pool2d_with_indices.default", (x, *window[:1]))
    yield Call("aten.max_pool2d_with_indices.default", (f(2, 4, 6), (2, 2)), label="one image")
    out, places = aten.max_pool2d_with_indices.default(x, (2, 2), (2, 2))
    args = (f(*out.shape), x, *window, (1, 1), False, places)
    yield Call("aten.max_pool2d_with_indices_backward.default", args)
    yield Call("aten.avg_pool2d.default", (x, *window))
    yield Call("aten.avg_pool2d_backward.default", (f(*out.shape), x, *window, False, True, None))
    yield Call("aten.pixel_shuffle.default", (f(5, 4, 3, 2), 2))
    yield Call("aten.pixel_unshuffle.default", (x, 2))
    yield Call("aten._adaptive_avg_pool2d.default", (x, (2, 3)))
    yield Call("aten._adaptive_avg_pool2d_backward.default", (f(5, 2, 2, 3), x))
    yield Call("aten.upsample_nearest2d.default", (x, (8, 12)))
    yield Call("aten.upsample_nearest2d_backward.default", (f(5, 2, 8, 12), (8, 12), (5, 2, 4, 6)))
    yield Call("aten.upsample_bilinear2d.default", (x, (8, 12), False))
    args = (f(5, 2, 8, 12), (8, 12), (5, 2, 4, 6), False)
    yield Call("aten.upsample_bilinear2d_backward.default", args)


def _convolution():
    plain = ((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    cases = {
        "": (f(5, 3, 4, 4), f(6, 3, 3, 3), f(6), *plain),
        "no bias": (f(5, 3, 4, 4), f(6, 3, 3, 3), None, *plain),
        "grouped": (f(5, 4, 4, 4), f(6, 2, 3, 3), f(6), *plain[:-1], 2),
        "depthwise": (f(5, 4, 4, 4), f(4, 1, 3, 3), f(4), *plain[:-1], 4),
        "transposed": (f(5, 3, 4, 4), f(3, 6, 3, 3), f(6), *plain[:3], True, (0, 0), 1),
        "one dim": (f(5, 3, 8), f(6, 3, 3), f(6), (1,), (1,), (1,), False, (0,), 1),
    }
    for label, given in cases.items():
        yield Call("aten.convolution.default", given, label=label)
        out = aten.convolution.default(*given)
        x, w, bias, *rest = given
        sizes = None if bias is None else tuple(bias.shape)
        mask = (True, True, bias is not None)
        args = (f(*out.shape), x, w, sizes, *rest, mask)
        yield Call("aten.convolution_backward.default", args, label=label)
    args = (*args[:-1], (False, True, True))
    yield Call("aten.convolution_backward.default", args, label="first layer")


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
    yield Call("aten.index.Tensor", (x, [whole(3, high=5)]))
    yield Call("aten.index.Tensor", (x, [None, whole(3, high=6)]), label="second")
    crossed = [whole(5, 1, high=5), whole(1, 3, high=6)]
    yield Call("aten.index.Tensor", (x, crossed), label="crossed")
    yield Call("aten.index.Tensor", (x, [whole(3, high=5), None, whole(3, high=4)]), label="apart")
    yield Call("aten.index.Tensor", (f(5, 4), [truth(5, 4)]), label="mask")


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
    where = position_operand(3, 8, 1, 0)
    for kind in ("uniform", "normal", "integers"):
        yield Call("meshwright.draw.default", (kind, (5, 4), 2, 0, 1, 1, 0, where), label=kind)
    yield Call("meshwright.draw.default", ("normal", (20, 3), 0, 0, 1, 4, 0, where), label="tokens")
    yield Call("meshwright.draw.default", ("normal", (6, 10), 0, 1, 2, 1, 0, where), label="copies")
    yield Call("meshwright.draw.default", ("uniform", (5, 4), 1, -1, 1, 1, 0, where), label="none")


_MAKERS = (
    _unary, _binary, _ternary, _pointwise_backward, _views, _cuts, _along, _matmul, _reduce,
    _softmax, _norms, _weight_norms, _attention, _pooling, _convolution, _lookups, _losses, _made,
)  # fmt: skip


@cache
def calls():
    """Every sample call, in a fixed order."""
    _random.count = 0
    return tuple(call for maker in _MAKERS for call in maker())
