"""Ops over space (sound, images, volumes): (samples, channels, space ...), where space is whole.

Channels are split as in matrix products: a convolution makes output channels and contracts input
channels; of a grouped one the groups are split. Pooling and resizing see one plane at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from meshwright.program.program import Arg, Value
from meshwright.program.rules.factor import Dim, OpView, Rule, RuleMaker, einsum, made, whole
from meshwright.program.rules.windows import Windows, blocked, windowed

__all__ = ["RULES"]

_N, _GROUP, _IN, _OUT = range(4)
"""Factors of a convolution: samples, groups, and input and output channels of each group."""


def _channels(
    view: OpView, weight: int, groups: int, *, transposed: bool
) -> tuple[tuple[int, ...], tuple[Dim, ...], tuple[Dim, ...], tuple[Dim, ...], Dim]:
    """(factor sizes, dims of the input, of the weight, of the output, of the bias)."""
    samples = view.operands[0].shape[0]
    one, two = view.operands[weight].shape[:2]
    inner, outer = (one // groups, two) if transposed else (two, one // groups)
    sizes = (samples, groups, inner, outer)

    def dim(*factors: int) -> Dim:
        return tuple(f for f in factors if sizes[f] > 1)

    space = ((),) * (len(view.operands[0].shape) - 2)
    read, written = dim(_GROUP, _IN), dim(_GROUP, _OUT)
    kernel = (read, dim(_OUT)) if transposed else (written, dim(_IN))
    x, out = (dim(_N), read, *space), (dim(_N), written, *space)
    return sizes, x, (*kernel, *space), out, written


def _convolution(view: OpView) -> Rule:
    """convolution(x, weight, bias, stride, padding, dilation, transposed, output padding, groups).

    Output channels are counted to find the groups that a rank has, so each group's stay whole.
    """
    groups, transposed = view.number(8), view.arg(6) is True
    sizes, x, weight, out, bias = _channels(view, 1, groups, transposed=transposed)
    given = [x, weight, (bias,)] if len(view.operands) == 3 else [x, weight]
    rule = Rule(sizes, tuple(given), (out,), addends=frozenset({2}))
    if not transposed:
        kernel = view.operands[1].shape[2:]
        rule = windowed(view, rule, Windows(kernel, stride=3, padding=4, dilation=5), [0], [0])
    elif _apart(view, 3):
        rule = blocked(view, rule, ((0,), ()), ((), (0,)))
    if groups == 1:
        return rule

    def local(args: tuple[Arg, ...], results: Sequence[Value]) -> tuple[Arg, ...]:
        return (*args[:8], results[0].shape[1] // sizes[_OUT])

    return replace(rule, whole=frozenset({_OUT}), arguments=local)


def _apart(view: OpView, stride: int) -> bool:
    """Whether each row of a transposed convolution's input makes rows that no other one does.

    Its arguments follow one another from `stride`.
    """
    weight = view.operands[-1 if stride == 4 else 1].shape[2:]
    kernel = view.numbers(stride) == weight
    bare = not any((*(view.numbers(stride + 1) or ()), *(view.numbers(stride + 4) or ())))
    return kernel and bare and set(view.numbers(stride + 2) or ()) == {1}


def _convolution_backward(view: OpView) -> Rule:
    """convolution_backward(grad, x, weight, bias sizes, .., groups, mask) -> dx, dw, db.

    The bias's gradient is of `grad` alone: ranks that split input channels each have all of it.
    """
    groups, transposed = view.number(9), view.arg(7) is True
    sizes, x, weight, out, bias = _channels(view, 2, groups, transposed=transposed)
    results: list[tuple[Dim, ...]] = made(view, x, weight, (bias,))
    last = len(results) - 1
    has_bias = view.op.outputs[-1] is not None
    biases = view.numbers(3)

    def local(args: tuple[Arg, ...], _: Sequence[Value]) -> tuple[Arg, ...]:
        channels = args[9]
        assert isinstance(channels, int)
        sized = None if biases is None else (channels,)
        return (
            *args[:3],
            sized,
            *args[4:9],
            channels // sizes[_OUT] if groups > 1 else 1,
            args[10],
        )

    rule = Rule(
        sizes,
        (out, x, weight),
        tuple(results),
        whole=frozenset({_OUT}) if groups > 1 else frozenset(),
        unaffected=frozenset({(last, _IN)}) if has_bias else frozenset(),
        count_args=((9, 0, 1),),
        arguments=local,
    )
    if transposed:
        small = [0] if view.op.outputs[0] is not None else []
        return blocked(view, rule, ((1,), small), ((0,), ())) if _apart(view, 4) else rule
    kernel = view.operands[2].shape[2:]
    windows = Windows(kernel, stride=4, padding=5, dilation=6, backward=True)
    return windowed(view, rule, windows, [0, 1], [0] if view.op.outputs[0] is not None else [])


def _planes(space: int, *, linear: bool = False) -> RuleMaker:
    """Samples and channels pass; the last `space` dims of every tensor are whole."""
    plain = _plain_planes(space, linear=linear)

    def rule(view: OpView) -> Rule:
        found = plain(view)
        kind = view.op.base.removeprefix("aten.").removesuffix("_backward")
        windows = _pooling(view, kind) if len(view.operands[0].shape) == space + 2 else None
        if windows is None:
            return found
        backward = windows.backward
        reads = [0, *([1] if backward else []), *([2] if backward and windows.counts else [])]
        makes = [0] if backward or not windows.counts else list(range(len(view.results)))
        return windowed(view, found, windows, reads, makes)

    return rule


def _pooling(view: OpView, kind: str) -> Windows | None:
    """The windows of a pooling op; None where it is another, or they count rows that are not."""
    if kind not in (
        "max_pool2d_with_indices",
        "max_pool3d_with_indices",
        "avg_pool2d",
        "avg_pool3d",
    ):
        return None
    backward = view.op.base.endswith("_backward")
    at = 2 if backward else 1  # of the kernel's sizes
    largest = kind.startswith("max")
    partial = view.arg(at + 4 if largest else at + 3, default=False) is True  # ceil mode
    inner = (
        not largest and view.arg(at + 4, default=True) is False and any(view.numbers(at + 2) or ())
    )
    if partial or inner or (largest and kind.startswith("max_pool3d")):
        return None
    return Windows(
        view.numbers(at) or (),
        stride=at + 1,
        padding=at + 2,
        dilation=at + 3 if largest else None,
        backward=backward,
        counts=largest,
        fill=-math.inf if largest else 0.0,
    )


def _plain_planes(space: int, *, linear: bool) -> RuleMaker:
    def pattern(value: Value) -> str:
        lead = len(value.shape) - space
        return " ".join([*(f"d{k}" for k in range(lead)), *["1"] * space])

    def rule(view: OpView) -> Rule:
        values = (*view.operands, *view.results)
        if len({len(value.shape) for value in values}) != 1:
            return whole(view)
        resized = view.op.base.startswith("aten.upsample_") and "_backward" in view.op.base
        # What grows is summed over ranks before it does.
        shrinks = view.results[0].bytes <= view.operands[0].bytes
        return einsum(
            view,
            [pattern(value) for value in view.operands],
            [pattern(value) for value in view.results],
            linear=[[0]] if linear and shrinks else [],
            shape_args=[(2, 0)] if resized else [],
        )

    return rule


def _nearest(space: int) -> RuleMaker:
    """upsample_nearest(x, size, ..): a row becomes a block of rows where the size is a multiple."""
    plain = _plain_planes(space, linear=True)

    def rule(view: OpView) -> Rule:
        backward = view.op.base.endswith("_backward")
        found = plain(view)
        small, large = (((), (0,)), ((0,), ())) if backward else (((0,), ()), ((), (0,)))

        def local(args: tuple[Arg, ...], results: Sequence[Value]) -> tuple[Arg, ...]:
            made = results[0].shape[2:]
            times = zip(view.operands[0].shape[2:], view.results[0].shape[2:], strict=True)
            read = tuple(n * a // b for n, (a, b) in zip(made, times, strict=True))
            return (args[0], read if backward else made, *args[2:])

        return replace(blocked(view, found, small, large), arguments=local)

    return rule


def _gathered(joined: int, apart: int) -> RuleMaker:
    """Channels and what stands beside them in one dim: pixels of a block, taps of a window.

    Args:
        joined: place among (operand, result) of the tensor that has both in its dim 1.
        apart: place of the other, whose dim 1 has channels alone.
    """

    def rule(view: OpView) -> Rule:
        values = (view.operands[0], view.results[0])
        ranks = [len(value.shape) for value in values]
        if min(ranks) < 3 or values[apart].shape[0] != values[joined].shape[0]:
            return whole(view)
        samples, channels = values[apart].shape[:2]
        sizes = (samples, channels, values[joined].shape[1] // channels)
        lead = {joined: ((0,), (1, 2)), apart: ((0,), (1,))}
        dims = [(*lead[place], *((),) * (ranks[place] - 2)) for place in (0, 1)]
        return Rule(sizes, (dims[0],), (dims[1],), whole=frozenset({2}), linear=(frozenset({0}),))

    return rule


def _grid(view: OpView) -> Rule:
    """x (n c ..), grid (n p q 2) -> (n c p q): any pixels of the grid, from whole planes."""
    space = len(view.operands[0].shape) - 2
    places = " ".join(f"p{k}" for k in range(space))
    planes = " ".join(["n", "c", *["1"] * space])
    return einsum(view, [planes, f"n {places} 1"], [f"n c {places}"], linear=[[0]])


def _grid_backward(view: OpView) -> Rule:
    """(grad, x, grid, ..) -> dx, a sum over the grid's pixels, and dgrid, over channels."""
    space = len(view.operands[1].shape) - 2
    places = " ".join(f"p{k}" for k in range(space))
    planes, grid = " ".join(["n", "c", *["1"] * space]), f"n {places} 1"
    operands = [f"n c {places}", planes, grid]
    return einsum(view, operands, made(view, planes, grid), linear=[[0]])


_LINEAR = {
    1: ("reflection_pad1d", "replication_pad1d", "upsample_linear1d"),
    2: (
        "avg_pool2d",
        "_adaptive_avg_pool2d",
        "reflection_pad2d",
        "replication_pad2d",
        "upsample_bilinear2d",
        "upsample_bicubic2d",
    ),
    3: (
        "avg_pool3d",
        "_adaptive_avg_pool3d",
        "upsample_trilinear3d",
    ),
}
_OTHER = {
    2: ("max_pool2d_with_indices", "adaptive_max_pool2d"),
    3: ("max_pool3d_with_indices", "adaptive_max_pool3d"),
}
"""Ops on planes and their backward, by how many dims a plane has."""

RULES: dict[str, RuleMaker] = {
    "aten.convolution": _convolution,
    "aten.convolution_backward": _convolution_backward,
    **{
        f"aten.{name}{suffix}": _planes(space, linear=linear)
        for linear, table in ((True, _LINEAR), (False, _OTHER))
        for space, names in table.items()
        for name in names
        for suffix in ("", "_backward")
    },
    **{
        f"aten.upsample_nearest{space}d{suffix}": _nearest(space)
        for space in (1, 2, 3)
        for suffix in ("", "_backward")
    },
    "aten.pixel_shuffle": _gathered(0, 1),
    "aten.pixel_unshuffle": _gathered(1, 0),
    "aten.im2col": _gathered(1, 0),
    "aten.col2im": _gathered(0, 1),
    "aten.grid_sampler_2d": _grid,
    "aten.grid_sampler_3d": _grid,
    "aten.grid_sampler_2d_backward": _grid_backward,
    "aten.grid_sampler_3d_backward": _grid_backward,
}
