"""Complex numbers and Fourier transforms: linear ops, some of which need dims whole."""

from __future__ import annotations

from meshwright.program.rules.factor import OpView, Rule, RuleMaker, einsum

__all__ = ["RULES"]


def _pairs(view: OpView) -> Rule:
    """view_as_complex: the last dim holds a real and an imaginary part."""
    return einsum(view, ["... 1"], ["..."], linear=[[0]])


def _parts(view: OpView) -> Rule:
    return einsum(view, ["..."], ["... 1"], linear=[[0]])


def _complex(view: OpView) -> Rule:
    return einsum(view, ["...", "..."], ["..."], linear=[[0, 1]])


def _transform(view: OpView) -> Rule:
    """_fft_*(x, dims, ...): each sum goes over the whole of its dims, whose sizes may change."""
    rank = len(view.operands[0].shape)
    dims = view.dims(1, rank)
    letters = " ".join("1" if dim in dims else f"d{dim}" for dim in range(rank))
    return einsum(view, [letters], [letters], linear=[[0]])


RULES: dict[str, RuleMaker] = {
    "aten.view_as_complex": _pairs,
    "aten.view_as_real": _parts,
    "aten.complex": _complex,
    **dict.fromkeys(("aten._fft_r2c", "aten._fft_c2r", "aten._fft_c2c"), _transform),
}
