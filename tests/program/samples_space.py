"""Calls of ops over space: convolutions, pooling, padding, resizing, grids."""

from __future__ import annotations

import torch

from tests.program.call import Call, f, unit

aten = torch.ops.aten


def _convolution():
    plain = ((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    across = ((2, 2), (1, 1), (1, 1), True, (1, 1))
    cases = {
        "": (f(5, 3, 4, 4), f(6, 3, 3, 3), f(6), *plain),
        "no bias": (f(5, 3, 4, 4), f(6, 3, 3, 3), None, *plain),
        "one channel": (f(5, 1, 4, 4), f(6, 1, 3, 3), f(6), *plain),
        "grouped": (f(5, 4, 4, 4), f(6, 2, 3, 3), f(6), *plain[:-1], 2),
        "many groups": (f(5, 12, 4, 4), f(6, 2, 3, 3), f(6), *plain[:-1], 6),
        "depthwise": (f(5, 4, 4, 4), f(4, 1, 3, 3), f(4), *plain[:-1], 4),
        "multiplied": (f(5, 4, 4, 4), f(8, 1, 3, 3), None, *plain[:-1], 4),
        "transposed": (f(5, 3, 4, 4), f(3, 6, 3, 3), f(6), *across, 1),
        "transposed, apart": (
            f(5, 3, 5, 4), f(3, 4, 2, 2), f(4), (2, 2), (0, 0), (1, 1), True, (0, 0), 1,
        ),
        "transposed, grouped": (f(5, 6, 4, 4), f(6, 2, 3, 3), f(6), *across, 3),
        "one dim": (f(5, 3, 8), f(6, 3, 3), f(6), (2,), (1,), (1,), False, (0,), 1),
        "three dims": (
            f(5, 3, 3, 3, 3), f(4, 3, 2, 2, 2), f(4), (1, 1, 1), (0, 0, 0), (2, 2, 2), False,
            (0, 0, 0), 1,
        ),
    }  # fmt: skip
    for label, given in cases.items():
        yield Call("aten.convolution.default", given, label=label)
        out = aten.convolution.default(*given)
        x, w, bias, *rest = given
        sizes = None if bias is None else tuple(bias.shape)
        mask = (True, True, bias is not None)
        args = (f(*out.shape), x, w, sizes, *rest, mask)
        yield Call("aten.convolution_backward.default", args, label=label)
        if label == "grouped":
            args = (*args[:-1], (False, True, True))
            yield Call("aten.convolution_backward.default", args, label="first layer")
            args = (*args[:-1], (True, False, True))
            yield Call("aten.convolution_backward.default", args, label="frozen weight")


def _largest():
    x = f(5, 2, 4, 6)
    window = ((2, 2), (2, 2), (0, 0))
    yield Call("aten.max_pool2d_with_indices.default", (x, *window[:1]))
    yield Call("aten.max_pool2d_with_indices.default", (f(2, 4, 6), (2, 2)), label="one image")
    out, places = aten.max_pool2d_with_indices.default(x, (2, 2), (2, 2))
    args = (f(*out.shape), x, *window, (1, 1), False, places)
    yield Call("aten.max_pool2d_with_indices_backward.default", args)
    out, places = aten.adaptive_max_pool2d.default(x, (2, 3))
    yield Call("aten.adaptive_max_pool2d.default", (x, (2, 3)))
    yield Call("aten.adaptive_max_pool2d_backward.default", (f(*out.shape), x, places))
    x, step, none = f(5, 3, 4, 4, 2), (2, 2, 2), (0, 0, 0)
    yield Call("aten.max_pool3d_with_indices.default", (x, step))
    out, places = aten.max_pool3d_with_indices.default(x, step, step)
    args = (f(*out.shape), x, step, step, none, (1, 1, 1), False, places)
    yield Call("aten.max_pool3d_with_indices_backward.default", args)
    out, places = aten.adaptive_max_pool3d.default(x, (2, 2, 1))
    yield Call("aten.adaptive_max_pool3d.default", (x, (2, 2, 1)))
    yield Call("aten.adaptive_max_pool3d_backward.default", (f(*out.shape), x, places))


def _average():
    x, out = f(5, 2, 4, 6), f(5, 2, 2, 3)
    window = ((2, 2), (2, 2), (0, 0))
    yield Call("aten.avg_pool2d.default", (x, *window))
    yield Call("aten.avg_pool2d_backward.default", (out, x, *window, False, True, None))
    yield Call("aten._adaptive_avg_pool2d.default", (x, (2, 3)))
    yield Call("aten._adaptive_avg_pool2d_backward.default", (out, x))
    x, out, step, none = f(5, 3, 4, 4, 2), f(5, 3, 2, 2, 1), (2, 2, 2), (0, 0, 0)
    yield Call("aten.avg_pool3d.default", (x, step))
    yield Call("aten.avg_pool3d_backward.default", (out, x, step, step, none, False, True, None))
    yield Call("aten._adaptive_avg_pool3d.default", (x, (2, 2, 1)))
    yield Call("aten._adaptive_avg_pool3d_backward.default", (out, x))


def _padding():
    for space, shape in ((1, (5, 3, 6)), (2, (5, 3, 4, 6))):
        x, padding = f(*shape), (1, 2) * space
        for name in (f"reflection_pad{space}d", f"replication_pad{space}d"):
            out = getattr(aten, name).default(x, padding)
            yield Call(f"aten.{name}.default", (x, padding))
            yield Call(f"aten.{name}_backward.default", (f(*out.shape), x, padding))


_RESIZED = {
    "nearest1d": ((6,), ()),
    "linear1d": ((6,), (False,)),
    "nearest2d": ((4, 6), ()),
    "bilinear2d": ((4, 6), (False,)),
    "bicubic2d": ((4, 6), (True,)),
    "nearest3d": ((4, 2, 2), ()),
    "trilinear3d": ((4, 2, 2), (False,)),
}


def _resizing():
    for name, (space, corners) in _RESIZED.items():
        for label, sizes in (
            ("", tuple(2 * n for n in space)),
            ("smaller", tuple(n // 2 for n in space)),
        ):
            shape = (5, 3, *space)
            yield Call(f"aten.upsample_{name}.default", (f(*shape), sizes, *corners), label=label)
            args = (f(5, 3, *sizes), sizes, shape, *corners)
            yield Call(f"aten.upsample_{name}_backward.default", args, label=label)
    yield Call("aten.pixel_shuffle.default", (f(5, 12, 3, 2), 2))
    yield Call("aten.pixel_unshuffle.default", (f(5, 3, 4, 6), 2))
    window = ((2, 2), (1, 1), (0, 0), (1, 1))
    yield Call("aten.im2col.default", (f(5, 3, 4, 5), *window))
    yield Call("aten.col2im.default", (f(5, 12, 12), (4, 5), *window))
    yield Call("aten.im2col.default", (f(3, 4, 5), *window), label="one image")


def _grids():
    for space, size in ((2, (3, 5)), (3, (3, 5, 2))):
        x, grid = f(5, 3, *size), unit(5, *size, space)
        name = f"aten.grid_sampler_{space}d"
        yield Call(f"{name}.default", (x, grid, 0, 0, False))
        args = (f(5, 3, *size), x, grid, 0, 0, False)
        yield Call(f"{name}_backward.default", (*args, (True, True)))
        yield Call(f"{name}_backward.default", (*args, (False, True)), label="grid only")


MAKERS = (_convolution, _largest, _average, _padding, _resizing, _grids)
