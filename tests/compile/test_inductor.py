"""Compiled segments: numbers as traced, the user's line in errors, a compiler that is missing."""

from __future__ import annotations

import shutil
import stat

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor import config

from meshwright.compile import inductor
from meshwright.compile.draw import position_operand
from meshwright.compile.inductor import require_compiler
from meshwright.compile.lower import lower
from meshwright.errors import UsageError, UserCodeError
from meshwright.program.program import Op, Program, Ref, Symbol, Value
from tests.run.jobs import alone, close, job, losses, on_ranks, weights

compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # inductor's own, on Python 3.11
    pytest.mark.timeout(300),  # the first of them compiles torch's headers
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing of an earlier run is found."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))


def op(name, *args, out, **more):
    return Op(name, args, outputs=(out,), source="model.py:7", module="net", **more)


F32 = Value("float32", (4, 6))


def with_dropout():
    """(x + 1) masked by a draw, its transpose, and x itself: views and inputs as results."""
    position = Value("int64", (4,))
    draw = ("uniform", (4, 6), 3, 0, 1, 1, (), Ref(1))
    ops = (
        op("aten.add.Tensor", Ref(0), 1.0, out=2),
        op("meshwright.draw.default", *draw, out=3),
        op("aten.mul.Tensor", Ref(2), Ref(3), out=4),
        op("aten.t.default", Ref(4), out=5),
    )
    values = (F32, position, F32, F32, F32, Value("float32", (6, 4)))
    return Program(values, (("x", 0), ("position", 1)), ops, (("y", 4), ("t", 5), ("x", 0)))


@compiler
@pytest.mark.slow
def test_views_draws_and_strides(monkeypatch):
    made = []
    real = inductor.compile_module
    monkeypatch.setattr(inductor, "compile_module", lambda *a: made.append(1) or real(*a))
    program, where = with_dropout(), {"data": 0}
    traced, compiled = lower(program, where), lower(program, where, compiled=True)
    position = position_operand(1, 8, 2, 0)
    x = torch.randn(4, 6)
    for given in (x, x.clone(), torch.randn(6, 4).t(), torch.randn(6, 4).t()):
        for ours, want in zip(compiled(given, position), traced(given, position), strict=True):
            torch.testing.assert_close(ours, want, rtol=1e-6, atol=1e-6)
    assert len(made) == 2  # once for either stride


@compiler
@pytest.mark.slow
def test_an_error_names_the_users_line():
    values = (Value("float32", (5, 3)), Value("int64", (2,)), Value("float32", (2, 3)))
    look_up = op("aten.embedding.default", Ref(0), Ref(1), out=2)
    program = Program(values, (("w", 0), ("ids", 1)), (look_up,), (("y", 2),))
    segment = lower(program, {}, compiled=True)
    weight = torch.randn(5, 3)
    (found,) = segment(weight, torch.tensor([4, 0]))
    torch.testing.assert_close(found, weight[[4, 0]])
    with pytest.raises(UserCodeError, match=r"model\.py:7: aten\.embedding in net"):
        segment(weight, torch.tensor([4, 9]))


class Dropping(nn.Module):
    """Two equal layers with dropout between."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        for block in self.blocks:
            x = F.dropout(F.gelu(block(x)), 0.25, self.training)
        return self.head(x)


@compiler
@pytest.mark.slow
def test_steps_are_those_of_the_traced_program(monkeypatch):
    monkeypatch.setenv("CI", "1")  # where inductor refuses ops that it would rather decompose
    made = job(model=Dropping)
    want = on_ranks(made, "zero3,data=2", lambda s: (losses(s, 4), weights(s)))
    found = on_ranks(made, "zero3,data=2", lambda s: (losses(s, 4), weights(s)), compiled=True)
    for (seen, _), (loss, _) in zip(found, want, strict=True):
        assert seen == pytest.approx(loss, rel=1e-5)
    close(found[0][1], want[0][1])


def test_eager_code_is_not_compiled():
    with pytest.raises(UsageError, match="leave one of them out"):
        alone(job(), compiled=True, eager=True)


def test_without_a_compiler_that_is_said_with_the_remedy():
    with (
        config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(UsageError, match=r"none was found; .* or leave --compile out"),
    ):
        require_compiler()


def test_a_compiler_that_fails_is_quoted(tmp_path):
    broken = tmp_path / "c++"
    broken.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo g++ 12 && exit\n'
        'echo "kernel.cpp:1:10: fatal error: Python.h: No such file" >&2\nexit 1\n'
    )
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    with (
        config.patch({"cpp.cxx": (str(broken),)}),
        pytest.raises(UsageError, match=r"c\+\+ failed: .*Python\.h: No such file; install"),
    ):
        require_compiler()


@compiler
@pytest.mark.slow
def test_with_a_compiler_nothing_is_said():
    require_compiler()


def test_what_has_as_many_rows_as_come_is_not_compiled(monkeypatch):
    monkeypatch.setattr(inductor, "compile_module", lambda *_: pytest.fail("it was compiled"))
    args = (Ref(1), Ref(2), Ref(3), True)
    ops = (
        op("meshwright.expert_ids.default", Ref(0), out=2),
        op("meshwright.expert_mm.default", *args, out=4),
        op("aten.expand.default", Ref(4), (Symbol("rows", "first operand"), 6), out=5),
    )
    counts, ids, wide = Value("int64", (2, 2)), Value("int64", (4,)), Value("float32", (2, 6, 1))
    values = (counts, F32, ids, wide, Value("float32", (4, 1)), F32)
    inputs = (("counts", 0), ("x", 1), ("weights", 3))
    segment = lower(Program(values, inputs, ops, (("y", 5),)), {}, compiled=True)
    weights_ = torch.stack([torch.ones(6, 1), torch.full((6, 1), 2.0)])
    for counts_ in ([[1, 0], [2, 3]], [[0, 0], [0, 1]]):
        rows = sum(map(sum, counts_))
        (found,) = segment(torch.tensor(counts_), torch.ones(rows, 6), weights_)
        experts = [k for row in counts_ for k, count in enumerate(row) for _ in range(count)]
        assert found.shape == (rows, 6)
        assert found[:, 0].tolist() == [6.0 * (k + 1) for k in experts]
