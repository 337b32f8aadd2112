"""Calls of ops on complex numbers."""

from __future__ import annotations

import torch

from tests.program.call import Call, f


def _complex():
    z = torch.complex(f(5, 4), f(5, 4))
    yield Call("aten.complex.default", (f(5, 4), f(5, 4)))
    yield Call("aten.polar.default", (f(5, 4), f(4)))
    yield Call("aten.view_as_complex.default", (f(5, 4, 2),))
    for name in ("view_as_real", "conj_physical", "_conj_physical", "angle", "abs"):
        yield Call(f"aten.{name}.default", (z,), label="complex")
    yield Call("aten.mul.Tensor", (z, z[0]), label="complex")


def _transforms():
    x, z = f(3, 5, 4), torch.complex(f(3, 5, 4), f(3, 5, 4))
    for dims in ([1], [2], [1, 2]):
        yield Call("aten._fft_r2c.default", (x, dims, 1, True), label=f"{dims}")
        yield Call("aten._fft_c2c.default", (z, dims, 0, False), label=f"{dims}")
    for dim in (1, 2):  # torch takes one dim at a time back to real numbers
        yield Call("aten._fft_c2r.default", (z, [dim], 2, 2 * z.shape[dim] - 1), label=f"{dim}")


MAKERS = (_complex, _transforms)
