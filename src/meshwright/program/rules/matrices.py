"""Batches of matrices: leading dims pass, the matrices stay whole."""

from __future__ import annotations

from collections.abc import Sequence

from meshwright.program.rules.factor import OpView, Rule, RuleMaker, einsum, whole

__all__ = ["RULES"]


def _batched(view: OpView, given: Sequence[int], made: Sequence[int]) -> Rule:
    """Each tensor's last so many dims are whole; those before them are batches, broadcast."""

    def patterns(counts: Sequence[int]) -> list[str]:
        return [" ".join(["...", *["1"] * count]) for count in counts]

    shapes = [value.shape for value in (*view.operands, *view.results)]
    if any(count > len(shape) for count, shape in zip((*given, *made), shapes, strict=True)):
        return whole(view)
    return einsum(view, patterns(given), patterns(made))


def _matrices(view: OpView) -> Rule:
    """Decompositions, inverses, determinants: results have what the first operand has before."""
    batch = len(view.operands[0].shape) - 2
    made = [len(value.shape) - batch for value in view.results]
    if batch < 0 or min(made, default=0) < 0 or any(len(v.shape) < 2 for v in view.operands):
        return whole(view)
    return _batched(view, [2] * len(view.operands), made)


def _solve(view: OpView) -> Rule:
    """_linalg_solve_ex(A, B): B is vectors where it has one dim less, and all but its columns."""
    a, b = (value.shape for value in view.operands)
    batch = len(a) - 2
    right = 1 if len(b) == len(a) - 1 and b == a[:-1] else 2
    return _batched(view, [2, right], [len(value.shape) - batch for value in view.results])


def _triangular(view: OpView) -> Rule:
    """linalg_solve_triangular(A, B, left): columns of B (rows where A stands right) are apart."""
    left = dict(view.op.kwargs).get("left", True) is True
    if min(len(value.shape) for value in view.operands) < 2:
        return whole(view)
    given = "... 1 k" if left else "... k 1"
    return einsum(view, ["... 1 1", given], [given], linear=[[1]])


def _distances(view: OpView) -> Rule:
    """_cdist_forward(x (b i d), y (b j d)) -> (b i j)."""
    return einsum(view, ["... i d", "... j d"], ["... i j"], keep="d")


def _distances_backward(view: OpView) -> Rule:
    """(grad (b i j), x (b i d), y (b j d), p, distances (b i j)) -> (b i d): a sum over j."""
    return einsum(view, ["... i j", "... i d", "... j d", "... i j"], ["... i d"], keep="d")


RULES: dict[str, RuleMaker] = {
    **{
        f"aten.{name}": _matrices
        for name in (
            "linalg_inv_ex", "linalg_cholesky_ex", "cholesky", "cholesky_inverse", "linalg_qr",
            "linalg_lu", "linalg_lu_factor_ex", "linalg_eig", "linalg_matrix_exp", "_linalg_eigh",
            "_linalg_eigvals", "_linalg_svd", "_linalg_det", "_linalg_slogdet",
        )
    },
    "aten._linalg_solve_ex": _solve,
    "aten.linalg_solve_triangular": _triangular,
    "aten._cdist_forward": _distances,
    "aten._cdist_backward": _distances_backward,
}  # fmt: skip
