"""Calls of ops on numbers and shapes: pointwise, views, cuts, products, reductions."""

from __future__ import annotations

import torch

import meshwright.compile.square  # noqa: F401 - registers an op
from tests.program.call import Call, above, f, truth, unit, whole

aten = torch.ops.aten

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
    yield Call("aten.cat.default", ([f(0), f(5, 4)], 1), label="with an empty one")
    yield Call("aten.cat.default", ([f(5, 4), f(0), f(5, 2)], -1), label="with an empty between")
    yield Call("aten.constant_pad_nd.default", (x, (1, 2)))
    yield Call("aten.constant_pad_nd.default", (x, (0, -1, 0, 0), 3.0), label="cut, filled")
    yield Call("aten.constant_pad_nd.default", (x, (1, 1, 0, 0), 3.0), label="filled")
    yield Call("aten.unfold.default", (f(5, 7, 4), 1, 3, 2))
    yield Call("aten.unfold.default", (f(5, 6), -1, 2, 2), label="apart")
    yield Call("aten.unfold_backward.default", (f(5, 3, 4, 3), (5, 7, 4), 1, 3, 2))


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
    yield Call("meshwright.square.default", (x, "sample"))
    yield Call("meshwright.square.default", (f(1), ""), label="number")
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


MAKERS = (
    _unary, _binary, _ternary, _pointwise_backward, _views, _cuts, _along, _matmul, _reduce,
)  # fmt: skip
