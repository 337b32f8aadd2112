"""Calls of ops on batches of matrices, and of those that go by position."""

from __future__ import annotations

import torch

from tests.program.call import Call, above, f, truth, unit, whole


def _spread(*shape):
    """Matrices far from singular, and from having two eigenvalues alike."""
    n = shape[-1]
    return f(*shape) / 8 + torch.diag(torch.arange(1.0, n + 1, dtype=torch.float64))


def _definite(*shape):
    x = f(*shape)
    return x @ x.mT + 2 * torch.eye(shape[-1], dtype=torch.float64)


def _matrices():
    a, flat = _spread(5, 3, 3), _spread(3, 3)
    for name in ("linalg_inv_ex", "linalg_lu_factor_ex"):
        yield Call(f"aten.{name}.default", (a,))
        yield Call(f"aten.{name}.default", (flat,), label="one")
    for name in ("_linalg_det", "_linalg_slogdet", "linalg_matrix_exp", "linalg_qr", "linalg_lu"):
        yield Call(f"aten.{name}.default", (a,))
    yield Call("aten.linalg_eig.default", (a,))
    yield Call("aten._linalg_eigvals.default", (a,))
    for name in ("linalg_cholesky_ex", "cholesky"):
        yield Call(f"aten.{name}.default", (_definite(5, 3, 3),))
    yield Call("aten.cholesky_inverse.default", (torch.linalg.cholesky(_definite(5, 3, 3)),))
    yield Call("aten._linalg_eigh.default", (_definite(5, 3, 3),))
    yield Call("aten._linalg_svd.default", (_spread(4, 5, 3, 3),))
    yield Call("aten._linalg_solve_ex.default", (a, f(5, 3, 4)))
    yield Call("aten._linalg_solve_ex.default", (a, f(5, 3)), label="vectors")
    for left in (True, False):
        b = f(5, 3, 4) if left else f(5, 4, 3)
        how = {"upper": True, "left": left}
        yield Call("aten.linalg_solve_triangular.default", (a, b), how, f"left={left}")


def _complex():
    z = torch.complex(f(5, 4), f(5, 4))
    for name in ("conj", "_conj"):
        yield Call(f"aten.{name}.default", (z,))


def _distances():
    yield Call("aten._cdist_forward.default", (f(5, 4, 3), f(5, 7, 3), 1.0, None))
    x, y = f(5, 4, 3), f(5, 7, 3)
    apart = torch.ops.aten._cdist_forward.default(x, y, 1.0, None)
    yield Call("aten._cdist_backward.default", (f(5, 4, 7), x, y, 1.0, apart))


def _unusual():
    x, y, n = f(5, 4), f(5, 4), whole(5, 4, high=20)
    for name in ("celu", "deg2rad", "rad2deg", "i0", "signbit", "frexp"):
        overload = "Tensor" if name == "frexp" else "default"
        yield Call(f"aten.{name}.{overload}", (x,))
    for name in ("entr", "i0e", "i1", "i1e", "log_ndtr", "ndtri", "erfcx"):
        yield Call(f"aten.special_{name}.default", (unit(5, 4),))
    yield Call("aten.special_zeta.default", (above(5, 4), above(4)))
    yield Call("aten.polygamma.default", (1, above(5, 4)))
    yield Call("aten.mvlgamma.default", (above(5, 4), 2))
    for name in ("gcd", "lcm"):
        yield Call(f"aten.{name}.default", (n, whole(4, high=20)))
    for name in ("heaviside", "logaddexp2", "nextafter"):
        yield Call(f"aten.{name}.default", (x, y))
    for name in ("igamma", "igammac"):
        yield Call(f"aten.{name}.default", (above(5, 4), above(5, 4)))
    yield Call("aten.ldexp.Tensor", (x, n))
    yield Call("aten.logit_backward.default", (x, unit(5, 4)))
    for name in ("softshrink_backward", "hardshrink_backward"):
        yield Call(f"aten.{name}.default", (x, y, 0.5))


def _positions():
    x = f(5, 4, 6)
    yield Call("aten.diagonal.default", (x, 0, 1, 2))
    yield Call("aten.diagonal.default", (x, 1, 0, -1), label="apart")
    yield Call("aten.diagonal_backward.default", (f(5, 4), (5, 4, 6), 0, 1, 2))
    yield Call("aten.diagonal_scatter.default", (x, f(5, 4), 0, 1, 2))
    yield Call("aten.diag_embed.default", (f(5, 4),))
    for name in ("cummax", "cummin", "logcumsumexp", "_logcumsumexp"):
        yield Call(f"aten.{name}.default", (x, 1))
    yield Call("aten.kthvalue.default", (x, 2))
    yield Call("aten.kthvalue.default", (x, 2, 1, True), label="kept")
    yield Call("aten.mode.default", (whole(5, 9, high=3),))
    yield Call("aten.index_copy.default", (x, 1, torch.tensor([2, 0]), f(5, 2, 6)))
    yield Call("aten.index_fill.int_Scalar", (x, 1, torch.tensor([2, 0]), 1.5))
    yield Call("aten.index_fill.int_Tensor", (x, 1, torch.tensor([2, 0]), f()))
    yield Call("aten.index_reduce.default", (x, 1, torch.tensor([2, 0]), f(5, 2, 6), "amax"))
    edges = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    yield Call("aten.bucketize.Tensor", (x, edges))
    yield Call("aten.searchsorted.Tensor", (edges, x))
    yield Call("aten.searchsorted.Tensor", (f(5, 4, 3).sort(-1)[0], x), label="rows")
    yield Call("aten.isin.Tensor_Tensor", (whole(5, 4), torch.tensor([1, 3])))
    yield Call("aten.count_nonzero.dim_IntList", (truth(5, 4, 6), (1,)))
    yield Call("aten.count_nonzero.default", (truth(5, 4),))
    yield Call("aten.renorm.default", (x, 2, 1, 1.0))
    yield Call("aten.rot90.default", (x, 1, (0, 2)))


def _products():
    yield Call("aten.addr.default", (f(5, 4), f(5), f(4)))
    yield Call("aten.addr.default", (f(4), f(5), f(4)), label="row")
    yield Call("aten.addmv.default", (f(5), f(5, 6), f(6)))
    yield Call("aten.addbmm.default", (f(5, 4), f(3, 5, 6), f(3, 6, 4)))


MAKERS = (_matrices, _complex, _distances, _unusual, _positions, _products)
