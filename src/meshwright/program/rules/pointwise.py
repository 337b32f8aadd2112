"""Pointwise ops: operands broadcast, every dim passes through."""

from __future__ import annotations

from meshwright.program.program import ITEMSIZE
from meshwright.program.rules.factor import OpView, Rule, RuleMaker, einsum

__all__ = ["RULES", "pointwise"]

_ANY = """
abs acos acosh asin asinh atan atan2 atanh bitwise_and bitwise_not bitwise_or bitwise_xor ceil clamp
clamp_max clamp_min copysign cos cosh digamma elu elu_backward eq erf erfc erfinv exp exp2 expm1
floor floor_divide fmax fmin fmod frac ge gelu gelu_backward gt hardshrink hardsigmoid
hardsigmoid_backward hardswish hardswish_backward hardtanh hardtanh_backward hypot isfinite isinf
isnan le leaky_relu leaky_relu_backward lerp lgamma log log10 log1p log2 log_sigmoid_backward
logaddexp logical_and logical_not logical_or logical_xor logit lt masked_fill maximum minimum mish
mish_backward nan_to_num ne pow reciprocal relu relu6 remainder round rsqrt
sgn sigmoid sigmoid_backward sign silu silu_backward sin sinh softplus
softplus_backward softshrink sqrt square tan tanh tanh_backward threshold threshold_backward trunc
xlogy special_xlog1py addcmul addcdiv ones_like zeros_like full_like empty_like fill zero
isposinf isneginf
_prelu_kernel _prelu_kernel_backward sinc where bitwise_left_shift bitwise_right_shift
angle celu polar conj _conj _conj_physical deg2rad rad2deg gcd lcm heaviside i0 igamma
igammac ldexp logaddexp2 mvlgamma nextafter polygamma signbit logit_backward softshrink_backward
hardshrink_backward special_entr special_i0e special_i1 special_i1e special_log_ndtr special_ndtri
special_erfcx special_zeta frexp
""".split()  # noqa: SIM905 - a table of words

# In which operands (by place) an op is linear, together: a partial sum passes through those.
_LINEAR: dict[str, tuple[tuple[int, ...], ...]] = {
    "add": ((0, 1),),
    "sub": ((0, 1),),
    "rsub": ((0, 1),),
    "mul": ((0,), (1,)),
    "div": ((0,),),
    "neg": ((0,),),
    "clone": ((0,),),
    "conj_physical": ((0,),),
    "_conj_physical": ((0,),),
    "detach": ((0,),),
    "alias": ((0,),),
    "copy": ((1,),),
    "_to_copy": ((0,),),
    "lift_fresh_copy": ((0,),),
    "threshold_backward": ((0,),),
    "gelu_backward": ((0,),),
    "silu_backward": ((0,),),
    "tanh_backward": ((0,),),
    "sigmoid_backward": ((0,),),
    "masked_fill": (),
}


def pointwise(view: OpView) -> Rule:
    """`..., ... -> ...` for any number of operands and results."""
    name = view.op.base.removeprefix("aten.")
    linear = [g for g in _LINEAR.get(name, ()) if all(p < len(view.operands) for p in g)]
    linear = [g for g in linear if not any(_narrows(view, p) for p in g)]
    if name in ("add", "sub", "rsub") and len(view.operands) == 1:
        linear = []  # x + 1 is not linear
    if name == "div" and dict(view.op.kwargs).get("rounding_mode") is not None:
        linear = []
    if name == "where" and len(view.operands) == 3:
        linear = [(1, 2)]
    return einsum(view, ["..."] * len(view.operands), ["..."] * len(view.results), linear=linear)


def _narrows(view: OpView, place: int) -> bool:
    """Rounding is not linear: partial sums are paid for before it, in the wider dtype."""
    before, after = view.operands[place].dtype, view.results[0].dtype
    if before == after or _counts(before):
        return before != after and _counts(after)
    return _counts(after) or ITEMSIZE[after] <= ITEMSIZE[before]


def _counts(dtype: str) -> bool:
    return "int" in dtype or dtype == "bool"


def _annotate(view: OpView) -> Rule:
    return einsum(view, ["..."], ["..."], linear=[[0]])


RULES: dict[str, RuleMaker] = {
    **dict.fromkeys((f"aten.{name}" for name in (*_ANY, *_LINEAR)), pointwise),
    "meshwright.annotate": _annotate,
    "meshwright.classes": pointwise,
}
